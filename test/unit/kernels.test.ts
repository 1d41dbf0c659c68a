// The quantization kernels against plain float64 loops, on odd sizes, and the same bits for every number of threads.
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import {
  addScaled,
  Arena,
  cholesky,
  dot,
  fakeQuantize,
  gptqBlock,
  gptqBlocks,
  invertLower,
  KernelPool,
  ObjectiveKernel,
  transformChannels,
  transpose,
} from '../../src/backends/cpu/kernels.js';
import { roundToF16 } from '../../src/core/dtype.js';
import { GyreError } from '../../src/core/errors.js';
import { createRng } from '../../src/core/rng.js';

let pool: KernelPool;
let plain: KernelPool;
beforeAll(async () => {
  pool = await KernelPool.create({ threads: 2 });
  plain = await KernelPool.create({ shared: false });
});
afterAll(async () => {
  await pool.dispose();
  await plain.dispose();
});

function normals(n: number, seed: number, scale = 1): Float32Array {
  const rng = createRng(seed);
  return Float32Array.from({ length: n }, () => rng.normal() * scale);
}

function positive(n: number, seed: number): Float32Array {
  const rng = createRng(seed);
  return Float32Array.from({ length: n }, () => 0.5 + rng.uniform());
}

function randomPairs(channels: number, groupSize: number, krot: number, seed: number): Int16Array {
  const rng = createRng(seed);
  const pairs = new Int16Array(krot * channels);
  for (let at = 0; at < pairs.length; at += groupSize) pairs.set(rng.permutation(groupSize), at);
  return pairs;
}

interface Problem {
  channels: number;
  columns: number;
  groupSize: number;
  krot: number;
  pairs: Int16Array;
  theta: Float32Array;
  scales: Float32Array;
}

function problem(channels: number, groupSize: number, columns: number, krot: number, seed = 1): Problem {
  return {
    channels,
    columns,
    groupSize,
    krot,
    pairs: randomPairs(channels, groupSize, krot, seed),
    theta: normals(krot * (channels / 2), seed + 1, 0.7),
    scales: positive(channels, seed + 2),
  };
}

/** One rotation of [channels, columns] in place, by sign · theta. */
function rotateOnce(x: Float64Array, p: Problem, k: number, sign: 1 | -1): void {
  for (let pair = 0; pair < p.channels / 2; pair++) {
    const base = Math.floor((2 * pair) / p.groupSize) * p.groupSize;
    const i = (base + p.pairs[k * p.channels + 2 * pair]) * p.columns;
    const j = (base + p.pairs[k * p.channels + 2 * pair + 1]) * p.columns;
    const c = Math.cos(p.theta[k * (p.channels / 2) + pair]);
    const s = sign * Math.sin(p.theta[k * (p.channels / 2) + pair]);
    for (let col = 0; col < p.columns; col++) {
      const a = x[i + col];
      const b = x[j + col];
      x[i + col] = a * c + b * s;
      x[j + col] = b * c - a * s;
    }
  }
}

function forward64(w: Float32Array | Float64Array, p: Problem): Float64Array {
  const x = Float64Array.from(w, (v, at) => v * p.scales[Math.floor(at / p.columns)]);
  for (let k = 0; k < p.krot; k++) rotateOnce(x, p, k, 1);
  return x;
}

function inverse64(w: Float32Array | Float64Array, p: Problem): Float64Array {
  const x = Float64Array.from(w);
  for (let k = p.krot - 1; k >= 0; k--) rotateOnce(x, p, k, -1);
  return x.map((v, at) => v / p.scales[Math.floor(at / p.columns)]);
}

function roundEven(x: number): number {
  const r = Math.round(x);
  return Math.abs(x % 1) === 0.5 && r % 2 !== 0 ? r - 1 : r;
}

/** Scale and zero point of one range (design §4.2, with the kernels' fallback for constant groups). */
function grid64(min: number, max: number, bits: number): { scale: number; zero: number; regular: boolean } {
  const top = 2 ** bits - 1;
  let scale = roundToF16((max - min) / top);
  const regular = scale >= 2 ** -14;
  if (!regular) scale = Math.max(2 ** -14, roundToF16(Math.max(Math.abs(max), Math.abs(min)) / top));
  return { scale, zero: Math.min(top, Math.max(0, roundEven(-min / scale))), regular };
}

function maxError(found: ArrayLike<number>, expected: ArrayLike<number>): number {
  let error = 0;
  for (let i = 0; i < expected.length; i++) error = Math.max(error, Math.abs(found[i] - expected[i]));
  return error;
}

/** Largest difference relative to the largest expected value. */
function relativeError(found: ArrayLike<number>, expected: ArrayLike<number>): number {
  let size = 1e-30;
  for (let i = 0; i < expected.length; i++) size = Math.max(size, Math.abs(expected[i]));
  return maxError(found, expected) / size;
}

const shapes: [channels: number, groupSize: number][] = [
  [352, 32],
  [2752, 64],
  [172, 4],
  [516, 172],
  [256, 128],
];

describe('transformChannels', () => {
  for (const [channels, groupSize] of shapes) {
    for (const columns of channels > 1000 ? [7, 33] : [1, 7, 33, 100]) {
      for (const krot of [0, 1, 8]) {
        it(`[${channels}, ${columns}], groups of ${groupSize}, ${krot} rotations`, () => {
          const p = problem(channels, groupSize, columns, krot);
          const w = normals(channels * columns, 9);
          const out = new Float32Array(w.length);
          transformChannels(pool, w, out, columns, p, p.theta, p.scales, 'forward');
          expect(relativeError(out, forward64(w, p))).toBeLessThan(1e-6);
          transformChannels(pool, w, out, columns, p, p.theta, p.scales, 'inverse');
          expect(relativeError(out, inverse64(w, p))).toBeLessThan(1e-6);
          transformChannels(pool, w, out, columns, p, p.theta, undefined, 'forward');
          expect(relativeError(out, forward64(w, { ...p, scales: p.scales.map(() => 1) }))).toBeLessThan(1e-6);
        });
      }
    }
  }

  it('refuses pairs outside their group', () => {
    const p = problem(64, 32, 4, 1);
    p.pairs[0] = 32;
    const w = normals(256, 1);
    expect(() => transformChannels(pool, w, w, 4, p, p.theta, undefined, 'forward')).toThrow(GyreError);
  });
});

describe('fakeQuantize', () => {
  for (const [channels, groupSize] of [...shapes, [352, 352], [1040, 1040], [2752, 2752]] as [number, number][]) {
    for (const columns of [1, 33]) {
      for (const bits of [2, 3, 4, 8]) {
        for (const clipped of [false, true]) {
          it(`[${channels}, ${columns}], groups of ${groupSize}, ${bits} bits${clipped ? ', clipped' : ''}`, () => {
            const w = normals(channels * columns, 3);
            const groups = channels / groupSize;
            const clip = clipped ? Float32Array.from(positive(groups * columns, 4), (v) => v / 1.5) : undefined;
            const { codes, zeros, scales, values } = fakeQuantize(pool, w, columns, groupSize, bits, clip);
            let flips = 0;
            for (let g = 0; g < groups; g++) {
              for (let c = 0; c < columns; c++) {
                const at = (r: number) => (g * groupSize + r) * columns + c;
                const column = Array.from({ length: groupSize }, (_, r) => w[at(r)]);
                const factor = clip ? clip[g * columns + c] : 1;
                const grid = grid64(
                  Math.fround(Math.min(...column) * factor),
                  Math.fround(Math.max(...column) * factor),
                  bits,
                );
                // f32 rounding may tip a range that lies halfway between two f16 scales to the other one.
                const scale = scales[g * columns + c];
                expect(Math.abs(scale / grid.scale - 1)).toBeLessThan(1e-3);
                expect(roundToF16(scale)).toBe(scale);
                expect(Math.abs(zeros[g * columns + c] - grid.zero)).toBeLessThanOrEqual(scale === grid.scale ? 0 : 1);
                for (let r = 0; r < groupSize; r++) {
                  const zero = zeros[g * columns + c];
                  const x = column[r] / scale;
                  const code = Math.min(2 ** bits - 1, Math.max(0, roundEven(x) + zero));
                  if (codes[at(r)] !== code) {
                    flips++;
                    expect(Math.abs(Math.abs(x - Math.floor(x)) - 0.5)).toBeLessThan(1e-4);
                  }
                  expect(values[at(r)] + 0).toBe(Math.fround((codes[at(r)] - zero) * scale));
                }
              }
            }
            expect(flips).toBeLessThanOrEqual(2 + w.length * 1e-4);
          });
        }
      }
    }
  }

  it('reproduces constant groups and never divides by zero', () => {
    const constants = [0, 3.25, -0.75, 1e-6, 1e-30, -1e-30, 60000, 0.01];
    const w = Float32Array.from({ length: 32 * constants.length }, (_, at) => constants[at % constants.length]);
    const { values, scales } = fakeQuantize(pool, w, constants.length, 32, 4);
    expect(scales.every((s) => s >= 2 ** -14 && Number.isFinite(s))).toBe(true);
    expect(values.every((v) => Number.isFinite(v))).toBe(true);
    values.forEach((v, at) =>
      expect(Math.abs(v - w[at])).toBeLessThanOrEqual(Math.max(2 ** -14, Math.abs(w[at]) / 1000)),
    );
  });
});

/** The objective in float64 with the same straight-through definition. `codes` may be frozen for finite differences. */
function objective64(w: Float32Array, p: Problem, bits: number, gridSize: number, frozen?: Float64Array) {
  const top = 2 ** bits - 1;
  const y = forward64(w, p);
  const q = new Float64Array(y.length);
  const inner = new Float64Array(y.length);
  const grids: { scale: number; zero: number; regular: boolean; hi: number; lo: number }[] = [];
  for (let g = 0; g < p.channels / gridSize; g++) {
    for (let c = 0; c < p.columns; c++) {
      let lo = g * gridSize;
      let hi = lo;
      for (let r = g * gridSize; r < (g + 1) * gridSize; r++) {
        if (y[r * p.columns + c] > y[hi * p.columns + c]) hi = r;
        if (y[r * p.columns + c] < y[lo * p.columns + c]) lo = r;
      }
      const grid = grid64(y[lo * p.columns + c], y[hi * p.columns + c], bits);
      grids.push({ ...grid, hi, lo });
      for (let r = g * gridSize; r < (g + 1) * gridSize; r++) {
        const at = r * p.columns + c;
        const x = y[at] / grid.scale;
        inner[at] = frozen ? frozen[at] : Math.min(top - grid.zero, Math.max(-grid.zero, roundEven(x)));
        q[at] = inner[at] * grid.scale;
      }
    }
  }
  return { y, q, inner, grids, out: inverse64(q, p) };
}

function gradient64(w: Float32Array, p: Problem, bits: number, gridSize: number, gradient: Float32Array) {
  const { y, inner, grids, out } = objective64(w, p, bits, gridSize);
  const { columns, channels, krot } = p;
  const half = channels / 2;
  const theta = new Float64Array(krot * half);
  const scales = new Float64Array(channels);
  const h = Float64Array.from(gradient, (v, at) => v / p.scales[Math.floor(at / columns)]);
  const z = out.map((v, at) => v * p.scales[Math.floor(at / columns)]);
  for (let at = 0; at < h.length; at++) scales[Math.floor(at / columns)] -= h[at] * out[at];
  const cross = (a: Float64Array, b: Float64Array, k: number, pair: number): number => {
    const base = Math.floor((2 * pair) / p.groupSize) * p.groupSize;
    const i = (base + p.pairs[k * channels + 2 * pair]) * columns;
    const j = (base + p.pairs[k * channels + 2 * pair + 1]) * columns;
    let sum = 0;
    for (let c = 0; c < columns; c++) sum += a[i + c] * b[j + c] - a[j + c] * b[i + c];
    return sum;
  };
  for (let k = 0; k < krot; k++) {
    for (let pair = 0; pair < half; pair++) theta[k * half + pair] -= cross(h, z, k, pair);
    rotateOnce(h, p, k, 1);
    rotateOnce(z, p, k, 1);
  }
  for (let g = 0; g < channels / gridSize; g++) {
    for (let c = 0; c < columns; c++) {
      const grid = grids[g * columns + c];
      let ds = 0;
      for (let r = g * gridSize; r < (g + 1) * gridSize; r++) {
        const at = r * columns + c;
        ds += h[at] * (inner[at] - y[at] / grid.scale);
      }
      if (!grid.regular) continue;
      h[grid.hi * columns + c] += ds / (2 ** bits - 1);
      h[grid.lo * columns + c] -= ds / (2 ** bits - 1);
    }
  }
  for (let k = krot - 1; k >= 0; k--) {
    for (let pair = 0; pair < half; pair++) theta[k * half + pair] += cross(h, y, k, pair);
    rotateOnce(h, p, k, -1);
    rotateOnce(y, p, k, -1);
  }
  for (let at = 0; at < h.length; at++) scales[Math.floor(at / columns)] += h[at] * w[at];
  return { theta, scales };
}

describe('ObjectiveKernel', () => {
  const cases: [channels: number, groupSize: number, gridSize: number, columns: number, krot: number, bits: number][] =
    [
      [352, 32, 32, 33, 8, 4],
      [352, 32, 16, 100, 8, 3],
      [256, 128, 128, 7, 8, 4],
      [256, 128, 256, 33, 8, 4],
      [172, 4, 172, 100, 1, 2],
      [516, 172, 172, 1, 8, 8],
      [2752, 64, 64, 33, 1, 4],
      [352, 32, 352, 70, 0, 4],
      [352, 32, 32, 70, 0, 4],
    ];
  for (const [channels, groupSize, gridSize, columns, krot, bits] of cases) {
    it(`[${channels}, ${columns}], rotation groups of ${groupSize} × ${krot}, grid groups of ${gridSize}, ${bits} bits`, () => {
      const p = problem(channels, groupSize, columns, krot, 11);
      const w = normals(channels * columns, 12, 0.1);
      const gradient = normals(channels * columns, 13);
      const kernel = new ObjectiveKernel(pool, { ...p, weight: w, bits, gridGroupSize: gridSize });
      const out = new Float32Array(w.length);
      kernel.forward(p.theta, p.scales, out);
      const expected = objective64(w, p, bits, gridSize);
      // A value within rounding error of a tie may land on the neighbouring code: nearly all must agree.
      const step = Math.max(...expected.grids.map((g) => g.scale)) / Math.min(...p.scales);
      let wrong = 0;
      out.forEach((v, at) => {
        if (Math.abs(v - expected.out[at]) > 1e-5) wrong++;
        expect(Math.abs(v - expected.out[at])).toBeLessThan(2 * step);
      });
      expect(wrong / out.length).toBeLessThan(0.02);
      const found = kernel.backward(gradient);
      const wanted = gradient64(w, p, bits, gridSize, gradient);
      expect(found.theta.length).toBe(krot * (channels / 2));
      if (krot) expect(relativeError(found.theta, wanted.theta)).toBeLessThan(2e-3);
      expect(relativeError(found.scales, wanted.scales)).toBeLessThan(2e-3);
      kernel.dispose();
    });
  }

  it('has the gradient of finite differences when codes are frozen', () => {
    // With codes and zero points frozen, Ŵ = T⁻¹((q − z)·scale(Y)) is smooth; its gradient is the kernel's minus the
    // straight-through part ∂Q/∂Y = 1. Weights that lie on their grid make round(y/scale) − y/scale vanish instead, so
    // compare against the float64 definition differentiated numerically with round replaced by identity + constant.
    const p = problem(32, 16, 5, 2, 21);
    const w = normals(32 * 5, 22);
    const g = normals(32 * 5, 23);
    const start = objective64(w, p, 4, 16);
    const scale0 = start.grids.map((grid) => grid.scale);
    const offsets = start.inner.map(
      (q, at) => q - start.y[at] / scale0[Math.floor(Math.floor(at / 5) / 16) * 5 + (at % 5)],
    );
    const range0 = start.grids.map((grid, at) => start.y[grid.hi * 5 + (at % 5)] - start.y[grid.lo * 5 + (at % 5)]);
    const loss = (q: Problem): number => {
      const y = forward64(w, q);
      const hat = new Float64Array(y.length);
      start.grids.forEach((grid, at) => {
        const c = at % 5;
        const range = y[grid.hi * 5 + c] - y[grid.lo * 5 + c];
        const scale = scale0[at] + (range - range0[at]) / 15;
        const group = Math.floor(at / 5);
        for (let r = group * 16; r < group * 16 + 16; r++) {
          hat[r * 5 + c] = (y[r * 5 + c] / scale + offsets[r * 5 + c]) * scale;
        }
      });
      return inverse64(hat, q).reduce((sum, v, at) => sum + v * g[at], 0);
    };
    const kernel = new ObjectiveKernel(pool, { ...p, weight: w, bits: 4, gridGroupSize: 16 });
    kernel.forward(p.theta, p.scales, new Float32Array(w.length));
    const found = kernel.backward(g);
    kernel.dispose();
    const step = 2 ** -10;
    const numeric = (name: 'theta' | 'scales', at: number): number => {
      const shifted = (by: number): Problem => ({ ...p, [name]: p[name].map((v, i) => (i === at ? v + by : v)) });
      return (loss(shifted(step)) - loss(shifted(-step))) / (2 * step);
    };
    p.theta.forEach((_, at) => expect(found.theta[at]).toBeCloseTo(numeric('theta', at), 2));
    p.scales.forEach((_, at) => expect(found.scales[at]).toBeCloseTo(numeric('scales', at), 2));
  });

  it('refuses groups that do not nest, and use after dispose', () => {
    const p = problem(96, 32, 4, 1);
    const spec = { ...p, weight: normals(96 * 4, 1), bits: 4, gridGroupSize: 24 };
    expect(() => new ObjectiveKernel(pool, spec)).toThrow(/do not nest/);
    const kernel = new ObjectiveKernel(pool, { ...spec, gridGroupSize: 32 });
    kernel.dispose();
    expect(() => kernel.forward(p.theta, p.scales, new Float32Array(96 * 4))).toThrow(GyreError);
  });
});

describe('gptqBlock', () => {
  for (const [channels, groupSize, columns, bits] of [
    [256, 128, 33, 4],
    [352, 32, 7, 3],
    [172, 4, 100, 4],
    [516, 172, 33, 4],
    [352, 352, 33, 8],
    [96, 32, 1, 2],
  ]) {
    it(`[${channels}, ${columns}], groups of ${groupSize}, ${bits} bits`, () => {
      const top = 2 ** bits - 1;
      const w = normals(channels * columns, 31);
      const factor = normals(channels * channels, 32, 0.05);
      for (let i = 0; i < channels; i++) {
        for (let j = 0; j < i; j++) factor[i * channels + j] = 0;
        factor[i * channels + i] = 1 + Math.abs(factor[i * channels + i]);
      }
      const groups = channels / groupSize;
      const codes = new Uint8Array(channels * columns);
      const scales = new Float32Array(groups * columns);
      const zeros = new Uint8Array(groups * columns);
      const original = w.slice();
      const current = Float64Array.from(w);
      for (const [begin, end] of gptqBlocks(channels, groupSize)) {
        const block = end - begin;
        const errors = new Float32Array(block * columns);
        const part = new Float32Array(block * block);
        for (let i = 0; i < block; i++) {
          part.set(factor.subarray((begin + i) * channels + begin, (begin + i) * channels + end), i * block);
        }
        gptqBlock(pool, { w, columns, begin, end, factor: part, groupSize, bits, codes, scales, zeros, errors });
        for (let i = 0; i < block; i++) {
          const step = factor.subarray((begin + i) * channels, (begin + i + 1) * channels);
          for (let l = end; l < channels; l++) {
            for (let c = 0; c < columns; c++) w[l * columns + c] -= errors[i * columns + c] * step[l];
          }
        }
      }
      // Replays the kernel's codes and grids: each must be the nearest given the weights updated by the errors before it.
      for (let j = 0; j < channels; j++) {
        const group = Math.floor(j / groupSize);
        for (let c = 0; c < columns; c++) {
          const slot = group * columns + c;
          if (j % groupSize === 0) {
            let min = Infinity;
            let max = -Infinity;
            for (let r = j; r < j + groupSize; r++) {
              min = Math.min(min, current[r * columns + c]);
              max = Math.max(max, current[r * columns + c]);
            }
            expect(Math.abs(scales[slot] / grid64(min, max, bits).scale - 1)).toBeLessThan(2e-3);
          }
          const at = j * columns + c;
          const exact = Math.min(top, Math.max(0, current[at] / scales[slot] + zeros[slot]));
          expect(Math.abs(codes[at] - exact)).toBeLessThan(0.5 + 2e-3);
          const value = (codes[at] - zeros[slot]) * scales[slot];
          expect(w[at] + 0).toBe(Math.fround(value));
          const error = (current[at] - value) / factor[j * channels + j];
          for (let l = j + 1; l < channels; l++) current[l * columns + c] -= error * factor[j * channels + l];
        }
      }
      expect(original.length).toBe(w.length);
    });
  }
});

describe('linear algebra', () => {
  for (const n of [1, 3, 64, 127]) {
    it(`factors and solves ${n} × ${n}`, () => {
      const a = normals(n * n, 41);
      const spd = new Float64Array(n * n);
      for (let i = 0; i < n; i++) {
        for (let j = 0; j < n; j++) {
          for (let k = 0; k < n; k++) spd[i * n + j] += a[i * n + k] * a[j * n + k];
        }
        spd[i * n + i] += 0.1;
      }
      const l = spd.slice();
      expect(cholesky(pool, l, n)).toBe(-1);
      const back = new Float64Array(n * n);
      for (let i = 0; i < n; i++) {
        for (let j = 0; j < n; j++)
          for (let k = 0; k <= Math.min(i, j); k++) back[i * n + j] += l[i * n + k] * l[j * n + k];
      }
      expect(relativeError(back, spd)).toBeLessThan(1e-13);
      const inverse = invertLower(pool, l, n);
      let off = 0;
      for (let i = 0; i < n; i++) {
        for (let j = 0; j < n; j++) {
          let sum = 0;
          for (let k = 0; k < n; k++) sum += l[i * n + k] * inverse[k * n + j];
          off = Math.max(off, Math.abs(sum - (i === j ? 1 : 0)));
        }
      }
      expect(off).toBeLessThan(1e-9);
    });
  }

  it('names the row of a pivot that is not positive', () => {
    expect(cholesky(pool, Float64Array.of(1, 0, 0, 0, -1, 0, 0, 0, 1), 3)).toBe(1);
    expect(cholesky(pool, Float64Array.of(NaN), 1)).toBe(0);
  });

  for (const [rows, columns] of [
    [1, 5],
    [33, 100],
    [64, 32],
    [4100, 700],
  ]) {
    it(`transposes [${rows}, ${columns}], adds and multiplies`, () => {
      const x = normals(rows * columns, 51);
      const out = new Float32Array(x.length);
      transpose(pool, x, out, rows, columns);
      let wrong = 0;
      for (let r = 0; r < rows; r++) {
        for (let c = 0; c < columns; c++) if (out[c * rows + r] !== x[r * columns + c]) wrong++;
      }
      expect(wrong).toBe(0);
      const sum = new Float32Array(x.length);
      addScaled(x, out, 0.5, sum);
      expect(sum[0]).toBe(Math.fround(x[0] + 0.5 * out[0]));
      let expected = 0;
      for (let i = 0; i < x.length; i++) expected += x[i] * out[i];
      expect(Math.abs(dot(x, out) - expected)).toBeLessThan(1e-9 * x.length);
    });
  }
});

describe('threads', () => {
  function everything(with_: KernelPool): Float64Array {
    const p = problem(2752, 64, 300, 8, 61);
    const w = normals(p.channels * p.columns, 62);
    const y = new Float32Array(w.length);
    transformChannels(with_, w, y, p.columns, p, p.theta, p.scales, 'forward');
    const rounded = fakeQuantize(with_, w, p.columns, 64, 4);
    const kernel = new ObjectiveKernel(with_, { ...p, weight: w, bits: 4, gridGroupSize: 64 });
    const out = new Float32Array(w.length);
    kernel.forward(p.theta, p.scales, out);
    const gradient = kernel.backward(out);
    kernel.dispose();
    return Float64Array.from([
      ...y,
      ...rounded.values,
      ...rounded.scales,
      ...out,
      ...gradient.theta,
      ...gradient.scales,
    ]);
  }

  it('give the same bits for 1 and 2 threads, and without shared memory', () => {
    expect(pool.threads).toBe(2);
    expect(plain.threads).toBe(1);
    const two = everything(pool);
    pool.activeThreads = 1;
    const one = everything(pool);
    pool.activeThreads = 2;
    const unshared = everything(plain);
    expect(two.every((v, at) => Object.is(v, one[at]))).toBe(true);
    expect(two.every((v, at) => Object.is(v, unshared[at]))).toBe(true);
  });
});

describe('Arena', () => {
  it('reuses freed blocks, joins neighbours and grows', () => {
    const arena = new Arena(new WebAssembly.Memory({ initial: 1, maximum: 2000 }));
    const a = arena.alloc(1000);
    const b = arena.alloc(1000);
    const c = arena.alloc(1000);
    expect([a, b, c].every((p) => p % 64 === 0 && p > 0)).toBe(true);
    arena.free(a);
    arena.free(b);
    expect(arena.alloc(2000)).toBe(a);
    const big = arena.alloc(30_000_000);
    arena.f32[big >>> 2] = 1;
    arena.u8[big + 29_999_999] = 7;
    const used = arena.used;
    arena.scoped(() => arena.scratch(5000));
    expect(arena.used).toBe(used);
    expect(() => arena.free(12345)).toThrow(GyreError);
  });

  it('says what to do when memory ends', () => {
    const arena = new Arena(new WebAssembly.Memory({ initial: 1, maximum: 65536 }), 1 << 24);
    expect(() => arena.alloc(1 << 25)).toThrow(
      expect.objectContaining({ code: 'out-of-memory', remedy: expect.any(String) as string }),
    );
    expect(arena.alloc(1 << 20)).toBeGreaterThan(0);
  });
});
