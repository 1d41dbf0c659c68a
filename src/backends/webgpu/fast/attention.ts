// Attention of one new token per sequence, in one dispatch: qk-norm and RoPE of the new q and k, appending k and v to the
// cache, and grouped-query attention over it with an online softmax: scores are never stored.
//
// A workgroup takes the query heads of one key/value head (up to four) and one of `splits` ranges of keys, so that every key and
// value is read once: 4·headDim bytes per key and kv head. A key lies on headDim/8 lanes, 16 bytes each; teams of 32 lanes
// take 32/(headDim/8) keys at once, UNROLL times before they update the maximum. The ranges' results are combined by the
// kernel after this one (activations.ts, source `attention`).
import { defineKernel, read, write, type BufferSpec, type Kernel } from '../kernel.js';

/** Teams of 32 lanes per workgroup. */
const TEAMS = 4;
const TEAM = 32;
/** Keys a lane group takes before the running maximum is updated. */
const UNROLL = 4;

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
}

type Buffers = 'qkv' | 'qNorm' | 'kNorm' | 'rope' | 'positions' | 'keys' | 'values' | 'out' | 'stats';

/** Query heads per workgroup: the largest divisor of the group that keeps the accumulators in registers. */
export function headsPerGroup({ heads, kvHeads }: { heads: number; kvHeads: number }): number {
  const group = heads / kvHeads;
  for (const n of [4, 3, 2]) if (group % n === 0) return n;
  return 1;
}

/** Workgroups: x = head blocks, y = splits, z = batch. */
export const attentionGroups = (v: AttentionVariant, batch: number): [number, number, number] => [
  v.heads / headsPerGroup(v),
  v.splits,
  batch,
];

/**
 * Buffers: qkv [batch, (heads + 2·kvHeads)·headDim] f32; qNorm, kNorm [headDim]; rope [positions, rotaryDim/2] (cos, sin);
 * positions [batch]: tokens already in each cache; keys, values [batch, kvHeads, capacity, headDim] f16; out [batch, heads,
 * splits, headDim] f32, to be weighted; stats [batch, heads, splits] (maximum, sum of exponentials).
 */
export function decodeAttentionKernel(v: AttentionVariant): Kernel<Buffers, 'capacity' | 'scale' | 'eps'> {
  const { headDim, rotaryDim, splits } = v;
  const q = headsPerGroup(v);
  const lanes = headDim / 8;
  const perTeam = TEAM / lanes;
  const each = (n: number, f: (i: number) => string, sep = '\n'): string =>
    Array.from({ length: n }, (_, i) => f(i)).join(sep);
  const masks = [16, 8, 4, 2, 1].filter((m) => m < lanes);
  const norms: Partial<Record<Buffers, BufferSpec>> = v.qkNorm ? { qNorm: read('f32'), kNorm: read('f32') } : {};
  const group = TEAMS * perTeam * UNROLL;
  // A thread's frequencies are all the same one: its angle is asked for before anything else.
  const steady = (TEAM * TEAMS) % (rotaryDim / 2) === 0;
  return defineKernel<Buffers, 'capacity' | 'scale' | 'eps'>({
    name: `attention.decode.d${headDim}.q${q}.s${splits}`,
    features: v.shuffle ? ['subgroups'] : [],
    buffers: {
      qkv: read('f32'),
      ...norms,
      rope: read('vec2<f32>'),
      positions: read('u32'),
      keys: write('vec4<u32>'),
      values: write('vec4<u32>'),
      out: write('f32'),
      stats: write('vec2<f32>'),
    } as Record<Buffers, BufferSpec>,
    params: { capacity: 'u32', scale: 'f32', eps: 'f32' },
    body: /* wgsl */ `
const D = ${headDim}u;
const LANES = ${lanes}u;
const HEADS = ${v.heads}u;
const KV = ${v.kvHeads}u;
const WIDTH = ${(v.heads + 2 * v.kvHeads) * headDim}u;
// The new q heads, then the new k, then v; then, after the walk over the keys, each lane group's results.
var<workgroup> head: array<f32, ${(q + 2) * headDim}>;
var<workgroup> squares: array<f32, ${q + 1}>;
var<workgroup> parts: array<f32, ${TEAMS * perTeam * headDim * q}>;
var<workgroup> tops: array<f32, ${TEAMS * perTeam * q}>;
var<workgroup> totals: array<f32, ${TEAMS * perTeam * q}>;
${v.shuffle ? '' : `var<workgroup> dots: array<f32, ${TEAM * TEAMS}>;`}

fn half8(w: vec4<u32>) -> array<vec4<f32>, 2> {
  return array<vec4<f32>, 2>(vec4(unpack2x16float(w.x), unpack2x16float(w.y)), vec4(unpack2x16float(w.z), unpack2x16float(w.w)));
}
fn packed(at: u32) -> vec4<u32> {
  return vec4(pack2x16float(vec2(head[at], head[at + 1u])), pack2x16float(vec2(head[at + 2u], head[at + 3u])),
              pack2x16float(vec2(head[at + 4u], head[at + 5u])), pack2x16float(vec2(head[at + 6u], head[at + 7u])));
}

@compute @workgroup_size(${TEAM * TEAMS})
fn main(@builtin(workgroup_id) wg: vec3<u32>, @builtin(local_invocation_index) local: u32) {
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

  let cache = (b * KV + kv) * params.capacity;
  // The first keys and values are on their way while the new heads are prepared.
  let slot = local / LANES;
  let part = local % LANES;
${each(UNROLL, (u) => `  var kw${u}: vec4<u32>; var vw${u}: vec4<u32>;`)}
  if (low < high) {
${each(UNROLL, (u) => `    { let at = (cache + min(low + slot + ${u * TEAMS * perTeam}u, position)) * LANES + part; kw${u} = keys[at]; vw${u} = values[at]; }`)}
  }

${steady ? `  let turn = rope[position * ${rotaryDim / 2}u + local % ${rotaryDim / 2}u];` : ''}
  // New heads, normalised and rotated.
  for (var i = local; i < ${(q + 2) * headDim}u; i += ${TEAM * TEAMS}u) {
    let h = i / D;
    let source = select(select(HEADS + KV + kv, HEADS + kv, h == ${q}u), firstHead + h, h < ${q}u);
    head[i] = qkv[b * WIDTH + source * D + i % D];
  }
  workgroupBarrier();
${
  v.qkNorm
    ? /* wgsl */ `
  if (local < ${q + 1}u) {
    var s = 0.0;
    for (var d = 0u; d < D; d++) { let e = head[local * D + (d + local * 33u) % D]; s = fma(e, e, s); }
    squares[local] = inverseSqrt(s / f32(D) + params.eps);
  }
  workgroupBarrier();
  for (var i = local; i < ${(q + 1) * headDim}u; i += ${TEAM * TEAMS}u) {
    let h = i / D;
    head[i] *= squares[h] * select(kNorm[i % D], qNorm[i % D], h < ${q}u);
  }
  workgroupBarrier();`
    : ''
}
  for (var i = local; i < ${((q + 1) * rotaryDim) / 2}u; i += ${TEAM * TEAMS}u) {
    let h = i / ${rotaryDim / 2}u; let d = i % ${rotaryDim / 2}u;
${steady ? '' : `    let turn = rope[position * ${rotaryDim / 2}u + d];`}
    let x = head[h * D + d]; let y = head[h * D + d + ${rotaryDim / 2}u];
    head[h * D + d] = x * turn.x - y * turn.y;
    head[h * D + d + ${rotaryDim / 2}u] = y * turn.x + x * turn.y;
  }
  workgroupBarrier();
  if (owner && local < 2u * LANES) {
    // Every workgroup of this key/value head that owns the new key writes the same bytes.
    let at = (cache + position) * LANES + local % LANES;
    if (local < LANES) { keys[at] = packed(${q}u * D + local * 8u); }
    else { values[at] = packed(${q + 1}u * D + (local - LANES) * 8u); }
  }

${each(
  q,
  (
    h,
  ) => `  let qa${h} = vec4(head[${h}u * D + part * 8u], head[${h}u * D + part * 8u + 1u], head[${h}u * D + part * 8u + 2u], head[${h}u * D + part * 8u + 3u]) * params.scale;
  let qb${h} = vec4(head[${h}u * D + part * 8u + 4u], head[${h}u * D + part * 8u + 5u], head[${h}u * D + part * 8u + 6u], head[${h}u * D + part * 8u + 7u]) * params.scale;
  var oa${h} = vec4<f32>(); var ob${h} = vec4<f32>(); var m${h} = -1e30; var l${h} = 0.0;`,
)}
  let newKey = packed(${q}u * D + part * 8u);
  let newValue = packed(${q + 1}u * D + part * 8u);
  // A bound that is the same for all lanes: barriers and shuffles below need it.
  for (var base = low; base < low + span; base += ${group}u) {
    if (base >= high) { break; }
    let key = base + slot;
${each(
  UNROLL,
  (u) => `    let k${u} = key + ${u * TEAMS * perTeam}u; let in${u} = k${u} < high;
    if (k${u} == position) { kw${u} = newKey; vw${u} = newValue; }`,
)}
    // Past the end there may be anything, and nothing times infinity is not nothing.
    if (base + ${group}u > high) {
${each(UNROLL, (u) => `      if (!in${u}) { vw${u} = vec4<u32>(); }`)}
    }
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
${each(UNROLL, (u) => `      { let at = (cache + min(k${u} + ${group}u, position)) * LANES + part; kw${u} = keys[at]; vw${u} = values[at]; }`)}
    }
${each(
  q,
  (h) => `    { let top = max(max(max(s${h}_0, s${h}_1), max(s${h}_2, s${h}_3)), m${h});
      let keep = exp(m${h} - top);
      l${h} *= keep; oa${h} *= keep; ob${h} *= keep; m${h} = top;
${each(UNROLL, (u) => `      { let p = select(0.0, exp(s${h}_${u} - top), in${u}); l${h} += p; oa${h} = fma(vec4(p), vf${u}[0], oa${h}); ob${h} = fma(vec4(p), vf${u}[1], ob${h}); }`)}
    }`,
)}
  }

  // Combine the lane groups.
  if (part == 0u) {
${each(q, (h) => `    tops[slot * ${q}u + ${h}u] = m${h}; totals[slot * ${q}u + ${h}u] = l${h};`)}
  }
  workgroupBarrier();
${each(
  q,
  (h) => `  {
    var top = -1e30;
    for (var i = 0u; i < ${TEAMS * perTeam}u; i++) { top = max(top, tops[i * ${q}u + ${h}u]); }
    let weight = exp(m${h} - top);
    let at = (${h * TEAMS * perTeam}u + slot) * D + part * 8u;
${each(4, (i) => `    parts[at + ${i}u] = oa${h}[${i}] * weight; parts[at + ${i + 4}u] = ob${h}[${i}] * weight;`)}
    if (local == ${h}u) {
      var sum = 0.0;
      for (var i = 0u; i < ${TEAMS * perTeam}u; i++) { sum += totals[i * ${q}u + ${h}u] * exp(tops[i * ${q}u + ${h}u] - top); }
      stats[(b * HEADS + firstHead + ${h}u) * ${splits}u + wg.y] = vec2(top, sum);
    }
  }`,
)}
  workgroupBarrier();
  for (var i = local; i < ${q * headDim}u; i += ${TEAM * TEAMS}u) {
    let h = i / D; let d = i % D;
    var sum = 0.0;
    for (var s = 0u; s < ${TEAMS * perTeam}u; s++) { sum += parts[(h * ${TEAMS * perTeam}u + s) * D + d]; }
    out[((b * HEADS + firstHead + h) * ${splits}u + wg.y) * D + d] = sum;
  }
}`,
  });
}

/** WGSL: the sum of `name` over the lanes that share a key, in all of them. */
function sumLanes(v: AttentionVariant, name: string, lanes: number, masks: readonly number[]): string {
  if (v.shuffle) return masks.map((m) => `    ${name} += subgroupShuffleXor(${name}, ${m}u);`).join('\n');
  return `    dots[local] = ${name};
    workgroupBarrier();
    { let home = local & ~${lanes - 1}u; ${name} = 0.0; for (var i = 0u; i < ${lanes}u; i++) { ${name} += dots[home + i]; } }
    workgroupBarrier();`;
}
