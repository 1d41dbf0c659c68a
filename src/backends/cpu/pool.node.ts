// Kernel workers in Node.js: worker threads that never keep the process alive.
import { availableParallelism } from 'node:os';
import { Worker } from 'node:worker_threads';
import { WORKER_SOURCE, type WorkerStart, type Workers } from './pool-worker.js';

const SOURCE = `const { parentPort, workerData } = require('node:worker_threads');
${WORKER_SOURCE}
serve(workerData, () => parentPort.postMessage('ready'));`;

/** Threads this machine runs at once. */
export function hardwareThreads(): number {
  return availableParallelism();
}

/** Starts one worker per entry and waits until each can take jobs. */
export async function startWorkers(starts: readonly WorkerStart[]): Promise<Workers> {
  const workers = starts.map(
    // Without execArgv the loaders of tsx and vitest would be installed in each worker.
    (start) => new Worker(SOURCE, { eval: true, workerData: start, execArgv: [], name: `gyre kernels ${start.index}` }),
  );
  await Promise.all(
    workers.map(
      (worker) =>
        new Promise<void>((resolve, reject) => {
          worker.once('message', () => resolve());
          worker.once('error', reject);
        }),
    ),
  );
  for (const worker of workers) worker.unref();
  return {
    async stop() {
      await Promise.all(workers.map((worker) => worker.terminate()));
    },
  };
}
