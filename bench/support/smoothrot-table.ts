// The rows of bench/smoothrot.ts: which methods, how they are read back, summed up and laid out as tables.
import { existsSync, readdirSync, readFileSync } from 'node:fs';
import path from 'node:path';
import type { QuantizeOptions } from '../../src/quantize.node.js';
import { pairedRatio } from './bootstrap.js';
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
  perplexity: number;
  referencePerplexity: number;
  top1Agreement: number;
  /** Null: not measured with this seed. */
  taskAccuracy: number | null;
  /** What smoothing was chosen, by block. */
  smoothed: (string | null)[];
  seconds: number;
}

/** Settings of a row; `seeds`: whether a seed changes anything. */
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
  'quarot-w4a16': { bits: 4, actBits: 16, kvBits: 16, method: 'quarot', seeds: true },
  'quarot-w4a8': { ...W4A8, method: 'quarot', seeds: true },
  'lowbit-w4a16': { bits: 4, actBits: 16, kvBits: 16, method: 'lowbit', seeds: true },
  'lowbit-w4a8': { ...W4A8, method: 'lowbit', seeds: true },
  'paroquant-w4a16': { bits: 4, method: 'paroquant', seeds: true },
  'paroquant-w4a8': { ...W4A8, method: 'paroquant', seeds: true },
  'smoothrot-w4a16': { bits: 4, actBits: 16, kvBits: 16, method: 'smoothrot', seeds: true },
  'smoothrot-w4a8': { ...W4A8, method: 'smoothrot', seeds: true },
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
  /** Largest minus smallest KL. */
  readonly spread: number;
  readonly perplexity: number;
  readonly referencePerplexity: number;
  readonly taskAccuracy: number | null;
  /** KL over that of QuaRot with the same rounding, 95% interval over windows (seeds averaged per window). */
  readonly ofQuarot?: { readonly ratio: number; readonly interval95: readonly [number, number] };
}

/** Sums rows up. */
export function summarize(rows: readonly Row[]): Summary[] {
  const keys = [...new Set(rows.map((r) => `${r.variant} ${r.method}`))];
  return keys.map((key) => {
    const [variant, method] = key.split(' ');
    const own = rowsOf(rows, variant, method);
    const quarot = rowsOf(rows, variant, method.endsWith('rtn') ? 'quarot-rtn' : 'quarot-gptq');
    const kls = own.map((r) => r.kl);
    const accuracies = own.flatMap((r) => r.taskAccuracy ?? []);
    return {
      variant,
      method,
      seeds: own.length,
      kl: round(mean(kls)),
      spread: round(Math.max(...kls) - Math.min(...kls)),
      perplexity: round(mean(own.map((r) => r.perplexity))),
      referencePerplexity: own[0].referencePerplexity,
      taskAccuracy: accuracies.length === 0 ? null : round(mean(accuracies)),
      ...(quarot.length > 0 ? { ofQuarot: ratio(own, quarot) } : {}),
    };
  });
}

/** KL of one method over another's, paired by window, seeds averaged. */
export function ratio(
  above: readonly Row[],
  below: readonly Row[],
): { ratio: number; interval95: readonly [number, number] } {
  const windows = (rows: readonly Row[]): number[] =>
    rows[0].windowKl.map((_, w) => mean(rows.map((r) => r.windowKl[w])));
  const { ratio: value, interval95 } = pairedRatio(windows(above), windows(below));
  return { ratio: round(value), interval95: [round(interval95[0]), round(interval95[1])] };
}

function rowsOf(rows: readonly Row[], variant: string, method: string): Row[] {
  return rows.filter((r) => r.variant === variant && r.method === method);
}

function mean(values: readonly number[]): number {
  return values.reduce((a, b) => a + b, 0) / values.length;
}

/** Markdown: one table for KL, one for perplexity, one for task accuracy, methods down and variants across. */
export function tables(rows: readonly Row[]): string {
  const sums = summarize(rows);
  const variants = [...new Set(rows.map((r) => r.variant))];
  const methods = Object.keys(METHODS).filter((name) => sums.some((s) => s.method === name));
  const table = (title: string, cell: (s: Summary) => string): string =>
    [
      `**${title}**`,
      '',
      `| | ${variants.join(' | ')} |`,
      `|---|${variants.map(() => '---').join('|')}|`,
      ...methods.map((method) => {
        const cells = variants.map((variant) => {
          const sum = sums.find((s) => s.variant === variant && s.method === method);
          return sum ? cell(sum) : '';
        });
        return `| ${method} | ${cells.join(' | ')} |`;
      }),
    ].join('\n');
  const { referencePerplexity } = sums[0];
  return [
    table('KL to the original, mean over seeds ± half the spread', (s) =>
      s.seeds > 1 ? `${digits(s.kl)} ± ${digits(s.spread / 2)}` : digits(s.kl),
    ),
    table("KL over QuaRot's with the same rounding, 95% interval", (s) =>
      s.ofQuarot ? `${s.ofQuarot.ratio.toFixed(2)} [${s.ofQuarot.interval95.map((v) => v.toFixed(2)).join(', ')}]` : '',
    ),
    table(`Perplexity (original ${referencePerplexity})`, (s) => digits(s.perplexity)),
    table('Tasks answered right', (s) => (s.taskAccuracy === null ? '' : `${(100 * s.taskAccuracy).toFixed(1)}%`)),
  ].join('\n\n');
}

function digits(x: number): string {
  return x >= 100 ? x.toFixed(0) : x >= 10 ? x.toFixed(1) : x >= 1 ? x.toFixed(2) : x.toFixed(4).replace(/^0/, '');
}
