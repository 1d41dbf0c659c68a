// What stands before a product whose input is transformed or rounded as a whole row, in one dispatch: a source (RMSNorm,
// SiLU·mul, attention's parts, or a plain vector), an online Hadamard transform, and either the row's codes on a dynamic grid or the
// normalised f16 chunks that gemv.ts reads. The sibling of activations.ts, whose transforms stay inside groups of channels.
//
// One workgroup holds the row: between phases of the transform (hadamard.ts) it changes hands through workgroup memory, and
// the grid needs the largest value of all. Bytes: the source once, the gain, 1 or 2 out per channel. Rows that don't fit
// workgroup memory in f32 lie there in f16, normalised to their largest value.
import type { GpuDevice, PreparedDispatch } from '../device.js';
import { defineKernel, read, write, type BufferSpec, type Kernel } from '../kernel.js';
import type { ActivationSource } from './activations.js';
import { CHUNK } from './gemv.js';
import { hadamardPhases, padded, pairWgsl, phaseCode } from './hadamard.js';
import { GRID_ARITHMETIC } from '../kernels/grid.js';

/** A variant of {@link rowKernel}. */
export interface RowVariant {
  readonly source: ActivationSource;
  /** A multiple of {@link CHUNK}. */
  readonly channels: number;
  /** H = B ⊗ S; see signsOf. */
  readonly hadamard?: { readonly m: number; readonly p: number; readonly inner: number; readonly signs: string };
  /** Signed bytes in the order of 4-bit weights, or f16. */
  readonly codes: boolean;
  readonly threads: number;
  /** Bytes of workgroup memory there are. */
  readonly memory: number;
  readonly subgroups: boolean;
  /** For source `attention`: its shape. */
  readonly splits?: number;
  readonly headDim?: number;
}

type Buffers = 'source' | 'stats' | 'gain' | 'x' | 'factors';

/** Bits of a phase: more would leave threads without work. */
const BITS = 3;
/** Bytes of workgroup memory beside the row: partial sums, and attention's weights. */
const beside = ({ threads, channels, headDim = 1, splits = 1, source }: RowVariant): number =>
  8 * threads + (source === 'attention' ? 4 * splits * (channels / headDim) : 0);

/** Whether the kernel takes a Hadamard transform of rows of `channels`. */
export function rowTakes(
  channels: number,
  hadamard: { readonly m: number; readonly p: number; readonly inner: number } | undefined,
): boolean {
  if (channels % CHUNK !== 0) return false;
  if (!hadamard) return true;
  const { m, p, inner } = hadamard;
  return m <= 28 && (inner === 1 ? p >= 2 : inner % 2 === 0);
}

/**
 * One workgroup per row: y = batch. Buffers: source and stats as for activationKernel, gain [channels] f32; x [batch, channels] bytes or
 * f16; factors [batch, channels/32]: (scale, sum of codes), or (largest, sum of the normalised). `top` is the largest code.
 */
export function rowKernel(v: RowVariant): Kernel<Buffers, 'eps' | 'top' | 'clip'> {
  const { channels, hadamard, threads, codes, headDim = 1, splits = 1 } = v;
  const pairs = channels / 2;
  const halves = 8 * padded(pairs) + beside(v) > v.memory;
  const phases = hadamard ? hadamardPhases({ ...hadamard, bits: BITS }) : [];
  const each = (n: number, f: (i: number) => string): string => Array.from({ length: n }, (_, i) => f(i)).join('\n');
  const loads = Math.ceil(pairs / threads);
  const guard = (i: number): string => ((i + 1) * threads <= pairs ? '' : `if (local + ${i * threads}u < PAIRS) `);
  const value: Record<ActivationSource, string> = {
    norm: 'source[b * PAIRS + at]',
    silu: 'silu(source[b * 2u * PAIRS + at]) * source[(b * 2u + 1u) * PAIRS + at]',
    attention: 'combined(b, at)',
    plain: 'source[b * PAIRS + at]',
  };
  const buffers: Partial<Record<Buffers, BufferSpec>> = {
    source: read('vec2<f32>'),
    ...(v.source === 'attention' ? { stats: read('vec2<f32>') } : {}),
    gain: read('vec2<f32>'),
    x: write('vec4<u32>'),
    factors: write('vec2<f32>'),
  };
  const reduceParts = reduction(v);
  return defineKernel<Buffers, 'eps' | 'top' | 'clip'>({
    name: `row.${v.source}.${channels}${hadamard ? `.hadamard${hadamard.m * hadamard.p}` : ''}${codes ? '.codes' : ''}${halves ? '.f16' : ''}`,
    features: v.subgroups ? ['subgroups'] : [],
    buffers: buffers as Record<Buffers, BufferSpec>,
    params: { eps: 'f32', top: 'f32', clip: 'f32' },
    body: /* wgsl */ `
const PAIRS = ${pairs}u;
var<workgroup> tile: array<${halves ? 'u32' : 'vec2<f32>'}, ${padded(pairs)}>;
${pairWgsl(halves)}
${codes ? GRID_ARITHMETIC : ''}
${reduceParts.declarations}
fn silu(g: vec2<f32>) -> vec2<f32> { return g / (1.0 + exp(-g)); }
${
  v.source === 'attention'
    ? /* wgsl */ `
const SPLITS = ${splits}u;
const HEADS = ${channels / headDim}u;
// What each part counts in its head's result.
var<workgroup> shares: array<f32, ${(channels / headDim) * splits}>;
fn combined(b: u32, at: u32) -> vec2<f32> {
  let head = at / ${headDim / 2}u;
  let first = (b * HEADS + head) * SPLITS * ${headDim / 2}u + at % ${headDim / 2}u;
  var out = vec2<f32>();
  for (var s = 0u; s < SPLITS; s++) {
    let share = shares[head * SPLITS + s];
    // Parts without keys were not written: their values may be anything, infinities too.
    out += select(vec2<f32>(), share * source[first + s * ${headDim / 2}u], share > 0.0);
  }
  return out;
}`
    : ''
}
@compute @workgroup_size(${threads})
fn main(@builtin(workgroup_id) wg: vec3<u32>, @builtin(local_invocation_index) local: u32${reduceParts.builtins}) {
  let b = wg.y;
${
  v.source === 'attention'
    ? /* wgsl */ `
  for (var head = local; head < HEADS; head += ${threads}u) {
    let part = (b * HEADS + head) * SPLITS;
    var best = -1e30;
    for (var s = 0u; s < SPLITS; s++) { if (stats[part + s].y > 0.0) { best = max(best, stats[part + s].x); } }
    var sum = 0.0;
    for (var s = 0u; s < SPLITS; s++) {
      let e = stats[part + s];
      if (e.y > 0.0) { sum = fma(exp(e.x - best), e.y, sum); }
    }
    for (var s = 0u; s < SPLITS; s++) {
      let e = stats[part + s];
      shares[head * SPLITS + s] = select(0.0, exp(e.x - best) / sum, e.y > 0.0);
    }
  }
  workgroupBarrier();`
    : ''
}
  var squares = 0.0;
  var largest = 0.0;
${each(
  loads,
  (i) => `  var e${i} = vec2<f32>();
  ${guard(i)}{ let at = local + ${i * threads}u; let raw = ${value[v.source]};${v.source === 'norm' ? ' squares += dot(raw, raw);' : ''} e${i} = gain[at] * raw; }`,
)}
${halves || !hadamard ? each(loads, (i) => `  largest = max(largest, max(abs(e${i}.x), abs(e${i}.y)));`) : ''}
  // What values in the tile are to be multiplied by.
  var unit = 1.0;
${v.source === 'norm' ? `${reduceParts.sum('squares')}\n  unit = inverseSqrt(squares / ${channels}.0 + params.eps);` : ''}
${
  halves
    ? `${reduceParts.max('largest')}
  let inverse = select(1.0 / largest, 0.0, largest == 0.0);
  unit *= largest;
  largest = select(1.0, 0.0, largest == 0.0);
${each(loads, (i) => `  e${i} *= inverse;`)}`
    : ''
}
${each(loads, (i) => `  ${guard(i)}{ tile[place(local + ${i * threads}u)] = packed(e${i}); }`)}
${hadamard && halves ? '  largest = 0.0;' : ''}
${phases
  .map((phase, i) => {
    const last = i === phases.length - 1;
    return `  workgroupBarrier();\n${phaseCode(
      phase,
      pairs,
      threads,
      (_, place) => `unpacked(tile[${place}])`,
      (_, place, y) =>
        last
          ? `{ let y = ${y}; largest = max(largest, max(abs(y.x), abs(y.y))); tile[${place}] = packed(y); }`
          : `tile[${place}] = packed(${y})`,
    )}`;
  })
  .join('\n')}
${codes ? reduceParts.max('largest') : '  workgroupBarrier();'}
${codes ? encode() : chunked()}
}`,
  });
}

/** A row's place in a plan. */
export interface RowCall {
  readonly source: ActivationSource;
  readonly channels: number;
  readonly row: {
    readonly hadamard?: RowVariant['hadamard'];
    readonly grid?: { readonly top: number; readonly clip: number };
  };
  readonly batch: number;
  readonly splits: number;
  readonly headDim: number;
  readonly eps: number;
  readonly buffers: Readonly<Record<Buffers, GPUBuffer>>;
}

/** The dispatch of a plan. */
export function prepareRow(gpu: GpuDevice, call: RowCall): PreparedDispatch {
  const { source, channels, row, batch, splits, headDim, eps, buffers } = call;
  const { limits, capabilities } = gpu;
  const kernel = rowKernel({
    source,
    channels,
    ...(row.hadamard && { hadamard: row.hadamard }),
    codes: row.grid !== undefined,
    threads: rowThreads(channels, limits.maxComputeInvocationsPerWorkgroup),
    memory: limits.maxComputeWorkgroupStorageSize,
    subgroups: capabilities.subgroups !== undefined,
    splits,
    headDim,
  });
  return gpu.prepare(kernel, buffers, { eps, top: row.grid?.top ?? 0, clip: row.grid?.clip ?? 1 }, [1, batch]);
}

/** Threads of a row: enough to keep a core busy, few enough that each has a few values. */
export function rowThreads(channels: number, most: number): number {
  let threads = 64;
  while (threads * 2 <= Math.min(most, 1024) && threads * 8 < channels) threads *= 2;
  return threads;
}

/** WGSL: codes of chunks of 32 channels, the order of kernels/weights.ts, with the row's scale and their sum. */
function encode(): string {
  return /* wgsl */ `
  let scale = quotient(params.clip * largest * unit, params.top);
  for (var c = local; c < PAIRS / 16u; c += THREADS) {
    var words: array<u32, 8>;
    var sum = 0;
    for (var g = 0u; g < 4u; g++) {
      var q: array<vec2<i32>, 4>;
      for (var j = 0u; j < 4u; j++) {
        let y = unit * unpacked(tile[place(c * 16u + g * 4u + j)]);
        if (scale > 0.0) { q[j] = vec2(codeOf(y.x, scale), codeOf(y.y, scale)); }
        sum += q[j].x + q[j].y;
      }
      words[2u * g] = pack4xI8(vec4(q[0].x, q[2].x, q[0].y, q[2].y));
      words[2u * g + 1u] = pack4xI8(vec4(q[1].x, q[3].x, q[1].y, q[3].y));
    }
    let out = b * (PAIRS / 16u) + c;
    x[2u * out] = vec4(words[0], words[1], words[2], words[3]);
    x[2u * out + 1u] = vec4(words[4], words[5], words[6], words[7]);
    factors[out] = vec2(scale, f32(sum));
  }`;
}

/** WGSL: chunks of 32 channels normalised to |x| ≤ 1, with their largest value and sum. */
function chunked(): string {
  return /* wgsl */ `
  for (var c = local; c < PAIRS / 16u; c += THREADS) {
    var top = 0.0;
    for (var j = 0u; j < 16u; j++) {
      let y = unpacked(tile[place(c * 16u + j)]);
      top = max(top, max(abs(y.x), abs(y.y)));
    }
    let inverse = select(1.0 / top, 0.0, top == 0.0);
    let out = b * (PAIRS / 16u) + c;
    var sum = 0.0;
    for (var g = 0u; g < 4u; g++) {
      var words: array<u32, 4>;
      for (var j = 0u; j < 4u; j++) {
        words[j] = pack2x16float(inverse * unpacked(tile[place(c * 16u + g * 4u + j)]));
        sum += dot(unpack2x16float(words[j]), vec2(1.0));
      }
      x[4u * out + g] = vec4(words[0], words[1], words[2], words[3]);
    }
    factors[out] = vec2(top * unit, sum);
  }`;
}

/** WGSL: sums and maxima over the workgroup, on every thread. */
function reduction({ threads, subgroups, codes }: RowVariant): {
  declarations: string;
  builtins: string;
  sum: (name: string) => string;
  max: (name: string) => string;
} {
  const steps = (name: string, combine: (a: string, b: string) => string, add: string): string =>
    subgroups
      ? /* wgsl */ `
  { let part = ${add}(${name});
    workgroupBarrier();
    if (lane == 0u) { partial[local / lanes] = part; } }
  workgroupBarrier();
  ${name} = partial[0];
  for (var i = 1u; i < (THREADS + lanes - 1u) / lanes; i++) { ${name} = ${combine(name, 'partial[i]')}; }`
      : /* wgsl */ `
  workgroupBarrier();
  partial[local] = ${name};
  for (var reach = ${threads / 2}u; reach > 0u; reach >>= 1u) {
    workgroupBarrier();
    if (local < reach) { partial[local] = ${combine('partial[local]', 'partial[local + reach]')}; }
  }
  workgroupBarrier();
  ${name} = partial[0];`;
  return {
    declarations: `const THREADS = ${threads}u;
var<workgroup> partial: array<f32, ${threads}>;
${
  codes
    ? `fn codeOf(y: f32, scale: f32) -> i32 { return i32(clamp(round(quotient(y, scale)), -params.top - 1.0, params.top)); }`
    : ''
}`,
    builtins: subgroups ? ', @builtin(subgroup_invocation_id) lane: u32, @builtin(subgroup_size) lanes: u32' : '',
    sum: (name) => steps(name, (a, b) => `${a} + ${b}`, 'subgroupAdd'),
    max: (name) => steps(name, (a, b) => `max(${a}, ${b})`, 'subgroupMax'),
  };
}
