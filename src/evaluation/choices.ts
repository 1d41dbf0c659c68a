// Multiple choice by log-likelihood, with the definitions of lm-evaluation-harness: acc takes the likeliest choice, acc_norm
// the likeliest per byte of its text, ties go to the first. And the likelihood of one right ending (LAMBADA).
import { z } from 'zod';
import type { ProgressListener } from '../core/progress.js';
import type { Decoder } from '../models/decoder.js';
import type { Tokenizer } from '../tokenizer/index.js';
import type { ChoicesTask, CompletionTask } from './definition.js';
import { metric } from './metrics.js';
import type { ChoiceItem } from './items.js';
import { contextLength } from '../generate/index.js';
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

const cachedSchema = z.tuple([z.number(), z.boolean().nullable()]);

/**
 * Scores the choices of every item. Questions longer than the model's context lose their beginning, as in the harness; how
 * many did is in the result.
 * @throws GyreError as `scoreContinuations`.
 */
export async function evaluateChoices(
  decoder: Decoder,
  tokenizer: Tokenizer,
  task: ChoicesTask | CompletionTask,
  items: readonly ChoiceItem[],
  options: EvaluateChoicesOptions = {},
): Promise<ChoicesEvaluation> {
  const { cache = noCache, cacheScope = '', startToken, onProgress, signal } = options;
  const begun = performance.now();
  const greedy = task.type === 'completion';
  const requests: LikelihoodRequest[] = [];
  const limit = contextLength(decoder.config);
  let truncated = 0;
  for (const item of items) {
    for (const [i, continuation] of item.continuations.entries()) {
      const whole = encodePair(tokenizer, item.contexts[i], continuation, startToken);
      const request = truncateLeft(whole, limit);
      if (request !== whole) truncated++;
      requests.push(request);
    }
  }
  const keys = await Promise.all(
    requests.map(({ context, continuation }) => requestKey('likelihood', cacheScope, greedy, context, continuation)),
  );
  const found = keys.map((key) => cachedSchema.safeParse(cache.get(key)).data);
  const missing = keys.flatMap((_, i) => (found[i] ? [] : [i]));
  const fresh = await scoreContinuations(
    decoder,
    missing.map((i) => requests[i]),
    {
      greedy,
      onScored: (indices, results) =>
        cache.add(indices.map((i, n) => [keys[missing[i]], [results[n].logLikelihood, results[n].greedy]] as const)),
      onProgress,
      signal,
    },
  );
  const likelihoods: Likelihood[] = found.map((entry) => ({
    logLikelihood: entry?.[0] ?? NaN,
    greedy: entry?.[1] ?? null,
  }));
  for (const [n, i] of missing.entries()) likelihoods[i] = fresh.results[n];

  let at = 0;
  const perItem = items.map((item) => likelihoods.slice(at, (at += item.continuations.length)));
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
      promptTokens: fresh.tokens,
      generatedTokens: 0,
      tokensPerSecond: fresh.tokens / seconds,
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
  task: ChoicesTask,
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
