// Operands of products on matrix units, from f32 matrices: f16, rows along the inner dimension, scaled by a power of two so that
// gradients of 1e-9 keep their bits. Bytes moved: 4 per element for the largest value, 4 and 2 to round.
import { defineKernel, read, variants, write } from '../kernel.js';

/** Partial maxima of {@link largestKernel}. */
export const LARGEST_PARTS = 256;

/** The largest magnitude that each of 256 workgroups sees. */
export const largestKernel = defineKernel({
  name: 'largest',
  buffers: { x: read('f32'), parts: write('f32') },
  params: { count: 'u32' },
  body: /* wgsl */ `
var<workgroup> peaks: array<f32, 256>;
@compute @workgroup_size(256)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) local: u32) {
  var peak = 0.0;
  for (var i = group.x * 256u + local; i < params.count; i += ${LARGEST_PARTS * 256}u) { peak = max(peak, abs(x[i])); }
  peaks[local] = peak;
  for (var reach = 128u; reach > 0u; reach >>= 1u) {
    workgroupBarrier();
    if (local < reach) { peaks[local] = max(peaks[local], peaks[local + reach]); }
  }
  if (local == 0u) { parts[group.x] = peaks[0]; }
}`,
});

/** WGSL: 2^e that brings the largest of `parts` into [2^13, 2^14); workgroup 0 leaves its inverse in `factors`. */
const SCALE = /* wgsl */ `
var<workgroup> peaks: array<f32, 256>;
fn scaleOf(local: u32, leaves: bool) -> f32 {
  peaks[local] = parts[local];
  for (var reach = 128u; reach > 0u; reach >>= 1u) {
    workgroupBarrier();
    if (local < reach) { peaks[local] = max(peaks[local], peaks[local + reach]); }
  }
  workgroupBarrier();
  // The biased exponent; NaN and infinity stay what they are at any scale.
  let exponent = clamp(i32(bitcast<u32>(peaks[0]) >> 23u), 14, 253);
  let shift = clamp(267 - exponent, 1, 253);
  if (leaves && local == 0u) { factors[params.slot] = bitcast<f32>(u32(254 - shift) << 23u); }
  return bitcast<f32>(u32(shift) << 23u);
}`;

/** x [rows, cols] → [rows, cols] in f16; `count` fours. */
export const packRowsKernel = defineKernel({
  name: 'packRows',
  features: ['f16'],
  buffers: { x: read('vec4<f32>'), parts: read('f32'), factors: write('f32'), out: write('vec2<u32>') },
  params: { count: 'u32', slot: 'u32' },
  body: /* wgsl */ `${SCALE}
@compute @workgroup_size(256)
fn main(
  @builtin(workgroup_id) group: vec3<u32>,
  @builtin(num_workgroups) groups: vec3<u32>,
  @builtin(local_invocation_index) local: u32,
) {
  let scale = scaleOf(local, group.x == 0u);
  let stride = groups.x * 256u;
  for (var i = group.x * 256u + local; i < params.count; i += stride) {
    let v = x[i] * scale;
    out[i] = vec2(bitcast<u32>(vec2<f16>(v.xy)), bitcast<u32>(vec2<f16>(v.zw)));
  }
}`,
});

/**
 * x [rows, cols] → [cols, rows] in f16, two to a word; rows are even. Tiles of 64 rows × 32 columns through workgroup memory;
 * each workgroup takes every `workgroups`-th, so that the scale is found seldom.
 */
export const packColumnsKernel = variants(() =>
  defineKernel({
    name: 'packColumns',
    features: ['f16'],
    buffers: { x: read('f32'), parts: read('f32'), factors: write('f32'), out: write('u32') },
    params: { rows: 'u32', cols: 'u32', tiles: 'u32', slot: 'u32' },
    body: /* wgsl */ `${SCALE}
var<workgroup> tile: array<f32, ${64 * 33}>;
@compute @workgroup_size(256)
fn main(
  @builtin(workgroup_id) group: vec3<u32>,
  @builtin(num_workgroups) groups: vec3<u32>,
  @builtin(local_invocation_index) local: u32,
) {
  let scale = scaleOf(local, group.x == 0u);
  let across = (params.cols + 31u) / 32u;
  for (var t = group.x; t < params.tiles; t += groups.x) {
    let row0 = t / across * 64u;
    let col0 = t % across * 32u;
    workgroupBarrier();
    for (var n = local; n < 2048u; n += 256u) {
      let r = n / 32u;
      let c = n % 32u;
      if (row0 + r < params.rows && col0 + c < params.cols) {
        tile[r * 33u + c] = x[(row0 + r) * params.cols + col0 + c] * scale;
      }
    }
    workgroupBarrier();
    for (var n = local; n < 1024u; n += 256u) {
      let c = n / 32u;
      let r = n % 32u * 2u;
      if (row0 + r < params.rows && col0 + c < params.cols) {
        let pair = vec2(tile[r * 33u + c], tile[(r + 1u) * 33u + c]);
        out[((col0 + c) * params.rows + row0 + r) / 2u] = bitcast<u32>(vec2<f16>(pair));
      }
    }
  }
}`,
  }),
);
