// What the inputs say, model by model: results joined by fingerprint, with a name and a colour for each model and the
// losses measured against the original item by item.
import type { Evaluation, EvaluationResult, Metric } from '../evaluation/results.js';
import type { QuantizationRecord } from '../quant/results.js';
import type { ReportInput } from './inputs.js';
import type { KeyItem } from './render.js';
import { mapEstimate, pairedDifference, type Estimate } from './statistics.js';
import { SERIES } from './theme.js';

/** Names of methods as their papers write them; others stay as they are. */
const METHOD_NAMES: Readonly<Record<string, string>> = {
  rtn: 'RTN',
  awq: 'AWQ',
  gptq: 'GPTQ',
  paroquant: 'ParoQuant',
  smoothquant: 'SmoothQuant',
  quarot: 'QuaRot',
  smoothrot: 'SmoothRot',
};

/** One model with everything known of it. */
export interface ReportModel {
  readonly fingerprint: string;
  /** Unique in the report. */
  readonly label: string;
  /** Null for an unquantized model. */
  readonly bits: number | null;
  /** Bytes of all tensors. */
  readonly bytes: number;
  readonly bitsPerWeight: number;
  /** Of the linears of the blocks, which are what is quantized. */
  readonly linearBitsPerWeight: number;
  readonly record: QuantizationRecord | undefined;
  readonly results: readonly EvaluationResult[];
  /** Seconds it took to quantize, where known. */
  readonly seconds: number | undefined;
  readonly style: Pick<KeyItem, 'color' | 'shape'>;
}

/** What was measured on one text or task, by model. */
export interface Measurement {
  /** Same definition and settings: numbers of one measurement compare. */
  readonly key: string;
  readonly name: string;
  readonly type: Evaluation['type'];
  /** Settings in words. */
  readonly settings: string;
  readonly rows: readonly { readonly model: ReportModel; readonly evaluation: Evaluation }[];
}

/** The inputs in order. */
export interface ReportData {
  /** The original that others are compared with, when anything says which it is. */
  readonly reference: { readonly name: string; readonly fingerprint: string; readonly model: ReportModel } | undefined;
  /** Unquantized models first, then quantized ones from least to most loss. */
  readonly models: readonly ReportModel[];
  readonly measurements: readonly Measurement[];
  readonly inputs: readonly ReportInput[];
}

interface Draft {
  fingerprint: string;
  names: string[];
  bits: number | null;
  size: { bytes: number; bitsPerWeight: number; linearBitsPerWeight: number };
  record?: QuantizationRecord;
  results: EvaluationResult[];
  seconds?: number;
}

/** Joins the inputs. */
export function joinInputs(inputs: readonly ReportInput[]): ReportData {
  const drafts = new Map<string, Draft>();
  const draftOf = (fingerprint: string, size: Draft['size'], bits: number | null): Draft => {
    const known = drafts.get(fingerprint);
    if (known) return known;
    const { bytes, bitsPerWeight, linearBitsPerWeight } = size;
    const draft: Draft = {
      fingerprint,
      names: [],
      bits,
      size: { bytes, bitsPerWeight, linearBitsPerWeight },
      results: [],
    };
    drafts.set(fingerprint, draft);
    return draft;
  };
  const references: { name: string; fingerprint: string }[] = [];
  for (const { result } of inputs.filter((input) => input.kind === 'quantization')) {
    const draft = draftOf(result.model.fingerprint, result.model, bitsOf(result.settings['bits']));
    draft.record = result;
    draft.seconds = result.seconds ?? draft.seconds;
    if (result.out !== undefined) draft.names.push(baseName(result.out));
    draftOf(result.source.fingerprint, result.source, null).names.push(baseName(result.source.name));
    references.push({ name: result.source.name, fingerprint: result.source.fingerprint });
  }
  for (const { result } of inputs.filter((input) => input.kind === 'evaluation')) {
    const { model, reference } = result;
    const draft = draftOf(model.fingerprint, model, model.quantization ? bitsOf(model.quantization['bits']) : null);
    draft.names.push(baseName(model.name));
    draft.results.push(result);
    if (!reference) continue;
    draftOf(reference.fingerprint, reference, null).names.push(baseName(reference.name));
    references.push({ name: reference.name, fingerprint: reference.fingerprint });
  }
  const reference = mostFrequent(references);
  const ordered = [...drafts.values()].sort((a, b) => compare(lossOf(a), lossOf(b)));
  const models = label(ordered, reference?.fingerprint);
  const referenceModel = models.find((model) => model.fingerprint === reference?.fingerprint);
  return {
    reference:
      reference && referenceModel ? { ...reference, name: baseName(reference.name), model: referenceModel } : undefined,
    models,
    measurements: gather(models),
    inputs,
  };
}

function bitsOf(value: unknown): number | null {
  return typeof value === 'number' ? value : null;
}

/** The last part of a path or hub id. */
export function baseName(name: string): string {
  return name.replace(/[\\/]+$/, '').replace(/^.*[\\/]/, '') || name;
}

function mostFrequent<T extends { fingerprint: string }>(items: readonly T[]): T | undefined {
  const counts = new Map<string, number>();
  for (const { fingerprint } of items) counts.set(fingerprint, (counts.get(fingerprint) ?? 0) + 1);
  return [...items].sort((a, b) => (counts.get(b.fingerprint) ?? 0) - (counts.get(a.fingerprint) ?? 0))[0];
}

/** Names by method where known, by folder otherwise; what is needed to tell them apart is added. */
function label(drafts: readonly Draft[], reference: string | undefined): ReportModel[] {
  const widths = new Set(drafts.flatMap(({ bits }) => bits ?? []));
  const first = drafts.map((draft) => {
    const name = draft.names[0] ?? draft.fingerprint.slice(0, 6);
    if (draft.bits === null) return draft.fingerprint === reference ? 'original' : name;
    const method = draft.record?.method ?? (draft.names[0] in METHOD_NAMES ? draft.names[0] : undefined);
    const title = method === undefined ? name : (METHOD_NAMES[method] ?? method);
    return widths.size > 1 && method !== undefined ? `${title} ${draft.bits}-bit` : title;
  });
  const unique = distinguish(first, (i) => {
    const { record, names } = drafts[i];
    const groupSize = record?.settings['groupSize'];
    const calibration = typeof groupSize === 'number' ? `g${groupSize === -1 ? ' channel' : groupSize}` : '';
    return [calibration, names.find((name) => name !== first[i]) ?? '', drafts[i].fingerprint.slice(0, 6)];
  });
  let next = 0;
  return drafts.map((draft, i) => ({
    fingerprint: draft.fingerprint,
    label: unique[i],
    bits: draft.bits,
    ...draft.size,
    record: draft.record,
    results: draft.results,
    seconds: draft.seconds,
    style: draft.bits === null ? { color: 'ink' as const, shape: 'circle' } : SERIES[next++ % SERIES.length],
  }));
}

/** Adds to names that occur twice the first of their details that tells all of them apart. */
function distinguish(names: readonly string[], details: (i: number) => readonly string[]): string[] {
  const out = [...names];
  for (const name of new Set(names)) {
    const same = names.flatMap((n, i) => (n === name ? [i] : []));
    if (same.length < 2) continue;
    const choices = same.map(details);
    const at = choices[0].findIndex((_, d) => new Set(choices.map((c) => c[d])).size === same.length);
    same.forEach((i, n) => (out[i] = `${name} (${choices[n][at === -1 ? choices[n].length - 1 : at]})`));
  }
  return out;
}

function gather(models: readonly ReportModel[]): Measurement[] {
  const found = new Map<string, Measurement & { rows: { model: ReportModel; evaluation: Evaluation }[] }>();
  for (const model of models) {
    for (const result of model.results) {
      for (const evaluation of result.evaluations) {
        const { type, name, version, settings } = evaluation;
        const key = JSON.stringify([type, name, version, Object.entries(settings).sort()]);
        let measurement = found.get(key);
        if (!measurement) {
          measurement = { key, name, type, settings: describeSettings(evaluation), rows: [] };
          found.set(key, measurement);
        }
        // The latest result of a model counts.
        const at = measurement.rows.findIndex((row) => row.model === model);
        if (at === -1) measurement.rows.push({ model, evaluation });
        else measurement.rows[at] = { model, evaluation };
      }
    }
  }
  return [...found.values()];
}

function describeSettings(evaluation: Evaluation): string {
  const counted =
    evaluation.type === 'text'
      ? [`${evaluation.tokens.toLocaleString('en')} tokens in ${evaluation.windows} windows`]
      : [`${evaluation.items.ids.length.toLocaleString('en')} questions`];
  const settings = Object.entries(evaluation.settings)
    .filter(([, value]) => value !== null && value !== '')
    .map(([name, value]) => `${name} ${value}`);
  return [...counted, ...settings].join(', ');
}

/** For sorting: unquantized models first, then from least to most KL (perplexity where there is no KL). */
function lossOf({ bits, results }: Draft): number {
  if (bits === null) return -Infinity;
  const evaluations = results.flatMap((result) => result.evaluations);
  for (const name of ['kl', 'perplexity']) {
    const found = evaluations.find(({ metrics }) => metrics[name]);
    if (found) return found.metrics[name].value;
  }
  return Infinity;
}

function compare(a: number, b: number): number {
  return a < b ? -1 : a > b ? 1 : 0;
}

/** A metric with its interval. */
export function estimateOf({ value, low, high, n }: Metric): Estimate {
  return { value, low, high, n };
}

/**
 * How much a model's perplexity is above the reference's, as a share, paired item by item: exp(mean Δnll) − 1. Undefined
 * when the result has no reference on the same items.
 */
export function perplexityIncrease(
  measurement: Measurement,
  model: ReportModel,
  data: ReportData,
): Estimate | undefined {
  const own = measurement.rows.find((row) => row.model === model)?.evaluation;
  const perplexity = own?.metrics['perplexity'];
  if (!own || !perplexity || model === data.reference?.model) return undefined;
  const { columns } = own.items;
  const beside = own.metrics['reference_perplexity'];
  const nll = columns[perplexity.column];
  const weights = perplexity.weight === null ? undefined : columns[perplexity.weight];
  const expected = beside ? columns[beside.column] : partnerColumn(measurement, own, perplexity, data);
  if (!nll || !expected) return undefined;
  return mapEstimate(pairedDifference(nll, expected, weights), Math.expm1);
}

/** The reference's own numbers for the same items, where it was evaluated by itself. */
function partnerColumn(
  measurement: Measurement,
  own: Evaluation,
  metric: Metric,
  data: ReportData,
): readonly number[] | undefined {
  const partner = measurement.rows.find((row) => row.model === data.reference?.model)?.evaluation;
  return partner && sameItems(own, partner) ? partner.items.columns[metric.column] : undefined;
}

/** Whether two evaluations asked the same items in the same order. */
export function sameItems(a: Evaluation, b: Evaluation): boolean {
  const same = (x: readonly string[], y: readonly string[]): boolean =>
    x.length === y.length && x.every((value, i) => value === y[i]);
  return (
    same(a.items.ids, b.items.ids) &&
    (a.items.hashes === null || b.items.hashes === null || same(a.items.hashes, b.items.hashes))
  );
}

/** Difference of a metric between two models, paired item by item (for means without a transform). */
export function difference(
  measurement: Measurement,
  name: string,
  a: ReportModel,
  b: ReportModel,
): Estimate | undefined {
  const [x, y] = [a, b].map((model) => measurement.rows.find((row) => row.model === model)?.evaluation);
  const [m, n] = [x?.metrics[name], y?.metrics[name]];
  if (!x || !y || !m || !n || m.transform !== 'identity' || !sameItems(x, y)) return undefined;
  const [p, q] = [x.items.columns[m.column], y.items.columns[n.column]];
  return p && q ? pairedDifference(p, q, m.weight === null ? undefined : x.items.columns[m.weight]) : undefined;
}
