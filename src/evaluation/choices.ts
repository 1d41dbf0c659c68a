// Multiple choice by log-likelihood, with the definitions of lm-evaluation-harness: acc takes the likeliest choice, acc_norm
// the likeliest per byte of its text, ties go to the first. And the likelihood of one right ending (LAMBADA).
import { z } from 'zod';
import type { ProgressListener } from '../core/progress.js';
import type { Decoder } from '../models/decoder.js';
import type { Tokenizer } from '../tokenizer/index.js';
import type { ChoicesTask, CompletionTask } from './definition.js';
import { metric } from './metrics.js';
import type { ChoiceItem } from './items.js';
import { contextLength, createBreath } from '../generate/index.js';
import { encodePair, scoreContinuations, truncateLeft, type Likelihood, type LikelihoodRequest } from './likelihood.js';
import { hexDigest, noCache, requestKey, type RequestCache } from './request-cache.js';
import type { ChoicesResult, Metric } from './results.js';

/** Options of {@link evaluateChoices}. */
export interface EvaluateChoicesOptions {
  /** Put before every context; none by default, as the harness has it. */
  readonly startToken?: number;
  /** Where results are kept across runs; its keys name this model and how it runs through `cacheScope`. */
  readonly cache?: RequestCache;
  /** Whatever decides a likelihood beside the tokens: fingerprint, backend, activations. */
  readonly cacheScope?: string;
  /** Items that are packed and scored together, while the next are encoded; default 500. */
  readonly itemsAtOnce?: number;
  /** Stage `score`, in requests. */
  readonly onProgress?: ProgressListener;
  readonly signal?: AbortSignal;
}

/** The measured part of a result; source and settings are the caller's to add. */
export type ChoicesEvaluation = Pick<
  ChoicesResult,
  'primary' | 'metrics' | 'items' | 'groups' | 'throughput' | 'truncated'
> & {
  /** Log-likelihood of every choice of every item, nats. */
  readonly logLikelihoods: readonly (readonly number[])[];
};

/** What is told of choices. */
interface ChoiceMetrics {
  readonly metrics: readonly ChoicesTask['metrics'][number][];
}

/** What scoring asks of a task. */
export type ScoredTask = (Pick<ChoicesTask, 'type'> & ChoiceMetrics) | Pick<CompletionTask, 'type'>;

/** See {@link EvaluateChoicesOptions.itemsAtOnce}. */
const ITEMS_AT_ONCE = 500;
/** Longest time that encoding keeps scores from being read and passes from being submitted, ms: a GPU has work for longer. */
const ENCODING_MS = 10;

const cachedSchema = z.tuple([z.number(), z.boolean().nullable()]);

/**
 * Scores the choices of every item. Questions longer than the model's context lose their beginning, as in the harness; how
 * many did is in the result.
 * @throws GyreError as `scoreContinuations`.
 */
export async function evaluateChoices(
  decoder: Decoder,
  tokenizer: Tokenizer,
  task: ScoredTask,
  items: readonly ChoiceItem[],
  options: EvaluateChoicesOptions = {},
): Promise<ChoicesEvaluation> {
  const { cache = noCache, cacheScope = '', startToken, itemsAtOnce = ITEMS_AT_ONCE, onProgress, signal } = options;
  const begun = performance.now();
  const greedy = task.type === 'completion';
  const limit = contextLength(decoder.config);
  const total = items.reduce((sum, { continuations }) => sum + continuations.length, 0);
  const perItem: (readonly Likelihood[])[] = [];
  let [truncated, tokens, done] = [0, 0, 0];
  const encode = (item: ChoiceItem): LikelihoodRequest[] =>
    item.continuations.map((continuation, i) => {
      const whole = encodePair(tokenizer, item.contexts[i], continuation, startToken);
      const request = truncateLeft(whole, limit);
      if (request !== whole) truncated++;
      return request;
    });
  const score = async (
    part: readonly ChoiceItem[],
    requests: readonly LikelihoodRequest[],
    keys: readonly string[],
  ): Promise<void> => {
    const found = keys.map((key) => cachedSchema.safeParse(cache.get(key)).data);
    const missing = keys.flatMap((_, i) => (found[i] ? [] : [i]));
    done += keys.length - missing.length;
    const before = done;
    const fresh = await scoreContinuations(
      decoder,
      missing.map((i) => requests[i]),
      {
        greedy,
        onScored: (indices, results) =>
          cache.add(indices.map((i, n) => [keys[missing[i]], [results[n].logLikelihood, results[n].greedy]] as const)),
        onProgress: onProgress && ((event) => onProgress({ ...event, done: before + event.done, total })),
        signal,
      },
    );
    done += missing.length;
    tokens += fresh.tokens;
    const likelihoods: Likelihood[] = found.map((entry) => ({
      logLikelihood: entry?.[0] ?? NaN,
      greedy: entry?.[1] ?? null,
    }));
    for (const [n, i] of missing.entries()) likelihoods[i] = fresh.results[n];
    let at = 0;
    for (const { continuations } of part) perItem.push(likelihoods.slice(at, (at += continuations.length)));
  };
  // Tokens of thousands of questions take the host as long as a GPU needs to score them: the next ones are encoded meanwhile.
  const breathe = createBreath(ENCODING_MS);
  let scoring = Promise.resolve();
  try {
    for (let begin = 0; begin < items.length; begin += itemsAtOnce) {
      const part = items.slice(begin, begin + itemsAtOnce);
      const requests: LikelihoodRequest[] = [];
      const keys: string[] = [];
      for (const item of part) {
        await breathe();
        const own = encode(item);
        requests.push(...own);
        keys.push(
          ...(await Promise.all(
            own.map(({ context, continuation }) => requestKey('likelihood', cacheScope, greedy, context, continuation)),
          )),
        );
      }
      await scoring;
      scoring = score(part, requests, keys);
      scoring.catch(() => undefined); // whoever awaits it is told
    }
  } finally {
    await scoring;
  }

  const columns = task.type === 'completion' ? completionColumns(perItem) : choiceColumns(task, items, perItem);
  const seconds = (performance.now() - begun) / 1000;
  const names = [...new Set(items.flatMap(({ group }) => (group === null ? [] : [group])))].sort();
  return {
    primary: task.type === 'completion' ? 'acc' : task.metrics.includes('acc_norm') ? 'acc_norm' : 'acc',
    metrics: metricsOf(
      columns,
      items.map(() => true),
    ),
    items: {
      ids: items.map(({ id }) => id),
      hashes: await Promise.all(
        items.map(({ contexts, continuations }) => hexDigest(JSON.stringify([contexts, continuations]), 8)),
      ),
      columns,
    },
    groups: names.map((name) => {
      const member = items.map(({ group }) => group === name);
      return { name, items: member.filter(Boolean).length, metrics: metricsOf(columns, member) };
    }),
    throughput: {
      seconds,
      promptTokens: tokens,
      generatedTokens: 0,
      tokensPerSecond: tokens / seconds,
    },
    truncated,
    logLikelihoods: perItem.map((scores) => scores.map(({ logLikelihood }) => logLikelihood)),
  };
}

/** Index of the largest, the first of equals. */
function best(values: readonly number[]): number {
  return values.reduce((top, value, i) => (value > values[top] ? i : top), 0);
}

function choiceColumns(
  task: ChoiceMetrics,
  items: readonly ChoiceItem[],
  perItem: readonly (readonly Likelihood[])[],
): Record<string, number[]> {
  const right = (scale: (item: ChoiceItem, choice: number) => number): number[] =>
    items.map((item, i) => {
      const scores = perItem[i].map(({ logLikelihood }, choice) => logLikelihood / scale(item, choice));
      return best(scores) === item.answer ? 1 : 0;
    });
  const columns: Record<string, number[]> = {};
  if (task.metrics.includes('acc')) columns['acc'] = right(() => 1);
  if (task.metrics.includes('acc_norm')) columns['acc_norm'] = right((item, choice) => Math.max(1, item.bytes[choice]));
  return columns;
}

function completionColumns(perItem: readonly (readonly Likelihood[])[]): Record<string, number[]> {
  return {
    acc: perItem.map(([{ greedy }]) => (greedy ? 1 : 0)),
    nll: perItem.map(([{ logLikelihood }]) => -logLikelihood),
  };
}

/** Metrics over the items that belong. */
function metricsOf(
  columns: Readonly<Record<string, readonly number[]>>,
  member: readonly boolean[],
): Record<string, Metric> {
  const metrics: Record<string, Metric> = {};
  for (const [column, all] of Object.entries(columns)) {
    const values = all.filter((_, i) => member[i]);
    if (column === 'nll') {
      // Of the whole ending, as the harness has it for LAMBADA.
      metrics['perplexity'] = metric({ column, values, transform: 'exp', better: 'lower' });
    } else {
      metrics[column] = metric({ column, values, better: 'higher', unit: 'share', answers: 1 });
    }
  }
  return metrics;
}
