// WGSL shared by the fast kernels: 16-bit arithmetic where the GPU has it, the same functions in f32 where it doesn't.
// Storage is the same either way (pairs of f16 in a u32), so buffers don't depend on the variant.
import type { KernelFeature } from '../kernel.js';
import { HALF_BITS } from '../kernels/half.js';

/** How a kernel computes. */
export interface Arithmetic {
  /** shader-f16: products of codes and activations in f16, two at a time. */
  readonly f16: boolean;
}

/** Features of {@link halfWgsl}'s code. */
export const halfFeatures = ({ f16 }: Arithmetic): KernelFeature[] => (f16 ? ['f16'] : []);

/**
 * `h`, `h2`: scalar and pair; `unpackH(u32) → h2`, `packH(h2) → u32`; `codes8(u32) → array<h2, 4>`: eight 4-bit codes
 * less 8, in the order of the nibbles' channels 0–7 (nibble order 0 2 4 6 1 3 5 7, see kernels/weights.ts).
 *
 * The f16 variant never converts integers: 0x6400 is 1024 in f16, whose lowest mantissa bits count ones, so
 * `bitcast(code | 0x6400) − 1032` is code − 8, exactly; codes four bits higher count sixteens.
 */
export function halfWgsl({ f16 }: Arithmetic): string {
  return f16
    ? /* wgsl */ `
alias h = f16;
alias h2 = vec2<f16>;
fn unpackH(w: u32) -> h2 { return bitcast<vec2<f16>>(w); }
fn packH(v: h2) -> u32 { return bitcast<u32>(v); }
fn codes8(w: u32) -> array<h2, 4> {
  let v = w >> 8u;
  return array<h2, 4>(
    bitcast<vec2<f16>>((w & 0x000f000fu) | 0x64006400u) - h2(1032h),
    fma(bitcast<vec2<f16>>((w & 0x00f000f0u) | 0x64006400u), h2(0.0625h), h2(-72h)),
    bitcast<vec2<f16>>((v & 0x000f000fu) | 0x64006400u) - h2(1032h),
    fma(bitcast<vec2<f16>>((v & 0x00f000f0u) | 0x64006400u), h2(0.0625h), h2(-72h)),
  );
}`
    : /* wgsl */ `
alias h = f32;
alias h2 = vec2<f32>;
fn unpackH(w: u32) -> h2 { return unpack2x16float(w); }
fn packH(v: h2) -> u32 { return pack2x16float(v); }
fn codes8(w: u32) -> array<h2, 4> {
  return array<h2, 4>(
    h2(vec2(w & 15u, (w >> 16u) & 15u)) - 8.0,
    h2(vec2((w >> 4u) & 15u, (w >> 20u) & 15u)) - 8.0,
    h2(vec2((w >> 8u) & 15u, (w >> 24u) & 15u)) - 8.0,
    h2(vec2((w >> 12u) & 15u, (w >> 28u) & 15u)) - 8.0,
  );
}`;
}

/**
 * WGSL: `narrow(vec2<f32>) → u32`, a pair of f16 rounded to nearest. What exceeds f16's range becomes infinite or NaN rather than
 * its largest value, so that it shows in the logits instead of bending them.
 */
export function narrowWgsl({ f16 }: Arithmetic): string {
  return f16
    ? 'fn narrow(v: vec2<f32>) -> u32 { return bitcast<u32>(vec2<f16>(v)); }'
    : /* wgsl */ `
${HALF_BITS}
fn narrow(v: vec2<f32>) -> u32 {
  let over = select(vec2(0u), vec2(0x7c00u), !(abs(v) < vec2(65520.0)));
  return packHalves(v.x, v.y) | over.x | (over.y << 16u);
}`;
}
