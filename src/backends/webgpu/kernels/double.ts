// Double-single arithmetic: a number is the unevaluated sum hi + lo of two f32, 48 bits together (Dekker 1971; Knuth's
// two-sum). WebGPU has no f64; factorizations and long sums use this instead.
//
// Its error-free transformations are what an optimizer that treats f32 as real numbers would remove, and WGSL lets it.
// So every sum is written as fma(x, one, y) with `one` = 1 a parameter, which no compiler can see through, at no cost.
// The rounding error of a product comes from fma where the GPU's is fused; where it is not (SwiftShader), from
// products of 12-bit halves.
import { GyreError } from '../../../core/errors.js';
import type { GpuDevice } from '../device.js';
import { defineKernel, read, write } from '../kernel.js';

/** The exact error a·b − p of the rounded product p, one way for each kind of machine. */
const PRODUCT_ERROR = {
  fused: /* wgsl */ `
fn productError(a: f32, b: f32, p: f32) -> f32 { return fma(a, b, -p); }`,
  split: /* wgsl */ `
fn upper(x: f32) -> f32 { return bitcast<f32>(bitcast<u32>(x) & 0xfffff000u); }
fn productError(a: f32, b: f32, p: f32) -> f32 {
  let ah = upper(a);
  let bh = upper(b);
  let al = a - ah;
  let bl = b - bh;
  return ((ah * bh - p) + ah * bl + al * bh) + al * bl;
}`,
} as const;

/** How the exact error of a product is found. */
export type ProductError = keyof typeof PRODUCT_ERROR;

/** Two-sum alone: for kernels that add up f32 values. Needs a parameter `one`. */
export const TWO_SUM = /* wgsl */ `
/** a + b as rounded sum and exact error. */
fn twoSum(a: f32, b: f32) -> vec2<f32> {
  let s = fma(a, params.one, b);
  let bb = fma(s, params.one, -a);
  let aa = fma(bb, -params.one, s);
  return vec2<f32>(s, fma(aa, -params.one, a) + fma(bb, -params.one, b));
}
/** The same for |a| ≥ |b|. */
fn quickTwoSum(a: f32, b: f32) -> vec2<f32> {
  let s = fma(a, params.one, b);
  let bb = fma(s, params.one, -a);
  return vec2<f32>(s, fma(bb, -params.one, b));
}
fn ddAdd(a: vec2<f32>, b: vec2<f32>) -> vec2<f32> {
  let s = twoSum(a.x, b.x);
  return quickTwoSum(s.x, s.y + (a.y + b.y));
}`;

/** WGSL functions on double-single numbers (vec2: hi, lo). The kernel needs a parameter `one`. */
export function doubleArithmetic(kind: ProductError): string {
  return /* wgsl */ `${TWO_SUM}
${PRODUCT_ERROR[kind]}
fn ddMul(a: vec2<f32>, b: vec2<f32>) -> vec2<f32> {
  let p = a.x * b.x;
  return quickTwoSum(p, productError(a.x, b.x, p) + (a.x * b.y + a.y * b.x));
}
/** sum + a·b; the low part collects errors and is brought in order by ddTidy at the end. */
fn ddFma(a: vec2<f32>, b: vec2<f32>, sum: vec2<f32>) -> vec2<f32> {
  let p = a.x * b.x;
  let s = twoSum(sum.x, p);
  return vec2<f32>(s.x, sum.y + (s.y + (productError(a.x, b.x, p) + fma(a.x, b.y, a.y * b.x))));
}
fn ddTidy(a: vec2<f32>) -> vec2<f32> { return quickTwoSum(a.x, a.y); }
fn ddNegate(a: vec2<f32>) -> vec2<f32> { return vec2<f32>(-a.x, -a.y); }
/** 1 / √a by two Newton steps. */
fn ddInverseSqrt(a: vec2<f32>) -> vec2<f32> {
  var y = vec2<f32>(inverseSqrt(a.x), 0.0);
  for (var i = 0; i < 2; i++) {
    let rest = ddAdd(vec2<f32>(1.0, 0.0), ddNegate(ddMul(a, ddMul(y, y))));
    y = ddAdd(y, ddMul(y, vec2<f32>(0.5 * rest.x, 0.5 * rest.y)));
  }
  return y;
}`;
}

const probeKernel = defineKernel({
  name: 'double.probe',
  buffers: { x: read('f32'), y: write('f32') },
  params: { one: 'f32' },
  body: /* wgsl */ `${doubleArithmetic('fused')}
@compute @workgroup_size(1)
fn main() {
  let p = x[0] * x[1];
  let s = twoSum(x[0], x[1]);
  y[0] = p;
  y[1] = productError(x[0], x[1], p);
  y[2] = s.x;
  y[3] = s.y;
}`,
});

const probed = new WeakMap<GpuDevice, Promise<ProductError>>();

/** How this GPU finds the error of a product. @throws GyreError `unsupported` where sums lose their errors all the same. */
export function productError(gpu: GpuDevice): Promise<ProductError> {
  let kind = probed.get(gpu);
  if (!kind) probed.set(gpu, (kind = probe(gpu)));
  return kind;
}

async function probe(gpu: GpuDevice): Promise<ProductError> {
  // Full significands whose product and sum need more than 24 bits.
  const [a, b] = [Math.fround(4 / 3), Math.fround(1 / 700)];
  const x = gpu.buffer(8);
  const y = gpu.buffer(16);
  gpu.upload(x, Float32Array.of(a, b));
  gpu.dispatch(probeKernel, { x, y }, { one: 1 }, [1]);
  const [p, e, s, t] = new Float32Array(await gpu.read(y, 0, 16));
  gpu.release(x);
  gpu.release(y);
  if (s + t !== a + b)
    throw new GyreError('unsupported', 'this GPU does not add as IEEE 754 says, which factorizations rely on', {
      remedy: 'use --device cpu for quantization',
    });
  return p + e === a * b ? 'fused' : 'split';
}
