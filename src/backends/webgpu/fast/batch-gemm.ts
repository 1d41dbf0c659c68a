// Products of a few sequences on matrix units: Y [batch ≤ 32, out] f32 = X [batch, in] · W [out, in]ᵀ (+ residual, bias), W in int4 or
// 16 bits, read once whatever the batch.
//
// Bytes: the weights once, 2·in per sequence and workgroup (from L2). A workgroup takes `rows` rows of W and all sequences,
// padded to 16 or 32 columns; its subgroups share the channels of a step, so that each fragment is loaded from workgroup memory by one
// of them only, and their sums are added at the end. int4 codes become f16 on the way into workgroup memory: 15 instructions
// per 8 weights. The next `depth` steps are on their way from memory meanwhile: with a few rows per workgroup, what is in
// flight is what sets the speed. X comes as gemv.ts reads it, normalised per chunk of 32 channels; factors are multiplied back in,
// times 2^-shift, which keeps f16's range away from activations as large as 65504·2^shift; larger ones end as an infinity,
// which sampling reports.
import { defineKernel, read, write, type BufferSpec, type Kernel } from '../kernel.js';
import type { GpuCapabilities } from '../capabilities.js';
import { CHUNK } from './gemv.js';
import { halfWgsl } from './half.js';

/** A variant of {@link batchGemmKernel}. */
export interface BatchGemmVariant {
  /** Rows of W per workgroup: 16, 32 or 64. */
  readonly rows: number;
  /** Subgroups per workgroup. */
  readonly warps: number;
  /** Parts that the rows are divided into among subgroups; the rest of the subgroups share the channels of a step. */
  readonly warpsM: number;
  /** Channels per step, a multiple of 32 and of 16 for each subgroup that shares them. */
  readonly tileK: number;
  /** Steps whose loads are under way. */
  readonly depth: number;
  /** Sequences as the units see them: 16 or 32. */
  readonly columns: 16 | 32;
  readonly weights: 'int4' | 'f16' | 'bf16';
  /** For int4: channels per grid group, a multiple of 32. */
  readonly groupSize: number;
  readonly residual: boolean;
  readonly bias: boolean;
}

/** Buffers of {@link batchGemmKernel}. */
export type BatchGemmBuffer = 'w' | 'grid' | 'x' | 'factors' | 'y' | 'residual' | 'bias';
type Params = 'batch' | 'chunks' | 'outFeatures' | 'stride' | 'column' | 'first' | 'shift';

/** Most sequences of one product. */
export const BATCH_GEMM_MAX = 32;

/** Whether a GPU has the matrix units that the kernel is written for. */
export function hasBatchGemm({ f16, subgroups, subgroupMatrices }: GpuCapabilities): boolean {
  return (
    f16 &&
    subgroups?.min === 32 &&
    subgroups.max === 32 &&
    subgroupMatrices.some((c) => c.m === 16 && c.n === 16 && c.k === 16 && c.component === 'f16' && c.result === 'f32')
  );
}

/** Bytes of workgroup memory. */
export const batchGemmMemory = (v: BatchGemmVariant): number => 16 * memoryWords(v);

/** Tiles, then, in the same place, each subgroup's sums: in units of 16 bytes. */
function memoryWords(v: BatchGemmVariant): number {
  const tiles = (v.rows + v.columns) * (v.tileK / 8 + 1);
  return Math.max(tiles, ((v.warps / v.warpsM) * v.rows * v.columns) / 4);
}

/**
 * Workgroups: out / rows, over x and y. Buffers: w [out, in/32] of 16 bytes with grid [out, in/group] words, or [out, in/8] of 8 f16 or
 * bf16 (which become f16); x [batch, in/8] of 8 f16; factors [batch, in/32]; y, residual [batch, stride] f32, the product's columns from
 * `column`; x and factors are read from chunk `first`; bias [out] f32. `shift` is a power of two: see above.
 */
export function batchGemmKernel(v: BatchGemmVariant): Kernel<BatchGemmBuffer, Params> {
  const { rows, columns, warps, warpsM, tileK, depth, weights } = v;
  const threads = 32 * warps;
  const int4 = weights === 'int4';
  // Tiles are rows of 16 bytes (8 channels), padded by one against bank conflicts.
  const stride = tileK / 8 + 1;
  const slices = warps / warpsM;
  const slice = tileK / slices;
  const each = (n: number, f: (i: number) => string): string => Array.from({ length: n }, (_, i) => f(i)).join('\n');
  // Loads of 16 bytes per row and step: 32 codes or 8 halves.
  const perRowW = int4 ? tileK / CHUNK : tileK / 8;
  const perRowX = tileK / 8;
  const [countW, countX] = [rows * perRowW, columns * perRowX];
  const [loadsW, loadsX] = [Math.ceil(countW / threads), Math.ceil(countX / threads)];
  const [subM, subN] = [rows / warpsM / 16, columns / 16];
  const wide =
    weights === 'f16'
      ? ''
      : 'fn wide(w: u32) -> u32 { return packH(h2(f16(bitcast<f32>(w << 16u)), f16(bitcast<f32>(w & 0xffff0000u)))); }';
  // Loads are never in a branch of their own, or the compiler waits for them at its end: past the tile, the sequences or the
  // channels they read what is last, and the factor becomes zero where it is used.
  const within = (i: number, count: number): string =>
    (i + 1) * threads > count ? `min(local + ${i * threads}u, ${count - 1}u)` : `local + ${i * threads}u`;
  const unless = (i: number, count: number): string =>
    (i + 1) * threads > count ? `if (local + ${i * threads}u < ${count}u) ` : '';
  const load = (d: number): string => `
${each(
  loadsW,
  (i) => `      { let at = ${within(i, countW)};
        let n = min(first + at / ${perRowW}u, params.outFeatures - 1u);
        let c = min(step * ${perRowW}u + at % ${perRowW}u, words - 1u);
        w${d}_${i} = w[n * words + c];${int4 ? ` g${d}_${i} = grid[n * groups + c / ${v.groupSize / CHUNK}u];` : ''} }`,
)}
${each(
  loadsX,
  (i) => `      { let at = ${within(i, countX)};
        let b = min(at / ${perRowX}u, params.batch - 1u); let c = min(step * ${perRowX}u + at % ${perRowX}u, params.chunks * 4u - 1u);
        let at4 = params.first * 4u + b * params.chunks * 4u + c;
        x${d}_${i} = x[at4]; f${d}_${i} = factors[at4 / 4u].x; }`,
)}`;
  const dequantize = (d: number, i: number): string =>
    `let s = h2(bitcast<vec2<f16>>(g${d}_${i}).x); let z = h2(f16(g${d}_${i} >> 16u) - 8h);
${each(
  4,
  (q) =>
    `        { let q = codes8(w${d}_${i}[${q}]); tile[to + ${q}u] = vec4(packH((q[0] - z) * s), packH((q[1] - z) * s), packH((q[2] - z) * s), packH((q[3] - z) * s)); }`,
)}`;
  const store = (d: number): string => `
${each(
  loadsW,
  (i) => `      ${unless(i, countW)}{ let at = local + ${i * threads}u;
        let to = (at / ${perRowW}u) * ${stride}u + (at % ${perRowW}u) * ${int4 ? 4 : 1}u;
        ${
          int4
            ? dequantize(d, i)
            : `tile[to] = ${weights === 'f16' ? `w${d}_${i}` : `vec4(wide(w${d}_${i}.x), wide(w${d}_${i}.y), wide(w${d}_${i}.z), wide(w${d}_${i}.w))`};`
        } }`,
)}
${each(
  loadsX,
  (i) => `      ${unless(i, countX)}{ let at = local + ${i * threads}u;
        let there = at / ${perRowX}u < params.batch && now * ${perRowX}u + at % ${perRowX}u < params.chunks * 4u;
        let f = h2(f16(select(0.0, f${d}_${i} * params.shift, there)));
        tile[${rows * stride}u + (at / ${perRowX}u) * ${stride}u + at % ${perRowX}u] = vec4(packH(unpackH(x${d}_${i}.x) * f), packH(unpackH(x${d}_${i}.y) * f), packH(unpackH(x${d}_${i}.z) * f), packH(unpackH(x${d}_${i}.w) * f)); }`,
)}`;
  const multiply = each(
    slice / 16,
    (k) => `      {
${each(subM, (i) => `        let a${i} = subgroupMatrixLoad<subgroup_matrix_left<f16, 16, 16>, row_major>(&tile, part * ${(rows / warpsM) * stride}u + ${i * 16 * stride + k * 2}u + slice * ${slice / 8}u, ${stride}u);`)}
${each(subN, (j) => `        let b${j} = subgroupMatrixLoad<subgroup_matrix_right<f16, 16, 16>, col_major>(&tile, ${(rows + j * 16) * stride + k * 2}u + slice * ${slice / 8}u, ${stride}u);`)}
${each(subM, (i) => each(subN, (j) => `        c${i}_${j} = subgroupMatrixMultiplyAccumulate(a${i}, b${j}, c${i}_${j});`))}
      }`,
  );
  const optional: Partial<Record<BatchGemmBuffer, BufferSpec>> = {
    ...(v.residual ? { residual: read('f32') } : {}),
    ...(v.bias ? { bias: read('f32') } : {}),
  };
  return defineKernel<BatchGemmBuffer, Params>({
    name: `batchGemm.${weights}.c${columns}.r${rows}.w${warps}${warpsM > 1 ? `m${warpsM}` : ''}.k${tileK}.d${depth}${v.residual ? '.res' : ''}`,
    features: ['f16', 'subgroups', 'subgroup-matrix'],
    buffers: {
      w: read('vec4<u32>'),
      ...(int4 ? { grid: read('u32') } : {}),
      x: read('vec4<u32>'),
      factors: read('vec2<f32>'),
      y: write('f32'),
      ...optional,
    } as Record<BatchGemmBuffer, BufferSpec>,
    params: {
      batch: 'u32',
      chunks: 'u32',
      outFeatures: 'u32',
      stride: 'u32',
      column: 'u32',
      first: 'u32',
      shift: 'f32',
    },
    body: /* wgsl */ `
${halfWgsl({ f16: true })}
${wide}
var<workgroup> tile: array<vec4<u32>, ${memoryWords(v)}>;

@compute @workgroup_size(${threads})
fn main(@builtin(workgroup_id) wg: vec3<u32>, @builtin(num_workgroups) count: vec3<u32>,
        @builtin(local_invocation_index) local: u32, @builtin(subgroup_id) warp: u32) {
  let index = wg.y * count.x + wg.x;
  let first = index * ${rows}u;
  let part = warp / ${slices}u;
  let slice = warp % ${slices}u;
  let words = params.chunks${int4 ? '' : ' * 4u'};
${int4 ? `  let groups = params.chunks / ${v.groupSize / CHUNK}u;` : ''}
  let steps = (params.chunks + ${tileK / CHUNK - 1}u) / ${tileK / CHUNK}u;
  // Workgroups begin at channels of their own, or all ask L2 for the same lines of X at a time.
  let turn = index % steps;
${each(subM, (i) => each(subN, (j) => `  var c${i}_${j} = subgroup_matrix_result<f32, 16, 16>();`))}
${each(
  depth,
  (d) => `${each(loadsW, (i) => `  var w${d}_${i}: vec4<u32>;${int4 ? ` var g${d}_${i}: u32;` : ''}`)}
${each(loadsX, (i) => `  var x${d}_${i}: vec4<u32>; var f${d}_${i}: f32;`)}`,
)}
${each(depth, (d) => `  { let step = (${d}u + turn) % steps;${load(d)} }`)}
  for (var base = 0u; base < steps; base += ${depth}u) {
${each(
  depth,
  (d) => `    ${depth > 1 ? `if (base + ${d}u < steps) ` : ''}{
      let now = base + ${d}u + turn - select(0u, steps, base + ${d}u + turn >= steps);
${store(d)}
      workgroupBarrier();
      if (base + ${d + depth}u < steps) { let step = base + ${d + depth}u + turn - select(0u, steps, base + ${d + depth}u + turn >= steps);${load(d)} }
${multiply}
      workgroupBarrier();
    }`,
)}
  }
  // Each subgroup's sums [sequence, row]; added, and out.
${each(subM, (i) => each(subN, (j) => `  subgroupMatrixStore<col_major>(&tile, (slice * ${columns}u + ${j * 16}u) * ${rows / 4}u + part * ${rows / warpsM / 4}u + ${i * 4}u, c${i}_${j}, ${rows / 4}u);`))}
  workgroupBarrier();
  for (var cell = local; cell < params.batch * ${rows / 4}u; cell += ${threads}u) {
    var sum = vec4<f32>();
    for (var s = 0u; s < ${slices}u; s++) { sum += bitcast<vec4<f32>>(tile[s * ${(columns * rows) / 4}u + cell]); }
    sum /= params.shift;
    let row = first + (cell % ${rows / 4}u) * 4u;
    let at = (cell / ${rows / 4}u) * params.stride + params.column + row;
${each(4, (r) => `    if (row + ${r}u < params.outFeatures) { y[at + ${r}u] = sum[${r}]${v.residual ? ` + residual[at + ${r}u]` : ''}${v.bias ? ` + bias[row + ${r}u]` : ''}; }`)}
  }
}`,
  });
}
