// The transform on many rows of activations: x [rows, channels] f16 → scale + K rotations, f16.
//
// Bytes: 2 in, 2 out per element. A workgroup of 32 lanes takes one group of channels of 64 rows into workgroup memory, two rows
// packed to a word: lane l owns rows 2l and 2l+1, so that any pair of channels is two words of the lane's own column, without
// bank conflicts and without a barrier between rotations. Words are swizzled (xor) so that filling and emptying along
// rows has no conflicts either. Workgroup memory moves 16 words per channel and row pair (8 rotations, in and out).
import { defineKernel, read, variants, write, type Kernel } from '../kernel.js';
import type { PairwiseTransform } from '../../../ops/backend.js';
import { f32ToF16Bits } from '../../../core/dtype.js';

/** A variant of {@link rotateRowsKernel}. */
export interface RotateRowsVariant {
  readonly f16: boolean;
  readonly krot: number;
  /** 32, 64 or 128. */
  readonly groupSize: number;
}

const LANES = 32;
/** Rows of a workgroup. */
export const ROTATE_ROWS = 64;

type Buffers = 'x' | 'scale' | 'table' | 'y';

/**
 * Workgroups: groups of channels, blocks of 64 rows. Buffers: x, y [rows, channels/8] of 8 f16; scale [channels/2] pairs of
 * f16; table [groups, krot, group/2] of the words of i and j and (cos, sin) as f16, see {@link pairTable}.
 */
export const rotateRowsKernel = variants((v: RotateRowsVariant): Kernel<Buffers, 'rows' | 'channels'> => {
  const { groupSize, krot } = v;
  // Pairs in flight per lane.
  const unroll = 8;
  const each = (n: number, f: (i: number) => string): string => Array.from({ length: n }, (_, i) => f(i)).join('\n');
  const vectors = groupSize / 8;
  const h2 = v.f16 ? 'vec2<f16>' : 'vec2<f32>';
  const un = (w: string): string => (v.f16 ? `bitcast<vec2<f16>>(${w})` : `unpack2x16float(${w})`);
  const pack = (w: string): string => (v.f16 ? `bitcast<u32>(${w})` : `pack2x16float(${w})`);
  return defineKernel({
    name: `rotateRows.${v.f16 ? 'f16' : 'f32'}.k${krot}.g${groupSize}`,
    features: v.f16 ? ['f16'] : [],
    buffers: { x: read('vec4<u32>'), scale: read('u32'), table: read('vec2<u32>'), y: write('vec4<u32>') },
    params: { rows: 'u32', channels: 'u32' },
    body: /* wgsl */ `
alias h2 = ${h2};
var<workgroup> tile: array<u32, ${groupSize * LANES}>;
// Where a channel's column begins, with its swizzle: the word of a lane is this xor the lane.
fn home(channel: u32) -> u32 { return (channel * ${LANES}u) | (((channel >> 3u) * 2u) & 31u); }

@compute @workgroup_size(${LANES})
fn main(@builtin(workgroup_id) wg: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
  let words = params.channels / 8u;
  let column = wg.x * ${vectors}u + lane % ${vectors}u;
  let first = wg.y * ${ROTATE_ROWS}u;
  let channel = (lane % ${vectors}u) * 8u;
${each(4, (i) => `  let s${i} = ${un(`scale[wg.x * ${groupSize / 2}u + channel / 2u + ${i}u]`)};`)}
  for (var pair = lane / ${vectors}u; pair < ${LANES}u; pair += ${LANES / vectors}u) {
    let row = first + 2u * pair;
    var a = vec4<u32>(); var b = vec4<u32>();
    if (row < params.rows) { a = x[row * words + column]; }
    if (row + 1u < params.rows) { b = x[(row + 1u) * words + column]; }
${each(
  4,
  (i) => `    { let p = ${un(`a[${i}]`)} * s${i}; let q = ${un(`b[${i}]`)} * s${i};
      tile[home(channel + ${2 * i}u) ^ pair] = ${pack('h2(p.x, q.x)')};
      tile[home(channel + ${2 * i + 1}u) ^ pair] = ${pack('h2(p.y, q.y)')}; }`,
)}
  }
  workgroupBarrier();
  let base = wg.x * ${(krot * groupSize) / 2}u;
  for (var p = 0u; p < ${(krot * groupSize) / 2}u; p += ${unroll}u) {
${each(unroll, (u) => `    let e${u} = table[base + p + ${u}u]; let i${u} = (e${u}.x & 0xffffu) ^ lane; let j${u} = (e${u}.x >> 16u) ^ lane;`)}
${each(unroll, (u) => `    let a${u} = ${un(`tile[i${u}]`)}; let b${u} = ${un(`tile[j${u}]`)};`)}
${each(unroll, (u) => `    { let cs = ${un(`e${u}.y`)}; tile[i${u}] = ${pack(`fma(a${u}, h2(cs.x), b${u} * h2(cs.y))`)}; tile[j${u}] = ${pack(`fma(b${u}, h2(cs.x), -(a${u} * h2(cs.y)))`)}; }`)}
  }
  workgroupBarrier();
  for (var pair = lane / ${vectors}u; pair < ${LANES}u; pair += ${LANES / vectors}u) {
    let row = first + 2u * pair;
    var a: vec4<u32>; var b: vec4<u32>;
${each(
  4,
  (i) => `    { let p = tile[home(channel + ${2 * i}u) ^ pair]; let q = tile[home(channel + ${2 * i + 1}u) ^ pair];
      a[${i}] = (p & 0xffffu) | (q << 16u); b[${i}] = (p >> 16u) | (q & 0xffff0000u); }`,
)}
    if (row < params.rows) { y[row * words + column] = a; }
    if (row + 1u < params.rows) { y[(row + 1u) * words + column] = b; }
  }
}`,
  });
});

/** Whether the kernel takes a transform. */
export const rotateRowsTakes = (groupSize: number, krot: number): boolean =>
  krot > 0 && (groupSize === 32 || groupSize === 64 || groupSize === 128);

/** Where a channel's column begins in workgroup memory; see the kernel. */
const home = (channel: number): number => (channel * LANES) | (((channel >> 3) * 2) & 31);

/** [groups, krot, group/2] entries of (home of i | home of j << 16, cos and sin as f16). */
export function pairTable(transform: PairwiseTransform): Uint32Array<ArrayBuffer> {
  const { channels, groupSize, krot, pairs, theta } = transform;
  const half = groupSize / 2;
  const table = new Uint32Array(krot * channels);
  for (let g = 0; g < channels / groupSize; g++)
    for (let k = 0; k < krot; k++)
      for (let p = 0; p < half; p++) {
        const at = 2 * ((g * krot + k) * half + p);
        const source = k * channels + g * groupSize + 2 * p;
        const angle = theta[source / 2];
        table[at] = (home(pairs[source]) | (home(pairs[source + 1]) << 16)) >>> 0;
        table[at + 1] = (f32ToF16Bits(Math.cos(angle)) | (f32ToF16Bits(Math.sin(angle)) << 16)) >>> 0;
      }
  return table;
}
