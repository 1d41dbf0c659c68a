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
  // As in descent, a group's residual is computed when it is visited.
  const rest = new Float32Array(channels * columns);
  addScaled(target, values, -1, rest);
  const difference = { data: rest, rows: channels, cols: columns };
  const size = groupSize * columns;
  const [inner, residual, product] = [new Float32Array(size), new Float32Array(size), new Float32Array(size)];
  for (let pass = 0; pass < passes; pass++) {
    for (let begin = 0; begin < channels; begin += groupSize) {
      const first = begin * columns;
      const slot = (begin / groupSize) * columns;
      for (let i = 0, at = first; i < groupSize; i++)
        for (let c = 0; c < columns; c++, at++) inner[at - first] = codes[at] - zeros[slot + c];
      const rows = gram.subarray(begin * channels, (begin + groupSize) * channels);
      await ort.gemm({ data: rows, rows: groupSize, cols: channels }, false, difference, false, residual);
      const own = { data: ownBlock(rows, channels, begin, groupSize), rows: groupSize, cols: groupSize };
      await ort.gemm(own, false, { data: inner, rows: groupSize, cols: columns }, false, product);
      moveScales(scales.subarray(slot, slot + columns), inner, residual, product);
      for (let i = 0, at = 0; i < groupSize; i++) {
        for (let c = 0; c < columns; c++, at++) {
          const value = inner[at] * scales[slot + c];
          values[first + at] = value;
          rest[first + at] = target[first + at] - value;
        }
      }
    }
  }
  return { codes: codes.slice(), zeros, scales, values };
}

/** Moves one group's scales [columns] to their optima, in place. */
function moveScales(scales: Float32Array, inner: Float32Array, residual: Float32Array, product: Float32Array): void {
  const columns = scales.length;
  const numerator = new Float64Array(columns);
  const denominator = new Float64Array(columns);
  for (let at = 0; at < inner.length;) {
    for (let c = 0; c < columns; c++, at++) {
      numerator[c] += inner[at] * residual[at];
      denominator[c] += inner[at] * product[at];
    }
  }
  for (let c = 0; c < columns; c++) {
    if (!(denominator[c] > 0)) continue;
    const scale = scales[c];
    const moved = roundToF16(scale + numerator[c] / denominator[c]);
    if (!(moved >= Math.max(scale / 2, MIN_SCALE) && moved <= Math.min(scale * 2, MAX_SCALE))) continue;
    const move = moved - scale;
    // The error changes by this much; after rounding to f16 it may be none.
    if (move * (denominator[c] * move - 2 * numerator[c]) >= 0) continue;
    scales[c] = moved;
  }
}

/** Columns [begin, begin + count) of rows [count, n]. */
function ownBlock(rows: Float32Array, n: number, begin: number, count: number): Float32Array {
  const out = new Float32Array(count * count);
  for (let r = 0; r < count; r++) out.set(rows.subarray(r * n + begin, r * n + begin + count), r * count);
  return out;
}
