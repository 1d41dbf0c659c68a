// Dynamic grids: the range of a run of channels found and the run rounded onto it, in one dispatch. A workgroup takes a run: it
// is read twice (the second time from cache) and written once, as values, as 8-bit codes for products in integers, or as
// packed codes into a key/value cache.
import { defineKernel, read, variants, write } from '../kernel.js';
import { LINEAR_GROUP } from '../tensor.js';
import { narrowWgsl } from '../fast/half.js';
import { GRID_ARITHMETIC } from './grid.js';

/** Threads for a run of `size` channels. */
const threadsFor = (size: number): number => Math.min(256, Math.max(32, 2 ** Math.floor(Math.log2(size / 4))));

/** WGSL: a run's low and scale (low 0 when symmetric), and the code of a value. `top` is 2ᵇ⁻¹ − 1 or 2ᵇ − 1. */
export const dynamicGridWgsl = (symmetric: boolean): string => /* wgsl */ `
${GRID_ARITHMETIC}
fn dynamicGrid(lo: f32, hi: f32, clip: f32, top: f32) -> vec2<f32> {
${
  symmetric
    ? '  return vec2(0.0, quotient(clip * max(abs(lo), abs(hi)), top));'
    : `  let half = clip * (hi - lo) / 2.0;
  return vec2((hi + lo) / 2.0 - half, quotient(2.0 * half, top));`
}
}
fn codeOf(x: f32, grid: vec2<f32>, top: f32) -> f32 {
  if (grid.y == 0.0) { return 0.0; }
  return clamp(round(quotient(x - grid.x, grid.y)), ${symmetric ? '-top - 1.0' : '0.0'}, top);
}`;

/** WGSL: lo and hi of x[begin … begin + size) on every thread. */
const range = (threads: number, halves = false): { declarations: string; statements: string } => ({
  declarations: `var<workgroup> ranges: array<vec2<f32>, ${threads}>;
fn element(at: u32) -> f32 { return ${halves ? 'unpack2x16float(x[at / 2u])[at % 2u]' : 'x[at]'}; }`,
  statements: /* wgsl */ `
  var lo = element(begin);
  var hi = lo;
  for (var i = lid; i < params.size; i += ${threads}u) {
    let e = element(begin + i);
    lo = min(lo, e);
    hi = max(hi, e);
  }
  ranges[lid] = vec2(lo, hi);
  for (var reach = ${threads / 2}u; reach > 0u; reach >>= 1u) {
    workgroupBarrier();
    if (lid < reach) {
      let other = ranges[lid + reach];
      ranges[lid] = vec2(min(ranges[lid].x, other.x), max(ranges[lid].y, other.y));
    }
  }
  workgroupBarrier();
  lo = ranges[0].x;
  hi = ranges[0].y;`,
});

const entry = (threads: number): string => /* wgsl */ `
@compute @workgroup_size(${threads})
fn main(
  @builtin(local_invocation_index) lid: u32,
  @builtin(workgroup_id) group: vec3<u32>,
  @builtin(num_workgroups) groups: vec3<u32>,
) {
  let run = min(linearGroup(group, groups), params.runs - 1u);`;

/** out = values of x on the grids of its runs of `size`. One workgroup per run. */
export const quantizeRunsKernel = variants((symmetric: boolean, size: number) => {
  const threads = threadsFor(size);
  const { declarations, statements } = range(threads);
  return defineKernel({
    name: `quantizeRows.${symmetric ? 'symmetric' : 'asymmetric'}.${threads}`,
    buffers: { x: read('f32'), out: write('f32') },
    params: { runs: 'u32', size: 'u32', top: 'f32', clip: 'f32' },
    body: /* wgsl */ `
${LINEAR_GROUP}
${dynamicGridWgsl(symmetric)}
${declarations}
${entry(threads)}
  let begin = run * params.size;
${statements}
  let grid = dynamicGrid(lo, hi, params.clip, params.top);
  for (var i = lid; i < params.size; i += ${threads}u) {
    out[begin + i] = fma(codeOf(x[begin + i], grid, params.top), grid.y, grid.x);
  }
}`,
  });
});

/** WGSL: `codesOf`, four values on a symmetric grid with `params.top`. */
export const CODES_OF = /* wgsl */ `
${GRID_ARITHMETIC}
fn codesOf(v: vec4<f32>, scale: f32) -> vec4<i32> {
  if (scale == 0.0) { return vec4<i32>(); }
  let q = vec4(quotient(v.x, scale), quotient(v.y, scale), quotient(v.z, scale), quotient(v.w, scale));
  return vec4<i32>(clamp(round(q), vec4(-params.top - 1.0), vec4(params.top)));
}`;

/** Options of {@link encodeRowsKernel}. */
export interface EncodeVariant {
  /** For 4-bit weights. */
  readonly paired: boolean;
  /** Channels of a row. */
  readonly size: number;
  /** x is f16, two to a word. */
  readonly halves: boolean;
}

/**
 * Symmetric codes of rows of `size` channels, four signed bytes to a word, in the order that products in integers read (`words`
 * per row; channels past the end are 0), and each row's scale and sum of codes. Of every 8 channels the first word holds 0, 4, 1, 5 and the
 * second 2, 6, 3, 7 where `paired` (4-bit weights: see kernels/weights.ts), else they lie one after the other.
 */
export const encodeRowsKernel = variants(({ paired, size, halves }: EncodeVariant) => {
  const threads = threadsFor(size);
  const { declarations, statements } = range(threads, halves);
  return defineKernel({
    name: `encodeRows.${threads}${paired ? '.paired' : ''}${halves ? '.f16' : ''}`,
    buffers: { x: read(halves ? 'u32' : 'f32'), codes: write('u32'), scales: write('vec2<f32>') },
    params: { runs: 'u32', size: 'u32', words: 'u32', top: 'f32', clip: 'f32' },
    body: /* wgsl */ `
${LINEAR_GROUP}
${dynamicGridWgsl(true)}
${declarations}
var<workgroup> sums: array<i32, ${threads}>;
fn codeAt(begin: u32, channel: u32, grid: vec2<f32>) -> i32 {
  if (channel >= params.size) { return 0; }
  return i32(codeOf(element(begin + channel), grid, params.top));
}
${entry(threads)}
  let begin = run * params.size;
${statements}
  let grid = dynamicGrid(lo, hi, params.clip, params.top);
  var sum = 0;
  for (var w = lid; w < params.words; w += ${threads}u) {
${
  paired
    ? `    let c = (w / 2u) * 8u + (w % 2u) * 2u;
    let code = vec4(codeAt(begin, c, grid), codeAt(begin, c + 4u, grid), codeAt(begin, c + 1u, grid), codeAt(begin, c + 5u, grid));`
    : `    let c = w * 4u;
    let code = vec4(codeAt(begin, c, grid), codeAt(begin, c + 1u, grid), codeAt(begin, c + 2u, grid), codeAt(begin, c + 3u, grid));`
}
    codes[run * params.words + w] = pack4xI8(code);
    sum += code.x + code.y + code.z + code.w;
  }
  sums[lid] = sum;
  for (var reach = ${threads / 2}u; reach > 0u; reach >>= 1u) {
    workgroupBarrier();
    if (lid < reach) { sums[lid] += sums[lid + reach]; }
  }
  if (lid == 0u) { scales[run] = vec2(grid.y, f32(sums[0])); }
}`,
  });
});

/** Words of a head in a cache of integers: low and scale as f32, then the codes. */
export function gridCacheWords(headDim: number, bits: 4 | 8): number {
  return 2 + Math.ceil((headDim * bits) / 32);
}

/**
 * Rounds new keys or values [batch·tokens, kvHeads·headDim] onto asymmetric grids, one per token and head, and writes them
 * into a cache [batch, kvHeads, capacity] of {@link gridCacheWords}. One workgroup per run, a token's head.
 */
export const appendGridKernel = variants((headDim: number, bits: 4 | 8, halves: boolean) => {
  const threads = threadsFor(headDim);
  const { declarations, statements } = range(threads, halves);
  const per = 32 / bits;
  return defineKernel({
    name: `cacheAppend.${headDim}.int${bits}${halves ? '.f16' : ''}`,
    buffers: { x: read(halves ? 'u32' : 'f32'), starts: read('u32'), cache: write('u32') },
    params: {
      runs: 'u32',
      size: 'u32',
      clip: 'f32',
      tokens: 'u32',
      kvHeads: 'u32',
      start: 'u32',
      ragged: 'u32',
      capacity: 'u32',
    },
    body: /* wgsl */ `
${LINEAR_GROUP}
${dynamicGridWgsl(false)}
${declarations}
const TOP = ${2 ** bits - 1}.0;
const WORDS = ${gridCacheWords(headDim, bits)}u;
${entry(threads)}
  let begin = run * params.size;
${statements}
  let grid = dynamicGrid(lo, hi, params.clip, TOP);
  let head = run % params.kvHeads;
  let row = run / params.kvHeads;
  let sequence = row / params.tokens;
  var position = params.start + row % params.tokens;
  if (params.ragged != 0u) { position = starts[sequence] + row % params.tokens; }
  let home = ((sequence * params.kvHeads + head) * params.capacity + position) * WORDS;
  for (var w = lid; w < WORDS - 2u; w += ${threads}u) {
    var word = 0u;
    for (var e = 0u; e < min(${per}u, ${headDim}u - w * ${per}u); e++) {
      word |= u32(codeOf(element(begin + w * ${per}u + e), grid, TOP)) << (e * ${bits}u);
    }
    cache[home + 2u + w] = word;
  }
  if (lid == 0u) {
    cache[home] = bitcast<u32>(grid.x);
    cache[home + 1u] = bitcast<u32>(grid.y);
  }
}`,
  });
});

/**
 * Keys or values of a cache of integers as f16 [batch · kvHeads, reach, headDim], for kernels that read many of them many times;
 * headDim a multiple of 8. Bytes per token and head: {@link gridCacheWords} words in, 2 · headDim out.
 */
export const unpackGridKernel = variants((headDim: number, bits: 4 | 8, f16: boolean) => {
  const lanes = headDim / 8;
  return defineKernel({
    name: `cacheUnpack.${headDim}.int${bits}`,
    features: f16 ? ['f16'] : [],
    buffers: { cache: read('u32'), out: write('vec4<u32>') },
    params: { count: 'u32', reach: 'u32', capacity: 'u32' },
    body: /* wgsl */ `
${narrowWgsl({ f16 })}
const WORDS = ${gridCacheWords(headDim, bits)}u;
@compute @workgroup_size(256)
fn main(@builtin(global_invocation_id) id: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>) {
  let stride = groups.x * 256u;
  for (var i = id.x; i < params.count; i += stride) {
    let run = i / ${lanes}u;
    let home = (run / params.reach * params.capacity + run % params.reach) * WORDS;
    let low = bitcast<f32>(cache[home]);
    let scale = bitcast<f32>(cache[home + 1u]);
${
  bits === 8
    ? `    let at = home + 2u + 2u * (i % ${lanes}u);
    let a = fma(vec4<f32>(unpack4xU8(cache[at])), vec4(scale), vec4(low));
    let b = fma(vec4<f32>(unpack4xU8(cache[at + 1u])), vec4(scale), vec4(low));`
    : `    let word = cache[home + 2u + i % ${lanes}u];
    let a = fma(vec4<f32>((vec4(word) >> vec4(0u, 4u, 8u, 12u)) & vec4(15u)), vec4(scale), vec4(low));
    let b = fma(vec4<f32>((vec4(word) >> vec4(16u, 20u, 24u, 28u)) & vec4(15u)), vec4(scale), vec4(low));`
}
    out[i] = vec4(narrow(a.xy), narrow(a.zw), narrow(b.xy), narrow(b.zw));
  }
}`,
  });
});
