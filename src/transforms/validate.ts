// Checks of a pairwise transform that came from a file or a caller.
import { ensure } from '../core/errors.js';
import type { PairwiseTransform } from '../ops/backend.js';

/** The discrete part of a transform: which channels each rotation pairs. */
export type PairLayout = Pick<PairwiseTransform, 'channels' | 'groupSize' | 'krot' | 'pairs'>;

/** Throws `tensor-shape` unless every rotation of `layout` is a permutation inside each of its groups. */
export function validatePairs(layout: PairLayout, name = 'transform'): void {
  const { channels, groupSize, krot, pairs } = layout;
  validateGrouping(channels, groupSize, krot, name);
  expectLength(pairs.length, krot * channels, name, 'pairs');
  const seenAt = new Int32Array(groupSize).fill(-1);
  for (let start = 0; start < pairs.length; start += groupSize) {
    for (let at = start; at < start + groupSize; at++) {
      const channel = pairs[at];
      ensure(
        channel >= 0 && channel < groupSize && seenAt[channel] < start,
        'tensor-shape',
        () =>
          `${name}: pairs of rotation ${Math.floor(at / channels)} are no permutation of 0 … ${groupSize - 1} inside ` +
          `the group at channel ${start % channels}: found ${channel}${seenAt[channel] >= start ? ' twice' : ''}`,
      );
      seenAt[channel] = at;
    }
  }
}

/** Throws unless `transform` is complete: {@link validatePairs}, lengths, finite angles, finite non-zero scales. */
export function validateTransform(transform: PairwiseTransform, name = 'transform'): void {
  const { channels, krot, theta, channelScales } = transform;
  validatePairs(transform, name);
  expectLength(theta.length, (krot * channels) / 2, name, 'angles');
  expectLength(channelScales.length, channels, name, 'channel scales');
  const badAngle = theta.findIndex((value) => !Number.isFinite(value));
  ensure(badAngle < 0, 'non-finite', () => `${name}: angle ${badAngle} is ${theta[badAngle]}`);
  const badScale = channelScales.findIndex((value) => !Number.isFinite(value) || value === 0);
  ensure(badScale < 0, 'non-finite', () => `${name}: channel scale ${badScale} is ${channelScales[badScale]}`);
}

/** Throws unless channels in groups of `groupSize` can be paired. */
export function validateGrouping(channels: number, groupSize: number, krot: number, name = 'transform'): void {
  ensure(
    Number.isInteger(krot) && krot >= 0,
    'config-invalid',
    () => `${name}: the number of rotations must be 0 or more, found ${krot}`,
  );
  ensure(
    Number.isInteger(groupSize) && groupSize > 0 && groupSize % 2 === 0 && channels % groupSize === 0,
    'config-invalid',
    () => `${name}: expected an even group size that divides ${channels} channels, found ${groupSize}`,
    'choose an even divisor of the number of channels as group size',
  );
  // pairs are int16 in checkpoints.
  ensure(
    groupSize <= 32768,
    'limit-exceeded',
    () => `${name}: group size ${groupSize} exceeds 32768, the range of int16 pairs`,
  );
}

function expectLength(found: number, expected: number, name: string, what: string): void {
  ensure(found === expected, 'tensor-shape', () => `${name}: expected ${expected} ${what}, found ${found}`);
}
