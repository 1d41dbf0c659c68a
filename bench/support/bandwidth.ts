// Streaming read bandwidth of the cores this process may use: each reads memory far larger than the caches at once. Stays open, so that
// it can be measured between the runs that are compared with it (the machine may be shared).
import { availableParallelism } from 'node:os';
import { Worker } from 'node:worker_threads';

/** A WebAssembly loop would measure WebAssembly: memory is measured by native code that Node.js brings along. */
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

/** Measures streaming reads; one thread per core waits between measurements. */
export class BandwidthMeter {
  readonly #workers: readonly Worker[];

  private constructor(workers: readonly Worker[]) {
    this.#workers = workers;
  }

  static async open(threads = availableParallelism()): Promise<BandwidthMeter> {
    const workers = Array.from({ length: threads }, () => new Worker(READER, { eval: true, execArgv: [] }));
    await Promise.all(workers.map(next));
    return new BandwidthMeter(workers);
  }

  /** GB/s read by all threads together, once. */
  async measure(): Promise<number> {
    const answers = this.#workers.map(next);
    for (const worker of this.#workers) worker.postMessage('go');
    const runs = (await Promise.all(answers)) as { start: bigint; end: bigint; bytes: number }[];
    const start = runs.reduce((m, r) => (r.start < m ? r.start : m), runs[0].start);
    const end = runs.reduce((m, r) => (r.end > m ? r.end : m), runs[0].end);
    return runs.reduce((sum, r) => sum + r.bytes, 0) / Number(end - start);
  }

  async close(): Promise<void> {
    await Promise.all(this.#workers.map((worker) => worker.terminate()));
  }
}

function next(worker: Worker): Promise<unknown> {
  return new Promise((resolve) => worker.once('message', resolve));
}
