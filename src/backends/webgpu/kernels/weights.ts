// How weights lie in GPU memory, the kernels that bring them there, and the WGSL that reads them.
//
// A weight is [out, in], each row padded to whole words of 32 bits: f32 one element a word, f16 and bf16 two, codes of 2, 4
// and 8 bits 16, 8 and 4, of 3 bits 10; codes of 4 bits in the order 0 2 4 6 1 3 5 7. A quantized one has a word per row and group besides: the f16 scale below, the
// zero point above.
import { unreachable } from '../../../core/errors.js';
import type { WeightBits } from '../../../ops/backend.js';
import { defineKernel, read, variants, write } from '../kernel.js';
import { HALF_BITS } from './half.js';

/** Element type of a weight on the GPU; kernels are specialised by it. */
export type WeightFormat =
  { readonly kind: 'f32' | 'f16' | 'bf16' } | { readonly kind: 'int'; readonly bits: WeightBits };

/** Elements in one word. */
export function perWord(format: WeightFormat): number {
  switch (format.kind) {
    case 'f32':
      return 1;
    case 'f16':
    case 'bf16':
      return 2;
    case 'int':
      return Math.floor(32 / format.bits);
    default:
      return unreachable(format);
  }
}

/**
 * WGSL: the nibble of a word that holds 4-bit code e of its eight. Codes 2p and 2p + 1 lie 16 bits apart, so that one mask
 * takes a pair of them to the two halves of a word, where f16 arithmetic wants them (fast/half.ts).
 */
const PAIR_NIBBLE = (e: string): string => `((${e} >> 1u) | ((${e} & 1u) << 2u))`;

/** `int4` and the like, for names of kernels. */
export function formatName(format: WeightFormat): string {
  return format.kind === 'int' ? `int${format.bits}` : format.kind;
}

/**
 * Packs elements of `sourceBits` (8: codes, 16: halves) that lie one after the other into padded rows of words. One
 * thread per word. `first` is the first word written: weights come in slices that start at a row.
 */
export const packKernel = variants((sourceBits: 8 | 16, bits: number) =>
  defineKernel({
    name: `pack.${sourceBits}to${bits}`,
    buffers: { source: read('u32'), out: write('u32') },
    params: { words: 'u32', first: 'u32', wordsPerRow: 'u32', cols: 'u32' },
    body: /* wgsl */ `
const PER = ${Math.floor(32 / bits)}u;
const PER_SOURCE = ${32 / sourceBits}u;
@compute @workgroup_size(256)
fn main(@builtin(global_invocation_id) id: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>) {
  let stride = groups.x * 256u;
  for (var i = id.x; i < params.words; i += stride) {
    let row = i / params.wordsPerRow;
    let begin = (i % params.wordsPerRow) * PER;
    var word = 0u;
    for (var e = 0u; e < min(PER, params.cols - begin); e++) {
      let at = row * params.cols + begin + e;
      let value = extractBits(source[at / PER_SOURCE], (at % PER_SOURCE) * ${sourceBits}u, ${sourceBits}u);
      word |= value << (${bits === 4 ? PAIR_NIBBLE('e') : 'e'} * ${bits}u);
    }
    out[params.first + i] = word;
  }
}`,
  }),
);

/** Scales (f32, f16-representable) and zero points (bytes) → one word per row and group. */
export const packGridKernel = defineKernel({
  name: 'packGrid',
  buffers: { scales: read('f32'), zeros: read('u32'), out: write('u32') },
  params: { count: 'u32', first: 'u32' },
  body: /* wgsl */ `
${HALF_BITS}
@compute @workgroup_size(256)
fn main(@builtin(global_invocation_id) id: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>) {
  let stride = groups.x * 256u;
  for (var i = id.x; i < params.count; i += stride) {
    out[params.first + i] = halfBits(scales[i]) | (extractBits(zeros[i / 4u], (i % 4u) * 8u, 8u) << 16u);
  }
}`,
});

/** WGSL expression: element `e` (a constant) of a word, scaled; `grid` is the word of its group. */
export function decodeElement(format: WeightFormat, word: string, e: number, grid: string): string {
  switch (format.kind) {
    case 'f32':
      return `bitcast<f32>(${word})`;
    case 'f16':
      return `unpack2x16float(${word}).${'xy'[e]}`;
    case 'bf16':
      return e === 0 ? `bitcast<f32>(${word} << 16u)` : `bitcast<f32>(${word} & 0xffff0000u)`;
    case 'int': {
      const { bits } = format;
      const at = bits === 4 ? (e >> 1) | ((e & 1) << 2) : e;
      const code = `((${word} >> ${at * bits}u) & ${2 ** bits - 1}u)`;
      return `(f32(i32(${code}) - i32(${grid} >> 16u)) * unpack2x16float(${grid}).x)`;
    }
    default:
      return unreachable(format);
  }
}

/**
 * WGSL: `weightAt(row, column, group)`, one element at a time, from bindings `weights` and `grids` (words) and parameters
 * `wordsPerRow` and `groupsPerRow`; `group` is the column's, column / group size.
 */
export function weightAt(format: WeightFormat): string {
  const element = (): string => {
    switch (format.kind) {
      case 'f32':
        return 'return bitcast<f32>(word);';
      case 'f16':
        return 'let pair = unpack2x16float(word); return select(pair.x, pair.y, (column & 1u) == 1u);';
      case 'bf16':
        return 'return bitcast<f32>(select(word << 16u, word & 0xffff0000u, (column & 1u) == 1u));';
      case 'int':
        return `let e = column % ${perWord(format)}u;
  let code = extractBits(word, ${format.bits === 4 ? PAIR_NIBBLE('e') : 'e'} * ${format.bits}u, ${format.bits}u);
  let grid = grids[row * params.groupsPerRow + group];
  return f32(i32(code) - i32(grid >> 16u)) * unpack2x16float(grid).x;`;
      default:
        return unreachable(format);
    }
  };
  return /* wgsl */ `
fn weightAt(row: u32, column: u32, group: u32) -> f32 {
  let word = weights[row * params.wordsPerRow + column / ${perWord(format)}u];
  ${element()}
}`;
}
