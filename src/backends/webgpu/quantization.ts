// Ops of quantization on WebGPU: everything stays in GPU memory but what the contract gives to the host (codes, grids,
// gradients of a transform, sums).
import { ensure } from '../../core/errors.js';
import type {
  GridSpec,
  MatmulOptions,
  PairwiseTransform,
  QuantizationOps,
  RoundedWeight,
  Tensor,
  TransformHandle,
  TransformObjective,
} from '../../ops/backend.js';
import { GpuObjective, transformChannels } from './channels.js';
import type { GpuDevice } from './device.js';
import { gptqFactor, solveSymmetric } from './factor.js';
import { gemm } from './gemm.js';
import { halfMatmul, halfMatmulTakes } from './half-matmul.js';
import {
  addScaledInPlaceKernel,
  addScaledKernel,
  gatherColumnsKernel,
  MOST_GROUPS,
  scaleKernel,
  scaleRowsKernel,
  splitScale,
  strided,
  transposeKernel,
} from './kernels/elementwise.js';
import { diagonalKernel, DOT_ELEMENTS, DOT_GROUPS, dotKernel, rowSquaresKernel } from './kernels/sums.js';
import { searchClip } from './clip.js';
import { refitScales } from './refit.js';
import { descend, gptq, roundToNearest } from './rounding.js';
import { freeTensor, makeTensor, own } from './tensor.js';

/** See {@link QuantizationOps}. */
export class WebGpuQuantization implements QuantizationOps {
  readonly #gpu: GpuDevice;

  constructor(gpu: GpuDevice) {
    this.#gpu = gpu;
  }

  matmul(a: Tensor, b: Tensor, options: MatmulOptions = {}): Tensor {
    const { transposeA = false, transposeB = false, precision = 'f32' } = options;
    const [left, right] = [own(a), own(b)];
    const [m, k] = transposeA ? [left.matrix.cols, left.matrix.rows] : [left.matrix.rows, left.matrix.cols];
    const [inner, n] = transposeB ? [right.matrix.cols, right.matrix.rows] : [right.matrix.rows, right.matrix.cols];
    ensure(k === inner, 'tensor-shape', () => `product of [${m}, ${k}] and [${inner}, ${n}]`);
    const out = makeTensor(this.#gpu, [m, n]);
    if (precision === 'f16' && halfMatmulTakes(this.#gpu, m, n, k)) {
      halfMatmul(this.#gpu, left, right, out, { m, n, k, transposeA, transposeB });
      return out;
    }
    gemm(this.#gpu, { a: left, b: right, c: out, m, n, k, transposeA, transposeB });
    return out;
  }

  addScaled(acc: Tensor, x: Tensor, scale: number, inPlace = false): Tensor {
    const [a, b] = [own(acc), own(x)];
    const count = a.elements;
    ensure(count === b.elements, 'tensor-shape', () => `[${a.shape.join(', ')}] plus [${b.shape.join(', ')}]`);
    if (!inPlace) {
      const out = makeTensor(this.#gpu, a.shape);
      this.#gpu.dispatch(addScaledKernel, { acc: a, x: b, out }, { count, ...splitScale(scale) }, strided(count));
      return out;
    }
    if (a.buffer !== b.buffer) {
      this.#gpu.dispatch(addScaledInPlaceKernel, { acc: a, x: b }, { count, ...splitScale(scale) }, strided(count));
    } else if (a.offset === b.offset) {
      this.#gpu.dispatch(scaleKernel, { x: a }, { count, scale: 1 + scale }, strided(count));
    } else {
      // Two views of one buffer: a dispatch may not read and write it through different bindings.
      const copy = makeTensor(this.#gpu, b.shape);
      this.#gpu.copy(b.buffer, b.offset, copy.buffer, 0, b.bytes);
      this.#gpu.dispatch(addScaledInPlaceKernel, { acc: a, x: copy }, { count, ...splitScale(scale) }, strided(count));
      freeTensor(this.#gpu, copy);
    }
    return acc;
  }

  transpose(x: Tensor): Tensor {
    const source = own(x);
    const { rows, cols } = source.matrix;
    const out = makeTensor(this.#gpu, [cols, rows]);
    this.#gpu.dispatch(transposeKernel, { x: source, out }, { rows, cols }, [
      Math.ceil(cols / 32),
      Math.ceil(rows / 32),
    ]);
    return out;
  }

  async dot(a: Tensor, b: Tensor): Promise<number> {
    const [left, right] = [own(a), own(b)];
    const count = left.elements;
    ensure(
      count === right.elements,
      'tensor-shape',
      () => `[${left.shape.join(', ')}] times [${right.shape.join(', ')}]`,
    );
    const groups = Math.min(DOT_GROUPS, Math.ceil(count / DOT_ELEMENTS));
    const out = this.#gpu.buffer(groups * 8, 'partial sums');
    this.#gpu.dispatch(dotKernel, { a: left, b: right, out }, { count, one: 1 }, [groups]);
    const parts = new Float32Array(await this.#gpu.read(out, 0, groups * 8));
    this.#gpu.release(out);
    return parts.reduce((sum, part) => sum + part, 0);
  }

  async diagonal(x: Tensor): Promise<Float32Array> {
    const { rows: n, cols } = own(x).matrix;
    ensure(n === cols, 'tensor-shape', () => `the diagonal of a matrix [${n}, ${cols}]`);
    const out = this.#gpu.buffer(n * 4);
    this.#gpu.dispatch(diagonalKernel, { x: own(x), out }, { n }, [Math.ceil(n / 64)]);
    const values = new Float32Array(await this.#gpu.read(out, 0, n * 4));
    this.#gpu.release(out);
    return values;
  }

  gatherColumns(x: Tensor, columns: Int32Array): Tensor {
    const { rows, cols } = own(x).matrix;
    const bad = columns.find((c) => c < 0 || c >= cols);
    ensure(bad === undefined, 'tensor-shape', () => `column ${bad} of ${cols}`);
    const out = makeTensor(this.#gpu, [rows, columns.length]);
    const chosen = this.#gpu.buffer(columns.byteLength);
    this.#gpu.upload(chosen, columns);
    const params = { count: out.elements, cols, chosen: columns.length };
    this.#gpu.dispatch(gatherColumnsKernel, { x: own(x), columns: chosen, out }, params, strided(out.elements));
    this.#gpu.release(chosen);
    return out;
  }

  scaleRows(x: Tensor, factors: Float32Array): Tensor {
    const source = own(x);
    const { rows, cols } = source.matrix;
    ensure(factors.length === rows, 'tensor-shape', () => `${factors.length} factors for ${rows} rows`);
    const out = makeTensor(this.#gpu, [rows, cols]);
    const s = this.#gpu.buffer(factors.byteLength, 'row factors');
    this.#gpu.upload(s, factors);
    const count = out.elements;
    this.#gpu.dispatch(scaleRowsKernel, { x: source, s, out }, { count, cols, divide: 0 }, strided(count));
    this.#gpu.release(s);
    return out;
  }

  async rowSquares(x: Tensor): Promise<Float32Array> {
    const source = own(x);
    const { rows, cols } = source.matrix;
    const out = this.#gpu.buffer(rows * 4, 'squares of rows');
    this.#gpu.dispatch(rowSquaresKernel, { x: source, out }, { rows, cols }, [Math.min(rows, MOST_GROUPS)]);
    const sums = new Float32Array(await this.#gpu.read(out, 0, rows * 4));
    this.#gpu.release(out);
    return sums;
  }

  transformChannels(
    w: Tensor,
    transform: PairwiseTransform | TransformHandle,
    direction: 'forward' | 'inverse',
    side: 'weight' | 'activation' = 'weight',
  ): Tensor {
    return transformChannels(this.#gpu, own(w), transform, direction, side);
  }

  createObjective(
    w: Tensor,
    transform: Pick<PairwiseTransform, 'channels' | 'groupSize' | 'krot' | 'pairs'>,
    grid: GridSpec,
  ): TransformObjective {
    return new GpuObjective(this.#gpu, own(w), transform, grid);
  }

  roundToNearest(w: Tensor, grid: GridSpec, clip?: Float32Array): Promise<RoundedWeight> {
    return roundToNearest(this.#gpu, own(w), grid, clip);
  }

  searchClip(w: Tensor, gram: Tensor, grid: GridSpec, ratios: readonly number[]): Promise<Float32Array> {
    return searchClip(this.#gpu, own(w), own(gram), grid, ratios);
  }

  gptq(w: Tensor, factor: Tensor, grid: GridSpec, clip?: Float32Array): Promise<RoundedWeight> {
    return gptq(this.#gpu, own(w), own(factor), grid, clip);
  }

  descend(w: Tensor, rounded: RoundedWeight, gram: Tensor, grid: GridSpec, sweeps: number): Promise<RoundedWeight> {
    return descend(this.#gpu, own(w), rounded, own(gram), grid, sweeps);
  }

  refitScales(w: Tensor, rounded: RoundedWeight, gram: Tensor, grid: GridSpec, passes: number): Promise<RoundedWeight> {
    return refitScales(this.#gpu, own(w), rounded, own(gram), grid, passes);
  }

  gptqFactor(h: Tensor, damp: number): Promise<Tensor> {
    const matrix = own(h);
    return gptqFactor(this.#gpu, matrix, matrix.matrix.rows, damp);
  }

  solveSymmetric(h: Tensor, b: Tensor, damp: number): Promise<Tensor> {
    const right = own(b);
    return solveSymmetric(this.#gpu, own(h), right, right.matrix.rows, right.matrix.cols, damp);
  }
}
