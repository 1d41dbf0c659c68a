// Hadamard transforms of many rows of f16 whose base matrix is large, on matrix units: 28 · 512 = 14336 and its kin.
//
// A workgroup holds a row as a matrix X [m, p] in workgroup memory, padded to 32 rows. B·X and then each 32 columns times
// S₃₂ are products of 16 × 16 × 16 units, both operands ±1/4; what is left of S, up to 4 bits across the blocks of 32 columns, are butterflies
// in f32 on the way out. Adding up the base matrix in registers (hadamard.ts) takes 100 of them a thread, and leaves too few
// rows in flight. Bytes moved: the row in and out.
import type { GpuCapabilities } from '../capabilities.js';
import { f32ToF16Bits } from '../../../core/dtype.js';
import { defineKernel, read, variants, write } from '../kernel.js';
import { butterflies } from './hadamard.js';

/** Rows of the padded base matrix, and columns of a block. */
const SIDE = 32;
const THREADS = 256;
const WARPS = THREADS / 32;

/** Whether the kernel takes H = B ⊗ S of order m · p. */
export const hadamardMatrixTakes = (m: number, p: number): boolean => m > 16 && m <= SIDE && (p === 256 || p === 512);

/** Whether the GPU has the units: f16 in and out. */
export function hasHalfMatrices({ f16, subgroups, subgroupMatrices }: GpuCapabilities): boolean {
  const units = subgroupMatrices.some(
    (s) => s.m === 16 && s.n === 16 && s.k === 16 && s.component === 'f16' && s.result === 'f16',
  );
  return f16 && subgroups?.min === 32 && subgroups.max === 32 && units;
}

/** B padded with zeros to [32, 32] and S₃₂, both over 4, as f16. `base` [m, m] as in HadamardTransform, or its transpose for the inverse. */
export function hadamardOperands(base: Int8Array): Uint16Array<ArrayBuffer> {
  const m = Math.sqrt(base.length);
  const out = new Uint16Array(2 * SIDE * SIDE);
  for (let i = 0; i < SIDE; i++)
    for (let j = 0; j < SIDE; j++) {
      out[i * SIDE + j] = f32ToF16Bits(i < m && j < m ? base[i * m + j] / 4 : 0);
      let sign = 1;
      for (let common = i & j; common > 0; common >>= 1) if (common & 1) sign = -sign;
      out[SIDE * SIDE + i * SIDE + j] = f32ToF16Bits(sign / 4);
    }
  return out;
}

/** One workgroup per row: x [rows, m·p/8] of 8 f16, y [rows, m·p/2] of 2, operands of {@link hadamardOperands}. */
export const hadamardMatrixKernel = variants((m: number, p: number) => {
  // A row of X: 16 bytes per 8 channels, and 16 against bank conflicts.
  const stride = p / 8 + 1;
  const blocks = p / SIDE;
  const units = (m * p) / 2 / blocks;
  const each = (n: number, f: (i: number) => string): string => Array.from({ length: n }, (_, i) => f(i)).join('\n');
  const left = 'subgroup_matrix_left<f16, 16, 16>';
  const right = 'subgroup_matrix_right<f16, 16, 16>';
  const result = 'subgroup_matrix_result<f16, 16, 16>';
  const pairs = [0, 1].flatMap((i) => [0, 1].map((j) => [i, j] as const));
  const product = (a: string, b: string, c: string): string =>
    pairs
      .map(
        ([i, j]) =>
          `      var ${c}${i}${j} = ${result}(); ${c}${i}${j} = subgroupMatrixMultiplyAccumulate(${a}${i}0, ${b}0${j}, ${c}${i}${j}); ${c}${i}${j} = subgroupMatrixMultiplyAccumulate(${a}${i}1, ${b}1${j}, ${c}${i}${j});`,
      )
      .join('\n');
  const at = (i: number, j: number): string => `block * 4u + ${i * 16 * stride + j * 2}u`;
  const store = (c: string): string =>
    pairs
      .map(([i, j]) => `      subgroupMatrixStore<row_major>(&tile, ${at(i, j)}, ${c}${i}${j}, ${stride}u);`)
      .join('\n');
  return defineKernel({
    name: `hadamardMatrix.${m * p}`,
    features: ['f16', 'subgroups', 'subgroup-matrix'],
    buffers: { x: read('vec4<u32>'), operands: read('vec4<u32>'), y: write('u32') },
    params: { rows: 'u32' },
    body: /* wgsl */ `
var<workgroup> tile: array<vec4<u32>, ${SIDE * stride}>;
@compute @workgroup_size(${THREADS})
fn main(
  @builtin(workgroup_id) wg: vec3<u32>,
  @builtin(num_workgroups) groups: vec3<u32>,
  @builtin(local_invocation_index) local: u32,
  @builtin(subgroup_id) warp: u32,
) {
  let row = min(wg.y * groups.x + wg.x, params.rows - 1u);
  for (var i = local; i < ${(m * p) / 8}u; i += ${THREADS}u) {
    tile[i / ${p / 8}u * ${stride}u + i % ${p / 8}u] = x[row * ${(m * p) / 8}u + i];
  }
  for (var i = ${m * stride}u + local; i < ${SIDE * stride}u; i += ${THREADS}u) { tile[i] = vec4<u32>(); }
  workgroupBarrier();
  {
${pairs.map(([i, j]) => `    let b${i}${j} = subgroupMatrixLoad<${left}, row_major>(&operands, ${i * 64 + j * 2}u, 4u);`).join('\n')}
    for (var step = 0u; step < ${blocks / WARPS}u; step++) {
      let block = step * ${WARPS}u + warp;
${pairs.map(([i, j]) => `      let v${i}${j} = subgroupMatrixLoad<${right}, row_major>(&tile, ${at(i, j)}, ${stride}u);`).join('\n')}
${product('b', 'v', 'c')}
${store('c')}
    }
  }
  workgroupBarrier();
  {
${pairs.map(([i, j]) => `    let s${i}${j} = subgroupMatrixLoad<${right}, row_major>(&operands, ${128 + i * 64 + j * 2}u, 4u);`).join('\n')}
    for (var step = 0u; step < ${blocks / WARPS}u; step++) {
      let block = step * ${WARPS}u + warp;
${pairs.map(([i, j]) => `      let v${i}${j} = subgroupMatrixLoad<${left}, row_major>(&tile, ${at(i, j)}, ${stride}u);`).join('\n')}
${product('v', 's', 'c')}
${store('c')}
    }
  }
  workgroupBarrier();
  for (var unit = local; unit < ${units}u; unit += ${THREADS}u) {
    // The pair unit % 16 of every block in row unit / 16.
    let pair = unit % 16u;
    let word = pair % 4u;
    let home = unit / 16u * ${stride}u + pair / 4u;
${each(blocks, (r) => `    var v${r} = unpack2x16float(tile[home + ${r * 4}u][word]);`)}
${butterflies(blocks)
  .map((line) => `    ${line}`)
  .join('\n')}
    let to = row * ${(m * p) / 2}u + unit / 16u * ${p / 2}u + pair;
${each(blocks, (r) => `    y[to + ${r * 16}u] = pack2x16float(${16 / Math.sqrt(m * p)} * v${r});`)}
  }
}`,
  });
});
