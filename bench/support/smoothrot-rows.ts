// The rows of bench/smoothrot.ts: which methods, how they are read back and summed up.
import { existsSync, readdirSync, readFileSync } from 'node:fs';
import path from 'node:path';
import type { QuantizeOptions } from '../../src/quantize.node.js';
import { pairedRatio, type RatioEstimate } from './bootstrap.js';
import { round } from './results.js';

/** One measurement. */
export interface Row {
  variant: string;
  method: string;
  seed: number;
  kl: number;
  klStandardError: number;
  /** Mean KL of each window, in the text's order. */
  windowKl: number[];
  /** What each window's mean −log p grew by against the original. */
  windowIncrease: number[];
  perplexity: number;
  referencePerplexity: number;
  top1Agreement: number;
  /** Null: not measured. */
  taskAccuracy: number | null;
  /** What smoothing was chosen, by block. */
  smoothed: (string | null)[];
  seconds: { quantize: number; text: number; tasks: number };
}

/** Settings of a row; `seeds`: whether it turns or learns anything, so that more than one seed is measured. */
type Method = Partial<QuantizeOptions> & { readonly seeds: boolean };

const W4A4: Partial<QuantizeOptions> = { bits: 4, actBits: 4, kvBits: 4 };
const W4A8: Partial<QuantizeOptions> = { bits: 4, actBits: 8, kvBits: 8 };
const none = { method: 'smoothquant', smooth: 'none', groupSize: -1, seeds: false } as const;

/** The methods. `smoothquant` with nothing smoothed is what others call RTN (or GPTQ) W4A4. */
export const METHODS: Readonly<Record<string, Method>> = {
  rtn: { ...W4A4, ...none, rounding: 'rtn' },
  gptq: { ...W4A4, ...none, rounding: 'gptq' },
  'smoothquant-rtn': { ...W4A4, method: 'smoothquant', rounding: 'rtn', seeds: false },
  'smoothquant-gptq': { ...W4A4, method: 'smoothquant', rounding: 'gptq', seeds: false },
  'quarot-rtn': { ...W4A4, method: 'quarot', rounding: 'rtn', seeds: true },
  'smoothrot-rtn': { ...W4A4, method: 'smoothrot', rounding: 'rtn', seeds: true },
  'quarot-gptq': { ...W4A4, method: 'quarot', rounding: 'gptq', seeds: true },
  'smoothrot-gptq': { ...W4A4, method: 'smoothrot', rounding: 'gptq', seeds: true },
  paroquant: { ...W4A4, method: 'paroquant', seeds: true },
  'paroquant-rotated': {
    ...W4A4,
    method: 'paroquant',
    rotate: true,
    smooth: 'down',
    actClip: 0.92,
    actGroupSize: 32,
    seeds: true,
  },
  lowbit: { ...W4A4, method: 'lowbit', seeds: true },
  // Between QuaRot and lowbit, a part at a time.
  'quarot-clip75': { ...W4A4, method: 'quarot', actClip: 0.75, seeds: true },
  'smoothrot-clip75': { ...W4A4, method: 'smoothrot', actClip: 0.75, seeds: true },
  'lowbit-token': { ...W4A4, method: 'lowbit', actClip: 0.75, actGroupSize: -1, seeds: true },
  'lowbit-128': { ...W4A4, method: 'lowbit', actClip: 0.85, actGroupSize: 128, seeds: true },
  'lowbit-64': { ...W4A4, method: 'lowbit', actClip: 0.88, actGroupSize: 64, seeds: true },
  'lowbit-unsmoothed': { ...W4A4, method: 'lowbit', smooth: 'none', seeds: true },
  'quarot-w4a16': { bits: 4, actBits: 16, kvBits: 16, method: 'quarot', seeds: true },
  'quarot-w4a8': { ...W4A8, method: 'quarot', seeds: true },
  'lowbit-w4a16': { bits: 4, actBits: 16, kvBits: 16, method: 'lowbit', seeds: true },
  'lowbit-w4a8': { ...W4A8, method: 'lowbit', seeds: true },
  'paroquant-w4a16': { bits: 4, method: 'paroquant', seeds: true },
  'paroquant-w4a8': { ...W4A8, method: 'paroquant', seeds: true },
  'smoothrot-w4a16': { bits: 4, actBits: 16, kvBits: 16, method: 'smoothrot', seeds: true },
  'smoothrot-w4a8': { ...W4A8, method: 'smoothrot', seeds: true },
};

/** Methods that are measured together: `main` on every variant, the others where their question is asked. */
export const SETS: Readonly<Record<string, readonly string[]>> = {
  main: [
    'quarot-gptq',
    'smoothrot-gptq',
    'quarot-rtn',
    'smoothrot-rtn',
    'lowbit',
    'rtn',
    'gptq',
    'smoothquant-rtn',
    'smoothquant-gptq',
    'paroquant',
  ],
  pair: ['quarot-gptq', 'smoothrot-gptq', 'quarot-rtn', 'smoothrot-rtn'],
  parts: [
    'smoothrot-clip75',
    'lowbit-token',
    'lowbit-128',
    'lowbit-64',
    'quarot-clip75',
    'lowbit-unsmoothed',
    'paroquant-rotated',
  ],
  bits8: [
    'paroquant-w4a16',
    'paroquant-w4a8',
    'lowbit-w4a16',
    'lowbit-w4a8',
    'smoothrot-w4a16',
    'smoothrot-w4a8',
    'quarot-w4a16',
    'quarot-w4a8',
  ],
};

/** Rows measured before, if they were measured alike. */
export function readRows(folder: string, variant: string, setup?: Readonly<Record<string, unknown>>): Row[] {
  const file = path.join(folder, `smoothrot-${variant}.json`);
  if (!existsSync(file)) return [];
  const stored = JSON.parse(readFileSync(file, 'utf8')) as Record<string, unknown> & { rows: Row[] };
  const same = Object.entries(setup ?? {}).every(([key, value]) => stored[key] === value);
  return same ? stored.rows : [];
}

/** Rows of a variant from all its parts. */
export function readAllRows(folder: string, variant: string): Row[] {
  const names = readdirSync(folder).filter(
    (name) => name.endsWith('.json') && name.startsWith(`smoothrot-${variant}.`),
  );
  return names.flatMap((name) => readRows(folder, name.slice('smoothrot-'.length, -'.json'.length)));
}

/** Means over the seeds of one method on one variant. */
export interface Summary {
  readonly variant: string;
  readonly method: string;
  readonly seeds: number;
  readonly kl: number;
  /** Smallest and largest KL. */
  readonly range: readonly [number, number];
  readonly perplexity: number;
  readonly referencePerplexity: number;
  readonly taskAccuracy: number | null;
}

/** Sums rows up. */
export function summarize(rows: readonly Row[]): Summary[] {
  const keys = [...new Set(rows.map((r) => `${r.variant} ${r.method}`))];
  return keys.map((key) => {
    const [variant, method] = key.split(' ');
    const own = rowsOf(rows, variant, method);
    const kls = own.map((r) => r.kl);
    const accuracies = own.flatMap((r) => r.taskAccuracy ?? []);
    return {
      variant,
      method,
      seeds: own.length,
      kl: round(mean(kls)),
      range: [Math.min(...kls), Math.max(...kls)],
      perplexity: round(mean(own.map((r) => r.perplexity))),
      referencePerplexity: own[0].referencePerplexity,
      taskAccuracy: accuracies.length === 0 ? null : round(mean(accuracies)),
    };
  });
}

/** What is compared: the KL of windows, or what their mean −log p grew by. */
export type Measure = 'windowKl' | 'windowIncrease';

/** One method's loss over another's, paired by window, each window averaged over the seeds that both were measured with. */
export function ratio(above: readonly Row[], below: readonly Row[], measure: Measure = 'windowKl'): RatioEstimate {
  const shared = above.map((r) => r.seed).filter((seed) => below.some((r) => r.seed === seed));
  // A method that draws nothing has one row, which stands for all seeds.
  const paired = above.length > 1 && below.length > 1 && shared.length > 0;
  const of = (rows: readonly Row[]): readonly Row[] => (paired ? rows.filter((r) => shared.includes(r.seed)) : rows);
  const windows = (rows: readonly Row[]): number[] =>
    rows[0][measure].map((_, w) => mean(rows.map((r) => r[measure][w])));
  return pairedRatio(windows(of(above)), windows(of(below)));
}

/** Rows of a method on a variant. */
export function rowsOf(rows: readonly Row[], variant: string, method: string): Row[] {
  return rows.filter((r) => r.variant === variant && r.method === method);
}

function mean(values: readonly number[]): number {
  return values.reduce((a, b) => a + b, 0) / values.length;
}
