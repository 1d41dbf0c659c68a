// The record of a quantization run: `gyre-report.json` in the output folder and what `gyre quantize --json` prints, as one
// versioned JSON object. Whoever reads it (`gyre report`) goes through this schema; it imports nothing but zod.
import { z } from 'zod';

/** Name of the record in the output folder. */
export const RECORD_FILE = 'gyre-report.json';
/** Value of `kind` in a record. */
export const RECORD_KIND = 'gyre.quantization';
/** Raised when a reader of the version before would misread a file. */
export const RECORD_VERSION = 1;

const scalar = z.union([z.string(), z.number(), z.boolean(), z.null()]);

/** Values of one matrix [rows, channels], seen through a sample of its rows. */
export const rangeSchema = z.object({
  /** Rows in the sample. */
  rows: z.int().min(1),
  /** Root mean square of the values; the unit of `channels` and of the histogram's `limit`. */
  rms: z.number().min(0),
  /** Largest magnitude. */
  absMax: z.number().min(0),
  /** Largest over median of the channels' largest magnitudes; 1 means that no channel stands out. */
  channelRatio: z.number(),
  /** Fourth standardised moment: 3 for a normal distribution. */
  kurtosis: z.number(),
  /** Largest magnitude of each run of `channelsPerBin` channels, ÷ rms. */
  channels: z.array(z.number()),
  /** Counts of values in equal bins from −limit to limit (× rms). */
  histogram: z.object({ limit: z.number(), counts: z.array(z.int().min(0)) }),
});
export type Range = z.output<typeof rangeSchema>;

/** The same matrix as the model has it and in the space of the transform, where the grid has to hold it. */
const beforeAfter = z.object({ before: rangeSchema, after: rangeSchema.nullable() });

/** Ranges of a linear group's stacked weights [out, in] and of its inputs [tokens, in]. */
export const groupRangesSchema = z.object({
  channelsPerBin: z.int().min(1),
  weights: beforeAfter,
  /** Null for recipes without calibration. */
  activations: beforeAfter.nullable(),
});
export type GroupRanges = z.output<typeof groupRangesSchema>;

/** What became of one linear group. */
export const groupRecordSchema = z.object({
  layer: z.int().min(0),
  group: z.enum(['qkv', 'o', 'gateUp', 'down']),
  modules: z.array(z.string()),
  /** The recipe's numbers. `error`: ‖(Ŵ−W)X‖² / ‖WX‖² on the calibration inputs. */
  stats: z.record(z.string(), z.number()),
  /**
   * Loss per optimiser step, when something was learned: squared error of the outputs as a share of ‖WX‖², up to a
   * constant of the group.
   */
  curve: z.array(z.number()).optional(),
  ranges: groupRangesSchema.optional(),
});
export type GroupRecord = z.output<typeof groupRecordSchema>;

/** See {@link StageCurve}. */
export const stageCurveSchema = z.object({
  stage: z.string(),
  /** Mean over the epoch's steps. */
  train: z.array(z.number()).readonly(),
  /** After each epoch; the first is before any, so it is one longer. */
  validation: z.array(z.number()).readonly(),
  /** The epoch that was kept: an index of `validation`. */
  best: z.int().min(0),
});
/** Losses of one stage of a block's training, by epoch. */
export type StageCurve = Readonly<z.output<typeof stageCurveSchema>>;

/** Losses of a block's training. */
export const blockTrainingSchema = z.object({
  layer: z.int().min(0),
  stages: z.array(stageCurveSchema).readonly(),
});
export type BlockTraining = Readonly<z.output<typeof blockTrainingSchema>>;

/** A model's name and size in a record; the same names as in evaluation results. */
const sizeSchema = z.object({
  fingerprint: z.string(),
  parameters: z.int().min(0),
  bytes: z.int().min(0),
  bitsPerWeight: z.number(),
  linearBytes: z.int().min(0),
  linearBitsPerWeight: z.number(),
});

/** A whole record. All of it is the same for equal runs, but for what is marked. */
export const recordSchema = z.object({
  kind: z.literal(RECORD_KIND),
  schemaVersion: z.literal(RECORD_VERSION),
  /** gyre's version. */
  version: z.string(),
  method: z.string(),
  settings: z.record(z.string(), scalar),
  layout: z.string(),
  /** Calibration data in words. */
  calibration: z.string(),
  notes: z.array(z.string()),
  /** The quantized model, and the one it was made from. */
  model: sizeSchema,
  source: sizeSchema.extend({ name: z.string(), family: z.string() }),
  groups: z.array(groupRecordSchema),
  /** Of recipes that train whole blocks. */
  training: z.array(blockTrainingSchema).optional(),
  /** Only on the command's output: seconds of the run. */
  seconds: z.number().optional(),
  /** Only on the command's output: the folder. */
  out: z.string().optional(),
});
export type QuantizationRecord = z.output<typeof recordSchema>;
