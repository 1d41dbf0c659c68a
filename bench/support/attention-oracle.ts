// Attention of single rows in float64, for checks of contexts that are too long to compute whole on the host.
import { f16BitsToF32, f32ToF16Bits } from '../../src/core/dtype.js';
import { createRng } from '../../src/core/rng.js';
import { LAMBDA } from '../../test/conformance/duo.js';

/** Every f16 by its bits. */
const HALVES = Float32Array.from({ length: 65536 }, (_, bits) => f16BitsToF32(bits));
/** Relative rounding error of f16. */
const C = 2 ** -11;

/** f16 bits as numbers. */
export function widen(bits: Uint16Array): Float32Array {
  const out = new Float32Array(bits.length);
  for (let i = 0; i < bits.length; i++) out[i] = HALVES[bits[i]];
  return out;
}

/** Normal numbers as f16 bits, drawn by a fast generator from a table of them. */
export function randomHalves(count: number, seed: number): Uint16Array<ArrayBuffer> {
  const rng = createRng(seed);
  const table = Uint16Array.from({ length: 65536 }, () => f32ToF16Bits(rng.normal()));
  const out = new Uint16Array(count);
  let state = seed >>> 0 || 1;
  for (let i = 0; i < count; i++) {
    state ^= state << 13;
    state ^= state >>> 17;
    state ^= state << 5;
    out[i] = table[state & 0xffff];
  }
  return out;
}

/** Keys or values of one head in a larger array: position p begins at `first + p · stride`. */
export interface HeadRows {
  readonly data: Float32Array;
  readonly first: number;
  readonly stride: number;
}

/** One query row and the keys it sees: positions `begin` … `end − 1`. */
export interface AttentionRow {
  readonly query: Float32Array;
  readonly keys: HeadRows;
  readonly values: HeadRows;
  readonly begin: number;
  readonly end: number;
  readonly scale: number;
}

/**
 * The row's result, and how far from it kernels may be that compute in f16 what is f16 in their contract: weights and result
 * rounded to f16 (errors of weights add up at random), scores good to 2⁻²⁰ of their size, as sums of matrix units are.
 */
export function attentionRow(row: AttentionRow): { expected: Float64Array; tolerance: Float64Array } {
  const { query, keys, values, begin, end, scale } = row;
  const headDim = query.length;
  const scores = new Float64Array(end - begin);
  let [top, largest] = [-Infinity, 0];
  for (let p = begin; p < end; p++) {
    const at = keys.first + p * keys.stride;
    let sum = 0;
    for (let d = 0; d < headDim; d++) sum += query[d] * keys.data[at + d];
    scores[p - begin] = sum * scale;
    top = Math.max(top, sum * scale);
    largest = Math.max(largest, Math.abs(sum * scale));
  }
  let total = 0;
  for (let i = 0; i < scores.length; i++) total += scores[i] = Math.exp(scores[i] - top);
  const [expected, squares, size] = [0, 0, 0].map(() => new Float64Array(headDim));
  for (let p = begin; p < end; p++) {
    const at = values.first + p * values.stride;
    const weight = scores[p - begin] / total;
    for (let d = 0; d < headDim; d++) {
      const term = weight * values.data[at + d];
      expected[d] += term;
      squares[d] += term * term;
      size[d] += Math.abs(term);
    }
  }
  const tolerance = expected.map(
    (y, d) => LAMBDA * C * Math.sqrt(squares[d]) + C * Math.abs(y) + 2 ** -20 * Math.max(4, largest) * size[d],
  );
  return { expected, tolerance };
}
