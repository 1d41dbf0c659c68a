// Rounding a dense weight while it is loaded: min–max groups along the input, for runs that trade exactness for speed.
import { roundToF16 } from '../core/dtype.js';
import type { QuantizedWeight, WeightBits } from '../ops/backend.js';

/** Grid of weights rounded at load. */
export interface RoundAtLoad {
  readonly bits: WeightBits;
  readonly groupSize: number;
}

/** Rounds [out, in] to nearest on min–max grids (design §4.2); undefined when the groups do not tile the input. */
export function roundRows(
  weight: Float32Array,
  outFeatures: number,
  inFeatures: number,
  grid: RoundAtLoad,
): QuantizedWeight | undefined {
  const { bits, groupSize } = grid;
  if (inFeatures % groupSize !== 0) return undefined;
  const levels = 2 ** bits - 1;
  const groups = inFeatures / groupSize;
  const codes = new Uint8Array(weight.length);
  const zeros = new Uint8Array(outFeatures * groups);
  const scales = new Float32Array(outFeatures * groups);
  for (let g = 0; g < zeros.length; g++) {
    const begin = g * groupSize;
    const end = begin + groupSize;
    let [low, high] = [weight[begin], weight[begin]];
    for (let i = begin + 1; i < end; i++) {
      if (weight[i] < low) low = weight[i];
      if (weight[i] > high) high = weight[i];
    }
    const scale = Math.max(roundToF16((high - low) / levels), 2 ** -14);
    const zero = Math.min(Math.max(Math.round(-low / scale), 0), levels);
    for (let i = begin; i < end; i++) codes[i] = Math.min(Math.max(Math.round(weight[i] / scale) + zero, 0), levels);
    zeros[g] = zero;
    scales[g] = scale;
  }
  return { bits, groupSize, inFeatures, outFeatures, codes, zeros, scales };
}
