// Log-likelihoods of many continuations: contexts that continuations share are computed once, in batches of like lengths.
//
// A continuation of n tokens after a context of L is predicted by the rows at positions L−1 … L+n−2. So a pass is made of
// the contexts without their last token, padded on the right, into a cache; each continuation then starts from a copy of
// its context's cache with that last token and its own tokens but the last: every row of this second pass is scored.
import { GyreError, ensure } from '../core/errors.js';
import { silent, type ProgressListener } from '../core/progress.js';
import { contextLength, createBreath } from '../generate/index.js';
import type { Decoder, DecoderCache } from '../models/decoder.js';
import type { Tokenizer } from '../tokenizer/index.js';

/** Rows of one forward pass, unless the backend asks for more. */
const ROWS_PER_PASS = 1024;
/** Share of these rows from which a pass is worth less padding rather than more rows. */
const SMALL_PASS = 3 / 16;
/** Bytes of keys and values held at a time, unless the backend asks for more. */
const CACHE_BYTES = 768 * 1024 * 1024;
/** Bytes of logits held at a time, unless the backend asks for more. */
const LOGITS_BYTES = 64 * 1024 * 1024;
/** A beginning that all sequences of a batch share is computed apart from this length on. */
const MIN_HEADER = 16;

/** A continuation to score. */
export interface LikelihoodRequest {
  /** At least one token. */
  readonly context: Int32Array;
  /** At least one token. */
  readonly continuation: Int32Array;
}

/** How likely a continuation is. */
export interface Likelihood {
  /** Sum of log p of its tokens, nats. */
  readonly logLikelihood: number;
  /** Whether every token was the most likely one; null unless asked for. */
  readonly greedy: boolean | null;
}

/** Options of {@link scoreContinuations}. */
export interface LikelihoodOptions {
  /** Also find out whether greedy decoding gives the continuation; default false. */
  readonly greedy?: boolean;
  /** Called after every pass with the indices that are done: for caches that survive the process. */
  readonly onScored?: (indices: readonly number[], results: readonly Likelihood[]) => void | Promise<void>;
  /** Stage `score`, in requests. */
  readonly onProgress?: ProgressListener;
  readonly signal?: AbortSignal;
}

/** What {@link scoreContinuations} returns. */
export interface Likelihoods {
  readonly results: readonly Likelihood[];
  /** Tokens that went through the model; shared ones count once, padding does not. */
  readonly tokens: number;
}

/**
 * A context and a continuation as tokens, the way lm-evaluation-harness splits them: spaces at the end of the context go
 * to the continuation, both are encoded together, and what encoding the context alone gives is cut off. An empty context
 * becomes the start token, or the end-of-text token where there is none.
 * @param startToken put before the context.
 */
export function encodePair(
  tokenizer: Tokenizer,
  context: string,
  continuation: string,
  startToken?: number,
): LikelihoodRequest {
  const kept = context.trimEnd();
  const ending = context.slice(kept.length) + continuation;
  const encode = (text: string): Int32Array => tokenizer.encode(text, { addSpecialTokens: false });
  if (kept === '') {
    const first = tokenizer.bosTokenId ?? tokenizer.eosTokenIds[0];
    ensure(
      first !== undefined,
      'config-invalid',
      'the tokenizer has neither a start nor an end-of-text token to begin an empty context with',
      'Give the questions a context.',
    );
    return { context: Int32Array.of(startToken ?? first), continuation: encode(ending) };
  }
  const whole = encode(kept + ending);
  const length = Math.min(encode(kept).length, whole.length - 1);
  const opening = startToken === undefined ? [] : [startToken];
  return { context: Int32Array.from([...opening, ...whole.subarray(0, length)]), continuation: whole.slice(length) };
}

/**
 * A request cut from the left to what a context holds, the way lm-evaluation-harness cuts: the last of its tokens are kept.
 * The request itself where it fits.
 * @param context the most tokens that go through the model at once.
 */
export function truncateLeft(request: LikelihoodRequest, context: number): LikelihoodRequest {
  const { context: before, continuation } = request;
  // The last token of all is only predicted.
  const over = before.length + continuation.length - 1 - context;
  // What remains of the context must predict the continuation's first token; a continuation that leaves no room is refused.
  return over <= 0 || over >= before.length ? request : { context: before.slice(over), continuation };
}

/** A request with its place; `begin` is where its own tokens start after the shared context. */
interface Job {
  readonly index: number;
  readonly continuation: Int32Array;
}

/** Requests of one context. */
interface Group {
  readonly context: Int32Array;
  readonly jobs: Job[];
}

/**
 * Scores continuations. Results are in the order of the requests and do not depend on how they were batched, but for
 * rounding.
 * @throws GyreError `context-length` for a request longer than the model's context, `non-finite`, `interrupted`.
 */
export async function scoreContinuations(
  decoder: Decoder,
  requests: readonly LikelihoodRequest[],
  options: LikelihoodOptions = {},
): Promise<Likelihoods> {
  const { onProgress = silent, signal } = options;
  checkLengths(decoder, requests);
  const results: Likelihood[] = new Array<Likelihood>(requests.length);
  const breathe = createBreath();
  const pass = new Passes(decoder, async () => {
    await breathe();
    if (signal?.aborted)
      throw new GyreError('interrupted', 'the evaluation was interrupted', {
        remedy: 'Run it again: what is done is kept.',
      });
  });
  let done = 0;
  for (const batch of batches(decoder, groupByContext(requests))) {
    await pass.run(batch, options.greedy ?? false, async (indices, scored) => {
      for (const [i, index] of indices.entries()) results[index] = scored[i];
      done += indices.length;
      await options.onScored?.(indices, scored);
      onProgress({ stage: 'score', done, total: requests.length, unit: 'requests' });
    });
  }
  return { results, tokens: pass.tokens };
}

function checkLengths(decoder: Decoder, requests: readonly LikelihoodRequest[]): void {
  const limit = contextLength(decoder.config);
  for (const { context, continuation } of requests) {
    ensure(context.length > 0 && continuation.length > 0, 'usage', 'a continuation or its context has no tokens');
    const length = context.length + continuation.length - 1;
    ensure(
      length <= limit,
      'context-length',
      () => `a question of ${length} tokens does not fit the model's context of ${limit}`,
      'Leave the task away, or measure a model with a longer context.',
    );
  }
}

/** Groups by context, longest first: memory runs out at the start or not at all, and neighbours are of like length. */
function groupByContext(requests: readonly LikelihoodRequest[]): Group[] {
  const groups = new Map<string, Group>();
  for (const [index, { context, continuation }] of requests.entries()) {
    const key = context.join();
    const group = groups.get(key);
    if (group) group.jobs.push({ index, continuation });
    else groups.set(key, { context, jobs: [{ index, continuation }] });
  }
  return [...groups.values()].sort((a, b) => b.context.length - a.context.length || compare(a.context, b.context));
}

/** Equal beginnings beside one another: headers of subjects stay together among equal lengths. */
function compare(a: Int32Array, b: Int32Array): number {
  for (let i = 0; i < a.length; i++) if (a[i] !== b[i]) return a[i] - b[i];
  return 0;
}

/** Bytes of one token's keys and values. */
function cacheBytesPerToken(decoder: Decoder): number {
  const { layers, kvHeads, headDim } = decoder.config;
  return layers * kvHeads * headDim * 2 * 4;
}

/** Tokens that the cache of contexts holds, and the one of their continuations. */
function cacheRoom(decoder: Decoder): number {
  const bytes = decoder.backend.info.pass?.cacheBytes ?? CACHE_BYTES;
  return Math.max(1, Math.floor(bytes / 2 / cacheBytesPerToken(decoder)));
}

/** As many groups as fit the cache of contexts. */
function* batches(decoder: Decoder, groups: readonly Group[]): Generator<Group[], void, void> {
  const room = cacheRoom(decoder);
  let batch: Group[] = [];
  for (const group of groups) {
    const width = batch[0]?.context.length ?? group.context.length;
    // A quarter shorter than the longest would be padding; a shared header is worth more than that, so few are split.
    if (batch.length > 0 && (batch.length + 1) * width > room) {
      yield batch;
      batch = [];
    }
    batch.push(group);
  }
  if (batch.length > 0) yield batch;
}

/**
 * How many sequences, longest first, make a pass: at most so many, and once the pass is large enough, while padding stays
 * below a tenth.
 */
function countTogether(length: (i: number) => number, most: number, small: number): number {
  const width = length(0);
  let tokens = width;
  let count = 1;
  for (; count < most && length(count) > 0; count++) {
    tokens += length(count);
    const rows = width * (count + 1);
    if (rows > small && tokens < 0.9 * rows) break;
  }
  return count;
}

/** Tokens at the front that all sequences share, one less than the shortest at most. */
function commonPrefix(sequences: readonly Int32Array[]): number {
  const [first] = sequences;
  let length = Math.min(...sequences.map((s) => s.length)) - 1;
  for (const sequence of sequences) {
    let same = 0;
    while (same < length && sequence[same] === first[same]) same++;
    length = same;
  }
  return length;
}

/** Runs batches; counts the tokens. */
class Passes {
  readonly #decoder: Decoder;
  readonly #check: () => Promise<void>;
  readonly #rows: number;
  readonly #logitsBytes: number;
  tokens = 0;

  constructor(decoder: Decoder, check: () => Promise<void>) {
    this.#decoder = decoder;
    this.#check = check;
    const { rows = ROWS_PER_PASS, logitsBytes = LOGITS_BYTES } = decoder.backend.info.pass ?? {};
    this.#rows = rows;
    this.#logitsBytes = logitsBytes;
  }

  async run(
    batch: readonly Group[],
    greedy: boolean,
    onScored: (indices: readonly number[], results: readonly Likelihood[]) => Promise<void>,
  ): Promise<void> {
    const decoder = this.#decoder;
    // Contexts without their last token, which opens each continuation.
    const shared = batch.map(({ context }) => context.subarray(0, -1));
    const longest = shared[0].length;
    const limit = contextLength(decoder.config);
    const cache = longest > 0 ? await decoder.createCache(batch.length, longest) : undefined;
    try {
      if (cache) await this.#fillContexts(cache, shared);
      const jobs = batch
        .flatMap((group, sequence) => group.jobs.map((job) => ({ ...job, sequence })))
        .sort((a, b) => b.continuation.length - a.continuation.length || a.index - b.index);
      const room = cacheRoom(decoder);
      for (let begin = 0; begin < jobs.length;) {
        const width = jobs[begin].continuation.length;
        const most = Math.min(Math.floor(this.#rows / width), Math.floor(room / (longest + width)));
        const count = countTogether((i) => jobs[begin + i]?.continuation.length ?? 0, most, SMALL_PASS * this.#rows);
        // Padding must not reach beyond the model's context: a long question waits for a pass of short continuations.
        const fits = (sequence: number): boolean => shared[sequence].length + width <= limit;
        const late = jobs.slice(begin, begin + count).findIndex(({ sequence }) => !fits(sequence));
        const part = jobs.slice(begin, begin + (late > 0 ? late : count));
        begin += part.length;
        await this.#check();
        const chunks = part.map(({ sequence, continuation }) => {
          const ids = new Int32Array(width);
          ids[0] = batch[sequence].context.at(-1) ?? 0;
          ids.set(continuation.subarray(0, -1), 1);
          return ids;
        });
        const starts = Int32Array.from(part, ({ sequence }) => shared[sequence].length);
        const fork = cache && (await decoder.createCache(part.length, Math.max(...starts) + width));
        try {
          if (cache && fork) {
            const copies = part.map(({ sequence }, to) => ({ from: sequence, to, tokens: starts[to] }));
            await decoder.copySequences(cache, fork, copies);
          }
          const scored = await this.#score(chunks, part, starts, fork, greedy);
          await onScored(
            part.map((job) => job.index),
            scored,
          );
        } finally {
          if (fork) decoder.releaseCache(fork);
        }
      }
    } finally {
      if (cache) decoder.releaseCache(cache);
    }
  }

  /** Puts contexts, longest first, into a cache; what all of them begin with is computed once. */
  async #fillContexts(cache: DecoderCache, contexts: readonly Int32Array[]): Promise<void> {
    const decoder = this.#decoder;
    const common = contexts.length > 1 && contexts.every((c) => c.length > MIN_HEADER) ? commonPrefix(contexts) : 0;
    const header = common >= MIN_HEADER ? common : 0;
    if (header > 0) {
      const first = await decoder.createCache(1, header);
      try {
        await this.#feed([contexts[0].subarray(0, header)], 0, first);
        const copies = contexts.map((_, to) => ({ from: 0, to, tokens: header }));
        await decoder.copySequences(first, cache, copies);
      } finally {
        decoder.releaseCache(first);
      }
    }
    // Pieces of the batch, each through a cache of its own size: rows of one pass are limited.
    for (let begin = 0; begin < contexts.length && contexts[begin].length > header;) {
      const width = contexts[begin].length - header;
      const count = countTogether(
        (i) => (contexts[begin + i]?.length ?? 0) - header,
        Math.floor(this.#rows / width),
        SMALL_PASS * this.#rows,
      );
      const rests = contexts.slice(begin, begin + count).map((context) => context.subarray(header));
      if (count === contexts.length) {
        await this.#feed(rests, header, cache);
      } else {
        const piece = await decoder.createCache(count, header + width);
        try {
          if (header > 0) {
            const copies = rests.map((_, to) => ({ from: begin + to, to, tokens: header }));
            await decoder.copySequences(cache, piece, copies);
          }
          await this.#feed(rests, header, piece);
          const copies = rests.map((rest, from) => ({ from, to: begin + from, tokens: header + rest.length }));
          await decoder.copySequences(piece, cache, copies);
        } finally {
          decoder.releaseCache(piece);
        }
      }
      begin += count;
    }
  }

  /** Tokens of every sequence into a cache, padded on the right, in chunks. */
  async #feed(sequences: readonly Int32Array[], start: number, cache: DecoderCache): Promise<void> {
    const decoder = this.#decoder;
    const width = Math.max(...sequences.map((s) => s.length));
    const chunk = Math.max(1, Math.floor(this.#rows / sequences.length));
    for (let begin = 0; begin < width; begin += chunk) {
      await this.#check();
      const tokens = Math.min(chunk, width - begin);
      const ids = new Int32Array(sequences.length * tokens);
      for (const [i, sequence] of sequences.entries()) ids.set(sequence.subarray(begin, begin + tokens), i * tokens);
      const starts = new Int32Array(sequences.length).fill(start + begin);
      decoder.backend.free(await decoder.hidden(ids, { cache, starts }));
    }
    for (const sequence of sequences) this.tokens += sequence.length;
  }

  /** Runs chunks of one width and scores the rows that predict each continuation. */
  async #score(
    chunks: readonly Int32Array[],
    jobs: readonly Job[],
    starts: Int32Array,
    cache: DecoderCache | undefined,
    greedy: boolean,
  ): Promise<Likelihood[]> {
    const { backend, config } = this.#decoder;
    const width = chunks[0].length;
    const ids = new Int32Array(chunks.length * width);
    const targets = new Int32Array(chunks.length * width);
    for (const [i, chunk] of chunks.entries()) {
      ids.set(chunk, i * width);
      targets.set(jobs[i].continuation, i * width);
      this.tokens += jobs[i].continuation.length;
    }
    const hidden = await this.#decoder.hidden(ids, cache ? { cache, starts } : { batch: chunks.length });
    const rows = ids.length;
    const nll = new Float64Array(rows);
    const best = new Uint8Array(greedy ? rows : 0);
    const step = Math.max(1, Math.floor(this.#logitsBytes / (4 * config.vocabSize)));
    for (let begin = 0; begin < rows; begin += step) {
      const end = Math.min(begin + step, rows);
      const logits = await this.#decoder.logits(backend.sliceRows(hidden, begin, end));
      const part = targets.slice(begin, end);
      nll.set((await backend.score(logits, part)).nll, begin);
      if (greedy) best.set(isArgmax(await backend.download(logits), part), begin);
      backend.free(logits);
    }
    backend.free(hidden);
    return jobs.map(({ continuation }, i) => {
      let logLikelihood = 0;
      let all = true;
      for (let t = i * width; t < i * width + continuation.length; t++) {
        logLikelihood -= nll[t];
        all &&= best[t] === 1;
      }
      ensure(
        Number.isFinite(logLikelihood),
        'non-finite',
        'the logits of the model are not finite',
        'the model or its quantization is broken: look for damaged tensors with `gyre inspect`',
      );
      return { logLikelihood, greedy: greedy ? all : null };
    });
  }
}

/** 1 for rows whose first largest logit is the target's. */
function isArgmax(logits: Float32Array, targets: Int32Array): Uint8Array {
  const vocab = logits.length / targets.length;
  return Uint8Array.from(targets, (target, row) => {
    const at = row * vocab;
    const value = logits[at + target];
    for (let v = 0; v < vocab; v++) if (logits[at + v] > value || (v < target && logits[at + v] === value)) return 0;
    return 1;
  });
}
