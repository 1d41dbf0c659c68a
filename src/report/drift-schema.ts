// Drift along a chain: how far a quantized model is from its reference at each position of long texts, as one JSON object.
import { z } from 'zod';

/** Value of `kind` in a drift file. */
export const DRIFT_KIND = 'gyre.drift';
/** Raised when a reader of the version before would misread a file. */
export const DRIFT_VERSION = 1;

const measure = z.object({ value: z.number(), low: z.number().nullable(), high: z.number().nullable() });

const count = z.int().min(0);
/** Outcomes of a set of free-running chains. */
const outcomes = {
  tasks: count,
  /** Chains with a token that is not the reference's. */
  departed: count,
  /** Median position of the first such token, of the chains that departed. */
  medianDeparture: z.number().nullable(),
  /** Answers equal to the reference's; right answers of the model and of the reference. */
  sameAnswer: count,
  correct: count,
  referenceCorrect: count,
};

/** What becomes of chains that the model writes itself. */
const freeRunningSchema = z.object({
  ...outcomes,
  /** Of the chains that departed, those with the reference's answer all the same. */
  sameAnswerAfterDeparture: count,
  /** By length of the reference's chain, [from, to); null: no end. */
  byLength: z.array(z.object({ from: count, to: count.nullable(), ...outcomes })),
  /** Task by task. */
  outcomes: z.array(
    z.object({
      kind: z.string(),
      referenceTokens: count,
      departure: z.number().nullable(),
      sameAnswer: z.boolean(),
      correct: z.boolean(),
      referenceCorrect: z.boolean(),
    }),
  ),
});

export const driftSchema = z.object({
  kind: z.literal(DRIFT_KIND),
  schemaVersion: z.literal(DRIFT_VERSION),
  version: z.string(),
  model: z.object({ name: z.string(), fingerprint: z.string() }),
  reference: z.object({ name: z.string(), fingerprint: z.string() }),
  /** Texts the numbers are means over, in words and in number. */
  text: z.string(),
  chains: z.int().min(1),
  /** Runs of positions [from, to), in order. */
  positions: z
    .array(
      z.object({
        from: z.int().min(0),
        to: z.int().min(1),
        /** KL(reference ‖ model), nats per token. */
        kl: measure,
        /** Share of positions with the same most likely next token, 0 … 1. */
        top1Agreement: measure,
      }),
    )
    .min(1),
  /** Means over all positions. */
  kl: measure.optional(),
  top1Agreement: measure.optional(),
  /** Absent when only given chains were followed. */
  freeRunning: freeRunningSchema.optional(),
});
export type DriftResult = z.output<typeof driftSchema>;
