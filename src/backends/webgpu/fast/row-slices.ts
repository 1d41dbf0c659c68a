// What stands before a product whose input takes a Hadamard transform across the whole row, over several workgroups. The sibling of
// row.ts, which holds the row in one: there a row waits for the latency of one multiprocessor, here for two dispatches at most.
//
// A row is M rows of C columns, and H = B ⊗ S: B, of order M, mixes the rows, Sylvester's S the columns; across heads S is nothing. A
// workgroup gives 32 columns of (up to) 32 rows. Of S's outputs it wants one in C/32, which cost one addition per input: it reads the
// whole source, sums signed columns 32 apart, and does the rest by shuffles; other workgroups read the same again, from cache.
// Then B, one output per thread, M signed additions. So no result waits for another workgroup, unless codes are wanted, whose scale
// depends on the largest value of all: then values go out in f32 beside each workgroup's largest, and a second kernel rounds them.
// Bytes: the source per workgroup (silu: 8·channels, attention: 4·splits·M·32), 2 out per channel; codes 4 out, 4 in, 1 out. All
// in loops with runtime bounds: code runs once, so that unrolled it would be fetched, not run.
import type { GpuLimits } from '../capabilities.js';
import type { GpuDevice, PreparedDispatch } from '../device.js';
import { defineKernel, read, variants, write, type BufferSpec, type Kernel } from '../kernel.js';
import { CODES_OF } from '../kernels/activation-grid.js';
import type { ActivationSource } from './activations.js';
import { CHUNK } from './gemv.js';

/** Columns of a workgroup: a chunk of gemv.ts, and a subgroup. */
const LANES = CHUNK;

/** A transform as the plan has it; see signsOf. */
export interface RowHadamard {
  readonly m: number;
  readonly p: number;
  readonly inner: number;
  readonly signs: string;
}

/** A variant of {@link rowSliceKernel}. */
export interface RowSliceVariant {
  readonly source: Exclude<ActivationSource, 'norm'>;
  /** Order of B; the row has rows · columns channels. */
  readonly rows: number;
  /** A multiple of 32; with `sylvester` a power of two. */
  readonly columns: number;
  /** Whether S mixes the columns. */
  readonly sylvester: boolean;
  /** 1 / √ order. */
  readonly scale: number;
  /** Values in f32 and each workgroup's largest, for {@link encodeSlicesKernel}; default: normalised f16 chunks. */
  readonly values: boolean;
  /** A multiple of 32. */
  readonly threads: number;
  /** Reduce by subgroup shuffles (subgroups of at least 32 lanes), else through workgroup memory. */
  readonly shuffle: boolean;
  /** For source `attention`, whose heads are the rows. */
  readonly splits: number;
}

type SliceBuffers = 'source' | 'stats' | 'signs' | 'x' | 'factors';

/** Inputs that a thread has in flight; eight and sixteen are no quicker. */
const LOADS = 4;
/** Rows from which on a workgroup is busy. */
const BUSY_ROWS = 16;
/** Parts of attention at most; see splitsFor. */
const MOST_SPLITS = 48;
/** Rows up to which signed additions one by one are quick. */
const MOST_ROWS = 256;

/**
 * How a transform of whole rows of `channels` divides into rows and columns; undefined where it doesn't. Of S so much goes to
 * the rows that a workgroup has enough of them.
 */
export function sliceShape(
  channels: number,
  { m, p, inner }: Pick<RowHadamard, 'm' | 'p' | 'inner'>,
): { rows: number; columns: number; sylvester: boolean } | undefined {
  if (m * p * inner !== channels) return undefined;
  const across = inner > 1;
  let [rows, columns] = across ? [m * p, inner] : [m, p];
  while (!across && rows < BUSY_ROWS && columns > LANES) [rows, columns] = [2 * rows, columns / 2];
  return columns % LANES === 0 && rows <= MOST_ROWS ? { rows, columns, sylvester: !across } : undefined;
}

/** Whether rows from a source can be spread: across heads behind attention, along the row elsewhere. */
export const sliceTakes = (
  { limits }: Pick<GpuDevice, 'limits'>,
  source: ActivationSource,
  channels: number,
  hadamard: Pick<RowHadamard, 'm' | 'p' | 'inner'>,
): boolean => sliceVariant(limits, source, channels, hadamard, MOST_SPLITS) !== undefined;

type Spread = Pick<RowSliceVariant, 'source' | 'rows' | 'columns' | 'sylvester' | 'threads' | 'splits'>;

/** What a transform's variants share; undefined where the kernel doesn't take it. */
function sliceVariant(
  limits: Pick<GpuLimits, 'maxComputeInvocationsPerWorkgroup' | 'maxComputeWorkgroupStorageSize'>,
  source: ActivationSource,
  channels: number,
  hadamard: Pick<RowHadamard, 'm' | 'p' | 'inner'>,
  splits: number,
): Spread | undefined {
  const shape = sliceShape(channels, hadamard);
  if (!shape || source === 'norm' || (source === 'attention' && shape.sylvester)) return undefined;
  const most = Math.floor(limits.maxComputeInvocationsPerWorkgroup / LANES);
  const threads = LANES * Math.min(32, most, shape.rows);
  const spread = { source, ...shape, threads, splits: source === 'attention' ? splits : 1 };
  return sliceMemory(spread) <= limits.maxComputeWorkgroupStorageSize ? spread : undefined;
}

/** Signs of B ⊗ (the part of S that belongs to the rows): a bit per entry, set for −1, whole words per row. */
export function signWords(rows: number, { m, signs }: Pick<RowHadamard, 'm' | 'signs'>): Uint32Array {
  const words = Math.ceil(rows / 32);
  const out = new Uint32Array(rows * words);
  const own = rows / m;
  for (let i = 0; i < rows; i++)
    for (let j = 0; j < rows; j++) {
      let bits = (i % own) & (j % own);
      let negative = m > 1 && signs[Math.floor(i / own) * m + Math.floor(j / own)] === '-';
      for (; bits > 0; bits &= bits - 1) negative = !negative;
      if (negative) out[i * words + (j >> 5)] |= 2 ** (j & 31);
    }
  return out;
}

/** Workgroups of a row: x = slices of columns, y = blocks of rows. */
export const sliceGroups = ({
  rows,
  columns,
  threads,
}: Pick<RowSliceVariant, 'rows' | 'columns' | 'threads'>): [number, number] => [
  columns / LANES,
  Math.ceil((rows * LANES) / threads),
];

/** Bytes of workgroup memory, at most. */
const sliceMemory = ({ rows, threads, splits }: Spread): number => 4 * rows * (LANES + 2 * splits) + 8 * threads;

/**
 * Dispatch: {@link sliceGroups}, z = batch. Buffers: source f32 as for activationKernel ([batch, 2 · channels], [batch, rows, splits,
 * columns] or [batch, channels]); stats [batch, rows, splits] (max, sum); signs of {@link signWords}; x [batch, channels] f16 and factors
 * [batch, channels/32] (largest, sum of the normalised), or with `values` x [batch, channels] f32 and factors [batch, workgroups] largest values.
 */
export const rowSliceKernel = variants((v: RowSliceVariant): Kernel<SliceBuffers> => {
  const { rows, columns, sylvester, threads, shuffle, splits } = v;
  const teams = threads / LANES;
  const words = Math.ceil(rows / 32);
  const steps = sylvester ? columns / LANES : 1;
  const unroll = Math.min(LOADS, steps);
  const each = (n: number, f: (i: number) => string, separator = '\n'): string =>
    Array.from({ length: n }, (_, i) => f(i)).join(separator);
  const buffers: Partial<Record<SliceBuffers, BufferSpec>> = {
    source: read('f32'),
    ...(v.source === 'attention' ? { stats: read('vec2<f32>') } : {}),
    signs: read('u32'),
    x: write(v.values ? 'f32' : 'u32'),
    factors: write(v.values ? 'f32' : 'vec2<f32>'),
  };
  const load = (i: number): string => {
    const at = `at + ${i * LANES}u`;
    return v.source === 'silu'
      ? `let g${i} = source[${at}]; let u${i} = source[${at} + CHANNELS];`
      : `let g${i} = source[${at}];`;
  };
  const value = (i: number): string => (v.source === 'silu' ? `g${i} / (1.0 + exp(-g${i})) * u${i}` : `g${i}`);
  // Signs by the bits that the column's high part shares with the slice's.
  const signed = (i: number): string =>
    `bitcast<f32>(bitcast<u32>(${value(i)}) ^ (countOneBits((h + ${i}u) & slice) << 31u))`;
  const gather =
    v.source === 'attention'
      ? `      z = combined(b, min(j, ${rows - 1}u), slice * ${LANES}u + lane);`
      : sylvester
        ? `      var at = (b * ${v.source === 'silu' ? `${2 * rows}u` : `${rows}u`} + min(j, ${rows - 1}u)) * COLUMNS + lane;
      for (var h = 0u; h < ${steps}u; h += ${unroll}u) {
        ${each(unroll, load)}
        z += ${each(unroll, signed, ' + ')};
        at += ${unroll * LANES}u;
      }`
        : `      let at = (b * ${v.source === 'silu' ? `${2 * rows}u` : `${rows}u`} + min(j, ${rows - 1}u)) * COLUMNS + slice * ${LANES}u + lane;
      ${load(0)}
      z = ${value(0)};`;
  const butterflies = shuffle
    ? `      for (var reach = 1u; reach < ${LANES}u; reach <<= 1u) {
        let other = subgroupShuffleXor(z, reach);
        z = select(z, -z, (lane & reach) != 0u) + other;
      }`
    : `      for (var reach = 1u; reach < ${LANES}u; reach <<= 1u) {
        shared_z[local] = z;
        workgroupBarrier();
        z = select(z, -z, (lane & reach) != 0u) + shared_z[local ^ reach];
        workgroupBarrier();
      }`;
  const over = (name: string, combine: (a: string, b: string) => string): string =>
    shuffle
      ? `  for (var reach = 1u; reach < ${LANES}u; reach <<= 1u) { ${name} = ${combine(name, `subgroupShuffleXor(${name}, reach)`)}; }`
      : `  for (var reach = 1u; reach < ${LANES}u; reach <<= 1u) {
    shared_z[local] = ${name};
    workgroupBarrier();
    ${name} = ${combine(name, 'shared_z[local ^ reach]')};
    workgroupBarrier();
  }`;
  const max = (a: string, b: string): string => `max(${a}, ${b})`;
  const add = (a: string, b: string): string => `${a} + ${b}`;
  return defineKernel<SliceBuffers>({
    name: `rowSlices.${v.source}.${rows}x${columns}${sylvester ? '' : '.across'}${v.values ? '.values' : ''}.t${threads}${v.source === 'attention' ? `.p${splits}` : ''}`,
    features: shuffle ? ['subgroups'] : [],
    buffers: buffers as Record<SliceBuffers, BufferSpec>,
    body: /* wgsl */ `
const ROWS = ${rows}u;
const COLUMNS = ${columns}u;
const CHANNELS = ${rows * columns}u;
var<workgroup> tile: array<f32, ${rows * LANES}>;
${shuffle ? '' : `var<workgroup> shared_z: array<f32, ${threads}>;`}
${v.values ? `var<workgroup> tops: array<f32, ${teams}>;` : ''}
${
  v.source === 'attention'
    ? /* wgsl */ `
const SPLITS = ${splits}u;
var<workgroup> parts: array<vec2<f32>, ${rows * splits}>;
// A channel from attention's parts; those without keys were not written and may hold anything, infinities too.
fn combined(b: u32, head: u32, column: u32) -> f32 {
  var best = -1e30;
  
  for (var s = 0u; s < SPLITS; s++) { let e = parts[head * SPLITS + s]; if (e.y > 0.0) { best = max(best, e.x); } }
  var at = (b * ROWS + head) * SPLITS * COLUMNS + column;
  var out = 0.0;
  var sum = 0.0;
  for (var s = 0u; s < SPLITS; s += ${LOADS}u) {
    ${each(LOADS, (i) => `let s${i} = min(s + ${i}u, SPLITS - 1u); let e${i} = source[at + s${i} * COLUMNS];`)}
    ${each(
      LOADS,
      (i) =>
        `{ let e = parts[head * SPLITS + s${i}]; if (e.y > 0.0 && s + ${i}u < SPLITS) { let w = exp(e.x - best); out = fma(w, e${i}, out); sum = fma(w, e.y, sum); } }`,
    )}
  }
  return out / sum;
}`
    : ''
}
@compute @workgroup_size(${threads})
fn main(@builtin(workgroup_id) wg: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>, @builtin(local_invocation_index) local: u32) {
  let b = wg.z;
  let slice = wg.x;
  let lane = local & ${LANES - 1}u;
  let team = local / ${LANES}u;
  let row = wg.y * ${teams}u + team;
  // The signs that this thread will want.
  let first = min(row, ROWS - 1u) * ${words}u;
  var word = signs[first];
${
  v.source === 'attention'
    ? `  for (var i = local; i < ROWS * SPLITS; i += ${threads}u) { parts[i] = stats[b * ROWS * SPLITS + i]; }
  workgroupBarrier();`
    : ''
}
  for (var home = 0u; home < ROWS; home += ${teams}u) {
    let j = home + team;
    var z = 0.0;
    {
${gather}
${sylvester ? butterflies : ''}
    }
    if (j < ROWS) { tile[j * ${LANES}u + lane] = z; }
  }
  workgroupBarrier();
  var y = 0.0;
  for (var j = 0u; j < ROWS; j++) {
    ${words > 1 ? 'if ((j & 31u) == 0u) { word = signs[first + (j >> 5u)]; }' : ''}
    y += bitcast<f32>(bitcast<u32>(tile[j * ${LANES}u + lane]) ^ (word << 31u));
    word >>= 1u;
  }
  y *= ${v.scale};
  var top = abs(y);
${over('top', max)}
  let chunk = (b * ROWS + row) * (COLUMNS / ${LANES}u) + slice;
${
  v.values
    ? `  if (lane == 0u) { tops[team] = select(0.0, top, row < ROWS); }
  if (row < ROWS) { x[chunk * ${LANES}u + lane] = y; }
  workgroupBarrier();
  if (local == 0u) {
    for (var i = 0u; i < ${teams}u; i++) { top = max(top, tops[i]); }
    factors[(b * groups.y + wg.y) * groups.x + wg.x] = top;
  }`
    : `  let n = y * select(1.0 / top, 0.0, top == 0.0);
  ${shuffle ? 'let other = subgroupShuffleXor(n, 1u);' : `shared_z[local] = n;\n  workgroupBarrier();\n  let other = shared_z[local ^ 1u];\n  workgroupBarrier();`}
  // The sum is of the rounded values; see activations.ts for the bit that nobody can know to be 0.
  let packed = pack2x16float(vec2(n, other));
  let pair = unpack2x16float(packed | (groups.x >> 31u));
  var sum = select(0.0, pair.x + pair.y, (lane & 1u) == 0u);
${over('sum', add)}
  if (row < ROWS) {
    if ((lane & 1u) == 0u) { x[(chunk * ${LANES}u + lane) / 2u] = packed; }
    if (lane == 0u) { factors[chunk] = vec2(top, sum); }
  }`
}
}`,
  });
});

/** Threads of {@link encodeSlicesKernel}: eight channels each. */
const ENCODE_THREADS = 64;

/** Workgroups of {@link encodeSlicesKernel}; y = batch. */
export const encodeSliceGroups = (channels: number): number => Math.ceil(channels / 8 / ENCODE_THREADS);

/**
 * Codes of values on their row's grid, in the order of 4-bit weights. Buffers: values [batch, channels] f32, peaks [batch, count]: the
 * largest is the row's; x [batch, channels] bytes, factors [batch, channels/32] (scale, sum of codes). `top` is the largest code.
 */
export const encodeSlicesKernel = variants(
  (channels: number): Kernel<'values' | 'peaks' | 'x' | 'factors', 'count' | 'top' | 'clip'> =>
    defineKernel<'values' | 'peaks' | 'x' | 'factors', 'count' | 'top' | 'clip'>({
      name: `encodeSlices.${channels}`,
      buffers: {
        values: read('vec4<f32>'),
        peaks: read('f32'),
        x: write('vec2<u32>'),
        factors: write('vec2<f32>'),
      },
      params: { count: 'u32', top: 'f32', clip: 'f32' },
      body: /* wgsl */ `
var<workgroup> tops: array<f32, ${ENCODE_THREADS}>;
var<workgroup> sums: array<i32, ${ENCODE_THREADS}>;
${CODES_OF}
@compute @workgroup_size(${ENCODE_THREADS})
fn main(@builtin(workgroup_id) wg: vec3<u32>, @builtin(local_invocation_index) local: u32) {
  let unit = wg.x * ${ENCODE_THREADS}u + local;
  let inside = unit < ${channels / 8}u;
  let at = wg.y * ${channels / 8}u + min(unit, ${channels / 8 - 1}u);
  let low = values[2u * at];
  let high = values[2u * at + 1u];
  var top = 0.0;
  for (var i = local; i < params.count; i += ${ENCODE_THREADS}u) { top = max(top, peaks[wg.y * params.count + i]); }
  tops[local] = top;
  for (var reach = ${ENCODE_THREADS / 2}u; reach > 0u; reach >>= 1u) {
    workgroupBarrier();
    if (local < reach) { tops[local] = max(tops[local], tops[local + reach]); }
  }
  workgroupBarrier();
  let scale = quotient(params.clip * tops[0], params.top);
  let a = codesOf(low, scale);
  let c = codesOf(high, scale);
  sums[local] = a.x + a.y + a.z + a.w + c.x + c.y + c.z + c.w;
  workgroupBarrier();
  if (inside) {
    x[at] = vec2(pack4xI8(vec4(a.x, c.x, a.y, c.y)), pack4xI8(vec4(a.z, c.z, a.w, c.w)));
    if ((local & 3u) == 0u) {
      factors[at / 4u] = vec2(scale, f32(sums[local] + sums[local + 1u] + sums[local + 2u] + sums[local + 3u]));
    }
  }
}`,
    }),
);

/** Threads of {@link normCodesKernel}, and channels of a workgroup. */
const NORM_THREADS = 256;

/** Workgroups of {@link normCodesKernel}; y = batch. */
export const normCodesGroups = (channels: number): number => Math.ceil(channels / NORM_THREADS);

/**
 * RMSNorm and codes on the row's grid, in the order of 4-bit weights: every workgroup finds the row's sum of squares and its largest value for
 * itself (8 bytes per channel, from cache) and rounds {@link NORM_THREADS} channels of it. Buffers: source [batch, channels] f32, gain [channels]; x
 * [batch, channels] bytes, factors [batch, channels/32] (scale, sum of codes). `top` is the largest code; channels a multiple of 32.
 */
export const normCodesKernel = variants(
  (channels: number): Kernel<'source' | 'gain' | 'x' | 'factors', 'eps' | 'top' | 'clip'> => {
    const fours = channels / 4;
    return defineKernel<'source' | 'gain' | 'x' | 'factors', 'eps' | 'top' | 'clip'>({
      name: `normCodes.${channels}`,
      buffers: {
        source: read('vec4<f32>'),
        gain: read('vec4<f32>'),
        x: write('vec2<u32>'),
        factors: write('vec2<f32>'),
      },
      params: { eps: 'f32', top: 'f32', clip: 'f32' },
      body: /* wgsl */ `
${CODES_OF}
var<workgroup> parts: array<vec2<f32>, ${NORM_THREADS}>;
var<workgroup> sums: array<i32, ${NORM_THREADS / 8}>;
@compute @workgroup_size(${NORM_THREADS})
fn main(@builtin(workgroup_id) wg: vec3<u32>, @builtin(local_invocation_index) local: u32) {
  let row = wg.y * ${fours}u;
  // The channels that this thread will round.
  let unit = wg.x * ${NORM_THREADS / 8}u + local;
  let inside = local < ${NORM_THREADS / 8}u && unit < ${channels / 8}u;
  let own = 2u * select(0u, unit, inside);
  var low = source[row + own] * gain[own];
  var high = source[row + own + 1u] * gain[own + 1u];
  var part = vec2<f32>();
  for (var i = local; i < ${fours}u; i += ${4 * NORM_THREADS}u) {
    // Several loads in flight; past the end the last again, which counts nothing.
${Array.from(
  { length: 4 },
  (_, j) =>
    `    let i${j} = min(i + ${j * NORM_THREADS}u, ${fours - 1}u); let e${j} = source[row + i${j}]; let g${j} = abs(gain[i${j}] * e${j});`,
).join('\n')}
${Array.from(
  { length: 4 },
  (_, j) =>
    `    part = vec2(part.x + select(0.0, dot(e${j}, e${j}), i + ${j * NORM_THREADS}u < ${fours}u), max(part.y, max(max(g${j}.x, g${j}.y), max(g${j}.z, g${j}.w))));`,
).join('\n')}
  }
  parts[local] = part;
  for (var reach = ${NORM_THREADS / 2}u; reach > 0u; reach >>= 1u) {
    workgroupBarrier();
    if (local < reach) {
      let other = parts[local + reach];
      parts[local] = vec2(parts[local].x + other.x, max(parts[local].y, other.y));
    }
  }
  workgroupBarrier();
  let norm = inverseSqrt(parts[0].x / ${channels}.0 + params.eps);
  let scale = quotient(params.clip * parts[0].y * norm, params.top);
  let a = codesOf(low * norm, scale);
  let c = codesOf(high * norm, scale);
  if (inside) { sums[local] = a.x + a.y + a.z + a.w + c.x + c.y + c.z + c.w; }
  workgroupBarrier();
  if (inside) {
    let at = wg.y * ${channels / 8}u + unit;
    x[at] = vec2(pack4xI8(vec4(a.x, c.x, a.y, c.y)), pack4xI8(vec4(a.z, c.z, a.w, c.w)));
    if ((local & 3u) == 0u) {
      factors[at / 4u] = vec2(scale, f32(sums[local] + sums[local + 1u] + sums[local + 2u] + sums[local + 3u]));
    }
  }
}`,
    });
  },
);

/** A row's place in a plan. */
export interface RowSliceCall {
  readonly source: ActivationSource;
  readonly channels: number;
  readonly row: {
    readonly hadamard?: RowHadamard;
    /** Rounds the row onto a symmetric grid. */
    readonly grid?: { readonly top: number; readonly clip: number };
  };
  readonly batch: number;
  readonly splits: number;
  readonly eps: number;
  readonly buffers: Readonly<Record<'source' | 'stats' | 'gain' | 'x' | 'factors', GPUBuffer>>;
}

/** A plan's rows over several workgroups, and the buffers that they share. */
export class RowSlices {
  readonly #gpu: GpuDevice;
  readonly #make: (bytes: number) => GPUBuffer;
  /** By transform. */
  readonly #signs = new Map<string, GPUBuffer>();
  /** By name: values and largest values, for rows of so many bytes. */
  readonly #shared = new Map<string, GPUBuffer>();

  /** `make` makes buffers that the plan frees. */
  constructor(gpu: GpuDevice, make: (bytes: number) => GPUBuffer) {
    this.#gpu = gpu;
    this.#make = make;
  }

  /** The dispatches of a row; undefined where these kernels don't take it. Gains are a norm's alone. */
  prepare({ source, channels, row, batch, splits, eps, buffers }: RowSliceCall): PreparedDispatch[] | undefined {
    const { hadamard, grid } = row;
    const gpu = this.#gpu;
    if (source === 'norm' && grid && !hadamard) {
      const { source, gain, x, factors } = buffers;
      const kernel = normCodesKernel(channels);
      return [gpu.prepare(kernel, { source, gain, x, factors }, { eps, ...grid }, [normCodesGroups(channels), batch])];
    }
    const { limits, capabilities } = gpu;
    const spread = hadamard && sliceVariant(limits, source, channels, hadamard, splits);
    if (!spread) return undefined;
    const variant: RowSliceVariant = {
      ...spread,
      scale: 1 / Math.sqrt(hadamard.m * hadamard.p),
      values: grid !== undefined,
      shuffle: (capabilities.subgroups?.min ?? 0) >= LANES,
    };
    const groups = sliceGroups(variant);
    const count = groups[0] * groups[1];
    const values = grid ? this.#buffer('values', 4 * batch * channels) : buffers.x;
    const peaks = grid ? this.#buffer('peaks', 4 * batch * count) : buffers.factors;
    const turn = gpu.prepare(
      rowSliceKernel(variant),
      {
        source: buffers.source,
        stats: buffers.stats,
        signs: this.#signsOf(spread.rows, hadamard),
        x: values,
        factors: peaks,
      },
      {},
      [...groups, batch],
    );
    if (!grid) return [turn];
    const params = { count, top: grid.top, clip: grid.clip };
    const { x, factors } = buffers;
    return [
      turn,
      gpu.prepare(encodeSlicesKernel(channels), { values, peaks, x, factors }, params, [
        encodeSliceGroups(channels),
        batch,
      ]),
    ];
  }

  #buffer(name: string, bytes: number): GPUBuffer {
    const key = `${name} ${bytes}`;
    const known = this.#shared.get(key) ?? this.#make(bytes);
    this.#shared.set(key, known);
    return known;
  }

  #signsOf(rows: number, hadamard: RowHadamard): GPUBuffer {
    const key = `${rows} ${hadamard.signs}`;
    let known = this.#signs.get(key);
    if (!known) {
      const words = signWords(rows, hadamard);
      known = this.#make(Math.max(16, words.byteLength));
      this.#gpu.upload(known, words);
      this.#signs.set(key, known);
    }
    return known;
  }
}
