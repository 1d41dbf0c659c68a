// Matrix products on matrix units (subgroup matrices): out [m, n] f32 = x [m, k] · W [n, k]ᵀ + bias + residual, x in f16, W in
// f16, bf16 or quantized to 4 bits, sums in f32.
//
// A workgroup computes a tile of the output from tiles of x and W in workgroup memory, each subgroup a part of it in registers;
// the next tiles are on their way from memory while the units work. int4 codes become f16 on their way into workgroup memory.
// Operations 2·m·n·k; bytes m·k·2·(n/tileN) + n·k·(2 or 0.53)·(m/tileM), mostly from L2. Rows of the tiles are padded by 16 bytes
// against bank conflicts. Tiles that hang over an edge repeat its last row and don't store what is beyond; sums leave through
// workgroup memory, where bias and residual meet them.
import { ensure } from '../../../core/errors.js';
import { defineKernel, read, variants, write, type BufferSpec, type Kernel } from '../kernel.js';
import { halfWgsl } from './half.js';
import { STRIP, each, tileEntry, tileLoop, tileStore, type MatrixTile } from './matrix-tiles.js';

/** A variant of {@link gemmKernel}. */
export interface GemmVariant extends MatrixTile {
  readonly weights: 'f16' | 'bf16' | 'int4';
  /** For int4: channels per grid group, a multiple of tileK. */
  readonly groupSize: number;
  readonly bias: boolean;
  readonly residual: boolean;
}

export type GemmBuffers = 'x' | 'weights' | 'grids' | 'bias' | 'residual' | 'out';
type GemmKernel<B extends string> = Kernel<B, 'm' | 'n' | 'k'>;

/** Bytes of workgroup memory. */
export const gemmMemory = (v: MatrixTile): number =>
  Math.max(v.tileM * (v.tileK + 8) * 2, v.warpsM * v.warpsN * STRIP * 16) + v.tileN * (v.tileK + 8) * 2;

/** Whether the kernel takes a product: whole steps and groups, 16-byte stores. */
export const gemmTakes = (n: number, k: number, groupSize: number): boolean =>
  n % 4 === 0 && k % 32 === 0 && groupSize % 32 === 0;

/**
 * The tiles to choose from, the fastest per operation first, each from as many workgroups on as it needs to be faster than smaller
 * ones; see docs/log-webgpu.md.
 */
export const GEMM_TILES: readonly (MatrixTile & { readonly least: number })[] = [
  { tileM: 256, tileN: 128, tileK: 32, warpsM: 4, warpsN: 2, least: 192 },
  { tileM: 128, tileN: 128, tileK: 64, warpsM: 2, warpsN: 2, least: 96 },
  { tileM: 128, tileN: 128, tileK: 32, warpsM: 2, warpsN: 2, least: 96 },
  { tileM: 64, tileN: 128, tileK: 32, warpsM: 2, warpsN: 2, least: 96 },
  { tileM: 64, tileN: 64, tileK: 32, warpsM: 2, warpsN: 2, least: 0 },
];

/** The first tile with enough workgroups that doesn't waste a third of its rows. `groupSize` 0: weights without grids. */
export function chooseGemmTile(m: number, n: number, k: number, groupSize: number): MatrixTile {
  for (const tile of GEMM_TILES) {
    const { tileM, tileN, tileK, least } = tile;
    if (k % tileK !== 0 || groupSize % tileK !== 0) continue;
    const rows = Math.ceil(m / tileM);
    if (rows * Math.ceil(n / tileN) >= least && (least === 0 || rows * tileM * 2 <= m * 3)) return tile;
  }
  return GEMM_TILES[GEMM_TILES.length - 1];
}

/**
 * Buffers: x [m, k/8] of 8 f16; weights [n, k/8] of 8 f16 or bf16, or [n, k/8] of 8 codes with grids [n, k/group]; bias [n];
 * residual and out [m, n/4] of 4 f32. k is a multiple of tileK, n of 4.
 */
export const gemmKernel = (v: GemmVariant): GemmKernel<GemmBuffers> => make(v, false);

/** The same, times both of `factors`: what undoes the scales of operands. */
export const scaledGemmKernel = (v: GemmVariant): GemmKernel<GemmBuffers | 'factors'> => make(v, true);

const make = variants((v: GemmVariant, scaled: boolean): GemmKernel<GemmBuffers | 'factors'> => {
  const { tileM, tileN, tileK, warpsM, warpsN } = v;
  const threads = warpsM * warpsN * 32;
  // Tiles are arrays of 16 bytes (8 channels): one store for what one load brought. Rows are padded by one.
  const stride = tileK / 8 + 1;
  const [subM, subN] = [tileM / warpsM / 16, tileN / warpsN / 16];
  const perRow = tileK / 8;
  const int4 = v.weights === 'int4';
  // One int4 load is 8 channels wide (a word), so that loads spread evenly whatever the tile.
  const [xLoads, wLoads] = [(tileM * perRow) / threads, (tileN * perRow) / threads];
  const step = threads / perRow;
  ensure(
    subN % 2 === 0 && Number.isInteger(xLoads) && Number.isInteger(wLoads),
    'backend',
    () =>
      `a matrix product can't be cut into tiles of ${tileM} × ${tileN} × ${tileK} for ${warpsM} × ${warpsN} subgroups`,
  );
  const load = `${each(xLoads, (i) => `    rx${i} = x[ox${i} + k / 8u];`)}
${each(wLoads, (i) => `    rw${i} = weights[ow${i} + k / 8u];${int4 ? ` rg${i} = grids[og${i} + k / ${v.groupSize}u];` : ''}`)}`;
  const toHalf = (word: string): string =>
    `bitcast<u32>(vec2<f16>(vec2(bitcast<f32>(${word} << 16u), bitcast<f32>(${word} & 0xffff0000u))))`;
  const put = `${each(xLoads, (i) => `    tileX[(line + ${i * step}u) * ${stride}u + column] = rx${i};`)}
${each(wLoads, (i) => {
  const at = `tileW[(line + ${i * step}u) * ${stride}u + column]`;
  switch (v.weights) {
    case 'f16':
      return `    ${at} = rw${i};`;
    case 'bf16':
      return `    ${at} = vec4(${['x', 'y', 'z', 'w'].map((c) => toHalf(`rw${i}.${c}`)).join(', ')});`;
    case 'int4':
      return `    { let q = codes8(rw${i});
    let s = vec2(bitcast<vec2<f16>>(rg${i}).x); let z = vec2(f16(rg${i} >> 16u) - 8h);
    ${at} = vec4(packH((q[0] - z) * s), packH((q[1] - z) * s), packH((q[2] - z) * s), packH((q[3] - z) * s)); }`;
  }
})}`;
  const multiply = each(
    tileK / 16,
    (kk) => `    {
${each(subM, (i) => `      let fx${i} = subgroupMatrixLoad<subgroup_matrix_left<f16, 16, 16>, row_major>(&tileX, (warpM * ${tileM / warpsM}u + ${i * 16}u) * ${stride}u + ${kk * 2}u, ${stride}u);`)}
${each(subN, (j) => `      let fw${j} = subgroupMatrixLoad<subgroup_matrix_right<f16, 16, 16>, col_major>(&tileW, (warpN * ${tileN / warpsN}u + ${j * 16}u) * ${stride}u + ${kk * 2}u, ${stride}u);`)}
${each(subM, (i) => each(subN, (j) => `      c${i}_${j} = subgroupMatrixMultiplyAccumulate(fx${i}, fw${j}, c${i}_${j});`))}
    }`,
  );
  return defineKernel<GemmBuffers | 'factors', 'm' | 'n' | 'k'>({
    name: `gemmMatrix.${v.weights}.${tileM}x${tileN}x${tileK}.${warpsM}x${warpsN}${scaled ? '.scaled' : ''}`,
    features: ['f16', 'subgroups', 'subgroup-matrix'],
    buffers: {
      x: read('vec4<u32>'),
      weights: read(int4 ? 'u32' : 'vec4<u32>'),
      ...(int4 ? { grids: read('u32') } : {}),
      ...(v.bias ? { bias: read('vec4<f32>') } : {}),
      ...(v.residual ? { residual: read('vec4<f32>') } : {}),
      ...(scaled ? { factors: read('f32') } : {}),
      out: write('vec4<f32>'),
    } as Record<GemmBuffers | 'factors', BufferSpec>,
    params: { m: 'u32', n: 'u32', k: 'u32' },
    body: /* wgsl */ `
${halfWgsl({ f16: true })}
var<workgroup> tileX: array<vec4<u32>, ${Math.max(tileM * stride, warpsM * warpsN * STRIP)}>;
var<workgroup> tileW: array<vec4<u32>, ${tileN * stride}>;
${tileEntry(v, perRow)}
  let words = params.k / 8u;
${each(xLoads, (i) => `  let ox${i} = min(wg.y * ${tileM}u + line + ${i * step}u, params.m - 1u) * words + column;`)}
${each(
  wLoads,
  (i) => `  let nw${i} = min(wg.x * ${tileN}u + line + ${i * step}u, params.n - 1u);
  let ow${i} = nw${i} * words + column;${int4 ? ` let og${i} = nw${i} * (params.k / ${v.groupSize}u);` : ''}`,
)}
${each(subM, (i) => each(subN, (j) => `  var c${i}_${j}: subgroup_matrix_result<f32, 16, 16>;`))}
${each(xLoads, (i) => `  var rx${i}: vec4<u32>;`)}
${each(wLoads, (i) => (int4 ? `  var rw${i}: u32; var rg${i}: u32;` : `  var rw${i}: vec4<u32>;`))}
${tileLoop(tileK, { load, put, multiply })}
${tileStore(
  v,
  `        out[m * columns + n] = bitcast<vec4<f32>>(tileX[begin + r * 9u + at])${scaled ? ' * factors[0] * factors[1]' : ''}${v.bias ? ' + bias[n]' : ''}${v.residual ? ' + residual[m * columns + n]' : ''};`,
)}
}`,
  });
});
