// The forward ops of the CPU backend. A few rows at a time (decoding) run in our kernels on weights in the arena; many rows
// (prefill, calibration) run in ONNX Runtime on weights decoded slice by slice, so that weights are held once.
import { GyreError, ensure } from '../../core/errors.js';
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
import { checkCopies, forestRoots, startsOf } from '../../ops/sequences.js';
import {
  attention,
  attentionForest,
  KvCache,
  LONG_SPIN,
  MAX_GEMV_ROWS,
  PackedLinear,
  QuantizedKvCache,
  quantizeRows,
  rmsNorm,
  RopeTable,
  RowHadamard,
  RowTransform,
  score,
  SHORT_SPIN,
  siluMul,
  splitHeads,
  type Floats,
  type KernelPool,
} from './kernels.js';
import { fitsIntegers, IntegerProduct } from './integer-product.js';
import type { Int8Linear, OrtKernels } from './ort.js';
import { CpuTensor, own, type TensorPool } from './tensor.js';

/** Weights decoded at a time for a product of many rows, bytes of f32. */
const DECODED_BYTES = 64 * 1024 * 1024;
/** Uploaded vectors up to this many elements (norm weights) lie in the arena. */
const RESIDENT_VECTOR = 65_536;
/** Query rows per sequence up to which our attention kernel is faster than a call to ONNX Runtime. */
const FEW_QUERY_ROWS = 8;

/** A linear in the arena, or with 8-bit activations inside ONNX Runtime. */
class CpuLinear implements LinearHandle {
  readonly inFeatures: number;
  readonly outFeatures: number;
  readonly weight: PackedLinear | Int8Linear;
  readonly bias: Float32Array | undefined;
  /** Inputs are rounded onto it. */
  readonly activations: ActivationGrid | undefined;
  /** Scales of the outputs' grids, when the product can run in integers. */
  readonly outputScales: Float32Array | undefined;
  integers: IntegerProduct | undefined;

  constructor(
    weight: PackedLinear | Int8Linear,
    { inFeatures, outFeatures }: { inFeatures: number; outFeatures: number },
    source: LinearSource,
  ) {
    this.inFeatures = inFeatures;
    this.outFeatures = outFeatures;
    this.weight = weight;
    this.bias = source.bias;
    this.activations = source.activations;
    if (source.kind === 'quantized' && source.activations && fitsIntegers(source.weight, source.activations))
      this.outputScales = source.weight.scales;
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
    const resident = tensor.shape.length === 1 && tensor.shape[0] <= RESIDENT_VECTOR;
    const out = resident ? this.#tensors.makeResident(tensor.shape) : this.#tensors.make(tensor.shape);
    this.#pool.arena.view(out.floats).set(floats(tensor));
    return out;
  }

  download(tensor: Tensor): Promise<Float32Array> {
    return Promise.resolve(own(tensor).copy());
  }

  /** A new tensor for the result of an op on `rows` rows: in the arena when the next op is likely a kernel of ours. */
  #make(rows: number, cols: number): CpuTensor {
    const shape = [rows, cols];
    return rows <= MAX_GEMV_ROWS ? this.#tensors.makeResident(shape) : this.#tensors.make(shape);
  }

  free(...tensors: readonly (Tensor | undefined)[]): void {
    for (const tensor of tensors) this.#tensors.free(tensor);
  }

  sliceRows(tensor: Tensor, begin: number, end: number): Tensor {
    const { shape, data } = own(tensor);
    const width = data.length / shape[0];
    return new CpuTensor([end - begin, ...shape.slice(1)], data.subarray(begin * width, end * width));
  }

  gatherRows(x: Tensor, rows: Int32Array): Tensor {
    const { rows: count, cols } = own(x).size;
    const out = this.#make(rows.length, cols);
    const { arena } = this.#pool;
    const [from, to] = [arena.view(own(x).floats), arena.view(out.floats)];
    for (const [at, row] of rows.entries()) {
      ensure(row >= 0 && row < count, 'tensor-shape', () => `gatherRows: row ${row} of ${count}`);
      to.set(from.subarray(row * cols, (row + 1) * cols), at * cols);
    }
    return out;
  }

  concatColumns(parts: readonly Tensor[]): Tensor {
    const tensors = parts.map(own);
    const { rows } = tensors[0].size;
    const width = tensors.reduce((sum, t) => sum + t.size.cols, 0);
    const out = this.#make(rows, width);
    const { arena } = this.#pool;
    const to = arena.view(out.floats);
    let column = 0;
    for (const tensor of tensors) {
      const { cols } = tensor.size;
      const data = arena.view(tensor.floats);
      for (let r = 0; r < rows; r++) to.set(data.subarray(r * cols, (r + 1) * cols), r * width + column);
      column += cols;
    }
    return out;
  }

  async loadLinear(source: LinearSource): Promise<LinearHandle> {
    if (source.kind === 'dense') {
      const weight = PackedLinear.dense(this.#pool, source.weight);
      return new CpuLinear(weight, weight, source);
    }
    // Weights with a grid of their own for activations are not given ONNX Runtime's as well.
    const weight =
      this.#int8 && !source.activations
        ? await this.#ort.int8Linear(source.weight)
        : PackedLinear.quantized(this.#pool, source.weight);
    return new CpuLinear(weight, source.weight, source);
  }

  loadTransform(transform: InputTransform): TransformHandle {
    if (transform.kind === 'hadamard') return new RowHadamard(this.#pool, transform);
    return new RowTransform(this.#pool, transform, transform.theta, transform.channelScales);
  }

  loadRope(cos: Float32Array, sin: Float32Array, rotaryDim: number): RopeHandle {
    return new RopeTable(this.#pool, cos, sin, rotaryDim);
  }

  createKvCache(shape: KvCacheShape): KvCacheHandle {
    const { grid } = shape;
    return grid ? new QuantizedKvCache(this.#pool, { ...shape, grid }) : new KvCache(this.#pool, shape);
  }

  copySequences(from: KvCacheHandle, to: KvCacheHandle, copies: readonly SequenceCopy[]): void {
    checkCopies(from, to, copies);
    const alike = (a: KvCache | QuantizedKvCache, b: KvCache | QuantizedKvCache): void =>
      ensure(
        a.kvHeads === b.kvHeads && a.headDim === b.headDim,
        'tensor-shape',
        'sequences can only be copied between caches of the same heads',
      );
    if (from instanceof KvCache && to instanceof KvCache) {
      alike(from, to);
      for (const copy of copies) from.copyTo(to, copy.from, copy.to, copy.tokens);
    } else if (from instanceof QuantizedKvCache && to instanceof QuantizedKvCache) {
      alike(from, to);
      const same = from.grid.bits === to.grid.bits && from.grid.clip === to.grid.clip;
      ensure(same, 'tensor-shape', 'sequences can only be copied between caches on the same grid');
      for (const copy of copies) from.copyTo(to, copy.from, copy.to, copy.tokens);
    } else {
      throw foreign();
    }
  }

  release(...handles: readonly (LinearHandle | TransformHandle | RopeHandle | KvCacheHandle | undefined)[]): void {
    for (const handle of handles) {
      if (handle instanceof CpuLinear) {
        void handle.integers?.release();
        if (handle.weight instanceof PackedLinear) handle.weight.free();
        else void handle.weight.release();
      } else if (RESIDENT.some((kind) => handle instanceof kind)) {
        (handle as RowTransform).free();
      } else if (handle !== undefined) {
        throw foreign();
      }
    }
  }

  embed(table: LinearHandle, ids: Int32Array): Tensor {
    const { weight, inFeatures } = ownLinear(table);
    ensure(weight instanceof PackedLinear, 'unsupported', 'an embedding table with 8-bit activations');
    const out = this.#make(ids.length, inFeatures);
    weight.gatherRows(ids, out.floats);
    return out;
  }

  rmsNorm(x: Tensor, weight: Tensor, eps: number): Tensor {
    const { rows, cols } = own(x).size;
    const out = this.#make(rows, cols);
    rmsNorm(this.#pool, own(x).floats, own(weight).floats, eps, out.floats);
    return out;
  }

  rotate(x: Tensor, transform: TransformHandle): Tensor {
    const { rows, cols } = own(x).size;
    ensure(
      cols === transform.channels,
      'tensor-shape',
      () => `a transform of ${transform.channels} channels was given ${cols}`,
    );
    const out = this.#make(rows, cols);
    if (transform instanceof RowTransform) transform.apply(own(x).floats, rows, out.floats);
    else if (transform instanceof RowHadamard) transform.apply(own(x).floats, out.floats);
    else throw foreign();
    return out;
  }

  quantizeRows(x: Tensor, grid: ActivationGrid): Tensor {
    const { rows, cols } = own(x).size;
    const out = this.#make(rows, cols);
    quantizeRows(this.#pool, own(x).floats, cols, grid, out.floats);
    return out;
  }

  async linear(x: Tensor, weight: LinearHandle, residual?: Tensor): Promise<Tensor> {
    const handle = ownLinear(weight);
    const { rows, cols } = own(x).size;
    ensure(
      cols === handle.inFeatures,
      'tensor-shape',
      () => `a linear of ${handle.inFeatures} inputs was given ${cols}`,
    );
    if (!handle.activations) return this.#apply(handle, own(x), residual);
    const integers = rows > MAX_GEMV_ROWS ? this.#integers(handle) : undefined;
    if (integers) {
      const y = this.#tensors.make([rows, handle.outFeatures]);
      await integers.run(own(x).data, rows, handle.activations, y.data);
      finish(y.data, handle.bias, residual && this.#pool.arena.view(own(residual).floats));
      return y;
    }
    const rounded = this.quantizeRows(x, handle.activations);
    const y = await this.#apply(handle, own(rounded), residual);
    this.#tensors.free(rounded);
    return y;
  }

  async #apply(handle: CpuLinear, x: CpuTensor, residual: Tensor | undefined): Promise<CpuTensor> {
    const { rows } = x.size;
    const { arena } = this.#pool;
    if (handle.weight instanceof PackedLinear && rows <= MAX_GEMV_ROWS) {
      const out = this.#tensors.makeResident([rows, handle.outFeatures]);
      this.#pool.spinMicroseconds = LONG_SPIN;
      handle.weight.gemv(x.floats, rows, out.floats, residual && own(residual).floats);
      if (handle.bias) addBias(arena.view(out.floats), handle.bias);
      return out;
    }
    const { data } = x;
    const out = this.#tensors.make([rows, handle.outFeatures]);
    if (handle.weight instanceof PackedLinear) await this.#product(data, rows, handle.weight, out.data);
    else await handle.weight.run(data, rows, out.data);
    finish(out.data, handle.bias, residual && arena.view(own(residual).floats));
    return out;
  }

  /** The linear's product in integers, where its grids allow one; made when first asked for. */
  #integers(handle: CpuLinear): IntegerProduct | undefined {
    const { weight, outputScales } = handle;
    if (!outputScales || !(weight instanceof PackedLinear)) return undefined;
    return (handle.integers ??= new IntegerProduct(this.#ort, this.#pool, weight, outputScales));
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
    const { heads, kvHeads, headDim, rope, batch, start, eps } = options;
    if (!(rope instanceof RopeTable)) throw foreign();
    const { rows } = own(qkv).size;
    const q = this.#make(rows, heads * headDim);
    const k = this.#make(rows, kvHeads * headDim);
    const v = this.#make(rows, kvHeads * headDim);
    splitHeads(this.#pool, {
      heads,
      kvHeads,
      headDim,
      batch,
      starts: startsOf(start, batch),
      eps,
      rope,
      qkv: own(qkv).floats,
      q: q.floats,
      k: k.floats,
      v: v.floats,
      qNorm: options.qNorm && own(options.qNorm).floats,
      kNorm: options.kNorm && own(options.kNorm).floats,
    });
    const { headTransform } = options;
    if (headTransform) {
      ensure(
        headTransform instanceof RowHadamard && headTransform.channels === headDim,
        'tensor-shape',
        () => `splitHeads takes a Hadamard transform of ${headDim} channels, found ${headTransform.channels}`,
      );
      for (const part of [q, k]) headTransform.apply(part.floats, part.floats);
    }
    return { q, k, v };
  }

  async attention(q: Tensor, k: Tensor, v: Tensor, options: AttentionOptions): Promise<Tensor> {
    const { heads, kvHeads, headDim, batch, scale, window, cache } = options;
    const starts = startsOf(options.start, batch);
    const { rows, cols } = own(q).size;
    const tokens = rows / batch;
    if (options.ends) {
      ensure(
        !cache && batch === rows && options.ends.length === rows,
        'tensor-shape',
        () => `${rows} packed rows are sequences of one token without a cache, found ${batch} sequences`,
      );
      const out = this.#make(rows, cols);
      const forest = { ends: options.ends, positions: starts, roots: forestRoots(options.ends, starts) };
      const operands = { q: own(q).floats, k: own(k).floats, v: own(v).floats, out: out.floats };
      attentionForest(this.#pool, { ...operands, heads, kvHeads, headDim, scale, window, ...forest });
      return out;
    }
    if (cache && !(cache instanceof KvCache || cache instanceof QuantizedKvCache)) throw foreign();
    if (cache instanceof QuantizedKvCache) {
      const out = tokens <= FEW_QUERY_ROWS ? this.#make(rows, cols) : this.#tensors.make([rows, cols]);
      cache.append(own(k).floats, own(v).floats, starts);
      if (tokens <= FEW_QUERY_ROWS) cache.attend(own(q).floats, out.floats, { heads, scale, window, starts });
      else await this.#attendStored(cache, own(q).data, out.data, options, starts);
      return out;
    }
    // ONNX Runtime takes head dimensions in multiples of 8 only.
    if (tokens <= FEW_QUERY_ROWS || headDim % 8 !== 0) {
      const out = tokens <= FEW_QUERY_ROWS ? this.#make(rows, cols) : this.#tensors.make([rows, cols]);
      const [kNew, vNew]: Floats[] = [own(k).floats, own(v).floats];
      cache?.append(kNew, vNew, starts);
      const source = cache ?? { k: kNew, v: vNew };
      attention(this.#pool, {
        q: own(q).floats,
        out: out.floats,
        batch,
        heads,
        kvHeads,
        headDim,
        scale,
        window,
        starts,
        source,
      });
      return out;
    }
    const [data, keys, values] = [own(q).data, own(k).data, own(v).data];
    const out = this.#tensors.make([rows, cols]);
    const kernel = { heads, kvHeads, headDim, scale, window };
    // ONNX Runtime takes a past for one sequence at a time.
    const together = starts.some((start) => start > 0) ? 1 : batch;
    for (let first = 0; first < batch; first += together) {
      const part = (values: Float32Array): Float32Array =>
        values.subarray((first * values.length) / batch, ((first + together) * values.length) / batch);
      const before = pastOf(cache, first, starts[first]);
      await this.#ort.attention(kernel, together, tokens, part(data), part(keys), part(values), before, part(out.data));
    }
    cache?.append(keys, values, starts);
    return out;
  }

  /** Many rows over a cache of integers: what is stored, this call's tokens included, is decoded and attended to. */
  async #attendStored(
    cache: QuantizedKvCache,
    q: Float32Array,
    out: Float32Array,
    options: AttentionOptions,
    starts: Int32Array,
  ): Promise<void> {
    const { heads, kvHeads, headDim, batch, scale, window } = options;
    const tokens = q.length / (batch * heads * headDim);
    const kernel = { heads, kvHeads, headDim, scale, window };
    // ONNX Runtime takes a past for one sequence at a time.
    for (const [b, start] of starts.entries()) {
      const stored = (which: 'keys' | 'values') => {
        const past = new Float32Array(kvHeads * start * headDim);
        const now = new Float32Array(tokens * kvHeads * headDim);
        const head = new Float32Array((start + tokens) * headDim);
        for (let h = 0; h < kvHeads; h++) {
          cache.read(which, b, h, start + tokens, head);
          past.set(head.subarray(0, start * headDim), h * start * headDim);
          for (let t = 0; t < tokens; t++) {
            const at = (start + t) * headDim;
            now.set(head.subarray(at, at + headDim), (t * kvHeads + h) * headDim);
          }
        }
        return { past, now };
      };
      const [k, v] = [stored('keys'), stored('values')];
      const part = (rows: Float32Array): Float32Array =>
        rows.subarray((b * rows.length) / batch, ((b + 1) * rows.length) / batch);
      const before = { tokens: start, k: k.past, v: v.past };
      await this.#ort.attention(kernel, 1, tokens, part(q), k.now, v.now, before, part(out));
    }
  }

  siluMul(gateUp: Tensor): Tensor {
    const { rows, cols } = own(gateUp).size;
    const out = this.#make(rows, cols / 2);
    siluMul(this.#pool, own(gateUp).floats, rows, out.floats);
    return out;
  }

  score(logits: Tensor, targets: Int32Array, reference?: Tensor): RowScores {
    return score(this.#pool, own(logits).data, targets, reference && own(reference).data);
  }
}

/** Handles that live in the arena. */
const RESIDENT = [RowTransform, RowHadamard, RopeTable, KvCache, QuantizedKvCache] as const;

function ownLinear(handle: LinearHandle): CpuLinear {
  if (handle instanceof CpuLinear) return handle;
  throw foreign();
}

/** The first `tokens` cached keys and values of a sequence, [1, kvHeads, tokens, headDim]. */
function pastOf(
  cache: KvCache | undefined,
  sequence: number,
  tokens: number,
): { tokens: number; k: Float32Array; v: Float32Array } {
  if (!cache || tokens === 0) return { tokens: 0, k: new Float32Array(0), v: new Float32Array(0) };
  const { kvHeads, headDim } = cache;
  const size = tokens * headDim;
  const [k, v] = [new Float32Array(kvHeads * size), new Float32Array(kvHeads * size)];
  for (let head = 0; head < kvHeads; head++) {
    cache.read('keys', sequence, head, tokens, k.subarray(head * size, (head + 1) * size));
    cache.read('values', sequence, head, tokens, v.subarray(head * size, (head + 1) * size));
  }
  return { tokens, k, v };
}

function foreign(): GyreError {
  return new GyreError('backend', 'a handle of another backend was given to the CPU backend');
}

/** Bias and residual added to y. */
function finish(y: Float32Array, bias: Float32Array | undefined, residual: Float32Array | undefined): void {
  if (bias) addBias(y, bias);
  if (residual) for (let i = 0; i < residual.length; i++) y[i] += residual[i];
}

/** Rows of y plus bias. */
function addBias(y: Float32Array, bias: Float32Array): void {
  const n = bias.length;
  for (let r = 0; r < y.length; r += n) for (let c = 0; c < n; c++) y[r + c] += bias[c];
}
