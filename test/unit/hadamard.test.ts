// Hadamard matrices and transforms: H·Hᵀ = n·I for every order that the supported models need, fast against dense, inverse.
import { describe, expect, it } from 'vitest';
import { createRng } from '../../src/core/rng.js';
import { hadamardEntry, hadamardRows } from '../../src/ops/reference/hadamard.js';
import {
  applyHadamard,
  findHadamardBase,
  hadamardTransform,
  largestHadamardOrder,
  randomHadamard,
  rotateColumns,
  rotateRows,
} from '../../src/transforms/index.js';

/** Widths of Llama 2 and 3.x, Mistral, Qwen2, Qwen2.5 and Qwen3, and the base matrix each takes. */
const WIDTHS: readonly (readonly [channels: number, base: number])[] = [
  [384, 12],
  [896, 28],
  [1024, 1],
  [1536, 12],
  [2048, 1],
  [2560, 20],
  [3072, 12],
  [3584, 28],
  [4096, 1],
  [4864, 76],
  [5120, 20],
  [5632, 44],
  [6144, 12],
  [8192, 1],
  [8960, 140],
  [9728, 76],
  [11008, 172],
  [12288, 12],
  [13824, 108],
  [14336, 28],
  [17408, 68],
  [18944, 148],
  [25600, 100],
  [27648, 108],
  [28672, 28],
  [29568, 924],
  [32768, 1],
  [64, 1],
  [80, 20],
  [96, 12],
  [128, 1],
  [172, 172],
];

describe('Hadamard matrices', () => {
  it.each([...new Set(WIDTHS.map(([, base]) => base)), 36, 52, 60, 84, 92])('base of order %i: H·Hᵀ = m·I', (order) => {
    const base = findHadamardBase(order);
    if (order === 92) {
      // Williamson's 23 has no multiplier but ±1: eleven classes, beyond the search.
      expect(base).toBeUndefined();
      return;
    }
    expect(base).toBeDefined();
    const m = base!.order;
    const { signs } = base!;
    expect(signs.every((s) => s === 1 || s === -1)).toBe(true);
    let wrong = 0;
    for (let i = 0; i < m; i++) {
      for (let j = 0; j <= i; j++) {
        let dot = 0;
        for (let c = 0; c < m; c++) dot += signs[i * m + c] * signs[j * m + c];
        if (dot !== (i === j ? m : 0)) wrong++;
      }
    }
    expect(wrong).toBe(0);
  });

  it.each(WIDTHS)(
    '%i channels take a base of order %i; the transform keeps norms and has an inverse',
    (channels, order) => {
      const transform = hadamardTransform(channels);
      expect(Math.sqrt(transform.base.length)).toBe(order);
      const rng = createRng(channels);
      const x = Float64Array.from({ length: channels }, () => rng.normal());
      const y = applyHadamard(x.slice(), transform);
      const norm = (v: Float64Array) => Math.sqrt(v.reduce((s, a) => s + a * a, 0));
      expect(Math.abs(norm(y) / norm(x) - 1)).toBeLessThan(1e-13);
      const back = applyHadamard(y, transform, 'inverse');
      expect(Math.max(...back.map((v, i) => Math.abs(v - x[i])))).toBeLessThan(1e-12);
    },
  );

  it.each([6, 10, 14, 92, 0, 2.5])('there is none of order %d here', (order) => {
    expect(findHadamardBase(order)).toBeUndefined();
    if (order > 0) expect(() => hadamardTransform(order)).toThrow(/Hadamard/);
  });

  it('falls back to the largest order that tiles the channels', () => {
    expect([384, 14, 92, 7, 344].map(largestHadamardOrder)).toEqual([384, 2, 4, 1, 344]);
  });
});

describe('fast transforms', () => {
  it.each([
    [16, 16, 1],
    [24, 24, 1],
    [96, 12, 8],
    [48, 4, 1],
    [172, 172, 1],
    [344, 344, 1],
    [120, 20, 3],
    [80, 2, 40],
  ])('%i channels, order %i, inner %i: the dense matrix, forward and inverse', (channels, order, inner) => {
    const transform = hadamardTransform(channels, { order, inner });
    const rng = createRng(3);
    const x = Float64Array.from({ length: 2 * channels }, () => rng.normal());
    for (const direction of ['forward', 'inverse'] as const) {
      const dense = hadamardRows(x, transform, direction);
      const fast = applyHadamard(x.slice(), transform, direction);
      expect(Math.max(...fast.map((v, i) => Math.abs(v - dense[i])))).toBeLessThan(1e-12);
    }
    expect(Math.abs(hadamardEntry(transform, order - 1, 0))).toBe(1);
  });

  it('turns columns as it turns rows', () => {
    const rng = createRng(4);
    const random = randomHadamard(24, rng);
    const w = Float64Array.from({ length: 24 * 5 }, () => rng.normal());
    const turned = rotateColumns(w.slice(), random);
    for (let c = 0; c < 5; c++) {
      const column = rotateRows(
        Float64Array.from({ length: 24 }, (_, r) => w[r * 5 + c]),
        random,
      );
      column.forEach((v, r) => expect(v).toBeCloseTo(turned[r * 5 + c], 12));
      rotateRows(column, random, 'inverse').forEach((v, r) => expect(v).toBeCloseTo(w[r * 5 + c], 12));
    }
  });
});
