// AdamW over variables, in place on their backend, with a cosine schedule.
import type { Backend, Tensor } from '../ops/backend.js';
import { requireGradients, type AdamWStep } from '../ops/gradients.js';
import type { Variable } from './tape.js';

/** Settings of AdamW; the defaults are the published ParoQuant ones (design §4.4). */
export interface OptimizerOptions {
  readonly beta1?: number;
  readonly beta2?: number;
  readonly eps?: number;
  readonly weightDecay?: number;
  /** Steps of the cosine schedule, from each group's learning rate at the first to `floor` of it at the last. */
  readonly steps: number;
  /** Default 1/20. */
  readonly floor?: number;
}

/** What the published recipe has of AdamW (design §4.4). */
export const ADAM_DEFAULTS = { beta1: 0.9, beta2: 0.95, eps: 1e-10, weightDecay: 0.01 } as const;

/** Parameters that share a learning rate. */
export interface ParameterGroup {
  readonly parameters: readonly Variable[];
  readonly learningRate: number;
  /** Where values are held after each step. */
  readonly range?: AdamWStep['range'];
}

/** Cosine from `peak` at step 0 to `peak · floor` at step `steps`. */
export function cosineRate(step: number, steps: number, peak: number, floor = 1 / 20): number {
  return peak * (floor + ((1 - floor) * (1 + Math.cos((Math.PI * step) / steps))) / 2);
}

/** Steps parameters down their gradients. Gradients add up over several backward passes until `step` takes them. */
export class Optimizer {
  readonly #backend: Backend;
  readonly #groups: readonly ParameterGroup[];
  readonly #options: Required<OptimizerOptions>;
  readonly #moments = new Map<Variable, { first: Tensor; second: Tensor }>();
  #step = 0;

  constructor(backend: Backend, groups: readonly ParameterGroup[], options: OptimizerOptions) {
    this.#backend = backend;
    this.#groups = groups;
    this.#options = { ...ADAM_DEFAULTS, floor: 1 / 20, ...options };
  }

  /** One step of every parameter that has a gradient. */
  async step(): Promise<void> {
    const backend = this.#backend;
    const { steps, floor, ...adam } = this.#options;
    const share = cosineRate(Math.min(this.#step, steps), steps, 1, floor);
    this.#step++;
    for (const { parameters, learningRate, range } of this.#groups) {
      for (const variable of parameters) {
        const gradient = variable.takeGradient();
        if (!gradient) continue;
        const { first, second } = await this.#momentsOf(variable);
        await requireGradients(backend).adamW(variable.value, gradient, first, second, {
          ...adam,
          learningRate: learningRate * share,
          step: this.#step,
          range,
        });
        backend.free(gradient);
      }
    }
  }

  /** Frees the moments, and gradients not taken. */
  dispose(): void {
    for (const { first, second } of this.#moments.values()) this.#backend.free(first, second);
    for (const { parameters } of this.#groups) for (const v of parameters) this.#backend.free(v.takeGradient());
    this.#moments.clear();
  }

  async #momentsOf(variable: Variable): Promise<{ first: Tensor; second: Tensor }> {
    const known = this.#moments.get(variable);
    if (known) return known;
    const { shape } = variable.value;
    const size = shape.reduce((a, b) => a * b, 1);
    const zeros = () => this.#backend.upload({ dtype: 'f32', shape, data: new Float32Array(size) });
    const made = { first: await zeros(), second: await zeros() };
    this.#moments.set(variable, made);
    return made;
  }
}
