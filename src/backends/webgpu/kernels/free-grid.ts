// Grids of free scales and float zero points [groups, cols] on channel-major weights [channels, cols], and scales alone; with
// their gradients. Bytes moved: each matrix once. Sums over a group's channels: sixteen threads share a column.
import { defineKernel, read, write } from '../kernel.js';
import { GRID_ARITHMETIC } from './grid.js';

const SLOT = 'i / params.cols / params.groupSize * params.cols + i % params.cols';

/** values = (clamp(round(w/scale) + z, 0, levels) − z)·scale with z = clamp(round(zero), 0, levels); `count` elements. */
export const freeGridKernel = defineKernel({
  name: 'freeGrid',
  buffers: { w: read('f32'), scales: read('f32'), zeros: read('f32'), values: write('f32') },
  params: { count: 'u32', cols: 'u32', groupSize: 'u32', levels: 'f32' },
  body: /* wgsl */ `${GRID_ARITHMETIC}
@compute @workgroup_size(256)
fn main(@builtin(global_invocation_id) id: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>) {
  let stride = groups.x * 256u;
  for (var i = id.x; i < params.count; i += stride) {
    let slot = ${SLOT};
    let zero = clamp(round(zeros[slot]), 0.0, params.levels);
    values[i] = snap(w[i], vec2(scales[slot], zero), params.levels) * scales[slot];
  }
}`,
});

/** WGSL: threads and their column of a group; sums vec2 over the sixteen threads of each column. */
const COLUMNS = /* wgsl */ `
var<workgroup> sums: array<vec2<f32>, 256>;
fn sumOverGroup(local: u32, mine: vec2<f32>) -> vec2<f32> {
  sums[local] = mine;
  for (var reach = 128u; reach >= 16u; reach >>= 1u) {
    workgroupBarrier();
    if (local < reach) { sums[local] += sums[local + reach]; }
  }
  workgroupBarrier();
  return sums[local % 16u];
}`;

/** See GradientOps.fakeQuantizeGradient. Workgroups: (columns / 16, groups). */
export const freeGridGradientKernel = defineKernel({
  name: 'freeGridGradient',
  buffers: {
    w: read('f32'),
    scales: read('f32'),
    zeros: read('f32'),
    dy: read('f32'),
    dw: write('f32'),
    dScales: write('f32'),
    dZeros: write('f32'),
  },
  params: { cols: 'u32', groupSize: 'u32', levels: 'f32' },
  body: /* wgsl */ `${GRID_ARITHMETIC}
${COLUMNS}
@compute @workgroup_size(256)
fn main(@builtin(workgroup_id) id: vec3<u32>, @builtin(local_invocation_index) local: u32) {
  let col = id.x * 16u + local % 16u;
  let slot = id.y * params.cols + col;
  var sum = vec2<f32>();
  if (col < params.cols) {
    let scale = scales[slot];
    let zero = clamp(round(zeros[slot]), 0.0, params.levels);
    let first = id.y * params.groupSize;
    for (var row = first + local / 16u; row < first + params.groupSize; row += 16u) {
      let at = row * params.cols + col;
      let x = quotient(w[at], scale);
      let code = round(x) + zero;
      let kept = clamp(code, 0.0, params.levels);
      let g = dy[at];
      if (kept == code) {
        dw[at] = g;
        sum.x = fma(g, (kept - zero) - x, sum.x);
      } else {
        dw[at] = 0.0;
        sum = fma(vec2(g), vec2(kept - zero, -scale), sum);
      }
    }
  }
  sum = sumOverGroup(local, sum);
  if (local < 16u && col < params.cols) {
    dScales[slot] = sum.x;
    dZeros[slot] = sum.y;
  }
}`,
});

/** out = x times the scale of its group and column; `count` elements. */
export const scaleGroupsKernel = defineKernel({
  name: 'scaleGroups',
  buffers: { x: read('f32'), scales: read('f32'), out: write('f32') },
  params: { count: 'u32', cols: 'u32', groupSize: 'u32' },
  body: /* wgsl */ `
@compute @workgroup_size(256)
fn main(@builtin(global_invocation_id) id: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>) {
  let stride = groups.x * 256u;
  for (var i = id.x; i < params.count; i += stride) { out[i] = x[i] * scales[${SLOT}]; }
}`,
});

/** out = Σ over a group's channels of dy·x. Workgroups: (columns / 16, groups). */
export const scaleGroupsGradientKernel = defineKernel({
  name: 'scaleGroupsGradient',
  buffers: { x: read('f32'), dy: read('f32'), out: write('f32') },
  params: { cols: 'u32', groupSize: 'u32' },
  body: /* wgsl */ `${COLUMNS}
@compute @workgroup_size(256)
fn main(@builtin(workgroup_id) id: vec3<u32>, @builtin(local_invocation_index) local: u32) {
  let col = id.x * 16u + local % 16u;
  var sum = vec2<f32>();
  if (col < params.cols) {
    let first = id.y * params.groupSize;
    for (var row = first + local / 16u; row < first + params.groupSize; row += 16u) {
      let at = row * params.cols + col;
      sum.x = fma(dy[at], x[at], sum.x);
    }
  }
  sum = sumOverGroup(local, sum);
  if (local < 16u && col < params.cols) { out[id.y * params.cols + col] = sum.x; }
}`,
});
