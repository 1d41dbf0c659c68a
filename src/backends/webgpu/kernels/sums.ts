// Sums over all elements. Bytes moved: each input once.
import { defineKernel, read, write } from '../kernel.js';
import { TWO_SUM } from './double.js';

/** Workgroups of {@link dotKernel}: partial sums the host adds in f64. */
export const DOT_GROUPS = 256;

/** Elements worth a workgroup of {@link dotKernel}. */
export const DOT_ELEMENTS = 4096;

/** Partial Σ a·b per workgroup as hi, lo: products round to f32, their sum keeps 48 bits. */
export const dotKernel = defineKernel({
  name: 'dot',
  buffers: { a: read('f32'), b: read('f32'), out: write('vec2<f32>') },
  params: { count: 'u32', one: 'f32' },
  body: /* wgsl */ `${TWO_SUM}
var<workgroup> sums: array<vec2<f32>, 256>;
@compute @workgroup_size(256)
fn main(
  @builtin(workgroup_id) group: vec3<u32>,
  @builtin(num_workgroups) groups: vec3<u32>,
  @builtin(local_invocation_index) local: u32,
) {
  var sum = vec2<f32>();
  let stride = groups.x * 256u;
  for (var i = group.x * 256u + local; i < params.count; i += stride) {
    let s = twoSum(sum.x, a[i] * b[i]);
    sum = vec2<f32>(s.x, sum.y + s.y);
  }
  sums[local] = sum;
  for (var width = 128u; width > 0u; width /= 2u) {
    workgroupBarrier();
    if (local < width) { sums[local] = ddAdd(sums[local], sums[local + width]); }
  }
  if (local == 0u) { out[group.x] = sums[0]; }
}`,
});

/** out[r] = Σ of squares of row r of x [rows, cols]: 64 threads a row. */
export const rowSquaresKernel = defineKernel({
  name: 'rowSquares',
  buffers: { x: read('f32'), out: write('f32') },
  params: { rows: 'u32', cols: 'u32' },
  body: /* wgsl */ `
var<workgroup> sums: array<f32, 64>;
@compute @workgroup_size(64)
fn main(
  @builtin(workgroup_id) group: vec3<u32>,
  @builtin(num_workgroups) groups: vec3<u32>,
  @builtin(local_invocation_index) local: u32,
) {
  for (var r = group.x; r < params.rows; r += groups.x) {
    var sum = 0.0;
    for (var c = local; c < params.cols; c += 64u) {
      let value = x[r * params.cols + c];
      sum = fma(value, value, sum);
    }
    sums[local] = sum;
    for (var width = 32u; width > 0u; width /= 2u) {
      workgroupBarrier();
      if (local < width) { sums[local] += sums[local + width]; }
    }
    if (local == 0u) { out[r] = sums[0]; }
    workgroupBarrier();
  }
}`,
});

/** out[i] = Σ over `parts` of x[part · count + i] + y[part · count + i]. */
export const sumPartsKernel = defineKernel({
  name: 'sumParts',
  buffers: { x: read('f32'), y: read('f32'), out: write('f32') },
  params: { count: 'u32', parts: 'u32' },
  body: /* wgsl */ `
@compute @workgroup_size(64)
fn main(@builtin(global_invocation_id) id: vec3<u32>) {
  let i = id.x;
  if (i >= params.count) { return; }
  var sum = 0.0;
  for (var p = 0u; p < params.parts; p++) {
    // The two sides nearly cancel: term by term.
    sum += x[p * params.count + i] + y[p * params.count + i];
  }
  out[i] = sum;
}`,
});

/** The diagonal of a square matrix [n, n]. */
export const diagonalKernel = defineKernel({
  name: 'diagonal',
  buffers: { x: read('f32'), out: write('f32') },
  params: { n: 'u32' },
  body: /* wgsl */ `
@compute @workgroup_size(64)
fn main(@builtin(global_invocation_id) id: vec3<u32>) {
  if (id.x < params.n) { out[id.x] = x[id.x * params.n + id.x]; }
}`,
});
