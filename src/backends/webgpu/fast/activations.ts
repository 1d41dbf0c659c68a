// What stands before an int4 product, in one dispatch: a source (RMSNorm, SiLU·mul, attention's parts, or a plain vector), the
// transform (scale + K rotations), and the normalised f16 chunks that gemv.ts reads.
//
// A group of 32, 64 or 128 channels lives in the registers of 32 lanes, a rotation exchanges values by subgroup shuffles:
// no workgroup barrier, no memory between rotations. Bytes per row: the source once (RMSNorm: once more per workgroup, for
// the sum of squares), 4 bytes per channel and rotation of table, 2 out. Subgroups of fewer than 32 lanes exchange through
// workgroup memory instead.
import type { PairwiseTransform } from '../../../ops/backend.js';
import { defineKernel, read, write, type BufferSpec, type Kernel } from '../kernel.js';
import { halfFeatures, halfWgsl, type Arithmetic } from './half.js';
import { CHUNK } from './gemv.js';

/** Lanes that hold a group. */
const TEAM = 32;
/** Groups per workgroup. */
const TEAMS = 4;

/** Where the values come from. */
export type ActivationSource =
  /** RMSNorm of source [batch, channels]; `gain` holds weight · a. */
  | 'norm'
  /** silu(source[b, c]) · source[b, channels + c]; source [batch, 2·channels]. */
  | 'silu'
  /** Attention's partial sums, combined: source [batch, heads, splits, headDim], stats [batch, heads, splits] (max, sum). */
  | 'attention'
  /** source [batch, channels] as it is. */
  | 'plain';

/** A variant of {@link activationKernel}. */
export interface ActivationVariant extends Arithmetic {
  readonly shuffle: boolean;
  readonly source: ActivationSource;
  /** Rotations; 0 applies the gain alone. */
  readonly krot: number;
  /** Channels per group: 32, 64 or 128; divides the channels. */
  readonly groupSize: number;
  /** For source `attention`: its shape. */
  readonly splits?: number;
  readonly headDim?: number;
}

type Buffers = 'source' | 'stats' | 'gain' | 'table' | 'x' | 'factors';

/** Workgroups per row and transform. */
export const activationGroups = (channels: number, groupSize: number): number =>
  Math.ceil(channels / groupSize / TEAMS);

/**
 * Dispatch: x = {@link activationGroups}, y = batch, z = transforms. Buffers: gain [transforms, channels] f32; table
 * [transforms, krot, channels] (see {@link rotationTable}); x [transforms, batch, channels] f16; factors [transforms, batch,
 * channels/32].
 */
export function activationKernel(v: ActivationVariant): Kernel<Buffers, 'channels' | 'eps'> {
  const slots = v.groupSize / TEAM;
  const each = (f: (s: number) => string): string => Array.from({ length: slots }, (_, s) => f(s)).join('\n');
  const value: Record<ActivationSource, string> = {
    norm: 'source[b * params.channels + c] * scale',
    silu: 'silu(source[b * 2u * params.channels + c]) * source[(b * 2u + 1u) * params.channels + c]',
    attention: 'combined(b, c, shares)',
    plain: 'source[b * params.channels + c]',
  };
  const buffers: Partial<Record<Buffers, BufferSpec>> = {
    source: read('f32'),
    ...(v.source === 'attention' ? { stats: read('vec2<f32>') } : {}),
    gain: read('f32'),
    ...(v.krot > 0 ? { table: read(v.shuffle && slots > 1 ? `vec${slots}<u32>` : 'u32') } : {}),
    x: write(slots === 4 ? 'vec2<u32>' : 'u32'),
    factors: write('vec2<f32>'),
  };
  return defineKernel({
    name: `activations.${v.source}.k${v.krot}.g${v.groupSize}${v.f16 ? '' : '.f32'}`,
    features: [...halfFeatures(v), ...(v.shuffle ? (['subgroups'] as const) : [])],
    buffers: buffers as Record<Buffers, BufferSpec>,
    params: { channels: 'u32', eps: 'f32' },
    body: /* wgsl */ `
${halfWgsl(v)}
const SLOTS = ${slots}u;
${v.source === 'norm' ? `var<workgroup> sums: array<f32, ${TEAM * TEAMS}>;` : ''}
${v.shuffle ? '' : `var<workgroup> shared_x: array<f32, ${v.groupSize * TEAMS}>;\nvar<workgroup> shared_r: array<f32, ${TEAM * TEAMS}>;`}

fn silu(g: f32) -> f32 { return g / (1.0 + exp(-g)); }
${
  v.source === 'attention'
    ? /* wgsl */ `
const SPLITS = ${v.splits ?? 1}u;
const HEAD = ${v.headDim ?? 1}u;
// The parts' weights of the head that channel c belongs to: exp(max − top) / Σ, 0 for a part without keys.
fn weights(b: u32, c: u32) -> array<f32, ${v.splits ?? 1}> {
  let head = (b * (params.channels / HEAD) + c / HEAD) * SPLITS;
${eachSplit(v, (s) => `  let p${s} = stats[head + ${s}u];`)}
  var top = p0.x;
${eachSplit(v, (s) => `  top = max(top, p${s}.x);`)}
${eachSplit(v, (s) => `  let w${s} = select(0.0, exp(p${s}.x - top), p${s}.y > 0.0);`)}
  var sum = 0.0;
${eachSplit(v, (s) => `  sum = fma(w${s}, p${s}.y, sum);`)}
  let inverse = 1.0 / sum;
  return array<f32, ${v.splits ?? 1}>(${list(v.splits ?? 1, (s) => `w${s} * inverse`)});
}
fn combined(b: u32, c: u32, w: array<f32, ${v.splits ?? 1}>) -> f32 {
  let at = (b * (params.channels / HEAD) + c / HEAD) * SPLITS * HEAD + c % HEAD;
${eachSplit(v, (s) => `  let e${s} = source[at + ${s}u * HEAD];`)}
  var out = 0.0;
  // Parts without keys were not written: their values may be anything, infinities too.
${eachSplit(v, (s) => `  out += select(0.0, w[${s}] * e${s}, w[${s}] > 0.0);`)}
  return out;
}`
    : ''
}

@compute @workgroup_size(${TEAM * TEAMS})
fn main(@builtin(workgroup_id) wg: vec3<u32>, @builtin(num_workgroups) count: vec3<u32>,
        @builtin(local_invocation_index) local: u32${v.shuffle ? ', @builtin(subgroup_invocation_id) sg: u32' : ''}) {
  let lane = local & 31u;
  let team = local >> 5u;
  let b = wg.y;
  let group = wg.x * ${TEAMS}u + team;
  let inside = group < params.channels / ${v.groupSize}u;
  let first = select(0u, group * ${v.groupSize}u, inside) + lane * SLOTS;
${
  v.source === 'norm'
    ? /* wgsl */ `
  var squares = 0.0;
  // Four loads in flight: the sum waits for memory, not for its own additions.
  var c = local;
  for (; c + ${3 * TEAM * TEAMS}u < params.channels; c += ${4 * TEAM * TEAMS}u) {
    let at = b * params.channels + c;
    let e = vec4(source[at], source[at + ${TEAM * TEAMS}u], source[at + ${2 * TEAM * TEAMS}u], source[at + ${3 * TEAM * TEAMS}u]);
    squares += dot(e, e);
  }
  for (; c < params.channels; c += ${TEAM * TEAMS}u) {
    let e = source[b * params.channels + c];
    squares = fma(e, e, squares);
  }
  ${
    v.shuffle
      ? `${[16, 8, 4, 2, 1].map((m) => `squares += subgroupShuffleXor(squares, ${m}u);`).join(' ')}
  if (lane == 0u) { sums[team] = squares; }
  workgroupBarrier();
  squares = ${Array.from({ length: TEAMS }, (_, t) => `sums[${t}]`).join(' + ')};`
      : `sums[local] = squares;
  workgroupBarrier();
  squares = 0.0;
  for (var i = 0u; i < ${TEAM * TEAMS}u; i++) { squares += sums[i]; }`
  }
  let scale = inverseSqrt(squares / f32(params.channels) + params.eps);`
    : ''
}
${v.source === 'attention' ? "  // A lane's channels are of one head.\n  let shares = weights(b, first);" : ''}
  let gainAt = wg.z * params.channels + first;
${each((s) => `  var v${s}: f32; { let c = first + ${s}u; v${s} = gain[gainAt + ${s}u] * (${value[v.source]}); }`)}
${v.krot > 0 ? (v.shuffle ? shuffled(v, slots) : shared(v, slots)) : ''}
${pack(v, slots)}
}`,
  }) as Kernel<Buffers, 'channels' | 'eps'>;
}

const list = (n: number, f: (s: number) => string, separator = ', '): string =>
  Array.from({ length: n }, (_, s) => f(s)).join(separator);

const eachSplit = (v: ActivationVariant, f: (s: number) => string): string => list(v.splits ?? 1, f, '\n');

/** WGSL: a table word's rotation of (own, partner) values. */
const ROTATED = (own: string, other: string, e: string): string => /* wgsl */ `{
      let t = f32(i32(${e} << 16u) >> 16u) * ${1 / 32767};
      let r = 1.0 / fma(t, t, 1.0);
      let flip = select(r, -r, (${e} & 0x800000u) != 0u);
      ${own} = flip * fma(2.0 * t, ${other}, (1.0 - t * t) * ${own});
    }`;

function shuffled(v: ActivationVariant, slots: number): string {
  const at = (s: number): string => (slots === 1 ? 'e' : `e.${'xyzw'[s]}`);
  const rotations = Array.from({ length: v.krot }, (_, k) => {
    const fetch = list(
      slots,
      (s) => {
        const source = `(base | (((${at(s)} >> 16u) & 127u) / SLOTS))`;
        const shuffles = list(slots, (i) => `let f${i} = subgroupShuffle(v${i}, lane${s});`, ' ');
        const pick =
          slots === 1
            ? 'f0'
            : slots === 2
              ? `select(f0, f1, slot${s} == 1u)`
              : `select(select(f0, f1, slot${s} == 1u), select(f2, f3, slot${s} == 3u), slot${s} >= 2u)`;
        return `    let lane${s} = ${source}; let slot${s} = (${at(s)} >> 16u) & ${slots - 1}u;
    var o${s}: f32; { ${shuffles} o${s} = ${pick}; }`;
      },
      '\n',
    );
    return `  { let e = e${k};\n${fetch}\n${list(slots, (s) => `    ${ROTATED(`v${s}`, `o${s}`, at(s))}`, '\n')}\n  }`;
  });
  return /* wgsl */ `
  let base = sg & ~31u;
  let row = (wg.z * ${v.krot}u * params.channels + first) / SLOTS;
${list(v.krot, (k) => `  let e${k} = table[row + ${k}u * (params.channels / SLOTS)];`, '\n')}
${rotations.join('\n')}`;
}

function shared(v: ActivationVariant, slots: number): string {
  return /* wgsl */ `
  let home = team * ${v.groupSize}u;
  for (var k = 0u; k < ${v.krot}u; k++) {
${list(slots, (s) => `    shared_x[home + lane * SLOTS + ${s}u] = v${s};`, '\n')}
    workgroupBarrier();
    let row = (wg.z * ${v.krot}u + k) * params.channels + first;
${list(
  slots,
  (s) =>
    `    { let e = table[row + ${s}u]; let o = shared_x[home + ((e >> 16u) & 127u)]; ${ROTATED(`v${s}`, 'o', 'e')} }`,
  '\n',
)}
    workgroupBarrier();
  }`;
}

/** Normalises chunks of 32 channels to |x| ≤ 1 and writes them with their factor and sum. */
function pack(v: ActivationVariant, slots: number): string {
  const lanes = CHUNK / slots;
  const masks = [16, 8, 4, 2, 1].filter((m) => m < lanes);
  const reduce = (name: string, combine: (a: string, b: string) => string): string =>
    v.shuffle
      ? masks.map((m) => `  ${name} = ${combine(name, `subgroupShuffleXor(${name}, ${m}u)`)};`).join('\n')
      : `  shared_r[local] = ${name};
  workgroupBarrier();
  { let home = local & ~${lanes - 1}u;
    for (var i = 0u; i < ${lanes}u; i++) { ${name} = ${combine(name, 'shared_r[home + i]')}; } }
  workgroupBarrier();`;
  const sumReduce = v.shuffle
    ? reduce('sum', (a, b) => `${a} + ${b}`)
    : `  shared_r[local] = sum;
  workgroupBarrier();
  { let home = local & ~${lanes - 1}u; sum = 0.0;
    for (var i = 0u; i < ${lanes}u; i++) { sum += shared_r[home + i]; } }`;
  const normal = list(slots, (s) => `let n${s} = v${s} * inverse;`, ' ');
  const at = `((wg.z * count.y + b) * params.channels + first)`;
  const words =
    slots === 4
      ? `let word = vec2<u32>(pack2x16float(vec2(n0, n1)), pack2x16float(vec2(n2, n3)));
  let q = vec4(unpack2x16float(word.x), unpack2x16float(word.y));
  var sum = q.x + q.y + q.z + q.w;`
      : slots === 2
        ? `let word = pack2x16float(vec2(n0, n1));
  let q = unpack2x16float(word);
  var sum = q.x + q.y;`
        : `let word = pack2x16float(vec2(n0, ${v.shuffle ? 'subgroupShuffleXor(n0, 1u)' : 'neighbour'}));
  var sum = unpack2x16float(word).x;`;
  const neighbour =
    slots === 1 && !v.shuffle
      ? `  shared_r[local] = n0;
  workgroupBarrier();
  let neighbour = shared_r[local ^ 1u];
  workgroupBarrier();`
      : '';
  const store =
    slots === 4
      ? `x[${at} / 4u] = word;`
      : slots === 2
        ? `x[${at} / 2u] = word;`
        : `if ((lane & 1u) == 0u) { x[${at} / 2u] = word; }`;
  return /* wgsl */ `
  var top = 0.0;
  ${list(slots, (s) => `top = max(top, abs(v${s}));`, ' ')}
${reduce('top', (a, b) => `max(${a}, ${b})`)}
  let inverse = select(1.0 / top, 0.0, top == 0.0);
  ${normal}
${neighbour}
  ${words}
${sumReduce}
  if (inside) {
    ${store}
    if ((lane & ${lanes - 1}u) == 0u) { factors[${at} / ${CHUNK}u] = vec2(top, sum); }
  }`;
}

/**
 * Rotations as the kernels read them: [krot, channels], one word per channel: tan(θ/2) as a signed 16-bit fraction (which
 * gives sine and cosine to 3e-5 without trigonometry), its partner in bits 16–22, and in bit 23 whether both change sign
 * (|θ| beyond a quarter turn).
 */
export function rotationTable(transform: PairwiseTransform): Uint32Array {
  const { channels, groupSize, krot, pairs, theta } = transform;
  const table = new Uint32Array(krot * channels);
  for (let k = 0; k < krot; k++) {
    for (let p = 0; p < channels / 2; p++) {
      const base = Math.floor((2 * p) / groupSize) * groupSize;
      const [i, j] = [pairs[k * channels + 2 * p], pairs[k * channels + 2 * p + 1]];
      let angle = Math.atan2(Math.sin(theta[(k * channels) / 2 + p]), Math.cos(theta[(k * channels) / 2 + p]));
      let flip = 0;
      if (Math.abs(angle) > Math.PI / 2) {
        angle -= Math.sign(angle) * Math.PI;
        flip = 0x800000;
      }
      const t = Math.round(Math.tan(angle / 2) * 32767);
      table[k * channels + base + i] = ((t & 0xffff) | (j << 16) | flip) >>> 0;
      table[k * channels + base + j] = ((-t & 0xffff) | (i << 16) | flip) >>> 0;
    }
  }
  return table;
}
