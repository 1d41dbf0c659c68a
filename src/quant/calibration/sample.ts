// A sample of a linear group's inputs: every channel's peak over all rows seen, and some of the rows: drawn evenly, and those
// with the largest peaks, for the few tokens that carry massive activations decide over smoothing.
import { hostTensor, type HostTensor } from '../../core/tensor.js';
import { createRng, type Rng } from '../../core/rng.js';
import type { Backend, Tensor } from '../../ops/backend.js';

/** Rows drawn evenly, and with the largest peaks. */
const DRAWN = 448;
const EXTREME = 32;

/** Gathers rows chunk by chunk. */
export class InputSample {
  readonly #backend: Backend;
  readonly #rng: Rng;
  readonly #drawn: Float32Array[] = [];
  #extreme: { peak: number; row: Float32Array }[] = [];
  #peaks: Float64Array | undefined;
  #seen = 0;

  constructor(backend: Backend, seed: number) {
    this.#backend = backend;
    this.#rng = createRng(seed).fork('input sample');
  }

  /** Adds x [rows, channels]. */
  async add(x: Tensor): Promise<void> {
    const values = await this.#backend.download(x);
    const n = x.shape[1];
    const peaks = (this.#peaks ??= new Float64Array(n));
    for (let begin = 0; begin < values.length; begin += n) {
      const row = values.subarray(begin, begin + n);
      let peak = 0;
      for (let c = 0; c < n; c++) {
        const size = Math.abs(row[c]);
        if (size > peaks[c]) peaks[c] = size;
        if (size > peak) peak = size;
      }
      // Reservoir sampling: every row is kept with the same probability.
      const slot = this.#seen < DRAWN ? this.#seen : this.#rng.int(0, this.#seen + 1);
      if (slot < DRAWN) this.#drawn[slot] = row.slice();
      this.#seen++;
      if (this.#extreme.length < EXTREME || peak > this.#extreme[EXTREME - 1].peak) {
        this.#extreme.push({ peak, row: row.slice() });
        this.#extreme.sort((a, b) => b.peak - a.peak);
        this.#extreme = this.#extreme.slice(0, EXTREME);
      }
    }
  }

  /** max|x| of every channel over all rows. */
  peaks(): Float64Array {
    return this.#peaks ?? new Float64Array(0);
  }

  /** The sample [rows, channels], as f32; without `extremes` only the rows drawn evenly. */
  rows(options: { extremes?: boolean } = {}): HostTensor {
    const rows = [...this.#drawn, ...(options.extremes === false ? [] : this.#extreme.map(({ row }) => row))];
    const n = this.#peaks?.length ?? 0;
    const out = new Float32Array(rows.length * n);
    rows.forEach((row, r) => out.set(row, r * n));
    return hostTensor('f32', [rows.length, n], out);
  }
}
