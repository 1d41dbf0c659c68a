// The pairwise transform on rows of activations: x ⊙ a, then K rotations inside each group of channels. Bytes moved by the
// first two: x once, the output once, tables from cache.
//
// Workgroup memory: a workgroup takes one group of several rows. Element e of row r lies at [e][r], so that threads of
// neighbouring rows do the same pair, read the same angle, and touch neighbouring banks. One barrier per rotation.
// Subgroup: a subgroup holds one group of one row in registers, element e in lane e % S; each element looks its partner up
// by shuffles: no barrier, no memory. For groups of up to 8 elements per lane, where the subgroup size S is fixed.
// Global memory: for groups too large for either, one dispatch per rotation, in place.
import { defineKernel, read, variants, write } from '../kernel.js';
import { LINEAR_GROUP } from '../tensor.js';

/**
 * `rows` at a time (padded by one against bank conflicts where there are several). Tables: `pairs` [krot, channels/2],
 * i | j << 16 inside the group; `turns` [krot, channels/2], (cos, sin).
 */
export const rotateInWorkgroupKernel = variants((groupSize: number, rows: number, krot: number) => {
  const threads = Math.min(256, Math.max(32, 2 ** Math.floor(Math.log2((groupSize / 2) * rows))));
  const stride = rows === 1 ? 1 : rows + 1;
  return defineKernel({
    name: `rotate.g${groupSize}.${rows}rows`,
    buffers: {
      x: read('f32'),
      scales: read('f32'),
      pairs: read('u32'),
      turns: read('vec2<f32>'),
      out: write('f32'),
    },
    params: { items: 'u32', rows: 'u32', channels: 'u32' },
    body: /* wgsl */ `
${LINEAR_GROUP}
const G = ${groupSize}u;
const R = ${rows}u;
const STRIDE = ${stride}u;
var<workgroup> values: array<f32, ${groupSize * stride}>;
@compute @workgroup_size(${threads})
fn main(
  @builtin(local_invocation_index) lid: u32,
  @builtin(workgroup_id) group: vec3<u32>,
  @builtin(num_workgroups) groups: vec3<u32>,
) {
  let item = min(linearGroup(group, groups), params.items - 1u);
  let perRow = params.channels / G;
  let begin = (item % perRow) * G;
  let first = (item / perRow) * R;
  for (var i = lid; i < G * R; i += ${threads}u) {
    let e = i % G;
    let r = i / G;
    let row = min(first + r, params.rows - 1u);
    values[e * STRIDE + r] = x[row * params.channels + begin + e] * scales[begin + e];
  }
  for (var k = 0u; k < ${krot}u; k++) {
    workgroupBarrier();
    let table = (k * params.channels + begin) / 2u;
    for (var n = lid; n < G / 2u * R; n += ${threads}u) {
      let pair = pairs[table + n / R];
      let turn = turns[table + n / R];
      let i = (pair & 0xffffu) * STRIDE + n % R;
      let j = (pair >> 16u) * STRIDE + n % R;
      let a = values[i];
      let b = values[j];
      values[i] = a * turn.x + b * turn.y;
      values[j] = b * turn.x - a * turn.y;
    }
  }
  workgroupBarrier();
  for (var i = lid; i < G * R; i += ${threads}u) {
    let e = i % G;
    let r = i / G;
    if (first + r < params.rows) { out[(first + r) * params.channels + begin + e] = values[e * STRIDE + r]; }
  }
}`,
  });
});

/** Bytes of workgroup memory of {@link rotateInWorkgroupKernel}. */
export function rotationMemory(groupSize: number, rows: number): number {
  return 4 * groupSize * (rows === 1 ? 1 : rows + 1);
}

/** Elements per lane up to which the subgroup kernel looks partners up. */
export const MAX_PER_LANE = 8;

/**
 * A group of `groupSize` elements in a subgroup of exactly `lanes`. Tables per element: `partners` [krot, channels],
 * inside the group; `turns` [krot, channels], (cos, ± sin): y = x cos + partner · (± sin).
 */
export const rotateInSubgroupKernel = variants((groupSize: number, lanes: number, krot: number) => {
  const perLane = groupSize / lanes;
  const threads = Math.max(64, lanes);
  const slots = Array.from({ length: perLane }, (_, i) => i);
  return defineKernel({
    name: `rotate.g${groupSize}.subgroup${lanes}`,
    features: ['subgroups'],
    buffers: {
      x: read('f32'),
      scales: read('f32'),
      partners: read('u32'),
      turns: read('vec2<f32>'),
      out: write('f32'),
    },
    params: { items: 'u32', channels: 'u32' },
    body: /* wgsl */ `
${LINEAR_GROUP}
const G = ${groupSize}u;
const LANES = ${lanes}u;
@compute @workgroup_size(${threads})
fn main(
  @builtin(local_invocation_index) lid: u32,
  @builtin(subgroup_invocation_id) lane: u32,
  @builtin(workgroup_id) group: vec3<u32>,
  @builtin(num_workgroups) groups: vec3<u32>,
) {
  // Every lane must take part in the shuffles: superfluous subgroups repeat the last item.
  let item = min(linearGroup(group, groups) * ${threads / lanes}u + lid / LANES, params.items - 1u);
  let begin = (item * G) % params.channels;
${slots.map((i) => `  var v${i} = x[item * G + lane + ${i * lanes}u] * scales[begin + lane + ${i * lanes}u];`).join('\n')}
  for (var k = 0u; k < ${krot}u; k++) {
    let table = k * params.channels + begin + lane;
${slots
  .map((i) => {
    const looks = slots.map((j) => `    let s${i}_${j} = subgroupShuffle(v${j}, p${i} % LANES);`);
    const choose = slots.slice(1).reduce((rest, j) => `select(${rest}, s${i}_${j}, p${i} / LANES == ${j}u)`, `s${i}_0`);
    return `    let p${i} = partners[table + ${i * lanes}u];
${looks.join('\n')}
    let o${i} = ${choose};`;
  })
  .join('\n')}
${slots.map((i) => `    let t${i} = turns[table + ${i * lanes}u];\n    v${i} = v${i} * t${i}.x + o${i} * t${i}.y;`).join('\n')}
  }
${slots.map((i) => `  out[item * G + lane + ${i * lanes}u] = v${i};`).join('\n')}
}`,
  });
});

/** out = x ⊙ scales; `count` elements. */
export const scaleChannelsKernel = defineKernel({
  name: 'scaleChannels',
  buffers: { x: read('f32'), scales: read('f32'), out: write('f32') },
  params: { count: 'u32', channels: 'u32' },
  body: /* wgsl */ `
@compute @workgroup_size(256)
fn main(@builtin(global_invocation_id) id: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>) {
  let stride = groups.x * 256u;
  for (var i = id.x; i < params.count; i += stride) { out[i] = x[i] * scales[i % params.channels]; }
}`,
});

/** Rotation k of every row, in place; `count` = rows · channels / 2 pairs. Tables as in {@link rotateInWorkgroupKernel}. */
export const rotateInPlaceKernel = defineKernel({
  name: 'rotateInPlace',
  buffers: { pairs: read('u32'), turns: read('vec2<f32>'), out: write('f32') },
  params: { count: 'u32', channels: 'u32', groupSize: 'u32', k: 'u32' },
  body: /* wgsl */ `
@compute @workgroup_size(256)
fn main(@builtin(global_invocation_id) id: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>) {
  let stride = groups.x * 256u;
  let half = params.channels / 2u;
  for (var n = id.x; n < params.count; n += stride) {
    let p = n % half;
    let base = (n / half) * params.channels + ((2u * p) / params.groupSize) * params.groupSize;
    let pair = pairs[params.k * half + p];
    let turn = turns[params.k * half + p];
    let i = base + (pair & 0xffffu);
    let j = base + (pair >> 16u);
    let a = out[i];
    let b = out[j];
    out[i] = a * turn.x + b * turn.y;
    out[j] = b * turn.x - a * turn.y;
  }
}`,
});
