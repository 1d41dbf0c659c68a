// Products of a few sequences without matrix units or any other extension: Y [batch ≤ 32, out] f32 = X [batch, in] · W [out, in]ᵀ
// (+ residual, bias), W in int4 or 16 bits, read once whatever the batch.
//
// Bytes: the weights once, 2·in per sequence and workgroup. A workgroup takes 32 rows of W and all sequences, 32 channels (a chunk of
// X, see activations.ts) at a time: both go to workgroup memory as pairs ready to multiply, W dequantized once for all
// sequences, and a thread adds up the products of 2 rows with every eighth sequence, in f16 where there is any within a chunk, in f32 between.
import { defineKernel, read, write, type BufferSpec, type Kernel } from '../kernel.js';
import { CHUNK } from './gemv.js';
import { halfFeatures, halfWgsl, type Arithmetic } from './half.js';

/** A variant of {@link batchTiledKernel}. */
export interface BatchTiledVariant extends Arithmetic {
  /** Sequences it has room for: 8, 16, 24 or 32. */
  readonly columns: number;
  readonly weights: 'int4' | 'f16' | 'bf16';
  /** For int4: channels per grid group, a multiple of 32. */
  readonly groupSize: number;
  readonly residual: boolean;
  readonly bias: boolean;
}

type Buffers = 'w' | 'grid' | 'x' | 'factors' | 'y' | 'residual' | 'bias';
type Params = 'batch' | 'chunks' | 'outFeatures' | 'stride' | 'column' | 'first';

/** Rows of W per workgroup. */
export const BATCH_TILED_ROWS = 32;
const THREADS = 128;
/** Threads along the sequences. */
const ACROSS = 8;
const PAIRS = CHUNK / 2;
/** Pairs of a row in workgroup memory: one more than there are, against bank conflicts. */
const STRIDE = PAIRS + 1;

/** Workgroups: out / 32, over x and y. Buffers and parameters as those of batchGemmKernel, in words. */
export function batchTiledKernel(v: BatchTiledVariant): Kernel<Buffers, Params> {
  const int4 = v.weights === 'int4';
  const each = (n: number, f: (i: number) => string): string => Array.from({ length: n }, (_, i) => f(i)).join('\n');
  const cells = v.columns / ACROSS;
  // Words of W per row and step, and loads per thread.
  const words = int4 ? CHUNK / 8 : PAIRS;
  const loads = (BATCH_TILED_ROWS * words) / THREADS;
  const loadsX = (cells * ACROSS * PAIRS) / THREADS;
  const pair = { int4: '', f16: 'unpackH(w)', bf16: 'h2(vec2(bitcast<f32>(w << 16u), bitcast<f32>(w & 0xffff0000u)))' }[
    v.weights
  ];
  const load = `
${each(
  loads,
  (i) => `      { let at = local + ${i * THREADS}u; let n = min(row + at / ${words}u, params.outFeatures - 1u);
        w${i} = w[(n * params.chunks + step) * ${words}u + at % ${words}u];${int4 ? ` g${i} = grid[n * groups + step / ${v.groupSize / CHUNK}u];` : ''} }`,
)}
${each(
  loadsX,
  (i) => `      { let at = local + ${i * THREADS}u; let b = min(at / ${PAIRS}u, params.batch - 1u);
        x${i} = x[(params.first + b * params.chunks + step) * ${PAIRS}u + at % ${PAIRS}u]; }`,
)}`;
  const optional: Partial<Record<Buffers, BufferSpec>> = {
    ...(v.residual ? { residual: read('f32') } : {}),
    ...(v.bias ? { bias: read('f32') } : {}),
  };
  return defineKernel<Buffers, Params>({
    name: `batchTiled.${v.weights}${v.f16 ? '' : '.f32'}.c${v.columns}${v.residual ? '.res' : ''}`,
    features: halfFeatures(v),
    buffers: {
      w: read('u32'),
      ...(int4 ? { grid: read('u32') } : {}),
      x: read('u32'),
      factors: read('vec2<f32>'),
      y: write('f32'),
      ...optional,
    } as Record<Buffers, BufferSpec>,
    params: { batch: 'u32', chunks: 'u32', outFeatures: 'u32', stride: 'u32', column: 'u32', first: 'u32' },
    body: /* wgsl */ `
${halfWgsl(v)}
var<workgroup> tileW: array<h2, ${BATCH_TILED_ROWS * STRIDE}>;
var<workgroup> tileX: array<h2, ${cells * ACROSS * STRIDE}>;

@compute @workgroup_size(${THREADS})
fn main(@builtin(workgroup_id) wg: vec3<u32>, @builtin(num_workgroups) count: vec3<u32>,
        @builtin(local_invocation_index) local: u32) {
  let row = (wg.y * count.x + wg.x) * ${BATCH_TILED_ROWS}u;
  let mine = local / ${ACROSS}u;
  let across = local % ${ACROSS}u;
${int4 ? `  let groups = params.chunks / ${v.groupSize / CHUNK}u;` : ''}
${each(cells, (c) => `  var a${c} = 0.0; var b${c} = 0.0;`)}
${each(loads, (i) => `  var w${i}: u32;${int4 ? ` var g${i}: u32;` : ''}`)}
${each(loadsX, (i) => `  var x${i}: u32;`)}
  { let step = 0u;${load} }
  for (var next = 1u; next <= params.chunks; next++) {
${each(loads, (i) =>
  int4
    ? `    { let at = local + ${i * THREADS}u; let to = (at / ${words}u) * ${STRIDE}u + (at % ${words}u) * 4u;
      let s = h2(h(unpack2x16float(g${i}).x)); let z = h2(h(f32(g${i} >> 16u) - 8.0)); let q = codes8(w${i});
${each(4, (p) => `      tileW[to + ${p}u] = (q[${p}] - z) * s;`)} }`
    : `    { let at = local + ${i * THREADS}u; let w = w${i}; tileW[(at / ${words}u) * ${STRIDE}u + at % ${words}u] = ${pair}; }`,
)}
${each(loadsX, (i) => `    { let at = local + ${i * THREADS}u; tileX[(at / ${PAIRS}u) * ${STRIDE}u + at % ${PAIRS}u] = unpackH(x${i}); }`)}
    workgroupBarrier();
    if (next < params.chunks) { let step = next;${load} }
${each(cells, (c) => `    let f${c} = factors[params.first + min(across + ${c * ACROSS}u, params.batch - 1u) * params.chunks + next - 1u].x; var s${c} = h2(); var t${c} = h2();`)}
    for (var p = 0u; p < ${PAIRS}u; p++) {
      let u = tileW[mine * ${STRIDE}u + p]; let v = tileW[(mine + ${BATCH_TILED_ROWS / 2}u) * ${STRIDE}u + p];
${each(cells, (c) => `      { let e = tileX[(across + ${c * ACROSS}u) * ${STRIDE}u + p]; s${c} = fma(u, e, s${c}); t${c} = fma(v, e, t${c}); }`)}
    }
${each(cells, (c) => `    a${c} = fma(f${c}, f32(s${c}.x) + f32(s${c}.y), a${c}); b${c} = fma(f${c}, f32(t${c}.x) + f32(t${c}.y), b${c});`)}
    workgroupBarrier();
  }
${each(
  cells,
  (c) => `  { let b = across + ${c * ACROSS}u;
    if (b < params.batch) {
      let at = b * params.stride + params.column + row + mine;
      if (row + mine < params.outFeatures) { y[at] = a${c}${v.residual ? ' + residual[at]' : ''}${v.bias ? ' + bias[row + mine]' : ''}; }
      if (row + mine + ${BATCH_TILED_ROWS / 2}u < params.outFeatures) { y[at + ${BATCH_TILED_ROWS / 2}u] = b${c}${v.residual ? ` + residual[at + ${BATCH_TILED_ROWS / 2}u]` : ''}${v.bias ? ` + bias[row + mine + ${BATCH_TILED_ROWS / 2}u]` : ''}; }
    } }`,
)}
}`,
  });
}
