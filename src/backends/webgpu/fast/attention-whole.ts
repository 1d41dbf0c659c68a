// Attention of one new token over short contexts, one query head per workgroup, from the new q, k and v to the input of o's product:
// qk-norm and RoPE, the cache, an online softmax over all keys, then o's transform and the normalised f16 chunks that gemv.ts
// reads. One dispatch instead of two (attention.ts and what combines its parts): up to some thousand keys a dispatch costs
// more than the keys, of which a head reads 4·headDim bytes each at the rate of one multiprocessor.
//
// Teams of 32 lanes take 32/(headDim/8) keys at once, as in attention.ts, and the next ones are on their way meanwhile. The teams'
// results meet in workgroup memory; the head is a slice of 128 channels, whose rotations run as in activations.ts, their tables
// on their way from the very start.
import { defineKernel, read, write, type BufferSpec, type Kernel } from '../kernel.js';
import { SLICE, entries, memory, pack, turns } from './activations.js';

const TEAM = 32;
/** Channels per head that the kernel takes: a slice. */
export const WHOLE_HEAD = SLICE;
const D = WHOLE_HEAD;
/** Lanes per key, 16 bytes each. */
const LANES = D / 8;
const PER_TEAM = TEAM / LANES;

/** A variant of {@link wholeAttentionKernel}. */
export interface WholeAttentionVariant {
  readonly shuffle: boolean;
  readonly heads: number;
  readonly kvHeads: number;
  /** Channels of a head that rotate by position: a divisor of 128, at least 8. */
  readonly rotaryDim: number;
  readonly qkNorm: boolean;
  /** Keys seen, 0 for all. */
  readonly window: number;
  /** Teams of 32 lanes per workgroup: at least 8. */
  readonly teams: number;
  /** Keys a lane group takes before the running maximum is updated. */
  readonly unroll: number;
  /** Pairs of rotations of o's transform. */
  readonly stages: number;
}

type Buffers = 'qkv' | 'norms' | 'rope' | 'positions' | 'keys' | 'values' | 'gain' | 'table' | 'x' | 'factors';

/** Results that meet in workgroup memory. */
const slotsOf = ({ shuffle, teams }: WholeAttentionVariant): number => (shuffle ? teams : teams * PER_TEAM);

/** Bytes of workgroup memory of a variant. */
export function wholeMemory(v: WholeAttentionVariant): number {
  const threads = v.teams * TEAM;
  const words = 5 * D + slotsOf(v) * (D + 2) + 2 * D + (v.qkNorm ? (v.shuffle ? 8 : 2 * D) : 0);
  return 4 * (words + (v.shuffle ? 0 : threads + D));
}

const list = (n: number, f: (i: number) => string, separator = '\n'): string =>
  Array.from({ length: n }, (_, i) => f(i)).join(separator);

/**
 * Dispatch: x = heads, y = batch. Buffers as of decodeAttentionKernel and activationKernel: table [stages, channels] or gain [channels], x
 * [batch, channels] f16, factors [batch, channels/32], channels = heads · 128.
 */
export function wholeAttentionKernel(v: WholeAttentionVariant): Kernel<Buffers, 'channels' | 'scale' | 'eps'> {
  const { shuffle, rotaryDim, teams, unroll, stages } = v;
  const threads = teams * TEAM;
  const slots = slotsOf(v);
  const step = teams * PER_TEAM * unroll;
  const slice = { shuffle, stages, threads };
  const buffers: Partial<Record<Buffers, BufferSpec>> = {
    qkv: read('f32'),
    ...(v.qkNorm ? { norms: read('f32') } : {}),
    rope: read('vec2<f32>'),
    positions: read('u32'),
    keys: write('vec4<u32>'),
    values: write('vec4<u32>'),
    ...(stages > 0 ? { table: read('vec4<u32>') } : { gain: read('f32') }),
    x: write('u32'),
    factors: write('vec2<f32>'),
  };
  /** Sums (or whatever `combine` does) over lanes that differ in the bits of `masks`. */
  const over = (
    name: string,
    masks: readonly number[],
    combine = (a: string, b: string): string => `${a} + ${b}`,
  ): string => masks.map((m) => `${name} = ${combine(name, `subgroupShuffleXor(${name}, ${m}u)`)};`).join(' ');
  return defineKernel<Buffers, 'channels' | 'scale' | 'eps'>({
    name: `attention.whole.t${teams}.u${unroll}.s${stages}${v.qkNorm ? '.norm' : ''}`,
    features: shuffle ? ['subgroups'] : [],
    buffers: buffers as Record<Buffers, BufferSpec>,
    params: { channels: 'u32', scale: 'f32', eps: 'f32' },
    body: /* wgsl */ `
const D = ${D}u;
const LANES = ${LANES}u;
const HEADS = ${v.heads}u;
const KV = ${v.kvHeads}u;
const WIDTH = ${(v.heads + 2 * v.kvHeads) * D}u;
// The new q and k before RoPE; all three after.
var<workgroup> raw: array<f32, ${2 * D}>;
var<workgroup> head: array<vec4<f32>, ${(3 * D) / 4}>;
var<workgroup> parts: array<vec4<f32>, ${(slots * D) / 4}>;
var<workgroup> tops: array<f32, ${slots}>;
var<workgroup> totals: array<f32, ${slots}>;
${v.qkNorm ? `var<workgroup> squares: array<f32, ${shuffle ? 8 : 2 * D}>;` : ''}
${shuffle ? '' : `var<workgroup> dots: array<f32, ${threads}>;`}
${memory(slice)}

fn half8(w: vec4<u32>) -> array<vec4<f32>, 2> {
  return array<vec4<f32>, 2>(vec4(unpack2x16float(w.x), unpack2x16float(w.y)), vec4(unpack2x16float(w.z), unpack2x16float(w.w)));
}
fn packed(at: u32) -> vec4<u32> {
  let a = head[at / 4u]; let b = head[at / 4u + 1u];
  return vec4(pack2x16float(a.xy), pack2x16float(a.zw), pack2x16float(b.xy), pack2x16float(b.zw));
}

@compute @workgroup_size(${threads})
fn main(@builtin(workgroup_id) wg: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>,
        @builtin(local_invocation_index) local: u32) {
  let b = wg.y;
  let kv = wg.x / (HEADS / KV);
  let lane = local & ${SLICE - 1}u;
  let inside = local < ${SLICE}u;
  let at = wg.x * D + lane;
  // New q (threads 0–127) and k: one channel each; v by the first again.
  let mineK = (local & 128u) != 0u;
  let source = b * WIDTH + select(wg.x, HEADS + kv, mineK) * D + lane;
  var e = qkv[source];
  let newV = qkv[b * WIDTH + (HEADS + KV + kv) * D + lane];
  let position = positions[b];
  let begin = ${v.window > 0 ? `select(0u, position + 1u - ${v.window}u, position + 1u > ${v.window}u)` : '0u'};
  let cache = (b * KV + kv) * positions[groups.y];
  let slot = local / LANES;
  let part = local % LANES;
${list(unroll, (u) => `  var kw${u}: vec4<u32>; var vw${u}: vec4<u32>;\n  { let i = (cache + min(begin + slot + ${u * teams * PER_TEAM}u, position)) * LANES + part; kw${u} = keys[i]; vw${u} = values[i]; }`)}
  let angle = rope[position * ${rotaryDim / 2}u + lane % ${rotaryDim / 2}u];
${v.qkNorm ? '  let norm = norms[select(0u, D, mineK) + lane];' : ''}
${entries(slice, '0u')}
${stages > 0 ? '' : '  let own = gain[at];'}
${
  v.qkNorm
    ? shuffle
      ? `  { var s = e * e; ${over('s', [16, 8, 4, 2, 1])}
    if ((local & 31u) == 0u && local < 256u) { squares[local / 32u] = s; } }
  workgroupBarrier();
  { let home = select(0u, 4u, mineK); e *= norm * inverseSqrt((squares[home] + squares[home + 1u] + squares[home + 2u] + squares[home + 3u]) * ${1 / D} + params.eps); }`
      : `  if (local < 256u) { squares[local] = e * e; }
  workgroupBarrier();
  { var s = 0.0; let home = select(0u, D, mineK); for (var i = 0u; i < D; i++) { s += squares[home + i]; } e *= norm * inverseSqrt(s * ${1 / D} + params.eps); }`
    : ''
}
  if (local < 2u * D) { raw[local] = e; }
  if (local < D) { let i = 2u * D + lane; head[i / 4u][i & 3u] = newV; }
  workgroupBarrier();
  if (local < 2u * D) {
    if (lane < ${rotaryDim}u) {
      let i = select(0u, D, mineK) + lane % ${rotaryDim / 2}u;
      let p = raw[i]; let r = raw[i + ${rotaryDim / 2}u];
      e = select(p * angle.x - r * angle.y, r * angle.x + p * angle.y, lane >= ${rotaryDim / 2}u);
    }
    head[local / 4u][local & 3u] = e;
  }
  workgroupBarrier();
  let newKey = packed(D + part * 8u);
  let newValue = packed(2u * D + part * 8u);
  if (wg.x % (HEADS / KV) == 0u && local < LANES) {
    keys[(cache + position) * LANES + local] = newKey;
    values[(cache + position) * LANES + local] = newValue;
  }
  let qa = head[part * 2u] * params.scale;
  let qb = head[part * 2u + 1u] * params.scale;
  var oa = vec4<f32>(); var ob = vec4<f32>(); var m = -1e30; var l = 0.0;
  for (var base = begin; base <= position; base += ${step}u) {
    // The new key, also for lanes past the end: there may be anything, and nothing times infinity is not nothing.
    let key = base + slot;
${list(
  unroll,
  (u) => `    let k${u} = key + ${u * teams * PER_TEAM}u; let in${u} = k${u} <= position;
    if (k${u} >= position) { kw${u} = newKey; vw${u} = newValue; }
    let kf${u} = half8(kw${u}); let vf${u} = half8(vw${u});
    var s${u} = dot(qa, kf${u}[0]) + dot(qb, kf${u}[1]);`,
)}
    if (base + ${step}u <= position) {
${list(unroll, (u) => `      { let i = (cache + min(k${u} + ${step}u, position)) * LANES + part; kw${u} = keys[i]; vw${u} = values[i]; }`)}
    }
${list(unroll, (u) => `    ${shuffle ? over(`s${u}`, [8, 4, 2, 1]) : shared(`s${u}`)} s${u} = select(-1e30, s${u}, in${u});`)}
    var top = m; ${list(unroll, (u) => `top = max(top, s${u});`, ' ')}
    let keep = exp(m - top);
    l *= keep; oa *= keep; ob *= keep; m = top;
${list(unroll, (u) => `    { let p = select(0.0, exp(s${u} - top), in${u}); l += p; oa = fma(vec4(p), vf${u}[0], oa); ob = fma(vec4(p), vf${u}[1], ob); }`)}
  }

  // The teams' results: first the maximum of all, then sums of what is scaled to it.
${
  shuffle
    ? `  var whole = max(m, subgroupShuffleXor(m, ${LANES}u));
  if ((local & 31u) == 0u) { tops[local / 32u] = whole; }
  workgroupBarrier();
  whole = tops[min(local & 31u, ${teams - 1}u)]; ${over('whole', [16, 8, 4, 2, 1], (a, c) => `max(${a}, ${c})`)}`
    : `  if (part == 0u) { tops[slot] = m; }
  workgroupBarrier();
  var whole = -1e30;
  for (var i = 0u; i < ${slots}u; i++) { whole = max(whole, tops[i]); }`
}
  let weight = exp(m - whole);
  l *= weight; oa *= weight; ob *= weight;
${
  shuffle
    ? `${over('l', [LANES])} ${over('oa', [LANES])} ${over('ob', [LANES])}
  if ((local & 31u) < LANES) { let i = (local / 32u) * ${D / 4}u + part * 2u; parts[i] = oa; parts[i + 1u] = ob; }
  if ((local & 31u) == 0u) { totals[local / 32u] = l; }`
    : `  { let i = slot * ${D / 4}u + part * 2u; parts[i] = oa; parts[i + 1u] = ob; }
  if (part == 0u) { totals[slot] = l; }`
}
  workgroupBarrier();
  var v = 0.0;
  if (inside) {
    var total = 0.0;
    for (var i = 0u; i < ${slots}u; i++) { total += totals[i]; v += parts[i * ${D / 4}u + lane / 4u][lane & 3u]; }
    v *= ${stages > 0 ? '1.0' : 'own'} / total;
  }
${turns(slice)}
${pack(slice, 'b * params.channels + at')}
}`,
  });

  function shared(name: string): string {
    return `dots[local] = ${name};
    workgroupBarrier();
    ${name} = 0.0; { let home = local & ~${LANES - 1}u; for (var i = 0u; i < LANES; i++) { ${name} += dots[home + i]; } }
    workgroupBarrier();`;
  }
}
