// Copies rows of a matrix in a new order. Bytes moved: each row read and written once.
import { defineKernel, read, write } from '../kernel.js';

/** Row rows[i] of x [n, words] → row i of out; `count` = rows · words. Words are f32, or two f16. */
export const gatherRowsKernel = defineKernel({
  name: 'gatherRows',
  buffers: { x: read('u32'), rows: read('u32'), out: write('u32') },
  params: { count: 'u32', words: 'u32' },
  body: /* wgsl */ `
@compute @workgroup_size(256)
fn main(@builtin(global_invocation_id) id: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>) {
  let stride = groups.x * 256u;
  for (var i = id.x; i < params.count; i += stride) {
    out[i] = x[rows[i / params.words] * params.words + i % params.words];
  }
}`,
});
