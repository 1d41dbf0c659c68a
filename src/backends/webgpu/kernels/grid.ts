// Integer grids per group of channels and column (design §4.2) on channel-major weights [channels, cols]: a
// grid's scale and zero point are f32 values [groups, cols] on the GPU; codes are packed into bytes only when read back.
// Bytes moved: the weights once per kernel, and what it writes.
import { defineKernel, read, write } from '../kernel.js';

/** WGSL: the arithmetic of grids. */
export const GRID_ARITHMETIC = /* wgsl */ `
const MIN_SCALE = 0.00006103515625; // The smallest normal f16.
const MAX_SCALE = 65504.0; // The largest f16.
/** x / y, rounded to nearest but for rare ties: WGSL's own division may be 2.5 ulp off. */
fn quotient(x: f32, y: f32) -> f32 {
  let inverse = 1.0 / y;
  let q = x * inverse;
  return fma(fma(-q, y, x), inverse, q);
}
/** The nearest f16 of a normal value ≥ 0, at most the largest. */
fn roundF16(x: f32) -> f32 {
  let bits = bitcast<u32>(min(x, MAX_SCALE));
  return bitcast<f32>((bits + 0xfffu + ((bits >> 13u) & 1u)) & 0xffffe000u);
}
fn rangeScale(lo: f32, hi: f32, levels: f32) -> f32 { return roundF16(quotient(hi - lo, levels)); }
/** Scale and zero point of the grid over [lo, hi]; a group without a range gets one that its constant lies on. */
fn gridOf(lo: f32, hi: f32, levels: f32) -> vec2<f32> {
  var scale = rangeScale(lo, hi, levels);
  if (scale < MIN_SCALE) { scale = max(rangeScale(0.0, max(abs(lo), abs(hi)), levels), MIN_SCALE); }
  return vec2<f32>(scale, clamp(round(quotient(-lo, scale)), 0.0, levels));
}
/** The same, or symmetric around zero: then codes are from −(levels + 1)/2 to (levels − 1)/2. */
fn gridFor(lo: f32, hi: f32, levels: f32, symmetric: u32) -> vec2<f32> {
  if (symmetric == 0u) { return gridOf(lo, hi, levels); }
  let peak = max(abs(lo), abs(hi));
  return vec2<f32>(max(roundF16(quotient(peak, (levels - 1.0) / 2.0)), MIN_SCALE), (levels + 1.0) / 2.0);
}
/** code − zero. */
fn snap(x: f32, grid: vec2<f32>, levels: f32) -> f32 {
  return clamp(round(quotient(x, grid.x)), -grid.y, levels - grid.y);
}`;

const GREATEST = '3.4028234663852886e38';

/** Columns per workgroup of kernels that walk the rows of a group: 16 threads share a column's rows. */
export const GRID_COLUMNS = 16;

/** The grid of each (group, column) from group `group0` on: min and max, times `clip` or `ratio`. Workgroups: (columns / 16, groups). */
export const rangeKernel = defineKernel({
  name: 'gridRange',
  buffers: { w: read('f32'), clip: read('f32'), scales: write('f32'), zeros: write('f32') },
  params: {
    cols: 'u32',
    groupSize: 'u32',
    group0: 'u32',
    levels: 'f32',
    symmetric: 'u32',
    clipped: 'u32',
    ratio: 'f32',
  },
  body: /* wgsl */ `${GRID_ARITHMETIC}
var<workgroup> ranges: array<vec2<f32>, 256>;
@compute @workgroup_size(256)
fn main(@builtin(workgroup_id) id: vec3<u32>, @builtin(local_invocation_index) local: u32) {
  let lane = local / 16u;
  let col = id.x * 16u + local % 16u;
  let group = params.group0 + id.y;
  var lo = ${GREATEST};
  var hi = -${GREATEST};
  let first = group * params.groupSize;
  if (col < params.cols) {
    for (var row = first + lane; row < first + params.groupSize; row += 16u) {
      let x = w[row * params.cols + col];
      lo = min(lo, x);
      hi = max(hi, x);
    }
  }
  ranges[local] = vec2<f32>(lo, hi);
  workgroupBarrier();
  if (lane != 0u || col >= params.cols) { return; }
  for (var n = 1u; n < 16u; n++) {
    let other = ranges[n * 16u + local];
    lo = min(lo, other.x);
    hi = max(hi, other.y);
  }
  let slot = group * params.cols + col;
  var factor = params.ratio;
  if (params.clipped != 0u) { factor = clip[slot]; }
  let grid = gridFor(lo * factor, hi * factor, params.levels, params.symmetric);
  scales[slot] = grid.x;
  zeros[slot] = grid.y;
}`,
});

/** values = (code − zero)·scale of `count` weights from element `first` on, less the weight itself with `difference`. */
export const fakeQuantizeKernel = defineKernel({
  name: 'fakeQuantize',
  buffers: { w: read('f32'), scales: read('f32'), zeros: read('f32'), values: write('f32') },
  params: { count: 'u32', first: 'u32', cols: 'u32', groupSize: 'u32', levels: 'f32', difference: 'u32' },
  body: /* wgsl */ `${GRID_ARITHMETIC}
@compute @workgroup_size(256)
fn main(@builtin(global_invocation_id) id: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>) {
  let stride = groups.x * 256u;
  for (var i = id.x; i < params.count; i += stride) {
    let at = params.first + i;
    let slot = at / params.cols / params.groupSize * params.cols + at % params.cols;
    let x = w[at];
    let value = snap(x, vec2<f32>(scales[slot], zeros[slot]), params.levels) * scales[slot];
    if (params.difference != 0u) { values[i] = value - x; } else { values[i] = value; }
  }
}`,
});

/**
 * Straight-through gradient of fake quantization, in place on g = ∂L/∂Q: it passes as it is, and the scale (max − min) /
 * levels hands its own gradient Σ g·((code − zero) − y/scale) to the first largest and first smallest element. A group
 * without a usable range has none. Workgroups: (columns / 16, groups).
 */
export const quantizerGradientKernel = defineKernel({
  name: 'quantizerGradient',
  buffers: { y: read('f32'), scales: read('f32'), zeros: read('f32'), g: write('f32') },
  params: { cols: 'u32', groupSize: 'u32', levels: 'f32' },
  body: /* wgsl */ `${GRID_ARITHMETIC}
struct Part { lo: f32, hi: f32, argmin: u32, argmax: u32, sum: f32 }
var<workgroup> parts: array<Part, 256>;
@compute @workgroup_size(256)
fn main(@builtin(workgroup_id) id: vec3<u32>, @builtin(local_invocation_index) local: u32) {
  let lane = local / 16u;
  let col = id.x * 16u + local % 16u;
  let slot = id.y * params.cols + col;
  let first = id.y * params.groupSize;
  var part = Part(${GREATEST}, -${GREATEST}, first, first, 0.0);
  if (col < params.cols) {
    let grid = vec2<f32>(scales[slot], zeros[slot]);
    for (var row = first + lane; row < first + params.groupSize; row += 16u) {
      let x = y[row * params.cols + col];
      if (x < part.lo) { part.lo = x; part.argmin = row; }
      if (x > part.hi) { part.hi = x; part.argmax = row; }
      part.sum = fma(g[row * params.cols + col], snap(x, grid, params.levels) - quotient(x, grid.x), part.sum);
    }
  }
  parts[local] = part;
  workgroupBarrier();
  if (lane != 0u || col >= params.cols) { return; }
  for (var n = 1u; n < 16u; n++) {
    let other = parts[n * 16u + local];
    // Lanes hold every sixteenth row: of equal extremes the first row counts.
    if (other.lo < part.lo || (other.lo == part.lo && other.argmin < part.argmin)) {
      part.lo = other.lo;
      part.argmin = other.argmin;
    }
    if (other.hi > part.hi || (other.hi == part.hi && other.argmax < part.argmax)) {
      part.hi = other.hi;
      part.argmax = other.argmax;
    }
    part.sum += other.sum;
  }
  if (rangeScale(part.lo, part.hi, params.levels) < MIN_SCALE) { return; }
  let share = part.sum / params.levels;
  g[part.argmax * params.cols + col] += share;
  g[part.argmin * params.cols + col] -= share;
}`,
});

/** Codes of values on their grids, four to a word, from word `out0` of out. */
export const packCodesKernel = defineKernel({
  name: 'packCodes',
  buffers: { values: read('f32'), scales: read('f32'), zeros: read('f32'), out: write('u32') },
  params: { count: 'u32', cols: 'u32', groupSize: 'u32' },
  body: /* wgsl */ `
@compute @workgroup_size(256)
fn main(@builtin(global_invocation_id) id: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>) {
  let stride = groups.x * 256u;
  let words = (params.count + 3u) / 4u;
  for (var word = id.x; word < words; word += stride) {
    var packed = 0u;
    for (var n = 0u; n < 4u; n++) {
      let i = word * 4u + n;
      if (i < params.count) {
        let slot = i / params.cols / params.groupSize * params.cols + i % params.cols;
        packed |= u32(round(values[i] / scales[slot]) + zeros[slot]) << (8u * n);
      }
    }
    out[word] = packed;
  }
}`,
});

/** Integers held as f32, four to a word, from word `out0` of out. */
export const packBytesKernel = defineKernel({
  name: 'packBytes',
  buffers: { x: read('f32'), out: write('u32') },
  params: { count: 'u32', out0: 'u32' },
  body: /* wgsl */ `
@compute @workgroup_size(256)
fn main(@builtin(global_invocation_id) id: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>) {
  let stride = groups.x * 256u;
  let words = (params.count + 3u) / 4u;
  for (var word = id.x; word < words; word += stride) {
    var packed = 0u;
    for (var n = 0u; n < 4u; n++) {
      let i = word * 4u + n;
      if (i < params.count) { packed |= u32(x[i]) << (8u * n); }
    }
    out[params.out0 + word] = packed;
  }
}`,
});

/**
 * Keeps the ratio of least error: error of (group, column) = Σ over its rows of d·p, with d = ŵ − w and p = H_gg·d. The
 * first ratio starts the search. d and p hold the groups from `group0` on. Threads: (columns, groups).
 */
export const keepBestKernel = defineKernel({
  name: 'keepBestClip',
  buffers: { d: read('f32'), p: read('f32'), errors: write('f32'), best: write('f32') },
  params: { cols: 'u32', groupSize: 'u32', group0: 'u32', ratio: 'f32', start: 'u32' },
  body: /* wgsl */ `
@compute @workgroup_size(64)
fn main(@builtin(global_invocation_id) id: vec3<u32>) {
  let col = id.x;
  if (col >= params.cols) { return; }
  var error = 0.0;
  let first = id.y * params.groupSize;
  for (var row = first; row < first + params.groupSize; row++) {
    error = fma(d[row * params.cols + col], p[row * params.cols + col], error);
  }
  let slot = (params.group0 + id.y) * params.cols + col;
  if (params.start != 0u || error < errors[slot]) {
    errors[slot] = error;
    best[slot] = params.ratio;
  }
}`,
});
