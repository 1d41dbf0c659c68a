// How the decode plan's attention reads and writes entries of key/value caches: f16, or codes of 8 or 4 bits behind their low and
// scale (kernels/activation-grid.ts). A lane takes 8 channels of an entry; a new key and value lie in workgroup memory first, where
// their grid is found. Bytes per entry: 2·headDim in f16, headDim + 8 with 8 bits, headDim/2 + 8 with 4.
import type { KvGrid } from '../../../ops/backend.js';
import { dynamicGridWgsl, gridCacheWords } from '../kernels/activation-grid.js';

/** WGSL of a kind of cache entry, for a kernel that has `head` (array<vec4<f32>>), D, LANES, cache, position, part, local, owner. */
export interface CacheEntry {
  /** Of the buffers `keys` and `values`. */
  readonly type: string;
  /** `half8(vec4<u32>) → array<vec4<f32>, 2>`: 8 channels of a loaded part. */
  readonly declarations: string;
  /** The lane's part of entry `at`, vec4<u32>. */
  readonly load: (buffer: 'keys' | 'values') => string;
  /** Statements: what newKey and newValue need. */
  readonly prepare: string;
  /** Statements: the new entry written where the workgroup is its owner. */
  readonly store: string;
  /** The lane's part of the new key and value, as if loaded. */
  readonly newKey: string;
  readonly newValue: string;
}

/** `key` and `value`: where in `head` the new ones lie. `threads` of a workgroup: at least 64. */
export function cacheEntry(
  headDim: number,
  { key, value, threads, grid }: { key: string; value: string; threads: number; grid?: KvGrid | undefined },
): CacheEntry {
  if (grid) return codeEntry(headDim, grid, key, value, threads);
  return {
    type: 'vec4<u32>',
    declarations: /* wgsl */ `
fn half8(w: vec4<u32>) -> array<vec4<f32>, 2> {
  return array<vec4<f32>, 2>(vec4(unpack2x16float(w.x), unpack2x16float(w.y)), vec4(unpack2x16float(w.z), unpack2x16float(w.w)));
}
fn packed(at: u32) -> vec4<u32> {
  let a = head[at / 4u]; let b = head[at / 4u + 1u];
  return vec4(pack2x16float(a.xy), pack2x16float(a.zw), pack2x16float(b.xy), pack2x16float(b.zw));
}`,
    load: (buffer) => `${buffer}[at * LANES + part]`,
    prepare: '',
    store: /* wgsl */ `  if (owner && local < 2u * LANES) {
    // Every workgroup of this key/value head that owns the new key writes the same bytes.
    let at = (cache + position) * LANES + local % LANES;
    if (local < LANES) { keys[at] = packed(${key} + local * 8u); }
    else { values[at] = packed(${value} + (local - LANES) * 8u); }
  }`,
    newKey: `packed(${key} + part * 8u)`,
    newValue: `packed(${value} + part * 8u)`,
  };
}

/** Lanes that look for the range of a new head. */
const SEEKERS = 32;

function codeEntry(headDim: number, { bits, clip }: KvGrid, key: string, value: string, threads: number): CacheEntry {
  const pairs = gridCacheWords(headDim, bits) / 2;
  const words = pairs - 1;
  const eight = bits === 8;
  const load = (buffer: string): string =>
    `vec4(${buffer}[at * ENTRY], ${eight ? `${buffer}[at * ENTRY + 1u + part]` : `${buffer}[at * ENTRY + 1u + part / 2u][part & 1u], 0u`})`;
  const fresh = (grid: string, first: string): string =>
    `vec4(bitcast<vec2<u32>>(${grid}), ${eight ? `wordsAt(${first} + part * 8u, ${grid})` : `wordAt(${first} + part * 8u, ${grid}), 0u`})`;
  const codes = (word: string, shifts: string): string =>
    `vec4<f32>((vec4(${word}) >> vec4(${shifts})) & vec4(${2 ** bits - 1}u))`;
  return {
    type: 'vec2<u32>',
    declarations: /* wgsl */ `
${dynamicGridWgsl(false)}
// In pairs of words: low and scale, then codes.
const ENTRY = ${pairs}u;
const TOP = ${2 ** bits - 1}.0;
var<workgroup> ends: array<vec2<f32>, ${2 * SEEKERS}>;
fn half8(w: vec4<u32>) -> array<vec4<f32>, 2> {
  let low = vec4(bitcast<f32>(w.x)); let scale = vec4(bitcast<f32>(w.y));
  return array<vec4<f32>, 2>(
    fma(${codes('w.z', eight ? '0u, 8u, 16u, 24u' : '0u, 4u, 8u, 12u')}, scale, low),
    fma(${eight ? codes('w.w', '0u, 8u, 16u, 24u') : codes('w.z', '16u, 20u, 24u, 28u')}, scale, low));
}
fn wordAt(first: u32, grid: vec2<f32>) -> u32 {
  var word = 0u;
  for (var e = 0u; e < ${32 / bits}u; e++) {
    let i = first + e;
    word |= u32(codeOf(head[i / 4u][i & 3u], grid, TOP)) << (e * ${bits}u);
  }
  return word;
}
fn wordsAt(first: u32, grid: vec2<f32>) -> vec2<u32> {
  return vec2(wordAt(first, grid), wordAt(first + ${32 / bits}u, grid));
}
fn gridAt(first: u32) -> vec2<f32> {
  var e = ends[first];
  for (var i = 1u; i < ${SEEKERS}u; i++) { e = vec2(min(e.x, ends[first + i].x), max(e.y, ends[first + i].y)); }
  return dynamicGrid(e.x, e.y, ${clip}, TOP);
}`,
    load,
    prepare: /* wgsl */ `  for (var i = local; i < ${2 * SEEKERS}u; i += ${threads}u) {
    let home = select(${key}, ${value}, i >= ${SEEKERS}u);
    var e = vec2(1e38, -1e38);
    for (var d = i % ${SEEKERS}u; d < D; d += ${SEEKERS}u) {
      let x = head[(home + d) / 4u][(home + d) & 3u];
      e = vec2(min(e.x, x), max(e.y, x));
    }
    ends[i] = e;
  }
  workgroupBarrier();
  var keyGrid = vec2<f32>(); var valueGrid = vec2<f32>();
  if (owner) { keyGrid = gridAt(0u); valueGrid = gridAt(${SEEKERS}u); }`,
    store: /* wgsl */ `  if (owner && local < ${2 * words}u) {
    // Every workgroup of this key/value head that owns the new key writes the same bytes.
    let at = (cache + position) * ENTRY;
    let word = local % ${words}u;
    let first = word * ${64 / bits}u;
    if (local < ${words}u) {
      if (word == 0u) { keys[at] = bitcast<vec2<u32>>(keyGrid); }
      keys[at + 1u + word] = wordsAt(${key} + first, keyGrid);
    } else {
      if (word == 0u) { values[at] = bitcast<vec2<u32>>(valueGrid); }
      values[at + 1u + word] = wordsAt(${value} + first, valueGrid);
    }
  }`,
    newKey: fresh('keyGrid', key),
    newValue: fresh('valueGrid', value),
  };
}

/** WGSL: the Hadamard transform of `heads` heads of D channels in `head`, between barriers; D is a power of two. */
export const turnHeadsWgsl = (heads: number, threads: number): string => /* wgsl */ `
  for (var reach = 1u; reach < D; reach <<= 1u) {
    for (var i = local; i < ${heads}u * D / 2u; i += ${threads}u) {
      let low = i / reach * 2u * reach + i % reach; let up = low + reach;
      let x = head[low / 4u][low & 3u]; let y = head[up / 4u][up & 3u];
      head[low / 4u][low & 3u] = ${Math.SQRT1_2} * (x + y);
      head[up / 4u][up & 3u] = ${Math.SQRT1_2} * (x - y);
    }
    workgroupBarrier();
  }`;
