// Dense products of f32 matrices on matrix units: operands are rounded to f16 at a scale of their own, sums are f32.
import { hasMatrixUnits } from './capabilities.js';
import type { GpuDevice } from './device.js';
import { chooseGemmTile, gemmTakes, scaledGemmKernel } from './fast/gemm.js';
import { tileGroups } from './fast/matrix-tiles.js';
import { LARGEST_PARTS, largestKernel, packColumnsKernel, packRowsKernel } from './kernels/half-operands.js';
import { elementGroups, type GpuTensor } from './tensor.js';

/** Below this many multiply-adds packing costs more than the units gain. */
const WORTH = 2 ** 26;

/** Whether {@link halfMatmul} takes a product. */
export function halfMatmulTakes(gpu: GpuDevice, m: number, n: number, k: number): boolean {
  return hasMatrixUnits(gpu.capabilities) && gemmTakes(n, k, 32) && m * n * k >= WORTH;
}

/** out [m, n] = op(a) · op(b), with a [m, k] or [k, m] when transposed, b [k, n] or [n, k]. */
export function halfMatmul(
  gpu: GpuDevice,
  a: GpuTensor,
  b: GpuTensor,
  out: GpuTensor,
  { m, n, k, transposeA, transposeB }: { m: number; n: number; k: number; transposeA: boolean; transposeB: boolean },
): void {
  const factors = gpu.buffer(8, 'factors of a product');
  // Both operands with the inner dimension along their rows.
  const x = pack(gpu, a, transposeA, factors, 0);
  const weights = pack(gpu, b, !transposeB, factors, 1);
  const variant = {
    ...chooseGemmTile(m, n, k, 0),
    weights: 'f16',
    groupSize: 0,
    bias: false,
    residual: false,
  } as const;
  gpu.dispatch(
    scaledGemmKernel(variant),
    // Kernels have no binding for what is absent.
    { x, weights, grids: weights, bias: weights, residual: out, factors, out },
    { m, n, k },
    tileGroups(variant, m, n),
  );
  for (const buffer of [x, weights, factors]) gpu.release(buffer);
}

/** A matrix as f16 [rows, cols], or turned [cols, rows]; what undoes its scale goes to factors[slot]. */
function pack(gpu: GpuDevice, x: GpuTensor, turned: boolean, factors: GPUBuffer, slot: number): GPUBuffer {
  const { rows, cols } = x.matrix;
  const parts = gpu.buffer(4 * LARGEST_PARTS, 'partial maxima');
  gpu.dispatch(largestKernel, { x, parts }, { count: x.elements }, [LARGEST_PARTS]);
  const out = gpu.buffer(2 * x.elements, 'an operand in f16');
  if (turned) {
    const tiles = Math.ceil(rows / 64) * Math.ceil(cols / 32);
    gpu.dispatch(packColumnsKernel(), { x, parts, factors, out }, { rows, cols, tiles, slot }, [Math.min(1024, tiles)]);
  } else {
    const count = x.elements / 4;
    gpu.dispatch(packRowsKernel, { x, parts, factors, out }, { count, slot }, [
      Math.min(1024, elementGroups(count)[0]),
    ]);
  }
  gpu.release(parts);
  return out;
}
