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
  const { groupSize, bits } = grid;
  const ratios = Array.from({ length: steps }, (_, step) => 1 - ((1 - minimum) * step) / steps);
  const best = new Float32Array((channels / groupSize) * cols);
  const scratch = createScratch(groupSize, exponent);
  const { values } = scratch;
  for (let slot = 0; slot < best.length; slot++) {
    const first = Math.floor(slot / cols) * groupSize * cols + (slot % cols);
    let [min, max] = [Infinity, -Infinity];
    for (let i = 0; i < groupSize; i++) {
      const value = w[first + i * cols];
      values[i] = value;
      min = Math.min(min, value);
      max = Math.max(max, value);
    }
    let least = Infinity;
    best[slot] = 1;
    for (const ratio of ratios) {
      const { scale, zero } = grid.symmetric
        ? symmetricGridOf(ratio * Math.max(-min, max), bits)
        : gridOf(ratio * min, ratio * max, bits);
      const error = errorOn(scratch, scale, -zero, 2 ** bits - 1 - zero);
      if (error >= least) continue;
      least = error;
      best[slot] = ratio;
    }
  }
  return best;
}

/** One group of one column, room for its differences, and tables of powers. */
interface Scratch {
  readonly values: Float32Array;
  readonly difference: Float32Array;
  /** The same memory. */
  readonly bits: Int32Array;
  readonly powers: Powers;
}

function createScratch(groupSize: number, exponent: number): Scratch {
  const difference = new Float32Array(groupSize);
  const bits = new Int32Array(difference.buffer);
  return { values: new Float32Array(groupSize), difference, bits, powers: powers(exponent) };
}

/** Σ|w − ŵ|ᵖ with levels low … high steps of a scale. A function of its own: it is all that takes time. */
function errorOn(
  { values, difference, bits, powers: table }: Scratch,
  scale: number,
  low: number,
  high: number,
): number {
  const { ofExponent, ofMantissa } = table;
  const inverse = 1 / scale;
  for (let i = 0; i < values.length; i++) {
    const code = values[i] * inverse + TO_INTEGER - TO_INTEGER;
    difference[i] = Math.min(Math.max(code, low), high) * scale - values[i];
  }
  let sum = 0;
  for (let i = 0; i < bits.length; i++)
    sum += ofExponent[(bits[i] >> 23) & 255] * ofMantissa[(bits[i] >> MANTISSA_SHIFT) & MANTISSA_MASK];
  return sum;
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
