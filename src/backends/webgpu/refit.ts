// Fits grid scales to codes by least squares on the GPU, one group after the other.
import type { GridSpec, RoundedWeight } from '../../ops/backend.js';
import type { GpuDevice } from './device.js';
import { gemm } from './gemm.js';
import { addScaledKernel, strided } from './kernels/elementwise.js';
import { refitScaleKernel, refitSpreadKernel } from './kernels/refit.js';
import { checkSquare, Grids } from './rounding.js';
import { freeTensor, makeTensor, own, type GpuTensor } from './tensor.js';

/** See QuantizationOps.refitScales. */
export async function refitScales(
  gpu: GpuDevice,
  w: GpuTensor,
  rounded: RoundedWeight,
  gram: GpuTensor,
  grid: GridSpec,
  passes: number,
): Promise<RoundedWeight> {
  const { rows: channels, cols } = w.matrix;
  const { groupSize } = grid;
  checkSquare(gram, channels, 'Gram matrix');
  const grids = new Grids(gpu, w, grid);
  const { scales } = grids;
  gpu.upload(scales, rounded.scales);
  gpu.upload(grids.zeros, Float32Array.from(rounded.zeros));
  const start = own(rounded.values);
  const values = makeTensor(gpu, w.shape);
  gpu.copy(start.buffer, start.offset, values.buffer, 0, values.bytes);
  const difference = makeTensor(gpu, w.shape);
  const residual = makeTensor(gpu, w.shape);
  const product = makeTensor(gpu, w.shape);
  const moves = gpu.buffer(cols * 4, 'moves of scales');
  for (let pass = 0; pass < passes; pass++) {
    gpu.dispatch(
      addScaledKernel,
      { acc: w, x: values, out: difference },
      { count: w.elements, scale: -1, rest: 0 },
      strided(w.elements),
    );
    gemm(gpu, { a: gram, b: difference, c: residual, m: channels, n: cols, k: channels });
    for (let begin = 0; begin < channels; begin += groupSize) {
      // H[begin:, group]·v: the group's own rows give the curvature, the rows after see the group's change.
      gemm(gpu, {
        a: gram,
        offsetA: begin * (channels + 1),
        lda: channels,
        b: values,
        offsetB: begin * cols,
        c: product,
        m: channels - begin,
        n: cols,
        k: groupSize,
      });
      gpu.dispatch(refitScaleKernel, { residual, product, scales, values, moves }, { cols, begin, groupSize }, [
        Math.ceil(cols / 64),
      ]);
      const count = (channels - begin - groupSize) * cols;
      if (count === 0) continue;
      const skip = groupSize * cols;
      gpu.dispatch(
        refitSpreadKernel,
        { product, moves, residual },
        { count, cols, first: begin * cols + skip, skip },
        strided(count),
      );
    }
  }
  for (const tensor of [difference, residual, product]) freeTensor(gpu, tensor);
  gpu.release(moves);
  return grids.finish(values);
}
