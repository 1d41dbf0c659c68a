// What stands before an int4 product, in one dispatch: a source (RMSNorm, SiLU·mul, attention's parts, or a plain vector), the
// transform (scale + K rotations), and the normalised f16 chunks that gemv.ts reads. A thread per channel, a workgroup per 128 channels.
//
// Rotations go two at a time: one after the other they give each channel as a sum of four, itself, its partner in the first, its
// partner in the second, and that one's partner in the first. Eight rotations are four such stages, whatever the pairs: four fused
// multiply-adds and one exchange through workgroup memory each, half the exchanges that rotations one by one need, and
// exchanges are what takes the time (latency: a step's rotations are a few thousand operations). The table holds the four
// factors as f32 whose seven lowest bits are the channel to multiply: nothing to decode, at 16 bytes per channel and stage,
// factors good to 2⁻¹⁷. The gain is in the first stage's factors, so that values change hands while the table is on its way from
// memory. A norm's sum of squares runs beside the first stage: rotations are linear, so that its factor may come last. Bytes per
// row: the source once (RMSNorm: once more per workgroup), the tables, 2 out.
import type { PairwiseTransform } from '../../../ops/backend.js';
import { defineKernel, read, write, type BufferSpec, type Kernel } from '../kernel.js';
import { CHUNK } from './gemv.js';

/** Channels per workgroup: whole rotation groups of 32, 64 or 128. */
export const SLICE = 128;
const TEAM = 32;

/** Where the values come from. */
export type ActivationSource =
  /** RMSNorm of source [batch, channels]; the gain is weight · a. */
  | 'norm'
  /** silu(source[b, c]) · source[b, channels + c]; source [batch, 2·channels]. */
  | 'silu'
  /** Attention's partial sums, combined: source [batch, heads, splits, headDim], stats [batch, heads, splits] (max, sum). */
  | 'attention'
  /** source [batch, channels] as it is. */
  | 'plain';

/** A variant of {@link activationKernel}. */
export interface ActivationVariant {
  /** Reduce by subgroup shuffles (subgroups of at least 32 lanes), else through workgroup memory. */
  readonly shuffle: boolean;
  readonly source: ActivationSource;
  /** Pairs of rotations; 0 applies the gain alone. */
  readonly stages: number;
  /** Threads per workgroup: a multiple of 128. More share a norm's sum and the combination of attention's parts. */
  readonly threads: number;
  /** For source `attention`: its shape; headDim a multiple of 4. */
  readonly splits?: number;
  readonly headDim?: number;
}

type Buffers = 'source' | 'stats' | 'gain' | 'table' | 'x' | 'factors';

/** Workgroups per row and transform. */
export const activationGroups = (channels: number): number => Math.ceil(channels / SLICE);

/** Pairs of rotations of a transform. */
export const stagesOf = (krot: number): number => Math.ceil(krot / 2);

const list = (n: number, f: (i: number) => string, separator = '\n'): string =>
  Array.from({ length: n }, (_, i) => f(i)).join(separator);

/** Loads of a norm's row that a thread has in flight. */
const LOADS = 8;

/**
 * Dispatch: x = {@link activationGroups}, y = batch, z = transforms. Buffers: table [transforms, stages, channels] of {@link rotationTable}
 * or, without stages, gain [transforms, channels] f32; x [transforms, batch, channels] f16; factors [transforms, batch, channels/32].
 */
export function activationKernel(v: ActivationVariant): Kernel<Buffers, 'channels' | 'eps'> {
  const { stages, threads, shuffle } = v;
  const teams = threads / TEAM;
  const wide = v.source === 'norm' || v.source === 'attention';
  const buffers: Partial<Record<Buffers, BufferSpec>> = {
    source: read(wide ? 'vec4<f32>' : 'f32'),
    ...(v.source === 'attention' ? { stats: read('vec2<f32>') } : {}),
    ...(stages > 0 ? { table: read('vec4<u32>') } : { gain: read('f32') }),
    x: write('u32'),
    factors: write('vec2<f32>'),
  };
  const own: Record<ActivationSource, string> = {
    norm: 'source[(b * params.channels + at) / 4u][at & 3u]',
    silu: 'silu(source[b * 2u * params.channels + at]) * source[(b * 2u + 1u) * params.channels + at]',
    attention: 'combined(b, first, local)',
    plain: 'source[b * params.channels + at]',
  };
  return defineKernel<Buffers, 'channels' | 'eps'>({
    name: `activations.${v.source}.s${stages}.t${threads}${v.source === 'attention' ? `.p${v.splits ?? 1}` : ''}`,
    features: shuffle ? ['subgroups'] : [],
    buffers: buffers as Record<Buffers, BufferSpec>,
    params: { channels: 'u32', eps: 'f32' },
    body: /* wgsl */ `
${memory(v)}
${v.source === 'norm' ? `var<workgroup> sums: array<f32, ${shuffle ? teams : threads}>;` : ''}
${v.source === 'attention' ? combination(v) : ''}
fn silu(g: f32) -> f32 { return g / (1.0 + exp(-g)); }

@compute @workgroup_size(${threads})
fn main(@builtin(workgroup_id) wg: vec3<u32>, @builtin(num_workgroups) count: vec3<u32>,
        @builtin(local_invocation_index) local: u32) {
  let b = wg.y;
  let first = wg.x * ${SLICE}u;
  let lane = local & ${SLICE - 1}u;
  let inside = ${threads > SLICE ? `local < ${SLICE}u && ` : ''}first + lane < params.channels;
  let at = select(0u, first + lane, inside);
${entries(v, 'wg.z')}
${stages > 0 ? '' : '  let own = gain[wg.z * params.channels + at];'}
${v.source === 'norm' ? squares(v) : ''}
  var v = ${stages > 0 ? '' : 'own * '}(${own[v.source]});
${turns(v)}
${
  v.source === 'norm'
    ? `${stages > 0 ? '' : '  workgroupBarrier();\n'}${
        shuffle
          ? `  let squares = ${list(teams, (t) => `sums[${t}]`, ' + ')};`
          : `  var squares = 0.0;
  for (var i = 0u; i < ${threads}u; i++) { squares += sums[i]; }`
      }
  v *= inverseSqrt(squares / f32(params.channels) + params.eps);`
    : ''
}
${pack(v, '(wg.z * count.y + b) * params.channels + first + lane')}
}`,
  });
}

/** What the parts below depend on. */
export type SliceVariant = Pick<ActivationVariant, 'shuffle' | 'stages' | 'threads'>;

/** WGSL: workgroup memory of {@link turns} and {@link pack}. */
export function memory({ shuffle, stages }: SliceVariant): string {
  return `${stages > 0 ? `var<workgroup> shared_v: array<f32, ${2 * SLICE}>;` : ''}
${shuffle ? '' : `var<workgroup> shared_r: array<f32, ${SLICE}>;`}`;
}

/** WGSL: asks for the entries of channel `at` in transform `transform`. */
export function entries({ stages }: SliceVariant, transform: string): string {
  return list(stages, (s) => `  let t${s} = table[(${transform} * ${stages}u + ${s}u) * params.channels + at];`);
}

/** WGSL: all stages over v, the value of the thread's channel `lane` of the slice. */
export function turns({ stages, threads }: SliceVariant): string {
  return list(stages, (s) => {
    const half = `${(s & 1) * SLICE}u`;
    const term = (e: string): string => `shared_v[${half} + (t${s}.${e} & 127u)]`;
    return `  ${threads > SLICE ? `if (local < ${SLICE}u) ` : ''}{ shared_v[${half} + lane] = v; }
  workgroupBarrier();
  v = fma(bitcast<f32>(t${s}.x), v, fma(bitcast<f32>(t${s}.y), ${term('y')},
    fma(bitcast<f32>(t${s}.z), ${term('z')}, bitcast<f32>(t${s}.w) * ${term('w')})));`;
  });
}

/** WGSL: the threads' parts of a row's sum of squares, for `sums`, which the next barrier publishes. */
function squares({ threads, shuffle }: ActivationVariant): string {
  return /* wgsl */ `
  let width = params.channels / 4u;
  var square = 0.0;
  // Several loads in flight: the sum waits for memory, not for its own additions.
  var c = local;
  for (; c + ${(LOADS - 1) * threads}u < width; c += ${LOADS * threads}u) {
${list(LOADS, (i) => `    let e${i} = source[b * width + c + ${i * threads}u];`)}
    square += ${list(LOADS, (i) => `dot(e${i}, e${i})`, ' + ')};
  }
  for (; c < width; c += ${threads}u) { let e = source[b * width + c]; square += dot(e, e); }
  ${
    shuffle
      ? `${list(5, (i) => `square += subgroupShuffleXor(square, ${16 >> i}u);`, ' ')}
  if ((local & 31u) == 0u) { sums[local / 32u] = square; }`
      : 'sums[local] = square;'
  }`;
}

/**
 * WGSL: `combined`, the channel of a thread from attention's parts: Σ exp(max − top) · part / Σ exp(max − top) · sum. A team takes
 * four channels per lane and every so-manieth part, so that the loads of all parts are in flight together.
 */
function combination(v: ActivationVariant): string {
  const teams = v.threads / TEAM;
  const splits = v.splits ?? 1;
  const turns = Math.ceil(splits / teams);
  return /* wgsl */ `
const SPLITS = ${splits}u;
const HEAD = ${v.headDim ?? 1}u;
var<workgroup> parts: array<vec4<f32>, ${v.threads}>;
var<workgroup> weights: array<vec2<f32>, ${v.threads}>;
fn combined(b: u32, first: u32, local: u32) -> f32 {
  let team = local / ${TEAM}u;
  let c = min(first + 4u * (local % ${TEAM}u), params.channels - 4u);
  let head = (b * (params.channels / HEAD) + c / HEAD) * SPLITS;
  let base = head * (HEAD / 4u) + (c % HEAD) / 4u;
${list(
  turns,
  (
    i,
  ) => `  let s${i} = min(team + ${i * teams}u, SPLITS - 1u); let p${i} = stats[head + s${i}]; let e${i} = source[base + s${i} * (HEAD / 4u)];
  // Parts without keys may hold anything, infinities too.
  let full${i} = p${i}.y > 0.0 && team + ${i * teams}u < SPLITS;`,
)}
  var top = -1e30;
${list(turns, (i) => `  top = max(top, select(-1e30, p${i}.x, full${i}));`)}
  var sum = 0.0;
  var out = vec4<f32>();
${list(turns, (i) => `  { let w = select(0.0, exp(p${i}.x - top), full${i}); sum += select(0.0, w * p${i}.y, full${i}); out += select(vec4<f32>(), w * e${i}, full${i}); }`)}
  parts[local] = out;
  weights[local] = vec2(top, sum);
  workgroupBarrier();
  let quad = (local % ${SLICE}u) / 4u;
${list(teams, (t) => `  let w${t} = weights[${t * TEAM}u + quad];`)}
  var whole = w0.x;
${list(teams - 1, (t) => `  whole = max(whole, w${t + 1}.x);`)}
  var total = 0.0;
  var value = 0.0;
${list(teams, (t) => `  { let w = exp(w${t}.x - whole); total = fma(w, w${t}.y, total); value = fma(w, parts[${t * TEAM}u + quad][local & 3u], value); }`)}
  return value / total;
}`;
}

/**
 * WGSL: normalises chunks of 32 channels of v to |x| ≤ 1 and writes them with their factor and sum, from where the expression `row`
 * says; threads that are not `inside` write nothing.
 */
export function pack({ shuffle, threads }: SliceVariant, row: string): string {
  const reduce = (name: string, combine: (a: string, b: string) => string, masks: readonly number[]): string =>
    masks.map((m) => `  ${name} = ${combine(name, `subgroupShuffleXor(${name}, ${m}u)`)};`).join('\n');
  const max = (a: string, b: string): string => `max(${a}, ${b})`;
  const add = (a: string, b: string): string => `${a} + ${b}`;
  // Threads beyond the slice do as the others, on their slots' twins.
  const share = (name: string): string =>
    `  workgroupBarrier();\n  ${threads > SLICE ? `if (local < ${SLICE}u) { shared_r[lane] = ${name}; }` : `shared_r[lane] = ${name};`}\n  workgroupBarrier();`;
  return /* wgsl */ `
  let row = ${row};
  var top = abs(v);
${
  shuffle
    ? reduce('top', max, [16, 8, 4, 2, 1])
    : `${share('top')}
  { let home = lane & ~31u; for (var i = 0u; i < 32u; i++) { top = max(top, shared_r[home + i]); } }`
}
  let n = v * select(1.0 / top, 0.0, top == 0.0);
${shuffle ? '  let other = subgroupShuffleXor(n, 1u);' : `${share('n')}\n  let other = shared_r[lane ^ 1u];`}
  // The lower channel of two lies in the lower half; both lanes hold the same word but for the order.
  let word = pack2x16float(vec2(n, other));
  // The sum is of the rounded values. Some drivers take packing and unpacking for nothing at all and would sum the others, but not of
  // what another thread has packed: the same two.
${
  shuffle
    ? '  let theirs = subgroupShuffleXor(word, 1u);'
    : `${share('bitcast<f32>(word)')}
  let theirs = bitcast<u32>(shared_r[lane ^ 1u]);`
}
  let pair = unpack2x16float(theirs);
  var sum = pair.x + pair.y;
${
  shuffle
    ? reduce('sum', add, [16, 8, 4, 2])
    : `${share('sum')}
  { sum = 0.0; let home = lane & ~31u; for (var i = 0u; i < 32u; i += 2u) { sum += shared_r[home + i]; } }`
}
  if (inside) {
    if ((lane & 1u) == 0u) { x[row / 2u] = word; }
    if ((lane & 31u) == 0u) { factors[row / ${CHUNK}u] = vec2(top, sum); }
  }`;
}

const bits = new DataView(new ArrayBuffer(4));

/** The f32 nearest to `value` whose seven lowest bits are `index`. */
function tagged(value: number, index: number): number {
  bits.setFloat32(0, value);
  const word = bits.getUint32(0);
  const sign = word & 0x80000000;
  const magnitude = word & 0x7fffffff;
  return (sign | (Math.max(0, magnitude - index + 64) & ~127) | index) >>> 0;
}

/**
 * A transform of x ⊙ `weight` (default: of x), scales included: rotations two at a time [stages, channels, 4], factors, each with the channel of
 * its slice that it multiplies. At least one rotation.
 */
export function rotationTable(
  { channels, groupSize, krot, pairs, theta, channelScales }: PairwiseTransform,
  weight?: Float32Array,
): Uint32Array<ArrayBuffer> {
  const stages = stagesOf(krot);
  const table = new Uint32Array(stages * channels * 4);
  /** Of rotation k: each channel's cosine, signed sine, and partner. Rotation krot, if krot is odd, leaves all as it is. */
  const rotation = (k: number): { cos: Float64Array; sin: Float64Array; partner: Uint32Array } => {
    const out = {
      cos: new Float64Array(channels).fill(1),
      sin: new Float64Array(channels),
      partner: Uint32Array.from({ length: channels }, (_, c) => c),
    };
    for (let p = 0; k < krot && p < channels / 2; p++) {
      const base = Math.floor((2 * p) / groupSize) * groupSize;
      const [i, j] = [base + pairs[k * channels + 2 * p], base + pairs[k * channels + 2 * p + 1]];
      const angle = theta[(k * channels) / 2 + p];
      out.cos[i] = out.cos[j] = Math.cos(angle);
      out.sin[i] = Math.sin(angle);
      out.sin[j] = -Math.sin(angle);
      out.partner[i] = j;
      out.partner[j] = i;
    }
    return out;
  };
  for (let s = 0; s < stages; s++) {
    const [a, b] = [rotation(2 * s), rotation(2 * s + 1)];
    for (let c = 0; c < channels; c++) {
      const d = b.partner[c];
      const terms: readonly (readonly [number, number])[] = [
        [b.cos[c] * a.cos[c], c],
        [b.cos[c] * a.sin[c], a.partner[c]],
        [b.sin[c] * a.cos[d], d],
        [b.sin[c] * a.sin[d], a.partner[d]],
      ];
      for (const [i, [factor, channel]] of terms.entries()) {
        const gain = s === 0 ? channelScales[channel] * (weight?.[channel] ?? 1) : 1;
        table[(s * channels + c) * 4 + i] = tagged(factor * gain, channel % SLICE);
      }
    }
  }
  return table;
}
