// Comparing result files: the same items under each model, paired bootstrap; a difference is called one only when it is.
import { GyreError, ensure } from '../core/errors.js';
import { validate } from '../formats/huggingface-config.js';
import { pairedBootstrap, type PairedDifference } from './metrics.js';
import {
  RESULT_KIND,
  RESULT_LIMITS,
  RESULT_VERSION,
  resultSchema,
  type Evaluation,
  type EvaluationResult,
} from './results.js';

/** A metric of one task under a first result and another one. */
export interface MetricComparison {
  /** Task or text. */
  readonly task: string;
  readonly metric: string;
  readonly first: number;
  readonly second: number;
  /** Second minus first over the items that both have; null when items can't be paired, with the reason. */
  readonly difference: PairedDifference | null;
  readonly unpaired: string | null;
  /** `better` and `worse` only when the interval of the difference leaves 0 out. */
  readonly verdict: 'better' | 'worse' | 'no difference shown' | 'not compared';
}

/** A result against the first one. */
export interface Comparison {
  readonly first: string;
  readonly second: string;
  readonly metrics: readonly MetricComparison[];
  /** Tasks that only one of the two has. */
  readonly missing: readonly string[];
}

/**
 * Reads a result file.
 * @throws GyreError `limit-exceeded`, `file-corrupt`, `config-invalid` that says what is wrong.
 */
export function parseResult(text: string, name: string): EvaluationResult {
  ensure(
    text.length <= RESULT_LIMITS.bytes,
    'limit-exceeded',
    () => `${name} has ${text.length} characters, over the limit of ${RESULT_LIMITS.bytes}`,
  );
  let json: unknown;
  try {
    json = JSON.parse(text);
  } catch (cause) {
    throw new GyreError('file-corrupt', `${name} is not JSON`, {
      cause,
      remedy: 'Write it again with `gyre eval --out`.',
    });
  }
  const head = typeof json === 'object' && json !== null ? (json as Record<string, unknown>) : {};
  ensure(
    head['kind'] === RESULT_KIND && head['schemaVersion'] === RESULT_VERSION,
    'config-invalid',
    () =>
      `${name} is no evaluation result of version ${RESULT_VERSION}: found kind ${JSON.stringify(head['kind'])}, version ${JSON.stringify(head['schemaVersion'])}`,
    'Write it with `gyre eval --out` of this version.',
  );
  return validate(resultSchema, json, name);
}

/** Compares results with the first of them. @param seed of the bootstrap; default 0. */
export function compareResults(
  results: readonly { readonly name: string; readonly result: EvaluationResult }[],
  seed = 0,
): Comparison[] {
  ensure(
    results.length >= 2,
    'usage',
    'a comparison needs at least two results',
    'Name two or more files that `gyre eval --out` wrote.',
  );
  const [first, ...others] = results;
  return others.map((other) => ({
    first: first.name,
    second: other.name,
    ...compareTwo(first.result, other.result, seed),
  }));
}

function compareTwo(
  first: EvaluationResult,
  second: EvaluationResult,
  seed: number,
): Pick<Comparison, 'metrics' | 'missing'> {
  const names = (result: EvaluationResult): string[] => result.evaluations.map(({ name }) => name);
  const metrics = first.evaluations.flatMap((a) => {
    const b = second.evaluations.find(({ name, type }) => name === a.name && type === a.type);
    return b ? compareEvaluations(a, b, seed) : [];
  });
  const common = new Set(metrics.map(({ task }) => task));
  return { metrics, missing: [...new Set([...names(first), ...names(second)])].filter((name) => !common.has(name)) };
}

/** Settings that need not agree: what they leave open is in the items. */
const FREE_SETTINGS = new Set(['limit']);

/** Why two evaluations can't be compared at all. */
function differentDefinition(a: Evaluation, b: Evaluation): string | undefined {
  if (a.version !== b.version) return `versions ${a.version} and ${b.version} of the task`;
  const keys = [...new Set([...Object.keys(a.settings), ...Object.keys(b.settings)])].filter(
    (key) => !FREE_SETTINGS.has(key),
  );
  const unlike = keys.filter((key) => a.settings[key] !== b.settings[key]);
  if (unlike.length === 0) return undefined;
  return `different settings: ${unlike.map((key) => `${key} ${String(a.settings[key])} and ${String(b.settings[key])}`).join(', ')}`;
}

function compareEvaluations(a: Evaluation, b: Evaluation, seed: number): MetricComparison[] {
  const reason = differentDefinition(a, b);
  const pairs = reason === undefined ? pairItems(a, b) : [];
  return Object.entries(a.metrics).flatMap(([name, metric]): MetricComparison[] => {
    const other = b.metrics[name];
    if (other === undefined || metric.better === 'neither') return [];
    const head = { task: a.name, metric: name, first: metric.value, second: other.value };
    const left = a.items.columns[metric.column];
    const right = b.items.columns[other.column];
    const unpaired =
      reason ??
      (pairs.length < 2 ? 'fewer than two common items' : undefined) ??
      (left === undefined || right === undefined ? 'no numbers per item' : undefined);
    if (unpaired !== undefined) return [{ ...head, difference: null, unpaired, verdict: 'not compared' }];
    const weights = metric.weight === null ? undefined : a.items.columns[metric.weight];
    const difference = pairedBootstrap(
      pairs.map(([i]) => left[i]),
      pairs.map(([, j]) => right[j]),
      { seed, transform: metric.transform, weights: weights && pairs.map(([i]) => weights[i]) },
    );
    const gain = metric.better === 'higher' ? difference.difference : -difference.difference;
    const verdict = difference.significant ? (gain > 0 ? 'better' : 'worse') : 'no difference shown';
    return [{ ...head, difference, unpaired: null, verdict }];
  });
}

/** Indices of items that are the same question in both: by name, and by content where it is known. */
function pairItems(a: Evaluation, b: Evaluation): [number, number][] {
  const at = new Map(b.items.ids.map((id, j) => [id, j]));
  return a.items.ids.flatMap((id, i): [number, number][] => {
    const j = at.get(id);
    if (j === undefined || (a.items.hashes && b.items.hashes && a.items.hashes[i] !== b.items.hashes[j])) return [];
    return [[i, j]];
  });
}
