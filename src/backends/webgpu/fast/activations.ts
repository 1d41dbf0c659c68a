// What stands before an int4 product, in one dispatch: a source (RMSNorm, SiLU·mul, attention's parts, or a plain vector), the
// transform (scale + K rotations), and the normalised f16 chunks that gemv.ts reads.
//
// A group of 32, 64 or 128 channels lives in the registers of 32 lanes, a rotation exchanges values by subgroup shuffles:
// no workgroup barrier, no memory between rotations. Where a rotation pairs channel c with c xor m (as our recipes choose
// pairs), a lane's partners are all in one other lane: one vector shuffle, and 2 bytes of table per channel; other pairs
// take a shuffle per channel and 4 bytes. Tables and gains are asked for before the norm's sum, to be there after it. Bytes
// per row: the source once (RMSNorm: once more per workgroup), the tables, 2 out. Subgroups of fewer than 32 lanes exchange
// through workgroup memory instead.
import type { PairwiseTransform } from '../../../ops/backend.js';
import { defineKernel, read, write, type BufferSpec, type Kernel } from '../kernel.js';
import { halfFeatures, halfWgsl, type Arithmetic } from './half.js';
import { CHUNK } from './gemv.js';

/** Lanes that hold a group. */
const TEAM = 32;
/** Groups per workgroup. */
const TEAMS = 4;
const THREADS = TEAM * TEAMS;

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

/** How rotations pair channels: any way, or channel c of a group with c xor a mask of the group and rotation. */
export type Pairing = 'any' | 'xor';

/** A variant of {@link activationKernel}. */
export interface ActivationVariant extends Arithmetic {
  readonly shuffle: boolean;
  readonly source: ActivationSource;
  /** Rotations; 0 applies the gain alone. At most 8 with xor pairing. */
  readonly krot: number;
  readonly pairing: Pairing;
  /** Channels per group: 32, 64 or 128; divides the channels. */
  readonly groupSize: number;
  /** For source `attention`: its shape. */
  readonly splits?: number;
  readonly headDim?: number;
}

type Buffers = 'source' | 'stats' | 'gain' | 'table' | 'masks' | 'x' | 'factors';

/** Workgroups per row and transform. */
export const activationGroups = (channels: number, groupSize: number): number =>
  Math.ceil(channels / groupSize / TEAMS);

const list = (n: number, f: (s: number) => string, separator = ', '): string =>
  Array.from({ length: n }, (_, s) => f(s)).join(separator);

/**
 * Dispatch: x = {@link activationGroups}, y = batch, z = transforms. Buffers: gain [transforms, channels] f32; table and masks
 * per transform, see {@link rotationTable}; x [transforms, batch, channels] f16; factors [transforms, batch, channels/32].
 */
export function activationKernel(v: ActivationVariant): Kernel<Buffers, 'channels' | 'eps' | 'krot'> {
  const slots = v.groupSize / TEAM;
  const vector = slots === 1 ? 'f32' : `vec${slots}<f32>`;
  const xor = v.krot > 0 && v.pairing === 'xor';
  const value: Record<ActivationSource, string> = {
    norm: 'source[b * width + at] * scale',
    silu: 'silu(source[b * 2u * width + at]) * source[(b * 2u + 1u) * width + at]',
    attention: 'combined(b, first)',
    plain: 'source[b * width + at]',
  };
  const splits = v.splits ?? 1;
  const buffers: Partial<Record<Buffers, BufferSpec>> = {
    source: read(vector),
    ...(v.source === 'attention' ? { stats: read('vec2<f32>') } : {}),
    gain: read(vector),
    ...(v.krot > 0 ? { table: read(tableType(v, slots)) } : {}),
    ...(xor ? { masks: read('vec2<u32>') } : {}),
    x: write(slots === 4 ? 'vec2<u32>' : 'u32'),
    factors: write('vec2<f32>'),
  };
  return defineKernel<Buffers, 'channels' | 'eps' | 'krot'>({
    name: `activations.${v.source}.k${v.krot}${xor ? 'x' : ''}.g${v.groupSize}${v.f16 ? '' : '.f32'}`,
    features: [...halfFeatures(v), ...(v.shuffle ? (['subgroups'] as const) : [])],
    buffers: buffers as Record<Buffers, BufferSpec>,
    params: { channels: 'u32', eps: 'f32', krot: 'u32' },
    body: /* wgsl */ `
${halfWgsl(v)}
// The channels of a lane.
alias V = ${vector};
const SLOTS = ${slots}u;
${v.source === 'norm' ? `var<workgroup> sums: array<f32, ${THREADS}>;` : ''}
${v.shuffle ? '' : `var<workgroup> shared_x: array<f32, ${v.groupSize * TEAMS}>;\nvar<workgroup> shared_r: array<f32, ${THREADS}>;`}

${v.krot > 0 ? `var<workgroup> entries: array<${tableType(v, slots)}, ${v.krot * THREADS}>;` : ''}

fn silu(g: V) -> V { return g / (1.0 + exp(-g)); }
fn squared(e: V) -> f32 { return ${slots === 1 ? 'e * e' : 'dot(e, e)'}; }
${
  v.source === 'attention'
    ? /* wgsl */ `
const SPLITS = ${splits}u;
const HEAD = ${v.headDim ?? 1}u;
// Attention's parts of the head that the lane's channels, from c on, belong to: Σ exp(max − top) · part / Σ exp(max − top) · sum.
fn combined(b: u32, c: u32) -> V {
  let head = (b * (params.channels / HEAD) + c / HEAD) * SPLITS;
  let at = head * (HEAD / SLOTS) + (c % HEAD) / SLOTS;
${list(splits, (s) => `  let p${s} = stats[head + ${s}u]; let e${s} = source[at + ${s}u * (HEAD / SLOTS)];`, '\n')}
  var top = p0.x;
${list(splits, (s) => `  top = max(top, p${s}.x);`, '\n')}
  var sum = 0.0;
  var out = V();
  // Parts without keys were not written: their values may be anything, infinities too.
${list(splits, (s) => `  { let w = select(0.0, exp(p${s}.x - top), p${s}.y > 0.0); sum = fma(w, p${s}.y, sum); out += select(V(), w * e${s}, w > 0.0); }`, '\n')}
  return out / sum;
}`
    : ''
}

@compute @workgroup_size(${THREADS})
fn main(@builtin(workgroup_id) wg: vec3<u32>, @builtin(num_workgroups) count: vec3<u32>,
        @builtin(local_invocation_index) local: u32${v.shuffle ? ', @builtin(subgroup_invocation_id) sg: u32' : ''}) {
  let lane = local & 31u;
  let team = local >> 5u;
  let b = wg.y;
  let groups = params.channels / ${v.groupSize}u;
  let width = params.channels / SLOTS;
  let inside = wg.x * ${TEAMS}u + team < groups;
  let group = select(0u, wg.x * ${TEAMS}u + team, inside);
  let first = group * ${v.groupSize}u + lane * SLOTS;
  let at = first / SLOTS;
  let own = gain[wg.z * width + at];
${v.krot > 0 ? tableLoads(v, slots) : ''}
${
  v.source === 'norm'
    ? /* wgsl */ `
  var squares = 0.0;
  // Several loads in flight: the sum waits for memory, not for its own additions.
  var c = local;
  for (; c + ${3 * THREADS}u < width; c += ${4 * THREADS}u) {
${list(4, (i) => `    let e${i}_ = source[b * width + c + ${i * THREADS}u];`, '\n')}
    squares += squared(e0_) + squared(e1_) + squared(e2_) + squared(e3_);
  }
  for (; c < width; c += ${THREADS}u) { squares += squared(source[b * width + c]); }
  ${
    v.shuffle
      ? `${[16, 8, 4, 2, 1].map((m) => `squares += subgroupShuffleXor(squares, ${m}u);`).join(' ')}
  if (lane == 0u) { sums[team] = squares; }
  workgroupBarrier();
  squares = ${list(TEAMS, (t) => `sums[${t}]`, ' + ')};`
      : `sums[local] = squares;
  workgroupBarrier();
  squares = 0.0;
  for (var i = 0u; i < ${THREADS}u; i++) { squares += sums[i]; }`
  }
  let scale = inverseSqrt(squares / f32(params.channels) + params.eps);`
    : ''
}
  var v: V = own * (${value[v.source]});
${v.krot > 0 ? rotations(v, slots) : ''}
${pack(v, slots)}
}`,
  });
}

/** Type of a lane's entry in the table. */
function tableType(v: ActivationVariant, slots: number): string {
  const words = v.pairing === 'xor' ? Math.max(1, slots / 2) : slots;
  return words === 1 ? 'u32' : `vec${words}<u32>`;
}

const slot = (name: string, s: number, slots: number): string => (slots === 1 ? name : `${name}.${'xyzw'[s]}`);

/**
 * WGSL: asks for the lane's entries of every rotation and parks them in workgroup memory, each lane its own (no barrier). The
 * rotations then run in a loop that the compiler can't unroll: a dispatch runs its code once, and fetching eight copies of
 * it would take longer than running them.
 */
function tableLoads(v: ActivationVariant, slots: number): string {
  const entries = v.pairing === 'xor' && slots === 1 ? '(width / 2u)' : 'width';
  const index = v.pairing === 'xor' && slots === 1 ? 'at / 2u' : 'at';
  return `${list(v.krot, (k) => `  entries[${k * THREADS}u + local] = table[(wg.z * ${v.krot}u + ${k}u) * ${entries} + ${index}];`, '\n')}
${v.pairing === 'xor' ? '  let mask = masks[wg.z * groups + group];' : ''}`;
}

/** WGSL: tangents `t` and signs `flip` of the half angles of rotation k from its entry e. */
function angles(v: ActivationVariant, slots: number): string {
  const signed = slots === 1 ? 'i32' : `vec${slots}<i32>`;
  if (v.pairing === 'xor') {
    const halves =
      slots === 4
        ? 'vec4<i32>(i32(e.x << 16u), i32(e.x), i32(e.y << 16u), i32(e.y))'
        : slots === 2
          ? 'vec2<i32>(i32(e << 16u), i32(e))'
          : 'i32(e << select(16u, 0u, (lane & 1u) == 1u))';
    const shift = slots === 1 ? '17u' : `vec${slots}(17u)`;
    return `    let bits = ${halves};
    let t = V(bits >> ${shift}) * ${1 / 16383};
    let flip = select(V(1.0), V(-1.0), (bits & ${signed}(0x10000)) != ${signed}(0));`;
  }
  const parts = (f: (e: string) => string): string =>
    `${slots === 1 ? '' : 'V'}(${list(slots, (s) => f(slot('e', s, slots)))})`;
  return `    let t = ${parts((e) => `f32(i32(${e} << 16u) >> 16u)`)} * ${1 / 32767};
    let flip = ${parts((e) => `select(1.0, -1.0, (${e} & 0x800000u) != 0u)`)};`;
}

/** WGSL: the rotation of v with its partners o; 1 / (1 + t²) as a square, since a division takes ten instructions. */
const TURN = 'let u = t * t; let r = inverseSqrt(1.0 + u); v = flip * r * r * (2.0 * t * o + (1.0 - u) * v);';

/** WGSL: xor mask of rotation k within the group. */
const MASK = '(select(mask.y, mask.x, k < 4u) >> ((k & 3u) * 8u)) & 255u';

/** WGSL: all rotations of v. */
function rotations(v: ActivationVariant, slots: number): string {
  const loop = (body: string): string => `  for (var k = 0u; k < params.krot; k++) {
    let e = entries[k * ${THREADS}u + local];
${body}
${angles(v, slots)}
    ${TURN}
${v.shuffle ? '' : '    workgroupBarrier();'}
  }`;
  if (!v.shuffle) {
    const partner = (s: number): string =>
      v.pairing === 'xor' ? `((lane * SLOTS + ${s}u) ^ m)` : `((${slot('e', s, slots)} >> 16u) & 127u)`;
    return `  let home = team * ${v.groupSize}u;
${loop(`${v.pairing === 'xor' ? `    let m = ${MASK};` : ''}
${list(slots, (s) => `    shared_x[home + lane * SLOTS + ${s}u] = ${slot('v', s, slots)};`, '\n')}
    workgroupBarrier();
    var o: V;
${list(slots, (s) => `    ${slot('o', s, slots)} = shared_x[home + ${partner(s)}];`, '\n')}`)}`;
  }
  if (v.pairing === 'xor') {
    const swaps =
      slots === 4
        ? 'w = select(w, w.yxwz, (m & 1u) != 0u); w = select(w, w.zwxy, (m & 2u) != 0u);'
        : slots === 2
          ? 'w = select(w, w.yx, (m & 1u) != 0u);'
          : '';
    return loop(`    let m = ${MASK};
    var w = v; ${swaps}
    let o = subgroupShuffle(w, sg ^ (m >> ${Math.log2(slots)}u));`);
  }
  const pick =
    slots === 1
      ? 'f'
      : slots === 2
        ? 'select(f.x, f.y, i == 1u)'
        : 'select(select(f.x, f.y, i == 1u), select(f.z, f.w, i == 3u), i >= 2u)';
  return `  let base = sg & ~31u;
${loop(`    var o: V;
${list(
  slots,
  (s) => {
    const e = slot('e', s, slots);
    return `    { let f = subgroupShuffle(v, base | (((${e} >> 16u) & 127u) / SLOTS)); let i = (${e} >> 16u) & ${slots - 1}u; ${slot('o', s, slots)} = ${pick}; }`;
  },
  '\n',
)}`)}`;
}

/** Normalises chunks of 32 channels to |x| ≤ 1 and writes them with their factor and sum. */
function pack(v: ActivationVariant, slots: number): string {
  const lanes = CHUNK / slots;
  const masks = [16, 8, 4, 2, 1].filter((m) => m < lanes);
  const reduce = (name: string, combine: (a: string, b: string) => string, start: string): string =>
    v.shuffle
      ? masks.map((m) => `  ${name} = ${combine(name, `subgroupShuffleXor(${name}, ${m}u)`)};`).join('\n')
      : `  shared_r[local] = ${name};
  workgroupBarrier();
  { let home = local & ~${lanes - 1}u; ${name} = ${start};
    for (var i = 0u; i < ${lanes}u; i++) { ${name} = ${combine(name, 'shared_r[home + i]')}; } }
  workgroupBarrier();`;
  const out = '((wg.z * count.y + b) * params.channels + first)';
  const words = {
    4: `let word = vec2<u32>(pack2x16float(n.xy), pack2x16float(n.zw));
  var sum = dot(vec4(unpack2x16float(word.x), unpack2x16float(word.y)), vec4(1.0));`,
    2: `let word = pack2x16float(n);
  var sum = dot(unpack2x16float(word), vec2(1.0));`,
    1: v.shuffle
      ? `let word = pack2x16float(vec2(n, subgroupShuffleXor(n, 1u)));
  var sum = unpack2x16float(word).x;`
      : `shared_r[local] = n;
  workgroupBarrier();
  let word = pack2x16float(vec2(n, shared_r[local ^ 1u]));
  workgroupBarrier();
  var sum = unpack2x16float(word).x;`,
  }[slots];
  const store = {
    4: `x[${out} / 4u] = word;`,
    2: `x[${out} / 2u] = word;`,
    1: `if ((lane & 1u) == 0u) { x[${out} / 2u] = word; }`,
  }[slots];
  const size =
    slots === 1
      ? 'abs(v)'
      : slots === 2
        ? 'max(abs(v.x), abs(v.y))'
        : 'max(max(abs(v.x), abs(v.y)), max(abs(v.z), abs(v.w)))';
  return /* wgsl */ `
  var top = ${size};
${reduce('top', (a, b) => `max(${a}, ${b})`, '0.0')}
  let n = v * select(1.0 / top, 0.0, top == 0.0);
  ${words}
${reduce('sum', (a, b) => `${a} + ${b}`, '0.0')}
  if (inside) {
    ${store}
    if ((lane & ${lanes - 1}u) == 0u) { factors[${out} / ${CHUNK}u] = vec2(top, sum); }
  }`;
}

/** Tables of a transform; see {@link rotationTable}. */
export interface RotationTable {
  readonly pairing: Pairing;
  readonly table: Uint32Array<ArrayBuffer>;
  /** [groups, 2] words of four masks each; empty with pairing `any`. */
  readonly masks: Uint32Array<ArrayBuffer>;
}

/**
 * Rotations as the kernels read them. A half angle's tangent gives sine and cosine without trigonometry; beyond a quarter turn the
 * angle is taken half a turn further and both outputs change sign. With pairing `any` [krot, channels] words: the tangent as a
 * signed 16-bit fraction (angles to 6e-5), the partner in bits 16–22, the sign in bit 23. With `xor` [krot, channels] 16-bit
 * words: the tangent in 15 bits (angles to 1.2e-4), the sign in the lowest; and a mask per group and rotation.
 */
export function rotationTable(transform: PairwiseTransform, pairing: Pairing = pairingOf(transform)): RotationTable {
  const { channels, groupSize, krot, pairs, theta } = transform;
  const xor = pairing === 'xor';
  const table = new Uint32Array(xor ? (krot * channels) / 2 : krot * channels);
  const halves = new Uint16Array(table.buffer);
  const masks = new Uint32Array(xor ? (2 * channels) / groupSize : 0);
  const masksBytes = new Uint8Array(masks.buffer);
  for (let k = 0; k < krot; k++) {
    for (let p = 0; p < channels / 2; p++) {
      const group = Math.floor((2 * p) / groupSize);
      const base = k * channels + group * groupSize;
      const [i, j] = [pairs[k * channels + 2 * p], pairs[k * channels + 2 * p + 1]];
      let angle = Math.atan2(Math.sin(theta[(k * channels) / 2 + p]), Math.cos(theta[(k * channels) / 2 + p]));
      let flip = 0;
      if (Math.abs(angle) > Math.PI / 2) {
        angle -= Math.sign(angle) * Math.PI;
        flip = 1;
      }
      const tangent = Math.tan(angle / 2);
      if (xor) {
        const t = Math.round(tangent * 16383);
        halves[base + i] = (t << 1) | flip;
        halves[base + j] = (-t << 1) | flip;
        masksBytes[group * 8 + k] = i ^ j;
      } else {
        const t = Math.round(tangent * 32767);
        table[base + i] = ((t & 0xffff) | (j << 16) | (flip << 23)) >>> 0;
        table[base + j] = ((-t & 0xffff) | (i << 16) | (flip << 23)) >>> 0;
      }
    }
  }
  return { pairing, table, masks };
}

/** Whether every rotation of every group pairs channels by one mask, and the kernel has room for the masks. */
export function pairingOf({ channels, groupSize, krot, pairs }: PairwiseTransform): Pairing {
  if (krot > 8) return 'any';
  for (let k = 0; k < krot; k++)
    for (let c = 0; c < channels; c += groupSize) {
      const at = k * channels + c;
      const mask = pairs[at] ^ pairs[at + 1];
      for (let p = 2; p < groupSize; p += 2) if ((pairs[at + p] ^ pairs[at + p + 1]) !== mask) return 'any';
    }
  return 'xor';
}
