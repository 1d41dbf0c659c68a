// The softmax between the two halves of attention's gradient; the rest of it is matrix products (see attention-gradient.ts).
import { defineKernel, write } from '../kernel.js';
import { LINEAR_GROUP } from '../tensor.js';

/**
 * Per row: scores s (scaled) become p = softmax over the keys that are seen, and ∂p become ∂s = p·(∂p − Σ p·∂p)·scale, both
 * in place. Keys that are not seen get zeros as far as products read them: to the end of the tile that holds the
 * diagonal. One workgroup per (head, token) of `rows`; s, dp [heads, tokens, tokens].
 */
export const softmaxGradientKernel = defineKernel({
  name: 'softmaxGradient',
  buffers: { s: write('f32'), dp: write('f32') },
  params: { rows: 'u32', tokens: 'u32', window: 'u32', tile: 'u32', scale: 'f32' },
  body: /* wgsl */ `${LINEAR_GROUP}
var<workgroup> shared2: array<vec2<f32>, 256>;
@compute @workgroup_size(256)
fn main(
  @builtin(local_invocation_index) lid: u32,
  @builtin(workgroup_id) group: vec3<u32>,
  @builtin(num_workgroups) groups: vec3<u32>,
) {
  // Spare workgroups repeat no row: these are changed in place.
  let index = linearGroup(group, groups);
  if (index >= params.rows) { return; }
  let token = index % params.tokens;
  let base = index * params.tokens;
  let first = token + 1u - min(params.window, token + 1u);
  let end = min(params.tokens, (token / params.tile + 1u) * params.tile);
  var top = -3.4e38;
  for (var j = first + lid; j <= token; j += 256u) { top = max(top, s[base + j]); }
  shared2[lid] = vec2(top, 0.0);
  for (var reach = 128u; reach > 0u; reach >>= 1u) {
    workgroupBarrier();
    if (lid < reach) { shared2[lid] = max(shared2[lid], shared2[lid + reach]); }
  }
  workgroupBarrier();
  top = shared2[0].x;
  workgroupBarrier();
  var sum = vec2<f32>();
  for (var j = first + lid; j <= token; j += 256u) {
    let e = exp(s[base + j] - top);
    sum += vec2(e, e * dp[base + j]);
  }
  shared2[lid] = sum;
  for (var reach = 128u; reach > 0u; reach >>= 1u) {
    workgroupBarrier();
    if (lid < reach) { shared2[lid] += shared2[lid + reach]; }
  }
  workgroupBarrier();
  let total = shared2[0].x;
  let mean = shared2[0].y / total;
  for (var j = lid; j < end; j += 256u) {
    var p = 0.0;
    var ds = 0.0;
    if (j >= first && j <= token) {
      p = exp(s[base + j] - top) / total;
      ds = p * (dp[base + j] - mean) * params.scale;
    }
    s[base + j] = p;
    dp[base + j] = ds;
  }
}`,
});
