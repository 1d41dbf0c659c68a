// Dense f32 products on the GPU: picks the tile, splits long inner dimensions over workgroups and long products over
// dispatches.
import type { BufferSlice, GpuDevice } from './device.js';
import { gemmKernel, sumSlicesKernel, TRIANGLE } from './kernels/gemm.js';

/** A batch of products: operands of each `…` elements after those of the one before. */
export interface GemmBatch {
  readonly count: number;
  readonly a: number;
  readonly b: number;
  readonly c: number;
  /** Neighbours that share one B; default 1. */
  readonly shareB?: number;
  /** An outer loop: products of the inner one, and the operands' distances between its turns. Divides `count`. */
  readonly outer?: { readonly inner: number; readonly a: number; readonly b: number; readonly c: number };
}

/** Arguments of {@link gemm}; sizes, offsets and leading dimensions in elements. */
export interface GemmCall {
  /** [m, k], or [k, m] with `transposeA`. */
  readonly a: GPUBuffer | BufferSlice;
  /** [k, n], or [n, k] with `transposeB`. */
  readonly b: GPUBuffer | BufferSlice;
  /** [m, n]. No other operand's buffer. */
  readonly c: GPUBuffer | BufferSlice;
  readonly m: number;
  readonly n: number;
  readonly k: number;
  readonly transposeA?: boolean;
  readonly transposeB?: boolean;
  /** Elements from one stored row to the next; default: rows are contiguous. */
  readonly lda?: number;
  readonly ldb?: number;
  readonly ldc?: number;
  /** Where the operands begin in their buffers; default 0. */
  readonly offsetA?: number;
  readonly offsetB?: number;
  readonly offsetC?: number;
  /** Factor on the product; default 1. */
  readonly alpha?: number;
  /** Add to c; default false. */
  readonly accumulate?: boolean;
  readonly batch?: GemmBatch;
  /** What of a causal product is skipped; see TRIANGLE. Default none. */
  readonly triangle?: keyof typeof TRIANGLE;
  /** Tile and slices of k, for tests; default: chosen by size. */
  readonly tile?: 64 | 128;
  readonly slices?: number;
}

/** Workgroups that keep a large GPU busy. */
const BUSY = 256;
/** Shortest slice of k worth a workgroup of its own. */
const MIN_SLICE = 128;
const MAX_SLICES = 32;
/** Multiply-adds per dispatch: under a second on a GPU of 0.5 TFLOP/s. */
const DISPATCH_WORK = 2e11;

/** C = α·op(A)·op(B), plus C with `accumulate`. Sums in f32. */
export function gemm(gpu: GpuDevice, call: GemmCall): void {
  const { a, b, c, m, n, k, transposeA = false, transposeB = false, batch } = call;
  const { alpha = 1, accumulate = false, offsetA = 0, offsetB = 0, offsetC = 0 } = call;
  const count = batch?.count ?? 1;
  if (m === 0 || n === 0 || count === 0) return;
  const tiles = (tile: number): number => Math.ceil(m / tile) * Math.ceil(n / tile) * count;
  // A tile of 128 for 64 columns would compute half of them in vain.
  const tile = call.tile ?? (tiles(128) >= BUSY / 2 && Math.min(m, n) > 64 ? 128 : 64);
  const slices =
    batch || call.triangle
      ? 1
      : (call.slices ?? Math.max(1, Math.min(MAX_SLICES, Math.floor(k / MIN_SLICE), Math.floor(BUSY / tiles(tile)))));
  const ldc = call.ldc ?? n;
  const shape = {
    m,
    n,
    k,
    lda: call.lda ?? (transposeA ? m : k),
    ldb: call.ldb ?? (transposeB ? k : n),
    a0: offsetA,
    b0: offsetB,
    strideA: batch?.a ?? 0,
    strideB: batch?.b ?? 0,
    inner: batch?.outer?.inner ?? 0xffffffff,
    shareB: batch?.shareB ?? 1,
    outerA: batch?.outer?.a ?? 0,
    outerB: batch?.outer?.b ?? 0,
    outerC: batch?.outer?.c ?? 0,
    triangle: TRIANGLE[call.triangle ?? 'none'],
  };
  const kernel = gemmKernel({ transposeA, transposeB, tile });
  if (slices > 1) {
    const parts = gpu.buffer(slices * m * n * 4, 'partial sums of a product');
    const kLength = Math.ceil(k / slices);
    gpu.dispatch(
      kernel,
      { a, b, c: parts },
      {
        ...shape,
        ldc: n,
        c0: 0,
        strideC: m * n,
        kStride: kLength,
        kLength,
        firstTile: 0,
        alpha: 1,
        accumulate: 0,
      },
      [Math.ceil(n / tile), Math.ceil(m / tile), slices],
    );
    gpu.dispatch(
      sumSlicesKernel,
      { parts, c },
      { m, n, slices, c0: offsetC, ldc, alpha, accumulate: Number(accumulate) },
      [Math.min(4096, Math.ceil((m * n) / 256))],
    );
    gpu.release(parts);
    return;
  }
  const rows = Math.ceil(m / tile);
  const rowsAtOnce = Math.max(1, Math.floor(DISPATCH_WORK / (tile * n * Math.max(k, 1) * count)));
  for (let firstTile = 0; firstTile < rows; firstTile += rowsAtOnce) {
    gpu.dispatch(
      kernel,
      { a, b, c },
      {
        ...shape,
        ldc,
        c0: offsetC,
        strideC: batch?.c ?? 0,
        kStride: 0,
        kLength: k,
        firstTile,
        alpha,
        accumulate: Number(accumulate),
      },
      [Math.ceil(n / tile), Math.min(rowsAtOnce, rows - firstTile), count],
    );
  }
}
