// Pairwise rotations along the channels of channel-major weights [channels, cols]: a workgroup holds one group of channels
// × a tile of columns in workgroup memory through all rotations. Bytes moved: the matrix in and out once, pairs and
// angles once per tile (cached); 2·K passes over workgroup memory, neighbouring threads on neighbouring columns.
import { defineKernel, read, write, type Kernel } from '../kernel.js';

/** Columns per tile of a group of `groupSize` channels, so that `copies` tiles fit `bytes` of workgroup memory; 0 when none fits. */
export function tileColumns(groupSize: number, copies: number, bytes: number, most: number): number {
  let columns = most;
  while (columns > 0 && groupSize * columns * copies * 4 > bytes) columns >>= 1;
  return columns;
}

/** Threads per workgroup: enough for a group of 128 channels, and few enough that barriers stay cheap. */
const THREADS = 128;

/** WGSL: loop over rotation k's pairs × columns; `pair` is i | j << 16, local to the group. */
const rotation = (groupSize: number, columns: number, tiles: readonly string[], sign: string): string => /* wgsl */ `
    for (var at = local; at < ${(groupSize >> 1) * columns}u; at += ${THREADS}u) {
      let entry = k * (params.channels / 2u) + base / 2u + at / ${columns}u;
      let pair = pairs[entry];
      let i = (pair & 0xffffu) * ${columns}u + at % ${columns}u;
      let j = (pair >> 16u) * ${columns}u + at % ${columns}u;
      let c = angles[entry].x;
      let s = ${sign}angles[entry].y;
${tiles
  .map(
    (tile) => `      { let x = ${tile}[i]; let y = ${tile}[j];
        ${tile}[i] = fma(x, c, y * s); ${tile}[j] = fma(y, c, -(x * s)); }`,
  )
  .join('\n')}
    }
    workgroupBarrier();`;

type RotateBuffers = 'x' | 'pairs' | 'angles' | 'scales' | 'out';
type RotateParams = 'channels' | 'cols' | 'krot';
const rotates = new Map<string, Kernel<RotateBuffers, RotateParams>>();

/**
 * forward: x ⊙ scales, then the rotations; inverse: the rotations backwards, then ÷ scales. Angles are (cos θ, sin θ).
 * Workgroups: (column tiles, groups).
 */
export function rotateKernel(
  groupSize: number,
  columns: number,
  direction: 'forward' | 'inverse',
): Kernel<RotateBuffers, RotateParams> {
  const name = `rotateChannels.${direction}.g${groupSize}.c${columns}`;
  const known = rotates.get(name);
  if (known) return known;
  const forward = direction === 'forward';
  const size = groupSize * columns;
  const kernel = defineKernel({
    name,
    buffers: {
      x: read('f32'),
      pairs: read('u32'),
      angles: read('vec2<f32>'),
      scales: read('f32'),
      out: write('f32'),
    },
    params: { channels: 'u32', cols: 'u32', krot: 'u32' },
    body: /* wgsl */ `
var<workgroup> tile: array<f32, ${size}>;
@compute @workgroup_size(${THREADS})
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) local: u32) {
  let base = group.y * ${groupSize}u;
  let col0 = group.x * ${columns}u;
  for (var at = local; at < ${size}u; at += ${THREADS}u) {
    let row = base + at / ${columns}u;
    let col = col0 + at % ${columns}u;
    var value = 0.0;
    if (col < params.cols) { value = x[row * params.cols + col]${forward ? ' * scales[row]' : ''}; }
    tile[at] = value;
  }
  workgroupBarrier();
  for (var n = 0u; n < params.krot; n++) {
    let k = ${forward ? 'n' : 'params.krot - 1u - n'};
${rotation(groupSize, columns, ['tile'], forward ? '' : '-')}
  }
  for (var at = local; at < ${size}u; at += ${THREADS}u) {
    let row = base + at / ${columns}u;
    let col = col0 + at % ${columns}u;
    if (col < params.cols) { out[row * params.cols + col] = tile[at]${forward ? '' : ' / scales[row]'}; }
  }
}`,
  });
  rotates.set(name, kernel);
  return kernel;
}

/** Threads that share one pair's columns in {@link gradientKernel}. */
const LANES = 4;

/** Partial sums per column tile of {@link gradientKernel}. */
export const GRADIENT_PARTS = LANES;

type GradientBuffers = 'g' | 'y' | 'w' | 'pairs' | 'angles' | 'scales' | 'out' | 'parts';
const gradients = new Map<string, Kernel<GradientBuffers, RotateParams>>();

/**
 * One side of the objective's backward pass.
 *
 * outer: g = ∂L/∂Ŵ and y = Ŵ; through ÷ s and the inverse rotations. Writes ∂L/∂Q.
 * inner: g = ∂L/∂Y and y = Y; through the rotations and ⊙ s, with w = W. Writes nothing but sums.
 *
 * `parts` [column tiles · 4, K·channels/2 + channels]: partial sums of the angles' gradients, then of the scales'. Each of
 * four threads sums a quarter of a tile's columns for one pair, so that nothing is exchanged.
 */
export function gradientKernel(
  groupSize: number,
  columns: number,
  side: 'outer' | 'inner',
): Kernel<GradientBuffers, RotateParams> {
  const name = `objectiveGradient.${side}.g${groupSize}.c${columns}`;
  const known = gradients.get(name);
  if (known) return known;
  const outer = side === 'outer';
  const size = groupSize * columns;
  const lanes = Math.min(LANES, columns);
  const share = columns / lanes;
  // Rows of a tile start on the same banks: neighbouring pairs start at different columns.
  const sum = (term: string, row: string): string => /* wgsl */ `
      var sum = 0.0;
      for (var n = 0u; n < ${share}u; n++) {
        let c = lane * ${share}u + (n + ${row}) % ${share}u;
        sum += ${term};
      }`;
  const angles = /* wgsl */ `
    for (var at = local; at < ${(groupSize >> 1) * lanes}u; at += ${THREADS}u) {
      let lane = at % ${lanes}u;
      let p = at / ${lanes}u;
      let entry = k * (params.channels / 2u) + base / 2u + p;
      let i = (pairs[entry] & 0xffffu) * ${columns}u;
      let j = (pairs[entry] >> 16u) * ${columns}u;
${sum('tileG[i + c] * tileY[j + c] - tileG[j + c] * tileY[i + c]', 'p')}
      parts[(group.x * ${LANES}u + lane) * perPart + entry] = ${outer ? '-' : ''}sum;
    }
    workgroupBarrier();`;
  const scales = (term: string): string => /* wgsl */ `
  for (var at = local; at < ${groupSize * lanes}u; at += ${THREADS}u) {
    let lane = at % ${lanes}u;
    let p = at / ${lanes}u;
    let row = base + p;
${sum(term, 'p')}
    parts[(group.x * ${LANES}u + lane) * perPart + params.krot * (params.channels / 2u) + row] = ${outer ? '-' : ''}sum;
  }`;
  const kernel = defineKernel({
    name,
    buffers: {
      g: read('f32'),
      y: read('f32'),
      w: read('f32'),
      pairs: read('u32'),
      angles: read('vec2<f32>'),
      scales: read('f32'),
      out: write('f32'),
      parts: write('f32'),
    },
    params: { channels: 'u32', cols: 'u32', krot: 'u32' },
    body: /* wgsl */ `
var<workgroup> tileG: array<f32, ${size}>;
var<workgroup> tileY: array<f32, ${size}>;
@compute @workgroup_size(${THREADS})
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) local: u32) {
  let base = group.y * ${groupSize}u;
  let col0 = group.x * ${columns}u;
  let perPart = params.krot * (params.channels / 2u) + params.channels;
  for (var at = local; at < ${size}u; at += ${THREADS}u) {
    let row = base + at / ${columns}u;
    let col = col0 + at % ${columns}u;
    var x = 0.0;
    var z = 0.0;
    if (col < params.cols) {
      x = g[row * params.cols + col]${outer ? ' / scales[row]' : ''};
      z = y[row * params.cols + col]${outer ? ' * scales[row]' : ''};
    }
    tileG[at] = x;
    tileY[at] = z;
  }
  workgroupBarrier();
${
  outer
    ? /* wgsl */ `
${scales(`tileG[p * ${columns}u + c] * tileY[p * ${columns}u + c] / scales[row]`)}
  workgroupBarrier();
  for (var k = 0u; k < params.krot; k++) {
${angles}
${rotation(groupSize, columns, ['tileG', 'tileY'], '')}
  }
  for (var at = local; at < ${size}u; at += ${THREADS}u) {
    let row = base + at / ${columns}u;
    let col = col0 + at % ${columns}u;
    if (col < params.cols) { out[row * params.cols + col] = tileG[at]; }
  }`
    : /* wgsl */ `
  for (var n = 0u; n < params.krot; n++) {
    let k = params.krot - 1u - n;
${angles}
${rotation(groupSize, columns, ['tileG', 'tileY'], '-')}
  }
  for (var at = local; at < ${size}u; at += ${THREADS}u) {
    let row = base + at / ${columns}u;
    let col = col0 + at % ${columns}u;
    var z = 0.0;
    if (col < params.cols) { z = w[row * params.cols + col]; }
    tileY[at] = z;
  }
  workgroupBarrier();
${scales(`tileG[p * ${columns}u + c] * tileY[p * ${columns}u + c]`)}`
}
}`,
  });
  gradients.set(name, kernel);
  return kernel;
}
