// Size against quality, and what was lost on each text: KL, perplexity, agreement, with intervals.
import type { TopLevelSpec } from 'vega-lite';
import { bytes, fixed, html, interval, measure, significant, type Table } from '../html.js';
import { estimateOf, perplexityIncrease, type Measurement, type ReportData, type ReportModel } from '../models.js';
import type { Figure } from '../render.js';
import type { Estimate } from '../statistics.js';
import { color } from '../theme.js';
import {
  domainFromZero,
  modelColors,
  modelShapes,
  panelTitle,
  panelWidth,
  stack,
  type Layer,
  type Panel,
  type Part,
  type Section,
} from './section.js';

/** A number that tells what a model lost. */
interface Loss {
  readonly name: string;
  /** Axis title with its unit. */
  readonly title: string;
  readonly of: (measurement: Measurement, model: ReportModel, data: ReportData) => Estimate | undefined;
  /** What the axis shows of a value. */
  readonly scale: number;
}

const metric =
  (name: string, map: (x: number) => number = (x) => x): Loss['of'] =>
  (measurement, model) => {
    const found = measurement.rows.find((row) => row.model === model)?.evaluation.metrics[name];
    if (!found) return undefined;
    const { value, low, high, n } = estimateOf(found);
    const ends = [low, high].map((end) => (end === null ? null : map(end)));
    // A falling map turns the interval round.
    const [from, to] = map(1) < map(0) ? [ends[1], ends[0]] : ends;
    return { value: map(value), low: from, high: to, n };
  };

const LOSSES: readonly Loss[] = [
  { name: 'kl', title: 'KL divergence, nats per token', of: metric('kl'), scale: 1 },
  { name: 'increase', title: 'perplexity increase, %', of: perplexityIncrease, scale: 100 },
  { name: 'disagreement', title: 'other next token, %', of: metric('top1_agreement', (x) => 1 - x), scale: 100 },
];

/** Texts with the models that were scored on them. */
export function lossSections(data: ReportData): Section[] {
  const texts = data.measurements.filter(({ type }) => type === 'text');
  const parts: Part[] = [];
  const scatter = sizeFigure(data, texts);
  if (scatter) parts.push({ kind: 'figure', figure: scatter });
  for (const [i, text] of texts.entries()) {
    const figure = lossFigure(data, text, i);
    if (figure) parts.push({ kind: 'figure', figure });
    parts.push({ kind: 'table', table: textTable(data, text) });
  }
  if (parts.length === 0) return [];
  const intro = html`<p>
    KL divergence compares the whole distribution over the next token with the original’s, at every position of the
    text; 0 means that nothing changed. It is measured on the same tokens for every model, and so is the change in
    perplexity, which is compared window by window: how hard the text is cancels out. Bars are 95% intervals.
  </p>`;
  return [{ id: 'quality', title: 'Size and quality', parts: [{ kind: 'text', html: intro }, ...parts] }];
}

/** The loss to plot sizes against: the first that two models have. */
function mainLoss(data: ReportData, text: Measurement): Loss | undefined {
  return LOSSES.find((loss) => data.models.filter((model) => loss.of(text, model, data)).length > 1);
}

function sizeFigure(data: ReportData, texts: readonly Measurement[]): Figure | undefined {
  const text = texts.find((candidate) => mainLoss(data, candidate));
  const loss = text && mainLoss(data, text);
  if (!text || !loss) return undefined;
  const rows = data.models.flatMap((model) => {
    const estimate = model.bits === null ? undefined : loss.of(text, model, data);
    return estimate ? [{ model, estimate }] : [];
  });
  const values = rows.map(({ model, estimate: { value, low, high } }) => ({
    model: model.label,
    bits: model.linearBitsPerWeight,
    value: loss.scale * value,
    low: loss.scale * (low ?? value),
    high: loss.scale * (high ?? value),
  }));
  const models = rows.map(({ model }) => model);
  const [least, most] = [rows[0], rows[rows.length - 1]];
  const sizes = values.map(({ bits }) => bits);
  const span = Math.max(0.4, Math.max(...sizes) - Math.min(...sizes));
  const domain = [Math.min(...sizes) - 0.3 * span, Math.max(...sizes) + 0.3 * span];
  const top = Math.max(...values.map(({ high }) => high));
  const original = data.reference ? `; ${fixed(data.reference.model.linearBitsPerWeight, 0)} in the original` : '';
  return {
    id: 'size-quality',
    title: `Size against quality on ${text.name}`,
    alt: `Scatter plot of ${rows.length} models: bits per weight against ${loss.title}. ${least.model.label} has the least loss, ${significant(loss.scale * least.estimate.value)} at ${fixed(least.model.linearBitsPerWeight, 2)} bits, ${most.model.label} the most, ${significant(loss.scale * most.estimate.value)} at ${fixed(most.model.linearBitsPerWeight, 2)} bits.`,
    caption: html`Lower left is better. Size is in stored bits per weight of the linear layers (scales, zero points and
      transforms included${original}); the loss is the ${loss.title.replace(/,.*/, '')} from the original on
      <em>${text.name}</em>, with its 95% interval. Models of equal size stand side by side.`,
    spec: (layout): TopLevelSpec => {
      const plot = { width: layout.width - 70, height: layout.narrow ? 260 : 320, domain, top: 1.08 * top };
      const longest = Math.max(...models.map((model) => model.label.length));
      const places = placeScatter(values, plot, longest);
      const perPixel = (domain[1] - domain[0]) / plot.width;
      const shape = { field: 'model', type: 'nominal', legend: null, scale: modelShapes(models) } as const;
      return {
        width: plot.width,
        height: plot.height,
        data: { values: values.map((row, i) => ({ ...row, bits: row.bits + perPixel * places[i].dx })) },
        encoding: {
          x: {
            field: 'bits',
            type: 'quantitative',
            scale: { domain, nice: false, zero: false },
            title: 'bits per weight in the linear layers',
          },
          y: { field: 'value', type: 'quantitative', scale: { domain: [0, plot.top], nice: false }, title: null },
          color: { field: 'model', type: 'nominal', legend: null, scale: modelColors(models) },
        },
        title: panelTitle(loss.title),
        layer: [
          { mark: { type: 'rule', strokeWidth: 2 }, encoding: { y: { field: 'low' }, y2: { field: 'high' } } },
          { mark: { type: 'point', filled: true, size: 110, opacity: 1 }, encoding: { shape } },
          ...places.map(({ label: { x, y, align } }, i): Layer => ({
            transform: [{ filter: { field: 'model', equal: values[i].model } }],
            mark: { type: 'text', align, fontSize: 13, fontWeight: i === 0 ? 'bold' : 'normal' },
            encoding: { x: { value: x }, y: { value: y }, text: { field: 'model' } },
          })),
        ],
      };
    },
    table: {
      caption: `Size and ${loss.title} on ${text.name}`,
      columns: [
        { title: 'model' },
        { title: 'bits per weight', numeric: true },
        { title: loss.title, numeric: true },
        { title: '95% interval', numeric: true },
      ],
      rows: rows.map(({ model, estimate: { value, low, high } }) => [
        model.label,
        fixed(model.linearBitsPerWeight, 2),
        significant(loss.scale * value),
        interval(low, high, (end) => significant(loss.scale * end)),
      ]),
    },
  };
}

/** How far a point is moved aside, and where its name stands, in pixels. */
interface ScatterPlace {
  dx: number;
  label: { x: number; y: number; align: 'left' | 'right' };
}

/** Points of one size side by side, and their names in a column beside them, far enough apart to be read. */
function placeScatter(
  points: readonly { bits: number; value: number }[],
  plot: { width: number; height: number; domain: readonly number[]; top: number },
  longest: number,
): ScatterPlace[] {
  const x = (bits: number): number => ((bits - plot.domain[0]) / (plot.domain[1] - plot.domain[0])) * plot.width;
  const y = (value: number): number => plot.height * (1 - value / plot.top);
  const placed = points.map(({ bits }): ScatterPlace => ({ dx: 0, label: { x: x(bits), y: 0, align: 'left' } }));
  const left = new Set(points.keys());
  while (left.size > 0) {
    const [seed] = left;
    const cluster = [...left].filter((i) => Math.abs(x(points[i].bits) - x(points[seed].bits)) < 24);
    for (const i of cluster) left.delete(i);
    // From the top of the chart down.
    cluster.sort((a, b) => points[b].value - points[a].value);
    const middle = (cluster.length - 1) / 2;
    const edge = Math.max(...cluster.map((i, n) => x(points[i].bits) + 11 * (n - middle)));
    const right = edge + 14 + 8 * longest < plot.width;
    const begin = Math.min(...cluster.map((i, n) => x(points[i].bits) + 11 * (n - middle)));
    let above = -Infinity;
    cluster.forEach((i, n) => {
      above = Math.max(y(points[i].value), above + 17);
      placed[i] = {
        dx: 11 * (n - middle),
        label: { x: right ? edge + 14 : begin - 14, y: above, align: right ? 'left' : 'right' },
      };
    });
  }
  return placed;
}

function lossFigure(data: ReportData, text: Measurement, index: number): Figure | undefined {
  const models = text.rows.map((row) => row.model).filter((model) => model.bits !== null);
  const shown = LOSSES.filter((loss) => models.some((model) => loss.of(text, model, data)));
  if (shown.length === 0 || models.length === 0) return undefined;
  const values = models.flatMap((model) =>
    shown.flatMap((loss) => {
      const estimate = loss.of(text, model, data);
      if (!estimate) return [];
      const { value, low, high } = estimate;
      return [
        {
          model: model.label,
          loss: loss.name,
          value: loss.scale * value,
          low: loss.scale * (low ?? value),
          high: loss.scale * (high ?? value),
        },
      ];
    }),
  );
  const order = models.map((model) => model.label);
  return {
    id: `losses-${index + 1}`,
    title: `What was lost on ${text.name}`,
    alt: `Dot plots with 95% intervals of ${shown.map(({ title }) => title).join('; ')} for ${order.join(', ')}, from least to most loss.`,
    caption: html`Loss against the original on <em>${text.name}</em> (${text.settings}). Dots are means, bars 95%
      intervals; all are better the further left. “Other next token” is the share of positions where the most likely
      next token changed.`,
    spec: (layout): TopLevelSpec => {
      const columns = layout.narrow ? 1 : shown.length;
      const width = panelWidth(layout, columns, layout.narrow ? 104 : 110, 30);
      const extent = (name: string) =>
        domainFromZero(values.flatMap((row) => (row.loss === name ? [row.value, row.low, row.high] : [])));
      const panels = shown.map((loss, i): Panel => ({
        transform: [{ filter: { field: 'loss', equal: loss.name } }],
        width,
        height: { step: 30 },
        title: panelTitle(loss.title),
        encoding: {
          y: {
            field: 'model',
            type: 'nominal',
            sort: order,
            title: null,
            axis:
              layout.narrow || i === 0
                ? { labelColor: color('ink'), labelFontSize: 13, labelLimit: 100, grid: true }
                : { labels: false, grid: true },
          },
          x: {
            field: 'value',
            type: 'quantitative',
            scale: { domain: extent(loss.name), nice: false },
            title: null,
            axis: { tickCount: 4, grid: false },
          },
          color: { field: 'model', type: 'nominal', legend: null, scale: modelColors(models) },
        },
        layer: [
          {
            mark: { type: 'rule', strokeDash: [2, 3] },
            encoding: { x: { datum: 0 }, y: { value: 0 }, y2: { value: 'height' }, color: { value: color('muted') } },
          },
          { mark: { type: 'rule', strokeWidth: 2 }, encoding: { x: { field: 'low' }, x2: { field: 'high' } } },
          {
            mark: { type: 'point', filled: true, size: 90, opacity: 1 },
            encoding: { shape: { field: 'model', type: 'nominal', legend: null, scale: modelShapes(models) } },
          },
        ],
      }));
      return { data: { values }, ...stack(layout, panels, { wide: 30, narrow: 62 }) };
    },
    table: {
      caption: `What was lost on ${text.name}, with 95% intervals`,
      columns: [
        { title: 'model' },
        ...shown.flatMap(({ title }) => [
          { title, numeric: true },
          { title: '95% interval', numeric: true },
        ]),
      ],
      rows: models.map((model) => [
        model.label,
        ...shown.flatMap((loss) => {
          const estimate = loss.of(text, model, data);
          if (!estimate) return ['', ''];
          const { value, low, high } = estimate;
          return [significant(loss.scale * value), interval(low, high, (end) => significant(loss.scale * end))];
        }),
      ]),
    },
  };
}

/** Sizes and measures of every model on one text. */
function textTable(data: ReportData, text: Measurement): Table {
  const has = (name: string): boolean => text.rows.some(({ evaluation }) => evaluation.metrics[name]);
  const timed = text.rows.some(({ model }) => model.seconds !== undefined);
  const least = text.rows.findIndex(({ model }) => model.bits !== null);
  const increases = text.rows.map(({ model }) => perplexityIncrease(text, model, data));
  const paired = increases.some((estimate) => estimate !== undefined);
  return {
    caption: `All models on ${text.name} (${text.settings}); ± is half the 95% interval`,
    columns: [
      { title: 'model' },
      { title: 'file', numeric: true },
      { title: 'bits/weight', numeric: true },
      { title: 'perplexity', numeric: true },
      ...(paired ? [{ title: 'increase, %', numeric: true }] : []),
      ...(has('kl') ? [{ title: 'KL, nats/token', numeric: true }] : []),
      ...(has('top1_agreement') ? [{ title: 'agreement, %', numeric: true }] : []),
      ...(timed ? [{ title: 'quantized in', numeric: true }] : []),
    ],
    strong: least === -1 ? [] : [least],
    rows: text.rows.map(({ model, evaluation }, i) => {
      const { metrics } = evaluation;
      const cell = (name: string, scale = 1): string => {
        const found = metrics[name];
        return found ? measure(estimateOf(found), { scale }) : '';
      };
      const increase = increases[i];
      return [
        model.label,
        bytes(model.bytes),
        fixed(model.linearBitsPerWeight, 2),
        metrics['perplexity'] ? fixed(metrics['perplexity'].value, 2) : '',
        ...(paired ? [increase ? measure(increase, { scale: 100, sign: true }) : ''] : []),
        ...(has('kl') ? [cell('kl')] : []),
        ...(has('top1_agreement') ? [cell('top1_agreement', 100)] : []),
        ...(timed ? [model.seconds === undefined ? '' : `${significant(model.seconds)} s`] : []),
      ];
    }),
  };
}
