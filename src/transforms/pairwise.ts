// Pairwise rotations with channel scaling (ParoQuant; design §4.1): making them, storing them, host maths in float64.
import { roundToF16 } from '../core/dtype.js';
import { ensure } from '../core/errors.js';
import type { Rng } from '../core/rng.js';
import { bytesOf } from '../core/tensor.js';
import type { PairwiseTransform } from '../ops/backend.js';
import { transformVector, weightScales } from '../ops/reference/rotation.js';
import { validateGrouping, type PairLayout } from './validate.js';

/**
 * Random pairs [krot, channels]: every rotation pairs all channels of every group, read two by two. No pair of a group
 * comes back before all have been used, that is within groupSize − 1 rotations: each group plays a round-robin
 * tournament with seeded seats and a seeded order of rounds.
 */
export function randomPairs(channels: number, groupSize: number, krot: number, rng: Rng): Int16Array {
  validateGrouping(channels, groupSize, krot);
  const pairs = new Int16Array(krot * channels);
  const rounds = groupSize - 1;
  for (let group = 0; group < channels; group += groupSize) {
    let seats = rng.permutation(groupSize);
    let order = rng.permutation(rounds);
    for (let k = 0; k < krot; k++) {
      if (k > 0 && k % rounds === 0) {
        seats = rng.permutation(groupSize);
        order = rng.permutation(rounds);
      }
      const games = rng.shuffle(tournamentRound(groupSize, order[k % rounds]));
      games.forEach(([a, b], p) => {
        // Which of the two is i only flips the sign of the angle.
        const [i, j] = rng.uniform() < 0.5 ? [a, b] : [b, a];
        pairs[k * channels + group + 2 * p] = seats[i];
        pairs[k * channels + group + 2 * p + 1] = seats[j];
      });
    }
  }
  return pairs;
}

/**
 * Pairs [krot, channels] of a random butterfly: rotation k of a group pairs channel c with c xor m, a mask of its own for each group
 * and rotation. The first log2(groupSize) masks of a group are independent, so that together they mix every channel with
 * every other; no mask comes back before all have been used. As random as {@link randomPairs} to the weights, whose channels
 * have no order. Groups that are no power of two get random pairs.
 */
export function xorPairs(channels: number, groupSize: number, krot: number, rng: Rng): Int16Array {
  validateGrouping(channels, groupSize, krot);
  if ((groupSize & (groupSize - 1)) !== 0) return randomPairs(channels, groupSize, krot, rng);
  const pairs = new Int16Array(krot * channels);
  for (let group = 0; group < channels; group += groupSize) {
    let masks: number[] = [];
    for (let k = 0; k < krot; k++) {
      if (masks.length === 0) masks = independentFirst(groupSize, rng);
      const mask = masks.shift() ?? 1;
      let p = k * channels + group;
      for (let c = 0; c < groupSize; c++) {
        if (c > (c ^ mask)) continue;
        pairs[p++] = c;
        pairs[p++] = c ^ mask;
      }
    }
  }
  return pairs;
}

/** The masks 1 … n − 1 in random order, but first log2(n) that no xor of the others before gives. */
function independentFirst(n: number, rng: Rng): number[] {
  const order = Array.from(rng.permutation(n - 1), (m) => m + 1);
  const basis: number[] = [];
  let span = new Set([0]);
  for (const mask of order) {
    if (span.has(mask)) continue;
    basis.push(mask);
    span = new Set([...span, ...[...span].map((s) => s ^ mask)]);
  }
  return [...basis, ...order.filter((mask) => !basis.includes(mask))];
}

/** Round `round` of a round-robin tournament of n players (circle method): n/2 games; n−1 rounds have all games once. */
function tournamentRound(n: number, round: number): [number, number][] {
  const circle = n - 1;
  const games: [number, number][] = [[circle, round]];
  for (let d = 1; d < n / 2; d++) games.push([(round + d) % circle, (round + circle - d) % circle]);
  return games;
}

/** The transform that changes nothing: angles 0, scales 1. Pairs are neighbours unless given. */
export function identityTransform(
  channels: number,
  groupSize: number,
  krot: number,
  pairs: Int16Array = Int16Array.from({ length: krot * channels }, (_, at) => at % groupSize),
): PairwiseTransform {
  validateGrouping(channels, groupSize, krot);
  return {
    channels,
    groupSize,
    krot,
    pairs,
    theta: new Float32Array((krot * channels) / 2),
    channelScales: new Float32Array(channels).fill(1),
  };
}

/**
 * The transform as a checkpoint stores it, from learned parameters: angles [krot, channels / 2] and weight-side scales
 * s [channels], with θ and a = 1/s rounded to f16. Weights must be rounded against this one, since it is what the
 * kernels will use. Angles are first brought into [−π, π], where f16 is finest. Throws `non-finite` when an angle is
 * not finite or a scale has no usable inverse in f16.
 */
export function roundTransform(
  layout: PairLayout,
  theta: ArrayLike<number>,
  scales: ArrayLike<number>,
): PairwiseTransform {
  const { channels, groupSize, krot, pairs } = layout;
  ensure(
    theta.length === (krot * channels) / 2 && scales.length === channels,
    'tensor-shape',
    () =>
      `transform of ${channels} channels and ${krot} rotations: found ${theta.length} angles and ${scales.length} scales`,
  );
  return {
    channels,
    groupSize,
    krot,
    pairs,
    theta: Float32Array.from(theta, (angle, at) => {
      ensure(Number.isFinite(angle), 'non-finite', () => `angle ${at} of a learned transform is ${angle}`);
      return roundToF16(Math.abs(angle) <= Math.PI ? angle : angle - 2 * Math.PI * Math.round(angle / (2 * Math.PI)));
    }),
    channelScales: Float32Array.from(scales, (s, at) => {
      const a = roundToF16(1 / s);
      ensure(
        Number.isFinite(a) && a !== 0,
        'non-finite',
        () => `scale ${at} of a learned transform is ${s}, whose inverse f16 cannot hold`,
        'use a smaller learning rate',
      );
      return a;
    }),
  };
}

/**
 * T on weight rows: `w ⊙ s`, then the rotations, with s = 1 / channelScales; or its inverse. w [rows, channels],
 * row-major as in checkpoints; a new array is returned.
 */
export function transformWeightRows(
  w: ArrayLike<number>,
  transform: PairwiseTransform,
  direction: 'forward' | 'inverse' = 'forward',
): Float64Array {
  return transformRows(w, transform, weightScales(transform), direction);
}

/** T⁻ᵀ on rows of activations: `x ⊙ channelScales`, then the rotations. x [rows, channels]; a new array is returned. */
export function applyToActivations(x: ArrayLike<number>, transform: PairwiseTransform): Float64Array {
  return transformRows(x, transform, transform.channelScales, 'forward');
}

function transformRows(
  x: ArrayLike<number>,
  transform: PairwiseTransform,
  scales: ArrayLike<number>,
  direction: 'forward' | 'inverse',
): Float64Array {
  const { channels } = transform;
  ensure(
    x.length % channels === 0,
    'tensor-shape',
    () => `expected rows of ${channels} channels, found ${x.length} values`,
  );
  const y = Float64Array.from(x);
  for (let base = 0; base < y.length; base += channels) transformVector(y, base, 1, transform, scales, direction);
  return y;
}

/**
 * The one transform that all of these are, or undefined when any bit differs. Checkpoints hold a transform per
 * projection; a loader merges projections that read the same input through the same transform.
 */
export function mergeEqual(transforms: readonly PairwiseTransform[]): PairwiseTransform | undefined {
  const [first, ...rest] = transforms;
  if (first === undefined) return undefined;
  return rest.every((other) => sameTransform(first, other)) ? first : undefined;
}

function sameTransform(a: PairwiseTransform, b: PairwiseTransform): boolean {
  return (
    a.channels === b.channels &&
    a.groupSize === b.groupSize &&
    a.krot === b.krot &&
    sameBytes(a.pairs, b.pairs) &&
    sameBytes(a.theta, b.theta) &&
    sameBytes(a.channelScales, b.channelScales)
  );
}

function sameBytes(a: Int16Array | Float32Array, b: Int16Array | Float32Array): boolean {
  const x = bytesOf(a);
  const y = bytesOf(b);
  return x.length === y.length && x.every((byte, at) => byte === y[at]);
}
