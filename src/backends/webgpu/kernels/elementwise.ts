// Elementwise kernels, f32. Bytes moved: each input once, the output once. Threads stride over the elements, so that any
// size fits the dispatch limits.
import { defineKernel, read, write } from '../kernel.js';

/** Workgroups that fill any GPU when a kernel strides over its elements. */
export const MOST_GROUPS = 4096;

/** Workgroups of 256 threads for `count` elements of a striding kernel. */
export function strided(count: number): [number] {
  return [Math.min(MOST_GROUPS, Math.ceil(count / 256))];
}

/** A kernel whose body handles element `i` of `params.count`. */
const loop = (body: string): string => /* wgsl */ `
@compute @workgroup_size(256)
fn main(@builtin(global_invocation_id) id: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>) {
  let stride = groups.x * 256u;
  for (var i = id.x; i < params.count; i += stride) {
    ${body}
  }
}`;

/** A factor as two f32, so that its own rounding doesn't count. */
export function splitScale(scale: number): { scale: number; rest: number } {
  const rounded = Math.fround(scale);
  return { scale: rounded, rest: scale - rounded };
}

/** out = acc + (scale + rest) · x. */
export const addScaledKernel = defineKernel({
  name: 'addScaled',
  buffers: { acc: read('f32'), x: read('f32'), out: write('f32') },
  params: { count: 'u32', scale: 'f32', rest: 'f32' },
  body: loop('out[i] = fma(params.scale, x[i], fma(params.rest, x[i], acc[i]));'),
});

/** acc += (scale + rest) · x. */
export const addScaledInPlaceKernel = defineKernel({
  name: 'addScaledInPlace',
  buffers: { acc: write('f32'), x: read('f32') },
  params: { count: 'u32', scale: 'f32', rest: 'f32' },
  body: loop('acc[i] = fma(params.scale, x[i], fma(params.rest, x[i], acc[i]));'),
});

/** x *= scale. */
export const scaleKernel = defineKernel({
  name: 'scale',
  buffers: { x: write('f32') },
  params: { count: 'u32', scale: 'f32' },
  body: loop('x[i] *= params.scale;'),
});

/** out = x ⊙ s, one s per row of `cols` elements, or ÷ s. */
export const scaleRowsKernel = defineKernel({
  name: 'scaleRows',
  buffers: { x: read('f32'), s: read('f32'), out: write('f32') },
  params: { count: 'u32', cols: 'u32', divide: 'u32' },
  body: loop(`let s = s[i / params.cols];
    if (params.divide != 0u) { out[i] = x[i] / s; } else { out[i] = x[i] * s; }`),
});

/** out [rows, chosen] = the chosen columns of x [rows, cols]. */
export const gatherColumnsKernel = defineKernel({
  name: 'gatherColumns',
  buffers: { x: read('f32'), columns: read('u32'), out: write('f32') },
  params: { count: 'u32', cols: 'u32', chosen: 'u32' },
  body: loop('out[i] = x[i / params.chosen * params.cols + columns[i % params.chosen]];'),
});

/** [rows, cols] → [cols, rows], in tiles of 32 × 32 through workgroup memory so that both sides are read and written in rows. */
export const transposeKernel = defineKernel({
  name: 'transpose',
  buffers: { x: read('f32'), out: write('f32') },
  params: { rows: 'u32', cols: 'u32' },
  body: /* wgsl */ `
var<workgroup> tile: array<f32, 1056>;
@compute @workgroup_size(32, 8)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_id) local: vec3<u32>) {
  let row0 = group.y * 32u;
  let col0 = group.x * 32u;
  for (var r = local.y; r < 32u; r += 8u) {
    if (row0 + r < params.rows && col0 + local.x < params.cols) {
      tile[r * 33u + local.x] = x[(row0 + r) * params.cols + col0 + local.x];
    }
  }
  workgroupBarrier();
  for (var c = local.y; c < 32u; c += 8u) {
    if (col0 + c < params.cols && row0 + local.x < params.rows) {
      out[(col0 + c) * params.rows + row0 + local.x] = tile[local.x * 33u + c];
    }
  }
}`,
});
