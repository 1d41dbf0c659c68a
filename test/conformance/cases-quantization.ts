// Conformance cases of the quantization ops. Tolerances: u = unit roundoff, λ as in duo.ts; each formula stands by its case.
import { roundToF16 } from '../../src/core/dtype.js';
import { GyreError } from '../../src/core/errors.js';
import { hostTensor } from '../../src/core/tensor.js';
import type { Backend, GridSpec, RoundedWeight, Tensor } from '../../src/ops/backend.js';
import { readF64 } from '../../src/ops/reference/backend.js';
import { groupErrors } from '../../src/ops/reference/quantize.js';
import { randomPairs } from '../../src/transforms/index.js';
import { closeArrays, type Duo, LAMBDA, largestRow, maxAbs, norm, randomTransform, type Twin } from './duo.js';
import type { ConformanceCase } from './suite.js';

/** [channels, cols, bits, group size]. */
const GRIDS = [
  [172, 7, 4, 43],
  [172, 5, 3, 4],
  [172, 8, 4, 172],
  [352, 9, 4, 32],
  [384, 6, 2, 128],
  [384, 4, 8, 64],
  [352, 3, 3, 352],
] as const;

/**
 * Rounding has no tolerance: a value next to a tie falls either way. So a case draws inputs until the oracle's result
 * survives, bit for bit, three perturbations larger than a backend's rounding errors (relative `size`); then codes,
 * zero points and scales of every backend must be the oracle's.
 */
export async function stableInput(
  duo: Duo,
  make: () => Float32Array,
  shape: readonly [number, number],
  result: (w: Tensor) => Promise<Tensor>,
  size: number,
): Promise<Twin> {
  for (let attempt = 0; attempt < 100; attempt++) {
    const host = make();
    const values = async (noise: number): Promise<Float64Array> => {
      const perturbed = Float64Array.from(host, (w) => w * (1 + noise * (duo.rng.uniform() - 0.5)));
      return readF64(await result(await duo.oracle.upload(hostTensor('f64', shape, perturbed))));
    };
    const expected = await values(0);
    let stable = true;
    for (let n = 0; n < 3 && stable; n++) {
      const other = await values(2 * size);
      stable = other.every((value, at) => value === expected[at]);
    }
    if (stable) return duo.input(shape, host);
  }
  throw new Error('no input found whose rounding is stable: make the case smaller');
}

export async function sameRounding(duo: Duo, actual: RoundedWeight, expected: RoundedWeight): Promise<void> {
  closeArrays(actual.scales, expected.scales, 0, 'scales');
  closeArrays(actual.zeros, expected.zeros, 0, 'zero points');
  closeArrays(actual.codes, expected.codes, 0, 'codes');
  // (code − zero)·scale has at most 9 + 11 bits.
  await duo.close(actual.values, expected.values, 0, 'values');
}

/** Weights whose groups differ in size and offset, as real ones do. */
export function weights(duo: Duo, channels: number, cols: number): Float32Array {
  return duo.normals(channels * cols).map((w) => 0.05 * w + 0.005);
}

export function clipFactors(duo: Duo, count: number): Float32Array {
  return Float32Array.from({ length: count }, () => 0.7 + 0.3 * duo.rng.uniform());
}

function roundToNearestCases(): ConformanceCase[] {
  return GRIDS.flatMap(([channels, cols, bits, groupSize]) =>
    [false, true].map((clipped) => ({
      op: 'roundToNearest' as const,
      name: `${channels} × ${cols}, ${bits} bits in groups of ${groupSize}${clipped ? ', clipped' : ''}`,
      run: async (duo: Duo) => {
        const grid: GridSpec = { bits, groupSize };
        const clip = clipped ? clipFactors(duo, (channels / groupSize) * cols) : undefined;
        const round = async (backend: Backend, w: Tensor): Promise<RoundedWeight> =>
          backend.roundToNearest(w, grid, clip);
        // An f32 division and the difference max − min: 4u covers both.
        const w = await stableInput(
          duo,
          () => weights(duo, channels, cols),
          [channels, cols],
          async (x) => (await round(duo.oracle, x)).values,
          4 * duo.allowance.roundoff,
        );
        await sameRounding(duo, await round(duo.subject, w.subject), await round(duo.oracle, w.oracle));
      },
    })),
  );
}

/** The search minimises an f32 sum, so near ties may go either way: the error of the choice is the oracle's within 1e-4. */
function clipCases(): ConformanceCase[] {
  return GRIDS.map(([channels, cols, bits, groupSize]) => ({
    op: 'searchClip' as const,
    name: `${channels} × ${cols}, ${bits} bits in groups of ${groupSize}`,
    run: async (duo: Duo) => {
      const grid: GridSpec = { bits, groupSize };
      const h = await duo.input([channels, channels], gram(duo, channels));
      const w = await duo.input([channels, cols], weights(duo, channels, cols));
      const ratios = [1, 0.95, 0.875, 0.75, 0.5];
      const expected = await duo.oracle.searchClip(w.oracle, h.oracle, grid, ratios);
      const actual = await duo.subject.searchClip(w.subject, h.subject, grid, ratios);
      const errors = (clip: Float32Array): Float64Array =>
        groupErrors(readF64(w.oracle), readF64(h.oracle), channels, cols, grid, clip);
      const best = errors(expected);
      closeArrays(errors(actual), best, (at) => 1e-4 * best[at], 'errors');
      if (actual.some((ratio) => !ratios.some((r) => Math.fround(r) === ratio)))
        throw new Error('a ratio not asked for');
    },
  }));
}

const degenerateCase: ConformanceCase = {
  op: 'roundToNearest',
  name: 'zeros, constants, one-sided and tiny groups',
  run: async (duo) => {
    // One column each: all zero, constant of either sign, all positive, all negative, below the smallest scale, one outlier.
    const rows = 64;
    const columns = [
      () => 0,
      () => 0.25,
      () => -0.3,
      (i: number) => 0.5 + i / 100,
      (i: number) => -0.5 - i / 100,
      (i: number) => i * 1e-7,
      (i: number) => (i === 40 ? 9.1 : 0.0013 * i),
    ];
    const host = Float32Array.from({ length: rows * columns.length }, (_, at) =>
      columns[at % columns.length](Math.floor(at / columns.length)),
    );
    const w = await duo.input([rows, columns.length], host);
    for (const groupSize of [64, 32, 4]) {
      const grid: GridSpec = { bits: 4, groupSize };
      const actual = await duo.subject.roundToNearest(w.subject, grid);
      await sameRounding(duo, actual, await duo.oracle.roundToNearest(w.oracle, grid));
    }
  },
};

/** H = XᵀX/n of correlated inputs: [channels, channels]. */
export function gram(duo: Duo, channels: number, tokens = 2 * channels): Float32Array {
  const h = new Float64Array(channels * channels);
  for (let t = 0; t < tokens; t++) {
    const common = duo.rng.normal();
    const x = Float64Array.from({ length: channels }, (_, i) => duo.rng.normal() * (1 + (i % 5)) + common);
    for (let i = 0; i < channels; i++) {
      for (let j = 0; j < channels; j++) h[i * channels + j] += (x[i] * x[j]) / tokens;
    }
  }
  return Float32Array.from(h);
}

function gptqCases(): ConformanceCase[] {
  return GRIDS.flatMap(([channels, cols, bits, groupSize], n) =>
    (n < 2 ? [false, true] : [false]).map((clipped) => ({
      op: 'gptq' as const,
      name: `${channels} × ${cols}, ${bits} bits in groups of ${groupSize}${clipped ? ', clipped' : ''}`,
      run: async (duo: Duo) => {
        const grid: GridSpec = { bits, groupSize };
        const clip = clipped ? clipFactors(duo, (channels / groupSize) * cols) : undefined;
        const h = await duo.input([channels, channels], gram(duo, channels));
        const exact = await duo.oracle.gptqFactor(h.oracle, 0.01);
        const factor = await duo.input([channels, channels], Float32Array.from(readF64(exact)));
        const round = async (backend: Backend, w: Tensor, u: Tensor): Promise<RoundedWeight> =>
          backend.gptq(w, u, grid, clip);
        // Every channel carries the rounding of all updates before it: √channels of them.
        const w = await stableInput(
          duo,
          () => weights(duo, channels, cols),
          [channels, cols],
          async (x) => (await round(duo.oracle, x, factor.oracle)).values,
          Math.sqrt(channels) * duo.allowance.roundoff,
        );
        const actual = await round(duo.subject, w.subject, factor.subject);
        await sameRounding(duo, actual, await round(duo.oracle, w.oracle, factor.oracle));
      },
    })),
  );
}

/**
 * Every step depends on the ones before it, so near ties may fall differently: the grids must be the oracle's, values must
 * be codes on them, the error must shrink, and come as low as the oracle's within 0.1%.
 */
function descentCases(): ConformanceCase[] {
  return GRIDS.map(([channels, cols, bits, groupSize]) => ({
    op: 'descend' as const,
    name: `${channels} × ${cols}, ${bits} bits in groups of ${groupSize}`,
    run: async (duo: Duo) => {
      const grid: GridSpec = { bits, groupSize };
      const h = await duo.input([channels, channels], gram(duo, channels));
      const w = await duo.input([channels, cols], weights(duo, channels, cols));
      const start = await duo.oracle.roundToNearest(w.oracle, grid);
      const given = {
        ...start,
        values: await duo.subject.upload(hostTensor('f32', [channels, cols], Float32Array.from(readF64(start.values)))),
      };
      const expected = await duo.oracle.descend(w.oracle, start, h.oracle, grid, 2);
      const actual = await duo.subject.descend(w.subject, given, h.subject, grid, 2);
      for (const [slot, scale] of start.scales.entries()) {
        if (actual.scales[slot] !== scale || actual.zeros[slot] !== start.zeros[slot])
          throw new Error(`grid ${slot} changed`);
      }
      const values = await valuesOnGrid(duo, actual, channels, cols, groupSize);
      const error = layerError(w, h);
      const [before, best, found] = [error(readF64(start.values)), error(readF64(expected.values)), error(values)];
      if (!(found <= best * 1.001) || !(found < before))
        throw new Error(`error ${found}, oracle ${best}, before ${before}`);
      duo.subject.free(given.values, actual.values);
    },
  }));
}

/** Downloads a rounding's values [channels, cols]; throws unless each is what its code and grid say. */
async function valuesOnGrid(
  duo: Duo,
  rounded: RoundedWeight,
  channels: number,
  cols: number,
  groupSize: number,
): Promise<Float32Array> {
  const values = await duo.subject.download(rounded.values);
  for (let i = 0; i < channels * cols; i++) {
    const slot = Math.floor(i / cols / groupSize) * cols + (i % cols);
    const value = Math.fround((rounded.codes[i] - rounded.zeros[slot]) * rounded.scales[slot]);
    if (values[i] !== value) throw new Error(`value ${i} is ${values[i]}, its code says ${value}`);
  }
  return values;
}

/** tr((Ŵ−W)ᵗ·H·(Ŵ−W)) of an estimate, in f64. */
function layerError(w: Twin, h: Twin): (estimate: ArrayLike<number>) => number {
  const [channels, cols] = w.shape;
  const target = readF64(w.oracle);
  const hessian = readF64(h.oracle);
  return (estimate) => {
    let sum = 0;
    for (let c = 0; c < cols; c++) {
      const d = Float64Array.from({ length: channels }, (_, i) => estimate[i * cols + c] - target[i * cols + c]);
      for (let i = 0; i < channels; i++)
        for (let j = 0; j < channels; j++) sum += d[i] * hessian[i * channels + j] * d[j];
    }
    return sum;
  };
}

/**
 * A scale next to a tie between two f16 numbers may fall either way: codes and zero points must stay, values must be codes
 * on the new grids, scales must be f16, the error must shrink, and come as low as the oracle's within 0.1%.
 */
function refitCases(): ConformanceCase[] {
  return GRIDS.map(([channels, cols, bits, groupSize]) => ({
    op: 'refitScales' as const,
    name: `${channels} × ${cols}, ${bits} bits in groups of ${groupSize}`,
    run: async (duo: Duo) => {
      const grid: GridSpec = { bits, groupSize };
      const h = await duo.input([channels, channels], gram(duo, channels));
      const w = await duo.input([channels, cols], weights(duo, channels, cols));
      const start = await duo.oracle.roundToNearest(w.oracle, grid);
      const given = {
        ...start,
        values: await duo.subject.upload(hostTensor('f32', [channels, cols], Float32Array.from(readF64(start.values)))),
      };
      const expected = await duo.oracle.refitScales(w.oracle, start, h.oracle, grid, 2);
      const actual = await duo.subject.refitScales(w.subject, given, h.subject, grid, 2);
      closeArrays(actual.codes, start.codes, 0, 'codes');
      closeArrays(actual.zeros, start.zeros, 0, 'zero points');
      closeArrays(actual.scales, actual.scales.map(roundToF16), 0, 'scales as f16');
      const values = await valuesOnGrid(duo, actual, channels, cols, groupSize);
      const error = layerError(w, h);
      const [before, best, found] = [error(readF64(start.values)), error(readF64(expected.values)), error(values)];
      if (!(found <= best * 1.001) || !(found < before))
        throw new Error(`error ${found}, oracle ${best}, before ${before}`);
      duo.subject.free(given.values, actual.values);
    },
  }));
}

/** [channels, cols, transform group, K, bits, grid group]; one of the groups divides the other. */
const OBJECTIVES = [
  [172, 7, 4, 3, 4, 4],
  [172, 5, 4, 3, 4, 172],
  [172, 6, 172, 8, 3, 172],
  [352, 9, 32, 8, 4, 32],
  [384, 5, 128, 8, 4, 128],
  [384, 5, 128, 2, 2, 64],
  [384, 4, 128, 0, 4, 128],
  [256, 4, 64, 1, 8, 128],
] as const;

/**
 * forward: the codes are the oracle's (stable inputs), so only T⁻¹ rounds: λ·(K + 2)·u·‖Q_group‖₂ / |s|.
 * backward: an angle's gradient is Σ g_i·y_j − g_j·y_i over the columns, once on the way in and once, nearly cancelling,
 * on the way out, after up to 2K + 4 roundings of g and y: λ·(2K + 4)·u·max‖g_row‖·max‖y_row‖, with g = ∂L/∂Ŵ ÷ s and
 * y = s ⊙ Ŵ. The scales' have w = y / s in y's place.
 */
function objectiveCases(): ConformanceCase[] {
  return OBJECTIVES.map(([channels, cols, turn, krot, bits, groupSize]) => ({
    op: 'createObjective' as const,
    name: `${channels} × ${cols}, K = ${krot} in groups of ${turn}, ${bits} bits in groups of ${groupSize}`,
    run: async (duo: Duo) => {
      const grid: GridSpec = { bits, groupSize };
      const layout = { channels, groupSize: turn, krot, pairs: randomPairs(channels, turn, krot, duo.rng) };
      // Two points, since a backend may keep something of the first.
      const points = [0.1, 1].map((size) => ({
        theta: Float32Array.from({ length: (krot * channels) / 2 }, () => size * duo.rng.normal()),
        scales: Float32Array.from({ length: channels }, () => Math.exp(0.3 * duo.rng.normal())),
      }));
      // Ŵ of one point depends on W through the rounding alone: it is bitwise the same while no code changes.
      const both = async (x: Tensor): Promise<Tensor> => {
        const objective = await duo.oracle.createObjective(x, layout, grid);
        const parts: Tensor[] = [];
        for (const { theta, scales } of points) parts.push(await objective.forward(theta, scales));
        return duo.oracle.concatColumns(parts);
      };
      const error = 2 * (krot + 2) * duo.allowance.roundoff;
      const w = await stableInput(duo, () => weights(duo, channels, cols), [channels, cols], both, error);
      const subject = await duo.subject.createObjective(w.subject, layout, grid);
      const oracle = await duo.oracle.createObjective(w.oracle, layout, grid);
      for (const { theta, scales } of points) {
        const expected = await oracle.forward(theta, scales);
        const y = readF64(expected).map((value, at) => value * scales[Math.floor(at / cols)]);
        await duo.close(
          await subject.forward(theta, scales),
          expected,
          (at) => {
            const channel = Math.floor(at / cols);
            const size = norm(y, Math.floor(channel / turn) * turn * cols + (at % cols), turn, cols);
            return (LAMBDA * (krot + 2) * duo.allowance.roundoff * size) / Math.abs(scales[channel]);
          },
          'Ŵ',
        );
        for (let n = 0; n < 2; n++) {
          const gradient = await duo.input([channels, cols]);
          const found = await subject.backward(gradient.subject);
          const wanted = await oracle.backward(gradient.oracle);
          const g = gradient.host.map((value, at) => value / scales[Math.floor(at / cols)]);
          const tolerance =
            LAMBDA * (2 * krot + 4) * duo.allowance.roundoff * largestRow(g, cols) * largestRow(y, cols);
          closeArrays(found.theta, wanted.theta, tolerance, '∂L/∂θ');
          closeArrays(found.scales, wanted.scales, (i) => tolerance / Math.abs(scales[i]), '∂L/∂s');
        }
      }
      subject.dispose();
      oracle.dispose();
    },
  }));
}

/** As rotate: λ·(K + 2)·u·‖group of the rotated side‖₂, for the inverse divided by |s|. */
function transformChannelsCases(): ConformanceCase[] {
  const shapes = [
    [172, 1, 4, 3],
    [172, 17, 172, 8],
    [352, 33, 32, 8],
    [384, 64, 128, 8],
    [2752, 3, 64, 2],
    [384, 5, 128, 0],
  ] as const;
  return shapes.flatMap(([channels, cols, groupSize, krot]) =>
    (
      [
        ['forward', 'weight'],
        ['inverse', 'weight'],
        ['forward', 'activation'],
      ] as const
    ).map(([direction, side]) => ({
      op: 'transformChannels' as const,
      name: `${direction}, ${side} side, ${channels} × ${cols}, K = ${krot} in groups of ${groupSize}`,
      run: async (duo: Duo) => {
        const transform = randomTransform(channels, groupSize, krot, duo.rng);
        const w = await duo.input([channels, cols]);
        const expected = await duo.oracle.transformChannels(w.oracle, transform, direction, side);
        const rotatedSide = direction === 'forward' ? readF64(expected) : w.host;
        const tolerance = (at: number): number => {
          const channel = Math.floor(at / cols);
          const first = Math.floor(channel / groupSize) * groupSize;
          const size = norm(rotatedSide, first * cols + (at % cols), groupSize, cols);
          const divided = direction === 'forward' ? size : size * Math.abs(transform.channelScales[channel]);
          return LAMBDA * (krot + 2) * duo.allowance.roundoff * divided;
        };
        await duo.close(
          await duo.subject.transformChannels(w.subject, transform, direction, side),
          expected,
          tolerance,
        );
      },
    })),
  );
}

/** Tolerance: λ·√(k + 2)·u·Σ|a·b|. */
function matmulCases(): ConformanceCase[] {
  const shapes = [
    [1, 172, 5],
    [5, 172, 1],
    [3, 43, 17],
    [64, 352, 33],
    [17, 2752, 5],
  ] as const;
  /** Large enough for what backends make of a product's symmetry. */
  const gramCase: ConformanceCase = {
    op: 'matmul',
    name: 'a matrix of 1100 columns, transposed, with itself',
    run: async (duo) => {
      const x = await duo.input([7, 1100]);
      const options = { transposeA: true };
      const absolute = await duo.oracle.upload(hostTensor('f32', x.shape, x.host.map(Math.abs)));
      const size = readF64(await duo.oracle.matmul(absolute, absolute, options));
      await duo.close(
        await duo.subject.matmul(x.subject, x.subject, options),
        await duo.oracle.matmul(x.oracle, x.oracle, options),
        (at) => LAMBDA * 3 * duo.allowance.roundoff * size[at],
      );
    },
  };
  const plain = shapes.flatMap(([m, k, n]) =>
    [false, true].flatMap((transposeA) =>
      [false, true].map((transposeB) => ({
        op: 'matmul' as const,
        name: `[${m}, ${k}]${transposeA ? ' transposed' : ''} · [${k}, ${n}]${transposeB ? ' transposed' : ''}`,
        run: async (duo: Duo) => {
          const a = await duo.input(transposeA ? [k, m] : [m, k]);
          const b = await duo.input(transposeB ? [n, k] : [k, n]);
          const options = { transposeA, transposeB };
          const absolute = async (twin: Twin): Promise<Tensor> =>
            duo.oracle.upload(hostTensor('f32', twin.shape, twin.host.map(Math.abs)));
          const size = readF64(await duo.oracle.matmul(await absolute(a), await absolute(b), options));
          await duo.close(
            await duo.subject.matmul(a.subject, b.subject, options),
            await duo.oracle.matmul(a.oracle, b.oracle, options),
            (at) => LAMBDA * Math.sqrt(k + 2) * duo.allowance.roundoff * size[at],
          );
        },
      })),
    ),
  );
  return [...plain, gramCase];
}

/**
 * Sizes that matrix units take, and gradients far below what f16 holds. Tolerance: both operands within 2^-11 of their values
 * (or 2^-38 of the largest, where that is more), statistically, and f32's.
 */
function halfMatmulCases(): ConformanceCase[] {
  return (
    [
      [false, false, 1],
      [false, true, 1e-9],
      [true, false, 1e-9],
      [true, true, 300],
    ] as const
  ).map(([transposeA, transposeB, scale]) => ({
    op: 'matmul' as const,
    name: `rounded to f16, ${transposeA ? 'a' : 'no'} and ${transposeB ? 'b' : 'none'} transposed, values of ${scale}`,
    run: async (duo: Duo) => {
      const [m, n, k] = [200, 164, 2112];
      const small = (count: number): Float32Array => duo.normals(count).map((v) => scale * v);
      const a = await duo.input(transposeA ? [k, m] : [m, k], small(k * m));
      const b = await duo.input(transposeB ? [n, k] : [k, n]);
      const options = { transposeA, transposeB };
      const squares = (twin: Twin) =>
        duo.oracle.upload(
          hostTensor(
            'f64',
            twin.shape,
            Float64Array.from(twin.host, (v) => v * v),
          ),
        );
      const size = readF64(await duo.oracle.matmul(await squares(a), await squares(b), options));
      await duo.close(
        await duo.subject.matmul(a.subject, b.subject, { ...options, precision: 'f16' }),
        await duo.oracle.matmul(a.oracle, b.oracle, options),
        (at) => LAMBDA * (Math.SQRT2 * 2 ** -11 + Math.sqrt(k) * duo.allowance.roundoff) * Math.sqrt(size[at]),
      );
    },
  }));
}

function elementwiseCases(): ConformanceCase[] {
  return [
    {
      // Tolerance: 2·u·(|acc| + |scale·x|).
      op: 'addScaled',
      name: 'into a new tensor and in place',
      run: async (duo) => {
        const acc = await duo.input([17, 43]);
        const x = await duo.input([17, 43]);
        const expected = await duo.oracle.addScaled(acc.oracle, x.oracle, -0.3);
        const tolerance = (at: number): number =>
          2 * duo.allowance.roundoff * (Math.abs(acc.host[at]) + 0.3 * Math.abs(x.host[at]));
        await duo.close(await duo.subject.addScaled(acc.subject, x.subject, -0.3), expected, tolerance, 'new');
        const target = await duo.subject.upload(hostTensor('f32', acc.shape, acc.host.slice()));
        const result = await duo.subject.addScaled(target, x.subject, -0.3, true);
        await duo.close(result, expected, tolerance, 'in place, result');
        await duo.close(target, expected, tolerance, 'in place, acc');
      },
    },
    {
      op: 'transpose',
      name: 'odd shapes',
      run: async (duo) => {
        for (const shape of [
          [1, 172],
          [172, 1],
          [43, 17],
          [64, 128],
        ]) {
          const x = await duo.input(shape);
          await duo.close(await duo.subject.transpose(x.subject), await duo.oracle.transpose(x.oracle), 0);
        }
      },
    },
    {
      op: 'diagonal',
      name: '1, 43 and 172 rows',
      run: async (duo) => {
        for (const n of [1, 43, 172]) {
          const x = await duo.input([n, n]);
          closeArrays(await duo.subject.diagonal(x.subject), await duo.oracle.diagonal(x.oracle), 0, `${n} rows`);
        }
      },
    },
    {
      op: 'gatherColumns',
      name: 'out of order, with repeats',
      run: async (duo) => {
        const x = await duo.input([43, 172]);
        const columns = Int32Array.of(171, 0, 5, 5, 90);
        await duo.close(
          await duo.subject.gatherColumns(x.subject, columns),
          await duo.oracle.gatherColumns(x.oracle, columns),
          0,
        );
      },
    },
    {
      op: 'scaleRows',
      name: 'odd shapes',
      run: async (duo) => {
        for (const shape of [
          [1, 172],
          [172, 1],
          [43, 17],
        ]) {
          const x = await duo.input(shape);
          const factors = Float32Array.from({ length: shape[0] }, (_, r) => (r % 5) / 4);
          const expected = await duo.oracle.scaleRows(x.oracle, factors);
          const tolerance = (at: number) => Math.abs(x.host[at]) * 2 * duo.allowance.roundoff;
          await duo.close(await duo.subject.scaleRows(x.subject, factors), expected, tolerance);
        }
      },
    },
    {
      // Tolerance: every square and every addition rounds.
      op: 'rowSquares',
      name: 'odd shapes',
      run: async (duo) => {
        for (const [rows, columns] of [
          [1, 172],
          [172, 1],
          [43, 300],
        ]) {
          const x = await duo.input([rows, columns]);
          const expected = await duo.oracle.rowSquares(x.oracle);
          const tolerance = (at: number) => expected[at] * (columns + 2) * Math.max(duo.allowance.roundoff, 2 ** -24);
          closeArrays(await duo.subject.rowSquares(x.subject), expected, tolerance, `[${rows}, ${columns}]`);
        }
      },
    },
    {
      // Tolerance: λ·u·√Σ(a·b)²: products may round to f32, their sum may not.
      op: 'dot',
      name: '1 to 275,200 elements',
      run: async (duo) => {
        for (const shape of [
          [1, 1],
          [43, 17],
          [100, 2752],
        ]) {
          const a = await duo.input(shape);
          const b = await duo.input(shape);
          const products = Float64Array.from(a.host, (value, i) => value * b.host[i]);
          const tolerance = LAMBDA * duo.allowance.roundoff * norm(products, 0, products.length);
          const actual = await duo.subject.dot(a.subject, b.subject);
          closeArrays([actual], [await duo.oracle.dot(a.oracle, b.oracle)], tolerance, `[${shape.join(', ')}]`);
        }
      },
    },
  ];
}

/**
 * f64 inside, so the result is the oracle's rounded to f32: 2·u·|x|, plus n²·κ·2^-53·max|x| for the condition number
 * κ ≤ n / damp of the damped matrix.
 */
function linalgCases(): ConformanceCase[] {
  const tolerance = (duo: Duo, y: Float64Array, n: number, damp: number) => {
    const conditioning = ((n ** 3 / damp) * 2 ** -53 + 2 ** -40) * maxAbs(y);
    return (at: number): number => 2 * duo.allowance.roundoff * Math.abs(y[at]) + conditioning;
  };
  return [
    ...[1, 43, 172, 352].map((n) => ({
      op: 'gptqFactor' as const,
      name: `${n} channels`,
      run: async (duo: Duo) => {
        const h = await duo.input([n, n], gram(duo, n));
        const expected = await duo.oracle.gptqFactor(h.oracle, 0.01);
        const actual = await duo.subject.gptqFactor(h.subject, 0.01);
        await duo.close(actual, expected, tolerance(duo, readF64(expected), n, 0.01));
      },
    })),
    ...[1, 43, 172, 352].map((n) => ({
      op: 'solveSymmetric' as const,
      name: `${n} channels, 1 and 17 right-hand sides`,
      run: async (duo: Duo) => {
        const h = await duo.input([n, n], gram(duo, n));
        for (const rows of [1, 17]) {
          const b = await duo.input([rows, n]);
          const expected = await duo.oracle.solveSymmetric(h.oracle, b.oracle, 0.01);
          const actual = await duo.subject.solveSymmetric(h.subject, b.subject, 0.01);
          await duo.close(actual, expected, tolerance(duo, readF64(expected), n, 0.01), `${rows} right-hand sides`);
        }
      },
    })),
    {
      op: 'gptqFactor' as const,
      name: 'refuses what is not positive definite',
      refuses: true,
      run: async (duo: Duo) => {
        const indefinite = new Float32Array(43 * 43);
        for (let i = 0; i < 43; i++) indefinite[i * 43 + i] = i === 20 ? -1 : 1;
        for (const host of [indefinite, new Float32Array(43 * 43).fill(NaN), new Float32Array(43 * 43)]) {
          const h = await duo.subject.upload(hostTensor('f32', [43, 43], host));
          const error: unknown = await Promise.resolve(duo.subject.gptqFactor(h, 0.01)).then(
            () => undefined,
            (reason: unknown) => reason,
          );
          if (!(error instanceof GyreError) || error.code !== 'non-finite') {
            throw new Error(`expected a GyreError 'non-finite', found ${String(error)}`);
          }
        }
      },
    },
  ];
}

/** Every case of {@link QuantizationOps}. */
export const quantizationCases: readonly ConformanceCase[] = [
  ...matmulCases(),
  ...halfMatmulCases(),
  ...elementwiseCases(),
  ...transformChannelsCases(),
  ...objectiveCases(),
  ...roundToNearestCases(),
  degenerateCase,
  ...clipCases(),
  ...linalgCases(),
  ...gptqCases(),
  ...descentCases(),
  ...refitCases(),
];
