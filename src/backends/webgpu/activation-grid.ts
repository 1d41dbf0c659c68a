// Dynamic grids of activations on the GPU: rows rounded, or encoded for products in integers.
import { ensure } from '../../core/errors.js';
import type { ActivationGrid } from '../../ops/backend.js';
import type { GpuDevice } from './device.js';
import { encodeRowsKernel, quantizeRunsKernel } from './kernels/activation-grid.js';
import { HalfTensor, makeTensor, spread, type GpuTensor } from './tensor.js';

/** Channels of one grid in rows of n. @throws GyreError unless rows can be rounded onto the grid. */
export function gridRun({ bits, groupSize, clip }: ActivationGrid, n: number): number {
  ensure(bits === 4 || bits === 8, 'usage', () => `activations have 4 or 8 bits, found ${String(bits)}`);
  ensure(
    clip > 0 && clip <= 1,
    'usage',
    () => `the clip ratio of activations must be above 0 and at most 1, found ${clip}`,
  );
  const size = groupSize === -1 ? n : groupSize;
  ensure(
    Number.isInteger(size) && size > 0 && n % size === 0,
    'tensor-shape',
    () => `activation groups of ${groupSize} do not tile ${n} channels`,
  );
  return size;
}

/** The largest code. */
const topOf = ({ bits, symmetric }: ActivationGrid): number => (symmetric ? 2 ** (bits - 1) : 2 ** bits) - 1;

/** See InferenceOps.quantizeRows. */
export function quantizeRows(gpu: GpuDevice, x: GpuTensor, grid: ActivationGrid): GpuTensor {
  const size = gridRun(grid, x.matrix.cols);
  const out = makeTensor(gpu, x.shape);
  const runs = x.elements / size;
  const params = { runs, size, top: topOf(grid), clip: grid.clip };
  gpu.dispatch(quantizeRunsKernel(grid.symmetric, size), { x, out }, params, spread(runs));
  return out;
}

/** Rows as signed bytes, and a scale and the sum of codes for each. */
export interface EncodedRows {
  readonly codes: GPUBuffer;
  readonly scales: GPUBuffer;
}

/** Symmetric per-token codes of x, `words` words a row; see encodeRowsKernel for their order. */
export function encodeRows(
  gpu: GpuDevice,
  x: GpuTensor | HalfTensor,
  grid: ActivationGrid,
  { words, paired }: { words: number; paired: boolean },
): EncodedRows {
  const { rows, cols } = x.matrix;
  const codes = gpu.buffer(4 * rows * words, 'codes of activations');
  const scales = gpu.buffer(8 * rows, 'scales of activations');
  gpu.dispatch(
    encodeRowsKernel({ paired, size: cols, halves: x instanceof HalfTensor }),
    { x, codes, scales },
    { runs: rows, size: cols, words, top: topOf(grid), clip: grid.clip },
    spread(rows),
  );
  return { codes, scales };
}
