// Attention of one new token per sequence, in one dispatch: qk-norm and RoPE of the new q and k, appending k and v to the
// cache, and grouped-query attention over it with an online softmax: scores are never stored.
//
// A workgroup takes the query heads of one key/value head (up to four) and one of `splits` ranges of keys, so that every key and
// value is read once: 4·headDim bytes per key and kv head. A key lies on headDim/8 lanes, 16 bytes each; teams of 32 lanes
// take 32/(headDim/8) keys at once, UNROLL times before they update the maximum. The ranges' results are combined by the
// kernel after this one (activations.ts, source `attention`).
import type { KvGrid } from '../../../ops/backend.js';
import { cacheEntry, turnHeadsWgsl } from './cache-entries.js';
import { defineKernel, read, write, type BufferSpec, type Kernel } from '../kernel.js';

const TEAM = 32;

/** A variant of {@link decodeAttentionKernel}. */
export interface AttentionVariant {
  readonly shuffle: boolean;
  readonly heads: number;
  readonly kvHeads: number;
  /** 16, 32, 64, 128 or 256. */
  readonly headDim: number;
  /** Channels of a head that rotate. */
  readonly rotaryDim: number;
  readonly qkNorm: boolean;
  readonly splits: number;
  /** Keys seen, 0 for all. */
  readonly window: number;
  /** Query heads per workgroup: a divisor of heads / kvHeads. */
  readonly together: number;
  /** Teams of 32 lanes per workgroup. */
  readonly teams: number;
  /** Keys a lane group takes before the running maximum is updated. */
  readonly unroll: number;
  /** Keys and values are codes on a grid per token and head, as kernels/activation-grid.ts lays them out; default f16. */
  readonly grid?: KvGrid | undefined;
  /** Hadamard transform of every head of q and k after RoPE; headDim is a power of two. */
  readonly turn?: boolean;
}

type Buffers = 'qkv' | 'norms' | 'rope' | 'positions' | 'keys' | 'values' | 'out' | 'stats';

/** Workgroups: x = head blocks, y = splits, z = batch. */
export const attentionGroups = (v: AttentionVariant, batch: number): [number, number, number] => [
  v.heads / v.together,
  v.splits,
  batch,
];

/**
 * Buffers: qkv [batch, (heads + 2·kvHeads)·headDim] f32; norms [2, headDim] of q and k; rope [positions, rotaryDim/2] (cos, sin);
 * positions [batch + 1]: tokens already in each cache, then how many the caches hold; keys, values [batch, kvHeads, capacity, headDim] f16, or
 * codes with their low and scale; out [batch, heads, splits, headDim] f32, to be weighted; stats [batch, heads, splits] (maximum, sum of
 * exponentials).
 */
export function decodeAttentionKernel(v: AttentionVariant): Kernel<Buffers, 'scale' | 'eps'> {
  const { headDim, rotaryDim, splits, together: q, teams: TEAMS, unroll: UNROLL, grid, turn = false } = v;
  const threads = TEAM * TEAMS;
  const entry = cacheEntry(headDim, { key: `${q}u * D`, value: `${q + 1}u * D`, threads, grid });
  const lanes = headDim / 8;
  const perTeam = TEAM / lanes;
  const each = (n: number, f: (i: number) => string, sep = '\n'): string =>
    Array.from({ length: n }, (_, i) => f(i)).join(sep);
  const masks = [16, 8, 4, 2, 1].filter((m) => m < lanes);
  const norms: Partial<Record<Buffers, BufferSpec>> = v.qkNorm ? { norms: read('f32') } : {};
  const group = TEAMS * perTeam * UNROLL;
  // A thread's frequencies are all the same one: its angle is asked for before anything else.
  const steady = (TEAM * TEAMS) % (rotaryDim / 2) === 0;
  return defineKernel<Buffers, 'scale' | 'eps'>({
    name: `attention.decode.d${headDim}.q${q}.t${TEAMS}.u${UNROLL}.s${splits}${grid ? `.int${grid.bits}` : ''}${turn ? '.turn' : ''}`,
    features: v.shuffle ? ['subgroups'] : [],
    buffers: {
      qkv: read('f32'),
      ...norms,
      rope: read('vec2<f32>'),
      positions: read('u32'),
      keys: write(entry.type),
      values: write(entry.type),
      out: write('f32'),
      stats: write('vec2<f32>'),
    } as Record<Buffers, BufferSpec>,
    params: { scale: 'f32', eps: 'f32' },
    body: /* wgsl */ `
const D = ${headDim}u;
const LANES = ${lanes}u;
const HEADS = ${v.heads}u;
const KV = ${v.kvHeads}u;
const WIDTH = ${(v.heads + 2 * v.kvHeads) * headDim}u;
// The new q heads, then the new k, then v; then, after the walk over the keys, each lane group's results.
var<workgroup> head: array<vec4<f32>, ${((q + 2) * headDim) / 4}>;
var<workgroup> squares: array<f32, ${q + 1}>;
var<workgroup> parts: array<vec4<f32>, ${(TEAMS * perTeam * headDim * q) / 4}>;
var<workgroup> tops: array<f32, ${TEAMS * perTeam * q}>;
var<workgroup> totals: array<f32, ${TEAMS * perTeam * q}>;
${v.shuffle ? '' : `var<workgroup> dots: array<f32, ${TEAM * TEAMS}>;`}

${entry.declarations}

@compute @workgroup_size(${TEAM * TEAMS})
fn main(@builtin(workgroup_id) wg: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>,
        @builtin(local_invocation_index) local: u32) {
  let b = wg.z;
  let firstHead = wg.x * ${q}u;
  let kv = firstHead / (HEADS / KV);
  let position = positions[b];
  let begin = ${v.window > 0 ? `select(0u, position + 1u - ${v.window}u, position + 1u > ${v.window}u)` : '0u'};
  // Keys begin … position: the last is the new one. Ranges of ${group} keys at least.
  let count = position + 1u - begin;
  let span = (count + ${splits * group - 1}u) / ${splits * group}u * ${group}u;
  let low = begin + wg.y * span;
  let high = min(low + span, position + 1u);
  let owner = low <= position && position < low + span;
  if (low > position) {
    // No keys: nothing but to say so.
    if (local < ${q}u) { stats[(b * HEADS + firstHead + local) * ${splits}u + wg.y] = vec2(-1e30, 0.0); }
    return;
  }

  let cache = (b * KV + kv) * positions[groups.z];
  // The first keys and values are on their way while the new heads are prepared.
  let slot = local / LANES;
  let part = local % LANES;
${each(UNROLL, (u) => `  var kw${u}: vec4<u32>; var vw${u}: vec4<u32>;`)}
  if (low < high) {
${each(UNROLL, (u) => `    { let at = cache + min(low + slot + ${u * TEAMS * perTeam}u, position); kw${u} = ${entry.load('keys')}; vw${u} = ${entry.load('values')}; }`)}
  }

${steady ? `  let turn = rope[position * ${rotaryDim / 2}u + local % ${rotaryDim / 2}u];` : ''}
  // New heads, normalised and rotated.
  for (var i = local; i < ${(q + 2) * headDim}u; i += ${TEAM * TEAMS}u) {
    let h = i / D;
    let source = select(select(HEADS + KV + kv, HEADS + kv, h == ${q}u), firstHead + h, h < ${q}u);
    head[i / 4u][i & 3u] = qkv[b * WIDTH + source * D + i % D];
  }
  workgroupBarrier();
${
  v.qkNorm
    ? /* wgsl */ `
${squaresOfHeads(v)}
  workgroupBarrier();
  for (var i = local; i < ${(q + 1) * headDim}u; i += ${TEAM * TEAMS}u) {
    let h = i / D;
    head[i / 4u][i & 3u] *= squares[h] * norms[select(D, 0u, h < ${q}u) + i % D];
  }
  workgroupBarrier();`
    : ''
}
  for (var i = local; i < ${((q + 1) * rotaryDim) / 2}u; i += ${TEAM * TEAMS}u) {
    let h = i / ${rotaryDim / 2}u; let d = i % ${rotaryDim / 2}u;
${steady ? '' : `    let turn = rope[position * ${rotaryDim / 2}u + d];`}
    let low = h * D + d; let up = low + ${rotaryDim / 2}u;
    let x = head[low / 4u][low & 3u]; let y = head[up / 4u][up & 3u];
    head[low / 4u][low & 3u] = x * turn.x - y * turn.y;
    head[up / 4u][up & 3u] = y * turn.x + x * turn.y;
  }
  workgroupBarrier();
${turn ? turnHeadsWgsl(q + 1, threads) : ''}
${entry.prepare}
${entry.store}

${each(
  q,
  (
    h,
  ) => `  let qa${h} = head[(${h}u * D + part * 8u) / 4u] * params.scale; let qb${h} = head[(${h}u * D + part * 8u) / 4u + 1u] * params.scale;
  var oa${h} = vec4<f32>(); var ob${h} = vec4<f32>(); var m${h} = -1e30; var l${h} = 0.0;`,
)}
  let newKey = ${entry.newKey};
  let newValue = ${entry.newValue};
  // A bound that is the same for all lanes: barriers and shuffles below need it.
  for (var base = low; base < low + span; base += ${group}u) {
    if (base >= high) { break; }
    // The new key, also for lanes past the end: there may be anything, and nothing times infinity is not nothing.
    let key = base + slot;
${each(
  UNROLL,
  (u) => `    let k${u} = key + ${u * TEAMS * perTeam}u; let in${u} = k${u} < high;
    if (k${u} >= position) { kw${u} = newKey; vw${u} = newValue; }`,
)}
${each(UNROLL, (u) => `    let kf${u} = half8(kw${u});`)}
${each(q, (h) =>
  each(
    UNROLL,
    (u) => `    var s${h}_${u} = dot(qa${h}, kf${u}[0]) + dot(qb${h}, kf${u}[1]);
${sumLanes(v, `s${h}_${u}`, lanes, masks)}
    s${h}_${u} = select(-1e30, s${h}_${u}, in${u});`,
  ),
)}
${each(UNROLL, (u) => `    let vf${u} = half8(vw${u});`)}
    if (base + ${group}u < high) {
${each(UNROLL, (u) => `      { let at = cache + min(k${u} + ${group}u, position); kw${u} = ${entry.load('keys')}; vw${u} = ${entry.load('values')}; }`)}
    }
${each(
  q,
  (h) => `    { var top = m${h}; ${each(UNROLL, (u) => `top = max(top, s${h}_${u});`, ' ')}
      let keep = exp(m${h} - top);
      l${h} *= keep; oa${h} *= keep; ob${h} *= keep; m${h} = top;
${each(UNROLL, (u) => `      { let p = select(0.0, exp(s${h}_${u} - top), in${u}); l${h} += p; oa${h} = fma(vec4(p), vf${u}[0], oa${h}); ob${h} = fma(vec4(p), vf${u}[1], ob${h}); }`)}
    }`,
)}
  }

  // Combine the lane groups.
  if (part == 0u) {
${each(q, (h) => `    tops[slot * ${q}u + ${h}u] = m${h};`)}
  }
  workgroupBarrier();
  var mine = 0.0;
${each(
  q,
  (h) => `  {
    var top = -1e30;
    for (var i = 0u; i < ${TEAMS * perTeam}u; i++) { top = max(top, tops[i * ${q}u + ${h}u]); }
    let weight = exp(m${h} - top);
    let at = ((${h * TEAMS * perTeam}u + slot) * D + part * 8u) / 4u;
    parts[at] = oa${h} * weight; parts[at + 1u] = ob${h} * weight;
    if (part == 0u) { totals[slot * ${q}u + ${h}u] = l${h} * weight; }
    if (local == ${h}u) { mine = top; }
  }`,
)}
  workgroupBarrier();
  if (local < ${q}u) {
    var sum = 0.0;
    for (var i = 0u; i < ${TEAMS * perTeam}u; i++) { sum += totals[i * ${q}u + local]; }
    stats[(b * HEADS + firstHead + local) * ${splits}u + wg.y] = vec2(mine, sum);
  }
  for (var i = local; i < ${q * headDim}u; i += ${TEAM * TEAMS}u) {
    let h = i / D; let d = i % D;
    var sum = 0.0;
    for (var s = 0u; s < ${TEAMS * perTeam}u; s++) { let at = (h * ${TEAMS * perTeam}u + s) * D + d; sum += parts[at / 4u][at & 3u]; }
    out[((b * HEADS + firstHead + h) * ${splits}u + wg.y) * D + d] = sum;
  }
}`,
  });
}

/** WGSL: the factors of qk-norm, a team of lanes per head: one lane per head alone would wait a microsecond on its own additions. */
function squaresOfHeads({ headDim, shuffle, teams, together: q }: AttentionVariant): string {
  if (!shuffle)
    return `  if (local < ${q + 1}u) {
    var s = 0.0;
    for (var d = 0u; d < D; d++) { let at = local * D + (d + local * 33u) % D; let e = head[at / 4u][at & 3u]; s = fma(e, e, s); }
    squares[local] = inverseSqrt(s / f32(D) + params.eps);
  }`;
  // Unrolled over the heads of a team, since shuffles stand in no branch.
  const rounds = Array.from({ length: Math.ceil((q + 1) / teams) }, (_, r) => {
    const terms = Array.from(
      { length: Math.ceil(headDim / TEAM) },
      (_, i) =>
        `{ let at = h * D + min(lane + ${i * TEAM}u, D - 1u); let e = head[at / 4u][at & 3u]; s += select(0.0, e * e, lane + ${i * TEAM}u < D); }`,
    ).join('\n    ');
    return `  {
    let h = min(local / ${TEAM}u + ${r * teams}u, ${q}u);
    var s = 0.0;
    ${terms}
    ${[16, 8, 4, 2, 1].map((m) => `s += subgroupShuffleXor(s, ${m}u);`).join(' ')}
    if (lane == 0u) { squares[h] = inverseSqrt(s / f32(D) + params.eps); }
  }`;
  });
  return `  let lane = local % ${TEAM}u;
${rounds.join('\n')}`;
}

/** WGSL: the sum of `name` over the lanes that share a key, in all of them. */
function sumLanes(v: AttentionVariant, name: string, lanes: number, masks: readonly number[]): string {
  if (v.shuffle) return masks.map((m) => `    ${name} += subgroupShuffleXor(${name}, ${m}u);`).join('\n');
  return `    dots[local] = ${name};
    workgroupBarrier();
    { let home = local & ~${lanes - 1}u; ${name} = 0.0; for (var i = 0u; i < ${lanes}u; i++) { ${name} += dots[home + i]; } }
    workgroupBarrier();`;
}
