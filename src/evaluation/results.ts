// The result file of `gyre eval`: what was measured, of which model, how and on which machine, as one versioned JSON object.
// Whoever reads results (`gyre compare`, `gyre report`) goes through this schema; it imports nothing but zod.
//
// Every evaluation keeps a number per item, in columns that share an order, so that two results can be compared item by
// item. A metric says which column it is the weighted mean of and what is done to the mean:
// value = transform(Σ weight·column / Σ weight).
import { z } from 'zod';

/** Value of `kind` in a result file. */
export const RESULT_KIND = 'gyre.evaluation';
/** Raised when a reader of the version before would misread a file. */
export const RESULT_VERSION = 1;
/** Limits on result files, which come from outside like any other file. */
export const RESULT_LIMITS = { bytes: 512 * 1024 * 1024, evaluations: 4096, items: 5_000_000, metrics: 64 } as const;

const count = z.int().min(0);
const scalar = z.union([z.string(), z.number(), z.boolean(), z.null()]);

/** One measured number with its 95% interval. */
export const metricSchema = z.object({
  value: z.number(),
  /** Ends of the 95% interval; null when one item, or none, leaves it open. */
  low: z.number().nullable(),
  high: z.number().nullable(),
  /** Of `value`; null when there is one item. For `exp` metrics by the delta method. */
  standardError: z.number().nullable(),
  /** How the interval was made: `t` Student's t over items, `wilson` for shares of right answers, `none`. */
  interval: z.enum(['t', 'wilson', 'none']),
  /** Independent items behind it (windows, documents, questions). */
  n: count,
  /** Column of `items.columns` that it is the weighted mean of. */
  column: z.string(),
  /** `exp`: the mean is exponentiated (perplexity); `exp2`: 2 to its power. */
  transform: z.enum(['identity', 'exp', 'exp2']),
  /** Column of weights in `items.columns`; all items weigh the same when null. */
  weight: z.string().nullable(),
  better: z.enum(['lower', 'higher', 'neither']),
  /** For axes and tables: `share` (0 … 1), `nats`, `bits`, `tokens`, or null for a bare number. */
  unit: z.enum(['share', 'nats', 'bits', 'tokens']).nullable(),
});
export type Metric = z.output<typeof metricSchema>;

/** Numbers per item; every column is as long as `ids`. */
const itemsSchema = z
  .object({
    /** Stable names: `window-12`, a document's name, the task's own question id or its position. */
    ids: z.array(z.string()),
    /** First 16 hexadecimal digits of the SHA-256 of what the item asked, to tell same questions from same names. */
    hashes: z.array(z.string()).nullable(),
    columns: z.record(z.string(), z.array(z.number())),
  })
  .refine(
    ({ ids, hashes, columns }) =>
      (hashes === null || hashes.length === ids.length) && Object.values(columns).every((c) => c.length === ids.length),
    'every column must be as long as ids',
  );

const throughputSchema = z.object({
  seconds: z.number().min(0),
  /** Tokens that went through the model, forward passes of prompts. */
  promptTokens: count,
  /** Tokens that it generated. */
  generatedTokens: count,
  /** Both, per second. */
  tokensPerSecond: z.number().min(0),
});

/** Where items came from. */
const sourceSchema = z.object({
  /** Hub id of the data set, or null for a file of the user's. */
  dataset: z.string().nullable(),
  revision: z.string().nullable(),
  split: z.string().nullable(),
  /** Files read, with the SHA-256 of each. */
  files: z.array(z.object({ name: z.string(), sha256: z.string() })),
});

const shared = {
  /** Task or text name, e.g. `wikitext2`, `arc_easy`; unique in a file together with `settings`. */
  name: z.string(),
  /** Version of the task's definition; results of different versions are not compared. */
  version: z.int(),
  source: sourceSchema,
  /** What decides the numbers beside the model: seqLen, stride, fewShot, limit, seed, temperature, … */
  settings: z.record(z.string(), scalar),
  /** The number to look at first; a key of `metrics`. */
  primary: z.string(),
  metrics: z.record(z.string(), metricSchema),
  items: itemsSchema,
  throughput: throughputSchema,
};

const group = z.object({ name: z.string(), items: count, metrics: z.record(z.string(), metricSchema) });

/**
 * Perplexity of a text and, with a reference, KL and agreement. Metrics: `perplexity`, `nll`; rolling protocol also
 * `bits_per_byte`, `byte_perplexity`, `word_perplexity`; with a reference `kl`, `top1_agreement`, `reference_perplexity`.
 */
const textSchema = z.object({
  type: z.literal('text'),
  ...shared,
  tokens: count,
  windows: count,
  /** Per document when the text came as documents that were scored on their own; else empty. */
  documents: z.array(group),
});

/** Multiple choice, or the likelihood of one right ending. Metrics: `acc`, `acc_norm`, `perplexity` as the task asks. */
const choicesSchema = z.object({
  type: z.literal('choices'),
  ...shared,
  /** Requests (a question with one of its choices) whose beginning was cut off to fit the model's context. */
  truncated: count.default(0),
  /** Per subject (MMLU) where the task has subjects; else empty. */
  groups: z.array(group),
});

/** Answers written by the model. Metrics: `pass@1`, `answered` (share with an answer found), `answer_tokens`. */
const generationSchema = z.object({
  type: z.literal('generation'),
  ...shared,
  samplesPerQuestion: z.int().min(1),
  /** How the texts ended: `eos`, `length`. */
  stopReasons: z.record(z.string(), count),
  groups: z.array(group),
  /** JSON lines of questions, texts and extracted answers, relative to the result file; null when not kept. */
  transcripts: z.string().nullable(),
});

export const evaluationSchema = z.discriminatedUnion('type', [textSchema, choicesSchema, generationSchema]);
export type Evaluation = z.output<typeof evaluationSchema>;
export type TextResult = z.output<typeof textSchema>;
export type ChoicesResult = z.output<typeof choicesSchema>;
export type GenerationResult = z.output<typeof generationSchema>;

/** What a result says of a model. */
export const modelResultSchema = z.object({
  name: z.string(),
  family: z.string(),
  /** First 16 hexadecimal digits of a SHA-256 over config.json (quantization settings included) and all tensor headers. */
  fingerprint: z.string(),
  /** As normalised from `quantization_config`; null for an unquantized model. */
  quantization: z.record(z.string(), z.unknown()).nullable(),
  parameters: count,
  /** Bytes of tensor data. */
  bytes: count,
  /** Stored bits per parameter of the whole model, and of the linears of the blocks alone. */
  bitsPerWeight: z.number(),
  linearBitsPerWeight: z.number(),
});
export type ModelResult = z.output<typeof modelResultSchema>;

/** A whole result file. */
export const resultSchema = z.object({
  kind: z.literal(RESULT_KIND),
  schemaVersion: z.literal(RESULT_VERSION),
  /** gyre's version. */
  version: z.string(),
  /** ISO 8601, UTC. */
  createdAt: z.string(),
  model: modelResultSchema,
  /** The model that KL and agreement are against. */
  reference: modelResultSchema.nullable(),
  backend: z.object({ name: z.string(), description: z.string(), threads: z.number() }),
  /** Platform, processor, cores, memory, runtime. */
  machine: z.record(z.string(), z.union([z.string(), z.number()])),
  /** How the model was run: activations, headBits, … */
  settings: z.record(z.string(), scalar),
  evaluations: z.array(evaluationSchema).max(RESULT_LIMITS.evaluations),
});
export type EvaluationResult = z.output<typeof resultSchema>;
