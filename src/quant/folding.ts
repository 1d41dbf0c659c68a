// Folding channel scales into what comes before a linear (AWQ): a norm's weight, or the output rows of a linear.
import { roundToF16 } from '../core/dtype.js';
import { floats, type HostTensor } from '../core/tensor.js';
import type { QuantizedWeight } from '../ops/backend.js';
import type { InputFold } from './types.js';

/** Scales of channels that a norm's weight can take over: one to one. Folded norms are stored in f32, so any scale survives. */
export function normFold(norm: HostTensor): InputFold {
  const weight = floats(norm);
  return {
    source: Int32Array.from(weight, (_, c) => c),
    // A channel the norm switches off carries nothing to scale.
    roundScale: (channel, scale) => (weight[channel] === 0 ? 1 : Math.fround(scale)),
  };
}

/** Scales of channels that come from output rows of a linear; several channels may come from one row. */
export function rowFold(channels: number, rowOf: (channel: number) => number): InputFold {
  return { source: Int32Array.from({ length: channels }, (_, c) => rowOf(c)) };
}

/** No scales can go anywhere: what stands before is left as it is. */
export function noFold(channels: number): InputFold {
  return { ...rowFold(channels, (channel) => channel), roundScale: () => 1 };
}

/** norm weight ÷ s. */
export function foldIntoNorm(weight: Float32Array, scales: Float32Array): Float32Array {
  return weight.map((w, c) => w / scales[c]);
}

/** Rows of a quantized weight ÷ s: exact on the codes, the grid's scales are rounded to f16 again. */
export function foldIntoRows(weight: QuantizedWeight, source: Int32Array, scales: Float32Array): QuantizedWeight {
  const groups = weight.inFeatures / weight.groupSize;
  const folded = weight.scales.slice();
  const divisor = new Map<number, number>();
  source.forEach((row, c) => divisor.set(row, scales[c]));
  for (const [row, s] of divisor)
    for (let g = 0; g < groups; g++) folded[row * groups + g] = roundToF16(weight.scales[row * groups + g] / s);
  return { ...weight, scales: folded };
}
