// Products with resident weights: y = x · Wᵀ + bias + residual, f32 accumulation.
//
// gemv: up to 8 rows of x. A workgroup of 64 threads makes 4 outputs of every row: neighbouring threads read neighbouring
// words of a weight row, each word is decoded once for all rows of x, each x once for 4 outputs, and the 64 partial sums
// meet at the end. Bytes moved: the weight and its grids once, x from cache.
//
// gemm: more rows. A workgroup of 256 threads makes a tile of 64 rows × 64 outputs, 4 × 4 to a thread, 16 channels at a
// time through workgroup memory, weights decoded on the way there. Bytes moved: the weight once per 64 rows of x.
import type { BufferSlice } from '../device.js';
import { defineKernel, read, variants, write, type Kernel } from '../kernel.js';
import { LINEAR_GROUP } from '../tensor.js';
import { sumOverWorkgroup } from './reduce.js';
import { decodeElement, formatName, perWord, weightAt, type WeightFormat } from './weights.js';

/** Rows of x the gemv takes. */
export const MAX_GEMV_ROWS = 8;
/** Outputs a gemv workgroup makes. */
export const GEMV_OUTPUTS = 4;
/** Rows and outputs of a gemm tile. */
export const GEMM_TILE = 64;

const buffers = {
  x: read('f32'),
  weights: read('u32'),
  grids: read('u32'),
  bias: read('f32'),
  residual: read('f32'),
  out: write('f32'),
} as const;
const params = {
  rows: 'u32',
  inFeatures: 'u32',
  outFeatures: 'u32',
  wordsPerRow: 'u32',
  groupsPerRow: 'u32',
  groupSize: 'u32',
  hasBias: 'u32',
  hasResidual: 'u32',
} as const;

/** What a product reads and writes. */
export type ProductBuffers = Readonly<Record<keyof typeof buffers, GPUBuffer | BufferSlice>>;

/** Kernels of products share bindings and parameters; absent bias, residual or grids are bound to anything. */
export type ProductKernel = Kernel<keyof typeof buffers, keyof typeof params>;

/** WGSL: `finish(sum, output, at)` adds bias and residual and stores. */
const FINISH = /* wgsl */ `
fn finish(sum: f32, output: u32, at: u32) {
  var y = sum;
  if (params.hasBias != 0u) { y += bias[output]; }
  if (params.hasResidual != 0u) { y += residual[at]; }
  out[at] = y;
}`;

/** Options of {@link gemvKernel}. */
export interface GemvVariant {
  readonly format: WeightFormat;
  /** Rows of x, at most; fewer are padded by repeating the last. */
  readonly rows: number;
  /** Rows are whole chunks of {@link gemvChunk} channels, so that x is read four at a time. */
  readonly aligned: boolean;
  /** The elements of a word are all of one group. */
  readonly oneGroup: boolean;
  readonly subgroups: boolean;
}

/** Channels a thread of an aligned gemv takes at once: whole words and whole vectors of x. */
export function gemvChunk(format: WeightFormat): number {
  const per = perWord(format);
  return per % 4 === 0 || per > 4 ? per : 4;
}

/** Whether the aligned gemv fits a weight of `inFeatures` channels. */
export function isGemvAligned(format: WeightFormat, inFeatures: number): boolean {
  const chunk = gemvChunk(format);
  return chunk % 4 === 0 && inFeatures % chunk === 0;
}

/** See the head of this file. */
export const gemvKernel = variants((variant: GemvVariant): ProductKernel => {
  const { format, rows, aligned, oneGroup, subgroups } = variant;
  const per = perWord(format);
  const elements = aligned ? gemvChunk(format) : per;
  const words = elements / per;
  const range = (n: number): number[] => Array.from({ length: n }, (_, i) => i);
  const sums = range(GEMV_OUTPUTS).flatMap((o) => range(rows).map((r) => `acc${o}_${r}`));
  const sum = sumOverWorkgroup(sums, 64, subgroups);
  const grouped = format.kind === 'int';
  const lines: string[] = [];
  if (grouped && oneGroup) lines.push('let g = k / params.groupSize;');
  for (const o of range(GEMV_OUTPUTS)) {
    for (const w of range(words))
      lines.push(`let w${o}_${w} = weights[row${o} * params.wordsPerRow + c * ${words}u + ${w}u];`);
    if (grouped && oneGroup) lines.push(`let g${o} = grids[row${o} * params.groupsPerRow + g];`);
  }
  for (const e of range(elements)) {
    if (aligned && e % 4 === 0)
      for (const r of range(rows)) lines.push(`let x${r}_${e / 4} = x[(at${r} + k) / 4u + ${e / 4}u];`);
    const body: string[] = [];
    if (!aligned) for (const r of range(rows)) body.push(`let v${r} = x[at${r} + k + ${e}u];`);
    if (grouped && !oneGroup) body.push(`let g = (k + ${e}u) / params.groupSize;`);
    for (const o of range(GEMV_OUTPUTS)) {
      if (grouped && !oneGroup) body.push(`let g${o} = grids[row${o} * params.groupsPerRow + g];`);
      body.push(`let d${o} = ${decodeElement(format, `w${o}_${Math.floor(e / per)}`, e % per, `g${o}`)};`);
      for (const r of range(rows)) {
        const value = aligned ? `x${r}_${Math.floor(e / 4)}.${'xyzw'[e % 4]}` : `v${r}`;
        body.push(`acc${o}_${r} = fma(d${o}, ${value}, acc${o}_${r});`);
      }
    }
    // The last word of a row may be padded.
    lines.push(aligned ? `{ ${body.join(' ')} }` : `if (k + ${e}u < params.inFeatures) { ${body.join(' ')} }`);
  }
  return defineKernel({
    name: `gemv.${formatName(format)}.${rows}rows${aligned ? '' : '.unaligned'}${oneGroup ? '' : '.mixed'}${subgroups ? '.subgroups' : ''}`,
    features: subgroups ? ['subgroups'] : [],
    buffers: { ...buffers, x: read(aligned ? 'vec4<f32>' : 'f32') },
    params,
    body: /* wgsl */ `
${LINEAR_GROUP}
${sum.declarations}
${FINISH}
@compute @workgroup_size(64)
fn main(
  @builtin(local_invocation_index) lid: u32,
  @builtin(workgroup_id) group: vec3<u32>,
  @builtin(num_workgroups) groups: vec3<u32>,
  ${sum.builtins}
) {
  let first = linearGroup(group, groups) * ${GEMV_OUTPUTS}u;
  let last = params.outFeatures - 1u;
${range(GEMV_OUTPUTS)
  .map((o) => `  let row${o} = min(first + ${o}u, last);`)
  .join('\n')}
${range(rows)
  .map((r) => `  let at${r} = min(${r}u, params.rows - 1u) * params.inFeatures;`)
  .join('\n')}
${sums.map((name) => `  var ${name} = 0.0;`).join('\n')}
  for (var c = lid; c * ${words}u < params.wordsPerRow; c += 64u) {
    let k = c * ${elements}u;
    ${lines.join('\n    ')}
  }
${sum.statements}
  if (lid < ${sums.length}u) {
    let output = first + lid / ${rows}u;
    let row = lid % ${rows}u;
    if (output < params.outFeatures && row < params.rows) {
      finish(total(lid), output, row * params.outFeatures + output);
    }
  }
}`,
  });
});

/** See the head of this file. Workgroups: outputs / 64 in x, rows / 64 in y. `half`: x is f16, two to a word. */
export const gemmKernel = variants((format: WeightFormat, half: boolean): ProductKernel => {
  return defineKernel({
    name: `gemm.${formatName(format)}${half ? '.half' : ''}`,
    buffers: { ...buffers, x: read(half ? 'u32' : 'f32') },
    params,
    body: /* wgsl */ `
// Tiles [channel][quad of rows], padded by one quad so that a quad's channels lie in different banks.
const STRIDE = 17u;
var<workgroup> left: array<vec4<f32>, 16 * 17>;
var<workgroup> right: array<vec4<f32>, 16 * 17>;
${weightAt(format)}
${FINISH}
fn xAt(row: u32, k: u32) -> f32 {
  if (row >= params.rows || k >= params.inFeatures) { return 0.0; }
  let at = row * params.inFeatures + k;
  ${half ? 'let pair = unpack2x16float(x[at / 2u]); return select(pair.x, pair.y, (at & 1u) == 1u);' : 'return x[at];'}
}
fn wAt(row: u32, k: u32, group: u32) -> f32 {
  if (row >= params.outFeatures || k >= params.inFeatures) { return 0.0; }
  return weightAt(row, k, group);
}
@compute @workgroup_size(256)
fn main(@builtin(local_invocation_index) lid: u32, @builtin(workgroup_id) group: vec3<u32>) {
  let channel = lid % 16u;
  let quad = lid / 16u;
  let row = group.y * 64u;
  let output = group.x * 64u;
  var acc: array<vec4<f32>, 4>;
  for (var k0 = 0u; k0 < params.inFeatures; k0 += 16u) {
    let k = k0 + channel;
    let g = k / params.groupSize;
    let r = row + quad * 4u;
    let o = output + quad * 4u;
    left[channel * STRIDE + quad] = vec4(xAt(r, k), xAt(r + 1u, k), xAt(r + 2u, k), xAt(r + 3u, k));
    right[channel * STRIDE + quad] = vec4(wAt(o, k, g), wAt(o + 1u, k, g), wAt(o + 2u, k, g), wAt(o + 3u, k, g));
    workgroupBarrier();
    for (var c = 0u; c < 16u; c++) {
      let a = left[c * STRIDE + quad];
      let b = right[c * STRIDE + channel];
      acc[0] += a.x * b;
      acc[1] += a.y * b;
      acc[2] += a.z * b;
      acc[3] += a.w * b;
    }
    workgroupBarrier();
  }
  for (var i = 0u; i < 4u; i++) {
    let r = row + quad * 4u + i;
    for (var j = 0u; j < 4u; j++) {
      let o = output + channel * 4u + j;
      if (r < params.rows && o < params.outFeatures) {
        finish(acc[i][j], o, r * params.outFeatures + o);
      }
    }
  }
}`,
  });
});
