// Products of integer codes on matrix units: out [m, n] f32 = s_x · s_w · (Σ a·(q − z)) + bias + residual, with a signed 8-bit codes of
// rows on one grid each, q codes of 4 or 8 bits of weights on one grid per output. Sums are exact in 32 bits.
//
// Built as gemm.ts: a workgroup makes a tile of the output from tiles of both in workgroup memory, each subgroup a part of it in
// registers. An operation costs half the bytes of f16's, and 4-bit codes become bytes in three instructions for eight: a
// nibble in the upper half of a byte, its top bit flipped, is 16·(q − 8) as a signed number, and the factor 16 leaves with
// the scales. What the zero point is more than 8 counts once per row: Σ a·(q − z) = Σ a·(q − 8) − (z − 8)·Σ a.
import { defineKernel, read, variants, write, type BufferSpec, type Kernel } from '../kernel.js';
import type { GpuCapabilities } from '../capabilities.js';
import type { IntegerBits } from '../kernels/linear-integer.js';
import { STRIP, each, tileEntry, tileLoop, tileStore, type MatrixTile } from './matrix-tiles.js';

/** A variant of {@link integerMatrixKernel}. */
export interface IntegerMatrixVariant extends MatrixTile {
  readonly bits: IntegerBits;
  readonly bias: boolean;
  readonly residual: boolean;
}

type Buffers = 'codes' | 'scales' | 'weights' | 'grids' | 'bias' | 'residual' | 'out';

/** Channels of one product of the units. */
const STEP = 32;

/** Whether a GPU has the units: 16 × 16 × 32 products of signed bytes, in subgroups of 32 lanes. */
export function hasIntegerMatrices({ subgroups, subgroupMatrices }: GpuCapabilities): boolean {
  return (
    subgroups?.min === 32 &&
    subgroups.max === 32 &&
    subgroupMatrices.some((s) => s.m === 16 && s.n === 16 && s.k === STEP && s.component === 'i8' && s.result === 'i32')
  );
}

/** Bytes of workgroup memory. */
export const integerMatrixMemory = (
  v: Pick<IntegerMatrixVariant, 'tileM' | 'tileN' | 'tileK' | 'warpsM' | 'warpsN'>,
): number => Math.max(v.tileM * (v.tileK + 16), v.warpsM * v.warpsN * STRIP * 16) + v.tileN * (v.tileK + 16);

/** Whether the kernel takes a product: whole steps, 16-byte stores, one grid per output. */
export const integerMatrixTakes = (n: number, k: number, groupSize: number): boolean =>
  n % 4 === 0 && k % 64 === 0 && groupSize === k;

/** The tile for a product, from timing (bench/webgpu-smoothrot.ts): the larger one from as many workgroups on as keep a large GPU busy. */
export function integerMatrixTile(
  m: number,
  n: number,
): Pick<IntegerMatrixVariant, 'tileM' | 'tileN' | 'tileK' | 'warpsM' | 'warpsN'> {
  const side = m > 64 && Math.ceil(m / 128) * Math.ceil(n / 128) >= 128 ? 128 : 64;
  return { tileM: side, tileN: side, tileK: 64, warpsM: 2, warpsN: 2 };
}

/**
 * Buffers: codes [m, k/16] of 16 bytes in the order of the weights' codes (encodeRowsKernel); scales [m] (scale, Σ codes); weights
 * [n, k/16] of 8 or 16 bytes; grids [n/4] of 4 words (f16 scale, zero point above); bias, residual and out in fours of f32.
 */
export const integerMatrixKernel = variants((v: IntegerMatrixVariant): Kernel<Buffers, 'm' | 'n' | 'k'> => {
  const { tileM, tileN, tileK, warpsM, warpsN, bits } = v;
  const threads = warpsM * warpsN * 32;
  // Tiles are arrays of 16 bytes (16 channels); rows are padded by one.
  const perRow = tileK / 16;
  const stride = perRow + 1;
  const [subM, subN] = [tileM / warpsM / 16, tileN / warpsN / 16];
  const [xLoads, wLoads] = [(tileM * perRow) / threads, (tileN * perRow) / threads];
  const step = threads / perRow;
  const load = `${each(xLoads, (i) => `    rx${i} = codes[ox${i} + k / 16u];`)}
${each(wLoads, (i) => `    rw${i} = weights[ow${i} + k / 16u];`)}`;
  const put = `${each(xLoads, (i) => `    tileX[(line + ${i * step}u) * ${stride}u + column] = rx${i};`)}
${each(wLoads, (i) => `    tileW[(line + ${i * step}u) * ${stride}u + column] = signedBytes(rw${i});`)}`;
  const multiply = each(
    tileK / STEP,
    (kk) => `    {
${each(subM, (i) => `      let fx${i} = subgroupMatrixLoad<subgroup_matrix_left<i8, 32, 16>, row_major>(&tileX, (warpM * ${tileM / warpsM}u + ${i * 16}u) * ${stride}u + ${kk * 2}u, ${stride}u);`)}
${each(subN, (j) => `      let fw${j} = subgroupMatrixLoad<subgroup_matrix_right<i8, 16, 32>, col_major>(&tileW, (warpN * ${tileN / warpsN}u + ${j * 16}u) * ${stride}u + ${kk * 2}u, ${stride}u);`)}
${each(subM, (i) => each(subN, (j) => `      c${i}_${j} = subgroupMatrixMultiplyAccumulate(fx${i}, fw${j}, c${i}_${j});`))}
    }`,
  );
  return defineKernel<Buffers, 'm' | 'n' | 'k'>({
    name: `integerMatrix.int${bits}.${tileM}x${tileN}x${tileK}.${warpsM}x${warpsN}`,
    features: ['subgroups', 'subgroup-matrix'],
    buffers: {
      codes: read('vec4<u32>'),
      scales: read('vec2<f32>'),
      weights: read(bits === 4 ? 'vec2<u32>' : 'vec4<u32>'),
      grids: read('vec4<u32>'),
      ...(v.bias ? { bias: read('vec4<f32>') } : {}),
      ...(v.residual ? { residual: read('vec4<f32>') } : {}),
      out: write('vec4<f32>'),
    } as Record<Buffers, BufferSpec>,
    params: { m: 'u32', n: 'u32', k: 'u32' },
    body: /* wgsl */ `
var<workgroup> tileX: array<vec4<u32>, ${Math.max(tileM * stride, warpsM * warpsN * STRIP)}>;
var<workgroup> tileW: array<vec4<u32>, ${tileN * stride}>;
${
  bits === 4
    ? `// 16 · (q − 8), channels 0 4 1 5 | 2 6 3 7 of each word.
fn signedBytes(w: vec2<u32>) -> vec4<u32> {
  return vec4(((w.x << 4u) & 0xf0f0f0f0u) ^ 0x80808080u, (w.x & 0xf0f0f0f0u) ^ 0x80808080u,
              ((w.y << 4u) & 0xf0f0f0f0u) ^ 0x80808080u, (w.y & 0xf0f0f0f0u) ^ 0x80808080u);
}`
    : `// q − 128.
fn signedBytes(w: vec4<u32>) -> vec4<u32> { return w ^ vec4(0x80808080u); }`
}
${tileEntry(v, perRow)}
  let words = params.k / 16u;
${each(xLoads, (i) => `  let ox${i} = min(wg.y * ${tileM}u + line + ${i * step}u, params.m - 1u) * words + column;`)}
${each(wLoads, (i) => `  let ow${i} = min(wg.x * ${tileN}u + line + ${i * step}u, params.n - 1u) * words + column;`)}
${each(subM, (i) => each(subN, (j) => `  var c${i}_${j}: subgroup_matrix_result<i32, 16, 16>;`))}
${each(xLoads, (i) => `  var rx${i}: vec4<u32>;`)}
${each(wLoads, (i) => `  var rw${i}: vec${bits === 4 ? 2 : 4}<u32>;`)}
${tileLoop(tileK, { load, put, multiply })}
${tileStore(
  v,
  `        let sums = bitcast<vec4<i32>>(tileX[begin + r * 9u + at]);
        let grid = grids[n];
        let row = scales[m];
        let factor = vec4(unpack2x16float(grid.x).x, unpack2x16float(grid.y).x, unpack2x16float(grid.z).x, unpack2x16float(grid.w).x);
        let over = vec4<f32>(vec4<i32>(grid >> vec4(16u)) - vec4(${bits === 4 ? 8 : 128})) * row.y;
        out[m * columns + n] = (vec4<f32>(${bits === 4 ? 'sums >> vec4(4u)' : 'sums'}) - over) * factor * row.x${v.bias ? ' + bias[n]' : ''}${v.residual ? ' + residual[m * columns + n]' : ''};`,
)}
}`,
  });
});
