// int4 matrix–vector products: y[b] = W·x[b] (+ residual), W quantized to 4 bits in groups of 32, 64 or 128.
//
// Bytes: in/2 + 4·in/group per row of W, once; x and y are small. A team of 32 lanes takes `rows` rows of W at a time: each lane
// loads 16 bytes (a chunk of 32 channels) of every row before it computes, so that `rows`·512 bytes are in flight per team,
// and the activations of its chunk, unpacked once, serve all rows. Where W has few rows, `split` teams share each row's
// channels, or the GPU would starve. Activations come normalised per chunk (|x| ≤ 1, see activations.ts) with their factor
// and sum: sums of code·x then fit f16 whatever the model's outliers, and zero points cost one multiplication per chunk.
import { defineKernel, read, write, type Kernel } from '../kernel.js';
import { halfFeatures, halfWgsl, type Arithmetic } from './half.js';

/** Channels a lane takes at a time: 16 bytes of codes. */
export const CHUNK = 32;
const TEAM = 32;

/** A variant of {@link gemvKernel}. */
export interface GemvVariant extends Arithmetic {
  /** Reduce by subgroup shuffles (subgroups of at least 32 lanes), else through workgroup memory. */
  readonly shuffle: boolean;
  /** Rows of W per team. */
  readonly rows: number;
  /** Teams per workgroup. */
  readonly teams: number;
  /** Teams that share a row's channels; divides `teams`. */
  readonly split: number;
  /** Rows of x. */
  readonly batch: number;
  /** Channels per grid group: a multiple of 32. */
  readonly groupSize: number;
  /** Adds `residual` into the result. */
  readonly residual: boolean;
  /** Adds a bias per row of W. */
  readonly bias: boolean;
  /**
   * Products in one dispatch (default 1), each of a weight of its own with an input of its own, their outputs side by side. A
   * dispatch each would leave most of the GPU idle at every boundary.
   */
  readonly products?: number;
  /** x is signed bytes (row.ts), multiplied in integers; default f16. */
  readonly integers?: boolean;
}

/** Most products of one dispatch: q, k and v. */
export const MAX_PRODUCTS = 3;
const SUFFIXES = ['', '1', '2'] as const;
type Suffix = (typeof SUFFIXES)[number];
/** Further products' buffers and parameters have numbers after these names. */
type GemvBuffers = 'w' | 'grid' | 'bias' | 'x' | 'factors' | 'y' | 'residual';
type GemvParams = 'chunks' | 'stride' | 'column' | 'first' | 'outFeatures';

/** Rows of W that one workgroup finishes. */
export const gemvRowsPerGroup = (v: Pick<GemvVariant, 'rows' | 'teams' | 'split'>): number =>
  (v.teams / v.split) * v.rows;

/** Workgroups of a dispatch over weights of so many rows: none of them serves two. */
export const gemvGroups = (v: Pick<GemvVariant, 'rows' | 'teams' | 'split'>, outFeatures: readonly number[]): number =>
  outFeatures.reduce((sum, out) => sum + Math.ceil(out / gemvRowsPerGroup(v)), 0);

/** Storage buffers of a variant, which devices limit. */
export const gemvBuffers = (v: Pick<GemvVariant, 'bias' | 'residual' | 'products'>): number =>
  3 + (v.residual ? 1 : 0) + (v.products ?? 1) * (v.bias ? 3 : 2);

/**
 * Buffers: w [out, in/32] of 16 bytes; grid [out, in/group] words (scale as f16, zero point above); x [batch, in/32] of 64 bytes; factors
 * [batch, in/32] (factor, sum of normalised x); y, residual [batch, stride] f32, the product's
 * columns from `column`; x and factors are read from chunk `first`; bias [out] f32. Further products' weights have numbers after
 * their names; their columns follow, as do their rows of x. Workgroups: {@link gemvGroups}.
 */
export function gemvKernel(v: GemvVariant): Kernel<GemvBuffers, GemvParams> {
  const products = SUFFIXES.slice(0, v.products ?? 1);
  const { rows, teams, split, batch } = v;
  const each = (n: number, f: (i: number) => string): string => Array.from({ length: n }, (_, i) => f(i)).join('\n');
  const cells = rows * batch;
  const walk = (
    i: Suffix,
  ): string => `  for (var c = (team % ${split}u) * ${TEAM}u + lane; c < params.chunks; c += ${TEAM * split}u) {
${each(rows, (r) => `    let w${r}_ = w${i}[row${r} * params.chunks + c];`)}
${each(rows, (r) => `    let g${r} = gridOf(grid${i}[row${r} * gridStride + c / GROUP_CHUNKS]);`)}
${each(
  batch,
  (b) => `    {
      let at = first + ${b}u * params.chunks + c;
      ${v.integers ? 'let x0 = x[at * 2u]; let x1 = x[at * 2u + 1u];' : 'let x0 = x[at * 4u]; let x1 = x[at * 4u + 1u]; let x2 = x[at * 4u + 2u]; let x3 = x[at * 4u + 3u];'}
      let f = factors[at];
${each(rows, (r) => `      acc${b * rows + r} = fma(f.x * g${r}.x, chunkDot(w${r}_, ${v.integers ? 'x0, x1' : 'x0, x1, x2, x3'}) - g${r}.y * f.y, acc${b * rows + r});`)}
    }`,
)}
  }`;
  const weights = products.flatMap((i) => [
    [`w${i}`, read('vec4<u32>')] as const,
    [`grid${i}`, read('u32')] as const,
    ...(v.bias ? [[`bias${i}`, read('f32')] as const] : []),
  ]);
  return defineKernel<GemvBuffers, GemvParams>({
    name: `gemv.${v.integers ? 'int8' : v.f16 ? 'f16' : 'f32'}.g${v.groupSize}.r${rows}.t${teams}.s${split}.b${batch}${products.length > 1 ? `.p${products.length}` : ''}${v.residual ? '.res' : ''}`,
    features: [...(v.integers ? [] : halfFeatures(v)), ...(v.shuffle ? (['subgroups'] as const) : [])],
    buffers: {
      ...Object.fromEntries(weights),
      x: read('vec4<u32>'),
      factors: read('vec2<f32>'),
      y: write('f32'),
      ...(v.residual ? { residual: read('f32') } : {}),
    } as Record<GemvBuffers, ReturnType<typeof read>>,
    params: {
      chunks: 'u32',
      stride: 'u32',
      column: 'u32',
      first: 'u32',
      ...Object.fromEntries(products.map((i) => [`outFeatures${i}`, 'u32'])),
    } as Record<GemvParams, 'u32'>,
    body: /* wgsl */ `
${v.integers ? '' : halfWgsl(v)}
const GROUP_CHUNKS = ${v.groupSize / CHUNK}u;
${split > 1 || !v.shuffle ? `var<workgroup> partial: array<f32, ${teams * cells * (v.shuffle ? 1 : TEAM)}>;` : ''}

${
  v.bias
    ? `fn biasOf(product: u32, out: u32) -> f32 {
${products
  .slice(1)
  .map((i) => `  if (product == ${i}u) { return bias${i}[out]; }`)
  .join('\n')}
  return bias[out];
}`
    : ''
}
${v.integers ? INTEGER_DOT : HALF_DOT}

@compute @workgroup_size(${TEAM * teams})
fn main(@builtin(workgroup_id) wg: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>,
        @builtin(local_invocation_index) local: u32) {
  let lane = local & 31u;
  let team = local >> 5u;
  var tile = wg.y * groups.x + wg.x;
  var outs = params.outFeatures;
  var column = params.column;
  var first = params.first;
  var product = 0u;
${products
  .slice(1)
  .map(
    (i) => `  { let tiles = (outs + ${gemvRowsPerGroup(v) - 1}u) / ${gemvRowsPerGroup(v)}u;
    if (product + 1u == ${i}u && tile >= tiles) { tile -= tiles; column += outs; first += ${batch}u * params.chunks; outs = params.outFeatures${i}; product = ${i}u; } }`,
  )
  .join('\n')}
  let row = (tile * ${teams / split}u + team / ${split}u) * ${rows}u;
  let gridStride = params.chunks / GROUP_CHUNKS;
${each(rows, (r) => `  let row${r} = min(row + ${r}u, outs - 1u);`)}
${each(cells, (i) => `  var acc${i} = 0.0;`)}
${products.map((i, p) => `${p > 0 ? '  else ' : '  '}${products.length > 1 ? `if (product == ${p}u) ` : ''}{\n${walk(i)}\n  }`).join('\n')}
${reduction(v)}
}`,
  });
}

/** WGSL: a grid's scale, and its zero point less what codes are less of; a chunk's codes times its activations. */
const HALF_DOT = /* wgsl */ `
// Scale, and zero point less 8.
fn gridOf(word: u32) -> vec2<f32> { return vec2(unpack2x16float(word).x, f32(word >> 16u) - 8.0); }

fn chunkDot(c: vec4<u32>, x0: vec4<u32>, x1: vec4<u32>, x2: vec4<u32>, x3: vec4<u32>) -> f32 {
  let a = codes8(c.x); let b = codes8(c.y); let d = codes8(c.z); let e = codes8(c.w);
  var s = a[0] * unpackH(x0.x); var t = b[0] * unpackH(x1.x);
  s = fma(a[1], unpackH(x0.y), s); t = fma(b[1], unpackH(x1.y), t);
  s = fma(a[2], unpackH(x0.z), s); t = fma(b[2], unpackH(x1.z), t);
  s = fma(a[3], unpackH(x0.w), s); t = fma(b[3], unpackH(x1.w), t);
  s = fma(d[0], unpackH(x2.x), s); t = fma(e[0], unpackH(x3.x), t);
  s = fma(d[1], unpackH(x2.y), s); t = fma(e[1], unpackH(x3.y), t);
  s = fma(d[2], unpackH(x2.z), s); t = fma(e[2], unpackH(x3.z), t);
  s = fma(d[3], unpackH(x2.w), s); t = fma(e[3], unpackH(x3.w), t);
  let r = s + t;
  return f32(r.x) + f32(r.y);
}`;

/** The same with activations as signed bytes in the order of the codes' nibbles: exact sums, one instruction for four products. */
const INTEGER_DOT = /* wgsl */ `
fn gridOf(word: u32) -> vec2<f32> { return vec2(unpack2x16float(word).x, f32(word >> 16u)); }

fn chunkDot(c: vec4<u32>, x0: vec4<u32>, x1: vec4<u32>) -> f32 {
  let low = c & vec4(0x0f0f0f0fu);
  let high = (c >> vec4(4u)) & vec4(0x0f0f0f0fu);
  return f32(
    dot4I8Packed(low.x, x0.x) + dot4I8Packed(high.x, x0.y) + dot4I8Packed(low.y, x0.z) + dot4I8Packed(high.y, x0.w) +
    dot4I8Packed(low.z, x1.x) + dot4I8Packed(high.z, x1.y) + dot4I8Packed(low.w, x1.z) + dot4I8Packed(high.w, x1.w)
  );
}`;

/** Sums acc over lanes and splits and writes the results. */
function reduction(v: GemvVariant): string {
  const { rows, teams, split, batch } = v;
  const cells = rows * batch;
  const lines: string[] = [];
  const store = (value: string): string => /* wgsl */ `
      let out = row + cell % ${rows}u;
      if (out < outs) {
        let at = (cell / ${rows}u) * params.stride + column + out;
        y[at] = ${value}${v.residual ? ' + residual[at]' : ''}${v.bias ? ' + biasOf(product, out)' : ''};
      }`;
  if (v.shuffle) {
    for (let i = 0; i < cells; i++)
      for (const mask of [16, 8, 4, 2, 1]) lines.push(`  acc${i} += subgroupShuffleXor(acc${i}, ${mask}u);`);
    if (split === 1) {
      // Each lane writes one cell, so that stores go out together.
      for (let first = 0; first < cells; first += TEAM) {
        const count = Math.min(TEAM, cells - first);
        lines.push(`  { var mine = acc${first};`);
        for (let i = 1; i < count; i++) lines.push(`    if (lane == ${i}u) { mine = acc${first + i}; }`);
        lines.push(`    if (lane < ${count}u) { let cell = ${first}u + lane; ${store('mine')} } }`);
      }
      return lines.join('\n');
    }
    lines.push(`  if (lane == 0u) {`);
    for (let i = 0; i < cells; i++) lines.push(`    partial[team * ${cells}u + ${i}u] = acc${i};`);
    lines.push(`  }
  workgroupBarrier();
  if (team % ${split}u == 0u) {
    for (var cell = lane; cell < ${cells}u; cell += ${TEAM}u) {
      var sum = 0.0;
      for (var s = 0u; s < ${split}u; s++) { sum += partial[(team + s) * ${cells}u + cell]; }
      ${store('sum')}
    }
  }`);
    return lines.join('\n');
  }
  for (let i = 0; i < cells; i++) lines.push(`  partial[(team * ${cells}u + ${i}u) * ${TEAM}u + lane] = acc${i};`);
  lines.push(`  workgroupBarrier();
  if (team % ${split}u == 0u) {
    for (var cell = lane; cell < ${cells}u; cell += ${TEAM}u) {
      var sum = 0.0;
      for (var s = 0u; s < ${split}u; s++) {
        for (var l = 0u; l < ${TEAM}u; l++) { sum += partial[((team + s) * ${cells}u + cell) * ${TEAM}u + l]; }
      }
      ${store('sum')}
    }
  }`);
  void teams;
  return lines.join('\n');
}
