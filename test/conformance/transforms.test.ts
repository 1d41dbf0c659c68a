// Host-side transforms: pairs, stored precision, checks, and the same map as the ops.
import { describe, expect, it } from 'vitest';
import { roundToF16 } from '../../src/core/dtype.js';
import { createRng } from '../../src/core/rng.js';
import { hostTensor } from '../../src/core/tensor.js';
import { createReferenceBackend, readF64 } from '../../src/ops/reference/backend.js';
import {
  applyToActivations,
  identityTransform,
  mergeEqual,
  randomPairs,
  roundTransform,
  transformWeightRows,
  validatePairs,
  validateTransform,
} from '../../src/transforms/index.js';
import { closeArrays, randomTransform } from './duo.js';

describe('randomPairs', () => {
  it.each([
    [256, 128, 8],
    [352, 32, 31],
    [172, 172, 8],
    [172, 4, 3],
    [6, 2, 1],
    [64, 64, 63],
  ])('%i channels in groups of %i, K = %i: permutations, and no pair twice', (channels, groupSize, krot) => {
    const pairs = randomPairs(channels, groupSize, krot, createRng(1));
    validatePairs({ channels, groupSize, krot, pairs });
    const seen = new Set<string>();
    for (let k = 0; k < krot; k++) {
      for (let at = 0; at < channels; at += 2) {
        const [i, j] = [pairs[k * channels + at], pairs[k * channels + at + 1]];
        seen.add(`${Math.floor(at / groupSize)}: ${Math.min(i, j)} ${Math.max(i, j)}`);
      }
    }
    expect(seen.size).toBe((krot * channels) / 2);
  });

  it('goes on after all pairs were used', () => {
    validatePairs({ channels: 8, groupSize: 4, krot: 10, pairs: randomPairs(8, 4, 10, createRng(1)) });
  });

  it('depends on the seed alone, and differs between groups', () => {
    const make = (seed: number) => randomPairs(256, 128, 8, createRng(seed));
    expect(make(5)).toEqual(make(5));
    expect(make(5)).not.toEqual(make(6));
    expect(make(5).slice(0, 128)).not.toEqual(make(5).slice(128, 256));
  });

  it.each([
    [172, 43],
    [172, 64],
    [128, 0],
  ])('refuses %i channels in groups of %i', (channels, groupSize) => {
    expect(() => randomPairs(channels, groupSize, 1, createRng(1))).toThrow(/group size/);
  });
});

describe('host maths', () => {
  it('is the same map as the ops, on checkpoint-order weights and on activations', async () => {
    const ops = createReferenceBackend();
    const rng = createRng(2);
    const transform = randomTransform(172, 4, 3, rng);
    const w = Float64Array.from({ length: 5 * 172 }, () => rng.normal());
    const tensor = await ops.upload(hostTensor('f64', [5, 172], w));
    const forward = await ops.transformChannels(await ops.transpose(tensor), transform, 'forward');
    closeArrays(transformWeightRows(w, transform), readF64(await ops.transpose(forward)), 1e-14, 'T(W)');
    const inverse = transformWeightRows(transformWeightRows(w, transform), transform, 'inverse');
    closeArrays(inverse, w, 1e-12, 'T⁻¹(T(W))');
    const rotated = await ops.rotate(tensor, await ops.loadTransform(transform));
    closeArrays(applyToActivations(w, transform), readF64(rotated), 1e-14, 'T⁻ᵀ(x)');
  });

  it('identity changes nothing', () => {
    const transform = identityTransform(12, 4, 2);
    validateTransform(transform);
    expect([...transformWeightRows([...Array(12).keys()], transform)]).toEqual([...Array(12).keys()]);
  });
});

describe('roundTransform', () => {
  const layout = { channels: 4, groupSize: 4, krot: 1, pairs: Int16Array.of(0, 1, 2, 3) };

  it('stores f16 angles in [−π, π] and f16 inverse scales', () => {
    const { theta, channelScales } = roundTransform(layout, [0.123456789, 2 * Math.PI + 0.1], [3, 1, -0.7, 0.1]);
    expect([...theta]).toEqual([roundToF16(0.123456789), roundToF16(2 * Math.PI + 0.1 - 2 * Math.PI)]);
    expect([...channelScales]).toEqual([1 / 3, 1, 1 / -0.7, 10].map(roundToF16));
  });

  it.each([
    ['NaN angle', [NaN, 0], [1, 1, 1, 1]],
    ['scale 0', [0, 0], [1, 0, 1, 1]],
    ['scale whose inverse overflows f16', [0, 0], [1, 1e-6, 1, 1]],
    ['scale whose inverse underflows f16', [0, 0], [1, 1e9, 1, 1]],
  ])('refuses a %s', (_, theta, scales) => {
    expect(() => roundTransform(layout, theta, scales)).toThrow(/learned transform/);
  });
});

describe('validateTransform', () => {
  const good = randomTransform(8, 4, 2, createRng(3));

  it.each([
    [
      'a channel twice',
      { ...good, pairs: good.pairs.map((p, at) => (at === 9 ? good.pairs[8] : p)) },
      /rotation 1.*twice/,
    ],
    [
      'a channel outside its group',
      { ...good, pairs: good.pairs.map((p, at) => (at === 5 ? 4 : p)) },
      /channel 4.*found 4/,
    ],
    ['missing angles', { ...good, theta: good.theta.slice(1) }, /8 angles, found 7/],
    ['an infinite angle', { ...good, theta: good.theta.map(() => Infinity) }, /angle 0 is Infinity/],
    ['a zero scale', { ...good, channelScales: good.channelScales.map((a, at) => (at === 6 ? 0 : a)) }, /scale 6 is 0/],
  ])('refuses %s', (_, transform, message) => {
    validateTransform(good);
    expect(() => validateTransform(transform)).toThrow(message);
  });
});

describe('mergeEqual', () => {
  it('is the one transform of equal bytes, and nothing otherwise', () => {
    const make = () => randomTransform(8, 4, 2, createRng(4));
    const first = make();
    expect(mergeEqual([first, make(), make()])).toBe(first);
    expect(mergeEqual([first])).toBe(first);
    expect(mergeEqual([])).toBeUndefined();
    expect(mergeEqual([first, { ...make(), channelScales: first.channelScales.map((a) => 2 * a) }])).toBeUndefined();
    expect(mergeEqual([first, { ...make(), groupSize: 8 }])).toBeUndefined();
    // +0 and −0 are different bytes.
    const zero = { ...first, theta: first.theta.map(() => 0) };
    expect(mergeEqual([zero, { ...zero, theta: zero.theta.map(() => -0) }])).toBeUndefined();
  });
});
