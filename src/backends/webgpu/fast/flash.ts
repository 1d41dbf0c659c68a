// Causal grouped-query attention of many tokens on matrix units: q, k, v and the output in f16, sums and softmax in f32, scores never
// all at once.
//
// A workgroup serves one key head of one sequence and a tile of rows, each subgroup 16 of them; a row is a (token, head) pair, so
// all heads that share keys share their loads. Keys pass in tiles through workgroup memory, the next on its way from memory
// meanwhile: 16 × 32 scores per subgroup leave the units through workgroup memory, two lanes per row make weights 2^(score − top) of
// them, which go back as f16 to be multiplied with the values; the sums stay in the units' registers. Registers can't be scaled row
// by row, so `top` only follows the row's largest score when that exceeds it by more than 2^14 (f16 holds 2^16), which hardly happens
// after the first tile, and all sums then pass through workgroup memory once.
// Operations 4·rows·keys·headDim; bytes of keys and values once per tile of rows, mostly from L2.
import type { GpuLimits } from '../capabilities.js';
import { defineKernel, read, variants, write } from '../kernel.js';
import { narrowWgsl } from './half.js';

/** A variant of {@link flashKernel}. */
export interface FlashVariant {
  /** A multiple of 16, at most 128. */
  readonly headDim: number;
  /** Where keys and values are: rows of f16 beside the queries, a cache, or the rows of a packed forest (attention.ts). */
  readonly source: 'rows' | 'cache' | 'forest';
  /** Subgroups; a tile has 16 rows of each. */
  readonly warps: number;
}

/** Whether the kernel takes heads of a size. */
export const flashTakes = (headDim: number): boolean => headDim % 16 === 0 && headDim <= 128;

/** Rows (tokens × heads per key head) of a tile. */
export const flashRows = ({ warps }: Pick<FlashVariant, 'warps'>): number => 16 * warps;

/** WGSL: a row's word in a section of a forest's table: 0 its end, 1 its position, 2 its root. */
const forestWord = (row: string, section: number): string =>
  `starts[(params.stride * ${section}u + ${row}) / 4u][(${row}) % 4u]`;

/** Keys of a tile. */
const KEYS = 32;
/** Words of 16 bytes in a row of scores, and one against bank conflicts. */
const ROW = KEYS / 4 + 1;

/** Workgroups of eight subgroups from which they are quicker than twice as many of four: the fewest that were measured. */
const BUSY_GROUPS = 512;

/**
 * Subgroups per workgroup for so many rows of each of `keyHeads` key heads. Eight serve twice the rows with each load of keys: a
 * third faster on an H200 from 2048 tokens on (bench/webgpu-prefill.ts --attention), but they need 36 KiB of workgroup memory.
 */
export function flashWarps(rows: number, keyHeads: number, headDim: number, limits: GpuLimits): 4 | 8 {
  const eight = { headDim, source: 'rows', warps: 8 } as const;
  const fits =
    32 * eight.warps <= limits.maxComputeInvocationsPerWorkgroup &&
    flashMemory(eight) <= limits.maxComputeWorkgroupStorageSize;
  return fits && Math.ceil(rows / flashRows(eight)) * keyHeads >= BUSY_GROUPS ? 8 : 4;
}

/** Bytes of workgroup memory. */
const flashMemory = ({ headDim, warps }: FlashVariant): number => {
  const stride = headDim / 8 + 1;
  return 16 * (Math.max(KEYS * stride, warps * 64) + KEYS * stride + warps * 16 * ROW) + 4 * 16 * warps + 4;
};

/**
 * Workgroups: tiles of rows, 1, batch · kvHeads. Buffers: q and out [batch·tokens, heads·headDim]; k, v rows
 * [batch·stride, kvHeads·headDim] or caches [batch, kvHeads, stride, headDim]; starts [batch] when `ragged`. A forest is one
 * sequence of `tokens` rows, starts its table (forestTable) with sections of `stride` words.
 */
export const flashKernel = variants(({ headDim, source, warps }: FlashVariant) => {
  const each = (n: number, f: (i: number) => string): string => Array.from({ length: n }, (_, i) => f(i)).join('\n');
  const forest = source === 'forest';
  const threads = 32 * warps;
  const rows = 16 * warps;
  const vectors = headDim / 8;
  const parts = headDim / 16;
  const stride = vectors + 1;
  const loads = Math.ceil((KEYS * vectors) / threads);
  const guard = (i: number): string =>
    (i + 1) * threads <= KEYS * vectors ? '' : `if (local + ${i * threads}u < ${KEYS * vectors}u) `;
  const load = each(
    loads,
    (i) => `${guard(i)}{
      let i = local + ${i * threads}u;
      let p = min(k0 + i / ${vectors}u, end - 1u);
      let at = ${source === 'cache' ? '(keyHead * params.stride + p)' : '((sequence * params.stride + p) * params.kvHeads + kvHead)'} * ${vectors}u + i % ${vectors}u;
      rk${i} = k[at];
      rv${i} = v[at];
    }`,
  );
  const put = each(
    loads,
    (i) =>
      `    ${guard(i)}{ let i = local + ${i * threads}u; let at = (i / ${vectors}u) * ${stride}u + i % ${vectors}u; tileK[at] = rk${i}; tileV[at] = rv${i}; }`,
  );
  // Queries pass through the subgroup's rows of scores, 64 channels at a time.
  const portions = Array.from({ length: Math.ceil(headDim / 64) }, (_, p) => ({
    begin: 64 * p,
    width: Math.min(64, headDim - 64 * p),
  }));
  return defineKernel({
    name: `flash.${headDim}.${source}.${rows}rows`,
    features: ['f16', 'subgroups', 'subgroup-matrix'],
    buffers: {
      q: read('vec4<u32>'),
      k: read('vec4<u32>'),
      v: read('vec4<u32>'),
      starts: read(forest ? 'vec4<u32>' : 'u32'),
      out: write('vec2<u32>'),
    },
    params: {
      tokens: 'u32',
      heads: 'u32',
      kvHeads: 'u32',
      start: 'u32',
      ragged: 'u32',
      window: 'u32',
      stride: 'u32',
      scale: 'f32',
    },
    body: /* wgsl */ `
${narrowWgsl({ f16: true })}
const LOWEST = -1e30;
// Beyond this, in powers of two, weights are scaled anew.
const GROWTH = 14.0;
var<workgroup> tileK: array<vec4<u32>, ${Math.max(KEYS * stride, warps * 64)}>;
var<workgroup> tileV: array<vec4<u32>, ${KEYS * stride}>;
var<workgroup> scores: array<vec4<u32>, ${warps * 16 * ROW}>;
var<workgroup> factors: array<f32, ${rows}>;
var<workgroup> grown: u32;

@compute @workgroup_size(${threads})
fn main(
  @builtin(workgroup_id) group: vec3<u32>,
  @builtin(num_workgroups) groups: vec3<u32>,
  @builtin(local_invocation_index) local: u32,
  @builtin(subgroup_id) warp: u32,
  @builtin(subgroup_invocation_id) lane: u32,
) {
  let keyHead = group.z;
  let sequence = keyHead / params.kvHeads;
  let kvHead = keyHead % params.kvHeads;
  let share = params.heads / params.kvHeads;
  let rowCount = params.tokens * share;
  // The last rows see the most keys: they begin first.
  let firstRow = (groups.x - 1u - group.x) * ${rows}u;
  var start = params.start;
${forest ? '' : '  if (params.ragged != 0u) { start = starts[sequence]; }'}
  let firstPosition = start + firstRow / share;
  let lastPosition = start + min(firstRow + ${rows - 1}u, rowCount - 1u) / share;
${
  forest
    ? `  // From the root of the first row's tree, in whole words of the table.
  let begin = ${forestWord('firstPosition', 2)} & ~3u;`
    : '  let begin = firstPosition + 1u - min(params.window, firstPosition + 1u);'
}
  let end = lastPosition + 1u;
  let base = warp * ${16 * ROW}u;
${portions
  .map(
    ({ begin, width }) => `  for (var i = lane; i < ${2 * width}u; i += 32u) {
    let row = min(firstRow + warp * 16u + i / ${width / 8}u, rowCount - 1u);
    let at = ((sequence * params.tokens + row / share) * params.heads + kvHead * share + row % share) * ${vectors}u;
    scores[base + (i / ${width / 8}u) * ${ROW}u + i % ${width / 8}u] = q[at + ${begin / 8}u + i % ${width / 8}u];
  }
  workgroupBarrier();
${each(width / 16, (i) => `  let q${begin / 16 + i} = subgroupMatrixLoad<subgroup_matrix_left<f16, 16, 16>, row_major>(&scores, base + ${2 * i}u, ${ROW}u);`)}
  workgroupBarrier();`,
  )
  .join('\n')}
  // Two lanes per row, 16 keys each.
  let mine = lane / 2u;
  let half = lane % 2u;
  let position = start + min(firstRow + warp * 16u + mine, rowCount - 1u) / share;
${forest ? `  let depth = ${forestWord('position', 1)};` : ''}
  // Scores count in powers of two.
  let scale = params.scale * 1.4426950408889634;
  var top = LOWEST;
  var weight = 0.0;
${each(parts, (d) => `  var o${d}: subgroup_matrix_result<f32, 16, 16>;`)}
${each(loads, (i) => `  var rk${i}: vec4<u32>; var rv${i}: vec4<u32>;`)}
  { let k0 = begin;
${load} }
  for (var first = begin; first < end; first += ${KEYS}u) {
${put}
    if (local == 0u) { grown = 0u; }
    workgroupBarrier();
    if (first + ${KEYS}u < end) { let k0 = first + ${KEYS}u;
${load} }
    var s0 = subgroup_matrix_result<f32, 16, 16>();
    var s1 = subgroup_matrix_result<f32, 16, 16>();
${each(
  parts,
  (d) => `    {
      let a = subgroupMatrixLoad<subgroup_matrix_right<f16, 16, 16>, col_major>(&tileK, ${2 * d}u, ${stride}u);
      let b = subgroupMatrixLoad<subgroup_matrix_right<f16, 16, 16>, col_major>(&tileK, ${16 * stride + 2 * d}u, ${stride}u);
      s0 = subgroupMatrixMultiplyAccumulate(q${d}, a, s0);
      s1 = subgroupMatrixMultiplyAccumulate(q${d}, b, s1);
    }`,
)}
    subgroupMatrixStore<row_major>(&scores, base, s0, ${ROW}u);
    subgroupMatrixStore<row_major>(&scores, base + 4u, s1, ${ROW}u);
    workgroupBarrier();
    let at = base + mine * ${ROW}u + half * 4u;
${each(4, (i) => `    var v${i} = bitcast<vec4<f32>>(scores[at + ${i}u]) * scale;`)}
${
  forest
    ? `    {
      let word = first / 4u + half * 4u;
      let p = vec4(first + half * 16u) + vec4(0u, 1u, 2u, 3u);
${each(4, (i) => `      v${i} = select(vec4(LOWEST), v${i}, (p + ${4 * i}u <= vec4(position)) & (vec4(position) < starts[word + ${i}u]));`)}
      if (params.window < params.tokens) {
        let section = params.stride / 4u;
${each(4, (i) => `        v${i} = select(vec4(LOWEST), v${i}, vec4(depth) - starts[section + word + ${i}u] < vec4(params.window));`)}
      }
    }`
    : `    if (first + ${KEYS - 1}u > firstPosition || lastPosition - first >= params.window) {
      let p = vec4(first + half * 16u) + vec4(0u, 1u, 2u, 3u);
      // Keys before the window and after the position, both at once: differences below 0 are large.
${each(4, (i) => `      v${i} = select(vec4(LOWEST), v${i}, vec4(position) - p - ${4 * i}u < vec4(min(params.window, position + 1u)));`)}
    }`
}
    let quad = max(max(v0, v1), max(v2, v3));
    var most = max(max(quad.x, quad.y), max(quad.z, quad.w));
    most = max(most, subgroupShuffleXor(most, 1u));
    if (most > top + GROWTH) {
      let factor = exp2(max(top - most, -126.0));
      top = most;
      if (weight > 0.0) { grown = 1u; }
      weight *= factor;
      factors[warp * 16u + mine] = factor;
    } else {
      factors[warp * 16u + mine] = 1.0;
    }
${each(
  4,
  (i) => `    v${i} = select(vec4(0.0), exp2(v${i} - top), v${i} > vec4(LOWEST));
    weight += dot(v${i}, vec4(1.0));`,
)}
    // Each lane's weights replace the first half of its scores.
    scores[at] = vec4(narrow(v0.xy), narrow(v0.zw), narrow(v1.xy), narrow(v1.zw));
    scores[at + 1u] = vec4(narrow(v2.xy), narrow(v2.zw), narrow(v3.xy), narrow(v3.zw));
    if (workgroupUniformLoad(&grown) != 0u) {
      // The keys have served: sums pass through their tile.
${each(
  parts,
  (d) => `      subgroupMatrixStore<row_major>(&tileK, warp * 64u, o${d}, 4u);
      workgroupBarrier();
      for (var i = lane; i < 64u; i += 32u) {
        tileK[warp * 64u + i] = bitcast<vec4<u32>>(bitcast<vec4<f32>>(tileK[warp * 64u + i]) * factors[warp * 16u + i / 4u]);
      }
      workgroupBarrier();
      o${d} = subgroupMatrixLoad<subgroup_matrix_result<f32, 16, 16>, row_major>(&tileK, warp * 64u, 4u);
      workgroupBarrier();`,
)}
    }
    let w0 = subgroupMatrixLoad<subgroup_matrix_left<f16, 16, 16>, row_major>(&scores, base, ${ROW}u);
    let w1 = subgroupMatrixLoad<subgroup_matrix_left<f16, 16, 16>, row_major>(&scores, base + 4u, ${ROW}u);
${each(
  parts,
  (d) => `    {
      let a = subgroupMatrixLoad<subgroup_matrix_right<f16, 16, 16>, row_major>(&tileV, ${2 * d}u, ${stride}u);
      let b = subgroupMatrixLoad<subgroup_matrix_right<f16, 16, 16>, row_major>(&tileV, ${16 * stride + 2 * d}u, ${stride}u);
      o${d} = subgroupMatrixMultiplyAccumulate(w0, a, o${d});
      o${d} = subgroupMatrixMultiplyAccumulate(w1, b, o${d});
    }`,
)}
    workgroupBarrier();
  }
  weight += subgroupShuffleXor(weight, 1u);
  factors[warp * 16u + mine] = 1.0 / weight;
${each(
  parts,
  (d) => `  subgroupMatrixStore<row_major>(&tileK, warp * 64u, o${d}, 4u);
  workgroupBarrier();
  for (var i = lane; i < 64u; i += 32u) {
    let row = firstRow + warp * 16u + i / 4u;
    if (row < rowCount) {
      let y = bitcast<vec4<f32>>(tileK[warp * 64u + i]) * factors[warp * 16u + i / 4u];
      let to = ((sequence * params.tokens + row / share) * params.heads + kvHead * share + row % share) * ${headDim / 4}u;
      out[to + ${4 * d}u + i % 4u] = vec2(narrow(y.xy), narrow(y.zw));
    }
  }
  workgroupBarrier();`,
)}
}`,
  });
});
