// The transform on many rows of activations, on matrix units: the scale and the K rotations of a block of 128 channels are one
// dense 128 × 128 matrix R, and y = x · R.
//
// 256 operations per element and 4 bytes: 64 per byte, a third of what the units could do meanwhile. Each subgroup keeps its 32
// columns of R in registers for all its rows, which come and go through workgroup memory 16 bytes at a time. The units add 16
// products at a time and round to f16 between: eight roundings, as many as rotations one by one would take. Works for any pairs
// in groups of 32, 64 or 128.
import { defineKernel, read, variants, write } from '../kernel.js';

/** Channels of a matrix R. */
export const ROTATE_BLOCK = 128;

/** A variant of {@link rotateDenseKernel}. */
export interface RotateDenseVariant {
  /** Rows per workgroup, a multiple of `tile`. */
  readonly rows: number;
  /** Rows per step: 16, 32 or 64. */
  readonly tile: number;
}

/** Whether the kernel takes a transform. */
export const rotateDenseTakes = (channels: number, groupSize: number): boolean =>
  channels % ROTATE_BLOCK === 0 && ROTATE_BLOCK % groupSize === 0;

/** Workgroups below which a large GPU has idle cores. */
const BUSY = 128;

/** Long blocks of rows where there are enough of them: each loads R once. */
export function chooseRotateDense(rows: number, channels: number): RotateDenseVariant {
  const blocks = channels / ROTATE_BLOCK;
  let each = 2048;
  while (each > 64 && (each > rows / 4 || Math.ceil(rows / each) * blocks < BUSY)) each /= 2;
  return { rows: each, tile: 64 };
}

/**
 * Workgroups: blocks of 128 channels, blocks of `rows` rows. Buffers: x, y [rows, channels/8] of 8 f16; r [128, channels/8] of 8
 * f16: row c has, block beside block, the images of each block's channel c.
 */
export const rotateDenseKernel = variants(({ rows, tile }: RotateDenseVariant) => {
  const each = (n: number, f: (i: number) => string): string => Array.from({ length: n }, (_, i) => f(i)).join('\n');
  const stride = ROTATE_BLOCK / 8 + 1;
  const subs = tile / 16;
  const loads = tile / 8;
  // R passes through the tile's memory, as many rows at a time as fit.
  const portion = 64;
  return defineKernel({
    name: `rotateDense.r${rows}.t${tile}`,
    features: ['f16', 'subgroups', 'subgroup-matrix'],
    buffers: { x: read('vec4<u32>'), r: read('vec4<u32>'), y: write('vec4<u32>') },
    params: { rows: 'u32', channels: 'u32' },
    body: /* wgsl */ `
var<workgroup> tile: array<vec4<u32>, ${Math.max(tile, portion) * stride}>;
var<workgroup> result: array<vec4<u32>, ${tile * stride}>;

@compute @workgroup_size(128)
fn main(@builtin(workgroup_id) wg: vec3<u32>, @builtin(local_invocation_index) local: u32, @builtin(subgroup_id) warp: u32) {
  let words = params.channels / 8u;
  let column = wg.x * 16u + local % 16u;
  let line = local / 16u;
${each(8, (k) => each(2, (j) => `  var r${k}_${j}: subgroup_matrix_right<f16, 16, 16>;`))}
${each(
  ROTATE_BLOCK / portion,
  (p) => `  workgroupBarrier();
${each(portion / 8, (i) => `  tile[(line + ${i * 8}u) * ${stride}u + local % 16u] = r[(line + ${p * portion + i * 8}u) * words + column];`)}
  workgroupBarrier();
${each(portion / 16, (q) => each(2, (j) => `  r${(p * portion) / 16 + q}_${j} = subgroupMatrixLoad<subgroup_matrix_right<f16, 16, 16>, row_major>(&tile, ${q * 16 * stride}u + warp * 4u + ${j * 2}u, ${stride}u);`))}`,
)}
  workgroupBarrier();
  let first = wg.y * ${rows}u;
  let last = min(first + ${rows}u, params.rows);
  let end = params.rows - 1u;
${each(loads, (i) => `  var a${i} = x[min(first + line + ${i * 8}u, end) * words + column];`)}
  for (var row = first; row < last; row += ${tile}u) {
${each(loads, (i) => `    tile[(line + ${i * 8}u) * ${stride}u + local % 16u] = a${i};`)}
    workgroupBarrier();
    if (row + ${tile}u < last) {
${each(loads, (i) => `      a${i} = x[min(row + ${tile}u + line + ${i * 8}u, end) * words + column];`)}
    }
${each(subs, (i) => each(2, (j) => `    var c${i}_${j} = subgroup_matrix_result<f16, 16, 16>();`))}
${each(
  8,
  (k) => `    {
${each(subs, (i) => `      let f${i} = subgroupMatrixLoad<subgroup_matrix_left<f16, 16, 16>, row_major>(&tile, ${i * 16 * stride + k * 2}u, ${stride}u);`)}
${each(subs, (i) => each(2, (j) => `      c${i}_${j} = subgroupMatrixMultiplyAccumulate(f${i}, r${k}_${j}, c${i}_${j});`))}
    }`,
)}
${each(subs, (i) => each(2, (j) => `    subgroupMatrixStore<row_major>(&result, ${i * 16 * stride}u + warp * 4u + ${j * 2}u, c${i}_${j}, ${stride}u);`))}
    workgroupBarrier();
${each(loads, (i) => `    if (row + line + ${i * 8}u <= end) { y[(row + line + ${i * 8}u) * words + column] = result[(line + ${i * 8}u) * ${stride}u + local % 16u]; }`)}
  }
}`,
  });
});
