// Clip search on the weights alone: per group and column the share of the range whose rounding has the least Σ|w − ŵ|ᵖ.
// p = 2 is the mean squared error; p = 2.4, QuaRot's choice, minds large errors a little more. Needs no calibration. Done on
// the host: the weights come from there, and a round trip to a device for each ratio took longer than the sums themselves.
import type { Backend, GridSpec, Tensor } from '../../ops/backend.js';
import { gridOf, symmetricGridOf } from '../../ops/reference/quantize.js';

/** Settings of {@link searchClipNorm}. */
export interface ClipNormOptions {
  /** Exponent p; default 2.4. */
  readonly exponent?: number;
  /** Smallest ratio tried; default 0.5. */
  readonly minimum?: number;
  /** Ratios tried between 1 and the minimum; default 12. */
  readonly steps?: number;
}

/** Added and taken away again, it leaves the nearest integer, ties to even. */
const TO_INTEGER = 1.5 * 2 ** 52;
/** Nine bits of a mantissa are told apart: a power is off by at most p·2⁻¹⁰ of itself, a sum of many by far less. */
const MANTISSA_SHIFT = 14;
const MANTISSA_MASK = 511;

/**
 * @param w [in, cols] channel-major.
 * @returns [in / groupSize, cols], ratios in (minimum, 1].
 */
export async function searchClipNorm(
  backend: Backend,
  w: Tensor,
  grid: GridSpec,
  options: ClipNormOptions = {},
): Promise<Float32Array> {
  const [channels, cols] = w.shape;
  return clipRatios(await backend.download(w), { channels, cols, grid }, options);
}

/** {@link searchClipNorm} of values on the host. */
export function clipRatios(
  w: Float32Array,
  { channels, cols, grid }: { readonly channels: number; readonly cols: number; readonly grid: GridSpec },
  { exponent = 2.4, minimum = 0.5, steps = 12 }: ClipNormOptions = {},
): Float32Array {
  const ratios = Array.from({ length: steps }, (_, step) => 1 - ((1 - minimum) * step) / steps);
  const best = new Float32Array((channels / grid.groupSize) * cols).fill(1);
  const table = powers(exponent);
  const error = new Float64Array(cols);
  const difference = new Float32Array(cols);
  const grids: ColumnGrids = {
    scales: new Float64Array(cols),
    inverse: new Float64Array(cols),
    low: new Float64Array(cols),
    high: new Float64Array(cols),
    difference,
    bits: new Int32Array(difference.buffer),
  };
  for (let group = 0; group * grid.groupSize < channels; group++) {
    const rows = { begin: group * grid.groupSize, end: (group + 1) * grid.groupSize };
    const range = rangesOf(w, cols, rows);
    const least = new Float64Array(cols).fill(Infinity);
    for (const ratio of ratios) {
      for (let c = 0; c < cols; c++) {
        const { scale, zero } = grid.symmetric
          ? symmetricGridOf(ratio * Math.max(-range.min[c], range.max[c]), grid.bits)
          : gridOf(ratio * range.min[c], ratio * range.max[c], grid.bits);
        grids.scales[c] = scale;
        grids.inverse[c] = 1 / scale;
        grids.low[c] = -zero;
        grids.high[c] = 2 ** grid.bits - 1 - zero;
        error[c] = 0;
      }
      for (let i = rows.begin; i < rows.end; i++) addErrors(w.subarray(i * cols, (i + 1) * cols), grids, table, error);
      for (let c = 0; c < cols; c++) {
        if (error[c] >= least[c]) continue;
        least[c] = error[c];
        best[group * cols + c] = ratio;
      }
    }
  }
  return best;
}

/** A grid for each column: its scale and the inverse, its lowest and highest level in steps; room for the differences. */
interface ColumnGrids extends Readonly<Record<'scales' | 'inverse' | 'low' | 'high', Float64Array>> {
  readonly difference: Float32Array;
  /** The same memory. */
  readonly bits: Int32Array;
}

/** Adds |w − ŵ|ᵖ of one row. A function of its own, because it is all that takes time. */
function addErrors(
  row: Float32Array,
  grids: ColumnGrids,
  { ofExponent, ofMantissa }: Powers,
  error: Float64Array,
): void {
  const { scales, inverse, low, high, difference, bits } = grids;
  for (let c = 0; c < row.length; c++) {
    const code = row[c] * inverse[c] + TO_INTEGER - TO_INTEGER;
    difference[c] = Math.min(Math.max(code, low[c]), high[c]) * scales[c] - row[c];
  }
  for (let c = 0; c < row.length; c++)
    error[c] += ofExponent[(bits[c] >> 23) & 255] * ofMantissa[(bits[c] >> MANTISSA_SHIFT) & MANTISSA_MASK];
}

/** Smallest and largest value of each column over some rows. */
function rangesOf(
  w: Float32Array,
  cols: number,
  rows: { readonly begin: number; readonly end: number },
): Record<'min' | 'max', Float64Array> {
  const [min, max] = [new Float64Array(cols).fill(Infinity), new Float64Array(cols).fill(-Infinity)];
  for (let i = rows.begin, at = i * cols; i < rows.end; i++) {
    for (let c = 0; c < cols; c++, at++) {
      if (w[at] < min[c]) min[c] = w[at];
      if (w[at] > max[c]) max[c] = w[at];
    }
  }
  return { min, max };
}

type Powers = Readonly<Record<'ofExponent' | 'ofMantissa', Float64Array>>;

/** |x|ᵖ of f32 values by their bits: the power of 2^exponent times that of the mantissa. Math.pow takes ten times as long. */
function powers(exponent: number): Powers {
  return {
    // Zeros and subnormals, exponent 0, count as nothing.
    ofExponent: Float64Array.from({ length: 256 }, (_, e) => (e === 0 ? 0 : 2 ** (exponent * (e - 127)))),
    ofMantissa: Float64Array.from(
      { length: MANTISSA_MASK + 1 },
      (_, m) => (1 + (m + 0.5) / (MANTISSA_MASK + 1)) ** exponent,
    ),
  };
}
