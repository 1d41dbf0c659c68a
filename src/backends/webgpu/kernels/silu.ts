// silu(gate) · up. Bytes moved: gate and up once, the output once.
import { halfFeatures, narrowWgsl, type Arithmetic } from '../fast/half.js';
import { defineKernel, read, variants, write } from '../kernel.js';

/** [rows, 2·cols] → [rows, cols]; `count` = rows · cols. */
export const siluMulKernel = defineKernel({
  name: 'siluMul',
  buffers: { gateUp: read('f32'), out: write('f32') },
  params: { count: 'u32', cols: 'u32' },
  body: /* wgsl */ `
@compute @workgroup_size(256)
fn main(@builtin(global_invocation_id) id: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>) {
  let stride = groups.x * 256u;
  for (var i = id.x; i < params.count; i += stride) {
    let at = i + (i / params.cols) * params.cols;
    let gate = gateUp[at];
    // e^-|gate| never overflows; WGSL leaves infinities undefined.
    let e = exp(-abs(gate));
    out[i] = gate * (select(e, 1.0, gate >= 0.0) / (1.0 + e)) * gateUp[at + params.cols];
  }
}`,
});

/** The same with an output of f16; `count` fours, cols a multiple of 4. */
export const siluMulHalfKernel = variants((arithmetic: Arithmetic) =>
  defineKernel({
    name: 'siluMul.half',
    features: halfFeatures(arithmetic),
    buffers: { gateUp: read('vec4<f32>'), out: write('vec2<u32>') },
    params: { count: 'u32', cols: 'u32' },
    body: /* wgsl */ `
${narrowWgsl(arithmetic)}
@compute @workgroup_size(256)
fn main(@builtin(global_invocation_id) id: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>) {
  let stride = groups.x * 256u;
  let quads = params.cols / 4u;
  for (var i = id.x; i < params.count; i += stride) {
    let at = i + (i / quads) * quads;
    let gate = gateUp[at];
    let e = exp(-abs(gate));
    let y = gate * (select(e, vec4(1.0), gate >= vec4(0.0)) / (1.0 + e)) * gateUp[at + quads];
    out[i] = vec2(narrow(y.xy), narrow(y.zw));
  }
}`,
  }),
);
