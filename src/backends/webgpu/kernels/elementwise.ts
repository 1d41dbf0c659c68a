// Elementwise kernels, f32. Bytes moved: each input once, the output once. Four elements a thread (vec4 where the count
// allows), grid-strided so that any size fits the dispatch limits.
import { defineKernel, read, write } from '../kernel.js';

/** out = acc + scale · x, over `count` elements. */
export const addScaledKernel = defineKernel({
  name: 'addScaled',
  buffers: { acc: read('f32'), x: read('f32'), out: write('f32') },
  params: { count: 'u32', scale: 'f32' },
  body: /* wgsl */ `
@compute @workgroup_size(256)
fn main(@builtin(global_invocation_id) id: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>) {
  let stride = groups.x * 256u;
  for (var i = id.x; i < params.count; i += stride) {
    out[i] = acc[i] + params.scale * x[i];
  }
}`,
});
