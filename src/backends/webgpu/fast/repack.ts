// Weights as the fast kernels read them, made from the contract's quantized weights.
import type { QuantizedWeight } from '../../../ops/backend.js';
import { f32ToF16Bits } from '../../../core/dtype.js';

/** Nibble of a word that holds channel i of its eight: pairs (0,1), (2,3), … end up 16 bits apart. */
const NIBBLE = [0, 4, 1, 5, 2, 6, 3, 7] as const;

/** Rows [begin, end) of codes [out, in], one per byte → [rows, in/8] words. */
export function packCodes(weight: QuantizedWeight, begin = 0, end = weight.outFeatures): Uint32Array<ArrayBuffer> {
  const { codes, inFeatures } = weight;
  const words = new Uint32Array(((end - begin) * inFeatures) / 8);
  const base = begin * inFeatures;
  for (let i = 0; i < words.length; i++) {
    let word = 0;
    for (let c = 0; c < 8; c++) word |= codes[base + 8 * i + c] << (4 * NIBBLE[c]);
    words[i] = word >>> 0;
  }
  return words;
}

/** Grids of rows [begin, end): [rows, in/group] words: the scale as f16 below, the zero point above. */
export function packGrid(weight: QuantizedWeight, begin = 0, end = weight.outFeatures): Uint32Array<ArrayBuffer> {
  const groups = weight.inFeatures / weight.groupSize;
  const words = new Uint32Array((end - begin) * groups);
  for (let i = 0; i < words.length; i++) {
    const at = begin * groups + i;
    words[i] = (f32ToF16Bits(weight.scales[at]) | (weight.zeros[at] << 16)) >>> 0;
  }
  return words;
}
