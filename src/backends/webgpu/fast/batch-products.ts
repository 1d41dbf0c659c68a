// Which kernel multiplies by a weight when a plan decodes several sequences, and in what shape.
import type { BufferSlice, GpuDevice, PreparedDispatch, Workgroups } from '../device.js';
import { BATCH_GEMM_MAX, batchGemmKernel, batchGemmMemory, hasBatchGemm, type BatchGemmVariant } from './batch-gemm.js';
import { variants } from '../kernel.js';
import { BATCH_TILED_ROWS, batchTiledKernel } from './batch-tiled.js';
import { CHUNK } from './gemv.js';

/** Most sequences of one step. */
export const MOST_SEQUENCES = 256;
/** Most sequences that a kernel takes: more are multiplied part by part. */
const PART = BATCH_GEMM_MAX;
/** What offsets of bindings are multiples of. */
const ALIGNMENT = 256;
/** Fewest sequences from which the weights are worth matrix units, and fewest for the tiled product; see docs/log-kernels.md. */
const [MATRIX_BATCH, TILED_BATCH] = [5, 5];

/** How products of several sequences are computed: on matrix units, or in tiles on GPUs without. */
export type BatchProductKind = 'matrix' | 'tiled';

/** The kind for so many sequences; undefined where GEMV is quicker. */
export function batchProductKind(gpu: GpuDevice, batch: number): BatchProductKind | undefined {
  if (batch >= MATRIX_BATCH && hasBatchGemm(gpu.capabilities)) return 'matrix';
  return batch >= TILED_BATCH ? 'tiled' : undefined;
}

/** The kind for 16-bit weights, whatever the batch. */
export function denseProductKind(gpu: GpuDevice): BatchProductKind {
  return hasBatchGemm(gpu.capabilities) ? 'matrix' : 'tiled';
}

/**
 * What matrix units' activations are multiplied by before they become f16, by source: 65504 is the most it holds. A normalised
 * vector stays within √channels times its gains, attention within the cached values, which are f16 themselves; SiLU·mul alone
 * is without bound, and in some models a few channels of it are 10⁴ times the others. What is below 2^-14 afterwards has a
 * rounding error of 2^-25, where int4 weights err by a hundredth.
 */
const SHIFT = { norm: 1, attention: 2 ** -4, silu: 2 ** -6 } as const;

const gemmKernel = variants(batchGemmKernel);
const tiledKernel = variants(batchTiledKernel);

type Shape = Pick<BatchGemmVariant, 'rows' | 'warps' | 'warpsM' | 'tileK' | 'depth'>;

/** Which products a shape is for: up to `columns` sequences, from `outs` outputs and `ins` inputs on; all weights unless named. */
interface ShapeRule {
  readonly columns?: 16 | 32;
  readonly weights?: 'int4';
  readonly outs: number;
  readonly ins?: number;
  readonly shape: Shape;
}

const shape = (rows: number, warps: number, warpsM: number, tileK: number, depth: number): Shape => ({
  rows,
  warps,
  warpsM,
  tileK,
  depth,
});

/**
 * The first rule that fits counts. From whole steps of Llama-3.1-8B's shapes with one product's shape exchanged at a time, on an H200 with
 * warm clocks (docs/log-kernels.md): enough workgroups to fill the GPU first, then as many rows in each as X is worth.
 */
const SHAPES: readonly ShapeRule[] = [
  // Four subgroups with rows of their own need no sums of theirs added, and steps of 64 channels leave memory for three on their way.
  { weights: 'int4', outs: 64 * 256, shape: shape(64, 4, 4, 64, 3) },
  { columns: 16, outs: 64 * 256, shape: shape(64, 8, 4, 128, 2) },
  { columns: 32, outs: 64 * 256, shape: shape(32, 8, 2, 128, 2) },
  { outs: 32 * 128, ins: 8192, shape: shape(32, 8, 1, 256, 2) },
  { columns: 16, outs: 32 * 160, shape: shape(32, 4, 2, 128, 2) },
  { columns: 32, outs: 32 * 160, shape: shape(32, 4, 1, 128, 2) },
  { outs: 32 * 128, shape: shape(32, 8, 1, 256, 2) },
  { outs: 0, shape: shape(16, 8, 1, 256, 2) },
];

/** Every shape of the table. */
export const BATCH_GEMM_SHAPES: readonly Shape[] = SHAPES.map((rule) => rule.shape);

/** The shape of a product on a GPU with so many bytes of workgroup memory. */
export function batchGemmShape(
  variant: Pick<BatchGemmVariant, 'weights' | 'columns' | 'groupSize' | 'residual' | 'bias'>,
  outFeatures: number,
  inFeatures: number,
  memory: number,
): Shape {
  const { weights, columns } = variant;
  const rule = SHAPES.find(
    (r) =>
      batchGemmMemory({ ...variant, ...r.shape }) <= memory &&
      (r.weights === undefined || r.weights === weights) &&
      (r.columns === undefined || r.columns === columns) &&
      outFeatures >= r.outs &&
      inFeatures >= (r.ins ?? 0),
  );
  return rule?.shape ?? SHAPES[SHAPES.length - 1].shape;
}

/** A product of all sequences, its buffers and parameters as batchGemmKernel's. */
export interface BatchProduct {
  readonly batch: number;
  readonly weights: 'int4' | 'f16' | 'bf16';
  readonly groupSize: number;
  readonly residual: boolean;
  readonly bias: boolean;
  /** Where the activations come from. */
  readonly source: keyof typeof SHIFT;
  readonly buffers: Readonly<
    Record<'w' | 'grid' | 'x' | 'factors' | 'y' | 'residual' | 'bias', GPUBuffer | BufferSlice>
  >;
  readonly params: Readonly<Record<'chunks' | 'outFeatures' | 'stride' | 'column' | 'first', number>>;
}

/** Prepares a product of several sequences: a dispatch for every 32 of them. */
export function batchProducts(gpu: GpuDevice, kind: BatchProductKind, product: BatchProduct): PreparedDispatch[] {
  const { batch, params } = product;
  const dispatches: PreparedDispatch[] = [];
  for (let begin = 0; begin < batch; begin += PART)
    dispatches.push(prepareProduct(gpu, kind, part(product, begin, Math.min(PART, batch - begin), params)));
  return dispatches;
}

/** The product of `count` sequences from the one at `begin`: the same weights, further on in everything that has a row for each. */
function part(product: BatchProduct, begin: number, count: number, params: BatchProduct['params']): BatchProduct {
  if (begin === 0) return { ...product, batch: count };
  const { buffers, residual } = product;
  const { chunks, stride, column } = params;
  const from = (whole: GPUBuffer | BufferSlice, offset: number): BufferSlice =>
    'bytes' in whole
      ? { buffer: whole.buffer, offset: whole.offset + offset, bytes: whole.bytes - offset }
      : { buffer: whole, offset, bytes: whole.size - offset };
  // 32 channels of f16, and a factor and a sum in f32, per chunk.
  const [x, factors] = [from(buffers.x, begin * chunks * 64), from(buffers.factors, begin * chunks * 8)];
  // Rows of results begin anywhere: what the binding's offset can't say, the first column does.
  const row = begin * stride * 4;
  const at = row - (row % ALIGNMENT);
  const y = from(buffers.y, at);
  return {
    ...product,
    batch: count,
    buffers: { ...buffers, x, factors, y, residual: residual ? from(buffers.residual, at) : buffers.residual },
    params: { ...params, column: column + (row - at) / 4 },
  };
}

function prepareProduct(gpu: GpuDevice, kind: BatchProductKind, product: BatchProduct): PreparedDispatch {
  const { batch, weights, groupSize, residual, bias, source, buffers, params } = product;
  const variant = { weights, groupSize, residual, bias };
  const uniforms = { ...params, batch };
  if (kind === 'tiled') {
    const kernel = tiledKernel({ ...variant, columns: roundUp(batch, 8), f16: gpu.capabilities.f16 });
    return gpu.prepare(kernel, buffers, uniforms, spread(params.outFeatures / BATCH_TILED_ROWS));
  }
  const columns = batch <= 16 ? 16 : 32;
  const memory = gpu.limits.maxComputeWorkgroupStorageSize;
  const chosen = batchGemmShape({ ...variant, columns }, params.outFeatures, params.chunks * CHUNK, memory);
  const kernel = gemmKernel({ ...variant, columns, ...chosen });
  return gpu.prepare(kernel, buffers, { ...uniforms, shift: SHIFT[source] }, spread(params.outFeatures / chosen.rows));
}

const roundUp = (n: number, step: number): number => Math.ceil(n / step) * step;

/** Workgroups over x and y. */
function spread(count: number): Workgroups {
  const groups = Math.ceil(count);
  const y = Math.ceil(groups / 65535);
  return [Math.ceil(groups / y), y];
}
