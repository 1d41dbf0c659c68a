// Conformance cases of low-precision activations: Hadamard transforms, dynamic grids, linears with rounded inputs, caches of
// integers, symmetric grids of weights. Tolerances: u = unit roundoff, λ as in duo.ts; each formula stands by its case.
import { hostTensor } from '../../src/core/tensor.js';
import type {
  ActivationGrid,
  Backend,
  GridSpec,
  KvGrid,
  LinearSource,
  QuantizedWeight,
  RoundedWeight,
  Tensor,
} from '../../src/ops/backend.js';
import { dequantize } from '../../src/ops/reference/linear.js';
import { readF64 } from '../../src/ops/reference/backend.js';
import { hadamardTransform } from '../../src/transforms/index.js';
import { clipFactors, gram, sameRounding, stableInput, weights } from './cases-quantization.js';
import { closeArrays, LAMBDA, largestRow, maxAbs, norm, randomQuantized, type Duo, type Twin } from './duo.js';
import type { ConformanceCase } from './suite.js';

/** [channels, order, inner]: powers of two, Paley's and Williamson's bases, across heads, block-diagonal. */
const HADAMARDS = [
  [64, 64, 1],
  [1024, 1024, 1],
  [24, 24, 1],
  [384, 384, 1],
  [172, 172, 1],
  [2752, 172, 1],
  [896, 896, 1],
  [256, 4, 64],
  [480, 12, 40],
  [6, 2, 3],
  [352, 2, 1],
] as const;

/** Every output is a sum of n terms in log p + m steps. Tolerance: λ·(log₂ p + √m + 2)·u·‖run‖₂. */
function hadamardCases(): ConformanceCase[] {
  return HADAMARDS.map(([channels, order, inner]) => ({
    op: 'rotate' as const,
    also: ['loadTransform', 'release'] as const,
    name: `Hadamard of order ${order}, inner ${inner}, on ${channels} channels`,
    run: async (duo: Duo) => {
      const transform = hadamardTransform(channels, { order, inner });
      const m = Math.sqrt(transform.base.length);
      const handle = await duo.subject.loadTransform(transform);
      if (handle.channels !== channels) throw new Error(`handle says ${handle.channels} channels`);
      const oracle = await duo.oracle.loadTransform(transform);
      const run = order * inner;
      for (const rows of [1, 3, 17]) {
        const x = await duo.input([rows, channels]);
        const steps = Math.log2(order / m) + Math.sqrt(m) + 2;
        const tolerance = (at: number): number =>
          LAMBDA * steps * duo.allowance.roundoff * norm(x.host, Math.floor(at / run) * run, run);
        const actual = await duo.subject.rotate(x.subject, handle);
        await duo.close(actual, await duo.oracle.rotate(x.oracle, oracle), tolerance, `${rows} rows`);
        duo.subject.free(actual);
      }
      duo.subject.release(handle);
    },
  }));
}

const ACTIVATION_GRIDS: readonly (readonly [rows: number, channels: number, grid: ActivationGrid])[] = [
  [3, 172, { bits: 4, symmetric: true, groupSize: -1, clip: 0.9 }],
  [1, 352, { bits: 8, symmetric: true, groupSize: -1, clip: 1 }],
  [5, 384, { bits: 4, symmetric: false, groupSize: -1, clip: 0.95 }],
  [2, 384, { bits: 8, symmetric: false, groupSize: 128, clip: 1 }],
  [3, 172, { bits: 4, symmetric: true, groupSize: 43, clip: 0.8 }],
  [4, 48, { bits: 4, symmetric: false, groupSize: 24, clip: 0.95 }],
];

function gridName({ bits, symmetric, groupSize, clip }: ActivationGrid): string {
  const group = groupSize === -1 ? 'per token' : `in groups of ${groupSize}`;
  return `${bits} bits ${symmetric ? 'symmetric' : 'asymmetric'} ${group}, clip ${clip}`;
}

/**
 * Rows whose rounding survives f32: a scale is off by a few u, so that a code next to a tie would fall either way. The
 * values move with the scale, so what must be stable is the code: values of inputs scaled alike, compared after division.
 */
async function stableRows(duo: Duo, rows: number, channels: number, grid: ActivationGrid): Promise<Twin> {
  const parts: Float32Array[] = [];
  // Row by row: whole matrices would hardly ever be stable.
  for (let r = 0; r < rows; r++) {
    for (let attempt = 0; ; attempt++) {
      if (attempt === 200) throw new Error('no row found whose rounding is stable: make the case smaller');
      const host = duo.normals(channels).map((v) => (3 + r) * v + 0.3);
      const values = async (noise: number): Promise<Float64Array> => {
        const perturbed = Float64Array.from(host, (v) => v * (1 + noise * (duo.rng.uniform() - 0.5)));
        const x = await duo.oracle.upload(hostTensor('f64', [1, channels], perturbed));
        return readF64(await duo.oracle.quantizeRows(x, grid));
      };
      const expected = await values(0);
      const peak = maxAbs(host);
      let stable = true;
      for (let n = 0; n < 3 && stable; n++) {
        const other = await values(32 * duo.allowance.roundoff);
        // A code that moves changes its value by a whole step, far more than the noise.
        stable = other.every((v, at) => Math.abs(v - expected[at]) <= 256 * duo.allowance.roundoff * peak);
      }
      if (!stable) continue;
      parts.push(host);
      break;
    }
  }
  const host = new Float32Array(rows * channels);
  parts.forEach((part, r) => host.set(part, r * channels));
  return duo.input([rows, channels], host);
}

/** The codes are the oracle's; a value then carries the roundings of low and scale. Tolerance: 8·u·max|x| of the row. */
function quantizeRowsCases(): ConformanceCase[] {
  return [
    ...ACTIVATION_GRIDS.map(([rows, channels, grid]) => ({
      op: 'quantizeRows' as const,
      name: `${rows} × ${channels}, ${gridName(grid)}`,
      run: async (duo: Duo) => {
        const x = await stableRows(duo, rows, channels, grid);
        const tolerance = (at: number): number =>
          8 * duo.allowance.roundoff * maxAbs(x.host, Math.floor(at / channels) * channels, channels);
        const actual = await duo.subject.quantizeRows(x.subject, grid);
        await duo.close(actual, await duo.oracle.quantizeRows(x.oracle, grid), tolerance);
      },
    })),
    {
      op: 'quantizeRows' as const,
      name: 'zeros and constants',
      run: async (duo: Duo) => {
        const x = await duo.input(
          [3, 32],
          Float32Array.from({ length: 96 }, (_, at) => [0, 0.5, -3][at >> 5]),
        );
        for (const symmetric of [true, false]) {
          const grid: ActivationGrid = { bits: 4, symmetric, groupSize: -1, clip: 1 };
          const actual = await duo.subject.quantizeRows(x.subject, grid);
          const tolerance = 4 * duo.allowance.roundoff * 3;
          await duo.close(actual, await duo.oracle.quantizeRows(x.oracle, grid), tolerance);
        }
      },
    },
  ];
}

/** Symmetric 8-bit activations meet symmetric 8-bit weights: backends may multiply their codes as signed bytes. */
function centred(weight: QuantizedWeight, grid: ActivationGrid): QuantizedWeight {
  return weight.bits === 8 && grid.symmetric ? { ...weight, zeros: weight.zeros.map(() => 128) } : weight;
}

/** As linear, with x̂ = Q(x) in x's place and 4u more for its scale: λ·(√(n + 2) + 8)·u·(Σ|x̂·w| + …), and int16 where allowed. */
function linearCases(): ConformanceCase[] {
  const shapes = [
    [172, 24, 4, 172, true, { bits: 8, symmetric: true, groupSize: -1, clip: 1 }],
    [384, 33, 4, 128, false, { bits: 4, symmetric: true, groupSize: -1, clip: 0.9 }],
    [384, 40, 8, 384, true, { bits: 8, symmetric: false, groupSize: -1, clip: 1 }],
    [384, 48, 8, 384, false, { bits: 8, symmetric: true, groupSize: -1, clip: 1 }],
    [352, 16, 'dense', 352, true, { bits: 8, symmetric: true, groupSize: 32, clip: 1 }],
  ] as const;
  return shapes.map(([inFeatures, outFeatures, bits, groupSize, bias, grid]) => ({
    op: 'linear' as const,
    also: ['loadLinear', 'release'] as const,
    name: `${inFeatures} → ${outFeatures}, ${bits === 'dense' ? 'dense' : `${bits} bits in groups of ${groupSize}`}, activations of ${gridName(grid)}`,
    run: async (duo: Duo) => {
      const common = { bias: bias ? duo.normals(outFeatures) : undefined, activations: grid };
      const source: LinearSource =
        bits === 'dense'
          ? {
              kind: 'dense',
              weight: hostTensor('f32', [outFeatures, inFeatures], duo.normals(outFeatures * inFeatures)),
              ...common,
            }
          : {
              kind: 'quantized',
              weight: centred(randomQuantized(outFeatures, inFeatures, bits, groupSize, duo.rng), grid),
              ...common,
            };
      const handle = await duo.subject.loadLinear(source);
      const oracle = await duo.oracle.loadLinear(source);
      const w =
        source.kind === 'quantized' ? dequantize(source.weight) : readF64(await duo.oracle.upload(source.weight));
      for (const rows of [1, 3, 17]) {
        const x = await stableRows(duo, rows, inFeatures, grid);
        const residual = rows === 3 ? await duo.input([rows, outFeatures]) : undefined;
        const rounded = readF64(await duo.oracle.quantizeRows(x.oracle, grid));
        const int16 = source.kind === 'quantized' && rows <= duo.allowance.int16Rows;
        const tolerance = (at: number): number => {
          const [r, o] = [Math.floor(at / outFeatures), at % outFeatures];
          let magnitude = Math.abs(common.bias?.[o] ?? 0) + Math.abs(residual?.host[at] ?? 0);
          for (let i = 0; i < inFeatures; i++)
            magnitude += Math.abs(rounded[r * inFeatures + i] * w[o * inFeatures + i]);
          const activation = int16
            ? maxAbs(x.host, r * inFeatures, inFeatures) * norm(w, o * inFeatures, inFeatures)
            : 0;
          return LAMBDA * (Math.sqrt(inFeatures + 2) + 8) * duo.allowance.roundoff * magnitude + 2 ** -14 * activation;
        };
        const actual = await duo.subject.linear(x.subject, handle, residual?.subject);
        await duo.close(actual, await duo.oracle.linear(x.oracle, oracle, residual?.oracle), tolerance, `${rows} rows`);
        duo.subject.free(actual);
      }
      duo.subject.release(handle);
    },
  }));
}

/** Keys or values that lie on their grid whatever the rounding of its making: codes of both ends, a scale that is a power of two. */
function onGrid(duo: Duo, heads: number, headDim: number, { bits, clip }: KvGrid): Float32Array {
  const out = new Float32Array(heads * headDim);
  const top = 2 ** bits - 1;
  for (let h = 0; h < heads; h++) {
    const scale = 2 ** (duo.rng.int(-2, 1) - bits + 2);
    const low = scale * duo.rng.int(-top, 0);
    // The range is clip times that of the extremes, about its middle: put those out by what clipping takes away.
    const reach = (scale * top * (1 / clip - 1)) / 2;
    for (let i = 0; i < headDim; i++) out[h * headDim + i] = low + scale * duo.rng.int(0, top + 1);
    const [first, second] = [duo.rng.int(0, headDim / 2), duo.rng.int(headDim / 2, headDim)];
    out[h * headDim + first] = low - reach;
    out[h * headDim + second] = low + scale * top + reach;
  }
  return out;
}

/** As attention, with the values that are stored: (2δ + λ·u·(√n + 8))·max|v|, δ = λ·u·√d·‖q‖‖k‖·scale. */
function kvCases(): ConformanceCase[] {
  const shapes = [
    [4, 4, 16, 4, 1, undefined, 1],
    [6, 2, 24, 4, 0.5, undefined, 2],
    [8, 1, 64, 8, 1, 4, 3],
    [4, 2, 80, 4, 0.5, 7, 1],
    [4, 2, 128, 8, 0.5, undefined, 1],
  ] as const;
  return shapes.map(([heads, kvHeads, headDim, bits, clip, window, batch]) => ({
    op: 'attention' as const,
    also: ['createKvCache', 'release'] as const,
    name: `${heads}/${kvHeads} heads of ${headDim} over a cache of ${bits} bits, clip ${clip}, batch ${batch}${window ? `, window ${window}` : ''}`,
    run: async (duo: Duo) => {
      const grid: KvGrid = { bits, clip };
      const tokens = 83;
      const scale = headDim ** -0.5;
      const q = await duo.input([batch * tokens, heads * headDim]);
      const k = await duo.input(
        [batch * tokens, kvHeads * headDim],
        onGrid(duo, batch * tokens * kvHeads, headDim, grid),
      );
      const v = await duo.input(
        [batch * tokens, kvHeads * headDim],
        onGrid(duo, batch * tokens * kvHeads, headDim, grid),
      );
      const shape = { batch, kvHeads, headDim, capacity: tokens + 3, grid };
      const options = { heads, kvHeads, headDim, batch, scale, window };
      const expected = await duo.oracle.attention(q.oracle, k.oracle, v.oracle, {
        ...options,
        cache: await duo.oracle.createKvCache(shape),
        start: 0,
      });
      const delta = Math.sqrt(headDim) * largestRow(q.host, headDim) * largestRow(k.host, headDim) * scale;
      const tolerance = LAMBDA * duo.allowance.roundoff * (2 * delta + Math.sqrt(tokens) + 8) * maxAbs(v.host);
      const cache = await duo.subject.createKvCache(shape);
      for (const chunks of [
        [0, 83],
        [0, 70, 71, 72, 76, 83],
        [0, 1, 30, 83],
      ]) {
        for (let n = 1; n < chunks.length; n++) {
          const [begin, end] = [chunks[n - 1], chunks[n]];
          const take = (host: Float32Array, width: number): Float32Array => {
            const out = new Float32Array(batch * (end - begin) * width);
            for (let b = 0; b < batch; b++)
              out.set(
                host.subarray((b * tokens + begin) * width, (b * tokens + end) * width),
                b * (end - begin) * width,
              );
            return out;
          };
          const part = async (twin: Twin): Promise<Tensor> =>
            duo.subject.upload(
              hostTensor('f32', [batch * (end - begin), twin.shape[1]], take(twin.host, twin.shape[1])),
            );
          const [cq, ck, cv] = [await part(q), await part(k), await part(v)];
          const actual = await duo.subject.attention(cq, ck, cv, { ...options, cache, start: begin });
          const wanted = take(Float32Array.from(readF64(expected)), heads * headDim);
          const found = await duo.subject.download(actual);
          closeArrays(found, wanted, tolerance + 2 ** -24 * maxAbs(wanted), `tokens ${begin} … ${end}`);
          duo.subject.free(cq, ck, cv, actual);
        }
      }
      duo.subject.release(cache);
    },
  }));
}

/** As splitHeads, then one more transform of headDim values: the tolerance takes the head's norm and its log₂ d + √m steps. */
const headTransformCase: ConformanceCase = {
  op: 'splitHeads',
  name: 'with a Hadamard transform of each head of q and k',
  run: async (duo) => {
    for (const [heads, kvHeads, headDim] of [
      [4, 2, 64],
      [6, 2, 24],
    ]) {
      const transform = hadamardTransform(headDim);
      const angles = Float32Array.from({ length: 8 * (headDim / 2) }, () => 6 * duo.rng.uniform());
      const [cos, sin] = [angles.map(Math.cos), angles.map(Math.sin)];
      const qkv = await duo.input([5, (heads + 2 * kvHeads) * headDim]);
      const options = { heads, kvHeads, headDim, batch: 1, start: 2, eps: 1e-6 };
      const call = async (backend: Backend, x: Tensor) =>
        backend.splitHeads(x, {
          ...options,
          rope: await backend.loadRope(cos, sin, headDim),
          headTransform: await backend.loadTransform(transform),
        });
      const actual = await call(duo.subject, qkv.subject);
      const expected = await call(duo.oracle, qkv.oracle);
      for (const part of ['q', 'k', 'v'] as const) {
        const y = readF64(expected[part]);
        const tolerance = (at: number): number =>
          part === 'v'
            ? 0
            : LAMBDA * 16 * duo.allowance.roundoff * norm(y, Math.floor(at / headDim) * headDim, headDim);
        await duo.close(actual[part], expected[part], tolerance, part);
      }
    }
  },
};

const SYMMETRIC: readonly (readonly [channels: number, cols: number, grid: GridSpec])[] = [
  [172, 7, { bits: 4, groupSize: 172, symmetric: true }],
  [172, 5, { bits: 8, groupSize: 43, symmetric: true }],
  [352, 4, { bits: 4, groupSize: 32, symmetric: true }],
  [384, 6, { bits: 3, groupSize: 384, symmetric: true }],
];

/** Codes, zero points and scales must be the oracle's, as for asymmetric grids. */
function symmetricCases(): ConformanceCase[] {
  return SYMMETRIC.flatMap(([channels, cols, grid], n): ConformanceCase[] => {
    const name = `symmetric: ${channels} × ${cols}, ${grid.bits} bits in groups of ${grid.groupSize}${n % 2 ? ', clipped' : ''}`;
    const clip = (duo: Duo) => (n % 2 ? clipFactors(duo, (channels / grid.groupSize) * cols) : undefined);
    return [
      {
        op: 'roundToNearest',
        name,
        run: async (duo) => {
          const factors = clip(duo);
          const round = async (backend: Backend, w: Tensor): Promise<RoundedWeight> =>
            backend.roundToNearest(w, grid, factors);
          const w = await stableInput(
            duo,
            () => weights(duo, channels, cols),
            [channels, cols],
            async (x) => (await round(duo.oracle, x)).values,
            4 * duo.allowance.roundoff,
          );
          const expected = await round(duo.oracle, w.oracle);
          if (expected.zeros.some((zero) => zero !== 2 ** (grid.bits - 1)))
            throw new Error('the oracle is not symmetric');
          await sameRounding(duo, await round(duo.subject, w.subject), expected);
        },
      },
      {
        op: 'gptq',
        name,
        run: async (duo) => {
          const factors = clip(duo);
          const h = await duo.input([channels, channels], gram(duo, channels));
          const exact = await duo.oracle.gptqFactor(h.oracle, 0.01);
          const factor = await duo.input([channels, channels], Float32Array.from(readF64(exact)));
          const round = async (backend: Backend, w: Tensor, u: Tensor): Promise<RoundedWeight> =>
            backend.gptq(w, u, grid, factors);
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
      },
    ];
  });
}

/** Every case of low-precision activations. */
export const activationCases: readonly ConformanceCase[] = [
  ...hadamardCases(),
  ...quantizeRowsCases(),
  ...linearCases(),
  ...kvCases(),
  headTransformCase,
  ...symmetricCases(),
];
