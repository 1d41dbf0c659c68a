// Inverse Cholesky factors and solves in f64, by halves: blocks of at most 128 by our kernels, the rest as matrix products by
// ONNX Runtime. A = L·Lᵀ itself is never kept: what GPTQ and the solves need is L⁻¹, and of its halves
//   L21 = A21·L11⁻ᵀ,  S = A22 − L21·L21ᵀ,  (L⁻¹)21 = −L22⁻¹·L21·L11⁻¹
// take 4/3 n³ operations, products of contiguous matrices throughout.
import { GyreError } from '../../core/errors.js';
import { cholesky, invertLower, type KernelPool } from './kernels.js';
import type { OrtKernels } from './ort.js';

/** Largest block of our kernels. */
const LEAF = 128;

/** What the solvers run on. */
interface Machine {
  readonly pool: KernelPool;
  readonly ort: OrtKernels;
}

/** H + damp·mean(diag H)·I in f64, rows and columns reversed if asked. */
export function damped(h: Float32Array, n: number, damp: number, reversed: boolean): Float64Array {
  let trace = 0;
  for (let i = 0; i < n; i++) trace += h[i * n + i];
  const add = (damp * trace) / n;
  const last = h.length - 1;
  const out = new Float64Array(h.length);
  if (reversed) for (let i = 0; i < h.length; i++) out[i] = h[last - i];
  else out.set(h);
  for (let i = 0; i < n; i++) out[i * n + i] += add;
  return out;
}

/** Part of a row-major matrix with `columns` columns: [firstRow, firstRow + rows) × [firstColumn, firstColumn + width), contiguous. */
function part(
  matrix: Float64Array,
  columns: number,
  firstRow: number,
  rows: number,
  firstColumn: number,
  width: number,
): Float64Array {
  const out = new Float64Array(rows * width);
  for (let r = 0; r < rows; r++) {
    const from = (firstRow + r) * columns + firstColumn;
    out.set(matrix.subarray(from, from + width), r * width);
  }
  return out;
}

/** Writes a contiguous [rows, width] into a matrix with `columns` columns. */
function place(
  matrix: Float64Array,
  columns: number,
  firstRow: number,
  firstColumn: number,
  width: number,
  source: Float64Array,
): void {
  for (let r = 0; r * width < source.length; r++)
    matrix.set(source.subarray(r * width, (r + 1) * width), (firstRow + r) * columns + firstColumn);
}

/** Where an order above {@link LEAF} is halved: a multiple of LEAF, so that all leaves but the last are whole. */
function halfOf(n: number): number {
  return Math.ceil(n / LEAF / 2) * LEAF;
}

/**
 * L⁻¹ [n, n] (lower) of A = L·Lᵀ (only A's lower triangle is read), the block at `offset` of a matrix of order `order`.
 * @throws GyreError `non-finite` when A is not positive definite.
 */
async function inverseFactor(
  machine: Machine,
  a: Float64Array,
  n: number,
  { offset, order }: { readonly offset: number; readonly order: number } = { offset: 0, order: n },
): Promise<Float64Array> {
  const { pool, ort } = machine;
  if (n <= LEAF) {
    const l = a.slice();
    const failed = cholesky(pool, l, n);
    if (failed >= 0 || !Number.isFinite(l[l.length - 1])) {
      throw new GyreError(
        'non-finite',
        `the Gram matrix is not positive definite (pivot ${offset + Math.max(failed, 0)} of ${order})`,
        {
          remedy: 'use more calibration tokens, or check the model for NaN weights',
        },
      );
    }
    return invertLower(pool, l, n);
  }
  const top = halfOf(n);
  const low = n - top;
  const product = async (
    x: { data: Float64Array; rows: number; cols: number },
    y: { data: Float64Array; rows: number; cols: number },
    transposed: boolean,
  ): Promise<Float64Array> => {
    const out = new Float64Array(x.rows * (transposed ? y.rows : y.cols));
    await ort.gemm(x, false, y, transposed, out);
    return out;
  };
  const first = await inverseFactor(machine, part(a, n, 0, top, 0, top), top, { offset, order });
  const upper = { data: first, rows: top, cols: top };
  const a21 = { data: part(a, n, top, low, 0, top), rows: low, cols: top };
  const l21 = { data: await product(a21, upper, true), rows: low, cols: top };
  const rest = part(a, n, top, low, top, low);
  const taken = await product(l21, l21, true);
  for (let i = 0; i < rest.length; i++) rest[i] -= taken[i];
  const second = await inverseFactor(machine, rest, low, { offset: offset + top, order });
  const turned = { data: await product(l21, upper, false), rows: low, cols: top };
  const lower = await product({ data: second, rows: low, cols: low }, turned, false);
  for (let i = 0; i < lower.length; i++) lower[i] = -lower[i];
  const inverse = new Float64Array(n * n);
  place(inverse, n, 0, 0, top, first);
  place(inverse, n, top, 0, top, lower);
  place(inverse, n, top, top, low, second);
  return inverse;
}

/**
 * Upper U with UᵀU = (H + λI)⁻¹. With J the reversal, J(H+λI)J = L·Lᵀ gives U = J·L⁻¹·J: one factorization and one
 * triangular inverse, where inverting first and factoring the inverse would take three steps and lose digits.
 */
export async function gptqFactor(machine: Machine, h: Float32Array, n: number, damp: number): Promise<Float32Array> {
  const inverse = await inverseFactor(machine, damped(h, n, damp, true), n);
  const out = new Float32Array(n * n);
  const last = n * n - 1;
  for (let i = 0; i < out.length; i++) out[i] = inverse[last - i];
  return out;
}

/** X [m, n] with X·(H + λI) = B. */
export async function solveSymmetric(
  machine: Machine,
  h: Float32Array,
  b: Float32Array,
  m: number,
  n: number,
  damp: number,
): Promise<Float32Array> {
  const { ort } = machine;
  const inverse = { data: await inverseFactor(machine, damped(h, n, damp, false), n), rows: n, cols: n };
  const right = { data: Float64Array.from(b), rows: m, cols: n };
  const out = new Float64Array(m * n);
  if (m > n) {
    // With many right-hand sides (H + λI)⁻¹ = L⁻ᵀ·L⁻¹ pays: one product with B instead of two.
    const whole = new Float64Array(n * n);
    await ort.gemm(inverse, true, inverse, false, whole);
    await ort.gemm(right, false, { data: whole, rows: n, cols: n }, false, out);
  } else {
    const half = new Float64Array(m * n);
    await ort.gemm(right, false, inverse, true, half);
    await ort.gemm({ data: half, rows: m, cols: n }, false, inverse, false, out);
  }
  return Float32Array.from(out);
}
