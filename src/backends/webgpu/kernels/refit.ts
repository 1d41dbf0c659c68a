// Fitting a group's grid scales to its codes, on channel-major weights [channels, cols]. Bytes moved: the group's rows of
// three matrices once for the scales; residual and product once for what the move does to later rows.
import { defineKernel, read, write } from '../kernel.js';
import { GRID_ARITHMETIC } from './grid.js';

/**
 * Moves the scales of one group to their optima: with v = Ŵ of the group, R = H·(W − Ŵ) and `product` = H·v (its first rows
 * are the group's), a scale grows by the factor 1 + Σ v·R / Σ v·(H·v), rounded to f16, where that lowers the error. Writes
 * scales, values and the relative moves [cols]. One thread per column.
 */
export const refitScaleKernel = defineKernel({
  name: 'refitScale',
  buffers: {
    residual: read('f32'),
    product: read('f32'),
    scales: write('f32'),
    values: write('f32'),
    moves: write('f32'),
  },
  params: { cols: 'u32', begin: 'u32', groupSize: 'u32' },
  body: /* wgsl */ `${GRID_ARITHMETIC}
@compute @workgroup_size(64)
fn main(@builtin(global_invocation_id) id: vec3<u32>) {
  let col = id.x;
  if (col >= params.cols) { return; }
  let slot = params.begin / params.groupSize * params.cols + col;
  let scale = scales[slot];
  var numerator = 0.0;
  var denominator = 0.0;
  for (var i = 0u; i < params.groupSize; i++) {
    let at = (params.begin + i) * params.cols + col;
    numerator = fma(values[at], residual[at], numerator);
    denominator = fma(values[at], product[i * params.cols + col], denominator);
  }
  var moved = scale;
  if (denominator > 0.0) {
    let wanted = roundF16(fma(scale, quotient(numerator, denominator), scale));
    let relative = quotient(wanted - scale, scale);
    let inside = wanted >= max(0.5 * scale, MIN_SCALE) && wanted <= min(2.0 * scale, MAX_SCALE);
    if (inside && relative * fma(denominator, relative, -2.0 * numerator) < 0.0) { moved = wanted; }
  }
  scales[slot] = moved;
  moves[col] = quotient(moved - scale, scale);
  for (var i = 0u; i < params.groupSize; i++) {
    let at = (params.begin + i) * params.cols + col;
    values[at] = round(quotient(values[at], scale)) * moved;
  }
}`,
});

/** residual −= product · moves per column, for `count` elements from `first` of the residual and `skip` of the product on. */
export const refitSpreadKernel = defineKernel({
  name: 'refitSpread',
  buffers: { product: read('f32'), moves: read('f32'), residual: write('f32') },
  params: { count: 'u32', cols: 'u32', first: 'u32', skip: 'u32' },
  body: /* wgsl */ `
@compute @workgroup_size(256)
fn main(@builtin(global_invocation_id) id: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>) {
  let stride = groups.x * 256u;
  for (var i = id.x; i < params.count; i += stride) {
    let at = params.first + i;
    residual[at] = fma(-product[params.skip + i], moves[i % params.cols], residual[at]);
  }
}`,
});
