// The decoder-only transformer, defined once for every family: token ids in, logits out.
import { GyreError, ensure } from '../core/errors.js';
import type { Backend, KvCacheHandle, KvGrid, LinearHandle, RopeHandle, SequenceCopy, Tensor } from '../ops/backend.js';
import type { DecodeBlockSpec, DecodeProgram } from '../ops/decode.js';
import { GROUP_NAMES, type DecoderBlock } from './block.js';
import { contextLength, type ModelConfig } from './config.js';
import { ropeTable } from './rope.js';

/** The weights around the blocks. */
export interface DecoderParts {
  readonly embedding: LinearHandle;
  /** The same handle as `embedding` when tied. */
  readonly head: LinearHandle;
  readonly finalNorm: Tensor;
  readonly blocks: readonly DecoderBlock[];
  /** Keys and values are cached on it; as floats when undefined. */
  readonly kvGrid?: KvGrid;
}

/** Keys and values of the tokens seen so far, one cache per block. */
export class DecoderCache {
  readonly batch: number;
  readonly capacity: number;
  readonly blocks: readonly KvCacheHandle[];
  /** Tokens of each sequence held; the longest one's when `starts` were given to `hidden`. */
  length = 0;

  constructor(batch: number, capacity: number, blocks: readonly KvCacheHandle[]) {
    this.batch = batch;
    this.capacity = capacity;
    this.blocks = blocks;
  }
}

/** Where packed tokens stand, and where what continues each of them ends; see `AttentionOptions.ends`. */
export interface TokenForest {
  readonly positions: Int32Array;
  readonly ends: Int32Array;
}

/** A model ready to run on a backend. */
export class Decoder {
  readonly backend: Backend;
  readonly config: ModelConfig;
  readonly parts: DecoderParts;
  #rope: RopeHandle | undefined;

  constructor(backend: Backend, config: ModelConfig, parts: DecoderParts) {
    this.backend = backend;
    this.config = config;
    this.parts = parts;
  }

  /** Bytes of weights that one decoded token must read. */
  get bytesPerToken(): number {
    return this.parts.blocks.reduce(
      (sum, b) => sum + Object.values(b.groups).reduce((s, g) => s + g.bytes, 0),
      this.parts.head.bytes,
    );
  }

  /** A cache for `batch` sequences of up to `capacity` tokens. @throws GyreError `context-length` beyond the model's context. */
  async createCache(batch: number, capacity: number): Promise<DecoderCache> {
    const { config, backend } = this;
    this.#checkLength(capacity);
    const blocks: KvCacheHandle[] = [];
    for (let i = 0; i < config.layers; i++) {
      const { kvHeads, headDim } = config;
      blocks.push(await backend.createKvCache({ batch, kvHeads, headDim, capacity, grid: this.parts.kvGrid }));
    }
    return new DecoderCache(batch, capacity, blocks);
  }

  releaseCache(cache: DecoderCache): void {
    this.backend.release(...cache.blocks);
  }

  /** Copies sequences between caches of this model; see `InferenceOps.copySequences`. Lengths are the caller's to keep. */
  async copySequences(from: DecoderCache, to: DecoderCache, copies: readonly SequenceCopy[]): Promise<void> {
    for (const [i, block] of from.blocks.entries()) await this.backend.copySequences(block, to.blocks[i], copies);
  }

  /**
   * Residual stream after the last block, normalised: ids [batch × tokens], row-major, continuing `cache` (which is
   * advanced) or from position 0 without one → [batch·tokens, hidden]. With `starts` each sequence continues at its own
   * position: shorter ones are padded on the right with any ids, and the rows of padding mean nothing. With `forest` the ids are
   * tokens of sequences that may share beginnings, packed without padding: each has its position and where what continues it ends
   * (`AttentionOptions.ends`).
   */
  async hidden(
    ids: Int32Array,
    options: { batch?: number; cache?: DecoderCache; starts?: Int32Array; forest?: TokenForest } = {},
  ): Promise<Tensor> {
    const { backend, parts, config } = this;
    const { cache, forest } = options;
    const starts = forest?.positions ?? options.starts;
    const batch = forest ? ids.length : (options.batch ?? cache?.batch ?? 1);
    const tokens = ids.length / batch;
    ensure(
      ids.length > 0 && Number.isInteger(tokens),
      'usage',
      () => `${ids.length} token ids do not split into ${batch} sequences`,
    );
    const start = starts ? starts.reduce((most, own) => Math.max(most, own), 0) : (cache?.length ?? 0);
    if (cache && start + tokens > cache.capacity) {
      throw new GyreError('context-length', `${start + tokens} tokens do not fit a cache of ${cache.capacity}`, {
        remedy: 'shorten the prompt, generate fewer tokens, or make a larger cache',
      });
    }
    for (const id of ids)
      ensure(
        id >= 0 && id < config.vocabSize,
        'usage',
        () => `token id ${id} is outside the vocabulary of ${config.vocabSize}`,
      );
    const rope = await this.rope(start + tokens);
    let x = await backend.embed(parts.embedding, ids);
    for (const [i, block] of parts.blocks.entries()) {
      const context = { batch, start: starts ?? start, rope, cache: cache?.blocks[i], ends: forest?.ends };
      const y = await block.forward(x, context);
      backend.free(x);
      x = y;
    }
    if (cache) cache.length = start + tokens;
    const normed = await backend.rmsNorm(x, parts.finalNorm, config.rmsNormEps);
    backend.free(x);
    return normed;
  }

  /**
   * The backend's fast way to decode sequences that go on from `cache`, or undefined where it has none for this model. The cache
   * must be as long as `capacity` says until the program is released.
   */
  async prepareDecode(cache: DecoderCache): Promise<DecodeProgram | undefined> {
    const { backend, config, parts } = this;
    // Dynamic NTK changes the angles as a sequence grows.
    if (!backend.prepareDecode || config.ropeScaling.type === 'dynamic') return undefined;
    const blocks: DecodeBlockSpec[] = [];
    for (const [i, { frame, groups }] of parts.blocks.entries()) {
      const [qkv, o, gateUp, down] = GROUP_NAMES.map((name) => groups[name].decodeProducts);
      if (!qkv || !o || !gateUp || !down) return undefined;
      const { input, postAttention, q, k } = frame.norms;
      const window = config.windows[frame.layer];
      blocks.push({
        inputNorm: input,
        postAttentionNorm: postAttention,
        qNorm: q,
        kNorm: k,
        qkv,
        o,
        gateUp,
        down,
        cache: cache.blocks[i],
        window,
        headTransform: frame.online.transform,
      });
    }
    return backend.prepareDecode({
      hidden: config.hiddenSize,
      intermediate: config.intermediateSize,
      vocab: config.vocabSize,
      heads: config.heads,
      kvHeads: config.kvHeads,
      headDim: config.headDim,
      eps: config.rmsNormEps,
      embedding: parts.embedding,
      head: parts.head,
      finalNorm: parts.finalNorm,
      rope: await this.rope(cache.capacity),
      blocks,
    });
  }

  /** hidden [rows, hidden] → logits [rows, vocab]. */
  logits(hidden: Tensor): Tensor | Promise<Tensor> {
    return this.backend.linear(hidden, this.parts.head);
  }

  /**
   * Rotary tables that cover `positions` tokens. Dynamic NTK scaling depends on the length, as in Transformers: the
   * tables change when a sequence outgrows the trained context, and keys already cached keep their angles.
   */
  async rope(positions: number): Promise<RopeHandle> {
    this.#checkLength(positions);
    const { config, backend } = this;
    const dynamic = config.ropeScaling.type === 'dynamic' && positions > config.maxPositions;
    if (this.#rope && this.#rope.positions >= positions && !dynamic) return this.#rope;
    const covered = dynamic ? positions : Math.max(Math.min(2 * positions, contextLength(config)), positions);
    const table = ropeTable(config, covered, dynamic ? positions : undefined);
    backend.release(this.#rope);
    this.#rope = await backend.loadRope(table.cos, table.sin, table.rotaryDim);
    return this.#rope;
  }

  #checkLength(tokens: number): void {
    // Dynamic NTK adapts its angles to any length; how far to trust it is for whoever asks.
    if (this.config.ropeScaling.type === 'dynamic') return;
    const limit = contextLength(this.config);
    if (tokens > limit) {
      throw new GyreError('context-length', `${tokens} tokens are more than the model's context of ${limit}`, {
        remedy: 'shorten the prompt or ask for fewer tokens',
      });
    }
  }

  /** Frees the weights; the backend stays usable. */
  release(): void {
    const { backend, parts } = this;
    for (const block of parts.blocks) block.release();
    backend.free(parts.finalNorm);
    backend.release(this.#rope, parts.embedding);
    if (parts.head !== parts.embedding) backend.release(parts.head);
  }
}
