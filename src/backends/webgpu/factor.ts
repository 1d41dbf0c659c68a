// Cholesky-based solvers of the quantizers on the GPU, in double-single arithmetic (WebGPU has no f64).
import { GyreError } from '../../core/errors.js';
import type { BufferSlice, GpuDevice } from './device.js';
import { productError, type ProductError } from './kernels/double.js';
import { strided } from './kernels/elementwise.js';
import {
  beginKernel,
  dampKernel,
  diagonalBlockKernel,
  FACTOR_BLOCK,
  inverseLeftKernel,
  inverseRightKernel,
  panelKernel,
  reversedTriangleKernel,
  solveLeftKernel,
  solveRightKernel,
  trailingKernel,
} from './kernels/factor.js';
import { makeTensor, type GpuTensor } from './tensor.js';

/** Rows and columns of a tile of the double-single products. */
const TILE = 64;
/** Double-single multiply-adds per dispatch: under a second on a GPU of 0.5 TFLOP/s. */
const DISPATCH_WORK = 3e10;
/** Right-hand sides solved at a time: bounds the intermediate result. */
const SOLVE_ROWS = 2048;

/** L⁻¹ of L·Lᵀ = H + λI (rows and columns reversed if asked) as hi + lo; the strict upper triangles hold leftovers. */
interface TriangleInverse {
  readonly kind: ProductError;
  readonly hi: GPUBuffer;
  readonly lo: GPUBuffer;
}

/** Runs a double-single product over [rows, cols] tiles in dispatches of bounded work. */
function inPieces(rows: number, cols: number, depth: number, run: (first: number, count: number) => void): void {
  const tiles = Math.ceil(rows / TILE);
  const atOnce = Math.max(1, Math.floor(DISPATCH_WORK / (TILE * cols * depth)));
  for (let first = 0; first < tiles; first += atOnce) run(first, Math.min(atOnce, tiles - first));
}

async function invertedFactor(
  gpu: GpuDevice,
  h: BufferSlice,
  n: number,
  damp: number,
  reversed: boolean,
): Promise<TriangleInverse> {
  const kind = await productError(gpu);
  const one = 1;
  const hi = gpu.buffer(n * n * 4, 'a factorization');
  const lo = gpu.buffer(n * n * 4, 'a factorization');
  const lambda = gpu.buffer(8);
  const status = gpu.buffer(4);
  gpu.upload(status, new Uint32Array(1));
  const factorHi = Math.fround(damp / n);
  gpu.dispatch(dampKernel(kind), { h, out: lambda }, { n, one, factorHi, factorLo: damp / n - factorHi }, [1]);
  gpu.dispatch(beginKernel(kind), { h, lambda, hi, lo }, { n, reversed: Number(reversed), one }, strided(n * n));
  for (let begin = 0; begin < n; begin += FACTOR_BLOCK) {
    gpu.dispatch(diagonalBlockKernel(kind), { hi, lo, status }, { n, begin, one }, [1]);
    const rest = n - begin - FACTOR_BLOCK;
    if (rest <= 0) break;
    gpu.dispatch(panelKernel(kind), { hi, lo }, { n, begin, one }, [Math.ceil(rest / FACTOR_BLOCK)]);
    const tiles = Math.ceil(rest / TILE);
    gpu.dispatch(trailingKernel(kind), { hi, lo }, { size: n, begin, firstTile: 0, one }, [tiles, tiles]);
  }
  for (let half = FACTOR_BLOCK; half < n; half *= 2) {
    const pairs = Math.ceil(n / (2 * half));
    const cols = Math.ceil(half / TILE);
    // Half of each product is zeros.
    inPieces(half, half * pairs, half / 2, (firstTile, count) => {
      gpu.dispatch(inverseLeftKernel(kind), { hi, lo }, { size: n, span: half, firstTile, one }, [cols, count, pairs]);
    });
    inPieces(half, half * pairs, half / 2, (firstTile, count) => {
      gpu.dispatch(inverseRightKernel(kind), { hi, lo }, { size: n, span: half, firstTile, one }, [cols, count, pairs]);
    });
  }
  const [failed] = new Uint32Array(await gpu.read(status, 0, 4));
  gpu.release(lambda);
  gpu.release(status);
  if (failed > 0) {
    gpu.release(hi);
    gpu.release(lo);
    throw new GyreError('non-finite', `the Gram matrix is not positive definite (pivot ${failed - 1} of ${n})`, {
      remedy: 'use more calibration tokens, or check the model for NaN weights',
    });
  }
  return { kind, hi, lo };
}

/**
 * Upper U with UᵀU = (H + λI)⁻¹, λ = damp·mean(diag H). With J the reversal, J(H+λI)J = L·Lᵀ gives U = J·L⁻¹·J.
 * Relative errors about n·κ·2^-46 before the rounding to f32. @throws GyreError `non-finite`.
 */
export async function gptqFactor(gpu: GpuDevice, h: BufferSlice, n: number, damp: number): Promise<GpuTensor> {
  const { hi, lo } = await invertedFactor(gpu, h, n, damp, true);
  const out = makeTensor(gpu, [n, n]);
  gpu.dispatch(reversedTriangleKernel, { hi, out }, { n }, strided(n * n));
  gpu.release(hi);
  gpu.release(lo);
  return out;
}

/** X [m, n] with X·(H + λI) = B. */
export async function solveSymmetric(
  gpu: GpuDevice,
  h: BufferSlice,
  b: BufferSlice,
  m: number,
  n: number,
  damp: number,
): Promise<GpuTensor> {
  const { kind, hi, lo } = await invertedFactor(gpu, h, n, damp, false);
  const out = makeTensor(gpu, [m, n]);
  const rowsAtOnce = Math.min(m, SOLVE_ROWS);
  const halfHi = gpu.buffer(rowsAtOnce * n * 4, 'a solution');
  const halfLo = gpu.buffer(rowsAtOnce * n * 4, 'a solution');
  const cols = Math.ceil(n / TILE);
  for (let begin = 0; begin < m; begin += rowsAtOnce) {
    const rows = Math.min(rowsAtOnce, m - begin);
    const params = { size: n, begin, rows, one: 1 };
    inPieces(rows, n, n / 2, (firstTile, count) => {
      gpu.dispatch(solveLeftKernel(kind), { b, hi, lo, halfHi, halfLo }, { ...params, firstTile }, [cols, count]);
    });
    inPieces(rows, n, n / 2, (firstTile, count) => {
      gpu.dispatch(solveRightKernel(kind), { halfHi, halfLo, hi, lo, out }, { ...params, firstTile }, [cols, count]);
    });
  }
  for (const buffer of [hi, lo, halfHi, halfLo]) gpu.release(buffer);
  return out;
}
