// The softmax between the products of attention, and its gradient; see attention-products.ts. Bytes moved: scores twice
// (the second time from cache) and back once.
import { defineKernel, write, type Kernel } from '../kernel.js';
import { LINEAR_GROUP } from '../tensor.js';

const params = { rows: 'u32', tokens: 'u32', window: 'u32', tile: 'u32' } as const;

/**
 * Per row: scores s (scaled) become p = softmax over the keys that are seen, in place. Keys that are not seen get zeros as
 * far as products read them: to the end of the tile that holds the diagonal. One workgroup per (head, token) of `rows`;
 * s [heads, tokens, tokens].
 */
export const softmaxKernel: Kernel<'s', keyof typeof params> = defineKernel({
  name: 'softmax',
  buffers: { s: write('f32') },
  params,
  body: body(false),
});

/** The same, and beside it ∂p become ∂s = p·(∂p − Σ p·∂p)·scale. */
export const softmaxGradientKernel = defineKernel({
  name: 'softmaxGradient',
  buffers: { s: write('f32'), dp: write('f32') },
  params: { ...params, scale: 'f32' },
  body: body(true),
});

function body(gradient: boolean): string {
  return /* wgsl */ `${LINEAR_GROUP}
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
    sum += vec2(e, ${gradient ? 'e * dp[base + j]' : '0.0'});
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
    let seen = j >= first && j <= token;
    var p = 0.0;
    if (seen) { p = exp(s[base + j] - top) / total; }
    s[base + j] = p;
${gradient ? '    if (seen) { dp[base + j] = p * (dp[base + j] - mean) * params.scale; } else { dp[base + j] = 0.0; }' : ''}
  }
}`;
}
