// AdamW on the host, for the few thousand parameters of a transform.
export { cosineRate } from '../autograd/optimizer.js';

/** Settings of {@link AdamW}; the defaults are the published ParoQuant ones (design §4.4). */
export interface AdamWOptions {
  readonly beta1?: number;
  readonly beta2?: number;
  readonly eps?: number;
  readonly weightDecay?: number;
}

/** AdamW (Loshchilov & Hutter 2019) over one parameter array, in f64. */
export class AdamW {
  readonly #m: Float64Array;
  readonly #v: Float64Array;
  readonly #options: Required<AdamWOptions>;
  #step = 0;

  constructor(size: number, options: AdamWOptions = {}) {
    this.#m = new Float64Array(size);
    this.#v = new Float64Array(size);
    this.#options = { beta1: 0.9, beta2: 0.95, eps: 1e-10, weightDecay: 0, ...options };
  }

  /** One step down `gradient`, in place on `parameters`. */
  step(parameters: Float64Array, gradient: Float64Array, learningRate: number): void {
    const { beta1, beta2, eps, weightDecay } = this.#options;
    this.#step++;
    const correction1 = 1 - beta1 ** this.#step;
    const correction2 = 1 - beta2 ** this.#step;
    for (let i = 0; i < parameters.length; i++) {
      const g = gradient[i];
      const m = (this.#m[i] = beta1 * this.#m[i] + (1 - beta1) * g);
      const v = (this.#v[i] = beta2 * this.#v[i] + (1 - beta2) * g * g);
      parameters[i] -=
        learningRate * (m / correction1 / (Math.sqrt(v / correction2) + eps) + weightDecay * parameters[i]);
    }
  }
}
