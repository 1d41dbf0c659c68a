// The clip search of the quantizers on the GPU: how far to shrink each group's range.
import type { GridSpec } from '../../ops/backend.js';
import type { GpuDevice } from './device.js';
import { gemm } from './gemm.js';
import { strided } from './kernels/elementwise.js';
import { fakeQuantizeKernel, keepBestKernel } from './kernels/grid.js';
import { checkSquare, gridShape, setGrids } from './rounding.js';
import type { GpuTensor } from './tensor.js';

/** Weights looked at together: bounds the two intermediate matrices. */
const ELEMENTS_AT_ONCE = 2 ** 26;

/**
 * See QuantizationOps.searchClip. For each ratio D = Ŵ − W, then H_gg·D of all groups as one batch of products: 2·groupSize
 * operations per weight and ratio, on two matrices of the weight's size.
 */
export async function searchClip(
  gpu: GpuDevice,
  w: GpuTensor,
  gram: GpuTensor,
  grid: GridSpec,
  ratios: readonly number[],
): Promise<Float32Array> {
  const { rows: channels, cols } = w.matrix;
  checkSquare(gram, channels, 'Gram matrix');
  const { groups, slots, levels } = gridShape(w, grid);
  if (ratios.length === 0) return new Float32Array(slots).fill(1);
  const { groupSize } = grid;
  const perGroup = groupSize * cols;
  const atOnce = Math.max(1, Math.min(groups, Math.floor(ELEMENTS_AT_ONCE / perGroup)));
  const [scales, zeros, errors, best] = [0, 1, 2, 3].map(() => gpu.buffer(slots * 4, 'clip factors'));
  const [d, p] = [0, 1].map(() => gpu.buffer(atOnce * perGroup * 4, 'rounding errors'));
  for (let firstGroup = 0; firstGroup < groups; firstGroup += atOnce) {
    const here = Math.min(atOnce, groups - firstGroup);
    const count = here * perGroup;
    for (const [i, ratio] of ratios.entries()) {
      setGrids(gpu, w, grid, scales, zeros, { ratio, firstGroup, groups: here });
      gpu.dispatch(
        fakeQuantizeKernel,
        { w, scales, zeros, values: d },
        { count, first: firstGroup * perGroup, cols, groupSize, levels, difference: 1 },
        strided(count),
      );
      gemm(gpu, {
        a: gram,
        offsetA: firstGroup * groupSize * (channels + 1),
        lda: channels,
        b: d,
        c: p,
        m: groupSize,
        n: cols,
        k: groupSize,
        batch: { count: here, a: groupSize * (channels + 1), b: perGroup, c: perGroup },
      });
      gpu.dispatch(
        keepBestKernel,
        { d, p, errors, best },
        { cols, groupSize, group0: firstGroup, ratio, start: Number(i === 0) },
        [Math.ceil(cols / 64), here],
      );
    }
  }
  const found = new Float32Array(await gpu.read(best, 0, slots * 4));
  for (const buffer of [scales, zeros, errors, best, d, p]) gpu.release(buffer);
  return found;
}
