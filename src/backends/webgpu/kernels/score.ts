// Statistics of rows of logits, for −log p, KL divergence and agreement. One workgroup per row. Each thread adds vocab / 256 terms
// one after the other and the 256 sums meet in a tree, so errors grow like √(vocab / 256), not like √vocab. The logarithms are taken
// on the host, in f64.
//
// Without a reference a row is read once, 16 bytes at a time: a sum is scaled anew when its thread meets a larger value. With one, both
// are read twice (maxima, then sums, the second time from cache): sums of differences would lose digits to a maximum found late.
import { defineKernel, read, variants, write } from '../kernel.js';
import { LINEAR_GROUP } from '../tensor.js';

/** f32 values per row that both kernels write. */
export const SCORE_VALUES = 8;

/** Per row: max, argmax (bits), Σ e^(x − max), x[target] − max; four values are left out. Rows are whole words of 16 bytes. */
export const scoreOnceKernel = defineKernel({
  name: 'score.once',
  buffers: { logits: read('vec4<f32>'), values: read('f32'), targets: read('u32'), out: write('f32') },
  params: { rows: 'u32', vocab: 'u32' },
  body: /* wgsl */ `
${LINEAR_GROUP}
struct Part { top: f32, index: u32, sum: f32 }
var<workgroup> parts: array<Part, 256>;
@compute @workgroup_size(256)
fn main(
  @builtin(local_invocation_index) lid: u32,
  @builtin(workgroup_id) group: vec3<u32>,
  @builtin(num_workgroups) groups: vec3<u32>,
) {
  let row = min(linearGroup(group, groups), params.rows - 1u);
  let words = params.vocab / 4u;
  let base = row * words;
  var top = -3.4e38;
  var index = 0xffffffffu;
  var sum = 0.0;
  for (var i = lid; i < words; i += 256u) {
    let x = logits[base + i];
    let most = max(max(x.x, x.y), max(x.z, x.w));
    if (most > top) {
      sum *= exp(max(top - most, -100.0));
      top = most;
      // The first of equals: later ones are not above it.
      index = 4u * i + select(select(select(3u, 2u, x.z == most), 1u, x.y == most), 0u, x.x == most);
    }
    let e = exp(x - top);
    sum += (e.x + e.y) + (e.z + e.w);
  }
  parts[lid] = Part(top, index, sum);
  workgroupBarrier();
  for (var reach = 128u; reach > 0u; reach >>= 1u) {
    if (lid < reach) {
      let a = parts[lid];
      let b = parts[lid + reach];
      let other = b.top > a.top || (b.top == a.top && b.index < a.index);
      let most = max(a.top, b.top);
      parts[lid] = Part(most, select(a.index, b.index, other), a.sum * exp(max(a.top - most, -100.0)) + b.sum * exp(max(b.top - most, -100.0)));
    }
    workgroupBarrier();
  }
  if (lid == 0u) {
    let to = row * ${SCORE_VALUES}u;
    let all = parts[0];
    out[to] = all.top;
    out[to + 1u] = bitcast<f32>(all.index);
    out[to + 2u] = all.sum;
    out[to + 3u] = values[row * params.vocab + targets[row]] - all.top;
  }
}`,
});

/**
 * Per row: max, argmax (bits), Σ e^(x − max), x[target] − max; and of a reference y: max, argmax (bits), Σ e^(y − max),
 * Σ e^(y − max_y)·((y − max_y) − (x − max)).
 */
export const scoreKernel = variants((withReference: boolean) =>
  defineKernel({
    name: withReference ? 'score.reference' : 'score',
    buffers: { logits: read('f32'), reference: read('f32'), targets: read('u32'), out: write('f32') },
    params: { rows: 'u32', vocab: 'u32' },
    body: /* wgsl */ `
${LINEAR_GROUP}
struct Peak { value: f32, index: u32 }
var<workgroup> peaks: array<Peak, 256>;
var<workgroup> sums: array<vec3<f32>, 256>;
// The larger of two, the first of equals.
fn higher(a: Peak, b: Peak) -> Peak {
  if (b.value > a.value || (b.value == a.value && b.index < a.index)) { return b; }
  return a;
}
fn peakOf(lid: u32, mine: Peak) -> Peak {
  workgroupBarrier();
  peaks[lid] = mine;
  workgroupBarrier();
  for (var reach = 128u; reach > 0u; reach >>= 1u) {
    if (lid < reach) { peaks[lid] = higher(peaks[lid], peaks[lid + reach]); }
    workgroupBarrier();
  }
  return peaks[0];
}
@compute @workgroup_size(256)
fn main(
  @builtin(local_invocation_index) lid: u32,
  @builtin(workgroup_id) group: vec3<u32>,
  @builtin(num_workgroups) groups: vec3<u32>,
) {
  let row = min(linearGroup(group, groups), params.rows - 1u);
  let base = row * params.vocab;
  var mine = Peak(-3.4e38, 0xffffffffu);
  for (var i = lid; i < params.vocab; i += 256u) { mine = higher(mine, Peak(logits[base + i], i)); }
  let top = peakOf(lid, mine);
${
  withReference
    ? `  mine = Peak(-3.4e38, 0xffffffffu);
  for (var i = lid; i < params.vocab; i += 256u) { mine = higher(mine, Peak(reference[base + i], i)); }
  let referenceTop = peakOf(lid, mine);`
    : ''
}
  var sum = vec3(0.0);
  for (var i = lid; i < params.vocab; i += 256u) {
    let x = logits[base + i] - top.value;
    sum.x += exp(x);
${
  withReference
    ? `    let y = reference[base + i] - referenceTop.value;
    let p = exp(y);
    sum.y += p;
    // What the reference rules out contributes nothing, even where the difference is infinite.
    sum.z += select(0.0, p * (y - x), p > 0.0);`
    : ''
}
  }
  sums[lid] = sum;
  workgroupBarrier();
  for (var reach = 128u; reach > 0u; reach >>= 1u) {
    if (lid < reach) { sums[lid] += sums[lid + reach]; }
    workgroupBarrier();
  }
  if (lid == 0u) {
    let to = row * ${SCORE_VALUES}u;
    out[to] = top.value;
    out[to + 1u] = bitcast<f32>(top.index);
    out[to + 2u] = sums[0].x;
    out[to + 3u] = logits[base + targets[row]] - top.value;
${
  withReference
    ? `    out[to + 4u] = referenceTop.value;
    out[to + 5u] = bitcast<f32>(referenceTop.index);
    out[to + 6u] = sums[0].y;
    out[to + 7u] = sums[0].z;`
    : ''
}
  }
}`,
  }),
);
