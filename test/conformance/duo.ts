// What a conformance case works with: the backend under test and the float64 oracle, fed with the same random inputs.
import { createRng, type Rng } from '../../src/core/rng.js';
import { hostTensor } from '../../src/core/tensor.js';
import { roundToF16 } from '../../src/core/dtype.js';
import type { Backend, PairwiseTransform, QuantizedWeight, Tensor, WeightBits } from '../../src/ops/backend.js';
import { readF64 } from '../../src/ops/reference/backend.js';
import { randomPairs } from '../../src/transforms/index.js';

/**
 * Factor on every statistical error bound. Rounding errors of independent sign add up like √n · u, and λ√n · u is
 * exceeded with probability 2·exp(−λ²/2) at worst (Higham and Mary 2019); λ = 4 leaves 7e-4 of a bound that is itself
 * far above what random data reach.
 */
export const LAMBDA = 4;

/** What a backend is allowed. */
export interface Allowance {
  /** Unit roundoff of the backend's arithmetic: 2^-24 for f32. */
  readonly roundoff: number;
  /** Products of at most this many rows with integer weights may round activations to int16 per weight group. */
  readonly int16Rows: number;
  /** Unit roundoff of what ops of more than 8 rows return and of the operands of their products: 2^-11 for f16; 0 as `roundoff`. */
  readonly activationRoundoff: number;
  /** Unit roundoff of keys and values in a cache: 2^-11 for f16, 0 where they are kept as they come. */
  readonly cacheRoundoff: number;
}

/** One input that lives on both backends. */
export interface Twin {
  readonly host: Float32Array;
  readonly shape: readonly number[];
  readonly subject: Tensor;
  readonly oracle: Tensor;
}

/** Both backends and the inputs of one case. */
export class Duo {
  readonly rng: Rng;
  readonly #twins: Twin[] = [];

  constructor(
    readonly subject: Backend,
    readonly oracle: Backend,
    readonly allowance: Allowance,
    seed: string,
  ) {
    this.rng = createRng(1).fork(seed);
  }

  /** Unit roundoff of an activation. */
  get activationRoundoff(): number {
    return Math.max(this.allowance.roundoff, this.allowance.activationRoundoff);
  }

  /** Half the smallest number that an activation can have beside 0. */
  get smallest(): number {
    return this.allowance.activationRoundoff > 0 ? 2 ** -25 : 2 ** -100;
  }

  /** Standard normal values. */
  normals(count: number, rng = this.rng): Float32Array {
    return Float32Array.from({ length: count }, () => rng.normal());
  }

  /** An input on both backends; normal values unless given. */
  async input(shape: readonly number[], host = this.normals(shape.reduce((a, b) => a * b, 1))): Promise<Twin> {
    const twin: Twin = {
      host,
      shape,
      // Copies: a backend may keep the array it was given.
      subject: await this.subject.upload(hostTensor('f32', shape, host.slice())),
      oracle: await this.oracle.upload(hostTensor('f32', shape, host.slice())),
    };
    this.#twins.push(twin);
    return twin;
  }

  /** Throws unless |actual − expected| ≤ tolerance for every element. `tolerance` is one number or a function of the index. */
  async close(
    actual: Tensor,
    expected: Tensor,
    tolerance: number | ((at: number) => number),
    what = 'result',
  ): Promise<void> {
    if (actual.shape.join() !== expected.shape.join()) {
      throw new Error(`${what}: shape [${actual.shape.join(', ')}], expected [${expected.shape.join(', ')}]`);
    }
    closeArrays(await this.subject.download(actual), readF64(expected), tolerance, what);
  }

  /** Throws when an op changed one of the inputs; then frees them. */
  async finish(): Promise<void> {
    for (const { subject, host } of this.#twins) {
      closeArrays(await this.subject.download(subject), host, 0, 'an input of the op, after it');
    }
    this.subject.free(...this.#twins.map((twin) => twin.subject));
    this.oracle.free(...this.#twins.map((twin) => twin.oracle));
  }
}

/** Throws with the worst element unless |actual − expected| ≤ tolerance everywhere. NaN never passes. */
export function closeArrays(
  actual: ArrayLike<number>,
  expected: ArrayLike<number>,
  tolerance: number | ((at: number) => number),
  what: string,
): void {
  if (actual.length !== expected.length) {
    throw new Error(`${what}: ${actual.length} elements, expected ${expected.length}`);
  }
  let worst = -1;
  let worstExcess = 1;
  for (let at = 0; at < expected.length; at++) {
    const error = Math.abs(actual[at] - expected[at]);
    const allowed = typeof tolerance === 'number' ? tolerance : tolerance(at);
    if (error <= allowed) continue;
    const excess = Number.isNaN(error) ? Infinity : error / allowed;
    if (excess >= worstExcess) {
      worst = at;
      worstExcess = excess;
    }
  }
  if (worst < 0) return;
  const allowed = typeof tolerance === 'number' ? tolerance : tolerance(worst);
  throw new Error(
    `${what}: element ${worst} of ${expected.length} is ${actual[worst]}, expected ${expected[worst]} ± ${allowed} ` +
      `(${worstExcess.toPrecision(3)} times the tolerance)`,
  );
}

/** Random pairs, angles of up to ±π and scales around 1, the last two as f16 values like those of a checkpoint. */
export function randomTransform(channels: number, groupSize: number, krot: number, rng: Rng): PairwiseTransform {
  return {
    channels,
    groupSize,
    krot,
    pairs: randomPairs(channels, groupSize, krot, rng),
    theta: Float32Array.from({ length: (krot * channels) / 2 }, () => roundToF16((2 * rng.uniform() - 1) * Math.PI)),
    channelScales: Float32Array.from({ length: channels }, () => roundToF16(Math.exp(0.5 * rng.normal()))),
  };
}

/** Random codes over the whole range, zero points and f16 scales. */
export function randomQuantized(
  outFeatures: number,
  inFeatures: number,
  bits: WeightBits,
  groupSize: number,
  rng: Rng,
): QuantizedWeight {
  const groups = (outFeatures * inFeatures) / groupSize;
  return {
    bits,
    groupSize,
    inFeatures,
    outFeatures,
    codes: Uint8Array.from({ length: outFeatures * inFeatures }, () => rng.int(0, 2 ** bits)),
    zeros: Uint8Array.from({ length: groups }, () => rng.int(0, 2 ** bits)),
    scales: Float32Array.from({ length: groups }, () => roundToF16((0.5 + rng.uniform()) / 2 ** bits)),
  };
}

/** Euclidean norm of values[start + i·stride], i < count. */
export function norm(values: ArrayLike<number>, start: number, count: number, stride = 1): number {
  let sum = 0;
  for (let i = 0; i < count; i++) sum += values[start + i * stride] ** 2;
  return Math.sqrt(sum);
}

/** Largest magnitude of values[start], …, values[start + count − 1]. */
export function maxAbs(values: ArrayLike<number>, start = 0, count = values.length): number {
  let max = 0;
  for (let i = start; i < start + count; i++) max = Math.max(max, Math.abs(values[i]));
  return max;
}

/** Largest norm of a row of values [rows, columns]. */
export function largestRow(values: ArrayLike<number>, columns: number): number {
  let max = 0;
  for (let at = 0; at < values.length; at += columns) max = Math.max(max, norm(values, at, columns));
  return max;
}
