// Splits merged projections into heads, with their norms and RoPE. One workgroup of 64 threads per row and head: the head
// is read once into workgroup memory and written once. Bytes: 4 in and 4 or 2 out per channel.
import { halfFeatures, narrowWgsl, type Arithmetic } from '../fast/half.js';
import { defineKernel, read, variants, write } from '../kernel.js';
import { LINEAR_GROUP } from '../tensor.js';

/** Options of {@link splitHeadsKernel}. */
export interface SplitHeadsVariant {
  readonly headDim: number;
  readonly rotaryDim: number;
  readonly qNorm: boolean;
  readonly kNorm: boolean;
  /** Outputs are f16, two to a word; the head dimension is even. */
  readonly half?: Arithmetic;
}

/**
 * qkv [rows, (heads + 2·kvHeads)·headDim] → q, k, v. Pairs (i, i + rotaryDim/2) of q and k turn by the angle of the row's
 * position; `items` = rows · (heads + 2·kvHeads).
 */
export const splitHeadsKernel = variants(({ headDim, rotaryDim, qNorm, kNorm, half }: SplitHeadsVariant) =>
  defineKernel({
    name: `splitHeads.${headDim}${half ? '.half' : ''}`,
    features: half ? halfFeatures(half) : [],
    buffers: {
      qkv: read('f32'),
      turns: read('vec2<f32>'),
      qWeight: read('f32'),
      kWeight: read('f32'),
      starts: read('u32'),
      q: write(half ? 'u32' : 'f32'),
      k: write(half ? 'u32' : 'f32'),
      v: write(half ? 'u32' : 'f32'),
    },
    params: { items: 'u32', heads: 'u32', kvHeads: 'u32', tokens: 'u32', start: 'u32', ragged: 'u32', eps: 'f32' },
    body: /* wgsl */ `
${LINEAR_GROUP}
const D = ${headDim}u;
const HALF = ${rotaryDim / 2}u;
var<workgroup> values: array<f32, D>;
var<workgroup> partials: array<f32, 64>;
${half ? narrowWgsl(half) : ''}
// Channel i of the head, turned; \`angles\` is where its position's begin.
fn turned(i: u32, angles: u32, isV: bool) -> f32 {
  let value = values[i];
  if (i >= 2u * HALF || isV) { return value; }
  let first = i < HALF;
  let angle = angles + select(i - HALF, i, first);
  let partner = values[select(i - HALF, i + HALF, first)];
  let turn = turns[angle];
  return fma(value, turn.x, select(partner, -partner, first) * turn.y);
}
@compute @workgroup_size(64)
fn main(
  @builtin(local_invocation_index) lid: u32,
  @builtin(workgroup_id) group: vec3<u32>,
  @builtin(num_workgroups) groups: vec3<u32>,
) {
  let item = min(linearGroup(group, groups), params.items - 1u);
  let perRow = params.heads + 2u * params.kvHeads;
  let row = item / perRow;
  let head = item % perRow;
  let isQ = head < params.heads;
  let isV = head >= params.heads + params.kvHeads;
  var squares = 0.0;
  for (var i = lid; i < D; i += 64u) {
    let value = qkv[item * D + i];
    values[i] = value;
    squares += value * value;
  }
${
  qNorm || kNorm
    ? `  partials[lid] = squares;
  workgroupBarrier();
  for (var reach = 32u; reach > 0u; reach >>= 1u) {
    if (lid < reach) { partials[lid] += partials[lid + reach]; }
    workgroupBarrier();
  }
  let factor = inverseSqrt(partials[0] / f32(D) + params.eps);
  for (var i = lid; i < D; i += 64u) {
${qNorm ? '    if (isQ) { values[i] *= factor * qWeight[i]; }' : ''}
${kNorm ? '    if (!isQ && !isV) { values[i] *= factor * kWeight[i]; }' : ''}
  }`
    : ''
}
  workgroupBarrier();
  var start = params.start;
  if (params.ragged != 0u) { start = starts[row / params.tokens]; }
  let angles = (start + row % params.tokens) * HALF;
  // Units of the outputs: words of two f16, or one f32.
  const UNITS = D / ${half ? 2 : 1}u;
  for (var i = lid; i < UNITS; i += 64u) {
    let value = ${half ? 'narrow(vec2(turned(2u * i, angles, isV), turned(2u * i + 1u, angles, isV)))' : 'turned(i, angles, isV)'};
    if (isQ) { q[(row * params.heads + head) * UNITS + i] = value; }
    else if (isV) { v[(row * params.kvHeads + head - params.heads - params.kvHeads) * UNITS + i] = value; }
    else { k[(row * params.kvHeads + head - params.heads) * UNITS + i] = value; }
  }
}`,
  }),
);
