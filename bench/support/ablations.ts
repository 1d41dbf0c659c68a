// Tables and plots of the ablations: docs/ablations-results.md and docs/images/ablation-<set>.svg.
import { mkdirSync, writeFileSync } from 'node:fs';
import path from 'node:path';
import type { TopLevelSpec } from 'vega-lite';

/** One variant, measured. */
export interface AblationRow {
  readonly set: string;
  readonly variant: string;
  readonly bits: number;
  readonly settings: Readonly<Record<'sequences' | 'length' | 'epochs' | 'batch' | 'windows' | 'seed', number>>;
  readonly kl: Readonly<Record<string, number>>;
  readonly klStandardError: Readonly<Record<string, number>>;
  readonly seconds: number;
  /** What it was measured on. */
  readonly backend?: string;
}

const DOCS = path.join(import.meta.dirname, '../../docs');

/** Writes the tables of all sets, in the order given, and a plot for each set that has rows. */
export async function writeAblations(
  rows: readonly AblationRow[],
  sets: Readonly<Record<string, readonly string[]>>,
): Promise<void> {
  const parts = [
    '# Ablations: measured',
    '',
    'Made by `npx tsx bench/ablations.ts`; what each set asks and how to read it: [ablations](ablations.md). KL to the original in nats per token, with its standard error over windows; lower is better.',
  ];
  for (const [set, variants] of Object.entries(sets)) {
    const found = rows
      .filter((row) => row.set === set)
      .sort((a, b) => variants.indexOf(a.variant) - variants.indexOf(b.variant));
    parts.push('', `## ${set}`, '');
    // A variant that several sets have in common is no comparison by itself.
    if (found.length < 2) {
      parts.push(`Not measured yet: \`npx tsx bench/ablations.ts --set ${set}\`.`);
      continue;
    }
    await plot(set, found);
    parts.push(
      `![${set}](images/ablation-${set}.svg)`,
      '',
      '| variant | prose | tasks | sequences × tokens, epochs, batch | seconds |',
      '|---|---|---|---|---|',
      ...found.map(({ variant, kl, klStandardError, settings, seconds }) => {
        const value = (text: string): string => `${kl[text]} ± ${klStandardError[text]}`;
        const { sequences, length, epochs, batch } = settings;
        return `| ${variant} | ${value('prose')} | ${value('tasks')} | ${sequences} × ${length}, ${epochs}, ${batch} | ${Math.round(seconds)} |`;
      }),
    );
  }
  writeFileSync(path.join(DOCS, 'ablations-results.md'), `${parts.join('\n')}\n`);
}

async function plot(set: string, rows: readonly AblationRow[]): Promise<void> {
  // Here, so that measuring needs no plotting.
  const [{ parse, View }, { compile }] = await Promise.all([import('vega'), import('vega-lite')]);
  const values = rows.flatMap(({ variant, kl }) =>
    Object.entries(kl).map(([text, value]) => ({ variant, text, kl: value })),
  );
  const spec: TopLevelSpec = {
    $schema: 'https://vega.github.io/schema/vega-lite/v6.json',
    background: 'white',
    title: `${set}: KL(original ‖ quantized), nats per token — lower is better`,
    data: { values },
    facet: { column: { field: 'text', type: 'nominal', title: null, sort: null } },
    resolve: { scale: { x: 'independent' } },
    spec: {
      width: 260,
      height: 24 * new Set(rows.map((row) => row.variant)).size,
      mark: 'bar',
      encoding: {
        y: { field: 'variant', type: 'nominal', sort: null, title: null, axis: { labelLimit: 220 } },
        x: { field: 'kl', type: 'quantitative', aggregate: 'mean', title: null },
        color: { value: '#5b7fb5' },
      },
    },
  };
  const svg = await new View(parse(compile(spec).spec), { renderer: 'none' }).toSVG();
  mkdirSync(path.join(DOCS, 'images'), { recursive: true });
  writeFileSync(path.join(DOCS, `images/ablation-${set}.svg`), svg);
}
