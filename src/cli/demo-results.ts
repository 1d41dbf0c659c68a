// The demo's measurements as result files of `gyre eval`, for its report.
import type { TextEvaluation } from '../evaluation/index.js';
import {
  RESULT_KIND,
  RESULT_VERSION,
  type EvaluationResult,
  type Metric,
  type TextResult,
} from '../evaluation/results.js';
import { modelFingerprint, summarizeModel } from '../evaluation/index.js';
import type { ModelSource } from '../models/load.js';
import type { BackendInfo } from '../ops/backend.js';
import { weightedMean } from '../report/statistics.js';
import { VERSION } from '../version.js';
import { machineInfo } from './context.js';

type ColumnSpec = Pick<Metric, 'transform' | 'better' | 'unit'> & { readonly metric: string; readonly column: string };

const COLUMNS: readonly ColumnSpec[] = [
  { metric: 'perplexity', column: 'nll', transform: 'exp', better: 'lower', unit: null },
  { metric: 'nll', column: 'nll', transform: 'identity', better: 'lower', unit: 'nats' },
  { metric: 'kl', column: 'kl', transform: 'identity', better: 'lower', unit: 'nats' },
  { metric: 'top1_agreement', column: 'top1_agreement', transform: 'identity', better: 'higher', unit: 'share' },
  { metric: 'reference_perplexity', column: 'reference_nll', transform: 'exp', better: 'neither', unit: null },
];

/** What a result says of a model. */
export async function describeModel(source: ModelSource): Promise<EvaluationResult['model']> {
  const { family, parameters, bytes, bitsPerWeight, linearBitsPerWeight } = summarizeModel(source);
  return {
    name: source.name,
    family,
    fingerprint: await modelFingerprint(source),
    quantization: source.quantization ? { ...source.quantization } : null,
    parameters,
    bytes,
    bitsPerWeight,
    linearBitsPerWeight,
  };
}

/** A result of one text. */
export function textResultFile(
  name: string,
  evaluation: TextEvaluation,
  run: { model: EvaluationResult['model']; reference: EvaluationResult['model'] | null; backend: BackendInfo },
): EvaluationResult {
  const { scores, seconds, tokens, windows, seqLen, tokensPerSecond } = evaluation;
  const columns: Record<string, number[]> = {
    tokens: scores.map((score) => score.tokens),
    nll: scores.map((score) => score.nll),
  };
  if (run.reference) {
    columns['kl'] = scores.map((score) => score.kl ?? NaN);
    columns['top1_agreement'] = scores.map((score) => score.agree ?? NaN);
    columns['reference_nll'] = scores.map((score) => score.referenceNll ?? NaN);
  }
  const text: TextResult = {
    type: 'text',
    name,
    version: 1,
    source: { dataset: null, revision: null, split: null, files: [] },
    settings: { seqLen },
    primary: 'perplexity',
    metrics: Object.fromEntries(
      COLUMNS.flatMap((spec) => {
        const values = columns[spec.column];
        return values ? [[spec.metric, metricOf(values, columns['tokens'], spec)] as const] : [];
      }),
    ),
    items: { ids: scores.map((_, i) => `window-${i}`), hashes: null, columns },
    throughput: { seconds, promptTokens: tokens, generatedTokens: 0, tokensPerSecond },
    tokens,
    windows,
    documents: [],
  };
  return {
    kind: RESULT_KIND,
    schemaVersion: RESULT_VERSION,
    version: VERSION,
    createdAt: new Date().toISOString(),
    ...run,
    machine: { ...machineInfo() },
    settings: { activations: 'exact', headBits: 16 },
    evaluations: [text],
  };
}

function metricOf(values: number[], weights: number[], spec: ColumnSpec): Metric {
  const { metric: _, ...rest } = spec;
  const { value, low, high, standardError, n } = weightedMean(values, weights);
  const map = (x: number | null): number | null => (x === null || spec.transform === 'identity' ? x : Math.exp(x));
  const mapped = map(value) ?? value;
  // The delta method: d exp(x) = exp(x) dx.
  const scale = spec.transform === 'identity' ? 1 : mapped;
  return {
    ...rest,
    value: mapped,
    low: map(low),
    high: map(high),
    standardError: standardError === null ? null : scale * standardError,
    interval: low === null ? 'none' : 't',
    n,
    weight: 'tokens',
  };
}
