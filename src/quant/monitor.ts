// What every pipeline does around its work: progress in blocks, stopping when asked, and where the time goes.
import { GyreError } from '../core/errors.js';
import { silent } from '../core/progress.js';
import type { PipelineReport, QuantizeRun } from './run.js';

/** The outside of a run. */
export class RunMonitor {
  /** Seconds by kind of work, so far. */
  readonly seconds = { forward: 0, statistics: 0, quantize: 0, write: 0 };
  readonly #run: QuantizeRun;

  constructor(run: QuantizeRun) {
    this.#run = run;
  }

  /** Tells how many blocks are done, and what happens now. */
  tell(done: number, message: string): void {
    const { source, onProgress = silent } = this.#run;
    onProgress({ stage: 'quantize', done, total: source.config.layers, unit: 'blocks', message });
  }

  /** @throws GyreError `interrupted` once the run's signal has been given. */
  checkAborted(): void {
    if (this.#run.signal?.aborted)
      throw new GyreError('interrupted', 'stopped; finished blocks are kept', {
        remedy: 'run the same command with --resume to go on',
      });
  }

  /** Runs some work and books its time, failed or not. */
  async timed<T>(what: keyof PipelineReport['seconds'], work: () => Promise<T>): Promise<T> {
    const start = performance.now();
    try {
      return await work();
    } finally {
      this.seconds[what] += (performance.now() - start) / 1000;
    }
  }
}
