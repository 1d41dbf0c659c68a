// A sample of a linear group's inputs: every channel's peak over all rows seen, and some of the rows, drawn evenly.
import { hostTensor, type HostTensor } from '../../core/tensor.js';
import { createRng, type Rng } from '../../core/rng.js';
import type { Backend, Tensor } from '../../ops/backend.js';

/** Rows drawn unless told otherwise. */
const DRAWN = 448;

/** Gathers rows chunk by chunk. */
export class InputSample {
  readonly #backend: Backend;
  readonly #rng: Rng;
  readonly #wanted: number;
  readonly #drawn: Float32Array[] = [];
  #peaks: Float64Array | undefined;
  #seen = 0;

  constructor(backend: Backend, seed: number, options: { readonly rows?: number } = {}) {
    this.#backend = backend;
    this.#wanted = options.rows ?? DRAWN;
    this.#rng = createRng(seed).fork('input sample');
  }

  /** Adds x [rows, channels]. */
  async add(x: Tensor): Promise<void> {
    const values = await this.#backend.download(x);
    const n = x.shape[1];
    const peaks = (this.#peaks ??= new Float64Array(n));
    for (let begin = 0; begin < values.length; begin += n) {
      const row = values.subarray(begin, begin + n);
      for (let c = 0; c < n; c++) {
        const size = Math.abs(row[c]);
        if (size > peaks[c]) peaks[c] = size;
      }
      // Reservoir sampling: every row is kept with the same probability.
      const slot = this.#seen < this.#wanted ? this.#seen : this.#rng.int(0, this.#seen + 1);
      if (slot < this.#wanted) this.#drawn[slot] = row.slice();
      this.#seen++;
    }
  }

  /** max|x| of every channel over all rows. */
  peaks(): Float64Array {
    return this.#peaks ?? new Float64Array(0);
  }

  /** The sample [rows, channels], as f32, in no order. */
  rows(): HostTensor {
    // Rows stand where the reservoir put them, early ones first: shuffled, any part of them is a sample.
    const rows = Array.from(this.#rng.fork('order').permutation(this.#drawn.length), (r) => this.#drawn[r]);
    const n = this.#peaks?.length ?? 0;
    const out = new Float32Array(rows.length * n);
    rows.forEach((row, r) => out.set(row, r * n));
    return hostTensor('f32', [rows.length, n], out);
  }
}
