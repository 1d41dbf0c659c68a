// Log-likelihoods of many continuations.
//
// A continuation of n tokens after a context of L is predicted by the rows at positions L−1 … L+n−2 of both together, without the last
// token. All such sequences are packed into passes in which what they begin with alike is computed once (token-forest.ts), be it
// examples, a question or the first words of its choices; only rows that predict something go through the head. A pass is submitted
// before the scores of the last ones are read.
import { GyreError, ensure } from '../core/errors.js';
import { silent, type ProgressListener } from '../core/progress.js';
import { contextLength, createBreath } from '../generate/index.js';
import type { Decoder, DecoderCache } from '../models/decoder.js';
import type { RowScores } from '../ops/backend.js';
import type { Tokenizer } from '../tokenizer/index.js';
import { InFlight, logitRows, submitScores, type PendingScores } from './passes.js';
import { forestOrder, packSequences, sharedLength, type ScoredSequence } from './token-forest.js';

/** Rows of one forward pass, unless the backend asks for more. */
const ROWS_PER_PASS = 1024;
/** Sequences of more passes than these go through a cache, a pass at a time: activations of a pass are all held at once. */
const LONG_PASSES = 4;

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

/** The last context that each tokenizer has encoded, and in how many tokens: the choices of a question share theirs. */
const lastContexts = new WeakMap<Tokenizer, { readonly context: string; readonly tokens: number }>();

function contextTokens(tokenizer: Tokenizer, context: string): number {
  let last = lastContexts.get(tokenizer);
  if (last?.context !== context) {
    last = { context, tokens: tokenizer.encode(context, { addSpecialTokens: false }).length };
    lastContexts.set(tokenizer, last);
  }
  return last.tokens;
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
  const length = Math.min(contextTokens(tokenizer, kept), whole.length - 1);
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
  const { backend, config } = decoder;
  const rows = backend.info.pass?.rows ?? ROWS_PER_PASS;
  const most = LONG_PASSES * rows;
  const step = logitRows(backend, config.vocabSize);
  const results: Likelihood[] = new Array<Likelihood>(requests.length);
  const flight = new InFlight();
  const breathe = createBreath();
  const check = async (): Promise<void> => {
    await breathe();
    if (!signal?.aborted) return;
    await flight.drain();
    throw new GyreError('interrupted', 'the evaluation was interrupted', {
      remedy: 'Run it again: what is done is kept.',
    });
  };
  let done = 0;
  const read = async (sequences: readonly ScoredSequence[], pending: PendingScores): Promise<void> => {
    const scored = likelihoods(sequences, await Promise.all(pending), options.greedy ?? false);
    const indices = sequences.map(({ index }) => index);
    for (const [i, index] of indices.entries()) results[index] = scored[i];
    done += indices.length;
    await options.onScored?.(indices, scored);
    onProgress({ stage: 'score', done, total: requests.length, unit: 'requests' });
  };
  const ordered = forestOrder(requests.map(toSequence));
  let tokens = 0;
  const long = ordered.filter(({ ids }) => ids.length > most);
  const walk = new CacheWalk(decoder, { rows, longest: Math.max(0, ...long.map(({ ids }) => ids.length)) }, check);
  try {
    for (const sequence of long) {
      await read([sequence], [await walk.score(sequence, step)]);
    }
  } finally {
    walk.release();
  }
  tokens += walk.tokens;
  const packed = ordered.filter(({ ids }) => ids.length <= most);
  for (const pass of packSequences(packed, { rows, most })) {
    await check();
    const hidden = await decoder.hidden(pass.ids, { forest: pass });
    const predicting = await backend.gatherRows(hidden, pass.rows);
    backend.free(hidden);
    const pending = await submitScores(decoder, predicting, pass.targets, step);
    backend.free(predicting);
    tokens += pass.ids.length;
    await flight.add(pending, () => read(pass.sequences, pending));
  }
  await flight.drain();
  return { results, tokens };
}

/** Context and continuation together; the last token is only predicted. */
function toSequence({ context, continuation }: LikelihoodRequest, index: number): ScoredSequence {
  const ids = new Int32Array(context.length + continuation.length - 1);
  ids.set(context);
  ids.set(continuation.subarray(0, -1), context.length);
  return { index, ids, first: context.length - 1, targets: continuation };
}

/** Sums scores of rows, sequence by sequence. */
function likelihoods(sequences: readonly ScoredSequence[], parts: readonly RowScores[], greedy: boolean): Likelihood[] {
  // Rows of a sequence may lie in two parts.
  let [part, row] = [0, 0];
  return sequences.map(({ targets }) => {
    let logLikelihood = 0;
    let likely = true;
    for (let i = 0; i < targets.length; i++, row++) {
      for (; row === parts[part].nll.length; row = 0) part++;
      logLikelihood -= parts[part].nll[row];
      likely &&= parts[part].hit[row] === 1;
    }
    ensure(
      Number.isFinite(logLikelihood),
      'non-finite',
      'the logits of the model are not finite',
      'the model or its quantization is broken: look for damaged tensors with `gyre inspect`',
    );
    return { logLikelihood, greedy: greedy ? likely : null };
  });
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

/** Scores long sequences one by one, from where they leave the one before. */
class CacheWalk {
  readonly #decoder: Decoder;
  readonly #rows: number;
  readonly #longest: number;
  readonly #check: () => Promise<void>;
  #cache: DecoderCache | undefined;
  #before: Int32Array = new Int32Array(0);
  tokens = 0;

  constructor(decoder: Decoder, options: { rows: number; longest: number }, check: () => Promise<void>) {
    this.#decoder = decoder;
    this.#rows = options.rows;
    this.#longest = options.longest;
    this.#check = check;
  }

  async score({ ids, first, targets }: ScoredSequence, step: number): Promise<RowScores> {
    const decoder = this.#decoder;
    const { backend } = decoder;
    const cache = (this.#cache ??= await decoder.createCache(1, this.#longest));
    const nll = new Float64Array(targets.length);
    const hit = new Uint8Array(targets.length);
    const begin = Math.min(first, sharedLength(this.#before, ids));
    for (let at = begin; at < ids.length; at += this.#rows) {
      await this.#check();
      const end = Math.min(at + this.#rows, ids.length);
      const hidden = await decoder.hidden(ids.subarray(at, end), { cache, starts: Int32Array.of(at) });
      const from = Math.max(first, at);
      if (from < end) {
        const part = targets.slice(from - first, end - first);
        const scored = backend.sliceRows(hidden, from - at, end - at);
        let to = from - first;
        for (const scores of await Promise.all(await submitScores(decoder, scored, part, step))) {
          nll.set(scores.nll, to);
          hit.set(scores.hit, to);
          to += scores.nll.length;
        }
        backend.free(scored);
      }
      backend.free(hidden);
    }
    this.tokens += ids.length - begin;
    this.#before = ids;
    return { nll, hit };
  }

  release(): void {
    if (this.#cache) this.#decoder.releaseCache(this.#cache);
    this.#cache = undefined;
  }
}
