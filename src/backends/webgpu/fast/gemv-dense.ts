// Matrix–vector products with 16-bit weights (the output head): y[b] = W·x[b].
//
// Bytes: 2·in per row of W, once. As in gemv.ts a team of 32 lanes takes several rows; a lane loads 8 weights (16 bytes) of each.
import { defineKernel, read, write, type Kernel } from '../kernel.js';
import { halfFeatures, halfWgsl, type Arithmetic } from './half.js';

const TEAM = 32;

/** A variant of {@link denseGemvKernel}. */
export interface DenseGemvVariant extends Arithmetic {
  readonly shuffle: boolean;
  readonly rows: number;
  readonly teams: number;
  readonly batch: number;
  /** Element type of W; bf16 is multiplied in f32. */
  readonly weights: 'f16' | 'bf16';
}

type Buffers = 'w' | 'x' | 'factors' | 'y';

/** Rows of W that one workgroup finishes. */
export const denseRowsPerGroup = (v: DenseGemvVariant): number => v.rows * v.teams;

/** Buffers: w [out, in/8] of 8 f16 or bf16; x [batch, in/8] of 8 f16; factors [batch, in/32]; y [batch, out] f32. */
export function denseGemvKernel(v: DenseGemvVariant): Kernel<Buffers, 'words' | 'outFeatures'> {
  const { rows, teams, batch } = v;
  const cells = rows * batch;
  const each = (n: number, f: (i: number) => string): string => Array.from({ length: n }, (_, i) => f(i)).join('\n');
  return defineKernel({
    name: `gemv.dense.${v.weights}${v.f16 ? '' : '.f32'}.r${rows}.t${teams}.b${batch}`,
    features: [...halfFeatures(v), ...(v.shuffle ? (['subgroups'] as const) : [])],
    buffers: { w: read('vec4<u32>'), x: read('vec4<u32>'), factors: read('vec2<f32>'), y: write('f32') },
    params: { words: 'u32', outFeatures: 'u32' },
    body: /* wgsl */ `
${halfWgsl(v)}
${v.shuffle ? '' : `var<workgroup> partial: array<f32, ${teams * cells * TEAM}>;`}
${
  v.weights === 'bf16'
    ? /* wgsl */ `
fn wide(w: u32) -> vec2<f32> { return vec2(bitcast<f32>(w << 16u), bitcast<f32>(w & 0xffff0000u)); }
fn dot8(w: vec4<u32>, x: vec4<u32>) -> f32 {
  return dot(wide(w.x), unpack2x16float(x.x)) + dot(wide(w.y), unpack2x16float(x.y))
    + dot(wide(w.z), unpack2x16float(x.z)) + dot(wide(w.w), unpack2x16float(x.w));
}`
    : /* wgsl */ `
fn dot8(w: vec4<u32>, x: vec4<u32>) -> f32 {
  var s = unpackH(w.x) * unpackH(x.x);
  s = fma(unpackH(w.y), unpackH(x.y), s);
  var t = unpackH(w.z) * unpackH(x.z);
  t = fma(unpackH(w.w), unpackH(x.w), t);
  return f32(s.x) + f32(s.y) + f32(t.x) + f32(t.y);
}`
}
@compute @workgroup_size(${TEAM * teams})
fn main(@builtin(workgroup_id) wg: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>,
        @builtin(local_invocation_index) local: u32) {
  let lane = local & 31u;
  let team = local >> 5u;
  let row = ((wg.y * groups.x + wg.x) * ${teams}u + team) * ${rows}u;
${each(rows, (r) => `  let row${r} = min(row + ${r}u, params.outFeatures - 1u);`)}
${each(cells, (i) => `  var acc${i} = 0.0;`)}
  for (var c = lane; c < params.words; c += ${TEAM}u) {
${each(rows, (r) => `    let w${r} = w[row${r} * params.words + c];`)}
${each(
  batch,
  (b) => `    { let at = ${b}u * params.words + c; let xv = x[at]; let f = factors[at / 4u].x;
${each(rows, (r) => `      acc${b * rows + r} = fma(f, dot8(w${r}, xv), acc${b * rows + r});`)} }`,
)}
  }
${
  v.shuffle
    ? `${each(cells, (i) => [16, 8, 4, 2, 1].map((m) => `  acc${i} += subgroupShuffleXor(acc${i}, ${m}u);`).join('\n'))}
  if (lane == 0u) {
${each(cells, (i) => `    if (row + ${i % rows}u < params.outFeatures) { y[${Math.floor(i / rows)}u * params.outFeatures + row + ${i % rows}u] = acc${i}; }`)}
  }`
    : `${each(cells, (i) => `  partial[(team * ${cells}u + ${i}u) * ${TEAM}u + lane] = acc${i};`)}
  workgroupBarrier();
  for (var cell = lane; cell < ${cells}u; cell += ${TEAM}u) {
    var sum = 0.0;
    for (var l = 0u; l < ${TEAM}u; l++) { sum += partial[(team * ${cells}u + cell) * ${TEAM}u + l]; }
    let out = row + cell % ${rows}u;
    if (out < params.outFeatures) { y[(cell / ${rows}u) * params.outFeatures + out] = sum; }
  }`
}
}`,
  });
}
