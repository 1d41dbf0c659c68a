// RMSNorm of rows. One workgroup per row: the row is read twice (the second time from cache), the output written once.
import { halfFeatures, narrowWgsl, type Arithmetic } from '../fast/half.js';
import { defineKernel, read, variants, write } from '../kernel.js';
import { LINEAR_GROUP } from '../tensor.js';
import { sumOverWorkgroup } from './reduce.js';

/** x · weight / √(mean(x²) + eps) for `rows` rows of `cols`. */
export const rmsNormKernel = variants((subgroups: boolean) => {
  const sum = sumOverWorkgroup(['squares'], 256, subgroups);
  return defineKernel({
    name: subgroups ? 'rmsNorm.subgroups' : 'rmsNorm',
    features: subgroups ? ['subgroups'] : [],
    buffers: { x: read('f32'), weight: read('f32'), out: write('f32') },
    params: { rows: 'u32', cols: 'u32', eps: 'f32' },
    body: /* wgsl */ `
${LINEAR_GROUP}
${sum.declarations}
@compute @workgroup_size(256)
fn main(
  @builtin(local_invocation_index) lid: u32,
  @builtin(workgroup_id) group: vec3<u32>,
  @builtin(num_workgroups) groups: vec3<u32>,
  ${sum.builtins}
) {
  let row = min(linearGroup(group, groups), params.rows - 1u);
  let base = row * params.cols;
  var squares = 0.0;
  for (var i = lid; i < params.cols; i += 256u) { squares += x[base + i] * x[base + i]; }
${sum.statements}
  let factor = inverseSqrt(total(0u) / f32(params.cols) + params.eps);
  for (var i = lid; i < params.cols; i += 256u) { out[base + i] = x[base + i] * factor * weight[i]; }
}`,
  });
});

/** The same with an output of f16, eight columns to 16 bytes. */
export const rmsNormHalfKernel = variants((subgroups: boolean, arithmetic: Arithmetic) => {
  const sum = sumOverWorkgroup(['squares'], 256, subgroups);
  return defineKernel({
    name: 'rmsNorm.half',
    features: [...halfFeatures(arithmetic), ...(subgroups ? (['subgroups'] as const) : [])],
    buffers: { x: read('vec4<f32>'), weight: read('vec4<f32>'), out: write('vec2<u32>') },
    params: { rows: 'u32', cols: 'u32', eps: 'f32' },
    body: /* wgsl */ `
${LINEAR_GROUP}
${narrowWgsl(arithmetic)}
${sum.declarations}
@compute @workgroup_size(256)
fn main(
  @builtin(local_invocation_index) lid: u32,
  @builtin(workgroup_id) group: vec3<u32>,
  @builtin(num_workgroups) groups: vec3<u32>,
  ${sum.builtins}
) {
  let row = min(linearGroup(group, groups), params.rows - 1u);
  let quads = params.cols / 4u;
  let base = row * quads;
  var squares = 0.0;
  for (var i = lid; i < quads; i += 256u) { squares += dot(x[base + i], x[base + i]); }
${sum.statements}
  let factor = inverseSqrt(total(0u) / f32(params.cols) + params.eps);
  for (var i = lid; i < quads; i += 256u) {
    let y = x[base + i] * factor * weight[i];
    out[base + i] = vec2(narrow(y.xy), narrow(y.zw));
  }
}`,
  });
});
