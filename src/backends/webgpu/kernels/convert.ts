// Between f32 and f16. Bytes moved: 6 per element.
import { narrowWgsl } from '../fast/half.js';
import { defineKernel, read, variants, write } from '../kernel.js';

/** f16 → f32; `count` fours. */
export const widenKernel = defineKernel({
  name: 'widen',
  buffers: { x: read('vec2<u32>'), out: write('vec4<f32>') },
  params: { count: 'u32' },
  body: /* wgsl */ `
@compute @workgroup_size(256)
fn main(@builtin(global_invocation_id) id: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>) {
  let stride = groups.x * 256u;
  for (var i = id.x; i < params.count; i += stride) { out[i] = vec4(unpack2x16float(x[i].x), unpack2x16float(x[i].y)); }
}`,
});

/** f32 → f16, to nearest; `count` fours. */
export const narrowKernel = variants((f16: boolean) =>
  defineKernel({
    name: 'narrow',
    features: f16 ? ['f16'] : [],
    buffers: { x: read('vec4<f32>'), out: write('vec2<u32>') },
    params: { count: 'u32' },
    body: /* wgsl */ `
${narrowWgsl({ f16 })}
@compute @workgroup_size(256)
fn main(@builtin(global_invocation_id) id: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>) {
  let stride = groups.x * 256u;
  for (var i = id.x; i < params.count; i += stride) { out[i] = vec2(narrow(x[i].xy), narrow(x[i].zw)); }
}`,
  }),
);

/** [128, channels]: a 1 in column i of every block of 128 channels in row i; `count` elements. */
export const unitRowsKernel = defineKernel({
  name: 'unitRows',
  buffers: { out: write('f32') },
  params: { count: 'u32', channels: 'u32' },
  body: /* wgsl */ `
@compute @workgroup_size(256)
fn main(@builtin(global_invocation_id) id: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>) {
  let stride = groups.x * 256u;
  for (var i = id.x; i < params.count; i += stride) {
    out[i] = select(0.0, 1.0, (i % params.channels) % 128u == i / params.channels);
  }
}`,
});
