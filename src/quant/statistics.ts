// Gram matrices of a linear group's inputs, accumulated chunk by chunk.
import { GyreError } from '../core/errors.js';
import type { Backend, Tensor } from '../ops/backend.js';

/** Accumulates H = XᵀX/n and C = X̃ᵀX/n. */
export class InputStatistics {
  readonly #backend: Backend;
  #gram: Tensor | undefined;
  #cross: Tensor | undefined;
  #rows = 0;

  constructor(backend: Backend) {
    this.#backend = backend;
  }

  /** Adds a chunk: x [rows, in] of the quantized path, `reference` of the reference path where it differs. */
  async add(x: Tensor, reference: Tensor | undefined): Promise<void> {
    this.#gram = await this.#accumulate(this.#gram, x, x);
    if (reference) this.#cross = await this.#accumulate(this.#cross, reference, x);
    this.#rows += x.shape[0];
  }

  async #accumulate(sum: Tensor | undefined, a: Tensor, b: Tensor): Promise<Tensor> {
    const product = await this.#backend.matmul(a, b, { transposeA: true });
    if (!sum) return product;
    const next = await this.#backend.addScaled(sum, product, 1, true);
    this.#backend.free(product);
    return next;
  }

  /** The matrices [in, in], divided by the number of rows. @throws `non-finite` when the inputs were. */
  async finish(what: string): Promise<{ gram: Tensor; cross: Tensor | undefined }> {
    if (!this.#gram) throw new GyreError('calibration', `no calibration inputs for ${what}`);
    const gram = await this.#average(this.#gram);
    const cross = this.#cross && (await this.#average(this.#cross));
    const size = await this.#backend.dot(gram, gram);
    if (!Number.isFinite(size)) {
      throw new GyreError('non-finite', `inputs of ${what} are NaN or infinite on the calibration data`, {
        remedy: 'the model itself produces them: check it with gyre eval on the same text',
      });
    }
    return { gram, cross };
  }

  async #average(sum: Tensor): Promise<Tensor> {
    return this.#backend.addScaled(sum, sum, 1 / this.#rows - 1, true);
  }
}
