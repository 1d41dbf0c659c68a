// Gradients of the block's row-wise ops: RMSNorm, heads with their norms and RoPE, SiLU·up. Bytes moved: each input once
// or, where a sum over the row comes first, twice (the second time from cache), each output once.
//
// Sums over rows (∂ of norm weights) are kept per workgroup, in its own stretch of `parts` [workgroups, n], and added up by
// `sumColumnsKernel`: nothing is exchanged, and results do not depend on the order workgroups run in.
import { defineKernel, read, variants, write, type BufferSpec } from '../kernel.js';

/** Workgroups whose partial sums {@link sumColumnsKernel} adds up. */
export const PARTS = 256;

/** out[c] = Σ over `parts` of x[part · count + c]. Workgroups: ⌈count / 16⌉; sixteen threads share a column. */
export const sumColumnsKernel = defineKernel({
  name: 'sumColumns',
  buffers: { x: read('f32'), out: write('f32') },
  params: { count: 'u32', parts: 'u32', first: 'u32' },
  body: /* wgsl */ `
var<workgroup> sums: array<f32, 256>;
@compute @workgroup_size(256)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) local: u32) {
  let c = group.x * 16u + local % 16u;
  var sum = 0.0;
  if (c < params.count) {
    for (var p = local / 16u; p < params.parts; p += 16u) { sum += x[params.first + p * params.count + c]; }
  }
  sums[local] = sum;
  for (var reach = 128u; reach >= 16u; reach >>= 1u) {
    workgroupBarrier();
    if (local < reach) { sums[local] += sums[local + reach]; }
  }
  if (local < 16u && c < params.count) { out[c] = sums[local]; }
}`,
});

/** WGSL: sums `a` over the workgroup's threads; every thread gets the result. */
const sumOf = (threads: number): string => /* wgsl */ `
var<workgroup> partials: array<vec2<f32>, ${threads}>;
fn sumOf(lid: u32, mine: vec2<f32>) -> vec2<f32> {
  workgroupBarrier();
  partials[lid] = mine;
  for (var reach = ${threads / 2}u; reach > 0u; reach >>= 1u) {
    workgroupBarrier();
    if (lid < reach) { partials[lid] += partials[lid + reach]; }
  }
  workgroupBarrier();
  return partials[0];
}`;

/**
 * Of y = w·x / √(mean x² + eps): ∂x = (w∂y − x·Σ(w∂y·x)·inverse²/n)·inverse, ∂w = Σ ∂y·x·inverse over rows. Workgroups take
 * every `workgroups`-th row.
 */
export const rmsNormGradientKernel = defineKernel({
  name: 'rmsNormGradient',
  buffers: { x: read('f32'), weight: read('f32'), dy: read('f32'), dx: write('f32'), parts: write('f32') },
  params: { rows: 'u32', cols: 'u32', eps: 'f32' },
  body: /* wgsl */ `
${sumOf(256)}
@compute @workgroup_size(256)
fn main(
  @builtin(local_invocation_index) lid: u32,
  @builtin(workgroup_id) group: vec3<u32>,
  @builtin(num_workgroups) groups: vec3<u32>,
) {
  let own = group.x * params.cols;
  for (var i = lid; i < params.cols; i += 256u) { parts[own + i] = 0.0; }
  for (var row = group.x; row < params.rows; row += groups.x) {
    let base = row * params.cols;
    var sums = vec2<f32>();
    for (var i = lid; i < params.cols; i += 256u) {
      let value = x[base + i];
      sums += vec2(value, weight[i] * dy[base + i]) * value;
    }
    sums = sumOf(lid, sums);
    let mean = sums.x / f32(params.cols) + params.eps;
    let inverse = inverseSqrt(mean);
    let share = sums.y / (f32(params.cols) * mean);
    for (var i = lid; i < params.cols; i += 256u) {
      let value = x[base + i];
      let g = dy[base + i];
      dx[base + i] = (weight[i] * g - value * share) * inverse;
      parts[own + i] += g * value * inverse;
    }
  }
}`,
});

/** Options of {@link splitHeadsGradientKernel}. */
export interface SplitHeadsGradientVariant {
  readonly headDim: number;
  /** 0 for heads that don't turn: v's. */
  readonly rotaryDim: number;
  readonly norm: boolean;
}

/**
 * Of splitHeads, for heads of one kind (q, k or v; all three at once would bind more buffers than GPUs must allow): their gradients dy
 * [rows, heads·headDim] turned back by the angles of their positions and through the norm, into ∂qkv [rows, width·headDim] from head `first`
 * on. `items` = rows · heads, of which each workgroup of 64 threads takes every `workgroups`-th. `parts` [workgroups, headDim]: sums
 * for the norm's weight. Bytes: both gradients once, with a norm qkv twice (the second time from cache).
 */
export const splitHeadsGradientKernel = variants(({ headDim, rotaryDim, norm }: SplitHeadsGradientVariant) => {
  const slots = Array.from({ length: Math.ceil(headDim / 64) }, (_, i) => i);
  const inside = (s: number, body: string): string =>
    (s + 1) * 64 <= headDim ? `    {\n      ${body}\n    }` : `    if (lid + ${s * 64}u < D) {\n      ${body}\n    }`;
  return defineKernel({
    name: `splitHeadsGradient.${headDim}${rotaryDim > 0 ? '' : '.still'}${norm ? '.norm' : ''}`,
    buffers: {
      ...(norm ? { qkv: read('f32'), weight: read('f32'), parts: write('f32') } : {}),
      ...(rotaryDim > 0 ? { turns: read('vec2<f32>') } : {}),
      dy: read('f32'),
      out: write('f32'),
    } as Record<'qkv' | 'turns' | 'weight' | 'dy' | 'out' | 'parts', BufferSpec>,
    params: { items: 'u32', heads: 'u32', first: 'u32', width: 'u32', tokens: 'u32', start: 'u32', eps: 'f32' },
    body: /* wgsl */ `
const D = ${headDim}u;
const HALF = ${rotaryDim / 2}u;
var<workgroup> values: array<f32, D>;
${norm ? sumOf(64) : ''}
@compute @workgroup_size(64)
fn main(
  @builtin(local_invocation_index) lid: u32,
  @builtin(workgroup_id) group: vec3<u32>,
  @builtin(num_workgroups) groups: vec3<u32>,
) {
${slots.map((s) => `  var sum${s} = 0.0;`).join('\n')}
  for (var item = group.x; item < params.items; item += groups.x) {
    let row = item / params.heads;
    let at = (row * params.width + params.first + item % params.heads) * D;
    workgroupBarrier();
    for (var i = lid; i < D; i += 64u) { values[i] = dy[item * D + i]; }
    workgroupBarrier();
${
  rotaryDim > 0
    ? `    let angles = (params.start + row % params.tokens) * HALF;
    // Each thread turns whole pairs: nobody else reads them in between.
    for (var i = lid; i < HALF; i += 64u) {
      let turn = turns[angles + i];
      let a = values[i];
      let b = values[i + HALF];
      values[i] = a * turn.x + b * turn.y;
      values[i + HALF] = b * turn.x - a * turn.y;
    }
    workgroupBarrier();`
    : ''
}
${
  norm
    ? `    var sums = vec2<f32>();
    for (var i = lid; i < D; i += 64u) {
      let x = qkv[at + i];
      sums += vec2(x, weight[i] * values[i]) * x;
    }
    sums = sumOf(lid, sums);
    let mean = sums.x / f32(D) + params.eps;
    let factor = inverseSqrt(mean);
    let share = sums.y / (f32(D) * mean);`
    : ''
}
${slots
  .map((s) =>
    inside(
      s,
      `let i = lid + ${s * 64}u;
      let g = values[i];
${
  norm
    ? `      let x = qkv[at + i];
      out[at + i] = (weight[i] * g - x * share) * factor;
      sum${s} += g * x * factor;`
    : '      out[at + i] = g;'
}`,
    ),
  )
  .join('\n')}
  }
${norm ? slots.map((s) => inside(s, `parts[group.x * D + lid + ${s * 64}u] = sum${s};`)).join('\n') : ''}
}`,
  });
});

/** gateUp [rows, 2·cols], dy [rows, cols] → [rows, 2·cols]; `count` = rows · cols. */
export const siluMulGradientKernel = defineKernel({
  name: 'siluMulGradient',
  buffers: { gateUp: read('f32'), dy: read('f32'), out: write('f32') },
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
    let high = 1.0 / (1.0 + e);
    let sigmoid = select(e * high, high, gate >= 0.0);
    let rest = select(high, e * high, gate >= 0.0);
    out[at] = dy[i] * gateUp[at + params.cols] * sigmoid * fma(gate, rest, 1.0);
    out[at + params.cols] = dy[i] * gate * sigmoid;
  }
}`,
});

/** Columns begin … begin + cols of x [rows, width]; `count` = rows · cols. */
export const takeColumnsKernel = defineKernel({
  name: 'takeColumns',
  buffers: { x: read('f32'), out: write('f32') },
  params: { count: 'u32', cols: 'u32', begin: 'u32', width: 'u32' },
  body: /* wgsl */ `
@compute @workgroup_size(256)
fn main(@builtin(global_invocation_id) id: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>) {
  let stride = groups.x * 256u;
  for (var i = id.x; i < params.count; i += stride) {
    out[i] = x[(i / params.cols) * params.width + params.begin + i % params.cols];
  }
}`,
});
