// The transform on many rows of activations, on matrix units: the scale and the K rotations of a group of 128 channels are one
// dense 128 × 128 matrix R, and y = x · R.
//
// 256 operations per element and 4 bytes: 64 per byte, a third of what the units could do meanwhile. Each subgroup keeps its 32
// columns of R in registers for all its rows. The units add 16 products at a time and round to f16 between: eight roundings, as
// many as rotations one by one would take. Works for any pairs.
import { defineKernel, read, write, type Kernel } from '../kernel.js';
import { f32ToF16Bits } from '../../../core/dtype.js';
import type { PairwiseTransform } from '../../../ops/backend.js';

const GROUP = 128;

/** A variant of {@link rotateDenseKernel}. */
export interface RotateDenseVariant {
  /** Rows per workgroup, a multiple of `tile`. */
  readonly rows: number;
  /** Rows per step: 16, 32 or 64. */
  readonly tile: number;
  /** Rows come through workgroup memory (one wide load serves all subgroups), else each subgroup reads them itself. */
  readonly stageIn: boolean;
  /** Results leave through workgroup memory in 16-byte stores, else 32 bytes of a row at a time from the units. */
  readonly stageOut: boolean;
}

type Buffers = 'x' | 'r' | 'y';

/**
 * Workgroups: groups of 128 channels, blocks of `rows` rows. Buffers: x, y [rows, channels/8] of 8 f16; r [groups, 128, 16] of 8
 * f16, row c of a group being the image of channel c. Rows are a multiple of `tile` (pad the buffers).
 */
export function rotateDenseKernel(v: RotateDenseVariant): Kernel<Buffers, 'rows' | 'channels'> {
  const { rows, tile, stageIn, stageOut } = v;
  const each = (n: number, f: (i: number) => string): string => Array.from({ length: n }, (_, i) => f(i)).join('\n');
  const stride = GROUP / 8 + 1;
  const subs = tile / 16;
  const loads = tile / 8;
  // R passes through the tiles' memory, as many rows at a time as fit.
  const portion = 64;
  return defineKernel({
    name: `rotateDense.r${rows}.t${tile}${stageIn ? '.in' : ''}${stageOut ? '.out' : ''}`,
    features: ['f16', 'subgroups', 'subgroup-matrix'],
    buffers: { x: read('vec4<u32>'), r: read('vec4<u32>'), y: write('vec4<u32>') },
    params: { rows: 'u32', channels: 'u32' },
    body: /* wgsl */ `
var<workgroup> tile: array<vec4<u32>, ${Math.max(tile, portion) * stride}>;
${stageOut ? `var<workgroup> result: array<vec4<u32>, ${tile * stride}>;` : ''}

@compute @workgroup_size(128)
fn main(@builtin(workgroup_id) wg: vec3<u32>, @builtin(local_invocation_index) local: u32, @builtin(subgroup_id) warp: u32) {
  let words = params.channels / 8u;
${each(8, (k) => each(2, (j) => `  var r${k}_${j}: subgroup_matrix_right<f16, 16, 16>;`))}
${each(
  GROUP / portion,
  (p) => `  workgroupBarrier();
${each((portion * 16) / 128, (i) => `  { let i = local + ${i * 128}u; tile[(i / 16u) * ${stride}u + i % 16u] = r[wg.x * 2048u + ${p * portion * 16}u + i]; }`)}
  workgroupBarrier();
${each(portion / 16, (q) => each(2, (j) => `  r${(p * portion) / 16 + q}_${j} = subgroupMatrixLoad<subgroup_matrix_right<f16, 16, 16>, row_major>(&tile, ${q * 16 * stride}u + warp * 4u + ${j * 2}u, ${stride}u);`))}`,
)}
  workgroupBarrier();
  let first = wg.y * ${rows}u;
  let last = min(first + ${rows}u, params.rows);
  let column = wg.x * 16u + local % 16u;
  let line = local / 16u;
${stageIn ? each(loads, (i) => `  var a${i} = x[(first + line + ${i * 8}u) * words + column];`) : ''}
  for (var row = first; row < last; row += ${tile}u) {
${
  stageIn
    ? `${each(loads, (i) => `    tile[(line + ${i * 8}u) * ${stride}u + local % 16u] = a${i};`)}
    workgroupBarrier();
    if (row + ${tile}u < last) {
${each(loads, (i) => `      a${i} = x[(row + ${tile}u + line + ${i * 8}u) * words + column];`)}
    }`
    : ''
}
${each(subs, (i) => each(2, (j) => `    var c${i}_${j} = subgroup_matrix_result<f16, 16, 16>();`))}
${each(
  8,
  (k) => `    {
${each(subs, (i) =>
  stageIn
    ? `      let f${i} = subgroupMatrixLoad<subgroup_matrix_left<f16, 16, 16>, row_major>(&tile, ${i * 16 * stride + k * 2}u, ${stride}u);`
    : `      let f${i} = subgroupMatrixLoad<subgroup_matrix_left<f16, 16, 16>, row_major>(&x, (row + ${i * 16}u) * words + wg.x * 16u + ${k * 2}u, words);`,
)}
${each(subs, (i) => each(2, (j) => `      c${i}_${j} = subgroupMatrixMultiplyAccumulate(f${i}, r${k}_${j}, c${i}_${j});`))}
    }`,
)}
${
  stageOut
    ? `${each(subs, (i) => each(2, (j) => `    subgroupMatrixStore<row_major>(&result, ${i * 16 * stride}u + warp * 4u + ${j * 2}u, c${i}_${j}, ${stride}u);`))}
    workgroupBarrier();
${each(loads, (i) => `    y[(row + line + ${i * 8}u) * words + column] = result[(line + ${i * 8}u) * ${stride}u + local % 16u];`)}`
    : `${each(subs, (i) => each(2, (j) => `    subgroupMatrixStore<row_major>(&y, (row + ${i * 16}u) * words + wg.x * 16u + warp * 4u + ${j * 2}u, c${i}_${j}, words);`))}
${stageIn ? '    workgroupBarrier();' : ''}`
}
  }
}`,
  });
}

/** R of every group as f16: [groups, 128, 128], row c the image of channel c under scale and rotations. */
export function rotationMatrices(transform: PairwiseTransform): Uint16Array<ArrayBuffer> {
  const { channels, groupSize, krot, pairs, theta, channelScales } = transform;
  const out = new Uint16Array(channels * GROUP);
  const row = new Float64Array(GROUP);
  for (let c = 0; c < channels; c++) {
    const block = Math.floor(c / GROUP) * GROUP;
    row.fill(0);
    row[c - block] = channelScales[c];
    for (let k = 0; k < krot; k++)
      for (let p = block / 2; p < (block + GROUP) / 2; p++) {
        const home = Math.floor((2 * p) / groupSize) * groupSize - block;
        const i = home + pairs[k * channels + 2 * p];
        const j = home + pairs[k * channels + 2 * p + 1];
        if (row[i] === 0 && row[j] === 0) continue;
        const angle = theta[(k * channels) / 2 + p];
        const [cos, sin] = [Math.cos(angle), Math.sin(angle)];
        [row[i], row[j]] = [row[i] * cos + row[j] * sin, row[j] * cos - row[i] * sin];
      }
    for (let e = 0; e < GROUP; e++) out[c * GROUP + e] = f32ToF16Bits(row[e]);
  }
  return out;
}
