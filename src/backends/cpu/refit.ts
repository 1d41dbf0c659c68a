// Fits grid scales to codes by least squares, one group after the other: matrix products by ONNX Runtime, sums per column in
// f64 between them (a few multiplications per weight, so that a kernel of its own would gain nothing).
import { roundToF16 } from '../../core/dtype.js';
import type { OrtKernels } from './ort.js';
import { addScaled } from './kernels.js';

/** Smallest and largest scale of a grid: f16's normal numbers. */
const MIN_SCALE = 2 ** -14;
const MAX_SCALE = 65504;

/** A rounded weight in host arrays, see RoundedWeight of the op contract. */
export interface HostRounding {
  readonly codes: Uint8Array;
  readonly zeros: Uint8Array;
  readonly scales: Float32Array;
  readonly values: Float32Array;
}

/** What the scales are fitted to. */
export interface RefitProblem {
  readonly channels: number;
  readonly columns: number;
  readonly groupSize: number;
  /** W [channels, columns]. */
  readonly target: Float32Array;
  /** H [channels, channels]. */
  readonly gram: Float32Array;
}

/** See QuantizationOps.refitScales. */
export async function refitScales(
  ort: OrtKernels,
  problem: RefitProblem,
  start: HostRounding,
  passes: number,
): Promise<HostRounding> {
  const { channels, columns, groupSize, target, gram } = problem;
  const { codes, zeros } = start;
  const scales = start.scales.slice();
  const values = start.values.slice();
  const residual = new Float32Array(channels * columns);
  const difference = new Float32Array(channels * columns);
  const inner = new Float32Array(groupSize * columns);
  const product = new Float32Array(channels * columns);
  for (let pass = 0; pass < passes; pass++) {
    addScaled(target, values, -1, difference);
    const h = { data: gram, rows: channels, cols: channels };
    await ort.gemm(h, false, { data: difference, rows: channels, cols: columns }, false, residual);
    for (let begin = 0; begin < channels; begin += groupSize) {
      const slot = (begin / groupSize) * columns;
      for (let i = 0, at = begin * columns; i < groupSize; i++)
        for (let c = 0; c < columns; c++, at++) inner[i * columns + c] = codes[at] - zeros[slot + c];
      // H[begin:, group]·u: the group's own rows give the curvature, the rows after see the group's change.
      const rows = channels - begin;
      const left = { data: lowerColumns(gram, channels, begin, groupSize), rows, cols: groupSize };
      const out = product.subarray(0, rows * columns);
      await ort.gemm(left, false, { data: inner, rows: groupSize, cols: columns }, false, out);
      const moves = moveScales(scales.subarray(slot, slot + columns), inner, residual.subarray(begin * columns), out);
      for (let i = 0, at = 0; i < groupSize; i++)
        for (let c = 0; c < columns; c++, at++) values[begin * columns + at] = inner[at] * scales[slot + c];
      for (let at = groupSize * columns; at < out.length;)
        for (let c = 0; c < columns; c++, at++) residual[begin * columns + at] -= moves[c] * out[at];
    }
  }
  return { codes: codes.slice(), zeros, scales, values };
}

/** Moves one group's scales [columns] to their optima, in place; returns the moves. */
function moveScales(
  scales: Float32Array,
  inner: Float32Array,
  residual: Float32Array,
  product: Float32Array,
): Float64Array {
  const columns = scales.length;
  const numerator = new Float64Array(columns);
  const denominator = new Float64Array(columns);
  for (let at = 0; at < inner.length;) {
    for (let c = 0; c < columns; c++, at++) {
      numerator[c] += inner[at] * residual[at];
      denominator[c] += inner[at] * product[at];
    }
  }
  const moves = new Float64Array(columns);
  for (let c = 0; c < columns; c++) {
    if (!(denominator[c] > 0)) continue;
    const scale = scales[c];
    const moved = roundToF16(scale + numerator[c] / denominator[c]);
    if (!(moved >= Math.max(scale / 2, MIN_SCALE) && moved <= Math.min(scale * 2, MAX_SCALE))) continue;
    const move = moved - scale;
    // The error changes by this much; after rounding to f16 it may be none.
    if (move * (denominator[c] * move - 2 * numerator[c]) >= 0) continue;
    scales[c] = moved;
    moves[c] = move;
  }
  return moves;
}

/** [begin:, begin:begin+count] of a square matrix. */
function lowerColumns(matrix: Float32Array, n: number, begin: number, count: number): Float32Array {
  const out = new Float32Array((n - begin) * count);
  for (let r = begin; r < n; r++) out.set(matrix.subarray(r * n + begin, r * n + begin + count), (r - begin) * count);
  return out;
}
