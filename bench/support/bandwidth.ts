// Streaming read bandwidth of the machine, by the same threads and instruction set as the kernels: the GEMV kernel on bf16
// weights far larger than the caches, the fastest reader that this WebAssembly build has.
import { cpus } from 'node:os';
import { Worker } from 'node:worker_threads';

/** A WebAssembly loop would measure WebAssembly; memory is measured by summing 64-bit integers in native typed-array code. */
const READER = `
const { workerData, parentPort } = require('node:worker_threads');
const bytes = 256 * 1024 * 1024;
// Buffer.compare of a region with itself's copy reads both with memcmp: the nearest to a pure native read in Node.js.
const a = Buffer.alloc(bytes, 1), b = Buffer.alloc(bytes, 1);
parentPort.on('message', () => {
  const start = process.hrtime.bigint();
  a.compare(b);
  parentPort.postMessage({ start, end: process.hrtime.bigint(), bytes: 2 * bytes });
});
parentPort.postMessage('ready');
`;

/** GB/s read by all cores together: best of five. */
export async function measureReadBandwidth(): Promise<number> {
  const workers = cpus().map(() => new Worker(READER, { eval: true, execArgv: [] }));
  const next = (worker: Worker) => new Promise<unknown>((resolve) => worker.once('message', resolve));
  await Promise.all(workers.map(next));
  let best = 0;
  for (let i = 0; i < 5; i++) {
    const answers = workers.map(next);
    for (const worker of workers) worker.postMessage('go');
    const runs = (await Promise.all(answers)) as { start: bigint; end: bigint; bytes: number }[];
    const start = runs.reduce((m, r) => (r.start < m ? r.start : m), runs[0].start);
    const end = runs.reduce((m, r) => (r.end > m ? r.end : m), runs[0].end);
    best = Math.max(best, runs.reduce((sum, r) => sum + r.bytes, 0) / Number(end - start));
  }
  await Promise.all(workers.map((worker) => worker.terminate()));
  return best;
}
