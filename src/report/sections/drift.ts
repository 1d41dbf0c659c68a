// Drift along a chain: KL and agreement with the original by position.
import type { TopLevelSpec } from 'vega-lite';
import { fixed, html, interval, significant } from '../html.js';
import type { DriftResult } from '../drift-schema.js';
import type { ReportData, ReportModel } from '../models.js';
import type { Figure } from '../render.js';
import { PALETTE } from '../theme.js';
import { panelTitle, panelWidth, stack, type Panel, type Section } from './section.js';

type Style = ReportModel['style'];

/** Drift files by text, each with the models it was measured on. */
export function driftSections(data: ReportData): Section[] {
  const results = data.inputs.flatMap((input) => (input.kind === 'drift' ? [input.result] : []));
  const texts = [...new Set(results.map(({ text }) => text))];
  if (texts.length === 0) return [];
  const intro = html`<p>
    Errors could add up along a chain of thought: each token is computed from cached keys and values of all before it. A
    model whose KL rises with the position drifts; a level line does not.
  </p>`;
  const figures = texts.map((text, i) =>
    driftFigure(
      data,
      results.filter((result) => result.text === text),
      i + 1,
    ),
  );
  return [
    {
      id: 'drift',
      title: 'Drift along the chain',
      parts: [{ kind: 'text', html: intro }, ...figures.map((figure) => ({ kind: 'figure' as const, figure }))],
    },
  ];
}

const MEASURES = [
  { field: 'kl', title: 'KL divergence, nats per token', scale: 1 },
  { field: 'top1Agreement', title: 'same next token, %', scale: 100 },
] as const;

function driftFigure(data: ReportData, results: readonly DriftResult[], number: number): Figure {
  const spare: Style[] = [
    { color: 'orange', shape: 'circle' },
    { color: 'blue', shape: 'square' },
    { color: 'green', shape: 'triangle-up' },
    { color: 'purple', shape: 'diamond' },
  ];
  const lines = results.map((result, i) => {
    const model = data.models.find(({ fingerprint }) => fingerprint === result.model.fingerprint);
    return { result, label: model?.label ?? result.model.name, style: model?.style ?? spare[i % spare.length] };
  });
  const values = lines.flatMap(({ result, label }) =>
    result.positions.flatMap((at) =>
      MEASURES.map(({ field, scale }) => {
        const { value, low, high } = at[field];
        return {
          model: label,
          field,
          position: (at.from + at.to) / 2,
          value: scale * value,
          low: scale * (low ?? value),
          high: scale * (high ?? value),
        };
      }),
    ),
  );
  const scale = {
    domain: lines.map(({ label }) => label),
    range: lines.map(({ style }) => PALETTE[style.color].light),
  };
  const ends = lines
    .map(({ result: { positions }, label }) => {
      const [first, last] = [positions[0].kl.value, positions[positions.length - 1].kl.value];
      return `${label} goes from ${significant(first)} to ${significant(last)}`;
    })
    .join('; ');
  const { chains, text } = results[0];
  return {
    id: `drift-${number}`,
    title: `KL and agreement along ${text}`,
    alt: `Lines with 95% bands by position. KL of ${ends}.`,
    key: lines.map(({ label, style }) => ({ label, color: style.color, shape: 'line' })),
    caption: html`Means over ${chains} chains at each run of positions, with 95% intervals. KL of ${ends}.`,
    spec: (layout): TopLevelSpec =>
      stack(
        layout,
        MEASURES.map(({ field, title }): Panel => ({
          data: { values: values.filter((row) => row.field === field) },
          width: panelWidth(layout, layout.narrow ? 1 : 2, 84, 60),
          height: 200,
          title: panelTitle(title),
          encoding: {
            x: {
              field: 'position',
              type: 'quantitative',
              scale: { nice: false },
              axis: { grid: false, format: '~s' },
              title: 'token',
            },
            y: {
              field: 'value',
              type: 'quantitative',
              title: null,
              scale: { zero: field === 'kl' },
              axis: { tickCount: 5 },
            },
            color: { field: 'model', type: 'nominal', legend: null, scale },
          },
          layer: [
            {
              mark: { type: 'area', opacity: 0.18 },
              encoding: { y: { field: 'low', type: 'quantitative' }, y2: { field: 'high' } },
            },
            { mark: { type: 'line', strokeWidth: 2 } },
          ],
        })),
        { wide: 60, narrow: 86 },
      ),
    table: {
      caption: `KL and agreement by position along ${text}`,
      columns: [
        { title: 'model' },
        { title: 'tokens', numeric: true },
        { title: 'KL', numeric: true },
        { title: '95% interval', numeric: true },
        { title: 'same next token, %', numeric: true },
        { title: '95% interval', numeric: true },
      ],
      rows: lines.flatMap(({ result, label }) =>
        result.positions.map(({ from, to, kl, top1Agreement }) => [
          label,
          `${from}–${to - 1}`,
          significant(kl.value),
          interval(kl.low, kl.high, significant),
          fixed(100 * top1Agreement.value, 1),
          interval(top1Agreement.low, top1Agreement.high, (end) => fixed(100 * end, 1)),
        ]),
      ),
    },
  };
}
