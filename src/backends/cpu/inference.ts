// The forward ops of the CPU backend. A few rows at a time (decoding) run in our kernels on weights in the arena; many rows
// (prefill, calibration) run in ONNX Runtime on weights decoded slice by slice, so that weights are held once.
import { GyreError, ensure } from '../../core/errors.js';
import { floats, type HostTensor } from '../../core/tensor.js';
import type {
  AttentionOptions,
  InferenceOps,
  KvCacheHandle,
  LinearHandle,
  LinearSource,
  PairwiseTransform,
  RopeHandle,
  RowScores,
  SplitHeadsOptions,
  Tensor,
  TransformHandle,
} from '../../ops/backend.js';
import {
  attention,
  KvCache,
  LONG_SPIN,
  MAX_GEMV_ROWS,
  PackedLinear,
  rmsNorm,
  RopeTable,
  RowTransform,
  score,
  SHORT_SPIN,
  siluMul,
  splitHeads,
  type KernelPool,
} from './kernels.js';
import type { Int8Linear, OrtKernels } from './ort.js';
import { CpuTensor, own, type TensorPool } from './tensor.js';

/** Weights decoded at a time for a product of many rows, bytes of f32. */
const DECODED_BYTES = 64 * 1024 * 1024;
/** Query rows per sequence up to which our attention kernel is faster than a call to ONNX Runtime. */
const FEW_QUERY_ROWS = 8;

/** A linear in the arena, or with 8-bit activations inside ONNX Runtime. */
class CpuLinear implements LinearHandle {
  readonly inFeatures: number;
  readonly outFeatures: number;
  readonly weight: PackedLinear | Int8Linear;
  readonly bias: Float32Array | undefined;

  constructor(
    inFeatures: number,
    outFeatures: number,
    weight: PackedLinear | Int8Linear,
    bias: Float32Array | undefined,
  ) {
    this.inFeatures = inFeatures;
    this.outFeatures = outFeatures;
    this.weight = weight;
    this.bias = bias;
  }

  get bytes(): number {
    return this.weight.bytes;
  }
}

/** See {@link InferenceOps}. */
export class CpuInference implements InferenceOps {
  readonly #pool: KernelPool;
  readonly #ort: OrtKernels;
  readonly #tensors: TensorPool;
  readonly #int8: boolean;
  /** Reused for decoded weights. */
  #decoded = new Float32Array(0);

  constructor(pool: KernelPool, ort: OrtKernels, tensors: TensorPool, activations: 'exact' | 'int8') {
    this.#pool = pool;
    this.#ort = ort;
    this.#tensors = tensors;
    this.#int8 = activations === 'int8';
  }

  upload(tensor: HostTensor): Tensor {
    const out = this.#tensors.make(tensor.shape);
    out.data.set(floats(tensor));
    return out;
  }

  download(tensor: Tensor): Promise<Float32Array> {
    return Promise.resolve(own(tensor).data.slice());
  }

  free(...tensors: readonly (Tensor | undefined)[]): void {
    for (const tensor of tensors) this.#tensors.free(tensor);
  }

  sliceRows(tensor: Tensor, begin: number, end: number): Tensor {
    const { shape, data } = own(tensor);
    const width = data.length / shape[0];
    return new CpuTensor([end - begin, ...shape.slice(1)], data.subarray(begin * width, end * width));
  }

  concatColumns(parts: readonly Tensor[]): Tensor {
    const matrices = parts.map((part) => own(part).matrix);
    const { rows } = matrices[0];
    const out = this.#tensors.make([rows, matrices.reduce((sum, m) => sum + m.cols, 0)]);
    const width = out.shape[1];
    let column = 0;
    for (const { data, cols } of matrices) {
      for (let r = 0; r < rows; r++) out.data.set(data.subarray(r * cols, (r + 1) * cols), r * width + column);
      column += cols;
    }
    return out;
  }

  async loadLinear(source: LinearSource): Promise<LinearHandle> {
    if (source.kind === 'dense') {
      const weight = PackedLinear.dense(this.#pool, source.weight);
      return new CpuLinear(weight.inFeatures, weight.outFeatures, weight, source.bias);
    }
    const { inFeatures, outFeatures } = source.weight;
    const weight = this.#int8
      ? await this.#ort.int8Linear(source.weight)
      : PackedLinear.quantized(this.#pool, source.weight);
    return new CpuLinear(inFeatures, outFeatures, weight, source.bias);
  }

  loadTransform(transform: PairwiseTransform): TransformHandle {
    return new RowTransform(this.#pool, transform, transform.theta, transform.channelScales);
  }

  loadRope(cos: Float32Array, sin: Float32Array, rotaryDim: number): RopeHandle {
    return new RopeTable(this.#pool, cos, sin, rotaryDim);
  }

  createKvCache(shape: { batch: number; kvHeads: number; headDim: number; capacity: number }): KvCacheHandle {
    return new KvCache(this.#pool, shape);
  }

  release(...handles: readonly (LinearHandle | TransformHandle | RopeHandle | KvCacheHandle | undefined)[]): void {
    for (const handle of handles) {
      if (handle instanceof CpuLinear) {
        if (handle.weight instanceof PackedLinear) handle.weight.free();
        else void handle.weight.release();
      } else if (handle instanceof RowTransform || handle instanceof RopeTable || handle instanceof KvCache) {
        handle.free();
      } else if (handle !== undefined) {
        throw foreign();
      }
    }
  }

  embed(table: LinearHandle, ids: Int32Array): Tensor {
    const { weight, inFeatures } = ownLinear(table);
    ensure(weight instanceof PackedLinear, 'unsupported', 'an embedding table with 8-bit activations');
    const out = this.#tensors.make([ids.length, inFeatures]);
    weight.gatherRows(ids, out.data);
    return out;
  }

  rmsNorm(x: Tensor, weight: Tensor, eps: number): Tensor {
    const { shape, data } = own(x);
    const out = this.#tensors.make(shape);
    rmsNorm(this.#pool, data, own(weight).data, eps, out.data);
    return out;
  }

  rotate(x: Tensor, transform: TransformHandle): Tensor {
    if (!(transform instanceof RowTransform)) throw foreign();
    const { data, rows } = own(x).matrix;
    const out = this.#tensors.make(x.shape);
    transform.apply(data, rows, out.data);
    return out;
  }

  async linear(x: Tensor, weight: LinearHandle, residual?: Tensor): Promise<Tensor> {
    const handle = ownLinear(weight);
    const { data, rows, cols } = own(x).matrix;
    ensure(
      cols === handle.inFeatures,
      'tensor-shape',
      () => `a linear of ${handle.inFeatures} inputs was given ${cols}`,
    );
    const out = this.#tensors.make([rows, handle.outFeatures]);
    const add = residual && own(residual).data;
    if (handle.weight instanceof PackedLinear) {
      if (rows <= MAX_GEMV_ROWS) {
        this.#pool.spinMicroseconds = LONG_SPIN;
        handle.weight.gemv(data, rows, out.data, add);
        if (handle.bias) addBias(out.data, handle.bias);
        return out;
      }
      await this.#product(data, rows, handle.weight, out.data);
    } else {
      await handle.weight.run(data, rows, out.data);
    }
    if (handle.bias) addBias(out.data, handle.bias);
    if (add) for (let i = 0; i < add.length; i++) out.data[i] += add[i];
    return out;
  }

  /** x [rows, in] · Wᵀ with W decoded in slices of output rows. */
  async #product(x: Float32Array, rows: number, weight: PackedLinear, out: Float32Array): Promise<void> {
    const { inFeatures, outFeatures } = weight;
    const slice = Math.min(outFeatures, Math.max(64, Math.floor(DECODED_BYTES / 4 / inFeatures)));
    if (this.#decoded.length < slice * inFeatures) this.#decoded = new Float32Array(slice * inFeatures);
    const left = { data: x, rows, cols: inFeatures };
    this.#pool.spinMicroseconds = SHORT_SPIN;
    for (let begin = 0; begin < outFeatures; begin += slice) {
      const count = Math.min(slice, outFeatures - begin);
      const decoded = this.#decoded.subarray(0, count * inFeatures);
      weight.dequantize(decoded, begin, begin + count);
      const right = { data: decoded, rows: count, cols: inFeatures };
      if (count === outFeatures) {
        await this.#ort.gemm(left, false, right, true, out);
      } else {
        const part = new Float32Array(rows * count);
        await this.#ort.gemm(left, false, right, true, part);
        for (let r = 0; r < rows; r++) out.set(part.subarray(r * count, (r + 1) * count), r * outFeatures + begin);
      }
    }
  }

  splitHeads(qkv: Tensor, options: SplitHeadsOptions): { q: Tensor; k: Tensor; v: Tensor } {
    const { heads, kvHeads, headDim, rope } = options;
    if (!(rope instanceof RopeTable)) throw foreign();
    const { data, rows } = own(qkv).matrix;
    const q = this.#tensors.make([rows, heads * headDim]);
    const k = this.#tensors.make([rows, kvHeads * headDim]);
    const v = this.#tensors.make([rows, kvHeads * headDim]);
    splitHeads(this.#pool, {
      ...options,
      rope,
      qkv: data,
      q: q.data,
      k: k.data,
      v: v.data,
      qNorm: options.qNorm && own(options.qNorm).data,
      kNorm: options.kNorm && own(options.kNorm).data,
    });
    return { q, k, v };
  }

  async attention(q: Tensor, k: Tensor, v: Tensor, options: AttentionOptions): Promise<Tensor> {
    const { heads, kvHeads, headDim, batch, start, scale, window, cache } = options;
    const { data, rows } = own(q).matrix;
    const tokens = rows / batch;
    const [keys, values] = [own(k).data, own(v).data];
    const out = this.#tensors.make(q.shape);
    if (cache && !(cache instanceof KvCache)) throw foreign();
    // ONNX Runtime takes head dimensions in multiples of 8 only.
    if (tokens <= FEW_QUERY_ROWS || headDim % 8 !== 0) {
      cache?.append(keys, values, start);
      const source = cache ?? { k: keys, v: values };
      attention(this.#pool, { q: data, out: out.data, batch, heads, kvHeads, headDim, scale, window, start, source });
      return out;
    }
    const kernel = { heads, kvHeads, headDim, scale, window };
    const past = pastOf(cache, start);
    // ONNX Runtime takes a past for one sequence at a time.
    const together = start > 0 ? 1 : batch;
    for (let first = 0; first < batch; first += together) {
      const part = (values: Float32Array): Float32Array =>
        values.subarray((first / batch) * values.length, ((first + together) / batch) * values.length);
      const before = { tokens: start, k: part(past.k), v: part(past.v) };
      await this.#ort.attention(kernel, together, tokens, part(data), part(keys), part(values), before, part(out.data));
    }
    cache?.append(keys, values, start);
    return out;
  }

  siluMul(gateUp: Tensor): Tensor {
    const { data, rows, cols } = own(gateUp).matrix;
    const out = this.#tensors.make([rows, cols / 2]);
    siluMul(this.#pool, data, rows, out.data);
    return out;
  }

  score(logits: Tensor, targets: Int32Array, reference?: Tensor): RowScores {
    return score(this.#pool, own(logits).data, targets, reference && own(reference).data);
  }
}

function ownLinear(handle: LinearHandle): CpuLinear {
  if (handle instanceof CpuLinear) return handle;
  throw foreign();
}

/** The first `tokens` cached keys and values, [batch, kvHeads, tokens, headDim]. */
function pastOf(cache: KvCache | undefined, tokens: number): { k: Float32Array; v: Float32Array } {
  if (!cache || tokens === 0) return { k: new Float32Array(0), v: new Float32Array(0) };
  const { batch, kvHeads, headDim } = cache;
  const size = tokens * headDim;
  const [k, v] = [new Float32Array(batch * kvHeads * size), new Float32Array(batch * kvHeads * size)];
  for (let i = 0; i < batch * kvHeads; i++) {
    const [sequence, head] = [Math.floor(i / kvHeads), i % kvHeads];
    cache.read('keys', sequence, head, tokens, k.subarray(i * size, (i + 1) * size));
    cache.read('values', sequence, head, tokens, v.subarray(i * size, (i + 1) * size));
  }
  return { k, v };
}

function foreign(): GyreError {
  return new GyreError('backend', 'a handle of another backend was given to the CPU backend');
}

/** Rows of y plus bias. */
function addBias(y: Float32Array, bias: Float32Array): void {
  const n = bias.length;
  for (let r = 0; r < y.length; r += n) for (let c = 0; c < n; c++) y[r + c] += bias[c];
}
