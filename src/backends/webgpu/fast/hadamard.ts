// Hadamard transforms of many rows: a workgroup holds a row, which is read once and written once.
//
// Values live two to a register (a pair of neighbouring channels), and a phase transforms the channels that one thread holds:
// the base matrix over its m rows, or up to 4 bits of the power of two by butterflies. Between phases the row changes hands
// through workgroup memory, two accesses for 4 bits where shuffles would take four: 4096 channels are three phases, 14336
// (28 · 512) too. The base matrix adds up four inputs at a time: their 8 sums up to sign are shared by all outputs, so that 28
// outputs take 252 additions and not 756. The first phase scales by its own order and the last by the rest, so that f16 between
// phases keeps its range. Arithmetic in f32. While a row is transformed the next one is on its way into registers: workgroup memory
// holds so few rows that otherwise nothing would be asked for meanwhile. Bytes moved: the row in and out. Workgroup memory:
// 4 bytes a pair with `halves`, else 8, padded by one word in 16 against bank conflicts.
import { defineKernel, read, variants, write, type Kernel } from '../kernel.js';

/** A variant of {@link hadamardRowsKernel}. */
export interface HadamardRowsVariant {
  /** Channels of a row: a multiple of m · p · inner. */
  readonly channels: number;
  /** Channels between two neighbours of the transformed axis: 1, or even. */
  readonly inner: number;
  /** Order of the base matrix: 1, or a multiple of 4 up to {@link MAX_BASE}. */
  readonly m: number;
  /** Order of Sylvester's matrix, a power of two; from 2 on where inner is 1. */
  readonly p: number;
  /** [m, m] of ±1 (transposed for the inverse); part of the code. Ignored when m is 1. */
  readonly signs: string;
  /** f16 in and out and between phases, or f32. */
  readonly halves: boolean;
  readonly threads: number;
  /** Bits of the power of two that a phase takes at most: 2^bits pairs to a thread. */
  readonly bits: number;
  /** Rows of a workgroup, one after the other, each on its way while the one before is transformed; default 1. See {@link hadamardAhead}. */
  readonly ahead?: number;
}

/** Largest base matrix whose outputs fit a thread's registers. */
export const MAX_BASE = 28;

/** Elements of workgroup memory for so many pairs. */
export const padded = (pairs: number): number => pairs + (pairs >> 4);

/** Bytes of workgroup memory. */
export const hadamardRowsMemory = ({ channels, halves }: Pick<HadamardRowsVariant, 'channels' | 'halves'>): number =>
  (halves ? 4 : 8) * padded(channels / 2);

/** Whether the kernel takes a transform. */
export const hadamardRowsTakes = ({ m, p, inner }: Pick<HadamardRowsVariant, 'm' | 'p' | 'inner'>): boolean =>
  m <= MAX_BASE && (inner === 1 ? p >= 2 : inner % 2 === 0);

/** What to choose of a variant for rows of a shape, from timing (bench/webgpu-smoothrot.ts). `rows`: how many there are. */
export function hadamardRowsTuning(
  shape: Omit<HadamardRowsVariant, 'threads' | 'bits' | 'ahead'>,
  rows: number,
): Pick<HadamardRowsVariant, 'threads' | 'bits' | 'ahead'> {
  const left = Math.log2(shape.p) - (shape.inner === 1 ? 1 : 0);
  // A phase less is worth more than smaller ones.
  const bits = shape.m > 1 && Math.ceil(left / 5) < Math.ceil(left / 4) ? 5 : 4;
  const units = shape.channels / 2 / hadamardPhases({ ...shape, bits })[0].count;
  // A unit of the first phase per thread.
  const threads = Math.min(512, Math.max(128, 2 ** Math.ceil(Math.log2(units))));
  let ahead = 1;
  const most = shape.channels <= 4096 ? 4 : shape.channels < 14336 ? 8 : 16;
  while (ahead < most && rows / (2 * ahead) >= BUSY_GROUPS) ahead *= 2;
  return { threads, bits, ahead: hadamardAhead({ ...shape, threads, bits }) ? ahead : 1 };
}

/** Workgroups that keep a large GPU busy. */
const BUSY_GROUPS = 512;

/** The base matrix as {@link HadamardRowsVariant.signs}: '+' and '-' in row-major order. */
export function signsOf(base: Int8Array, direction: 'forward' | 'inverse' = 'forward'): string {
  const m = Math.sqrt(base.length);
  return Array.from(base, (_, at) => {
    const [i, j] = [Math.floor(at / m), at % m];
    return (direction === 'forward' ? base[at] : base[j * m + i]) > 0 ? '+' : '-';
  }).join('');
}

/** One phase: what a thread holds at a time, a unit: pairs at `home + r · stride`, r < count. */
export interface Phase {
  readonly count: number;
  /** In pairs. */
  readonly stride: number;
  /** What it does to v0 … v(count − 1). */
  readonly body: readonly string[];
  /** Order of the transform in this phase. */
  readonly order: number;
}

/** A transform as {@link hadamardPhases} takes it. */
export interface PhaseShape {
  readonly m: number;
  readonly p: number;
  readonly signs: string;
  readonly bits: number;
  /** Channels between two neighbours of the axis: 1, or even. */
  readonly inner: number;
}

/**
 * The phases of B ⊗ S. The base matrix, or else the highest bits of S, come first, so that threads that are neighbours hold
 * neighbouring pairs when rows are read.
 */
export function hadamardPhases({ m, p, signs, bits: most, inner }: PhaseShape): Phase[] {
  const within = inner === 1;
  // Of the power of two, what is left when a pair holds one of its bits.
  const columns = within ? p / 2 : p;
  const spread = within ? 1 : inner / 2;
  let left = Math.log2(columns);
  const phases: Phase[] = [];
  const pairs = (count: number): string[] => (within ? inPair(count) : []);
  const doubled = within ? 2 : 1;
  if (m > 1) {
    phases.push({
      count: m,
      stride: columns * spread,
      body: [...basePhase(m, signs), ...pairs(m)],
      order: doubled * m,
    });
  } else {
    const high = Math.min(most, left);
    const count = 2 ** high;
    left -= high;
    phases.push({
      count,
      stride: (columns / count) * spread,
      body: [...butterflies(count), ...pairs(count)],
      order: doubled * count,
    });
  }
  for (let low = 0; low < left; low += most) {
    const count = 2 ** Math.min(most, left - low);
    phases.push({ count, stride: 2 ** low * spread, body: butterflies(count), order: count });
  }
  return phases;
}

/**
 * WGSL: a phase of a row of `pairs`; `load` and `store` by the index of a pair. With `held`, load takes the name of a value that a
 * register holds, next(unit of the thread)_(place in it), the unit's home being home(unit).
 */
export function phaseCode(
  { count, stride, body, order }: Phase,
  pairs: number,
  threads: number,
  load: (at: string, place: string) => string,
  store: (at: string, place: string, value: string) => string,
  scale = 1 / Math.sqrt(order),
  held = false,
): string {
  const units = pairs / count;
  const each = (f: (r: number) => string): string => Array.from({ length: count }, (_, r) => f(r)).join('\n');
  const at = (r: number): string => `home + ${r * stride}u`;
  // Where all of a unit lie at constant distances in workgroup memory, addresses cost nothing.
  const place = (r: number): string => {
    if (stride % 16 === 0) return `there + ${r * (stride + stride / 16)}u`;
    return 16 % (stride * count) === 0 ? `there + ${r * stride}u` : `place(${at(r)})`;
  };
  if (held)
    return Array.from(
      { length: units / threads },
      (_, u) => /* wgsl */ `  {
    let home = home${u};
    let there = place(home);
${each((r) => `    var v${r} = ${load(`next${u}_${r}`, place(r))};`)}
${body.map((line) => `    ${line}`).join('\n')}
${each((r) => `    ${store(at(r), place(r), scale === 1 ? `v${r}` : `${scale} * v${r}`)};`)}
  }`,
    ).join('\n');
  return /* wgsl */ `  for (var unit = local; unit < ${units}u; unit += ${threads}u) {
    let home = unit / ${stride}u * ${stride * count}u + unit % ${stride}u;
    let there = place(home);
${each((r) => `    var v${r} = ${load(at(r), place(r))};`)}
${body.map((line) => `    ${line}`).join('\n')}
${each((r) => `    ${store(at(r), place(r), scale === 1 ? `v${r}` : `${scale} * v${r}`)};`)}
  }`;
}

/** Whether rows can be asked for ahead: a thread then holds what it takes of the next one, the same in every thread. */
export const hadamardAhead = (v: HadamardRowsVariant): boolean =>
  (v.channels / 2 / hadamardPhases(v)[0].count) % v.threads === 0;

/** A workgroup per row of channels, or per `ahead` rows; x and y [rows, channels], as pairs: u32 of two f16, or vec2<f32>. */
export const hadamardRowsKernel = variants((v: HadamardRowsVariant): Kernel<'x' | 'y', 'rows'> => {
  const { channels, m, p, inner, halves, threads, bits, ahead = 1 } = v;
  const pairs = channels / 2;
  const phases = hadamardPhases(v);
  const last = phases.length - 1;
  const code = phases.map((phase, i) =>
    phaseCode(
      phase,
      pairs,
      threads,
      (at, place) => `unpacked(${i > 0 ? `tile[${place}]` : ahead > 1 ? at : `x[row + ${at}]`})`,
      (at, place, value) => `${i === last ? `y[row + ${at}]` : `tile[${place}]`} = packed(${value})`,
      // Phases in the middle leave their scale to the last.
      i === 0 ? undefined : i < last ? 1 : 1 / Math.sqrt((m * p) / phases[0].order),
      ahead > 1 && i === 0,
    ),
  );
  const barrier = '\n  workgroupBarrier();\n';
  const [{ count, stride }] = phases;
  // Pairs of the row to come, in registers: unit u, place r.
  const held = Array.from({ length: pairs / count / threads }, (_, u) =>
    Array.from({ length: count }, (_, r) => ({
      name: `next${u}_${r}`,
      at: `home${u} + ${r * stride}u`,
    })),
  ).flat();
  const homes = Array.from({ length: pairs / count / threads }, (_, u) => {
    const unit = `(local + ${u * threads}u)`;
    return `  let home${u} = ${unit} / ${stride}u * ${stride * count}u + ${unit} % ${stride}u;`;
  });
  const ask = held.map(({ name, at }) => `${name} = x[coming + ${at}];`);
  const several = /* wgsl */ `
  let begin = min((wg.y * groups.x + wg.x) * ${ahead}u, params.rows - 1u);
  let end = min(begin + ${ahead}u, params.rows);
${homes.join('\n')}
  var coming = begin * PAIRS;
${held.map(({ name, at }) => `  var ${name} = x[coming + ${at}];`).join('\n')}
  for (var index = begin; index < end; index++) {
    let row = index * PAIRS;
${code[0]}
    // On its way from here on; the last row of a workgroup asks for itself again.
    coming = min(index + 1u, end - 1u) * PAIRS;
    ${ask.join('\n    ')}
${barrier}${code.slice(1).join(barrier)}${barrier}
  }`;
  const type = halves ? 'u32' : 'vec2<f32>';
  return defineKernel<'x' | 'y', 'rows'>({
    name: `hadamardRows.${m * p}${inner > 1 ? `.inner${inner}` : ''}${halves ? '.f16' : '.f32'}.t${threads}.b${bits}${ahead > 1 ? `.a${ahead}` : ''}`,
    buffers: { x: read(type), y: write(type) },
    params: { rows: 'u32' },
    body: /* wgsl */ `
const PAIRS = ${pairs}u;
var<workgroup> tile: array<${type}, ${padded(pairs)}>;
${pairWgsl(halves)}
@compute @workgroup_size(${threads})
fn main(@builtin(workgroup_id) wg: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>, @builtin(local_invocation_index) local: u32) {
${ahead > 1 ? several : `  let row = min(wg.y * groups.x + wg.x, params.rows - 1u) * PAIRS;\n${code.join(barrier)}`}
}`,
  });
});

/** WGSL: pairs in workgroup memory, and where they lie. */
export const pairWgsl = (halves: boolean): string => /* wgsl */ `
fn unpacked(w: ${halves ? 'u32' : 'vec2<f32>'}) -> vec2<f32> { return ${halves ? 'unpack2x16float(w)' : 'w'}; }
fn packed(v: vec2<f32>) -> ${halves ? 'u32' : 'vec2<f32>'} { return ${halves ? 'pack2x16float(v)' : 'v'}; }
fn place(i: u32) -> u32 { return i + (i >> 4u); }`;

/** The bit that the two values of a pair differ in. */
function inPair(count: number): string[] {
  return Array.from({ length: count }, (_, r) => `v${r} = vec2(v${r}.x + v${r}.y, v${r}.x - v${r}.y);`);
}

/** WGSL: v0 … v(count − 1) ← S·v. */
function butterflies(count: number): string[] {
  const lines: string[] = [];
  for (let reach = 1; reach < count; reach *= 2)
    for (let r = 0; r < count; r++)
      if ((r & reach) === 0)
        lines.push(`{ let a = v${r}; v${r} = a + v${r + reach}; v${r + reach} = a - v${r + reach}; }`);
  return lines;
}

/** v ← B·v, four inputs at a time: o_i += ± one of the eight sums of v_c ± v_(c+1) ± v_(c+2) ± v_(c+3). */
function basePhase(m: number, signs: string): string[] {
  const lines: string[] = [];
  const sign = (i: number, j: number): number => (signs[i * m + j] === '+' ? 1 : -1);
  for (let c = 0; c < m; c += 4) {
    const [a, b, d, e] = [c, c + 1, c + 2, c + 3].map((i) => `v${i}`);
    lines.push(
      `let s${c}_0 = ${a} + ${b}; let s${c}_1 = ${a} - ${b}; let t${c}_0 = ${d} + ${e}; let t${c}_1 = ${d} - ${e};`,
    );
    // q_xyz: a, x·b, y·(d, z·e).
    for (const x of [0, 1])
      for (const z of [0, 1])
        lines.push(`let q${c}_${x}0${z} = s${c}_${x} + t${c}_${z}; let q${c}_${x}1${z} = s${c}_${x} - t${c}_${z};`);
    for (let i = 0; i < m; i++) {
      const lead = sign(i, c);
      const x = sign(i, c + 1) === lead ? 0 : 1;
      const y = sign(i, c + 2) === lead ? 0 : 1;
      const z = sign(i, c + 3) === sign(i, c + 2) ? 0 : 1;
      const term = `q${c}_${x}${y}${z}`;
      if (c === 0) lines.push(`var o${i} = ${lead > 0 ? term : `-${term}`};`);
      else lines.push(`o${i} ${lead > 0 ? '+=' : '-='} ${term};`);
    }
  }
  for (let i = 0; i < m; i++) lines.push(`v${i} = o${i};`);
  return lines;
}
