// Copies a matrix into columns of a wider one. Bytes moved: each element read and written once.
import { defineKernel, read, write } from '../kernel.js';

/** x [rows, cols] → columns [begin, begin + cols) of out [rows, width]; `count` = rows · cols. */
export const placeColumnsKernel = defineKernel({
  name: 'placeColumns',
  buffers: { x: read('f32'), out: write('f32') },
  params: { count: 'u32', cols: 'u32', begin: 'u32', width: 'u32' },
  body: /* wgsl */ `
@compute @workgroup_size(256)
fn main(@builtin(global_invocation_id) id: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>) {
  let stride = groups.x * 256u;
  for (var i = id.x; i < params.count; i += stride) {
    out[(i / params.cols) * params.width + params.begin + i % params.cols] = x[i];
  }
}`,
});
