// What a report is made from: result JSON of gyre's commands and benchmarks, recognised by its shape and checked whole.
// Errors name the file and the field.
import { z } from 'zod';
import { GyreError } from '../core/errors.js';
import { RESULT_KIND, resultSchema, type EvaluationResult } from '../evaluation/results.js';
import { RECORD_KIND, recordSchema, type QuantizationRecord } from '../quant/results.js';
import { DRIFT_KIND, driftSchema, type DriftResult } from './drift-schema.js';

/** Bytes of one result file at most. */
export const MAX_INPUT_BYTES = 512 * 1024 * 1024;

/** Linears of a model as `gyre inspect --json` prints them; of the rest only what a report shows. */
const inspectionSchema = z.object({
  name: z.string(),
  fingerprint: z.string(),
  parameters: z.number(),
  bytes: z.number(),
  bitsPerWeight: z.number(),
  linearBitsPerWeight: z.number(),
  linears: z.array(
    z.object({
      module: z.string(),
      layer: z.int().min(0),
      group: z.enum(['qkv', 'o', 'gateUp', 'down']),
      space: z.enum(['dense', 'quantized', 'rotated']),
      channelRatio: z.number(),
      kurtosis: z.number(),
    }),
  ),
});
export type Inspection = z.output<typeof inspectionSchema>;

/** A benchmark: rows of flat objects under `rows` or `results`, whose numbers are measures by their names. */
const benchmarkRow = z.record(z.string(), z.unknown());
const benchmarkSchema = z
  .looseObject({
    machine: z
      .union([z.string(), z.looseObject({ cpu: z.string().optional(), gpu: z.string().optional() })])
      .optional(),
    rows: z.array(benchmarkRow).optional(),
    results: z.array(benchmarkRow).optional(),
  })
  .refine(({ rows, results }) => (rows ?? results ?? []).length > 0, 'expected rows under "rows" or "results"');
export type Benchmark = z.output<typeof benchmarkSchema>;

/** One file of results. */
export type ReportInput =
  | { readonly kind: 'evaluation'; readonly file: string; readonly result: EvaluationResult }
  | { readonly kind: 'quantization'; readonly file: string; readonly result: QuantizationRecord }
  | { readonly kind: 'drift'; readonly file: string; readonly result: DriftResult }
  | { readonly kind: 'inspection'; readonly file: string; readonly result: Inspection }
  | { readonly kind: 'benchmark'; readonly file: string; readonly result: Benchmark };

/** Kinds of input in words, for messages and help. */
export const INPUT_KINDS = {
  evaluation: '`gyre eval --json`',
  quantization: '`gyre quantize` (gyre-report.json in its output folder)',
  drift: '`gyre eval --drift`',
  inspection: '`gyre inspect --json`',
  benchmark: 'bench/results',
} as const satisfies Record<ReportInput['kind'], string>;

/** How a file is told: the first that matches; its schema then says what is wrong with it. */
const READERS: readonly { kind: ReportInput['kind']; matches: (json: object) => boolean; schema: z.ZodType }[] = [
  { kind: 'evaluation', matches: (json) => kindOf(json) === RESULT_KIND, schema: resultSchema },
  { kind: 'quantization', matches: (json) => kindOf(json) === RECORD_KIND, schema: recordSchema },
  { kind: 'drift', matches: (json) => kindOf(json) === DRIFT_KIND, schema: driftSchema },
  {
    kind: 'inspection',
    matches: (json) => 'linears' in json && 'linearBitsPerWeight' in json,
    schema: inspectionSchema,
  },
  {
    kind: 'benchmark',
    matches: (json) => ('rows' in json || 'results' in json) && ('machine' in json || 'date' in json),
    schema: benchmarkSchema,
  },
];

function kindOf(json: object): unknown {
  return 'kind' in json ? json.kind : undefined;
}

/**
 * Reads one file's text. Undefined for JSON that is nothing gyre writes as a result (a config.json, say).
 * @throws GyreError `config-invalid` for text that is no JSON and for results with a field missing or wrong.
 */
export function readInput(file: string, text: string): ReportInput | undefined {
  let json: unknown;
  try {
    json = JSON.parse(text);
  } catch (cause) {
    throw new GyreError('config-invalid', `${file} is not JSON: ${cause instanceof Error ? cause.message : ''}`, {
      remedy: 'give result files that gyre wrote with --json',
      cause,
    });
  }
  if (typeof json !== 'object' || json === null) return undefined;
  const object = json;
  const reader = READERS.find(({ matches }) => matches(object));
  if (!reader) return undefined;
  const parsed = reader.schema.safeParse(json);
  if (!parsed.success) {
    const [issue] = parsed.error.issues;
    const field = issue.path.join('.') || 'the file';
    throw new GyreError('config-invalid', `${file}, ${field}: ${issue.message}`, {
      remedy: `make it again with ${INPUT_KINDS[reader.kind]} of this version of gyre`,
    });
  }
  return { kind: reader.kind, file, result: parsed.data } as ReportInput;
}
