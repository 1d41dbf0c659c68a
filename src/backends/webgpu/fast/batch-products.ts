// Which kernel multiplies by a weight when a plan decodes several sequences, and in what shape.
import type { BufferSlice, GpuDevice, PreparedDispatch, Workgroups } from '../device.js';
import { BATCH_GEMM_MAX, batchGemmKernel, hasBatchGemm, type BatchGemmVariant } from './batch-gemm.js';
import { variants } from '../kernel.js';
import { BATCH_TILED_ROWS, batchTiledKernel } from './batch-tiled.js';

/** Most sequences of one step: a small model's step of as many takes little longer than one of {@link TILE}. */
export const MOST_SEQUENCES = 256;
/** Most sequences of one workgroup; of more, each takes as many. */
const TILE = BATCH_GEMM_MAX;
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

/** Enough workgroups to fill the GPU first, then as many rows in each as X is worth. */
export function batchGemmShape(outFeatures: number, inFeatures: number): Shape {
  const common = { warpsM: 1, depth: 2 };
  if (outFeatures >= 64 * 256) return { ...common, rows: 64, warps: 8, warpsM: 2, tileK: 128 };
  if (outFeatures < 32 * 128) return { ...common, rows: 16, warps: 8, tileK: 256 };
  return inFeatures >= 8192
    ? { ...common, rows: 32, warps: 8, tileK: 256 }
    : { ...common, rows: 32, warps: 4, tileK: 128 };
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

/** Prepares a product of several sequences. */
export function batchProduct(gpu: GpuDevice, kind: BatchProductKind, product: BatchProduct): PreparedDispatch {
  const { batch, weights, groupSize, residual, bias, source, buffers, params } = product;
  const columns = Math.min(batch, TILE);
  const tiles = batch > TILE;
  const variant = { weights, groupSize, residual, bias, ...(tiles && { tiles }) };
  const deep = Math.ceil(batch / TILE);
  const uniforms = { ...params, batch };
  if (kind === 'tiled') {
    const kernel = tiledKernel({ ...variant, columns: roundUp(columns, 8), f16: gpu.capabilities.f16 });
    return gpu.prepare(kernel, buffers, uniforms, spread(params.outFeatures / BATCH_TILED_ROWS, deep));
  }
  const shape = batchGemmShape(params.outFeatures, params.chunks * 32);
  const kernel = gemmKernel({ ...variant, columns: roundUp(columns, 16), ...shape });
  return gpu.prepare(kernel, buffers, { ...uniforms, shift: SHIFT[source] }, spread(params.outFeatures / shape.rows, deep));
}

const roundUp = (n: number, step: number): number => Math.ceil(n / step) * step;

/** Workgroups over x and y, `deep` times. */
function spread(count: number, deep: number): Workgroups {
  const groups = Math.ceil(count);
  const y = Math.ceil(groups / 65535);
  return [Math.ceil(groups / y), y, deep];
}
