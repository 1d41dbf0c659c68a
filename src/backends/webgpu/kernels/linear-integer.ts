// Products of integer codes: y = (Σ_groups s_w · Σ (q − z)·a) · s_a + bias + residual. Codes are signed bytes, four to a word,
// multiplied and added exactly by dot4I8Packed (a language feature of WGSL that needs no extension; one instruction on GPUs that
// have it). A workgroup of 256 threads makes a tile of 64 rows × 64 outputs, 4 × 4 to a thread, 32 channels at a time
// through workgroup memory, 4-bit codes widened to bytes less their zero point on the way there. Bytes moved: activations
// n·k per 64 outputs, the weight once per 64 rows.
import { defineKernel, read, variants, write } from '../kernel.js';

/** Rows and outputs of a tile. */
export const INTEGER_TILE = 64;
/** Words of four channels that a step takes. */
const STEP = 8;

/** Bits of the weights' codes. */
export type IntegerBits = 4 | 8;

/** Words in a row of encoded activations: groups of 32 channels are whole steps. */
export const integerWords = (inFeatures: number): number => inFeatures / 4;

/**
 * Groups are whole steps. `weights` as in weights.ts; `codes` [rows, words], `scales` [rows] (scale, sum) of the activations, in the
 * order that encodeRowsKernel gives for these weights.
 */
export const integerGemmKernel = variants((bits: IntegerBits) =>
  defineKernel({
    name: `integerGemm.int${bits}`,
    buffers: {
      codes: read('u32'),
      scales: read('vec2<f32>'),
      weights: read('u32'),
      grids: read('u32'),
      bias: read('f32'),
      residual: read('f32'),
      out: write('f32'),
    },
    params: {
      rows: 'u32',
      outFeatures: 'u32',
      words: 'u32',
      groupWords: 'u32',
      groupsPerRow: 'u32',
      hasBias: 'u32',
      hasResidual: 'u32',
    },
    body: /* wgsl */ `
// Tiles [word][row], padded so that a row's words lie in different banks.
const STRIDE = 65u;
var<workgroup> left: array<u32, ${STEP * 65}>;
var<workgroup> right: array<u32, ${STEP * 65}>;
var<workgroup> factors: array<f32, 64>;
// Bytes less the zero point: no byte borrows from its neighbour while the top bits are set.
fn less(bytes: u32, zero: u32) -> u32 { return ((bytes | 0x80808080u) - zero * 0x01010101u) ^ 0x80808080u; }
@compute @workgroup_size(256)
fn main(@builtin(local_invocation_index) lid: u32, @builtin(workgroup_id) group: vec3<u32>) {
  let row = group.y * 64u;
  let output = group.x * 64u;
  let mine = lid / 16u;
  let column = lid % 16u;
  var acc: array<vec4<f32>, 4>;
  var sums: array<vec4<i32>, 4>;
  for (var w0 = 0u; w0 < params.words; w0 += ${STEP}u) {
    let g = w0 / params.groupWords;
    for (var i = lid; i < ${64 * STEP}u; i += 256u) {
      let r = min(row + i / ${STEP}u, params.rows - 1u);
      left[(i % ${STEP}u) * STRIDE + i / ${STEP}u] = codes[r * params.words + w0 + i % ${STEP}u];
    }
${
  bits === 4
    ? `    {
      let o = min(output + lid / 4u, params.outFeatures - 1u);
      let at = lid % 4u;
      let word = weights[o * (params.words / 2u) + w0 / 2u + at];
      let zero = grids[o * params.groupsPerRow + g] >> 16u;
      right[2u * at * STRIDE + lid / 4u] = less(word & 0x0f0f0f0fu, zero);
      right[(2u * at + 1u) * STRIDE + lid / 4u] = less((word >> 4u) & 0x0f0f0f0fu, zero);
    }`
    : `    for (var i = lid; i < ${64 * STEP}u; i += 256u) {
      let o = min(output + i / ${STEP}u, params.outFeatures - 1u);
      right[(i % ${STEP}u) * STRIDE + i / ${STEP}u] = weights[o * params.words + w0 + i % ${STEP}u] ^ 0x80808080u;
    }`
}
    if (lid < 64u && w0 % params.groupWords == 0u) {
      let o = min(output + lid, params.outFeatures - 1u);
      factors[lid] = unpack2x16float(grids[o * params.groupsPerRow + g]).x;
    }
    workgroupBarrier();
    for (var w = 0u; w < ${STEP}u; w++) {
      let at = w * STRIDE;
      let a = vec4(left[at + mine * 4u], left[at + mine * 4u + 1u], left[at + mine * 4u + 2u], left[at + mine * 4u + 3u]);
      let b = vec4(right[at + column * 4u], right[at + column * 4u + 1u], right[at + column * 4u + 2u], right[at + column * 4u + 3u]);
      for (var i = 0u; i < 4u; i++) {
        sums[i] += vec4(dot4I8Packed(a[i], b.x), dot4I8Packed(a[i], b.y), dot4I8Packed(a[i], b.z), dot4I8Packed(a[i], b.w));
      }
    }
    if ((w0 + ${STEP}u) % params.groupWords == 0u) {
      let factor = vec4(factors[column * 4u], factors[column * 4u + 1u], factors[column * 4u + 2u], factors[column * 4u + 3u]);
      for (var i = 0u; i < 4u; i++) {
        acc[i] = fma(vec4<f32>(sums[i]), factor, acc[i]);
        sums[i] = vec4<i32>();
      }
    }
    workgroupBarrier();
  }
  for (var i = 0u; i < 4u; i++) {
    let r = row + mine * 4u + i;
    if (r < params.rows) {
      let scale = scales[r].x;
      for (var j = 0u; j < 4u; j++) {
        let o = output + column * 4u + j;
        if (o < params.outFeatures) {
          var y = acc[i][j] * scale;
          if (params.hasBias != 0u) { y += bias[o]; }
          if (params.hasResidual != 0u) { y += residual[r * params.outFeatures + o]; }
          out[r * params.outFeatures + o] = y;
        }
      }
    }
  }
}`,
  }),
);
