// The seeded generator: known values, ranges, evenness, forks.

import { describe, expect, it } from 'vitest';
import { createRng } from '../../src/core/rng.js';

const draws = (rng: ReturnType<typeof createRng>, count: number): number[] =>
  Array.from({ length: count }, () => rng.nextUint32());

describe('createRng', () => {
  it('gives the same numbers for the same seed and others for another', () => {
    expect(draws(createRng(7), 50)).toEqual(draws(createRng(7), 50));
    expect(draws(createRng(7), 50)).not.toEqual(draws(createRng(8), 50));
  });

  it('tells seeds apart that differ above 32 bits only', () => {
    const starts = [1, 1 + 2 ** 32, 1 + 2 ** 33, 1 - 2 ** 32].map((seed) => draws(createRng(seed), 4).join());
    expect(new Set(starts).size).toBe(4);
  });

  it('refuses a seed that is no safe integer', () => {
    for (const seed of [Number.NaN, Infinity, 0.5, 2 ** 53]) expect(() => createRng(seed)).toThrow(RangeError);
  });

  it('steps as xoshiro128** does', () => {
    // The published algorithm in BigInt arithmetic, started from the state that the seed gives.
    const mask = 0xffffffffn;
    const rotl = (x: bigint, k: bigint): bigint => ((x << k) | (x >> (32n - k))) & mask;
    let seed = 42n;
    const word = (): bigint => {
      seed = (seed + 0x9e3779b9n) & mask;
      let z = seed;
      z = ((z ^ (z >> 16n)) * 0x21f0aaadn) & mask;
      z = ((z ^ (z >> 15n)) * 0x735a2d97n) & mask;
      return z ^ (z >> 15n);
    };
    let [a, b, c, d] = [word(), word(), word(), word()];
    const expected = Array.from({ length: 100 }, () => {
      const result = (rotl((b * 5n) & mask, 7n) * 9n) & mask;
      const t = (b << 9n) & mask;
      c ^= a;
      d ^= b;
      b ^= c;
      a ^= d;
      c ^= t;
      d = rotl(d, 11n);
      return Number(result);
    });
    expect(draws(createRng(42), 100)).toEqual(expected);
  });
});

describe('distributions', () => {
  it('uniform stays in [0, 1) with mean 1/2 and variance 1/12', () => {
    const rng = createRng(1);
    const values = Array.from({ length: 50_000 }, () => rng.uniform());
    expect(values.every((value) => value >= 0 && value < 1)).toBe(true);
    const mean = values.reduce((sum, value) => sum + value, 0) / values.length;
    const variance = values.reduce((sum, value) => sum + (value - mean) ** 2, 0) / values.length;
    expect(mean).toBeCloseTo(0.5, 2);
    expect(variance).toBeCloseTo(1 / 12, 2);
  });

  it('normal has mean 0, variance 1 and the tails of a normal distribution', () => {
    const rng = createRng(2);
    const values = Array.from({ length: 50_000 }, () => rng.normal());
    const mean = values.reduce((sum, value) => sum + value, 0) / values.length;
    const variance = values.reduce((sum, value) => sum + (value - mean) ** 2, 0) / values.length;
    const beyondTwo = values.filter((value) => Math.abs(value) > 2).length / values.length;
    expect(Math.abs(mean)).toBeLessThan(0.02);
    expect(variance).toBeCloseTo(1, 1);
    expect(beyondTwo).toBeGreaterThan(0.04);
    expect(beyondTwo).toBeLessThan(0.051);
  });

  it('int reaches every value of [lo, hi) about equally often', () => {
    const rng = createRng(3);
    const counts = new Map<number, number>();
    for (let i = 0; i < 70_000; i++) {
      const value = rng.int(-3, 4);
      counts.set(value, (counts.get(value) ?? 0) + 1);
    }
    expect([...counts.keys()].sort((a, b) => a - b)).toEqual([-3, -2, -1, 0, 1, 2, 3]);
    for (const count of counts.values()) expect(Math.abs(count - 10_000)).toBeLessThan(500);
  });

  it('int takes a span of 2^32 and refuses empty or broken ranges', () => {
    const rng = createRng(4);
    expect(rng.int(0, 2 ** 32)).toBeLessThan(2 ** 32);
    for (const [lo, hi] of [
      [1, 1],
      [2, 1],
      [0.5, 2],
      [0, 2 ** 32 + 1],
    ] as const) {
      expect(() => rng.int(lo, hi)).toThrow(RangeError);
    }
  });
});

describe('orders', () => {
  it('permutation holds every index once', () => {
    const order = createRng(5).permutation(1000);
    expect(order).toBeInstanceOf(Uint32Array);
    expect(Array.from(order).sort((a, b) => a - b)).toEqual(Array.from({ length: 1000 }, (_, i) => i));
  });

  it('shuffle works in place, keeps the items and gives every order of three about equally often', () => {
    const rng = createRng(6);
    const counts = new Map<string, number>();
    for (let i = 0; i < 12_000; i++) {
      const items = ['a', 'b', 'c'];
      expect(rng.shuffle(items)).toBe(items);
      counts.set(items.join(''), (counts.get(items.join('')) ?? 0) + 1);
    }
    expect(counts.size).toBe(6);
    for (const count of counts.values()) expect(Math.abs(count - 2000)).toBeLessThan(250);
  });

  it('pick refuses an empty list', () => {
    expect(() => createRng(7).pick([])).toThrow(RangeError);
  });
});

describe('fork', () => {
  it('depends on the seed and the label, not on what was drawn before', () => {
    const fresh = createRng(8);
    const used = createRng(8);
    draws(used, 10);
    expect(draws(fresh.fork('data'), 20)).toEqual(draws(used.fork('data'), 20));
    expect(draws(fresh, 5)).toEqual(draws(createRng(8), 5));
  });

  it('gives every label, number and string apart, and every seed its own stream', () => {
    const rng = createRng(9);
    const streams = [rng.fork('a'), rng.fork('b'), rng.fork(1), rng.fork('1'), rng.fork('a').fork('a'), rng];
    const starts = [...streams, createRng(10).fork('a')].map((stream) => draws(stream, 4).join());
    expect(new Set(starts).size).toBe(7);
  });
});
