// Reasoning by generation: every question answered several times by the chat template, all texts in one running batch.
import { z } from 'zod';
import { ensure } from '../core/errors.js';
import type { ProgressListener } from '../core/progress.js';
import { contextLength, generateContinuously, type ContinuousRequest } from '../generate/index.js';
import type { Decoder } from '../models/decoder.js';
import type { Tokenizer } from '../tokenizer/index.js';
import type { GenerationTask } from './definition.js';
import { metric } from './metrics.js';
import type { GenerationItem } from './items.js';
import { judgeText } from './judge.js';
import { hexDigest, noCache, requestKey, type RequestCache } from './request-cache.js';
import type { GenerationResult, Metric } from './results.js';

/** Options of {@link evaluateReasoning}. */
export interface EvaluateReasoningOptions {
  /** Answers per question; default what the task says. */
  readonly samples?: number;
  /** Default what the task says, like the next three; temperature 0 is greedy, and then one sample is enough. */
  readonly temperature?: number;
  readonly topP?: number;
  readonly topK?: number;
  readonly maxTokens?: number;
  /** Default 0. */
  readonly seed?: number;
  /** Whether the chat template is asked to let the model think (`enable_thinking`); default true. */
  readonly thinking?: boolean;
  /** Texts written at a time; default 32. */
  readonly slots?: number;
  /** See `evaluateChoices`. */
  readonly cache?: RequestCache;
  readonly cacheScope?: string;
  /** Called with every judged text, in the order of the questions, at the end. */
  readonly onTranscript?: (transcript: Transcript) => void | Promise<void>;
  /** Stage `generate`, in texts. */
  readonly onProgress?: ProgressListener;
  readonly signal?: AbortSignal;
}

/** One answer as it was written and judged. */
export interface Transcript {
  readonly id: string;
  /** 0 … samples − 1. */
  readonly sample: number;
  readonly prompt: string;
  readonly text: string;
  /** The answer found; null when there is none. */
  readonly answer: string | null;
  readonly expected: string;
  readonly correct: boolean;
  readonly tokens: number;
  readonly stop: 'eos' | 'length';
}

/** The measured part of a result; source and settings are the caller's to add. */
export type ReasoningEvaluation = Pick<
  GenerationResult,
  'primary' | 'metrics' | 'items' | 'groups' | 'throughput' | 'samplesPerQuestion' | 'stopReasons'
>;

const cachedSchema = z.object({ ids: z.array(z.number()), reason: z.enum(['eos', 'length']) });

/** Room that an answer needs at least: prompts that leave less are refused before anything is written. */
const MIN_ANSWER_TOKENS = 8;

/**
 * Answers and judges every item.
 * @throws GyreError `context-length` for a question that leaves no room for an answer, `unsupported` without a chat
 * template, `interrupted`; otherwise as `generateContinuously`.
 */
export async function evaluateReasoning(
  decoder: Decoder,
  tokenizer: Tokenizer,
  task: GenerationTask,
  items: readonly GenerationItem[],
  options: EvaluateReasoningOptions = {},
): Promise<ReasoningEvaluation> {
  const { seed = 0, thinking = true, slots, cache = noCache, cacheScope = '', onProgress, signal } = options;
  const begun = performance.now();
  const samples = options.samples ?? task.samples;
  const sampling = {
    temperature: options.temperature ?? task.sampling.temperature,
    topP: options.topP ?? task.sampling.topP,
    topK: options.topK ?? task.sampling.topK,
  };
  const maxTokens = options.maxTokens ?? task.sampling.maxTokens;
  const context = contextLength(decoder.config);
  const stopIds = [...new Set([...decoder.config.eosTokenIds, ...tokenizer.eosTokenIds])];
  const prompts = items.map((item) => {
    const messages = [
      ...(item.system === null ? [] : [{ role: 'system', content: item.system }]),
      { role: 'user', content: item.prompt },
    ];
    const text = tokenizer.applyChatTemplate(messages, {
      addGenerationPrompt: true,
      variables: { enable_thinking: thinking },
    });
    const ids = tokenizer.encode(text, { addSpecialTokens: false });
    ensure(
      ids.length + MIN_ANSWER_TOKENS <= context,
      'context-length',
      () => `question ${item.id} of ${task.name} has ${ids.length} tokens, the model's context is ${context}`,
      'Measure a model with a longer context, or leave the task away.',
    );
    return { text, ids };
  });
  // Samples of a question stand beside one another, so that its prompt is computed once.
  const requests: ContinuousRequest[] = prompts.flatMap(({ ids }, i) =>
    Array.from({ length: samples }, (_, sample) => ({ prompt: ids, maxTokens, stream: `${task.name} ${i} ${sample}` })),
  );
  const keys = await Promise.all(
    requests.map(({ prompt, stream }) =>
      requestKey(
        'text',
        cacheScope,
        sampling.temperature,
        sampling.topP,
        sampling.topK,
        maxTokens,
        seed,
        stream,
        stopIds,
        prompt,
      ),
    ),
  );
  const found = keys.map((key) => cachedSchema.safeParse(cache.get(key)).data);
  const missing = keys.flatMap((_, i) => (found[i] ? [] : [i]));
  const fresh = await generateContinuously(
    decoder,
    missing.map((i) => requests[i]),
    {
      ...sampling,
      seed,
      slots,
      stopIds,
      onFinished: (index, { ids, reason }) => cache.add([[keys[missing[index]], { ids: [...ids], reason }]]),
      onProgress,
      signal,
    },
  );
  const texts = found.map((text) => ({ ids: text?.ids ?? [], reason: text?.reason ?? 'eos' }));
  for (const [n, i] of missing.entries()) texts[i] = { ids: [...fresh.texts[n].ids], reason: fresh.texts[n].reason };

  const stopReasons: Record<string, number> = { eos: 0, length: 0 };
  const columns: Record<'pass@1' | 'answered' | 'answer_tokens', number[]> = {
    'pass@1': [],
    answered: [],
    answer_tokens: [],
  };
  for (const [i, item] of items.entries()) {
    const own = texts.slice(i * samples, (i + 1) * samples);
    const verdicts: { correct: boolean; answer: string | null }[] = [];
    for (const [sample, { ids, reason }] of own.entries()) {
      const text = tokenizer.decode(ids, { skipSpecialTokens: false });
      // A template may open the thinking itself; then only its end is in the text.
      const judged = /<think>\s*$/.test(prompts[i].text) ? `<think>${text}` : text;
      const verdict = judgeText(task.judge, judged, item);
      verdicts.push(verdict);
      stopReasons[reason] = (stopReasons[reason] ?? 0) + 1;
      await options.onTranscript?.({
        id: item.id,
        sample,
        prompt: prompts[i].text,
        text,
        ...verdict,
        expected: item.answer,
        tokens: ids.length,
        stop: reason,
      });
    }
    const mean = (values: readonly number[]): number => values.reduce((sum, v) => sum + v, 0) / values.length;
    columns['pass@1'].push(mean(verdicts.map(({ correct }) => Number(correct))));
    columns.answered.push(mean(verdicts.map(({ answer }) => Number(answer !== null))));
    columns.answer_tokens.push(mean(own.map(({ ids }) => ids.length)));
  }
  const seconds = (performance.now() - begun) / 1000;
  const metrics = (member: (i: number) => boolean): Record<string, Metric> => {
    const of = (column: keyof typeof columns): number[] => columns[column].filter((_, i) => member(i));
    const share = { unit: 'share', better: 'higher', answers: samples } as const;
    return {
      'pass@1': metric({ column: 'pass@1', values: of('pass@1'), ...share }),
      answered: metric({ column: 'answered', values: of('answered'), ...share }),
      answer_tokens: metric({
        column: 'answer_tokens',
        values: of('answer_tokens'),
        better: 'neither',
        unit: 'tokens',
      }),
    };
  };
  const names = [...new Set(items.flatMap(({ group }) => (group === null ? [] : [group])))].sort();
  return {
    primary: 'pass@1',
    metrics: metrics(() => true),
    items: {
      ids: items.map(({ id }) => id),
      hashes: await Promise.all(items.map(({ prompt, answer }) => hexDigest(JSON.stringify([prompt, answer]), 8))),
      columns,
    },
    groups: names.map((name) => ({
      name,
      items: items.filter(({ group }) => group === name).length,
      metrics: metrics((i) => items[i].group === name),
    })),
    throughput: {
      seconds,
      promptTokens: fresh.promptTokens,
      generatedTokens: fresh.generatedTokens,
      tokensPerSecond: (fresh.promptTokens + fresh.generatedTokens) / seconds,
    },
    samplesPerQuestion: samples,
    stopReasons,
  };
}
