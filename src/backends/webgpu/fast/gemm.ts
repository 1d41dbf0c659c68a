// Matrix products on matrix units (subgroup matrices): C [m, n] f32 = A [m, k] · B [n, k]ᵀ, A in f16, B in f16 or quantized to 4
// bits.
//
// A workgroup computes a tile of C from tiles of A and B in workgroup memory, each subgroup a part of it in registers; the
// next tiles are on their way from memory while the units work. int4 codes become f16 on their way into workgroup memory.
// Operations 2·m·n·k; bytes m·k·2·(n/tileN) + n·k·(2 or 0.53)·(m/tileM), mostly from L2. Rows of the tiles are padded by 16 bytes
// against bank conflicts.
import { defineKernel, read, write, type BufferSpec, type Kernel } from '../kernel.js';
import { halfWgsl } from './half.js';

/** A variant of {@link gemmKernel}. */
export interface GemmVariant {
  /** Rows of C per workgroup, a multiple of 16·warpsM. */
  readonly tileM: number;
  readonly tileN: number;
  /** Channels per step: 16, 32 or 64. */
  readonly tileK: number;
  readonly warpsM: number;
  readonly warpsN: number;
  readonly b: 'f16' | 'int4';
  /** For int4: channels per grid group, a multiple of tileK. */
  readonly groupSize: number;
  /** Two tiles in workgroup memory, one barrier per step. */
  readonly double: boolean;
}

type Buffers = 'a' | 'b' | 'grid' | 'c';

/** Workgroups: n tiles, m tiles. Shapes are multiples of the tiles. */
export const gemmGroups = (v: GemmVariant, m: number, n: number): [number, number] => [n / v.tileN, m / v.tileM];

/** Bytes of workgroup memory. */
export const gemmMemory = (v: GemmVariant): number => (v.tileM + v.tileN) * (v.tileK + 8) * 2 * (v.double ? 2 : 1);

/** Buffers: a [m, k/8] of 8 f16; b [n, k/8] of 8 f16, or [n, k/32] of 32 codes with grid [n, k/group]; c [m, n] f32. */
export function gemmKernel(v: GemmVariant): Kernel<Buffers, 'm' | 'n' | 'k'> {
  const { tileM, tileN, tileK, warpsM, warpsN } = v;
  const threads = warpsM * warpsN * 32;
  // Tiles are arrays of 16 bytes (8 channels): one store for what one load brought. Rows are padded by one.
  const stride = tileK / 8 + 1;
  const [subM, subN] = [tileM / warpsM / 16, tileN / warpsN / 16];
  const each = (n: number, f: (i: number) => string): string => Array.from({ length: n }, (_, i) => f(i)).join('\n');
  const perRow = tileK / 8;
  const aLoads = (tileM * perRow) / threads;
  const int4 = v.b === 'int4';
  // One int4 load is 8 channels wide (a word), so that loads spread evenly whatever the tile.
  const bLoads = (tileN * perRow) / threads;
  const buffer = (name: string, tile: number): string =>
    `var<workgroup> ${name}: array<vec4<u32>, ${tile * stride * (v.double ? 2 : 1)}>;`;
  const load =
    each(aLoads, (i) => `    ra${i} = a[(rowA + ${i}u * ${threads / perRow}u) * words + k / 8u + colA];`) +
    '\n' +
    (int4
      ? each(
          bLoads,
          (i) => `    { let n = rowB + ${i}u * ${threads / perRow}u;
      rb${i} = b[n * words + k / 8u + colA];
      rg${i} = grid[n * (params.k / ${v.groupSize}u) + k / ${v.groupSize}u]; }`,
        )
      : each(bLoads, (i) => `    rb${i} = b[(rowB + ${i}u * ${threads / perRow}u) * words + k / 8u + colA];`));
  const put = (offset: (tile: number) => string): string =>
    each(
      aLoads,
      (i) =>
        `    tileA[${offset(tileM)} + (local / ${perRow}u + ${i}u * ${threads / perRow}u) * ${stride}u + colA] = ra${i};`,
    ) +
    '\n' +
    each(bLoads, (i) => {
      const at = `tileB[${offset(tileN)} + (local / ${perRow}u + ${i}u * ${threads / perRow}u) * ${stride}u + colA]`;
      return int4
        ? `    { let q = codes8(rb${i});
    let s = vec2(bitcast<vec2<f16>>(rg${i}).x); let z = vec2(f16(rg${i} >> 16u) - 8h);
    ${at} = vec4(packH((q[0] - z) * s), packH((q[1] - z) * s), packH((q[2] - z) * s), packH((q[3] - z) * s)); }`
        : `    ${at} = rb${i};`;
    });
  const multiply = (offset: (tile: number) => string): string =>
    each(
      tileK / 16,
      (kk) => `    {
${each(subM, (i) => `      let fa${i} = subgroupMatrixLoad<subgroup_matrix_left<f16, 16, 16>, row_major>(&tileA, ${offset(tileM)} + (warpM * ${tileM / warpsM}u + ${i * 16}u) * ${stride}u + ${kk * 2}u, ${stride}u);`)}
${each(subN, (j) => `      let fb${j} = subgroupMatrixLoad<subgroup_matrix_right<f16, 16, 16>, col_major>(&tileB, ${offset(tileN)} + (warpN * ${tileN / warpsN}u + ${j * 16}u) * ${stride}u + ${kk * 2}u, ${stride}u);`)}
${each(subM, (i) => each(subN, (j) => `      c${i}_${j} = subgroupMatrixMultiplyAccumulate(fa${i}, fb${j}, c${i}_${j});`))}
    }`,
    );
  const zero = (): string => '0u';
  return defineKernel<Buffers, 'm' | 'n' | 'k'>({
    name: `gemm.${v.b}.${tileM}x${tileN}x${tileK}.${warpsM}x${warpsN}${v.double ? '.double' : ''}`,
    features: ['f16', 'subgroups', 'subgroup-matrix'],
    buffers: {
      a: read('vec4<u32>'),
      b: read(int4 ? 'u32' : 'vec4<u32>'),
      ...(int4 ? { grid: read('u32') } : {}),
      c: write('f32'),
    } as Record<Buffers, BufferSpec>,
    params: { m: 'u32', n: 'u32', k: 'u32' },
    body: /* wgsl */ `
${halfWgsl({ f16: true })}
${buffer('tileA', tileM)}
${buffer('tileB', tileN)}

@compute @workgroup_size(${threads})
fn main(@builtin(workgroup_id) wg: vec3<u32>, @builtin(local_invocation_index) local: u32, @builtin(subgroup_id) warp: u32) {
  let warpM = warp / ${warpsN}u;
  let warpN = warp % ${warpsN}u;
  let words = params.k / 8u;
  let rowA = wg.y * ${tileM}u + local / ${perRow}u;
  let rowB = wg.x * ${tileN}u + local / ${perRow}u;
  let colA = local % ${perRow}u;
${each(subM, (i) => each(subN, (j) => `  var c${i}_${j}: subgroup_matrix_result<f32, 16, 16>;`))}
${each(aLoads, (i) => `  var ra${i}: vec4<u32>;`)}
${each(bLoads, (i) => (int4 ? `  var rb${i}: u32; var rg${i}: u32;` : `  var rb${i}: vec4<u32>;`))}
  { let k = 0u;
${load} }
${
  v.double
    ? `${put(zero)}
  workgroupBarrier();
  var stage = 0u;
  for (var step = ${tileK}u; step <= params.k; step += ${tileK}u) {
    if (step < params.k) { let k = step;
${load} }
${multiply((tile) => `stage * ${tile * stride}u`)}
    if (step < params.k) {
      let next = 1u - stage;
${put((tile) => `next * ${tile * stride}u`)}
    }
    stage = 1u - stage;
    workgroupBarrier();
  }`
    : `  for (var step = ${tileK}u; step <= params.k; step += ${tileK}u) {
${put(zero)}
    workgroupBarrier();
    if (step < params.k) { let k = step;
${load} }
${multiply(zero)}
    workgroupBarrier();
  }`
}
${each(subM, (i) => each(subN, (j) => `  subgroupMatrixStore<row_major>(&c, (wg.y * ${tileM}u + warpM * ${tileM / warpsM}u + ${i * 16}u) * params.n + wg.x * ${tileN}u + warpN * ${tileN / warpsN}u + ${j * 16}u, c${i}_${j}, params.n);`))}
}`,
  });
}
