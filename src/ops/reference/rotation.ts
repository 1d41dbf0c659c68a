// The pairwise transform in float64 (design §4.1), on rows of activations or weights and on channel-major weights.
import type { PairwiseTransform, TransformHandle } from '../backend.js';
import { ensure, GyreError } from '../../core/errors.js';
import { expectSize } from './tensor.js';

/** What the rotations alone need of a transform. */
export type Rotations = Pick<PairwiseTransform, 'channels' | 'groupSize' | 'krot' | 'pairs'> & {
  /** [krot, channels / 2], radians. */
  readonly theta: ArrayLike<number>;
};

/** The transform of a backend that reads it as it is. */
export class ReferenceTransform implements TransformHandle {
  readonly channels: number;

  constructor(readonly transform: PairwiseTransform) {
    this.channels = transform.channels;
    checkRotations(transform);
    expectSize(transform.channelScales.length, transform.channels, 'channel scales of a transform');
  }
}

/** The reference transform behind an opaque handle. */
export function ownTransform(handle: TransformHandle): PairwiseTransform {
  if (handle instanceof ReferenceTransform) return handle.transform;
  throw new GyreError('backend', 'this transform belongs to another backend');
}

/** Shapes only; that each rotation is a permutation inside its groups is the business of transforms/validate.ts. */
export function checkRotations({ channels, groupSize, krot, pairs, theta }: Rotations): void {
  ensure(
    channels % groupSize === 0 && groupSize % 2 === 0,
    'tensor-shape',
    () => `a transform needs an even group size that divides ${channels} channels, found ${groupSize}`,
  );
  expectSize(pairs.length, krot * channels, 'pairs of a transform');
  expectSize(theta.length, (krot * channels) / 2, 'angles of a transform');
}

/** Global channel indices of pair p of rotation k. */
export function pairAt({ channels, groupSize, pairs }: Rotations, k: number, p: number): readonly [number, number] {
  const group = Math.floor((2 * p) / groupSize) * groupSize;
  return [group + pairs[k * channels + 2 * p], group + pairs[k * channels + 2 * p + 1]];
}

/**
 * Rotation k of one vector, in place: `(x_i, x_j) ← (x_i cosθ + x_j sinθ, x_j cosθ − x_i sinθ)`, with −θ when
 * `sign` is −1. Channel c lies at x[base + c · stride].
 */
export function rotateOnce(x: Float64Array, base: number, stride: number, t: Rotations, k: number, sign: 1 | -1): void {
  for (let p = 0; p < t.channels / 2; p++) {
    const [i, j] = pairAt(t, k, p);
    const angle = sign * t.theta[(k * t.channels) / 2 + p];
    const a = x[base + i * stride];
    const b = x[base + j * stride];
    x[base + i * stride] = a * Math.cos(angle) + b * Math.sin(angle);
    x[base + j * stride] = b * Math.cos(angle) - a * Math.sin(angle);
  }
}

/** All rotations of one vector, in place: k = 0 … krot−1, or for the inverse k backwards with −θ. */
export function rotateVector(
  x: Float64Array,
  base: number,
  stride: number,
  t: Rotations,
  direction: 'forward' | 'inverse',
): void {
  for (let n = 0; n < t.krot; n++) {
    if (direction === 'forward') rotateOnce(x, base, stride, t, n, 1);
    else rotateOnce(x, base, stride, t, t.krot - 1 - n, -1);
  }
}

/**
 * The transform on one vector, in place: forward multiplies by `scales`, then rotates; the inverse rotates back, then
 * divides by them. `scales` are s for weights and a = 1/s for activations.
 */
export function transformVector(
  x: Float64Array,
  base: number,
  stride: number,
  t: Rotations,
  scales: ArrayLike<number>,
  direction: 'forward' | 'inverse',
): void {
  if (direction === 'inverse') rotateVector(x, base, stride, t, direction);
  for (let c = 0; c < t.channels; c++) {
    const at = base + c * stride;
    x[at] = direction === 'forward' ? x[at] * scales[c] : x[at] / scales[c];
  }
  if (direction === 'forward') rotateVector(x, base, stride, t, direction);
}

/** s = 1 / a in float64: [channels]. */
export function weightScales(transform: Pick<PairwiseTransform, 'channelScales'>): Float64Array {
  return Float64Array.from(transform.channelScales, (a) => 1 / a);
}
