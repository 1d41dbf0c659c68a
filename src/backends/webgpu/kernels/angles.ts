// Angles and scales of transforms that are trained: what `loadTransform` computes on the host, from tensors on the GPU.
import { defineKernel, read, write } from '../kernel.js';

/**
 * turns = (cos θ, sin θ) within about 2·2^-24: WGSL's own functions are only good to 2^-11. The nearest multiple of π/2 is
 * taken off in three parts (Cody and Waite), whose products with it are exact for |θ| up to some hundred; polynomials on
 * [−π/4, π/4] are those of the Cephes library.
 */
export const turnAnglesKernel = defineKernel({
  name: 'turnAngles',
  buffers: { theta: read('f32'), turns: write('vec2<f32>') },
  params: { count: 'u32' },
  body: /* wgsl */ `
@compute @workgroup_size(256)
fn main(@builtin(global_invocation_id) id: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>) {
  let stride = groups.x * 256u;
  for (var i = id.x; i < params.count; i += stride) {
    let x = theta[i];
    let n = round(x * 0.63661977236758134);
    let r = fma(-n, 7.54978995489188216e-8, fma(-n, 4.837512969970703125e-4, fma(-n, 1.5703125, x)));
    let z = r * r;
    let s = fma(z * r, fma(fma(-1.9515295891e-4, z, 8.3321608736e-3), z, -1.6666654611e-1), r);
    let c = fma(z * z, fma(fma(2.443315711809948e-5, z, -1.388731625493765e-3), z, 4.166664568298827e-2), fma(z, -0.5, 1.0));
    switch u32(i32(n) & 3) {
      case 0u: { turns[i] = vec2(c, s); }
      case 1u: { turns[i] = vec2(-s, c); }
      case 2u: { turns[i] = vec2(-c, -s); }
      default: { turns[i] = vec2(s, -c); }
    }
  }
}`,
});

/** out = 1 / x, with a step of Newton on WGSL's division. */
export const reciprocalKernel = defineKernel({
  name: 'reciprocal',
  buffers: { x: read('f32'), out: write('f32') },
  params: { count: 'u32' },
  body: /* wgsl */ `
@compute @workgroup_size(256)
fn main(@builtin(global_invocation_id) id: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>) {
  let stride = groups.x * 256u;
  for (var i = id.x; i < params.count; i += stride) {
    let inverse = 1.0 / x[i];
    out[i] = fma(fma(-x[i], inverse, 1.0), inverse, inverse);
  }
}`,
});
