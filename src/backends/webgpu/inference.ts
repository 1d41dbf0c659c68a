// Ops of the forward pass on WebGPU: any shape, any batch, on any adapter. What is large has a file of its own beside this.
import { ensure, GyreError } from '../../core/errors.js';
import { floats, type HostTensor } from '../../core/tensor.js';
import type {
  ActivationGrid,
  AttentionOptions,
  InferenceOps,
  InputTransform,
  KvCacheHandle,
  KvCacheShape,
  LinearHandle,
  LinearSource,
  RopeHandle,
  RowScores,
  SequenceCopy,
  SplitHeadsOptions,
  Tensor,
  TransformHandle,
} from '../../ops/backend.js';
import { quantizeRows } from './activation-grid.js';
import { attention, splitHeads } from './attention.js';
import { copySequences, GpuKvCache, GpuRope } from './kv-cache.js';
import type { GpuDevice } from './device.js';
import { GpuHadamard, hadamardHalf } from './hadamard.js';
import { placeColumnsKernel } from './kernels/columns.js';
import { MAX_GEMV_ROWS } from './kernels/linear.js';
import { rmsNormHalfKernel, rmsNormKernel } from './kernels/norm.js';
import { gatherRowsKernel } from './kernels/rows.js';
import { siluMulHalfKernel, siluMulKernel } from './kernels/silu.js';
import { applyLinear, embedRows, GpuLinear, loadLinear, ownLinear } from './linear.js';
import { GpuTransform, rotate, rotateHalf } from './rotation.js';
import { score } from './score.js';
import {
  downloadTensor,
  elementGroups,
  freeTensor,
  GpuTensor,
  HalfTensor,
  isHalfWidth,
  makeHalf,
  makeTensor,
  own,
  ownAny,
  spread,
  type Precision,
} from './tensor.js';

/** Bindings start at multiples of this many bytes. */
const BINDING_ALIGNMENT = 256;

/** See {@link InferenceOps}. */
export class WebGpuInference implements InferenceOps {
  readonly #gpu: GpuDevice;
  readonly #precision: Precision;

  constructor(gpu: GpuDevice, precision: Precision) {
    this.#gpu = gpu;
    this.#precision = precision;
  }

  /** Whether an activation of so many rows and columns is kept as f16. */
  #isHalf(rows: number, cols: number): boolean {
    return this.#precision === 'f16' && rows > MAX_GEMV_ROWS && isHalfWidth(cols);
  }

  upload(tensor: HostTensor): Tensor {
    const out = makeTensor(this.#gpu, tensor.shape);
    this.#gpu.upload(out.buffer, floats(tensor));
    return out;
  }

  download(tensor: Tensor): Promise<Float32Array> {
    return downloadTensor(this.#gpu, tensor);
  }

  free(...tensors: readonly (Tensor | undefined)[]): void {
    for (const tensor of tensors) freeTensor(this.#gpu, tensor);
  }

  /** A view where bindings may start there, else a copy. */
  sliceRows(tensor: Tensor, begin: number, end: number): Tensor {
    const x = ownAny(tensor);
    const { rows, cols } = x.matrix;
    ensure(begin >= 0 && begin <= end && end <= rows, 'tensor-shape', () => `rows ${begin} to ${end} of ${rows}`);
    const half = x instanceof HalfTensor;
    const offset = x.offset + begin * cols * (half ? 2 : 4);
    const shape = [end - begin, cols] as const;
    if (offset % BINDING_ALIGNMENT === 0) {
      const view = { offset, owned: false };
      return half ? new HalfTensor(this.#gpu, shape, x.buffer, view) : new GpuTensor(shape, x.buffer, view);
    }
    const out = half ? makeHalf(this.#gpu, ...shape) : makeTensor(this.#gpu, shape);
    this.#gpu.copy(x.buffer, offset, out.buffer, 0, out.bytes);
    return out;
  }

  gatherRows(tensor: Tensor, rows: Int32Array): Tensor {
    const x = ownAny(tensor);
    const { rows: count, cols } = x.matrix;
    for (const row of rows) ensure(row >= 0 && row < count, 'tensor-shape', () => `gatherRows: row ${row} of ${count}`);
    const half = x instanceof HalfTensor;
    const out = half ? makeHalf(this.#gpu, rows.length, cols) : makeTensor(this.#gpu, [rows.length, cols]);
    const words = half ? cols / 2 : cols;
    const ids = this.#gpu.buffer(rows.byteLength);
    this.#gpu.upload(ids, rows);
    const params = { count: rows.length * words, words };
    this.#gpu.dispatch(gatherRowsKernel, { x, rows: ids, out }, params, elementGroups(params.count));
    this.#gpu.release(ids);
    return out;
  }

  concatColumns(parts: readonly Tensor[]): Tensor {
    const matrices = parts.map(own);
    ensure(matrices.length > 0, 'tensor-shape', 'concatColumns needs at least one tensor');
    const { rows } = matrices[0].matrix;
    const width = matrices.reduce((sum, part) => sum + part.matrix.cols, 0);
    const out = makeTensor(this.#gpu, [rows, width]);
    let begin = 0;
    for (const part of matrices) {
      const { rows: partRows, cols } = part.matrix;
      ensure(partRows === rows, 'tensor-shape', () => `concatColumns of ${rows} and ${partRows} rows`);
      const count = rows * cols;
      this.#gpu.dispatch(placeColumnsKernel, { x: part, out }, { count, cols, begin, width }, elementGroups(count));
      begin += cols;
    }
    return out;
  }

  async loadLinear(source: LinearSource): Promise<LinearHandle> {
    return loadLinear(this.#gpu, source);
  }

  loadTransform(transform: InputTransform): TransformHandle {
    return transform.kind === 'hadamard'
      ? new GpuHadamard(this.#gpu, transform)
      : new GpuTransform(this.#gpu, transform);
  }

  loadRope(cos: Float32Array, sin: Float32Array, rotaryDim: number): RopeHandle {
    return new GpuRope(this.#gpu, cos, sin, rotaryDim);
  }

  /** Keys and values are kept as f16, or as integers with a grid. */
  createKvCache(shape: KvCacheShape): KvCacheHandle {
    return new GpuKvCache(this.#gpu, shape);
  }

  copySequences(from: KvCacheHandle, to: KvCacheHandle, copies: readonly SequenceCopy[]): void {
    copySequences(this.#gpu, from, to, copies);
  }

  release(...handles: readonly (LinearHandle | TransformHandle | RopeHandle | KvCacheHandle | undefined)[]): void {
    for (const handle of handles) {
      if (handle === undefined) continue;
      const known = [GpuLinear, GpuTransform, GpuHadamard, GpuRope, GpuKvCache].some((kind) => handle instanceof kind);
      if (!known) throw new GyreError('backend', 'a handle of another backend was given to the WebGPU backend');
      (handle as GpuLinear | GpuTransform | GpuHadamard | GpuRope | GpuKvCache).free(this.#gpu);
    }
  }

  embed(table: LinearHandle, ids: Int32Array): Tensor {
    return embedRows(this.#gpu, ownLinear(table), ids);
  }

  rmsNorm(x: Tensor, weight: Tensor, eps: number): Tensor {
    const input = own(x);
    const { rows, cols } = input.matrix;
    const factors = own(weight);
    ensure(factors.elements === cols, 'tensor-shape', () => `a norm of ${factors.elements} channels was given ${cols}`);
    if (this.#isHalf(rows, cols)) {
      const out = makeHalf(this.#gpu, rows, cols);
      const { subgroups, f16 } = this.#gpu.capabilities;
      const kernel = rmsNormHalfKernel(subgroups !== undefined, { f16 });
      this.#gpu.dispatch(kernel, { x: input, weight: factors, out }, { rows, cols, eps }, spread(rows));
      return out;
    }
    const out = makeTensor(this.#gpu, x.shape);
    const kernel = rmsNormKernel(this.#gpu.capabilities.subgroups !== undefined);
    this.#gpu.dispatch(kernel, { x: input, weight: factors, out }, { rows, cols, eps }, spread(rows));
    return out;
  }

  rotate(x: Tensor, transform: TransformHandle): Tensor {
    const input = ownAny(x);
    return (
      (input instanceof HalfTensor && this.#rotateHalf(input, transform)) || rotate(this.#gpu, own(input), transform)
    );
  }

  /** Undefined where no kernel for rows of f16 takes the transform. */
  #rotateHalf(x: HalfTensor, transform: TransformHandle): HalfTensor | undefined {
    if (transform instanceof GpuTransform) return rotateHalf(this.#gpu, x, transform);
    return transform instanceof GpuHadamard ? hadamardHalf(this.#gpu, x, transform) : undefined;
  }

  quantizeRows(x: Tensor, grid: ActivationGrid): Tensor {
    return quantizeRows(this.#gpu, own(x), grid);
  }

  linear(x: Tensor, weight: LinearHandle, residual?: Tensor): Tensor {
    return applyLinear(this.#gpu, x, ownLinear(weight), residual, this.#precision === 'f16');
  }

  splitHeads(qkv: Tensor, options: SplitHeadsOptions): { q: Tensor; k: Tensor; v: Tensor } {
    const input = own(qkv);
    return splitHeads(this.#gpu, input, options, this.#isHalf(input.matrix.rows, input.matrix.cols));
  }

  attention(q: Tensor, k: Tensor, v: Tensor, options: AttentionOptions): Tensor {
    return attention(this.#gpu, q, k, v, options);
  }

  siluMul(gateUp: Tensor): Tensor {
    const x = own(gateUp);
    const { rows, cols } = x.matrix;
    ensure(cols % 2 === 0, 'tensor-shape', () => `siluMul needs an even number of columns, found ${cols}`);
    if (this.#isHalf(rows, cols / 2)) {
      const out = makeHalf(this.#gpu, rows, cols / 2);
      const kernel = siluMulHalfKernel({ f16: this.#gpu.capabilities.f16 });
      const count = out.elements / 4;
      this.#gpu.dispatch(kernel, { gateUp: x, out }, { count, cols: cols / 2 }, elementGroups(count));
      return out;
    }
    const out = makeTensor(this.#gpu, [rows, cols / 2]);
    const count = rows * (cols / 2);
    this.#gpu.dispatch(siluMulKernel, { gateUp: x, out }, { count, cols: cols / 2 }, elementGroups(count));
    return out;
  }

  score(logits: Tensor, targets: Int32Array, reference?: Tensor): Promise<RowScores> {
    return score(this.#gpu, own(logits), targets, reference);
  }
}
