// Cholesky factors and triangular inverses of [n, n] matrices in double-single arithmetic (hi and lo in two buffers), by
// blocks of 32 and in place. A step of the factorization is three dispatches: one workgroup factors and inverts the
// diagonal block, the panel below is multiplied by that inverse, the trailing matrix gets its update. The triangular
// inverse doubles its blocks: ⌈log2(n/32)⌉ rounds of two products. n³/3 multiply-adds in all, 15 instructions each: bound
// by arithmetic.
import { defineKernel, read, write, type BufferSpec, type Kernel } from '../kernel.js';
import { doubleArithmetic, type ProductError } from './double.js';

/** Rows of a diagonal block. */
export const FACTOR_BLOCK = 32;

const once = <T>(make: (kind: ProductError) => T): ((kind: ProductError) => T) => {
  const made = new Map<ProductError, T>();
  return (kind) => {
    let kernel = made.get(kind);
    if (!kernel) made.set(kind, (kernel = make(kind)));
    return kernel;
  };
};

/** out = {factor · Σ diag H} as hi, lo; `factor` comes as hi, lo as well. One workgroup. */
export const dampKernel = once((kind) =>
  defineKernel({
    name: 'factor.damp',
    buffers: { h: read('f32'), out: write('vec2<f32>') },
    params: { n: 'u32', one: 'f32', factorHi: 'f32', factorLo: 'f32' },
    body: /* wgsl */ `${doubleArithmetic(kind)}
var<workgroup> sums: array<vec2<f32>, 256>;
@compute @workgroup_size(256)
fn main(@builtin(local_invocation_index) local: u32) {
  var sum = vec2<f32>();
  for (var i = local; i < params.n; i += 256u) { sum = ddAdd(sum, vec2<f32>(h[i * params.n + i], 0.0)); }
  sums[local] = sum;
  for (var width = 128u; width > 0u; width /= 2u) {
    workgroupBarrier();
    if (local < width) { sums[local] = ddAdd(sums[local], sums[local + width]); }
  }
  if (local == 0u) { out[0] = ddMul(sums[0], vec2<f32>(params.factorHi, params.factorLo)); }
}`,
  }),
);

/** hi + lo = H + λI, rows and columns reversed if asked. */
export const beginKernel = once((kind) =>
  defineKernel({
    name: 'factor.begin',
    buffers: { h: read('f32'), lambda: read('vec2<f32>'), hi: write('f32'), lo: write('f32') },
    params: { n: 'u32', reversed: 'u32', one: 'f32' },
    body: /* wgsl */ `${doubleArithmetic(kind)}
@compute @workgroup_size(256)
fn main(@builtin(global_invocation_id) id: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>) {
  let count = params.n * params.n;
  let stride = groups.x * 256u;
  for (var i = id.x; i < count; i += stride) {
    var x = vec2<f32>(h[select(i, count - 1u - i, params.reversed != 0u)], 0.0);
    if (i / params.n == i % params.n) { x = ddAdd(x, lambda[0]); }
    hi[i] = x.x;
    lo[i] = x.y;
  }
}`,
  }),
);

/** WGSL: a 32 × 32 block of the matrix between memory and workgroup memory, identity beyond n. */
const loadBlock = (hi: string, lo: string, row0: string, col0: string): string => /* wgsl */ `
  for (var at = local; at < 1024u; at += 256u) {
    let r = at / 32u;
    let c = at % 32u;
    var x = select(0.0, 1.0, r == c);
    var y = 0.0;
    if (${row0} + r < params.n && ${col0} + c < params.n) {
      x = hi[(${row0} + r) * params.n + ${col0} + c];
      y = lo[(${row0} + r) * params.n + ${col0} + c];
    }
    ${hi}[at] = x;
    ${lo}[at] = y;
  }`;

/**
 * The diagonal block at `begin` becomes L⁻¹, its Cholesky factor's inverse (the factor itself is not needed again): row
 * operations that turn A into Lᵀ turn I into L⁻¹. `status[0]` keeps 1 + the first pivot that is not a positive number.
 */
export const diagonalBlockKernel = once((kind) =>
  defineKernel({
    name: 'factor.diagonal',
    buffers: { hi: write('f32'), lo: write('f32'), status: write('u32') },
    params: { n: 'u32', begin: 'u32', one: 'f32' },
    body: /* wgsl */ `${doubleArithmetic(kind)}
var<workgroup> ah: array<f32, 1024>;
var<workgroup> al: array<f32, 1024>;
var<workgroup> bh: array<f32, 1024>;
var<workgroup> bl: array<f32, 1024>;
@compute @workgroup_size(256)
fn main(@builtin(local_invocation_index) local: u32) {
${loadBlock('ah', 'al', 'params.begin', 'params.begin')}
  for (var at = local; at < 1024u; at += 256u) {
    bh[at] = select(0.0, 1.0, at / 32u == at % 32u);
    bl[at] = 0.0;
  }
  workgroupBarrier();
  for (var j = 0u; j < 32u; j++) {
    // Bits, because a compiler may assume that there are no NaNs.
    let bits = bitcast<u32>(ah[j * 33u]);
    let bad = bits == 0u || bits >= 0x7f800000u;
    if (bad && local == 0u && status[0] == 0u) { status[0] = 1u + params.begin + j; }
    let inverse = ddInverseSqrt(vec2<f32>(select(ah[j * 33u], 1.0, bad), al[j * 33u]));
    if (local < 32u) {
      let at = local * 32u + j;
      if (local > j) {
        let x = ddMul(vec2<f32>(ah[at], al[at]), inverse);
        ah[at] = x.x;
        al[at] = x.y;
      }
    } else if (local < 64u) {
      let at = j * 32u + local - 32u;
      let x = ddMul(vec2<f32>(bh[at], bl[at]), inverse);
      bh[at] = x.x;
      bl[at] = x.y;
    }
    workgroupBarrier();
    for (var at = local; at < 1024u; at += 256u) {
      let r = at / 32u;
      let c = at % 32u;
      if (r > j) {
        let factor = vec2<f32>(-ah[r * 32u + j], -al[r * 32u + j]);
        if (c > j) {
          let x = ddTidy(ddFma(factor, vec2<f32>(ah[c * 32u + j], al[c * 32u + j]), vec2<f32>(ah[at], al[at])));
          ah[at] = x.x;
          al[at] = x.y;
        } else {
          let x = ddTidy(ddFma(factor, vec2<f32>(bh[j * 32u + c], bl[j * 32u + c]), vec2<f32>(bh[at], bl[at])));
          bh[at] = x.x;
          bl[at] = x.y;
        }
      }
    }
    workgroupBarrier();
  }
  for (var at = local; at < 1024u; at += 256u) {
    let row = params.begin + at / 32u;
    let col = params.begin + at % 32u;
    if (row < params.n && col < params.n) {
      hi[row * params.n + col] = bh[at];
      lo[row * params.n + col] = bl[at];
    }
  }
}`,
  }),
);

/** The panel under the diagonal block at `begin` becomes A·L⁻ᵀ, its part of the factor. One workgroup per 32 rows. */
export const panelKernel = once((kind) =>
  defineKernel({
    name: 'factor.panel',
    buffers: { hi: write('f32'), lo: write('f32') },
    params: { n: 'u32', begin: 'u32', one: 'f32' },
    body: /* wgsl */ `${doubleArithmetic(kind)}
var<workgroup> ah: array<f32, 1024>;
var<workgroup> al: array<f32, 1024>;
var<workgroup> bh: array<f32, 1024>;
var<workgroup> bl: array<f32, 1024>;
@compute @workgroup_size(256)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) local: u32) {
  let row0 = params.begin + 32u + group.x * 32u;
${loadBlock('ah', 'al', 'row0', 'params.begin')}
${loadBlock('bh', 'bl', 'params.begin', 'params.begin')}
  workgroupBarrier();
  for (var at = local; at < 1024u; at += 256u) {
    let r = at / 32u;
    let c = at % 32u;
    if (row0 + r < params.n) {
      var sum = vec2<f32>();
      for (var k = 0u; k <= c; k++) {
        sum = ddFma(vec2<f32>(ah[r * 32u + k], al[r * 32u + k]), vec2<f32>(bh[c * 32u + k], bl[c * 32u + k]), sum);
      }
      sum = ddTidy(sum);
      hi[(row0 + r) * params.n + params.begin + c] = sum.x;
      lo[(row0 + r) * params.n + params.begin + c] = sum.y;
    }
  }
}`,
  }),
);

/** A double-single product Σ_k P(i, k)·Q(j, k) over tiles of 64 × 64, given by WGSL expressions. */
interface DoubleProduct<B extends string, P extends string> {
  readonly name: string;
  readonly buffers: Readonly<Record<B, BufferSpec>>;
  readonly params: Readonly<Record<P, 'u32'>>;
  /** Statements that set m, n (sizes of this product) and kBegin, kEnd (u32) from group, row0, col0; may return. */
  readonly setUp: string;
  /** vec2 of P(i, k) for i < m, k < kEnd; `fetchP` variables: i, k, z. */
  readonly p: string;
  readonly q: string;
  /** Whether neighbouring k are neighbours in memory. */
  readonly alongP: boolean;
  readonly alongQ: boolean;
  /** Statements that store `sum` (vec2) at (i, j). */
  readonly store: string;
}

function doubleProduct<const B extends string, const P extends string>(
  kind: ProductError,
  product: DoubleProduct<B, P>,
): Kernel<B, P | 'one' | 'firstTile'> {
  const range = [0, 1, 2, 3];
  const fetch = (along: boolean, to: string, origin: string, size: string, expression: string): string => /* wgsl */ `
    for (var at = local; at < 512u; at += 256u) {
      let kk = ${along ? 'at % 8u' : 'at / 64u'};
      let rr = ${along ? 'at / 8u' : 'at % 64u'};
      let i = ${origin} + rr;
      let k = k0 + kk;
      var x = vec2<f32>();
      if (i < ${size} && k < kEnd) { x = ${expression}; }
      ${to}h[kk * 65u + rr] = x.x;
      ${to}l[kk * 65u + rr] = x.y;
    }`;
  const params = { ...product.params, firstTile: 'u32', one: 'f32' } as const;
  return defineKernel({
    name: product.name,
    buffers: product.buffers,
    params,
    body: /* wgsl */ `${doubleArithmetic(kind)}
var<workgroup> ph: array<f32, 520>;
var<workgroup> pl: array<f32, 520>;
var<workgroup> qh: array<f32, 520>;
var<workgroup> ql: array<f32, 520>;
@compute @workgroup_size(256)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) local: u32) {
  let tx = local % 16u;
  let ty = local / 16u;
  let row0 = (group.y + params.firstTile) * 64u;
  let col0 = group.x * 64u;
${product.setUp}
${range.flatMap((r) => range.map((c) => `  var s${r}${c} = vec2<f32>();`)).join('\n')}
  for (var k0 = kBegin; k0 < kEnd; k0 += 8u) {
    workgroupBarrier();
${fetch(product.alongP, 'p', 'row0', 'm', product.p)}
${fetch(product.alongQ, 'q', 'col0', 'n', product.q)}
    workgroupBarrier();
    for (var kk = 0u; kk < 8u; kk++) {
${range.map((r) => `      let p${r} = vec2<f32>(ph[kk * 65u + ty + ${r * 16}u], pl[kk * 65u + ty + ${r * 16}u]);`).join('\n')}
${range.map((c) => `      let q${c} = vec2<f32>(qh[kk * 65u + tx + ${c * 16}u], ql[kk * 65u + tx + ${c * 16}u]);`).join('\n')}
${range.flatMap((r) => range.map((c) => `      s${r}${c} = ddFma(p${r}, q${c}, s${r}${c});`)).join('\n')}
    }
  }
${range
  .flatMap((r) =>
    range.map(
      (c) => /* wgsl */ `  {
    let i = row0 + ty + ${r * 16}u;
    let j = col0 + tx + ${c * 16}u;
    if (i < m && j < n) {
      let sum = ddTidy(s${r}${c});
      ${product.store}
    }
  }`,
    ),
  )
  .join('\n')}
}`,
  });
}

/** The trailing matrix after the panel at `begin`: A −= L·Lᵀ over its columns, tiles on and under the diagonal. */
export const trailingKernel = once((kind) =>
  doubleProduct(kind, {
    name: 'factor.trailing',
    buffers: { hi: write('f32'), lo: write('f32') },
    params: { size: 'u32', begin: 'u32' },
    setUp: /* wgsl */ `
  if (col0 > row0) { return; }
  let first = params.begin + 32u;
  let m = params.size - first;
  let n = m;
  let kBegin = 0u;
  let kEnd = 32u;`,
    p: 'vec2<f32>(hi[(first + i) * params.size + params.begin + k], lo[(first + i) * params.size + params.begin + k])',
    q: 'vec2<f32>(hi[(first + i) * params.size + params.begin + k], lo[(first + i) * params.size + params.begin + k])',
    alongP: true,
    alongQ: true,
    store: /* wgsl */ `
      let to = (first + i) * params.size + first + j;
      let x = ddAdd(vec2<f32>(hi[to], lo[to]), ddNegate(sum));
      hi[to] = x.x;
      lo[to] = x.y;`,
  }),
);

/** WGSL: pair z of the triangular inverse: A⁻¹ [s, s] at `a`, C⁻¹ [rows, rows] at `c`, B [rows, s] between them. */
const pair = /* wgsl */ `
  let s = params.span;
  let a = group.z * 2u * s;
  let c = a + s;
  if (c >= params.size) { return; }
  let count = min(s, params.size - c);`;

/**
 * First half of doubling a triangular inverse: (B·A⁻¹)ᵀ into the unused upper triangle, with A⁻¹ lower triangular.
 * Tiles: columns of A⁻¹ × rows of B.
 */
export const inverseLeftKernel = once((kind) =>
  doubleProduct(kind, {
    name: 'factor.inverseLeft',
    buffers: { hi: write('f32'), lo: write('f32') },
    params: { size: 'u32', span: 'u32' },
    setUp: /* wgsl */ `${pair}
  let m = s;
  let n = count;
  if (row0 >= m || col0 >= n) { return; }
  let kBegin = row0;
  let kEnd = s;`,
    // The upper triangle of the diagonal blocks holds what earlier rounds left there.
    p: 'select(vec2<f32>(), vec2<f32>(hi[(a + k) * params.size + a + i], lo[(a + k) * params.size + a + i]), k >= i)',
    q: 'vec2<f32>(hi[(c + i) * params.size + a + k], lo[(c + i) * params.size + a + k])',
    alongP: false,
    alongQ: true,
    store: /* wgsl */ `
      let to = (a + i) * params.size + c + j;
      hi[to] = sum.x;
      lo[to] = sum.y;`,
  }),
);

/** Second half: B becomes −C⁻¹·(B·A⁻¹). */
export const inverseRightKernel = once((kind) =>
  doubleProduct(kind, {
    name: 'factor.inverseRight',
    buffers: { hi: write('f32'), lo: write('f32') },
    params: { size: 'u32', span: 'u32' },
    setUp: /* wgsl */ `${pair}
  let m = count;
  let n = s;
  if (row0 >= m || col0 >= n) { return; }
  let kBegin = 0u;
  let kEnd = min(row0 + 64u, count);`,
    p: 'select(vec2<f32>(), vec2<f32>(hi[(c + i) * params.size + c + k], lo[(c + i) * params.size + c + k]), k <= i)',
    q: 'vec2<f32>(hi[(a + i) * params.size + c + k], lo[(a + i) * params.size + c + k])',
    alongP: true,
    alongQ: true,
    store: /* wgsl */ `
      let to = (c + i) * params.size + a + j;
      hi[to] = -sum.x;
      lo[to] = -sum.y;`,
  }),
);

/** out = the lower triangle reversed into an upper one, rounded to f32: U = J·L⁻¹·J. */
export const reversedTriangleKernel = defineKernel({
  name: 'factor.reverse',
  buffers: { hi: read('f32'), out: write('f32') },
  params: { n: 'u32' },
  body: /* wgsl */ `
@compute @workgroup_size(256)
fn main(@builtin(global_invocation_id) id: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>) {
  let count = params.n * params.n;
  let stride = groups.x * 256u;
  for (var i = id.x; i < count; i += stride) {
    out[i] = select(0.0, hi[count - 1u - i], i % params.n >= i / params.n);
  }
}`,
});

/** half [rows, n] = B·L⁻ᵀ, rows of B from `begin` on. */
export const solveLeftKernel = once((kind) =>
  doubleProduct(kind, {
    name: 'factor.solveLeft',
    buffers: {
      b: read('f32'),
      hi: read('f32'),
      lo: read('f32'),
      halfHi: write('f32'),
      halfLo: write('f32'),
    },
    params: { size: 'u32', begin: 'u32', rows: 'u32' },
    setUp: /* wgsl */ `
  let m = params.rows;
  let n = params.size;
  let kBegin = 0u;
  let kEnd = min(col0 + 64u, n);`,
    p: 'vec2<f32>(b[(params.begin + i) * params.size + k], 0.0)',
    q: 'select(vec2<f32>(), vec2<f32>(hi[i * params.size + k], lo[i * params.size + k]), k <= i)',
    alongP: true,
    alongQ: true,
    store: /* wgsl */ `
      halfHi[i * params.size + j] = sum.x;
      halfLo[i * params.size + j] = sum.y;`,
  }),
);

/** X = half·L⁻¹, rows from `begin` on, rounded to f32. */
export const solveRightKernel = once((kind) =>
  doubleProduct(kind, {
    name: 'factor.solveRight',
    buffers: {
      halfHi: read('f32'),
      halfLo: read('f32'),
      hi: read('f32'),
      lo: read('f32'),
      out: write('f32'),
    },
    params: { size: 'u32', begin: 'u32', rows: 'u32' },
    setUp: /* wgsl */ `
  let m = params.rows;
  let n = params.size;
  let kBegin = col0;
  let kEnd = n;`,
    p: 'vec2<f32>(halfHi[i * params.size + k], halfLo[i * params.size + k])',
    q: 'select(vec2<f32>(), vec2<f32>(hi[k * params.size + i], lo[k * params.size + i]), k >= i)',
    alongP: true,
    alongQ: false,
    store: 'out[(params.begin + i) * params.size + j] = sum.x;',
  }),
);
