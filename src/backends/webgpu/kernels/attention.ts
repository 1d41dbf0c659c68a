// Causal grouped-query attention with online softmax: scores live in workgroup memory, tile by tile, and never all at once.
//
// A workgroup serves one key head of one sequence and a tile of query rows; a row is a (token, head) pair, so all heads
// that share keys share their loads. It walks its range of keys in tiles: keys into workgroup memory, scores, values into
// the same place, weighted sums in registers. Few rows and many keys (decoding) split the keys over workgroups, and
// `combineKernel` merges their partial sums. Bytes moved: keys and values once per tile of rows.
import { defineKernel, read, variants, write } from '../kernel.js';
import { LINEAR_GROUP } from '../tensor.js';
import { gridCacheWords } from './activation-grid.js';
import { HALF_BITS } from './half.js';

/** Options of {@link attentionKernel}. */
export interface AttentionVariant {
  readonly headDim: number;
  /** Query rows of a tile. */
  readonly rows: number;
  /** Keys of a tile. */
  readonly keys: number;
  /** Threads per query row. */
  readonly lanes: number;
  /** Where keys and values are: rows of f32, a cache of packed f16 or of integers (activation-grid.ts), or rows of a packed forest. */
  readonly source: AttentionSource;
}

/** See {@link AttentionVariant}. */
export type AttentionSource = 'rows' | 'cache' | 'int8' | 'int4' | 'forest';

/** Bytes of workgroup memory a variant takes. */
export function attentionMemory({ headDim, rows, keys }: Pick<AttentionVariant, 'headDim' | 'rows' | 'keys'>): number {
  const quads = Math.ceil(headDim / 4);
  return 16 * (rows * quads + keys * (quads + 1)) + 8 * rows * keys;
}

/** Words a head takes in the cache. */
export function cacheWords(headDim: number): number {
  return Math.ceil(headDim / 2);
}

const params = {
  tokens: 'u32',
  heads: 'u32',
  kvHeads: 'u32',
  start: 'u32',
  ragged: 'u32',
  window: 'u32',
  stride: 'u32',
  splitKeys: 'u32',
  scale: 'f32',
} as const;

/** WGSL: four elements at `at`, of which those past the head's end are 0. */
function quadOf(array: string, headDim: number): string {
  if (headDim % 4 === 0) return `return vec4(${array}[at], ${array}[at + 1u], ${array}[at + 2u], ${array}[at + 3u]);`;
  return `var quad = vec4(0.0);
  for (var i = 0u; i < min(4u, D - c); i++) { quad[i] = ${array}[at + i]; }
  return quad;`;
}

/** WGSL: four elements of the head at position `p`, from channel `c`. */
function sourceQuad(name: string, { source, headDim }: AttentionVariant): string {
  if (source === 'rows' || source === 'forest')
    return /* wgsl */ `
fn ${name}Quad(sequence: u32, head: u32, p: u32, c: u32) -> vec4<f32> {
  let at = ((sequence * params.stride + p) * params.kvHeads + head) * D + c;
  ${quadOf(name, headDim)}
}`;
  if (source !== 'cache') {
    const bits = source === 'int8' ? 8 : 4;
    return /* wgsl */ `
fn ${name}Quad(sequence: u32, head: u32, p: u32, c: u32) -> vec4<f32> {
  let at = ((sequence * params.kvHeads + head) * params.stride + p) * ${gridCacheWords(headDim, bits)}u;
  let word = ${name}[at + 2u + c / ${32 / bits}u];
  let codes = ${bits === 8 ? '(vec4(word) >> vec4(0u, 8u, 16u, 24u)) & vec4(255u)' : '(vec4(word >> (4u * (c % 8u))) >> vec4(0u, 4u, 8u, 12u)) & vec4(15u)'};
  let quad = fma(vec4<f32>(codes), vec4(bitcast<f32>(${name}[at + 1u])), vec4(bitcast<f32>(${name}[at])));
  ${headDim % 4 === 0 ? 'return quad;' : 'return select(vec4(0.0), quad, vec4(c) + vec4(0u, 1u, 2u, 3u) < vec4(D));'}
}`;
  }
  const words = cacheWords(headDim);
  return /* wgsl */ `
fn ${name}Quad(sequence: u32, head: u32, p: u32, c: u32) -> vec4<f32> {
  let at = ((sequence * params.kvHeads + head) * params.stride + p) * ${words}u + c / 2u;
  ${
    words % 2 === 0
      ? `return vec4(unpack2x16float(${name}[at]), unpack2x16float(${name}[at + 1u]));`
      : `if (c + 2u >= D) { return vec4(unpack2x16float(${name}[at]), 0.0, 0.0); }
  return vec4(unpack2x16float(${name}[at]), unpack2x16float(${name}[at + 1u]));`
  }
}`;
}

/** Attention of a tile of rows over all its keys. Workgroups: tiles in x, 1 in y, batch · kvHeads in z. */
export const attentionKernel = variants((variant: AttentionVariant) =>
  defineKernel({
    name: attentionName(variant),
    buffers: attentionBuffers(variant),
    params,
    body: attentionBody(variant, {
      begin: 'let base = ((sequence * params.tokens + token) * params.heads + head) * D;',
      factor: ' / weight',
    }),
  }),
);

/**
 * Attention over a range of keys, left to {@link combineKernel}: `out` gets the sums, unnormalised, `softmax` the largest
 * score and the sum of weights, [batch · kvHeads, splits, rows]. Workgroups: tiles in x, splits in y, batch · kvHeads in z.
 */
export const splitAttentionKernel = variants((variant: AttentionVariant) =>
  defineKernel({
    name: `${attentionName(variant)}.split`,
    buffers: { ...attentionBuffers(variant), softmax: write('vec2<f32>') },
    params,
    body: attentionBody(variant, {
      begin: `let slot = (group.z * groups.y + group.y) * rowCount + row;
    let base = slot * D;
    if (lane == 0u) { softmax[slot] = vec2(top, weight); }`,
      factor: '',
    }),
  }),
);

function attentionName({ headDim, source, rows, keys }: AttentionVariant): string {
  return `attention.${headDim}.${source}.${rows}x${keys}`;
}

function attentionBuffers({ source }: AttentionVariant) {
  const type = source === 'rows' || source === 'forest' ? 'f32' : 'u32';
  return { q: read('f32'), k: read(type), v: read(type), starts: read('u32'), out: write('f32') };
}

/** The shared body; `end` says where a row's sums go, and by what they are multiplied. */
function attentionBody(variant: AttentionVariant, end: { readonly begin: string; readonly factor: string }): string {
  const { headDim, rows, keys, lanes } = variant;
  const forest = variant.source === 'forest';
  const threads = rows * lanes;
  const quads = Math.ceil(headDim / 4);
  const sums = Array.from({ length: Math.ceil(quads / lanes) }, (_, i) => i);
  // Where quads do not fill the lanes some threads have one sum less.
  const guard = (i: number): string => ((i + 1) * lanes <= quads ? '' : `if (lane + ${i * lanes}u < QUADS) `);
  return /* wgsl */ `
const D = ${headDim}u;
const QUADS = ${quads}u;
const TILE = ${quads + 1}u;
const LOWEST = -1e30;
var<workgroup> queries: array<vec4<f32>, ${rows * quads}>;
var<workgroup> tile: array<vec4<f32>, ${keys * (quads + 1)}>;
var<workgroup> scores: array<f32, ${rows * keys}>;
var<workgroup> weights: array<f32, ${rows * keys}>;
fn qQuad(at: u32, c: u32) -> vec4<f32> {
  ${quadOf('q', headDim)}
}
${sourceQuad('k', variant)}
${sourceQuad('v', variant)}
@compute @workgroup_size(${threads})
fn main(
  @builtin(local_invocation_index) lid: u32,
  @builtin(workgroup_id) group: vec3<u32>,
  @builtin(num_workgroups) groups: vec3<u32>,
) {
  let sequence = group.z / params.kvHeads;
  let kvHead = group.z % params.kvHeads;
  let share = params.heads / params.kvHeads;
  let rowCount = params.tokens * share;
  let firstRow = group.x * ${rows}u;
  let lane = lid % ${lanes}u;
  let mine = lid / ${lanes}u;
  for (var i = lid; i < ${rows}u * QUADS; i += ${threads}u) {
    let row = min(firstRow + i / QUADS, rowCount - 1u);
    let c = (i % QUADS) * 4u;
    let at = ((sequence * params.tokens + row / share) * params.heads + kvHead * share + row % share) * D + c;
    queries[i] = params.scale * qQuad(at, c);
  }
  let row = min(firstRow + mine, rowCount - 1u);
  let token = row / share;
  let head = kvHead * share + row % share;
  var start = params.start;
  if (params.ragged != 0u) { start = starts[sequence]; }
  let position = start + token;
  let firstPosition = start + firstRow / share;
  let lastPosition = start + min(firstRow + ${rows - 1}u, rowCount - 1u) / share;
${
  forest
    ? `  // A forest is one sequence; starts is its table: ends, positions, roots, in sections of \`stride\` words.
  let first = starts[2u * params.stride + firstPosition];
  let depth = starts[params.stride + position];`
    : '  let first = firstPosition + 1u - min(params.window, firstPosition + 1u);'
}
  let begin = first + group.y * params.splitKeys;
  let end = min(lastPosition + 1u, begin + params.splitKeys);
  var top = LOWEST;
  var weight = 0.0;
${sums.map((i) => `  var acc${i} = vec4(0.0);`).join('\n')}
  for (var k0 = begin; k0 < end; k0 += ${keys}u) {
    workgroupBarrier();
    for (var i = lid; i < ${keys}u * QUADS; i += ${threads}u) {
      let p = k0 + i / QUADS;
      var quad = vec4(0.0);
      if (p < end) { quad = kQuad(sequence, kvHead, p, (i % QUADS) * 4u); }
      tile[(i / QUADS) * TILE + i % QUADS] = quad;
    }
    workgroupBarrier();
    for (var j = lane; j < ${keys}u; j += ${lanes}u) {
      var score = 0.0;
      for (var c = 0u; c < QUADS; c++) { score += dot(queries[mine * QUADS + c], tile[j * TILE + c]); }
      let p = k0 + j;
      let seen = ${
        forest
          ? 'p < end && p <= position && position < starts[p] && depth - starts[params.stride + p] < params.window'
          : 'p < end && p <= position && position - p < params.window'
      };
      scores[mine * ${keys}u + j] = select(LOWEST, score, seen);
    }
    workgroupBarrier();
    for (var i = lid; i < ${keys}u * QUADS; i += ${threads}u) {
      let p = k0 + i / QUADS;
      var quad = vec4(0.0);
      if (p < end) { quad = vQuad(sequence, kvHead, p, (i % QUADS) * 4u); }
      tile[(i / QUADS) * TILE + i % QUADS] = quad;
    }
    let before = top;
    for (var j = 0u; j < ${keys}u; j++) { top = max(top, scores[mine * ${keys}u + j]); }
    for (var j = lane; j < ${keys}u; j += ${lanes}u) {
      let score = scores[mine * ${keys}u + j];
      weights[mine * ${keys}u + j] = select(0.0, exp(score - top), score > LOWEST);
    }
    let shrink = exp(max(before - top, -100.0));
    weight *= shrink;
${sums.map((i) => `    acc${i} *= shrink;`).join('\n')}
    workgroupBarrier();
    for (var j = 0u; j < ${keys}u; j++) {
      let w = weights[mine * ${keys}u + j];
      weight += w;
${sums.map((i) => `      ${guard(i)}{ acc${i} += w * tile[j * TILE + lane + ${i * lanes}u]; }`).join('\n')}
    }
  }
  if (firstRow + mine < rowCount) {
    ${end.begin}
${sums
  .map(
    (i) => `    ${guard(i)}{
      let c = (lane + ${i * lanes}u) * 4u;
      let y = acc${i}${end.factor};
      for (var d = 0u; d < min(4u, D - c); d++) { out[base + c + d] = y[d]; }
    }`,
  )
  .join('\n')}
  }
}`;
}

/** Merges the partial sums of splits. One workgroup of 64 threads per sequence, key head and row. */
export const combineKernel = variants((headDim: number) =>
  defineKernel({
    name: `attention.${headDim}.combine`,
    buffers: { sums: read('f32'), softmax: read('vec2<f32>'), out: write('f32') },
    params: { items: 'u32', tokens: 'u32', heads: 'u32', kvHeads: 'u32', splits: 'u32' },
    body: /* wgsl */ `
${LINEAR_GROUP}
const D = ${headDim}u;
@compute @workgroup_size(64)
fn main(
  @builtin(local_invocation_index) lid: u32,
  @builtin(workgroup_id) group: vec3<u32>,
  @builtin(num_workgroups) groups: vec3<u32>,
) {
  let item = linearGroup(group, groups);
  if (item >= params.items) { return; }
  let share = params.heads / params.kvHeads;
  let rowCount = params.tokens * share;
  let row = item % rowCount;
  let key = item / rowCount;
  let first = key * params.splits * rowCount + row;
  var top = -1e30;
  for (var s = 0u; s < params.splits; s++) { top = max(top, softmax[first + s * rowCount].x); }
  var weight = 0.0;
  for (var s = 0u; s < params.splits; s++) {
    let part = softmax[first + s * rowCount];
    weight += part.y * exp(max(part.x - top, -100.0));
  }
  let token = (key / params.kvHeads) * params.tokens + row / share;
  let head = (key % params.kvHeads) * share + row % share;
  for (var d = lid; d < D; d += 64u) {
    var sum = 0.0;
    for (var s = 0u; s < params.splits; s++) {
      let slot = first + s * rowCount;
      sum += sums[slot * D + d] * exp(max(softmax[slot].x - top, -100.0));
    }
    out[(token * params.heads + head) * D + d] = sum / weight;
  }
}`,
  }),
);

/**
 * Writes new keys and values [batch·tokens, kvHeads·headDim] as f16 into caches [batch, kvHeads, capacity, headDim], two to a word;
 * `count` words of each. With `half` they are f16 already.
 */
export const appendKernel = variants((headDim: number, half: boolean) => {
  const type = half ? 'u32' : 'f32';
  return defineKernel({
    name: `cacheAppend.${headDim}${half ? '.half' : ''}`,
    buffers: {
      newKeys: read(type),
      newValues: read(type),
      starts: read('u32'),
      keys: write('u32'),
      values: write('u32'),
    },
    params: { count: 'u32', tokens: 'u32', kvHeads: 'u32', start: 'u32', ragged: 'u32', capacity: 'u32' },
    body: /* wgsl */ `
${HALF_BITS}
const D = ${headDim}u;
const WORDS = ${cacheWords(headDim)}u;
@compute @workgroup_size(256)
fn main(@builtin(global_invocation_id) id: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>) {
  let stride = groups.x * 256u;
  for (var i = id.x; i < params.count; i += stride) {
    let word = i % WORDS;
    let vector = i / WORDS;
    let head = vector % params.kvHeads;
    let row = vector / params.kvHeads;
    let sequence = row / params.tokens;
    var position = params.start + row % params.tokens;
    if (params.ragged != 0u) { position = starts[sequence] + row % params.tokens; }
    let to = ((sequence * params.kvHeads + head) * params.capacity + position) * WORDS + word;
${
  half
    ? `    keys[to] = newKeys[i];
    values[to] = newValues[i];`
    : `    let at = vector * D + 2u * word;
    var second = vec2(0.0);
    if (2u * word + 1u < D) { second = vec2(newKeys[at + 1u], newValues[at + 1u]); }
    keys[to] = packHalves(newKeys[at], second.x);
    values[to] = packHalves(newValues[at], second.y);`
}
  }
}`,
  });
});
