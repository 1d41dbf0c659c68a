// Gram matrices of a linear group's inputs, and what its outputs should be, accumulated chunk by chunk.
import { GyreError } from '../core/errors.js';
import { hostTensor } from '../core/tensor.js';
import type { Backend, Tensor } from '../ops/backend.js';

/** What is known of a group's inputs, see GroupTask. */
export interface Statistics {
  readonly gram: Tensor;
  readonly cross: Tensor | undefined;
  readonly target: Tensor | undefined;
}

/** Accumulates H = XᵀX/n, C = X̃ᵀX/n and Pᵗ = XᵀY/n. */
export class InputStatistics {
  readonly #backend: Backend;
  #gram: Tensor | undefined;
  #cross: Tensor | undefined;
  #target: Tensor | undefined;
  #rows = 0;

  constructor(backend: Backend) {
    this.#backend = backend;
  }

  /**
   * Adds a chunk: x [rows, in] of the quantized path, and what says how the outputs should be, if anything does: the
   * inputs of the reference path [rows, in], or the wanted outputs themselves [rows, out]. With `weights` [rows] a row
   * counts as that many.
   */
  async add(
    x: Tensor,
    wanted: { readonly reference?: Tensor; readonly outputs?: Tensor },
    weights?: Float32Array,
  ): Promise<void> {
    // Roots on both sides: a Gram matrix stays exactly symmetric.
    const factors = weights?.map((weight) => Math.sqrt(weight));
    const weigh = async (rows: Tensor): Promise<Tensor> => (factors ? this.#backend.scaleRows(rows, factors) : rows);
    const own = await weigh(x);
    this.#gram = await this.#accumulate(this.#gram, own, own);
    if (wanted.reference) {
      const reference = await weigh(wanted.reference);
      this.#cross = await this.#accumulate(this.#cross, reference, own);
      if (factors) this.#backend.free(reference);
    }
    if (wanted.outputs) {
      const outputs = await weigh(wanted.outputs);
      this.#target = await this.#accumulate(this.#target, own, outputs);
      if (factors) this.#backend.free(outputs);
    }
    if (factors) this.#backend.free(own);
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
   * The matrices, divided by the number of rows. Inputs that are all zero (a block pruned away) say nothing of what
   * matters: then every channel counts alike. @throws `non-finite` when the inputs were.
   */
  async finish(what: string): Promise<Statistics> {
    if (!this.#gram) throw new GyreError('calibration', `no calibration inputs for ${what}`);
    const gram = await this.#average(this.#gram);
    const cross = this.#cross && (await this.#average(this.#cross));
    const target = this.#target && (await this.#average(this.#target));
    const size = await this.#backend.dot(gram, gram);
    const reference = cross ? await this.#backend.dot(cross, cross) : 0;
    const wanted = target ? await this.#backend.dot(target, target) : 0;
    if (!Number.isFinite(size + reference + wanted)) {
      const which = Number.isFinite(size + reference) ? 'outputs' : 'inputs';
      throw new GyreError('non-finite', `${which} of ${what} are NaN, infinite or overflow on the calibration data`, {
        remedy: 'the model itself produces them: check it with gyre eval on the same text',
      });
    }
    if (size > 0) return { gram, cross, target };
    this.#backend.free(gram, cross, target);
    const [n] = gram.shape;
    const identity = new Float32Array(n * n);
    for (let i = 0; i < n; i++) identity[i * n + i] = 1;
    return {
      gram: await this.#backend.upload(hostTensor('f32', [n, n], identity)),
      cross: undefined,
      target: undefined,
    };
  }

  async #average(sum: Tensor): Promise<Tensor> {
    return this.#backend.addScaled(sum, sum, 1 / this.#rows - 1, true);
  }
}

/**
 * What a group that writes to the residual stream should put out so that the quantized path's stream becomes the
 * reference path's: `after` (the reference's stream past the group) − `before` (the quantized path's stream in front of it)
 * − bias. Both streams [rows, hidden], bias [hidden].
 */
export async function wantedOutputs(
  backend: Backend,
  after: Tensor,
  before: Tensor,
  bias: Float32Array | undefined,
): Promise<Tensor> {
  const outputs = await backend.addScaled(after, before, -1);
  if (!bias) return outputs;
  const [rows] = after.shape;
  const tile = new Float32Array(rows * bias.length);
  for (let r = 0; r < rows; r++) tile.set(bias, r * bias.length);
  const biases = await backend.upload(hostTensor('f32', [rows, bias.length], tile));
  await backend.addScaled(outputs, biases, -1, true);
  backend.free(biases);
  return outputs;
}
