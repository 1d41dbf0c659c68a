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
import { attention, copySequences, GpuKvCache, GpuRope, splitHeads } from './attention.js';
import type { GpuDevice } from './device.js';
import { GpuHadamard } from './hadamard.js';
import { placeColumnsKernel } from './kernels/columns.js';
import { rmsNormKernel } from './kernels/norm.js';
import { siluMulKernel } from './kernels/silu.js';
import { applyLinear, embedRows, GpuLinear, loadLinear, ownLinear } from './linear.js';
import { GpuTransform, rotate } from './rotation.js';
import { score } from './score.js';
import { downloadTensor, elementGroups, freeTensor, GpuTensor, makeTensor, own, spread } from './tensor.js';

/** Bindings start at multiples of this many bytes. */
const BINDING_ALIGNMENT = 256;

/** See {@link InferenceOps}. */
export class WebGpuInference implements InferenceOps {
  readonly #gpu: GpuDevice;

  constructor(gpu: GpuDevice) {
    this.#gpu = gpu;
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
    const x = own(tensor);
    const { rows, cols } = x.matrix;
    ensure(begin >= 0 && begin <= end && end <= rows, 'tensor-shape', () => `rows ${begin} to ${end} of ${rows}`);
    const offset = x.offset + begin * cols * 4;
    if (offset % BINDING_ALIGNMENT === 0) return new GpuTensor([end - begin, cols], x.buffer, { offset, owned: false });
    const out = makeTensor(this.#gpu, [end - begin, cols]);
    this.#gpu.copy(x.buffer, offset, out.buffer, 0, out.bytes);
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
    const out = makeTensor(this.#gpu, x.shape);
    const kernel = rmsNormKernel(this.#gpu.capabilities.subgroups !== undefined);
    this.#gpu.dispatch(kernel, { x: input, weight: factors, out }, { rows, cols, eps }, spread(rows));
    return out;
  }

  rotate(x: Tensor, transform: TransformHandle): Tensor {
    return rotate(this.#gpu, own(x), transform);
  }

  quantizeRows(x: Tensor, grid: ActivationGrid): Tensor {
    return quantizeRows(this.#gpu, own(x), grid);
  }

  linear(x: Tensor, weight: LinearHandle, residual?: Tensor): Tensor {
    return applyLinear(this.#gpu, own(x), ownLinear(weight), residual);
  }

  splitHeads(qkv: Tensor, options: SplitHeadsOptions): { q: Tensor; k: Tensor; v: Tensor } {
    return splitHeads(this.#gpu, own(qkv), options);
  }

  attention(q: Tensor, k: Tensor, v: Tensor, options: AttentionOptions): Tensor {
    return attention(this.#gpu, own(q), k, v, options);
  }

  siluMul(gateUp: Tensor): Tensor {
    const x = own(gateUp);
    const { rows, cols } = x.matrix;
    ensure(cols % 2 === 0, 'tensor-shape', () => `siluMul needs an even number of columns, found ${cols}`);
    const out = makeTensor(this.#gpu, [rows, cols / 2]);
    const count = rows * (cols / 2);
    this.#gpu.dispatch(siluMulKernel, { gateUp: x, out }, { count, cols: cols / 2 }, elementGroups(count));
    return out;
  }

  score(logits: Tensor, targets: Int32Array, reference?: Tensor): Promise<RowScores> {
    return score(this.#gpu, own(logits), targets, reference);
  }
}
