// Text generation: chunked prefill, then token by token over a key/value cache; one sequence, streamed.
import { ensure } from '../core/errors.js';
import { createRng } from '../core/rng.js';
import { contextLength, type ModelConfig } from '../models/config.js';
import type { Decoder, DecoderCache } from '../models/decoder.js';
import { createBreath } from './breathe.js';
import { FusedDecoding } from './fused.js';
import { prefillRows } from './prefill-rows.js';
import { createSampler, type SamplingOptions } from './sampler.js';

/** Options of {@link generate}. */
export interface GenerateOptions extends SamplingOptions {
  /** Tokens at most; default 256. Fewer when the model's context is full. */
  readonly maxTokens?: number;
  /** Of the random stream; default 0. The same seed, options and backend give the same tokens. */
  readonly seed?: number;
  /** Ids that end the text (not part of it); default the model's end-of-text ids. */
  readonly stopIds?: readonly number[];
  /** Stops after the current token when aborted. */
  readonly signal?: AbortSignal;
  /** False decodes op by op even where the backend has a faster way (to compare the two). */
  readonly fused?: boolean;
}

/** Why a text ended: a stop id, `maxTokens` or the context reached, or the signal. */
export type StopReason = 'eos' | 'length' | 'interrupted';

/** One generated token. */
export interface GeneratedToken {
  readonly id: number;
  /** 0 for the first generated token. */
  readonly index: number;
}

/** What a generation came to; the return value of {@link generate}. */
export interface GenerationSummary {
  readonly reason: StopReason;
  readonly promptTokens: number;
  /** Generated tokens, without the stop id. */
  readonly tokens: number;
  /** Seconds until the first token's logits. */
  readonly prefillSeconds: number;
  readonly prefillTokensPerSecond: number;
  /** Seconds of the steps after the first token (the caller's time between tokens not counted). */
  readonly decodeSeconds: number;
  /** 0 when nothing was decoded after the first token. */
  readonly decodeTokensPerSecond: number;
}

/**
 * Continues a prompt, yielding tokens as they come and returning a summary.
 * @param promptIds at least one id (the tokenizer's start token included, if the model wants one).
 * @throws GyreError `context-length` when the prompt leaves no room, `usage` for an empty prompt or options out of range.
 */
export async function* generate(
  decoder: Decoder,
  promptIds: Int32Array,
  options: GenerateOptions = {},
): AsyncGenerator<GeneratedToken, GenerationSummary, void> {
  const { maxTokens = 256, seed = 0, stopIds = decoder.config.eosTokenIds, signal } = options;
  const sampler = createSampler(options);
  const rng = createRng(seed);
  const room = checkPrompt(decoder.config, promptIds, maxTokens);
  const clock = new Clock();
  const breathe = createBreath();
  const cache = await decoder.createCache(1, promptIds.length + Math.max(room - 1, 0));
  let fused: FusedDecoding | undefined;
  try {
    // A row of logits, or the token that the backend chose from it.
    let logits: Float32Array | number | undefined = await prefill(decoder, cache, promptIds, signal);
    const prefillSeconds = clock.lap();
    const program = room > 1 && options.fused !== false ? await decoder.prepareDecode(cache) : undefined;
    fused = program && new FusedDecoding(program, promptIds.length, room, { ...options, seed });
    let decodeSeconds = 0;
    let steps = 0;
    let tokens = 0;
    const end = (reason: StopReason): GenerationSummary => ({
      reason,
      promptTokens: promptIds.length,
      tokens,
      prefillSeconds,
      prefillTokensPerSecond: promptIds.length / prefillSeconds,
      decodeSeconds,
      decodeTokensPerSecond: steps > 0 ? steps / decodeSeconds : 0,
    });
    for (;;) {
      await breathe();
      if (logits === undefined || signal?.aborted) return end('interrupted');
      if (tokens === room) return end('length');
      const id: number = typeof logits === 'number' ? logits : sampler.sample(logits, rng);
      const seconds = clock.lap();
      if (steps > 0) decodeSeconds += seconds;
      if (stopIds.includes(id)) return end('eos');
      yield { id, index: tokens };
      tokens++;
      if (tokens === room) return end('length');
      clock.lap();
      logits = fused ? await fused.next(id) : await step(decoder, cache, Int32Array.of(id));
      steps++;
    }
  } finally {
    fused?.release();
    decoder.releaseCache(cache);
  }
}

/** Runs a generation to its end. */
export async function collect(
  generation: AsyncGenerator<GeneratedToken, GenerationSummary, void>,
): Promise<{ ids: Int32Array; summary: GenerationSummary }> {
  const ids: number[] = [];
  for (;;) {
    const next = await generation.next();
    if (next.done) return { ids: Int32Array.from(ids), summary: next.value };
    ids.push(next.value.id);
  }
}

/** Tokens that may be generated after this prompt. */
function checkPrompt(config: ModelConfig, prompt: Int32Array, maxTokens: number): number {
  const context = contextLength(config);
  ensure(prompt.length > 0, 'usage', 'the prompt holds no tokens', 'Give a prompt of at least one word.');
  ensure(
    Number.isInteger(maxTokens) && maxTokens >= 0,
    'usage',
    () => `the number of tokens must be a whole number from 0, found ${maxTokens}`,
  );
  ensure(
    prompt.length < context,
    'context-length',
    () => `the prompt has ${prompt.length} tokens, the model's context is ${context} and must hold the answer too`,
    `Shorten the prompt to fewer than ${context} tokens.`,
  );
  return Math.min(maxTokens, context - prompt.length);
}

/** Feeds a prompt in chunks; logits of its last token, or undefined when interrupted. */
async function prefill(
  decoder: Decoder,
  cache: DecoderCache,
  ids: Int32Array,
  signal: AbortSignal | undefined,
): Promise<Float32Array | undefined> {
  const breathe = createBreath();
  const rows = prefillRows(decoder);
  const lastChunk = Math.floor((ids.length - 1) / rows) * rows;
  for (let begin = 0; begin < lastChunk; begin += rows) {
    await breathe();
    if (signal?.aborted) return undefined;
    decoder.backend.free(await decoder.hidden(ids.subarray(begin, begin + rows), { cache }));
  }
  if (signal?.aborted) return undefined;
  return step(decoder, cache, ids.subarray(lastChunk));
}

/** Feeds tokens of one sequence; logits [vocab] of the last. */
async function step(decoder: Decoder, cache: DecoderCache, ids: Int32Array): Promise<Float32Array> {
  const { backend } = decoder;
  const hidden = await decoder.hidden(ids, { cache });
  // The head over the whole vocabulary is the dearest product of a prefill: one row of it is all that is needed.
  const last = ids.length === 1 ? hidden : backend.sliceRows(hidden, ids.length - 1, ids.length);
  const logits = await decoder.logits(last);
  const values = await backend.download(logits);
  backend.free(logits, hidden);
  return values;
}

/** Seconds between calls. */
class Clock {
  #last = performance.now();

  lap(): number {
    const now = performance.now();
    const seconds = (now - this.#last) / 1000;
    this.#last = now;
    return seconds;
  }
}
