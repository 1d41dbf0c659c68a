// f16 values packed two to a word, without the shader-f16 extension: unpack2x16float decodes, and this encodes.

/**
 * WGSL: f32 → f16 bits, to nearest even, saturating at ±65504. `pack2x16float` may round either way and leaves overflow
 * undefined; this is the same on every GPU. Below 2^-14 the sum with 0.5 aligns the significand so that the addition itself
 * rounds to a subnormal.
 */
export const HALF_BITS = /* wgsl */ `
fn halfBits(value: f32) -> u32 {
  let bits = bitcast<u32>(value);
  let magnitude = bits & 0x7fffffffu;
  let small = bitcast<u32>(bitcast<f32>(magnitude) + 0.5) - 0x3f000000u;
  let normal = (magnitude + 0xc8000fffu + ((magnitude >> 13u) & 1u)) >> 13u;
  let half = select(min(normal, 0x7bffu), small, magnitude < 0x38800000u);
  return ((bits >> 16u) & 0x8000u) | select(half, 0x7bffu, magnitude >= 0x47800000u);
}
fn packHalves(a: f32, b: f32) -> u32 { return halfBits(a) | (halfBits(b) << 16u); }
`;
