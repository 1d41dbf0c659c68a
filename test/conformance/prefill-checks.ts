// Checks of the ops of many rows with activations in f16 against the float64 oracle, at shapes where the kernels for matrix units cut
// tiles over edges: in npm test on a software GPU (tiled kernels), on a real one by `npx tsx bench/webgpu-prefill.ts --check`.
import { f16BitsToF32, f32ToF16Bits, fromFloat32 } from '../../src/core/dtype.js';
import { createRng, type Rng } from '../../src/core/rng.js';
import { hostTensor } from '../../src/core/tensor.js';
import type { WebGpuBackend } from '../../src/backends/webgpu/index.js';
import { hasMatrixUnits } from '../../src/backends/webgpu/capabilities.js';
import type { GpuDevice } from '../../src/backends/webgpu/device.js';
import { GEMM_TILES, gemmKernel } from '../../src/backends/webgpu/fast/gemm.js';
import { tileGroups, type MatrixTile } from '../../src/backends/webgpu/fast/matrix-tiles.js';
import { ownLinear } from '../../src/backends/webgpu/linear.js';
import { makeTensor, narrow, own } from '../../src/backends/webgpu/tensor.js';
import type { Backend, LinearHandle, LinearSource, Tensor } from '../../src/ops/backend.js';
import { dequantize } from '../../src/ops/reference/linear.js';
import { createReferenceBackend, readF64 } from '../../src/ops/reference/backend.js';
import { forestOf, largeForest } from './cases-inference.js';
import { hadamardTransform } from '../../src/transforms/index.js';
import { closeArrays, LAMBDA, maxAbs, norm, randomQuantized, randomTransform } from './duo.js';

/** A check of a backend opened with precision f16. */
export interface PrefillCheck {
  readonly name: string;
  /** Throws when the backend deviates from the oracle; returns the largest error as a share of its tolerance. */
  run(backend: WebGpuBackend): Promise<number>;
}

const C = 2 ** -11;
const oracle = createReferenceBackend();
const halves = (rng: Rng, count: number, scale = 1): Float32Array =>
  Float32Array.from({ length: count }, () => f16BitsToF32(f32ToF16Bits(scale * rng.normal())));
const uploadTo = async (backend: Backend, shape: readonly number[], values: Float32Array): Promise<Tensor> =>
  backend.upload(hostTensor('f32', shape, values.slice()));
/** f16 on the backend; the values are f16 already. */
const uploadHalf = async (backend: WebGpuBackend, shape: readonly number[], values: Float32Array): Promise<Tensor> =>
  narrow(backend.gpu, own(await uploadTo(backend, shape, values)));

function compare(
  actual: ArrayLike<number>,
  expected: ArrayLike<number>,
  tolerance: (at: number) => number,
  what: string,
): number {
  closeArrays(actual, expected, tolerance, what);
  let worst = 0;
  for (let i = 0; i < expected.length; i++) worst = Math.max(worst, Math.abs(actual[i] - expected[i]) / tolerance(i));
  return worst;
}

/** Rows, inputs, outputs, group size or float type. */
type Product = readonly [rows: number, inFeatures: number, outFeatures: number, type: number | 'f16' | 'bf16'];

/** Odd shapes; see fast/gemm.ts for the tiles that these fill, or don't. */
const PRODUCTS: readonly Product[] = [
  [9, 128, 64, 32],
  [130, 352, 172, 32],
  [77, 2752, 84, 64],
  [70, 384, 352, 128],
  [65, 172, 96, 43],
  [100, 384, 33, 128],
  [33, 2752, 132, 2752],
  [129, 352, 260, 'bf16'],
  [257, 128, 516, 'f16'],
];

/** With `tile` the product runs in those tiles, whatever the backend would choose. */
function productCheck([rows, inFeatures, outFeatures, type]: Product, tile?: MatrixTile): PrefillCheck {
  const name = `${tile ? `tiles of ${tile.tileM} × ${tile.tileN} × ${tile.tileK}, ` : ''}linear ${rows} × ${inFeatures} → ${outFeatures}, ${typeof type === 'number' ? `4 bits in groups of ${type}` : type}`;
  return {
    name,
    run: async (backend) => {
      const rng = createRng(11).fork(name);
      // Tiles are checked with all that can be added; of other products some with and some without.
      const extras = tile !== undefined || rows % 2 === 1;
      const bias = extras ? Float32Array.from({ length: outFeatures }, () => rng.normal()) : undefined;
      const source: LinearSource =
        typeof type === 'number'
          ? { kind: 'quantized', weight: randomQuantized(outFeatures, inFeatures, 4, type, rng), bias }
          : {
              kind: 'dense',
              weight: hostTensor(
                type,
                [outFeatures, inFeatures],
                fromFloat32(halves(rng, outFeatures * inFeatures), type),
              ),
              bias,
            };
      const x = halves(rng, rows * inFeatures);
      const residual = extras ? Float32Array.from({ length: rows * outFeatures }, () => rng.normal()) : undefined;
      const weight =
        source.kind === 'quantized' ? dequantize(source.weight) : readF64(await oracle.upload(source.weight));
      const handle = await backend.loadLinear(source);
      const input = await uploadTo(backend, [rows, inFeatures], x);
      const add = residual && (await uploadTo(backend, [rows, outFeatures], residual));
      const y = tile ? inTiles(backend, tile, input, handle, add) : await backend.linear(input, handle, add);
      const expected = readF64(
        await oracle.linear(
          await uploadTo(oracle, [rows, inFeatures], x),
          await oracle.loadLinear(source),
          residual && (await uploadTo(oracle, [rows, outFeatures], residual)),
        ),
      );
      const tolerance = (at: number): number => {
        const [r, o] = [Math.floor(at / outFeatures), at % outFeatures];
        let [size, squares] = [Math.abs(bias?.[o] ?? 0) + Math.abs(residual?.[at] ?? 0), 0];
        for (let i = 0; i < inFeatures; i++) {
          const product = x[r * inFeatures + i] * weight[o * inFeatures + i];
          size += Math.abs(product);
          squares += product ** 2;
        }
        // x is f16 as it comes; weights are rounded; matrix units may truncate their sums.
        return LAMBDA * (C * Math.sqrt(squares) + Math.sqrt(inFeatures + 2) * 2 ** -23 * size);
      };
      const worst = compare(await backend.download(y), expected, tolerance, name);
      backend.release(handle);
      backend.free(y);
      return worst;
    },
  };
}

/** The product in tiles of one's choice. */
function inTiles(backend: WebGpuBackend, tile: MatrixTile, x: Tensor, handle: LinearHandle, add?: Tensor): Tensor {
  const { gpu } = backend;
  const { inFeatures, outFeatures, groupSize, format, weights, grids, bias } = ownLinear(handle);
  const input = narrow(gpu, own(x));
  const { rows } = input.matrix;
  const out = makeTensor(gpu, [rows, outFeatures]);
  const type = format.kind === 'int' ? 'int4' : format.kind === 'bf16' ? 'bf16' : 'f16';
  gpu.dispatch(
    gemmKernel({ ...tile, weights: type, groupSize, bias: bias !== undefined, residual: add !== undefined }),
    { x: input, weights, grids: grids ?? weights, bias: bias ?? weights, residual: add ? own(add) : out, out },
    { m: rows, n: outFeatures, k: inFeatures },
    tileGroups(tile, rows, outFeatures),
  );
  backend.free(input);
  return out;
}

/** [rows, channels, group size, rotations]. */
const TRANSFORMS = [
  [9, 128, 128, 8],
  [77, 384, 128, 8],
  [130, 256, 64, 8],
  [33, 384, 32, 3],
  [65, 352, 32, 8],
  [70, 2752, 64, 8],
  [12, 176, 16, 2],
  [2100, 128, 128, 8],
] as const;

function transformCheck([rows, channels, groupSize, krot]: (typeof TRANSFORMS)[number]): PrefillCheck {
  const name = `rotate ${rows} × ${channels} in groups of ${groupSize}, K = ${krot}`;
  return {
    name,
    run: async (backend) => {
      const rng = createRng(12).fork(name);
      const transform = randomTransform(channels, groupSize, krot, rng);
      const x = halves(rng, rows * channels);
      const handle = await backend.loadTransform(transform);
      const y = await backend.rotate(await uploadHalf(backend, [rows, channels], x), handle);
      const expected = readF64(
        await oracle.rotate(await uploadTo(oracle, [rows, channels], x), await oracle.loadTransform(transform)),
      );
      // Two roundings per rotation, or one per 16 products, of what is never larger than the group.
      const steps = Math.max(2 * krot, 8) + 1;
      const tolerance = (at: number): number =>
        LAMBDA * C * Math.sqrt(steps / groupSize) * norm(expected, Math.floor(at / groupSize) * groupSize, groupSize) +
        2 * C * Math.abs(expected[at]);
      const worst = compare(await backend.download(y), expected, tolerance, name);
      backend.release(handle);
      backend.free(y);
      return worst;
    },
  };
}

interface AttentionCase {
  readonly heads: number;
  readonly kvHeads: number;
  readonly headDim: number;
  readonly window?: number;
  /** Tokens of the chunks of each sequence, one after the other through a cache; one chunk without a cache when `plain`. */
  readonly chunks: readonly number[];
  readonly batch: number;
  readonly plain?: boolean;
  /** Factor on queries: large ones move the largest score along. */
  readonly sharp?: number;
  /** The cache holds integers of so many bits. */
  readonly bits?: 4 | 8;
}

const ATTENTION: readonly AttentionCase[] = [
  { heads: 4, kvHeads: 1, headDim: 128, chunks: [70, 41], batch: 1 },
  { heads: 6, kvHeads: 2, headDim: 64, chunks: [33, 50], batch: 2, window: 40 },
  { heads: 4, kvHeads: 2, headDim: 80, chunks: [37], batch: 2, plain: true },
  { heads: 8, kvHeads: 2, headDim: 16, chunks: [65], batch: 1, plain: true, window: 7 },
  { heads: 4, kvHeads: 2, headDim: 128, chunks: [75], batch: 1, plain: true, sharp: 12 },
  { heads: 2, kvHeads: 1, headDim: 24, chunks: [40], batch: 1, plain: true },
  { heads: 4, kvHeads: 1, headDim: 128, chunks: [70, 41], batch: 1, bits: 8 },
  { heads: 4, kvHeads: 2, headDim: 64, chunks: [45, 33], batch: 2, bits: 4 },
];

function attentionCheck(shape: AttentionCase): PrefillCheck {
  const { heads, kvHeads, headDim, window, chunks, batch, plain = false, sharp = 1, bits } = shape;
  const name = `attention ${heads}/${kvHeads} heads of ${headDim}, ${chunks.join(' + ')} tokens × ${batch}${window ? `, window ${window}` : ''}${plain ? '' : ', cached'}${bits ? ` in ${bits} bits` : ''}`;
  return {
    name,
    run: async (backend) => {
      const rng = createRng(13).fork(name);
      const grid = bits && { bits, clip: 1 };
      const capacity = chunks.reduce((a, b) => a + b, 3);
      const cache = plain ? undefined : await backend.createKvCache({ batch, kvHeads, headDim, capacity, grid });
      const known = plain ? undefined : await oracle.createKvCache({ batch, kvHeads, headDim, capacity, grid });
      const scale = headDim ** -0.5;
      let [start, worst] = [0, 0];
      for (const tokens of chunks) {
        const rows = batch * tokens;
        const [q, k, v] = [
          halves(rng, rows * heads * headDim, sharp),
          halves(rng, rows * kvHeads * headDim),
          halves(rng, rows * kvHeads * headDim),
        ];
        const options = { heads, kvHeads, headDim, batch, scale, window, start };
        const run = async (
          on: Backend,
          up: (shape: readonly number[], values: Float32Array) => Promise<Tensor>,
          kv: typeof cache,
        ): Promise<Tensor> =>
          on.attention(
            await up([rows, heads * headDim], q),
            await up([rows, kvHeads * headDim], k),
            await up([rows, kvHeads * headDim], v),
            { ...options, cache: kv },
          );
        const y = await run(backend, (s, x) => uploadHalf(backend, s, x), cache);
        const expected = readF64(await run(oracle, (s, x) => uploadTo(oracle, s, x), known));
        // Inputs are f16 as they are. Weights and the result are rounded to f16; sums in the units are as good as 2^-22. What a cache of
        // integers gives back is rounded to f16 too: scores move by C, as the weights do. A code that f32 tips onto the next one moves
        // a value by a step of the grid, of which a weight of about 1 / start counts.
        const step = bits ? (2 * maxAbs(v)) / (2 ** bits - 1) / (start + 16) : 0;
        const tolerance = (): number => (LAMBDA * C + 2 ** -20 * sharp * Math.sqrt(headDim) * 4) * maxAbs(v) + step;
        worst = Math.max(worst, compare(await backend.download(y), expected, tolerance, `${name}, from ${start}`));
        backend.free(y);
        start += tokens;
      }
      backend.release(cache);
      return worst;
    },
  };
}

/** Packed sequences with common beginnings, many tiles of them. */
function forestCheck(shape: Pick<AttentionCase, 'heads' | 'kvHeads' | 'headDim' | 'window' | 'sharp'>): PrefillCheck {
  const { heads, kvHeads, headDim, window, sharp = 1 } = shape;
  const name = `attention ${heads}/${kvHeads} heads of ${headDim}${window ? `, window ${window}` : ''}, packed`;
  return {
    name,
    run: async (backend) => {
      const rng = createRng(14).fork(name);
      const { ends, positions } = forestOf(largeForest(rng));
      const rows = ends.length;
      const [q, k, v] = [
        halves(rng, rows * heads * headDim, sharp),
        halves(rng, rows * kvHeads * headDim),
        halves(rng, rows * kvHeads * headDim),
      ];
      const options = { heads, kvHeads, headDim, batch: rows, scale: headDim ** -0.5, window, start: positions, ends };
      const y = await backend.attention(
        await uploadHalf(backend, [rows, heads * headDim], q),
        await uploadHalf(backend, [rows, kvHeads * headDim], k),
        await uploadHalf(backend, [rows, kvHeads * headDim], v),
        options,
      );
      const expected = await oracle.attention(
        await uploadTo(oracle, [rows, heads * headDim], q),
        await uploadTo(oracle, [rows, kvHeads * headDim], k),
        await uploadTo(oracle, [rows, kvHeads * headDim], v),
        options,
      );
      // As above.
      const tolerance = (): number => (LAMBDA * C + 2 ** -20 * sharp * Math.sqrt(headDim) * 4) * maxAbs(v);
      const worst = compare(await backend.download(y), readF64(expected), tolerance, name);
      backend.free(y);
      return worst;
    },
  };
}

/** Heads turned after RoPE, in f16. */
function headsCheck(headDim: number): PrefillCheck {
  const name = `heads of ${headDim} turned`;
  return {
    name,
    run: async (backend) => {
      const rng = createRng(17).fork(name);
      const [heads, kvHeads, rows] = [4, 2, 70];
      const width = (heads + 2 * kvHeads) * headDim;
      const x = Float32Array.from({ length: rows * width }, () => rng.normal());
      const angles = Float32Array.from({ length: (rows * headDim) / 2 }, () => 3 * rng.normal());
      const split = async (on: Backend): Promise<{ q: Tensor; k: Tensor; v: Tensor }> =>
        on.splitHeads(await uploadTo(on, [rows, width], x), {
          ...{ heads, kvHeads, headDim, batch: 1, start: 0, eps: 1e-6 },
          rope: await on.loadRope(angles.map(Math.cos), angles.map(Math.sin), headDim),
          headTransform: await on.loadTransform(hadamardTransform(headDim)),
        });
      const [got, want] = [await split(backend), await split(oracle)];
      let worst = 0;
      for (const part of ['q', 'k'] as const) {
        const expected = readF64(want[part]);
        // Rounded to f16 after RoPE and by every phase of the transform; an output sums the errors of its head's channels.
        const tolerance = (at: number): number =>
          (LAMBDA * C * norm(expected, Math.floor(at / headDim) * headDim, headDim)) / Math.sqrt(headDim) +
          C * Math.abs(expected[at]);
        worst = Math.max(worst, compare(await backend.download(got[part]), expected, tolerance, `${name}, ${part}`));
      }
      backend.free(got.q, got.k, got.v);
      return worst;
    },
  };
}

const PACKED = [
  { heads: 4, kvHeads: 1, headDim: 128 },
  { heads: 6, kvHeads: 2, headDim: 64, window: 20 },
  { heads: 8, kvHeads: 8, headDim: 16, sharp: 12 },
  { heads: 2, kvHeads: 1, headDim: 24 },
];

/** Every check. */
export const prefillChecks: readonly PrefillCheck[] = [
  ...[64, 128].map(headsCheck),
  ...PRODUCTS.map((product) => productCheck(product)),
  ...TRANSFORMS.map(transformCheck),
  ...ATTENTION.map(attentionCheck),
  ...PACKED.map(forestCheck),
];

/** Checks of every tile of the product for matrix units; none where there are no units. */
export const matrixChecks = (gpu: GpuDevice): readonly PrefillCheck[] =>
  hasMatrixUnits(gpu.capabilities)
    ? GEMM_TILES.flatMap((tile, i) =>
        ([128, 'bf16', 'f16'] as const)
          .slice(0, i % 3 === 0 ? 3 : 1)
          .map((type) => productCheck([tile.tileM + 44, 384, tile.tileN + 36, type], tile)),
      )
    : [];
