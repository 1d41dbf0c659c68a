// Which kernel multiplies by a weight when a plan decodes several sequences, and in what shape.
import type { GpuDevice, PreparedDispatch } from '../device.js';
import { batchGemmKernel, hasBatchGemm, type BatchGemmBuffer, type BatchGemmVariant } from './batch-gemm.js';

/** Fewest sequences from which the weights are worth matrix units; see docs/log-kernels.md. */
const MATRIX_BATCH = 2;

/** Whether products of so many sequences go to matrix units. */
export const usesMatrixUnits = (gpu: GpuDevice, batch: number): boolean =>
  batch >= MATRIX_BATCH && hasBatchGemm(gpu.capabilities);

/**
 * Activations are multiplied by these before they become f16: 65504 is the most it holds. A normalised vector stays within √channels
 * times its gains, attention within the cached values, which are f16 themselves; SiLU·mul alone is without bound, and a few
 * channels of it are 10⁴ times the others in some models. What is below 2^-14 afterwards loses bits, no more than 2^-25 of 1/shift.
 */
export const BATCH_SHIFT = { norm: 1, attention: 2 ** -4, silu: 2 ** -6 } as const;

type Shape = Pick<BatchGemmVariant, 'rows' | 'warps' | 'tileK' | 'depth'>;

/** Rows per workgroup: enough workgroups to fill the GPU first, then fewer readings of X. */
export function batchGemmShape(outFeatures: number): Shape {
  if (outFeatures >= 64 * 256) return { rows: 64, warps: 4, tileK: 128, depth: 2 };
  if (outFeatures >= 32 * 128) return { rows: 32, warps: 8, tileK: 256, depth: 2 };
  return { rows: 16, warps: 8, tileK: 256, depth: 2 };
}

/** A product of all sequences on matrix units; see batchGemmKernel. */
export function batchProduct(
  gpu: GpuDevice,
  variant: Omit<BatchGemmVariant, keyof Shape>,
  buffers: Readonly<Record<BatchGemmBuffer, GPUBuffer>>,
  params: { chunks: number; outFeatures: number; stride: number; column: number; first: number },
  shift: number,
  shape: Shape = batchGemmShape(params.outFeatures),
): PreparedDispatch {
  const groups = Math.ceil(params.outFeatures / shape.rows);
  const y = Math.ceil(groups / 65535);
  return gpu.prepare(batchGemmKernel({ ...variant, ...shape }), buffers, { ...params, shift }, [Math.ceil(groups / y), y]);
}
