// Accuracy on chain-of-thought tasks: greedy answers by the chat template, judged by exact match of the final answer.
import { z } from 'zod';
import { GyreError, ensure } from '../core/errors.js';
import type { ProgressListener } from '../core/progress.js';
import { generateContinuously } from '../generate/index.js';
import type { Decoder } from '../models/decoder.js';
import type { Tokenizer } from '../tokenizer/index.js';
import { extractAnswer, isCorrect, TASK_KINDS, type TaskSample } from './tasks/index.js';

const taskSchema = z.object({
  kind: z.enum(TASK_KINDS.map((kind) => kind.name) as [string, ...string[]]),
  difficulty: z.number().int(),
  question: z.string().min(1),
  steps: z.string().default(''),
  answer: z.string().min(1),
});

/**
 * Reads tasks, one JSON object a line (`models/gyre-14m/eval/tasks.jsonl`); empty lines are passed over.
 * @throws GyreError `config-invalid` naming the line, or when there is no task.
 */
export function parseTasks(text: string, name: string): TaskSample[] {
  const tasks: TaskSample[] = [];
  for (const [i, line] of text.split('\n').entries()) {
    if (line.trim() === '') continue;
    let json: unknown;
    try {
      json = JSON.parse(line);
    } catch (cause) {
      throw new GyreError('config-invalid', `${name}, line ${i + 1}: not JSON`, {
        cause,
        remedy: 'Write one JSON object per line.',
      });
    }
    const parsed = taskSchema.safeParse(json);
    if (!parsed.success) {
      const issue = parsed.error.issues[0];
      throw new GyreError('config-invalid', `${name}, line ${i + 1}: ${issue.path.join('.')}: ${issue.message}`, {
        remedy:
          'A task has kind, difficulty, question, steps and answer, as models/training/export-eval.ts writes them.',
      });
    }
    tasks.push(parsed.data);
  }
  ensure(tasks.length > 0, 'config-invalid', () => `${name} holds no tasks`, 'Write one JSON object per line.');
  return tasks;
}

/** Options of {@link evaluateTasks}. */
export interface EvaluateTasksOptions {
  /** Tasks answered together; default 32. */
  readonly batchSize?: number;
  /** Tokens of an answer at most, its steps included; default 512. */
  readonly maxTokens?: number;
  /** Stage `generate`, in decode steps. */
  readonly onProgress?: ProgressListener;
  readonly signal?: AbortSignal;
}

/** One answered task. */
export interface AnsweredTask {
  readonly task: TaskSample;
  /** What the model wrote. */
  readonly text: string;
  /** The final answer in it; null when the model came to none. */
  readonly answer: string | null;
  readonly correct: boolean;
}

/** Right answers of one kind of task. */
export interface KindAccuracy {
  readonly kind: string;
  readonly tasks: number;
  readonly correct: number;
  readonly accuracy: number;
}

/** What {@link evaluateTasks} measures. */
export interface TasksEvaluation {
  readonly tasks: number;
  readonly correct: number;
  readonly accuracy: number;
  /** Binomial. */
  readonly accuracyStandardError: number;
  readonly kinds: readonly KindAccuracy[];
  readonly answers: readonly AnsweredTask[];
  readonly seconds: number;
}

/** Answers tasks greedily and counts the right ones. @throws GyreError as `generateContinuously`. */
export async function evaluateTasks(
  decoder: Decoder,
  tokenizer: Tokenizer,
  tasks: readonly TaskSample[],
  options: EvaluateTasksOptions = {},
): Promise<TasksEvaluation> {
  const { batchSize, maxTokens = 512, onProgress, signal } = options;
  const begun = performance.now();
  const prompts = tasks.map((task) => taskPrompt(tokenizer, task));
  const stopIds = [...new Set([...decoder.config.eosTokenIds, ...tokenizer.eosTokenIds])];
  const requests = prompts.map((prompt, stream) => ({ prompt, maxTokens, stream }));
  const generation = { slots: batchSize, stopIds, onProgress, signal };
  const { texts } = await generateContinuously(decoder, requests, generation);
  const answers = texts.map(({ ids }, i) => judge(tasks[i], tokenizer.decode(ids, { skipSpecialTokens: false })));
  const correct = answers.filter((answer) => answer.correct).length;
  const accuracy = correct / tasks.length;
  return {
    tasks: tasks.length,
    correct,
    accuracy,
    accuracyStandardError: Math.sqrt((accuracy * (1 - accuracy)) / tasks.length),
    kinds: [...new Set(tasks.map((task) => task.kind))].sort().map((kind) => {
      const of = answers.filter((answer) => answer.task.kind === kind);
      const right = of.filter((answer) => answer.correct).length;
      return { kind, tasks: of.length, correct: right, accuracy: right / of.length };
    }),
    answers,
    seconds: (performance.now() - begun) / 1000,
  };
}

/** A task's question as the model's chat template puts it, up to where the answer begins. */
export function taskPrompt(tokenizer: Tokenizer, task: Pick<TaskSample, 'question'>): Int32Array {
  const text = tokenizer.applyChatTemplate([{ role: 'user', content: task.question }], { addGenerationPrompt: true });
  return tokenizer.encode(text, { addSpecialTokens: false });
}

/** Whether a text ends in the right answer of a task. */
export function judge(task: TaskSample, text: string): AnsweredTask {
  return { task, text, answer: extractAnswer(text) ?? null, correct: isCorrect(task, text) };
}
