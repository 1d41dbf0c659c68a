// Continuous batching: many texts written at once, each at its own position. A text that ends leaves its place to the next
// one; equal prompts are computed once and forked; the cache grows with the longest text and the batch shrinks at the end. Steps
// run by the backend's own program where it has one for the model, op by op where it hasn't.
import { GyreError, ensure } from '../core/errors.js';
import { silent, type ProgressListener } from '../core/progress.js';
import { createRng, type Rng } from '../core/rng.js';
import { contextLength } from '../models/config.js';
import type { Decoder, DecoderCache } from '../models/decoder.js';
import type { SequenceCopy } from '../ops/backend.js';
import type { TokenChoice } from '../ops/decode.js';
import { createBreath } from './breathe.js';
import { FusedBatch, type FusedSequence } from './fused-batch.js';
import { prefillRows } from './prefill-rows.js';
import { createSampler, type SamplingOptions } from './sampler.js';

/** Bytes of keys and values held, unless told otherwise: in the machine's memory, and in that of a GPU that decodes many at once. */
const CACHE_BYTES = 2 ** 30;
const FUSED_CACHE_BYTES = 4 * 2 ** 30;
/** Caches grow in steps of so many tokens at least. */
const GROWTH = 64;

/** A text to be written. */
export interface ContinuousRequest {
  /** At least one token. */
  readonly prompt: Int32Array;
  /** Tokens at most; fewer when the model's context is full. */
  readonly maxTokens: number;
  /** The text draws from this fork of the seed's stream, whatever is written beside it. */
  readonly stream: string | number;
}

/** A text that is finished. */
export interface ContinuousText {
  /** Generated ids, without prompt and stop id. */
  readonly ids: Int32Array;
  readonly reason: 'eos' | 'length';
}

/** Options of {@link generateContinuously}. */
export interface ContinuousOptions extends SamplingOptions {
  /** Texts under way at a time; default 32, which is also the most where the backend decodes by a program of its own. */
  readonly slots?: number;
  /** Default 0. */
  readonly seed?: number;
  /** Ids that end a text; default the model's end-of-text ids. */
  readonly stopIds?: readonly number[];
  /** Bytes of keys and values at most; when texts grow beyond, the youngest waits and is taken up again later. Default 1 GiB, 4 GiB on a GPU. */
  readonly cacheBytes?: number;
  /** Called as texts finish, in that order. */
  readonly onFinished?: (index: number, text: ContinuousText) => void | Promise<void>;
  /** Stage `generate`, in tokens, a text that ends early counting as whole; the message says texts and tokens per second. */
  readonly onProgress?: ProgressListener;
  readonly signal?: AbortSignal;
}

/** What {@link generateContinuously} returns. */
export interface ContinuousSummary {
  readonly texts: readonly ContinuousText[];
  /** Prompt tokens that went through the model: equal prompts that are forked count once. */
  readonly promptTokens: number;
  readonly generatedTokens: number;
  readonly seconds: number;
}

/** A text under way or waiting. */
class Writer implements FusedSequence {
  readonly index: number;
  readonly promptLength: number;
  /** Prompt and what was generated. */
  readonly ids: number[];
  /** Most tokens `ids` may come to. */
  readonly limit: number;
  readonly rng: Rng;
  /** For backends that choose tokens themselves. */
  readonly choice: TokenChoice;
  /** Tokens its place in the cache holds. */
  room = 0;

  constructor(index: number, request: ContinuousRequest, context: number, rng: Rng, sampling: SamplingOptions) {
    const { temperature = 0, topK = 0, topP = 1 } = sampling;
    this.index = index;
    this.promptLength = request.prompt.length;
    this.ids = [...request.prompt];
    this.limit = Math.min(context, this.promptLength + request.maxTokens);
    this.rng = rng;
    this.choice = { temperature, topK, topP, seed: rng.fork('choice').nextUint32() };
  }

  /** The token that is fed next. */
  get token(): number {
    return this.ids[this.position];
  }

  /** Position of the token that is fed next: all before it are in the cache. */
  get position(): number {
    return this.ids.length - 1;
  }

  /** Tokens the cache may come to before it has to grow or the text is over. */
  get end(): number {
    return Math.min(this.room, this.limit - 1);
  }

  get generated(): number {
    return this.ids.length - this.promptLength;
  }
}

/**
 * Writes texts after many prompts. Results are in the order of the requests; each is what it would be alone, but for the
 * rounding of sums in batches of other sizes, and whatever is written beside it.
 * @throws GyreError `usage`, `context-length` for a prompt that leaves no room, `out-of-memory` when one text alone does not
 * fit the cache, `interrupted`.
 */
export async function generateContinuously(
  decoder: Decoder,
  requests: readonly ContinuousRequest[],
  options: ContinuousOptions = {},
): Promise<ContinuousSummary> {
  const { slots = 32, seed = 0, onFinished, onProgress = silent } = options;
  ensure(Number.isInteger(slots) && slots >= 1, 'usage', () => `slots must be at least 1, found ${slots}`);
  const context = contextLength(decoder.config);
  const rng = createRng(seed);
  const texts: ContinuousText[] = new Array<ContinuousText>(requests.length);
  const begun = performance.now();
  const writers: Writer[] = [];
  let finished = 0;
  const finish = async (writer: Writer, reason: ContinuousText['reason']): Promise<void> => {
    const text = { ids: Int32Array.from(writer.ids.slice(writer.promptLength)), reason };
    texts[writer.index] = text;
    finished++;
    await onFinished?.(writer.index, text);
  };
  const batch = new Batch(decoder, slots, options);
  const waiting: Writer[] = [];
  for (const [index, request] of requests.entries()) {
    const { length } = request.prompt;
    ensure(length > 0, 'usage', 'a prompt holds no tokens', 'Give a prompt of at least one word.');
    ensure(
      length < context,
      'context-length',
      () => `a prompt has ${length} tokens, the model's context is ${context} and must hold the answer too`,
      `Shorten the prompt to fewer than ${context} tokens.`,
    );
    const writer = new Writer(index, request, context, rng.fork(request.stream), options);
    writers.push(writer);
    if (writer.limit > length) waiting.push(writer);
    else await finish(writer, 'length');
  }
  const breathe = createBreath();
  const report = (): void => {
    const seconds = (performance.now() - begun) / 1000;
    const speed = (batch.generatedTokens / seconds).toFixed(0);
    const rooms = writers.map(({ limit, promptLength }) => limit - promptLength);
    onProgress({
      stage: 'generate',
      done: writers.reduce((sum, { index, generated }, i) => sum + (texts[index] ? rooms[i] : generated), 0),
      total: rooms.reduce((sum, room) => sum + room, 0),
      unit: 'tokens',
      message: `${finished} of ${requests.length} texts, ${batch.active} at once, ${speed} tokens/s`,
    });
  };
  let reported = 0;
  try {
    while (waiting.length > 0 || batch.active > 0) {
      await breathe();
      if (options.signal?.aborted)
        throw new GyreError('interrupted', 'generation was interrupted', {
          remedy: 'Run it again: what is done is kept.',
        });
      await batch.admit(waiting);
      for (const [writer, reason] of await batch.step()) await finish(writer, reason);
      if (performance.now() - reported > 200) {
        report();
        reported = performance.now();
      }
    }
  } finally {
    batch.release();
  }
  report();
  return {
    texts,
    promptTokens: batch.promptTokens,
    generatedTokens: batch.generatedTokens,
    seconds: (performance.now() - begun) / 1000,
  };
}

/** Texts under way and their cache. */
class Batch {
  readonly #decoder: Decoder;
  readonly #slots: number;
  /** Whether the backend has programs for models it takes. */
  readonly #mayFuse: boolean;
  /** Tokens that the cache may hold, over all sequences. */
  readonly #room: number;
  readonly #stopIds: ReadonlySet<number>;
  readonly #sampler: ReturnType<typeof createSampler>;
  /** Who holds which sequence of the cache; undefined where a text has ended. */
  #places: (Writer | undefined)[] = [];
  #cache: DecoderCache | undefined;
  /** Tokens of each sequence that the cache is for. */
  #capacity = 0;
  /** The backend's program for this cache; undefined where steps run op by op. */
  #fused: FusedBatch<Writer> | undefined;
  promptTokens = 0;
  generatedTokens = 0;

  constructor(decoder: Decoder, slots: number, options: ContinuousOptions) {
    const { layers, kvHeads, headDim, eosTokenIds } = decoder.config;
    const { decodeSequences, cacheValueBytes = 4 } = decoder.backend;
    this.#mayFuse = decodeSequences !== undefined;
    const bytes = options.cacheBytes ?? (this.#mayFuse ? FUSED_CACHE_BYTES : CACHE_BYTES);
    this.#decoder = decoder;
    this.#slots = Math.min(slots, decodeSequences ?? slots);
    this.#room = Math.floor(bytes / (layers * kvHeads * headDim * 2 * cacheValueBytes));
    this.#stopIds = new Set(options.stopIds ?? eosTokenIds);
    this.#sampler = createSampler(options);
  }

  get active(): number {
    return this.#writers().length;
  }

  #writers(): Writer[] {
    return this.#places.filter((writer) => writer !== undefined);
  }

  /**
   * Takes writers up while there are places and room, and makes sure that every sequence can grow by a token. What has
   * to give up its place goes back to the front of those waiting.
   */
  async admit(waiting: Writer[]): Promise<void> {
    let current = this.#writers();
    const taken: Writer[] = [];
    const width = (): number => Math.max(...[...current, ...taken].map((writer) => writer.position + 1));
    while (waiting.length > 0 && current.length + taken.length < this.#slots) {
      const count = current.length + taken.length;
      const tokens = Math.max(count > 0 ? width() : 0, waiting[0].position + 1 + GROWTH);
      if (count > 0 && (count + 1) * tokens > this.#room) break;
      taken.push(waiting.shift() as Writer);
    }
    const before = current.length;
    while (current.length > 1 && (current.length + taken.length) * width() > this.#room) {
      // The youngest has the least to do again.
      const youngest = taken.pop() ?? current.reduce((a, b) => (b.generated < a.generated ? b : a));
      current = current.filter((writer) => writer !== youngest);
      waiting.unshift(youngest);
    }
    ensure(
      width() <= this.#room,
      'out-of-memory',
      () => `a text of ${width()} tokens does not fit the ${this.#room} tokens of cache that there is memory for`,
      'Limit the answers with --max-tokens.',
    );
    this.#places = this.#places.map((writer) => (writer && current.includes(writer) ? writer : undefined));
    const wanted = [...current, ...taken];
    const cache = this.#cache;
    // Compact when half the places are empty for good, grow when a text reaches the end of its place, and start a program
    // afresh when a text had to give up its place: it may be back before the steps under way are read.
    const halfEmpty = waiting.length === 0 && 2 * wanted.length <= this.#places.length;
    const interrupted = this.#fused !== undefined && current.length < before;
    if (!cache || cache.batch < wanted.length || this.#capacity < width() || halfEmpty || interrupted) {
      await this.#move(wanted, width());
      await this.#prefill(taken);
      const program = await this.#decoder.prepareDecode(this.#cache as DecoderCache);
      this.#fused?.release();
      this.#fused = program && new FusedBatch(program, this.#places);
      return;
    }
    const left = [...taken];
    this.#places = this.#places.map((writer) => writer ?? left.shift());
    for (const writer of taken) writer.room = this.#capacity;
    await this.#prefill(taken);
    for (const writer of taken) this.#fused?.place(this.#places.indexOf(writer), writer);
  }

  /** Moves to a new cache with a place for each of these writers. */
  async #move(writers: readonly Writer[], width: number): Promise<void> {
    const old = this.#cache;
    const most = Math.max(width, Math.floor(this.#room / writers.length));
    const limit = Math.max(width, ...writers.map((writer) => writer.limit - 1));
    // Moving costs a GPU more than room that is not used yet.
    const step = this.#mayFuse && limit <= most ? limit : Math.max(width + GROWTH, Math.ceil(1.5 * width));
    this.#capacity = Math.min(limit, most, step);
    // A program writes past the end of sequences that stand still.
    const cache = await this.#decoder.createCache(writers.length, this.#capacity + (this.#mayFuse ? 1 : 0));
    if (old) {
      const copies = writers.flatMap((writer, to): SequenceCopy[] => {
        const from = this.#places.indexOf(writer);
        return from < 0 ? [] : [{ from, to, tokens: writer.position }];
      });
      await this.#decoder.copySequences(old, cache, copies);
      this.#decoder.releaseCache(old);
    }
    this.#cache = cache;
    this.#places = [...writers];
    for (const writer of writers) writer.room = this.#capacity;
  }

  /** All tokens of new writers but the last into the cache; equal ones once. */
  async #prefill(taken: readonly Writer[]): Promise<void> {
    const decoder = this.#decoder;
    const rows = prefillRows(decoder);
    const cache = this.#cache as DecoderCache;
    const groups = new Map<string, Writer[]>();
    for (const writer of taken) {
      const key = writer.ids.slice(0, -1).join();
      if (key !== '') groups.set(key, [...(groups.get(key) ?? []), writer]);
    }
    const pending = [...groups.values()].sort((a, b) => b[0].position - a[0].position);
    while (pending.length > 0) {
      const width = pending[0][0].position;
      const part = pending.splice(0, Math.max(1, Math.floor(rows / width)));
      const piece = await decoder.createCache(part.length, width);
      try {
        for (let begin = 0; begin < width; begin += rows) {
          const tokens = Math.min(rows, width - begin);
          const ids = new Int32Array(part.length * tokens);
          for (const [i, [{ ids: own, position }]] of part.entries())
            ids.set(own.slice(begin, Math.min(begin + tokens, position)), i * tokens);
          const starts = new Int32Array(part.length).fill(begin);
          decoder.backend.free(await decoder.hidden(ids, { cache: piece, starts }));
        }
        const copies = part.flatMap((writers, from) =>
          writers.map((writer) => ({ from, to: this.#places.indexOf(writer), tokens: writer.position })),
        );
        await decoder.copySequences(piece, cache, copies);
      } finally {
        decoder.releaseCache(piece);
      }
      for (const [{ position }] of part) this.promptTokens += position;
    }
    this.promptTokens += taken.length;
  }

  /** Next tokens for every text; those that ended, with the reason. */
  async step(): Promise<[Writer, ContinuousText['reason']][]> {
    const ended: [Writer, ContinuousText['reason']][] = [];
    for (const { place, writer, id } of await (this.#fused ? this.#fusedTokens(this.#fused) : this.#tokens())) {
      // Its place was cleared by a token before, or is full: the rest is not for it.
      if (this.#places[place] !== writer || writer.position === writer.end) continue;
      const stop = this.#stopIds.has(id);
      if (!stop) {
        writer.ids.push(id);
        this.generatedTokens++;
        if (writer.ids.length < writer.limit) continue;
      }
      ended.push([writer, stop ? 'eos' : 'length']);
      this.#places[place] = undefined;
      this.#fused?.place(place, undefined);
    }
    return ended;
  }

  async #fusedTokens(fused: FusedBatch<Writer>): Promise<{ place: number; writer: Writer; id: number }[]> {
    return (await fused.next()).map(({ place, sequence, id }) => ({ place, writer: sequence, id }));
  }

  /** One token for every text, op by op. */
  async #tokens(): Promise<{ place: number; writer: Writer; id: number }[]> {
    const places = this.#places;
    const { backend, config } = this.#decoder;
    const cache = this.#cache as DecoderCache;
    // Empty places are fed a token at their beginning; the next text there writes over it.
    const hidden = await this.#decoder.hidden(
      Int32Array.from(places, (writer) => writer?.token ?? 0),
      { cache, starts: Int32Array.from(places, (writer) => writer?.position ?? 0) },
    );
    const logits = await this.#decoder.logits(hidden);
    const values = await backend.download(logits);
    backend.free(logits, hidden);
    return places.flatMap((writer, place) => {
      if (!writer) return [];
      const row = values.subarray(place * config.vocabSize, (place + 1) * config.vocabSize);
      return [{ place, writer, id: this.#sampler.sample(row, writer.rng) }];
    });
  }

  release(): void {
    this.#fused?.release();
    this.#fused = undefined;
    if (this.#cache) this.#decoder.releaseCache(this.#cache);
    this.#cache = undefined;
  }
}
