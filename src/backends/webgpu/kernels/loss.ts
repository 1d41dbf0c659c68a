// Losses with their gradients, and the optimizer's step. Bytes moved: each operand once (rows of logits three times, from
// cache), each result once. A loss is summed with 48 bits, first within workgroups, then over them.
import { defineKernel, read, variants, write } from '../kernel.js';
import { LINEAR_GROUP } from '../tensor.js';
import { TWO_SUM } from './double.js';

/** Workgroups of {@link elementLossKernel}: partial sums. */
export const LOSS_GROUPS = 512;

/** WGSL: sums 48-bit numbers over a workgroup of 256. */
const SUM = /* wgsl */ `${TWO_SUM}
var<workgroup> sums: array<vec2<f32>, 256>;
fn sumPrecisely(local: u32, mine: vec2<f32>) -> vec2<f32> {
  workgroupBarrier();
  sums[local] = mine;
  for (var reach = 128u; reach > 0u; reach >>= 1u) {
    workgroupBarrier();
    if (local < reach) { sums[local] = ddAdd(sums[local], sums[local + reach]); }
  }
  workgroupBarrier();
  return sums[0];
}`;

const TERMS = {
  mse: 'let value = d * d; let slope = 2.0 * d;',
  'smooth-l1': `let near = abs(d) < params.beta;
    let value = select(abs(d) - 0.5 * params.beta, 0.5 * d * d / params.beta, near);
    let slope = select(sign(d), d / params.beta, near);`,
} as const;

/** gradient = share · ∂loss(prediction − target); `parts`: a partial sum (hi, lo) per workgroup. */
export const elementLossKernel = variants((kind: keyof typeof TERMS) =>
  defineKernel({
    name: `elementLoss.${kind}`,
    buffers: { prediction: read('f32'), goal: read('f32'), gradient: write('f32'), parts: write('vec2<f32>') },
    params: { count: 'u32', share: 'f32', beta: 'f32', one: 'f32' },
    body: /* wgsl */ `${SUM}
@compute @workgroup_size(256)
fn main(
  @builtin(workgroup_id) group: vec3<u32>,
  @builtin(num_workgroups) groups: vec3<u32>,
  @builtin(local_invocation_index) local: u32,
) {
  var sum = vec2<f32>();
  let stride = groups.x * 256u;
  for (var i = group.x * 256u + local; i < params.count; i += stride) {
    let d = prediction[i] - goal[i];
    ${TERMS[kind]}
    gradient[i] = slope * params.share;
    let s = twoSum(sum.x, value);
    sum = vec2(s.x, sum.y + s.y);
  }
  sum = sumPrecisely(local, sum);
  if (local == 0u) { parts[group.x] = sum; }
}`,
  }),
);

/** loss = factor · Σ parts. One workgroup. */
export const finishLossKernel = defineKernel({
  name: 'finishLoss',
  buffers: { parts: read('vec2<f32>'), loss: write('f32') },
  params: { count: 'u32', factor: 'f32', one: 'f32' },
  body: /* wgsl */ `${SUM}
@compute @workgroup_size(256)
fn main(@builtin(local_invocation_index) local: u32) {
  var sum = vec2<f32>();
  for (var i = local; i < params.count; i += 256u) { sum = ddAdd(sum, parts[i]); }
  sum = sumPrecisely(local, sum);
  if (local == 0u) { loss[0] = (sum.x + sum.y) * params.factor; }
}`,
});

/**
 * Per row of logits: gradient = (softmax − target) / rows and the row's loss. The target is one class, or the softmax of
 * reference logits. One workgroup per row.
 */
export const logitLossKernel = variants((target: 'class' | 'reference') => {
  const reference = target === 'reference';
  return defineKernel({
    name: reference ? 'klDivergence' : 'crossEntropy',
    buffers: {
      logits: read('f32'),
      goal: read(reference ? 'f32' : 'u32'),
      gradient: write('f32'),
      parts: write('vec2<f32>'),
    },
    params: { rows: 'u32', classes: 'u32', share: 'f32' },
    body: /* wgsl */ `${LINEAR_GROUP}
var<workgroup> shared3: array<vec3<f32>, 256>;
fn peakOf(lid: u32, mine: vec3<f32>) -> vec3<f32> {
  workgroupBarrier();
  shared3[lid] = mine;
  for (var reach = 128u; reach > 0u; reach >>= 1u) {
    workgroupBarrier();
    if (lid < reach) { shared3[lid] = max(shared3[lid], shared3[lid + reach]); }
  }
  workgroupBarrier();
  return shared3[0];
}
fn sumOf(lid: u32, mine: vec3<f32>) -> vec3<f32> {
  workgroupBarrier();
  shared3[lid] = mine;
  for (var reach = 128u; reach > 0u; reach >>= 1u) {
    workgroupBarrier();
    if (lid < reach) { shared3[lid] += shared3[lid + reach]; }
  }
  workgroupBarrier();
  return shared3[0];
}
@compute @workgroup_size(256)
fn main(
  @builtin(local_invocation_index) lid: u32,
  @builtin(workgroup_id) group: vec3<u32>,
  @builtin(num_workgroups) groups: vec3<u32>,
) {
  let row = min(linearGroup(group, groups), params.rows - 1u);
  let base = row * params.classes;
  var top = vec3(-3.4e38);
  for (var i = lid; i < params.classes; i += 256u) {
    top.x = max(top.x, logits[base + i]);
    ${reference ? 'top.y = max(top.y, goal[base + i]);' : ''}
  }
  top = peakOf(lid, top);
  var sum = vec3<f32>();
  for (var i = lid; i < params.classes; i += 256u) {
    let x = logits[base + i] - top.x;
    sum.x += exp(x);
${
  reference
    ? `    let y = goal[base + i] - top.y;
    let p = exp(y);
    sum.y += p;
    // What the reference rules out contributes nothing, even where the difference is infinite.
    sum.z += select(0.0, p * (y - x), p > 0.0);`
    : ''
}
  }
  sum = sumOf(lid, sum);
  for (var i = lid; i < params.classes; i += 256u) {
    let q = exp(logits[base + i] - top.x) / sum.x;
${reference ? '    let p = exp(goal[base + i] - top.y) / sum.y;' : '    let p = select(0.0, 1.0, i == goal[row]);'}
    gradient[base + i] = (q - p) * params.share;
  }
  if (lid == 0u) {
${
  reference
    ? '    parts[row] = vec2(sum.z / sum.y + (log(sum.x) - log(sum.y)), 0.0);'
    : '    parts[row] = vec2(log(sum.x) - (logits[base + goal[row]] - top.x), 0.0);'
}
  }
}`,
  });
});

/**
 * One step of AdamW, in place. Factors are the host's, in f64 until here: keep1 = β1, take1 = 1 − β1, correct1 =
 * 1 / (1 − β1^t), and the same for the squares. The parameter is held in [minimum, maximum].
 */
export const adamWKernel = defineKernel({
  name: 'adamW',
  buffers: { parameter: write('f32'), gradient: read('f32'), first: write('f32'), second: write('f32') },
  params: {
    count: 'u32',
    rate: 'f32',
    decay: 'f32',
    eps: 'f32',
    keep1: 'f32',
    take1: 'f32',
    correct1: 'f32',
    keep2: 'f32',
    take2: 'f32',
    correct2: 'f32',
    minimum: 'f32',
    maximum: 'f32',
  },
  body: /* wgsl */ `
@compute @workgroup_size(256)
fn main(@builtin(global_invocation_id) id: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>) {
  let stride = groups.x * 256u;
  for (var i = id.x; i < params.count; i += stride) {
    let g = gradient[i];
    let m = fma(params.keep1, first[i], params.take1 * g);
    let v = fma(params.keep2, second[i], params.take2 * g * g);
    first[i] = m;
    second[i] = v;
    let step = m * params.correct1 / (sqrt(v * params.correct2) + params.eps);
    let p = parameter[i];
    parameter[i] = clamp(p - params.rate * fma(params.decay, p, step), params.minimum, params.maximum);
  }
}`,
});
