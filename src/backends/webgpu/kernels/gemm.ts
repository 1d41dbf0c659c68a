// Dense f32 products C = α·op(A)·op(B) (+ C), any sizes. A workgroup of 16×16 threads makes a T×T tile of C; each thread
// keeps (T/16)² sums in registers and reads 2·T/16 values from workgroup memory for as many squared multiply-adds, so the
// product is bound by arithmetic for T = 128. Operands pass through workgroup memory k-major, as vec4s along rows and
// columns of C; the next slice is fetched into registers while the present one is multiplied. Bytes moved: A is read
// n/T times, B m/T times (mostly from L2), C written once.
import { defineKernel, read, write, type Kernel } from '../kernel.js';

/** What is compiled into a product. */
export interface GemmVariant {
  readonly transposeA: boolean;
  readonly transposeB: boolean;
  /** Rows and columns of C per workgroup. */
  readonly tile: 64 | 128;
}

export type GemmBuffers = 'a' | 'b' | 'c';
export type GemmParams =
  | 'm'
  | 'n'
  | 'k'
  | 'lda'
  | 'ldb'
  | 'ldc'
  | 'a0'
  | 'b0'
  | 'c0'
  | 'strideA'
  | 'strideB'
  | 'strideC'
  | 'inner'
  | 'shareB'
  | 'outerA'
  | 'outerB'
  | 'outerC'
  | 'triangle'
  | 'kStride'
  | 'kLength'
  | 'firstTile'
  | 'alpha'
  | 'accumulate';

const made = new Map<string, Kernel<GemmBuffers, GemmParams>>();

/** Values of the parameter `triangle`: what of a causal product is skipped, whole tiles at a time. */
export const TRIANGLE = {
  /** Nothing. */
  none: 0,
  /** Tiles of C above the diagonal: they are not written. */
  result: 1,
  /** Columns of A right of the diagonal: zeros as far as tiles reach. */
  lower: 2,
  /** Columns of A left of the diagonal. */
  upper: 3,
} as const;

/**
 * The kernel of a variant; z is a batch index, or with kStride > 0 a slice of k. Batches are two loops, of `inner` inside:
 * operand strides are of the inner loop, of which `shareB` neighbours have the same B, and outer… of the outer one.
 */
export function gemmKernel(variant: GemmVariant): Kernel<GemmBuffers, GemmParams> {
  const name = `gemm.${variant.transposeA ? 't' : 'n'}${variant.transposeB ? 't' : 'n'}.${variant.tile}`;
  let kernel = made.get(name);
  if (!kernel) made.set(name, (kernel = make(name, variant)));
  return kernel;
}

function make(name: string, { transposeA, transposeB, tile }: GemmVariant): Kernel<GemmBuffers, GemmParams> {
  const depth = 1024 / tile; // One vec4 of each operand per thread and slice.
  const quads = tile / 4;
  const pitch = quads + 1; // One vec4 of padding spreads a column over the banks.
  const blocks = tile / 64; // 4×4 blocks of sums per thread and direction.
  const range = (count: number): number[] => Array.from({ length: count }, (_, i) => i);
  /** Four values along C's rows (or columns) at one k. `along`: they are contiguous in memory. */
  const fetch = (fn: string, buffer: string, along: boolean): string => /* wgsl */ `
fn ${fn}(k: u32, at: u32, kEnd: u32, end: u32, base: u32, pitch: u32) -> vec4<f32> {
  var x = vec4<f32>();
  if (k < kEnd) {
    let start = base + ${along ? 'k * pitch + at' : 'at * pitch + k'};
${range(4)
  .map((i) => `    if (at + ${i}u < end) { x[${i}] = ${buffer}[start + ${along ? `${i}u` : `${i}u * pitch`}]; }`)
  .join('\n')}
  }
  return x;
}`;
  // Which (k, quad) of a slice a thread fetches: neighbours along what is contiguous in memory.
  const place = (along: boolean): { k: string; quad: string } =>
    along
      ? { k: `local / ${quads}u`, quad: `local % ${quads}u` }
      : { k: `local % ${depth}u`, quad: `local / ${depth}u` };
  const [placeA, placeB] = [place(transposeA), place(!transposeB)];
  const rows = range(blocks * 4);
  const sums = rows.flatMap((r) => range(blocks).map((q) => ({ r, q, name: `c${r}_${q}` })));
  const multiply = [
    ...range(blocks).map((q) => `    let x${q} = sa[kk * ${pitch}u + ty + ${q * 16}u];`),
    ...range(blocks).map((q) => `    let y${q} = sb[kk * ${pitch}u + tx + ${q * 16}u];`),
    ...sums.map((s) => `    ${s.name} = fma(vec4<f32>(x${Math.floor(s.r / 4)}[${s.r % 4}]), y${s.q}, ${s.name});`),
  ].join('\n');
  return defineKernel({
    name,
    buffers: { a: read('f32'), b: read('f32'), c: write('f32') },
    params: {
      m: 'u32',
      n: 'u32',
      k: 'u32',
      lda: 'u32',
      ldb: 'u32',
      ldc: 'u32',
      a0: 'u32',
      b0: 'u32',
      c0: 'u32',
      strideA: 'u32',
      strideB: 'u32',
      strideC: 'u32',
      inner: 'u32',
      shareB: 'u32',
      outerA: 'u32',
      outerB: 'u32',
      outerC: 'u32',
      triangle: 'u32',
      kStride: 'u32',
      kLength: 'u32',
      firstTile: 'u32',
      alpha: 'f32',
      accumulate: 'u32',
    },
    body: /* wgsl */ `
var<workgroup> sa: array<vec4<f32>, ${depth * pitch}>;
var<workgroup> sb: array<vec4<f32>, ${depth * pitch}>;
${fetch('fetchA', 'a', transposeA)}
${fetch('fetchB', 'b', !transposeB)}

fn put(row: u32, col: u32, at: u32, value: vec4<f32>) {
  if (row >= params.m) { return; }
  let start = at + row * params.ldc + col;
  for (var i = 0u; i < 4u; i++) {
    if (col + i < params.n) {
      let y = params.alpha * value[i];
      if (params.accumulate != 0u) { c[start + i] += y; } else { c[start + i] = y; }
    }
  }
}

@compute @workgroup_size(256)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) local: u32) {
  let tx = local % 16u;
  let ty = local / 16u;
  let row0 = (params.firstTile + group.y) * ${tile}u;
  let col0 = group.x * ${tile}u;
  let outer = group.z / params.inner;
  let rest = group.z % params.inner;
  let baseA = params.a0 + outer * params.outerA + rest * params.strideA;
  let baseB = params.b0 + outer * params.outerB + rest / params.shareB * params.strideB;
  var kBegin = group.z * params.kStride;
  var kEnd = min(params.k, kBegin + params.kLength);
  if (params.triangle == ${TRIANGLE.result}u && col0 >= row0 + ${tile}u) { return; }
  if (params.triangle == ${TRIANGLE.lower}u) { kEnd = min(kEnd, row0 + ${tile}u); }
  if (params.triangle == ${TRIANGLE.upper}u) { kBegin = max(kBegin, row0); }
  let ka = ${placeA.k};
  let qa = ${placeA.quad};
  let kb = ${placeB.k};
  let qb = ${placeB.quad};
${sums.map((s) => `  var ${s.name} = vec4<f32>();`).join('\n')}
  var va = fetchA(kBegin + ka, row0 + qa * 4u, kEnd, params.m, baseA, params.lda);
  var vb = fetchB(kBegin + kb, col0 + qb * 4u, kEnd, params.n, baseB, params.ldb);
  for (var k0 = kBegin; k0 < kEnd; k0 += ${depth}u) {
    workgroupBarrier();
    sa[ka * ${pitch}u + qa] = va;
    sb[kb * ${pitch}u + qb] = vb;
    workgroupBarrier();
    if (k0 + ${depth}u < kEnd) {
      va = fetchA(k0 + ${depth}u + ka, row0 + qa * 4u, kEnd, params.m, baseA, params.lda);
      vb = fetchB(k0 + ${depth}u + kb, col0 + qb * 4u, kEnd, params.n, baseB, params.ldb);
    }
    for (var kk = 0u; kk < ${depth}u; kk++) {
${multiply}
    }
  }
  let at = params.c0 + outer * params.outerC + rest * params.strideC;
${sums
  .map(
    (s) =>
      `  put(row0 + ty * 4u + ${Math.floor(s.r / 4) * 64 + (s.r % 4)}u, col0 + tx * 4u + ${s.q * 64}u, at, ${s.name});`,
  )
  .join('\n')}
}`,
  });
}

/** c = α·Σ slices (+ c): adds the partial products of a split k. `slices` parts of m·n each. */
export const sumSlicesKernel = defineKernel({
  name: 'gemm.sum',
  buffers: { parts: read('f32'), c: write('f32') },
  params: { m: 'u32', n: 'u32', slices: 'u32', c0: 'u32', ldc: 'u32', alpha: 'f32', accumulate: 'u32' },
  body: /* wgsl */ `
@compute @workgroup_size(256)
fn main(@builtin(global_invocation_id) id: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>) {
  let count = params.m * params.n;
  let stride = groups.x * 256u;
  for (var i = id.x; i < count; i += stride) {
    var sum = 0.0;
    for (var s = 0u; s < params.slices; s++) { sum += parts[s * count + i]; }
    let at = params.c0 + i / params.n * params.ldc + i % params.n;
    if (params.accumulate != 0u) { c[at] += params.alpha * sum; } else { c[at] = params.alpha * sum; }
  }
}`,
});
