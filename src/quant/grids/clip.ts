// Clip search: how far to shrink each group's range. A few extreme weights stretch the grid of all the others; giving
// up on them can cost less than it saves. Measured on the layer's own outputs, group by group (AWQ §3, "clip").
import { hostTensor } from '../../core/tensor.js';
import type { Backend, GridSpec, Tensor } from '../../ops/backend.js';

/** Settings of {@link searchClip}. */
export interface ClipSearchOptions {
  /** Smallest ratio tried; default 0.5. */
  readonly minimum?: number;
  /** Ratios tried between 1 and the minimum; default 20. */
  readonly steps?: number;
}

/**
 * For every group and column the ratio r ≤ 1 of the min–max range with the least error
 * (w − ŵ)ᵀ·H_gg·(w − ŵ), H_gg the group's diagonal block of the Gram matrix.
 *
 * @param w [in, cols] channel-major.
 * @param gram [in, in].
 * @returns [in / groupSize, cols].
 */
export async function searchClip(
  backend: Backend,
  w: Tensor,
  gram: Tensor,
  grid: GridSpec,
  options: ClipSearchOptions = {},
): Promise<Float32Array> {
  const { minimum = 0.5, steps = 20 } = options;
  const [channels, cols] = w.shape;
  const size = grid.groupSize;
  const groups = channels / size;
  const blocks = await diagonalBlocks(backend, gram, size);
  const bestError = new Float64Array(groups * cols).fill(Infinity);
  const best = new Float32Array(groups * cols).fill(1);
  for (let step = 0; step < steps; step++) {
    const ratio = 1 - ((1 - minimum) * step) / steps;
    const rounded = await backend.roundToNearest(w, grid, new Float32Array(groups * cols).fill(ratio));
    const difference = await backend.addScaled(rounded.values, w, -1, true);
    for (let g = 0; g < groups; g++) {
      const d = backend.sliceRows(difference, g * size, (g + 1) * size);
      const product = await backend.matmul(blocks[g], d);
      const [dh, ph] = [await backend.download(d), await backend.download(product)];
      backend.free(product);
      const error = new Float64Array(cols);
      for (let i = 0; i < dh.length;) for (let c = 0; c < cols; c++, i++) error[c] += dh[i] * ph[i];
      for (let c = 0; c < cols; c++) {
        if (error[c] < bestError[g * cols + c]) {
          bestError[g * cols + c] = error[c];
          best[g * cols + c] = ratio;
        }
      }
    }
    backend.free(difference);
  }
  backend.free(...blocks);
  return best;
}

/** The [size, size] blocks on the diagonal of a square matrix. */
async function diagonalBlocks(backend: Backend, matrix: Tensor, size: number): Promise<Tensor[]> {
  const n = matrix.shape[0];
  const data = await backend.download(matrix);
  const blocks: Tensor[] = [];
  for (let begin = 0; begin < n; begin += size) {
    const block = new Float32Array(size * size);
    for (let r = 0; r < size; r++)
      block.set(data.subarray((begin + r) * n + begin, (begin + r) * n + begin + size), r * size);
    blocks.push(await backend.upload(hostTensor('f32', [size, size], block)));
  }
  return blocks;
}
