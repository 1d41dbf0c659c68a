// Blocked Cholesky factors, triangular inverses and solves in f64: panels of 128 by our kernels, the rest as matrix
// products by ONNX Runtime. Factors are kept transposed (rows of Lᵀ are contiguous), so that the parts of a factor that
// enter a product are whole rows and need no copies; the products over rows not needed cost less than copying would.
import { GyreError } from '../../core/errors.js';
import { cholesky, invertLower, solveLowerTransposed, type KernelPool } from './kernels.js';
import type { OrtKernels } from './ort.js';

const PANEL = 128;

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

/** Lᵀ [n, n] of A = L·Lᵀ. @throws GyreError `non-finite` when A is not positive definite. */
async function choleskyTransposed({ pool, ort }: Machine, a: Float64Array, n: number): Promise<Float64Array> {
  const lt = new Float64Array(n * n);
  const product = new Float64Array(n * PANEL);
  for (let j = 0; j < n; j += PANEL) {
    const width = Math.min(PANEL, n - j);
    const rows = n - j;
    const panel = new Float64Array(rows * width);
    for (let r = 0; r < rows; r++) panel.set(a.subarray((j + r) * n + j, (j + r) * n + j + width), r * width);
    if (j > 0) {
      const done = { data: lt.subarray(0, j * n), rows: j, cols: n };
      await ort.gemm(done, true, { data: columnBlock(lt, n, j, j, width), rows: j, cols: width }, false, product);
      for (let i = 0; i < panel.length; i++) panel[i] -= product[j * width + i];
    }
    const diagonal = panel.slice(0, width * width);
    const failed = cholesky(pool, diagonal, width);
    if (failed >= 0 || !Number.isFinite(diagonal[diagonal.length - 1])) {
      throw new GyreError(
        'non-finite',
        `the Gram matrix is not positive definite (pivot ${j + Math.max(failed, 0)} of ${n})`,
        {
          remedy: 'use more calibration tokens, or check the model for NaN weights',
        },
      );
    }
    const rest = panel.slice(width * width);
    if (rest.length > 0) solveLowerTransposed(pool, rest, rows - width, diagonal, width);
    for (let c = 0; c < width; c++) {
      const row = (j + c) * n + j;
      for (let r = c; r < width; r++) lt[row + r] = diagonal[r * width + c];
      for (let r = width; r < rows; r++) lt[row + r] = rest[(r - width) * width + c];
    }
  }
  return lt;
}

/** L⁻¹ [n, n] (lower) from Lᵀ. */
async function invertTriangle({ pool, ort }: Machine, lt: Float64Array, n: number): Promise<Float64Array> {
  const inverse = new Float64Array(n * n);
  for (let i = 0; i < n; i += PANEL) {
    const width = Math.min(PANEL, n - i);
    const right = new Float64Array(width * n);
    if (i > 0) {
      const done = { data: inverse.subarray(0, i * n), rows: i, cols: n };
      await ort.gemm({ data: columnBlock(lt, n, i, i, width), rows: i, cols: width }, true, done, false, right);
      for (let k = 0; k < right.length; k++) right[k] = -right[k];
    }
    for (let r = 0; r < width; r++) right[r * n + i + r] += 1;
    const diagonal = new Float64Array(width * width);
    for (let r = 0; r < width; r++) for (let c = 0; c <= r; c++) diagonal[r * width + c] = lt[(i + c) * n + i + r];
    const block = invertLower(pool, diagonal, width);
    await ort.gemm(
      { data: block, rows: width, cols: width },
      false,
      { data: right, rows: width, cols: n },
      false,
      inverse.subarray(i * n, (i + width) * n),
    );
  }
  return inverse;
}

/** Rows [0, rows) of columns [begin, begin + width) of a square matrix, contiguous. */
function columnBlock(matrix: Float64Array, n: number, rows: number, begin: number, width: number): Float64Array {
  const block = new Float64Array(rows * width);
  for (let r = 0; r < rows; r++) block.set(matrix.subarray(r * n + begin, r * n + begin + width), r * width);
  return block;
}

/**
 * Upper U with UᵀU = (H + λI)⁻¹. With J the reversal, J(H+λI)J = L·Lᵀ gives U = J·L⁻¹·J: one factorization and one
 * triangular inverse, where inverting first and factoring the inverse would take three steps and lose digits.
 */
export async function gptqFactor(machine: Machine, h: Float32Array, n: number, damp: number): Promise<Float32Array> {
  const lt = await choleskyTransposed(machine, damped(h, n, damp, true), n);
  const inverse = await invertTriangle(machine, lt, n);
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
  const lt = await choleskyTransposed(machine, damped(h, n, damp, false), n);
  const inverse = { data: await invertTriangle(machine, lt, n), rows: n, cols: n };
  const half = new Float64Array(m * n);
  await machine.ort.gemm({ data: Float64Array.from(b), rows: m, cols: n }, false, inverse, true, half);
  const out = new Float64Array(m * n);
  await machine.ort.gemm({ data: half, rows: m, cols: n }, false, inverse, false, out);
  return Float32Array.from(out);
}
