// What docs/ shows of bench/smoothrot.ts: all tables in docs/low-precision-results.md, the ones that recipes' pages quote between
// the markers of those pages, and a drawing.
import { mkdirSync, readFileSync, writeFileSync } from 'node:fs';
import path from 'node:path';
import type { TopLevelSpec } from 'vega-lite';
import { METHODS, ratio, rowsOf, SETS, summarize, type Measure, type Row, type Summary } from './smoothrot-rows.js';

const DOCS = path.join(import.meta.dirname, '../../docs');
const RESULTS_PAGE = 'low-precision-results.md';
const ROUNDINGS = ['gptq', 'rtn'] as const;

/** Writes the pages and the drawing. */
export async function writePages(rows: readonly Row[]): Promise<void> {
  await draw(rows);
  const closing = closingTable(rows);
  const bits8 = bits8Table(rows);
  const parts = partsTable(rows);
  writeFileSync(path.join(DOCS, RESULTS_PAGE), resultsPage(rows, { closing, bits8, parts }));
  between('recipes/smoothrot.md', 'closing', closing);
  between('recipes/smoothrot.md', 'plain', plainTable(rows));
  between('recipes/lowbit.md', 'parts', parts);
  between('recipes/lowbit.md', 'bits8', bits8);
}

function resultsPage(rows: readonly Row[], made: Record<'closing' | 'bits8' | 'parts', string>): string {
  const main = SETS.main.filter((method) => rows.some((r) => r.method === method));
  const [first] = rows;
  return `${[
    '# 4-bit activations: measured',
    "Made by `npx tsx bench/smoothrot.ts` (then `--table`); rows are in bench/results/smoothrot-*.json, what the methods are in [quarot](recipes/quarot.md), [smoothquant](recipes/smoothquant.md), [smoothrot](recipes/smoothrot.md), [paroquant](recipes/paroquant.md) and [lowbit](recipes/lowbit.md). gyre-14m; KL and perplexity on 16 windows of 1024 tokens of the project's prose, tasks: a sample of its own. W4A4KV4 unless said otherwise; QuaRot and SmoothRot with the grids of QuaRot as published (weights symmetric per output, activations symmetric per token clipped at 0.9, keys and values asymmetric per head at 0.95).",
    "Columns: **plain** is the model as it is. **all** has two channels of *every* block's down projection planted, large on all tokens, with peaks of 50, 500 and 2000 times the typical channel; **two** the same in the second and the last block alone, as published models have them; **few** two channels of every block that tells first and delimiter tokens from others, large on those alone. All but plain are *synthetic* ([how](recipes/smoothrot.md#stressed-models)).",
    '![KL by magnitude](images/low-precision.svg)',
    '## KL to the original\n\nNats per token. With brackets: the mean over seeds, their smallest and largest; without: one seed. Empty: not measured yet.',
    table(rows, main, klCell),
    '## Perplexity',
    `Original: ${first.referencePerplexity}.`,
    table(rows, main, (s) => digits(s.perplexity)),
    '## Tasks answered right\n\nOf 240, with the first seed; the standard error is 3 points at 50%, 1 to 2 near the ends.',
    table(rows, main, (s) => (s.taskAccuracy === null ? '' : `${(100 * s.taskAccuracy).toFixed(0)}%`)),
    '## What smoothing closes',
    made.closing,
    '## 8-bit activations',
    made.bits8,
    '## From QuaRot to lowbit',
    made.parts,
  ].join('\n\n')}\n`;
}

/** Variants that any of the methods were measured on, in the order of the rows. */
function variantsOf(rows: readonly Row[], methods: readonly string[]): string[] {
  return [...new Set(rows.filter((r) => methods.includes(r.method)).map((r) => r.variant))];
}

/** Methods down, variants across. */
function table(rows: readonly Row[], methods: readonly string[], cell: (s: Summary) => string): string {
  const sums = summarize(rows);
  const variants = variantsOf(rows, methods);
  return markdown(
    ['', ...variants],
    methods.map((method) => [
      method,
      ...variants.map((variant) => {
        const sum = sums.find((s) => s.variant === variant && s.method === method);
        return sum ? cell(sum) : '';
      }),
    ]),
  );
}

/** What SmoothRot closes of QuaRot's gap, and what undoing the planting altogether would close. */
function closingTable(rows: readonly Row[]): string {
  const stressed = variantsOf(rows, SETS.pair).filter((v) => v !== 'plain');
  const lines = ROUNDINGS.flatMap((rounding) =>
    stressed.flatMap((variant) => {
      const of = (method: string, on = variant): Row[] => rowsOf(rows, on, method);
      const [quarot, smoothrot] = [of(`quarot-${rounding}`), of(`smoothrot-${rounding}`)];
      // Pairs that fire on few tokens widen the MLP, and another matrix turns it: they are compared with pairs too small to matter.
      const undone = of(`quarot-${rounding}`, variant.startsWith('few') ? 'few-50' : 'plain');
      if ([quarot, smoothrot, undone].some((r) => r.length === 0)) return [];
      const lowbit = of('lowbit');
      return [
        [
          `${variant}, ${rounding.toUpperCase()}`,
          klOf(quarot),
          klOf(smoothrot),
          closed(smoothrot, quarot),
          variant === 'few-50' ? '' : closed(undone, quarot),
          closed(smoothrot, quarot, 'windowIncrease'),
          lowbit.length > 0 ? closed(lowbit, quarot) : '',
        ],
      ];
    }),
  );
  return markdown(
    ['', 'KL, QuaRot', 'KL, SmoothRot', 'closes of KL', 'ceiling', 'closes of log perplexity', 'lowbit, of KL'],
    lines,
  );
}

/** SmoothRot beside QuaRot on the model as it is. */
function plainTable(rows: readonly Row[]): string {
  return markdown(
    ['', 'KL, QuaRot', 'KL, SmoothRot', 'ratio'],
    ROUNDINGS.flatMap((rounding) => {
      const [quarot, smoothrot] = ['quarot', 'smoothrot'].map((m) => rowsOf(rows, 'plain', `${m}-${rounding}`));
      if (quarot.length === 0 || smoothrot.length === 0) return [];
      return [[rounding.toUpperCase(), klOf(quarot), klOf(smoothrot), ratioCell(smoothrot, quarot)]];
    }),
  );
}

/** W4A8KV8 beside W4A16. */
function bits8Table(rows: readonly Row[]): string {
  const names = ['paroquant', 'lowbit', 'smoothrot', 'quarot'];
  return markdown(
    ['', 'KL, W4A16', 'KL, W4A8KV8', 'ratio', 'perplexity', 'tasks'],
    names.flatMap((name) => {
      const [wide, narrow] = ['w4a16', 'w4a8'].map((bits) => rowsOf(rows, 'plain', `${name}-${bits}`));
      if (wide.length === 0 || narrow.length === 0) return [[name, 'not measured yet', '', '', '', '']];
      const [before, after] = [summarize(wide)[0], summarize(narrow)[0]];
      const percent = (s: Summary): string => (s.taskAccuracy === null ? '' : `${(100 * s.taskAccuracy).toFixed(0)}%`);
      return [
        [
          name,
          klCell(before),
          klCell(after),
          ratioCell(narrow, wide),
          `${digits(before.perplexity)} → ${digits(after.perplexity)}`,
          `${percent(before)} → ${percent(after)}`,
        ],
      ];
    }),
  );
}

/** Steps from QuaRot to lowbit: what each row changes of the one above it. */
const STEPS: readonly (readonly [method: string, says: string])[] = [
  ['quarot-gptq', 'QuaRot: GPTQ, one symmetric grid per output, activations clipped at 0.9'],
  ['smoothrot-gptq', '… smoothing before down, searched'],
  ['smoothrot-clip75', '… activations clipped at 0.75'],
  ['lowbit-token', '… weights in groups of 128, asymmetric, clip searched on outputs, descent and refits'],
  ['lowbit-128', '… activations in groups of 128, clipped at 0.85'],
  ['lowbit-64', '… of 64, clipped at 0.88'],
  ['lowbit', '… of 32, clipped at 0.92: lowbit'],
];
/** Beside the steps. */
const BESIDE: typeof STEPS = [
  ['quarot-clip75', 'QuaRot with activations clipped at 0.75'],
  ['lowbit-unsmoothed', 'lowbit without smoothing'],
  ['paroquant-rotated', "ParoQuant's learned rotations on the rotated and smoothed model, activations as lowbit's"],
  ['paroquant', 'ParoQuant, one grid per token'],
];

function partsTable(rows: readonly Row[]): string {
  const quarot = rowsOf(rows, 'plain', 'quarot-gptq');
  const line = ([method, says]: (typeof STEPS)[number]): string[][] => {
    const own = rowsOf(rows, 'plain', method);
    return own.length === 0
      ? [[says, 'not measured yet', '', '']]
      : [[says, klOf(own), ratioCell(own, quarot), String(own.length)]];
  };
  return markdown(
    ['W4A4KV4', 'KL', "over QuaRot's", 'seeds'],
    [...STEPS.flatMap(line), ['*for comparison*', '', '', ''], ...BESIDE.flatMap(line)],
  );
}

function klOf(rows: readonly Row[]): string {
  return klCell(summarize(rows)[0]);
}

function klCell({ kl, range, seeds }: Summary): string {
  return seeds > 1 ? `${digits(kl)} [${range.map(digits).join(', ')}]` : digits(kl);
}

function ratioCell(above: readonly Row[], below: readonly Row[]): string {
  const { ratio: value, interval95 } = ratio(above, below);
  return `${value.toFixed(3)} [${interval95.map((v) => v.toFixed(3)).join(', ')}]`;
}

/** Share of one method's gap that another closes, with its 95% interval over windows. */
function closed(by: readonly Row[], of: readonly Row[], measure?: Measure): string {
  const { ratio: value, interval95 } = ratio(by, of, measure);
  const percent = (share: number): string => (100 * share).toFixed(0).replace('-', '−');
  return `${percent(1 - value)}% [${percent(1 - interval95[1])}, ${percent(1 - interval95[0])}]`;
}

function digits(x: number): string {
  return x >= 100 ? x.toFixed(0) : x >= 10 ? x.toFixed(1) : x >= 1 ? x.toFixed(2) : x.toFixed(4).replace(/^0/, '');
}

function markdown(head: readonly string[], lines: readonly (readonly string[])[]): string {
  const row = (cells: readonly string[]): string => `| ${cells.join(' | ')} |`;
  return [row(head), `|${head.map(() => '---').join('|')}|`, ...lines.map(row)].join('\n');
}

/** Replaces what stands between a page's markers. */
function between(page: string, name: string, text: string): void {
  const file = path.join(DOCS, page);
  const before = readFileSync(file, 'utf8');
  const [begin, end] = [`<!-- ${name} -->`, `<!-- /${name} -->`];
  if (!before.includes(begin) || !before.includes(end)) throw new Error(`${file} has no ${begin} … ${end}`);
  const made = `${begin}\n\n${text}\n\n${end}`;
  writeFileSync(file, before.slice(0, before.indexOf(begin)) + made + before.slice(before.indexOf(end) + end.length));
}

const PLACES: Readonly<Record<string, string>> = { all: 'every block, all tokens', few: 'first and delimiter tokens' };
const COLORS = {
  rtn: '#b8b8b8',
  gptq: '#8c8c8c',
  'smoothquant-rtn': '#e3c178',
  'smoothquant-gptq': '#c99a3a',
  paroquant: '#6a9f6d',
  'quarot-rtn': '#a9c3e6',
  'quarot-gptq': '#3f6fae',
  'smoothrot-rtn': '#f0a7ae',
  'smoothrot-gptq': '#d1495b',
  lowbit: '#5b2a5e',
};

/** KL by magnitude, a line for each method, a panel for each way of planting; bars from the least to the largest seed. */
async function draw(rows: readonly Row[]): Promise<void> {
  const [{ parse, View }, { compile }] = await Promise.all([import('vega'), import('vega-lite')]);
  const names = Object.keys(COLORS).filter((name) => name in METHODS);
  const values = summarize(rows)
    .filter((s) => names.includes(s.method))
    .flatMap(({ variant, method, kl, range: [low, high] }) => {
      const [place, magnitude] = variant.split('-');
      const own = { method, magnitude: variant === 'plain' ? 'plain' : `${magnitude} ×`, kl, low, high };
      // The model as it is begins every panel.
      if (variant === 'plain') return Object.values(PLACES).map((panel) => ({ ...own, panel }));
      return place in PLACES ? [{ ...own, panel: PLACES[place] }] : [];
    });
  const x = { field: 'magnitude', type: 'ordinal', sort: null, title: null, axis: { labelAngle: 0 } } as const;
  const color = {
    field: 'method',
    type: 'nominal',
    title: null,
    scale: { domain: names, range: Object.values(COLORS) },
  } as const;
  const spec: TopLevelSpec = {
    $schema: 'https://vega.github.io/schema/vega-lite/v6.json',
    background: 'white',
    title: 'W4A4KV4: KL(original ‖ quantized), nats per token — lower is better; magnitudes are synthetic',
    data: { values },
    facet: { column: { field: 'panel', type: 'nominal', title: null, sort: null } },
    spec: {
      width: 300,
      height: 300,
      layer: [
        {
          mark: { type: 'line', point: true },
          encoding: {
            x,
            y: { field: 'kl', type: 'quantitative', scale: { type: 'log' }, title: null },
            color,
          },
        },
        {
          mark: 'rule',
          encoding: { x, y: { field: 'low', type: 'quantitative' }, y2: { field: 'high' }, color },
        },
      ],
    },
  };
  const svg = await new View(parse(compile(spec).spec), { renderer: 'none' }).toSVG();
  mkdirSync(path.join(DOCS, 'images'), { recursive: true });
  writeFileSync(path.join(DOCS, 'images/low-precision.svg'), svg);
}
