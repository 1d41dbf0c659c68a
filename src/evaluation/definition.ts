// A benchmark task as a declarative JSON file: where its questions come from, how they are put, how answers are judged.
// The files lie in the folder `tasks` of the package, one per task; docs/evaluation.md says how to write one.
import { z } from 'zod';
import { GyreError } from '../core/errors.js';
import { validate } from '../formats/huggingface-config.js';

/** Limits on task files and on the data they name: both come from outside. */
export const TASK_LIMITS = {
  /** Bytes of a task file. */
  definitionBytes: 256 * 1024,
  /** Bytes of one data file, compressed and not. */
  dataBytes: 1024 * 1024 * 1024,
  rows: 2_000_000,
  /** Characters of one rendered prompt or choice. */
  textLength: 4_000_000,
  /** Choices of one question. */
  choices: 64,
  fewShot: 256,
} as const;

const name = z.string().regex(/^[a-z0-9][a-z0-9_-]{0,63}$/, 'expected lower-case letters, digits, _ and -');
/** Jinja over the columns of a row, as in chat templates and in lm-evaluation-harness. */
const template = z.string().max(20_000);
/** A column, or a field inside one: `choices.text`. */
const column = z
  .string()
  .regex(/^[^.\s][^.]*(\.[^.]+)*$/, 'expected a column, or a field inside one as in choices.text');
const relativePath = z
  .string()
  .min(1)
  .max(500)
  .refine((p) => !p.startsWith('/') && !p.split('/').includes('..') && !p.includes('\\'), 'expected a relative path');

const sourceSchema = z.strictObject({
  /** Data set on the hub; null for one that is only read from the folder of `--data`. */
  dataset: z
    .string()
    .regex(/^[A-Za-z0-9][\w.-]*\/[A-Za-z0-9][\w.-]*$/, 'expected owner/name')
    .nullable(),
  /**
   * Commit: branches move. Or the hub's own Parquet conversion, for sets that are published as a script and have no other
   * files; the commit that was read is in the result.
   */
  revision: z
    .string()
    .regex(
      /^(?:[0-9a-f]{40}|refs\/convert\/parquet)$/,
      'expected a commit of 40 hexadecimal digits, or refs/convert/parquet',
    )
    .nullable(),
  /** Files of each split in order, with the SHA-256 of their content where known. */
  splits: z.record(
    z.string(),
    z
      .array(
        z.strictObject({
          path: relativePath,
          sha256: z
            .string()
            .regex(/^[0-9a-f]{64}$/)
            .optional(),
        }),
      )
      .min(1)
      .max(256),
  ),
  /** Further names under which people keep a split's file, tried in the folder of `--data`. */
  localNames: z.record(z.string(), z.array(relativePath).max(16)).default({}),
  /** The hub asks for an agreement before it hands the data out. */
  gated: z.boolean().default(false),
});

/** A list of choices: one by one, each rendered or taken from a column as it is, or a column that holds them all. */
const choicesSchema = z.union([
  z
    .array(z.union([template, z.strictObject({ column })]))
    .min(1)
    .max(TASK_LIMITS.choices),
  z.strictObject({ column }),
]);

/** Which choice is right: its index, a column with it, or a column whose value stands in a list of labels. */
const answerSchema = z.union([
  z.int().min(0),
  z.strictObject({ column, labels: z.union([column, z.array(z.string())]).optional() }),
]);

const common = {
  schemaVersion: z.literal(1),
  name,
  /** For people. */
  title: z.string().max(200),
  /** Raised when numbers are no longer comparable with those before. */
  version: z.int().min(0),
  source: sourceSchema,
  /** Split that is measured. */
  split: z.string(),
  /** Columns a row must have: the published schema, as far as the task reads it. */
  columns: z.array(column).min(1).max(64),
  /** Column with a stable id; the position counts when there is none. */
  id: column.optional(),
  /** Only rows whose column has this value. */
  where: z.strictObject({ column, equals: z.union([z.string(), z.number(), z.boolean()]) }).optional(),
  /** Further variables for the templates, each rendered in order from those before. */
  variables: z.record(z.string(), template).default({}),
  /** Named cleaning of the texts, where a benchmark defines one; see `cleaners` in items.ts. */
  clean: z.enum(['none', 'wikihow-brackets']).default('none'),
};

const fewShot = {
  /** Column that names a row's subject; results are also given per subject, and examples come from the same one. */
  groupBy: column.optional(),
  /** Text before everything, once. */
  description: template.default(''),
  fewShot: z
    .strictObject({
      split: z.string(),
      /** Examples unless told otherwise. */
      count: z.int().min(0).max(TASK_LIMITS.fewShot).default(0),
      /**
       * `first`: the first rows of the split (of the subject); `random`: drawn for every question, the same ones as
       * lm-evaluation-harness draws.
       */
      sampler: z.enum(['first', 'random']).default('random'),
      separator: z.string().default('\n\n'),
    })
    .optional(),
};

/** Perplexity of a text. */
const textTask = z.strictObject({
  ...common,
  type: z.literal('text'),
  /** The text of a row. */
  text: template,
  /** Between rows. */
  join: z.string(),
  /** Rows used, from the first; all by default. */
  rows: z.int().min(1).optional(),
  /**
   * Instead of the joined rows: so many windows, each from a place drawn in a drawn row that is long enough, as GPTQ's
   * evaluation draws them (Python's generator, this seed).
   */
  draw: z.strictObject({ windows: z.int().min(1).max(65_536), seed: z.int().min(0) }).optional(),
  /** Tokens per window, unless told otherwise or the model's context is shorter. */
  seqLen: z.int().min(2).default(2048),
  /** Windows at most. */
  windows: z.int().min(1).optional(),
});

/** Multiple choice by log-likelihood. */
const choicesTask = z.strictObject({
  ...common,
  ...fewShot,
  type: z.literal('choices'),
  /** The question. Or `contexts`, one per choice, where choices differ in the middle and end alike (`continuation`). */
  prompt: template.optional(),
  choices: choicesSchema.optional(),
  contexts: z.array(template).min(2).max(TASK_LIMITS.choices).optional(),
  continuation: template.optional(),
  answer: answerSchema,
  /** Between question and choice. */
  delimiter: z.string().default(' '),
  metrics: z.array(z.enum(['acc', 'acc_norm'])).min(1),
});

/** Likelihood of the one right ending. */
const completionTask = z.strictObject({
  ...common,
  type: z.literal('completion'),
  prompt: template,
  /** The ending, with the space before it. */
  target: template,
});

/** Answers written by the model. */
const generationTask = z.strictObject({
  ...common,
  type: z.literal('generation'),
  groupBy: column.optional(),
  /** The user's message. With choices it sees them as `choices`, with `letters` to name them. */
  prompt: template,
  system: template.optional(),
  choices: choicesSchema.optional(),
  /** Seeded order of the choices, for sets that keep the right one first. */
  shuffle: z.boolean().default(false),
  /** The right answer: a template, or which choice. */
  answer: z.union([template, answerSchema]),
  /** How the answer is found in the text and compared; see `judges` in judge.ts. */
  judge: z.enum(['math', 'integer', 'letter', 'chain']),
  /** As in the papers that report the benchmark for reasoning models. */
  sampling: z
    .strictObject({
      temperature: z.number().min(0).max(10).default(0.6),
      topP: z.number().min(0).max(1).default(0.95),
      topK: z.int().min(0).default(0),
      maxTokens: z.int().min(1).max(1_000_000).default(32_768),
    })
    .prefault({}),
  /** Answers per question. */
  samples: z.int().min(1).max(1024).default(1),
});

export const taskSchema = z
  .discriminatedUnion('type', [textTask, choicesTask, completionTask, generationTask])
  .superRefine((task, ctx) => {
    const issue = (path: string, message: string): void => ctx.addIssue({ code: 'custom', path: [path], message });
    const splits = Object.keys(task.source.splits);
    const { dataset, revision } = task.source;
    if ((dataset === null) !== (revision === null)) issue('source', 'dataset and revision go together');
    if (!splits.includes(task.split)) issue('split', `source.splits has no '${task.split}' (${splits.join(', ')})`);
    if (task.type === 'text' && task.draw && (task.rows ?? task.windows) !== undefined)
      issue('draw', 'goes with neither rows nor windows');
    if (task.type !== 'choices') return;
    const plain = task.prompt !== undefined && task.choices !== undefined;
    const contexts = task.contexts !== undefined && task.continuation !== undefined;
    if (plain === contexts) issue('prompt', 'expected either prompt and choices, or contexts and continuation');
    if (contexts && task.metrics.includes('acc_norm')) issue('metrics', 'acc_norm needs choices that differ in length');
    if (task.fewShot && !splits.includes(task.fewShot.split))
      issue('fewShot', `source.splits has no '${task.fewShot.split}'`);
  });

/** A task as its file says, defaults filled in. */
export type TaskDefinition = z.output<typeof taskSchema>;
export type TextTask = Extract<TaskDefinition, { type: 'text' }>;
export type ChoicesTask = Extract<TaskDefinition, { type: 'choices' }>;
export type CompletionTask = Extract<TaskDefinition, { type: 'completion' }>;
export type GenerationTask = Extract<TaskDefinition, { type: 'generation' }>;

/**
 * Reads a task file.
 * @param file its name, for messages.
 * @throws GyreError `limit-exceeded`, `file-corrupt` when it is not JSON, `config-invalid` that names each wrong field.
 */
export function parseTaskDefinition(text: string, file: string): TaskDefinition {
  if (text.length > TASK_LIMITS.definitionBytes) {
    throw new GyreError(
      'limit-exceeded',
      `${file} has ${text.length} characters, over ${TASK_LIMITS.definitionBytes}`,
      {
        remedy: 'A task file holds the definition alone; the questions are data.',
      },
    );
  }
  let json: unknown;
  try {
    json = JSON.parse(text);
  } catch (cause) {
    throw new GyreError('file-corrupt', `${file} is not JSON: ${cause instanceof Error ? cause.message : ''}`, {
      remedy: 'Compare it with the files in the folder tasks.',
      cause,
    });
  }
  return validate(taskSchema, json, file);
}
