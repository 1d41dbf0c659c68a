// ONNX Runtime as a library of kernels: matrix products, int4 products with 8-bit activations, prefill attention.
import type { InferenceSession, Tensor as OrtTensor } from 'onnxruntime-common';
import { GyreError, ensure } from '../../core/errors.js';
import type { AttentionShape, QuantizedWeight } from '../../ops/backend.js';
import { buildOnnxModel, type OnnxValue } from './onnx.js';
import type { Runtime, RuntimeSession } from './runtime-types.js';

type Float = 'f32' | 'f64';
type FloatArray = Float32Array | Float64Array;

/** Operand of {@link OrtKernels.gemm}. */
interface Matrix {
  readonly data: FloatArray;
  readonly rows: number;
  readonly cols: number;
}

/**
 * ONNX Runtime divides the columns of a product that has more of them than rows among threads. Parts of this many or fewer are
 * summed in longer runs than wide ones, so that the result would depend on the threads: such (small) products get one thread.
 */
const NARROW_COLUMNS = 64;

/** Key of an attention kernel. */
export interface AttentionKernel extends AttentionShape {
  readonly scale: number;
  readonly window?: number;
}

/**
 * A set of ONNX Runtime sessions, made on first use. Inputs and outputs are the caller's typed arrays, not copies.
 * Spinning is off: every session has its own thread pool, and idle pools that spin would steal the cores from the next.
 */
export class OrtKernels {
  readonly #runtime: Runtime;
  readonly #threads: number;
  readonly #options: InferenceSession.SessionOptions;
  readonly #sessions = new Map<string, Promise<RuntimeSession>>();

  constructor(runtime: Runtime, threads: number) {
    this.#runtime = runtime;
    this.#threads = threads;
    this.#options = {
      executionProviders: [runtime.name === 'onnxruntime-web' ? 'wasm' : 'cpu'],
      intraOpNumThreads: threads,
      interOpNumThreads: 1,
      executionMode: 'sequential',
      graphOptimizationLevel: 'basic',
      // Outputs are ours; an arena would keep the largest intermediate ever seen.
      enableCpuMemArena: false,
      enableMemPattern: false,
      logSeverityLevel: 3,
      extra: { session: { intra_op: { allow_spinning: '0' } } },
    };
  }

  get name(): string {
    return this.#runtime.name;
  }

  #session(key: string, build: () => Uint8Array, threads = this.#threads): Promise<RuntimeSession> {
    let session = this.#sessions.get(key);
    if (!session) {
      session = this.#runtime.InferenceSession.create(build(), { ...this.#options, intraOpNumThreads: threads });
      this.#sessions.set(key, session);
    }
    return session;
  }

  /** A session of the caller's own, to be released by it. */
  session(build: () => Uint8Array): Promise<RuntimeSession> {
    return this.#runtime.InferenceSession.create(build(), this.#options);
  }

  /** Runs a session from bytes `x` to 32-bit sums `y`. */
  async runIntegers(
    session: RuntimeSession,
    x: Uint8Array,
    xDims: readonly number[],
    y: Int32Array,
    yDims: readonly number[],
  ): Promise<void> {
    const { Tensor } = this.#runtime;
    await session.run({ x: new Tensor('uint8', x, xDims) }, { y: new Tensor('int32', y, yDims) });
  }

  #float(data: FloatArray, dims: readonly number[]): OrtTensor {
    return data instanceof Float32Array
      ? new this.#runtime.Tensor('float32', data, dims)
      : new this.#runtime.Tensor('float64', data, dims);
  }

  /** out = op(a) · op(b), op = transpose or nothing. All three f32 or all f64. */
  async gemm(a: Matrix, transposeA: boolean, b: Matrix, transposeB: boolean, out: FloatArray): Promise<void> {
    const m = transposeA ? a.cols : a.rows;
    const n = transposeB ? b.rows : b.cols;
    const inner = transposeA ? a.rows : a.cols;
    ensure(
      inner === (transposeB ? b.cols : b.rows),
      'tensor-shape',
      () => `matrix product: inner sizes ${inner} and ${transposeB ? b.cols : b.rows} differ`,
    );
    if (m === 0 || n === 0) return;
    const type: Float = out instanceof Float32Array ? 'f32' : 'f64';
    const threads = m < n && n <= NARROW_COLUMNS * this.#threads ? 1 : this.#threads;
    const build = (): Uint8Array =>
      buildOnnxModel({
        nodes: [
          {
            op: 'Gemm',
            inputs: ['a', 'b'],
            outputs: ['y'],
            attributes: { transA: transposeA ? 1 : 0, transB: transposeB ? 1 : 0 },
          },
        ],
        inputs: [
          { name: 'a', type, dims: ['a0', 'a1'] },
          { name: 'b', type, dims: ['b0', 'b1'] },
        ],
        outputs: [{ name: 'y', type, dims: ['m', 'n'] }],
      });
    const session = await this.#session(`gemm ${type} ${transposeA} ${transposeB} ${threads}`, build, threads);
    const feeds = { a: this.#float(a.data, [a.rows, a.cols]), b: this.#float(b.data, [b.rows, b.cols]) };
    await session.run(feeds, { y: this.#float(out.subarray(0, m * n), [m, n]) });
  }

  /**
   * Causal grouped-query attention of a chunk after `past` tokens: q [batch, tokens, heads·d], k and v
   * [batch, tokens, kvHeads·d], pastK and pastV [batch, kvHeads, past, d]; out like q.
   */
  async attention(
    kernel: AttentionKernel,
    batch: number,
    tokens: number,
    q: Float32Array,
    k: Float32Array,
    v: Float32Array,
    past: { readonly tokens: number; readonly k: Float32Array; readonly v: Float32Array },
    out: Float32Array,
  ): Promise<void> {
    const { heads, kvHeads, headDim, scale } = kernel;
    const window = kernel.window ?? -1;
    const session = await this.#session(`attention ${heads} ${kvHeads} ${headDim} ${scale} ${window}`, () => {
      const value = (name: string, dims: OnnxValue['dims'], type: OnnxValue['type'] = 'f32'): OnnxValue => ({
        name,
        type,
        dims,
      });
      return buildOnnxModel({
        nodes: [
          {
            op: 'GroupQueryAttention',
            domain: 'com.microsoft',
            inputs: ['q', 'k', 'v', 'pastK', 'pastV', 'lastIndex', 'total'],
            outputs: ['y', 'presentK', 'presentV'],
            attributes: { num_heads: heads, kv_num_heads: kvHeads, scale: { float: scale }, local_window_size: window },
          },
        ],
        inputs: [
          value('q', ['b', 's', heads * headDim]),
          value('k', ['b', 's', kvHeads * headDim]),
          value('v', ['b', 's', kvHeads * headDim]),
          value('pastK', ['b', kvHeads, 'p', headDim]),
          value('pastV', ['b', kvHeads, 'p', headDim]),
          value('lastIndex', ['b'], 'i32'),
          value('total', [1], 'i32'),
        ],
        outputs: [
          value('y', ['b', 's', heads * headDim]),
          value('presentK', ['b', kvHeads, 't', headDim]),
          value('presentV', ['b', kvHeads, 't', headDim]),
        ],
      });
    });
    const total = past.tokens + tokens;
    const { Tensor } = this.#runtime;
    const pastDims = [batch, kvHeads, past.tokens, headDim];
    await session.run(
      {
        q: this.#float(q, [batch, tokens, heads * headDim]),
        k: this.#float(k, [batch, tokens, kvHeads * headDim]),
        v: this.#float(v, [batch, tokens, kvHeads * headDim]),
        pastK: this.#float(past.k, pastDims),
        pastV: this.#float(past.v, pastDims),
        lastIndex: new Tensor('int32', new Int32Array(batch).fill(total - 1), [batch]),
        total: new Tensor('int32', Int32Array.of(total), [1]),
      },
      {
        y: this.#float(out, [batch, tokens, heads * headDim]),
        presentK: null,
        presentV: null,
      },
    );
  }

  /** A quantized linear whose activations ONNX Runtime rounds to 8 bits per block (MatMulNBits, accuracy level 4). */
  async int8Linear(weight: QuantizedWeight): Promise<Int8Linear> {
    const { inFeatures, outFeatures, bits } = weight;
    // Codes of 3 bits travel as 4; a per-channel grid as blocks with equal scales.
    const storedBits = bits === 3 ? 4 : bits;
    const block = blockSize(weight);
    const repeat = weight.groupSize / block;
    const blocks = inFeatures / block;
    const perByte = 8 / storedBits;
    const packed = new Uint8Array((outFeatures * inFeatures) / perByte);
    for (let i = 0; i < weight.codes.length; i++)
      packed[Math.floor(i / perByte)] |= weight.codes[i] << ((i % perByte) * storedBits);
    const scales = new Float32Array(outFeatures * blocks);
    const zeroBytes = Math.ceil(blocks / perByte);
    const zeros = new Uint8Array(outFeatures * zeroBytes);
    const groups = inFeatures / weight.groupSize;
    for (let o = 0; o < outFeatures; o++) {
      for (let b = 0; b < blocks; b++) {
        const from = o * groups + Math.floor(b / repeat);
        scales[o * blocks + b] = weight.scales[from];
        zeros[o * zeroBytes + Math.floor(b / perByte)] |= weight.zeros[from] << ((b % perByte) * storedBits);
      }
    }
    const session = await this.#runtime.InferenceSession.create(
      buildOnnxModel({
        nodes: [
          {
            op: 'MatMulNBits',
            domain: 'com.microsoft',
            inputs: ['x', 'codes', 'scales', 'zeros'],
            outputs: ['y'],
            attributes: { K: inFeatures, N: outFeatures, bits: storedBits, block_size: block, accuracy_level: 4 },
          },
        ],
        inputs: [{ name: 'x', type: 'f32', dims: ['m', inFeatures] }],
        outputs: [{ name: 'y', type: 'f32', dims: ['m', outFeatures] }],
        initializers: [
          { name: 'codes', type: 'u8', dims: [outFeatures, blocks, block / perByte], bytes: packed },
          { name: 'scales', type: 'f32', dims: [outFeatures * blocks], bytes: new Uint8Array(scales.buffer) },
          { name: 'zeros', type: 'u8', dims: [zeros.length], bytes: zeros },
        ],
      }),
      this.#options,
    );
    return {
      bytes: packed.length + scales.byteLength + zeros.length,
      run: async (x, rows, y) => {
        await session.run({ x: this.#float(x, [rows, inFeatures]) }, { y: this.#float(y, [rows, outFeatures]) });
      },
      release: () => session.release(),
    };
  }

  async dispose(): Promise<void> {
    for (const session of this.#sessions.values()) await (await session).release();
    this.#sessions.clear();
  }
}

/** See {@link OrtKernels.int8Linear}. */
export interface Int8Linear {
  readonly bytes: number;
  run(x: Float32Array, rows: number, y: Float32Array): Promise<void>;
  release(): Promise<void>;
}

/** The block MatMulNBits is given: the group itself, or a divisor of a longer (per-channel) group. */
function blockSize(weight: QuantizedWeight): number {
  const { groupSize } = weight;
  for (const block of [256, 128, 64, 32, 16])
    if (groupSize % block === 0 && (block === groupSize || groupSize > 256)) return block;
  throw new GyreError(
    'unsupported',
    `8-bit activations need a group size that is a power of two between 16 and 256, found ${groupSize}`,
    {
      remedy: 'run with exact activations (--activations exact)',
    },
  );
}
