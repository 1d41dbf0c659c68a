// The op contract: everything the decoder and the quantizers ask of a machine. A backend implements this and nothing else.
//
// Conventions: tensors are f32, dense, row-major; `rows` = batch × tokens. Ops never change their inputs. An op may
// return its result or a promise of it (kernels are synchronous on the CPU, asynchronous elsewhere): callers await.
// Every op has a float64 oracle in ops/reference, and test/conformance runs each op on each backend against it.
import type { HostTensor } from '../core/tensor.js';
import type { DecodeProgram, DecodeSpec } from './decode.js';
import type { GradientOps } from './gradients.js';

export type Awaitable<T> = T | Promise<T>;

/** A float32 tensor that lives on a backend. Opaque: only the backend that made it can read it. */
export interface Tensor {
  readonly shape: readonly number[];
}

/** Bit widths of quantized weights. */
export type WeightBits = 2 | 3 | 4 | 8;

/**
 * An integer grid over groups of input channels (§4.2 of the design: value = (code − zero) · scale). Asymmetric from the
 * range [min, max] unless `symmetric`: then scale = max|w| / (2ᵇ⁻¹ − 1), as an f16 of at least 2^-14, and zero = 2ᵇ⁻¹.
 */
export interface GridSpec {
  readonly bits: WeightBits;
  /** Input channels per group; the whole input (per channel) when equal to it. Divides the input. */
  readonly groupSize: number;
  /** Default false. Refused by {@link QuantizationOps.createObjective}. */
  readonly symmetric?: boolean;
}

/**
 * A dynamic grid of activations, found anew for every row and every run of `groupSize` channels in it, in f32.
 *
 * Symmetric: scale = clip · max|x| / (2ᵇ⁻¹ − 1), code = clamp(round(x / scale), −2ᵇ⁻¹, 2ᵇ⁻¹ − 1), value = code · scale.
 * Asymmetric: low = mid − clip · half, scale = 2 · clip · half / (2ᵇ − 1) with mid, half = (max ± min) / 2,
 * code = clamp(round((x − low) / scale), 0, 2ᵇ − 1), value = low + code · scale. Ties go to even; with scale 0 the value is
 * 0 or low.
 */
export interface ActivationGrid {
  readonly bits: 4 | 8;
  readonly symmetric: boolean;
  /** Channels per grid; −1: the whole row (per token). Divides the row. */
  readonly groupSize: number;
  /** Share of the range that is kept, in (0, 1]. */
  readonly clip: number;
}

/** Grids of stored keys and values: asymmetric ({@link ActivationGrid}), one per token and head of each. */
export interface KvGrid {
  readonly bits: 4 | 8;
  /** Share of the range that is kept, in (0, 1]. */
  readonly clip: number;
}

/** A linear layer's weight quantized to integers, as plain host arrays. */
export interface QuantizedWeight extends GridSpec {
  readonly inFeatures: number;
  readonly outFeatures: number;
  /** [out, in], one code per byte, 0 … 2^bits − 1. */
  readonly codes: Uint8Array;
  /** [out, in / groupSize], zero points, 0 … 2^bits − 1. */
  readonly zeros: Uint8Array;
  /** [out, in / groupSize]; values exactly representable in f16. */
  readonly scales: Float32Array;
}

/**
 * A linear layer: `y = x · Wᵀ + bias`, W [out, in]. With `activations`, x is rounded onto that grid first: the product is
 * that of the rounded values, whether a backend multiplies them or their integer codes.
 */
export type LinearSource =
  | {
      readonly kind: 'dense';
      readonly weight: HostTensor;
      readonly bias?: Float32Array;
      readonly activations?: ActivationGrid;
    }
  | {
      readonly kind: 'quantized';
      readonly weight: QuantizedWeight;
      readonly bias?: Float32Array;
      readonly activations?: ActivationGrid;
    };

/** A linear layer resident on a backend. */
export interface LinearHandle {
  readonly inFeatures: number;
  readonly outFeatures: number;
  /** Bytes one product with one row must read: weights, scales and zero points. */
  readonly bytes: number;
}

/**
 * A learned transform of a linear's input (ParoQuant §3, design §4.1): `x ← x ⊙ channelScales`, then for
 * k = 0 … krot−1, for each pair (i, j) of rotation k: `(x_i, x_j) ← (x_i cosθ + x_j sinθ, x_j cosθ − x_i sinθ)`.
 */
export interface PairwiseTransform {
  readonly kind?: 'pairwise';
  /** Input channels. */
  readonly channels: number;
  readonly groupSize: number;
  readonly krot: number;
  /** [krot, channels]: a permutation inside each group, read two by two as (i, j), local to the group. */
  readonly pairs: Int16Array;
  /** [krot, channels / 2], radians. */
  readonly theta: Float32Array;
  /** [channels]: a, multiplies activations (weights are multiplied by 1 / a). */
  readonly channelScales: Float32Array;
}

/**
 * The orthonormal Hadamard transform y = H·x / √n along one axis of channels seen as [outer, n, inner] (n = order,
 * outer = channels / (n · inner)): over runs of n channels with inner = 1, across heads with inner = headDim. H = B ⊗ S,
 * with B a Hadamard matrix of order m and S Sylvester's of order p = n / m, a power of two:
 * H[a·p + b][c·p + d] = B[a][c] · (−1)^popcount(b & d). Its inverse is Hᵀ / √n; B need not be symmetric.
 */
export interface HadamardTransform {
  readonly kind: 'hadamard';
  readonly channels: number;
  /** n. */
  readonly order: number;
  /** Channels between two neighbours of the transformed axis; 1 unless it goes across heads. */
  readonly inner: number;
  /** B [m, m], row-major, ±1; [1] when n is a power of two. */
  readonly base: Int8Array;
}

/** Transforms of a linear's input. */
export type InputTransform = PairwiseTransform | HadamardTransform;

/** A transform resident on a backend. */
export interface TransformHandle {
  readonly channels: number;
}

/** Rotary position tables resident on a backend: cos and sin per position and frequency. */
export interface RopeHandle {
  /** Positions covered: 0 … positions − 1. */
  readonly positions: number;
}

/** One decoder block's key/value cache resident on a backend. */
export interface KvCacheHandle {
  readonly batch: number;
  /** Tokens per sequence it can hold. */
  readonly capacity: number;
}

/** Arguments of {@link InferenceOps.createKvCache}. */
export interface KvCacheShape {
  readonly batch: number;
  readonly kvHeads: number;
  readonly headDim: number;
  readonly capacity: number;
  /** Stores keys and values in so many bits; floats when undefined. */
  readonly grid?: KvGrid;
}

/** A number for all sequences of a batch alike, or one for each: [batch]. */
export type PerSequence = number | Int32Array;

/** One sequence of {@link InferenceOps.copySequences}. */
export interface SequenceCopy {
  /** Sequence of the source cache. */
  readonly from: number;
  /** Sequence of the target cache. */
  readonly to: number;
  /** Positions 0 … tokens − 1 are copied. */
  readonly tokens: number;
}

/** Shape of grouped-query attention. */
export interface AttentionShape {
  readonly heads: number;
  readonly kvHeads: number;
  readonly headDim: number;
}

/** Arguments of {@link InferenceOps.splitHeads}. */
export interface SplitHeadsOptions extends AttentionShape {
  readonly batch: number;
  /** Position of the first token of each sequence in `qkv`. */
  readonly start: PerSequence;
  readonly rope: RopeHandle;
  /** RMSNorm weights [headDim] over each head of q and k before RoPE (Qwen3). */
  readonly qNorm?: Tensor;
  readonly kNorm?: Tensor;
  readonly eps: number;
  /** Turns every head of q and of k after RoPE (a transform of headDim channels): q·k stays, outliers of k spread. */
  readonly headTransform?: TransformHandle;
}

/** Arguments of {@link InferenceOps.attention}. */
export interface AttentionOptions extends AttentionShape {
  readonly batch: number;
  /** Factor on q·k, normally headDim^-0.5. */
  readonly scale: number;
  /** A token sees itself and the window − 1 tokens before it; all earlier ones when undefined. */
  readonly window?: number;
  /**
   * Keys and values of earlier tokens; this call's are appended at `start`. Without it the chunk attends to itself. With a
   * cache on a grid all of them, this call's too, are attended to as stored: what quantizeRows makes of k and v with
   * groupSize = headDim.
   */
  readonly cache?: KvCacheHandle;
  /**
   * Tokens of each sequence already in the cache (0 without one). Sequences of unlike lengths share a call: what lies in
   * the cache from a sequence's start on, padding of an earlier call say, is overwritten and never attended to.
   */
  readonly start: PerSequence;
  /**
   * Sequences packed row after row without padding, which may share their beginnings: a forest of tokens in preorder. Each
   * row is given as a sequence of one token (`batch` = rows, `start` its position, without a cache) and sees the rows j up to
   * its own with row < ends[j], where ends[j] is the first row after all that continues token j; they stand at the
   * positions 0 … its own. See {@link forestRoots}. The layers of a pass are given the same array, which stays as it is.
   */
  readonly ends?: Int32Array;
}

/** Scores of rows of logits against the next tokens; see {@link InferenceOps.score}. */
export interface RowScores {
  /** −log p(target), nats. */
  readonly nll: Float64Array;
  /** 1 where the target is the most likely token, the first of equals. */
  readonly hit: Uint8Array;
  /** KL(reference ‖ logits), nats; present when a reference was given. */
  readonly kl?: Float64Array;
  /** 1 where the two argmaxes agree; present when a reference was given. */
  readonly agree?: Uint8Array;
}

/** Ops of the forward pass. */
export interface InferenceOps {
  /** Copies values in; any float dtype becomes f32. */
  upload(tensor: HostTensor): Awaitable<Tensor>;
  /** Copies values out, row-major. */
  download(tensor: Tensor): Promise<Float32Array>;
  /** Frees tensors now; those never freed are reclaimed with the backend. */
  free(...tensors: readonly (Tensor | undefined)[]): void;
  /** A view of rows [begin, end). Valid while `tensor` is. */
  sliceRows(tensor: Tensor, begin: number, end: number): Tensor;
  /** Rows of x [n, cols] in the order of `rows`, of which some may be missing and some repeated: [rows.length, cols]. */
  gatherRows(x: Tensor, rows: Int32Array): Awaitable<Tensor>;
  /** [rows, a], [rows, b], … → [rows, a + b + …]. */
  concatColumns(parts: readonly Tensor[]): Awaitable<Tensor>;

  loadLinear(source: LinearSource): Promise<LinearHandle>;
  loadTransform(transform: InputTransform): Awaitable<TransformHandle>;
  /** cos, sin: [positions, rotaryDim / 2], attention scaling folded in. */
  loadRope(cos: Float32Array, sin: Float32Array, rotaryDim: number): Awaitable<RopeHandle>;
  createKvCache(shape: KvCacheShape): Awaitable<KvCacheHandle>;
  /**
   * Copies sequences between two caches of one shape (batch and capacity may differ), or within one: forks of a common
   * prompt, sequences that move to a larger cache. No sequence may be written that the same call reads.
   */
  copySequences(from: KvCacheHandle, to: KvCacheHandle, copies: readonly SequenceCopy[]): Awaitable<void>;
  /** Frees what load… and create… made. */
  release(...handles: readonly (LinearHandle | TransformHandle | RopeHandle | KvCacheHandle | undefined)[]): void;

  /** Rows of a linear's weight [vocab, hidden] (tied embeddings share the head's handle): ids → [ids.length, hidden]. */
  embed(table: LinearHandle, ids: Int32Array): Awaitable<Tensor>;
  /** x · weight / sqrt(mean(x²) + eps), per row. x [rows, n], weight [n]. */
  rmsNorm(x: Tensor, weight: Tensor, eps: number): Awaitable<Tensor>;
  /** The transform on each row of x [rows, channels]. */
  rotate(x: Tensor, transform: TransformHandle): Awaitable<Tensor>;
  /** Rounds x [rows, n] onto dynamic grids and returns the values. */
  quantizeRows(x: Tensor, grid: ActivationGrid): Awaitable<Tensor>;
  /** x [rows, in] → [rows, out], plus `residual` [rows, out] when given. */
  linear(x: Tensor, weight: LinearHandle, residual?: Tensor): Awaitable<Tensor>;
  /**
   * Merged projections qkv [batch·tokens, (heads + 2·kvHeads)·headDim] → q [rows, heads·headDim], k, v
   * [rows, kvHeads·headDim], with the optional per-head norms and RoPE (half-split, as in Hugging Face) applied to q and k.
   */
  splitHeads(qkv: Tensor, options: SplitHeadsOptions): Awaitable<{ q: Tensor; k: Tensor; v: Tensor }>;
  /** Causal grouped-query attention: [rows, heads·headDim]. */
  attention(q: Tensor, k: Tensor, v: Tensor, options: AttentionOptions): Awaitable<Tensor>;
  /** Merged gate and up [rows, 2·n] → silu(gate) · up [rows, n]. */
  siluMul(gateUp: Tensor): Awaitable<Tensor>;
  /**
   * Scores logits [rows, vocab] against targets [rows], and against reference logits [rows, vocab] when given. All of them may be
   * freed or changed once the call has returned, while its promise is still open: machines that take commands get their next ones
   * before the scores are read.
   */
  score(logits: Tensor, targets: Int32Array, reference?: Tensor): Awaitable<RowScores>;
}

/** A weight rounded onto a grid; `values` is (code − zero) · scale in channel-major order. */
export interface RoundedWeight {
  /** [in, cols], one code per byte. */
  readonly codes: Uint8Array;
  /** [in / groupSize, cols]. */
  readonly zeros: Uint8Array;
  /** [in / groupSize, cols], f16-representable. */
  readonly scales: Float32Array;
  /** [in, cols]. */
  readonly values: Tensor;
}

/** Gradients of the layer objective with respect to the transform. */
export interface TransformGradient {
  /** [krot, channels / 2]. */
  readonly theta: Float64Array;
  /** [channels], with respect to the weight-side scales s = 1 / a. */
  readonly scales: Float64Array;
}

/**
 * Ŵ(θ, s) = T⁻¹(Q(T(W))) of one weight matrix and its gradient, for learning a transform (design §4.3).
 * Holds W and intermediate results on the backend between the two calls.
 */
export interface TransformObjective {
  /** Ŵ [in, cols] for these parameters. theta [krot, in/2], scales [in] (weight side, s). The tensor is valid until the next call. */
  forward(theta: Float32Array | Tensor, scales: Float32Array | Tensor): Awaitable<Tensor>;
  /** Gradients at the last forward point, given ∂L/∂Ŵ [in, cols]; straight-through for round and clamp. */
  backward(gradient: Tensor): Awaitable<TransformGradient>;
  /** The same as tensors theta [krot, in/2] and scales [in], which are the caller's to free. */
  backwardOn(gradient: Tensor): Awaitable<{ readonly theta: Tensor; readonly scales: Tensor }>;
  dispose(): void;
}

/** Options of {@link QuantizationOps.matmul}. */
export interface MatmulOptions {
  readonly transposeA?: boolean;
  readonly transposeB?: boolean;
  /**
   * `f16` allows operands to be rounded to f16, each scaled by a power of two so that its largest value is well inside the
   * range: |error| ≤ 2^-10·|op(a)|·|op(b)| beside f32's, sums in f32. Backends do so where matrix units make it faster, and
   * multiply in f32 elsewhere. Default f32.
   */
  readonly precision?: 'f32' | 'f16';
}

/**
 * Ops of quantization. Weights here are channel-major: [in, cols] = Wᵀ, so that a channel is a contiguous row and
 * grouping, rotating and rounding run along rows (cols = output features).
 */
export interface QuantizationOps {
  /** a [m, k] · b [k, n] with optional transposes of either (shapes before transposing are the stored ones). */
  matmul(a: Tensor, b: Tensor, options?: MatmulOptions): Awaitable<Tensor>;
  /** acc + scale · x, elementwise, into a new tensor, or into `acc` itself when `inPlace`. */
  addScaled(acc: Tensor, x: Tensor, scale: number, inPlace?: boolean): Awaitable<Tensor>;
  /** [m, n] → [n, m]. */
  transpose(x: Tensor): Awaitable<Tensor>;
  /** Σ a·b over all elements, accumulated in f64. */
  dot(a: Tensor, b: Tensor): Awaitable<number>;
  /** The diagonal of a square matrix [n, n]. */
  diagonal(x: Tensor): Awaitable<Float32Array>;
  /** Columns of x [rows, cols] in the order of `columns`: [rows, columns.length]. */
  gatherColumns(x: Tensor, columns: Int32Array): Awaitable<Tensor>;
  /** Each row of x [rows, n] times its own factor [rows]. */
  scaleRows(x: Tensor, factors: Float32Array): Awaitable<Tensor>;
  /** Σ of squares of each row of x [rows, n]: [rows]. */
  rowSquares(x: Tensor): Awaitable<Float32Array>;

  /**
   * T on a weight's channels: [in, cols] ⊙ s (s = 1 / channelScales), then the rotations; or the inverse (rotations
   * backwards, then ÷ s). For a symmetric matrix H apply it on both sides by transposing in between.
   * `side` 'activation' uses a instead of s: T⁻ᵀ forward, Tᵀ inverse. A resident pairwise transform spares its way there.
   */
  transformChannels(
    w: Tensor,
    transform: PairwiseTransform | TransformHandle,
    direction: 'forward' | 'inverse',
    side?: 'weight' | 'activation',
  ): Awaitable<Tensor>;
  createObjective(
    w: Tensor,
    transform: Pick<PairwiseTransform, 'channels' | 'groupSize' | 'krot' | 'pairs'>,
    grid: GridSpec,
  ): Awaitable<TransformObjective>;

  /** Rounding to nearest per group and column on min–max (or symmetric) grids (design §4.2). `clip` [in/groupSize, cols] shrinks each range (1 = none). */
  roundToNearest(w: Tensor, grid: GridSpec, clip?: Float32Array): Awaitable<RoundedWeight>;
  /**
   * For every group and column the factor on its range, of those in `ratios`, with the least error
   * (w − ŵ)ᵀ·H_gg·(w − ŵ), H_gg the group's block on the diagonal of `gram` [in, in]; the first of equal ones.
   * [in / groupSize, cols].
   */
  searchClip(w: Tensor, gram: Tensor, grid: GridSpec, ratios: readonly number[]): Awaitable<Float32Array>;
  /**
   * GPTQ: rounds rows in order, spreading each row's error over the rows after it with `factor` [in, in], the upper
   * Cholesky factor of H⁻¹ (see {@link QuantizationOps.gptqFactor}). Grids are set per group when it is reached, from
   * the updated weights. `clip` as in roundToNearest.
   */
  gptq(w: Tensor, factor: Tensor, grid: GridSpec, clip?: Float32Array): Awaitable<RoundedWeight>;
  /**
   * Coordinate descent: visits channels in order, `sweeps` times, and moves each code to the grid value nearest its
   * optimum given all others, under tr((Ŵ−W)ᵗ·H·(Ŵ−W)). Grids stay as they are; the error never grows but by rounding
   * of the sums. w, rounded [in, cols], gram [in, in].
   */
  descend(w: Tensor, rounded: RoundedWeight, gram: Tensor, grid: GridSpec, sweeps: number): Awaitable<RoundedWeight>;
  /**
   * Fits the grids to their codes: visits groups in order, `passes` times, and moves each group's scale to its least-squares
   * optimum given all others, under tr((Ŵ−W)ᵗ·H·(Ŵ−W)), rounded to f16. Codes and zero points stay. A scale moves
   * only where that lowers the error, and stays within half and twice what it was and f16's normal range. w, rounded
   * [in, cols], gram [in, in].
   */
  refitScales(
    w: Tensor,
    rounded: RoundedWeight,
    gram: Tensor,
    grid: GridSpec,
    passes: number,
  ): Awaitable<RoundedWeight>;
  /** Upper-triangular U with UᵀU = (H + damp·mean(diag H)·I)⁻¹, in f64 inside. Throws `non-finite` if H is not positive definite after damping. */
  gptqFactor(h: Tensor, damp: number): Promise<Tensor>;
  /** Solves X (H + λI) = B for X: B [m, n], H [n, n] symmetric positive definite, λ = damp · mean(diag H). f64 inside. */
  solveSymmetric(h: Tensor, b: Tensor, damp: number): Promise<Tensor>;
}

/** What a backend says of itself (`gyre doctor`, results JSON). */
export interface BackendInfo {
  readonly name: string;
  /** e.g. "onnxruntime-node 1.30.0 + WebAssembly SIMD, 2 threads". */
  readonly description: string;
  readonly threads: number;
  /** Of the forward pass over many rows, where a backend has a choice: f16 rounds activations inside blocks. */
  readonly precision?: 'f32' | 'f16';
  /** What keeps the machine busy, where that is more than callers would ask of a processor. */
  readonly pass?: {
    /** Rows of a forward pass. */
    readonly rows: number;
    /** Bytes of logits held at a time. */
    readonly logitsBytes: number;
  };
}

/** A machine gyre can run on. */
export interface Backend extends InferenceOps, QuantizationOps {
  readonly info: BackendInfo;
  /** Ops of training, where the backend has them; see `requireGradients`. */
  readonly gradients?: GradientOps;
  /**
   * A faster way to decode a whole model than op by op, on backends that have one; undefined when it doesn't take this
   * model. The handles stay the caller's and must outlive the program.
   */
  prepareDecode?(spec: DecodeSpec): Promise<DecodeProgram | undefined>;
  /** Most sequences that {@link prepareDecode} takes. */
  readonly decodeSequences?: number;
  /** Bytes of a key or value in a cache without a grid; default 4. */
  readonly cacheValueBytes?: number;
  /** Frees everything; the backend can't be used after. */
  dispose(): Promise<void>;
}
