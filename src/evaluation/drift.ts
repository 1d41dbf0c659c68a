// Drift along chains of thought: how far a model strays from its reference, token by token, and what becomes of the answer.
//
// Two measurements on the same tasks. Along reference chains: the reference answers each task greedily; the model is fed
// that chain, and at every position of it KL(reference ‖ model) and top-1 agreement are taken. Positions count from the
// first token of the answer. Free-running: the model answers greedily itself; a chain departs at the first token that is
// not the reference's (the end of text counts as a token), and may still come to the same or to the right answer.
import { GyreError, ensure } from '../core/errors.js';
import { silent, type ProgressListener } from '../core/progress.js';
import { createBreath, generateContinuously } from '../generate/index.js';
import type { Decoder } from '../models/decoder.js';
import type { Tensor } from '../ops/backend.js';
import type { Tokenizer } from '../tokenizer/index.js';
import { studentQuantile, weightedMean } from '../core/intervals.js';
import { judge, taskPrompt } from './tasks-eval.js';
import type { TaskSample } from './tasks/index.js';

/** Ends of the position ranges, exclusive; the last range is open. */
const POSITION_ENDS = [16, 32, 64, 96, 128, 192, 256, 384, 512, 768, 1024] as const;
/** Ends of the ranges of chain lengths that free-running results are split by, exclusive; the last is open. */
const LENGTH_ENDS = [32, 64, 96, 128, 192, 256, 512] as const;
/** Rows whose logits are held at a time, for both models. */
const ROWS_PER_LOGITS = 256;

/** Options of {@link evaluateDrift}. */
export interface DriftOptions {
  /** Tokens of a chain at most; default 512. */
  readonly maxTokens?: number;
  /** Tasks answered together; default 32. */
  readonly batchSize?: number;
  /** Stages `generate` and `evaluate`. */
  readonly onProgress?: ProgressListener;
  readonly signal?: AbortSignal;
}

/** A mean over tokens with its 95% interval (null when there is one chain), tokens of a chain taken together. */
export interface DriftMean {
  readonly value: number;
  readonly low: number | null;
  readonly high: number | null;
}

/** Teacher-forced results of the positions [from, to). */
export interface PositionDrift {
  readonly from: number;
  /** Of the last range: the longest chain. */
  readonly to: number;
  readonly chains: number;
  readonly tokens: number;
  /** KL(reference ‖ model), nats per token. */
  readonly kl: DriftMean;
  readonly top1Agreement: DriftMean;
}

/** Free-running results of tasks whose reference chains have [from, to) tokens. */
export interface LengthDrift {
  readonly from: number;
  readonly to: number | null;
  readonly tasks: number;
  readonly departed: number;
  /** Median position of the first departure among chains that departed; null when none did. */
  readonly medianDeparture: number | null;
  /** Answers equal to the reference's; right answers of the model and of the reference. */
  readonly sameAnswer: number;
  readonly correct: number;
  readonly referenceCorrect: number;
}

/** One task's free-running outcome. */
export interface TaskDrift {
  readonly kind: string;
  readonly referenceTokens: number;
  /** Position of the first token that differs; null when the chains are equal. */
  readonly departure: number | null;
  readonly sameAnswer: boolean;
  readonly correct: boolean;
  readonly referenceCorrect: boolean;
}

/** What {@link evaluateDrift} measures. */
export interface DriftEvaluation {
  readonly tasks: number;
  readonly chainTokens: number;
  /** Mean over all tokens of the reference chains. */
  readonly kl: DriftMean;
  readonly top1Agreement: DriftMean;
  readonly byPosition: readonly PositionDrift[];
  readonly byLength: readonly LengthDrift[];
  readonly departed: number;
  readonly medianDeparture: number | null;
  readonly sameAnswer: number;
  /** Of the chains that departed, those whose final answer is still the reference's. */
  readonly sameAnswerAfterDeparture: number;
  readonly correct: number;
  readonly referenceCorrect: number;
  readonly outcomes: readonly TaskDrift[];
  readonly seconds: number;
}

/**
 * Measures a model against a reference of the same vocabulary on the same backend.
 * @throws GyreError `usage` for unlike models or no tasks, `interrupted`; otherwise as `generateContinuously`.
 */
export async function evaluateDrift(
  decoder: Decoder,
  reference: Decoder,
  tokenizer: Tokenizer,
  tasks: readonly TaskSample[],
  options: DriftOptions = {},
): Promise<DriftEvaluation> {
  const { maxTokens = 512, batchSize, onProgress = silent, signal } = options;
  ensure(tasks.length > 0, 'usage', 'no tasks to follow', 'give a file with at least one task');
  ensure(decoder.backend === reference.backend, 'usage', 'the model and its reference must be on the same backend');
  ensure(
    decoder.config.vocabSize === reference.config.vocabSize,
    'usage',
    () =>
      `the model has a vocabulary of ${decoder.config.vocabSize}, the reference one of ${reference.config.vocabSize}`,
    'name the model that this one was quantized from as the reference',
  );
  const begun = performance.now();
  const prompts = tasks.map((task) => taskPrompt(tokenizer, task));
  const stopIds = [...new Set([...decoder.config.eosTokenIds, ...tokenizer.eosTokenIds])];
  const requests = prompts.map((prompt, stream) => ({ prompt, maxTokens, stream }));
  const generation = { slots: batchSize, stopIds, onProgress, signal };
  const { texts: expected } = await generateContinuously(reference, requests, generation);
  const { texts: found } = await generateContinuously(decoder, requests, generation);

  const longest = Math.max(...expected.map(({ ids }) => ids.length));
  const whole = new ChainMeans();
  const positions = [...POSITION_ENDS, Infinity].map(() => new ChainMeans());
  const breathe = createBreath();
  for (const [i, { ids }] of expected.entries()) {
    await breathe();
    if (signal?.aborted)
      throw new GyreError('interrupted', 'the evaluation was interrupted', { remedy: 'Run it again.' });
    await followChain(decoder, reference, prompts[i], ids, (position, kl, agree) => {
      whole.add(i, kl, agree);
      positions[rangeOf(position, POSITION_ENDS)].add(i, kl, agree);
    });
    onProgress({ stage: 'evaluate', done: i + 1, total: tasks.length, unit: 'chains' });
  }

  const answer = (ids: Int32Array, i: number) => judge(tasks[i], tokenizer.decode(ids, { skipSpecialTokens: false }));
  const outcomes = tasks.map((task, i): TaskDrift => {
    const [own, theirs] = [answer(found[i].ids, i), answer(expected[i].ids, i)];
    return {
      kind: task.kind,
      referenceTokens: expected[i].ids.length,
      departure: firstDifference(found[i].ids, expected[i].ids),
      sameAnswer: own.answer !== null && own.answer === theirs.answer,
      correct: own.correct,
      referenceCorrect: theirs.correct,
    };
  });
  const { tokens: chainTokens, kl, top1Agreement } = whole.means();
  return {
    chainTokens,
    kl,
    top1Agreement,
    byPosition: positions.flatMap((means, i) => {
      const { from, to } = bounds(i, POSITION_ENDS);
      return means.empty ? [] : [{ from, to: to ?? longest, ...means.means() }];
    }),
    byLength: [...LENGTH_ENDS, Infinity].flatMap((_, i) => {
      const of = outcomes.filter((outcome) => rangeOf(outcome.referenceTokens, LENGTH_ENDS) === i);
      return of.length === 0 ? [] : [{ ...bounds(i, LENGTH_ENDS), ...summary(of) }];
    }),
    ...summary(outcomes),
    sameAnswerAfterDeparture: count(outcomes, (o) => o.departure !== null && o.sameAnswer),
    outcomes,
    seconds: (performance.now() - begun) / 1000,
  };
}

/** Scores every token of a chain under both models, given the chain. */
async function followChain(
  decoder: Decoder,
  reference: Decoder,
  prompt: Int32Array,
  chain: Int32Array,
  each: (position: number, kl: number, agree: number) => void,
): Promise<void> {
  if (chain.length === 0) return;
  const { backend } = decoder;
  const ids = Int32Array.from([...prompt, ...chain.subarray(0, -1)]);
  const [own, theirs] = [await decoder.hidden(ids), await reference.hidden(ids)];
  const first = prompt.length - 1;
  for (let begin = 0; begin < chain.length; begin += ROWS_PER_LOGITS) {
    const end = Math.min(begin + ROWS_PER_LOGITS, chain.length);
    const rows = (of: Tensor): Tensor => backend.sliceRows(of, first + begin, first + end);
    const logits = await decoder.logits(rows(own));
    const expected = await reference.logits(rows(theirs));
    const { kl, agree } = await backend.score(logits, chain.slice(begin, end), expected);
    for (let r = 0; r < end - begin; r++) each(begin + r, kl?.[r] ?? NaN, agree?.[r] ?? 0);
    backend.free(logits, expected);
  }
  backend.free(own, theirs);
}

/** KL and agreement by chain: tokens of one chain are no independent items. */
class ChainMeans {
  readonly #chains = new Map<number, { tokens: number; kl: number; agree: number }>();

  add(chain: number, kl: number, agree: number): void {
    const sums = this.#chains.get(chain) ?? { tokens: 0, kl: 0, agree: 0 };
    sums.tokens++;
    sums.kl += kl;
    sums.agree += agree;
    this.#chains.set(chain, sums);
  }

  get empty(): boolean {
    return this.#chains.size === 0;
  }

  means(): Pick<PositionDrift, 'chains' | 'tokens' | 'kl' | 'top1Agreement'> {
    const sums = [...this.#chains.values()];
    const tokens = sums.map((sum) => sum.tokens);
    const over = (pick: 'kl' | 'agree'): DriftMean => {
      const means = sums.map((sum) => sum[pick] / sum.tokens);
      const { mean: value, standardError } = weightedMean(means, tokens);
      if (standardError === null) return { value, low: null, high: null };
      const error = standardError * studentQuantile(sums.length - 1);
      return { value, low: value - error, high: value + error };
    };
    return {
      chains: sums.length,
      tokens: tokens.reduce((a, b) => a + b, 0),
      kl: over('kl'),
      top1Agreement: over('agree'),
    };
  }
}

function summary(outcomes: readonly TaskDrift[]) {
  const departures = outcomes.flatMap((o) => (o.departure === null ? [] : [o.departure])).sort((a, b) => a - b);
  return {
    tasks: outcomes.length,
    departed: departures.length,
    medianDeparture: departures.length === 0 ? null : departures[departures.length >> 1],
    sameAnswer: count(outcomes, (o) => o.sameAnswer),
    correct: count(outcomes, (o) => o.correct),
    referenceCorrect: count(outcomes, (o) => o.referenceCorrect),
  };
}

function count(outcomes: readonly TaskDrift[], test: (outcome: TaskDrift) => boolean): number {
  return outcomes.filter(test).length;
}

/** Where two chains part; null when they are equal. */
function firstDifference(a: Int32Array, b: Int32Array): number | null {
  const shared = Math.min(a.length, b.length);
  for (let i = 0; i < shared; i++) if (a[i] !== b[i]) return i;
  return a.length === b.length ? null : shared;
}

/** Index of the range that holds a value. */
function rangeOf(value: number, ends: readonly number[]): number {
  const at = ends.findIndex((end) => value < end);
  return at < 0 ? ends.length : at;
}

function bounds(index: number, ends: readonly number[]): { from: number; to: number | null } {
  return { from: index === 0 ? 0 : ends[index - 1], to: ends[index] ?? null };
}
