// Gram matrices of a linear group's inputs, accumulated chunk by chunk.
import { GyreError } from '../core/errors.js';
import { hostTensor } from '../core/tensor.js';
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

  /**
   * The matrices [in, in], divided by the number of rows. Inputs that are all zero (a block pruned away) say nothing of
   * what matters: then every channel counts alike. @throws `non-finite` when the inputs were.
   */
  async finish(what: string): Promise<{ gram: Tensor; cross: Tensor | undefined }> {
    if (!this.#gram) throw new GyreError('calibration', `no calibration inputs for ${what}`);
    const gram = await this.#average(this.#gram);
    const cross = this.#cross && (await this.#average(this.#cross));
    const size = await this.#backend.dot(gram, gram);
    const crossSize = cross ? await this.#backend.dot(cross, cross) : 0;
    if (!Number.isFinite(size + crossSize)) {
      throw new GyreError('non-finite', `inputs of ${what} are NaN, infinite or overflow on the calibration data`, {
        remedy: 'the model itself produces them: check it with gyre eval on the same text',
      });
    }
    if (size > 0) return { gram, cross };
    this.#backend.free(gram, cross);
    const [n] = gram.shape;
    const identity = new Float32Array(n * n);
    for (let i = 0; i < n; i++) identity[i * n + i] = 1;
    return { gram: await this.#backend.upload(hostTensor('f32', [n, n], identity)), cross: undefined };
  }

  async #average(sum: Tensor): Promise<Tensor> {
    return this.#backend.addScaled(sum, sum, 1 / this.#rows - 1, true);
  }
}
