// Speed: benchmark rows as bars. What a row measured is told by the names of its numbers.
import type { TopLevelSpec } from 'vega-lite';
import { html, significant } from '../html.js';
import type { Benchmark } from '../inputs.js';
import { baseName, type ReportData } from '../models.js';
import type { Figure } from '../render.js';
import { color } from '../theme.js';
import { panelTitle, type Section } from './section.js';

/** Fields that are a speed or a time, the one to draw first. */
const MEASURES = [
  { field: 'tokensPerSecond', title: 'tokens per second', more: true },
  { field: 'gigabytesPerSecond', title: 'GB of weights per second', more: true },
  { field: 'teraflops', title: 'TFLOP/s', more: true },
  { field: 'gflops', title: 'GFLOP/s', more: true },
  { field: 'gflops1', title: 'GFLOP/s in one thread', more: true },
  { field: 'microseconds', title: 'µs', more: false },
  { field: 'milliseconds', title: 'ms', more: false },
] as const;

/** Fields that say what was measured when several rows differ in them. */
const WORDS = ['kernel', 'variant', 'op', 'shape', 'weights', 'threads', 'rows', 'bits', 'batch', 'context', 'tokens'];

/** Bars of one chart at most. */
const MAX_ROWS = 48;

/** Benchmarks that have a speed in them. */
export function speedSections(data: ReportData): Section[] {
  const figures: Figure[] = [];
  for (const input of data.inputs) {
    const figure = input.kind === 'benchmark' && speedFigure(input.file, input.result, figures.length);
    if (figure) figures.push(figure);
  }
  return figures.length === 0
    ? []
    : [{ id: 'speed', title: 'Speed', parts: figures.map((figure) => ({ kind: 'figure' as const, figure })) }];
}

function speedFigure(file: string, benchmark: Benchmark, index: number): Figure | undefined {
  const rows = benchmark.rows ?? benchmark.results ?? [];
  const measure = MEASURES.find(({ field }) => rows.some((row) => typeof row[field] === 'number'));
  if (!measure) return undefined;
  const words = WORDS.filter((word) => new Set(rows.map((row) => row[word])).size > 1 || rows.length === 1);
  const values = rows
    .flatMap((row) => {
      const value = row[measure.field];
      if (typeof value !== 'number') return [];
      const label = words.flatMap((word) => describe(word, row[word])).join(', ');
      return [{ label: label === '' ? measure.title : label, value }];
    })
    .slice(0, MAX_ROWS);
  const name = baseName(file).replace(/\.json$/, '');
  const best = values.reduce((a, b) => (b.value > a.value === measure.more ? b : a));
  const longest = Math.max(...values.map(({ label }) => label.length));
  return {
    id: `speed-${index + 1}`,
    title: `${name}: ${measure.title}`,
    alt: `Bar chart of ${values.length} measurements in ${measure.title}; the best is ${best.label} with ${significant(best.value)}.`,
    caption: html`${measure.more ? 'More is better' : 'Less is better'}. ${machineOf(benchmark)}`,
    spec: (layout): TopLevelSpec => {
      // On a phone names stand above their bars; beside them there is no room. Vega estimates widths generously where
      // it has no canvas, hence no limit on labels.
      const labels = layout.narrow ? 0 : Math.min(330, 16 + 7.2 * longest);
      const name = { labelColor: color('ink'), labelLimit: 0 };
      return {
        data: { values },
        width: layout.width - labels - 60,
        height: { step: layout.narrow ? 38 : 22 },
        title: panelTitle(measure.title),
        encoding: {
          y: {
            field: 'label',
            type: 'nominal',
            sort: null,
            title: null,
            axis: layout.narrow ? null : name,
          },
          x: { field: 'value', type: 'quantitative', title: null, axis: { tickCount: 4 } },
        },
        layer: [
          { mark: { type: 'bar', color: color('blue'), height: 13, yOffset: layout.narrow ? 7 : 0 } },
          {
            transform: [{ calculate: "format(datum.value, '.3~s')", as: 'text' }],
            mark: { type: 'text', align: 'left', dx: 5, dy: layout.narrow ? 7 : 0 },
            encoding: { text: { field: 'text' } },
          },
          ...(layout.narrow
            ? [
                {
                  mark: { type: 'text' as const, align: 'left' as const, dy: -9 },
                  encoding: { x: { value: 0 }, text: { field: 'label' } },
                },
              ]
            : []),
        ],
      };
    },
    table: {
      caption: `${name}: ${measure.title}`,
      columns: [{ title: 'measured' }, { title: measure.title, numeric: true }],
      rows: values.map(({ label, value }) => [label, significant(value, 4)]),
    },
  };
}

function describe(word: string, value: unknown): string[] {
  if (typeof value === 'string') return [value];
  if (typeof value !== 'number') return [];
  return [value === 1 ? `1 ${word.replace(/s$/, '')}` : `${value} ${word}`];
}

function machineOf({ machine }: Benchmark): string {
  if (typeof machine === 'string') return machine;
  return [machine?.gpu, machine?.cpu].filter((part) => part !== undefined).join(', ');
}
