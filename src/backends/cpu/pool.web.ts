// Kernel workers in a page: Web Workers started from a Blob.
import { WORKER_SOURCE, type WorkerStart, type Workers } from './pool-worker.js';

const SOURCE = `${WORKER_SOURCE}
onmessage = (event) => serve(event.data, () => postMessage('ready'));`;

/** Threads this machine runs at once. */
export function hardwareThreads(): number {
  return navigator.hardwareConcurrency || 1;
}

/** Starts one worker per entry and waits until each can take jobs. */
export async function startWorkers(starts: readonly WorkerStart[]): Promise<Workers> {
  const url = URL.createObjectURL(new Blob([SOURCE], { type: 'text/javascript' }));
  const workers: Worker[] = [];
  try {
    await Promise.all(
      starts.map(
        (start) =>
          new Promise<void>((resolve, reject) => {
            const worker = new Worker(url, { name: `gyre kernels ${start.index}` });
            workers.push(worker);
            worker.onmessage = () => resolve();
            worker.onerror = (event) => reject(new Error(`kernel worker: ${event.message}`));
            worker.postMessage(start);
          }),
      ),
    );
  } finally {
    URL.revokeObjectURL(url);
  }
  return {
    stop() {
      for (const worker of workers) worker.terminate();
      return Promise.resolve();
    },
  };
}
