// Accuracy on tasks: multiple choice and answers written by the model, with intervals.
import type { TopLevelSpec } from 'vega-lite';
import { fixed, html, interval, measure, signed, type Table } from '../html.js';
import { difference, estimateOf, type Measurement, type ReportData, type ReportModel } from '../models.js';
import type { Figure } from '../render.js';
import type { Estimate } from '../statistics.js';
import { color } from '../theme.js';
import { modelColors, modelShapes, panelTitle, panelWidth, stack, type Panel, type Section } from './section.js';

/** A measurement by its own main metric, when that is a share. */
interface Task {
  readonly measurement: Measurement;
  readonly metric: string;
  readonly title: string;
  readonly rows: readonly { readonly model: ReportModel; readonly estimate: Estimate }[];
}

/** Panels of one figure at most; further tasks get figures of their own. */
const PANELS = 6;

/** Tasks with the models that did them. */
export function taskSections(data: ReportData): Section[] {
  const tasks = data.measurements.flatMap((measurement) => taskOf(measurement) ?? []);
  if (tasks.length === 0) return [];
  const figures: Figure[] = [];
  for (let begin = 0; begin < tasks.length; begin += PANELS)
    figures.push(taskFigure(tasks.slice(begin, begin + PANELS), figures.length + 1));
  const intro = html`<p>
    Shares of right answers. Each interval is of one model by itself; the differences in the table are paired question
    by question, so they say more than intervals that overlap.
  </p>`;
  return [
    {
      id: 'tasks',
      title: 'Tasks',
      parts: [
        { kind: 'text', html: intro },
        ...figures.map((figure) => ({ kind: 'figure' as const, figure })),
        { kind: 'table', table: taskTable(data, tasks) },
      ],
    },
  ];
}

function taskOf(measurement: Measurement): Task | undefined {
  if (measurement.type === 'text') return undefined;
  const [first] = measurement.rows;
  const metric = first.evaluation.primary;
  if (first.evaluation.metrics[metric]?.unit !== 'share') return undefined;
  const rows = measurement.rows.flatMap(({ model, evaluation }) => {
    const found = evaluation.metrics[metric];
    return found ? [{ model, estimate: estimateOf(found) }] : [];
  });
  return { measurement, metric, title: `${measurement.name}, ${metric}`, rows };
}

function taskFigure(tasks: readonly Task[], number: number): Figure {
  const models = [...new Set(tasks.flatMap(({ rows }) => rows.map(({ model }) => model)))];
  const order = models.map(({ label }) => label);
  const rowsOf = ({ rows }: Task) =>
    rows.map(({ model, estimate: { value, low, high } }) => ({
      model: model.label,
      value: 100 * value,
      low: 100 * (low ?? value),
      high: 100 * (high ?? value),
    }));
  return {
    id: `tasks-${number}`,
    title: tasks.length === 1 ? `Right answers: ${tasks[0].title}` : 'Right answers by task',
    alt: `Dot plots of accuracy with 95% intervals of ${order.join(', ')} on ${tasks.map(({ title }) => title).join('; ')}.`,
    caption: html`Share of right answers in percent with 95% intervals; further right is better. The dotted line is the
    original.`,
    spec: (layout): TopLevelSpec => {
      const columns = layout.narrow ? 1 : Math.min(3, tasks.length);
      const width = panelWidth(layout, columns, 110, 30);
      const panels = tasks.map((task, i): Panel => {
        const original = task.rows.find(({ model }) => model.bits === null);
        return {
          data: { values: rowsOf(task) },
          width: columns === 1 ? Math.min(width, 420) : width,
          height: { step: 28 },
          title: panelTitle(task.title),
          encoding: {
            y: {
              field: 'model',
              type: 'nominal',
              sort: order,
              title: null,
              axis:
                i % columns === 0
                  ? { labelColor: color('ink'), labelFontSize: 13, grid: true }
                  : { labels: false, grid: true },
            },
            x: {
              field: 'value',
              type: 'quantitative',
              scale: { zero: false, nice: true },
              title: null,
              axis: { tickCount: 4, grid: false },
            },
            color: { field: 'model', type: 'nominal', legend: null, scale: modelColors(models) },
          },
          layer: [
            ...(original
              ? [
                  {
                    mark: { type: 'rule' as const, strokeDash: [2, 3] },
                    encoding: {
                      x: { datum: 100 * original.estimate.value },
                      y: { value: 0 },
                      y2: { value: 'height' as const },
                      color: { value: color('muted') },
                    },
                  },
                ]
              : []),
            { mark: { type: 'rule', strokeWidth: 2 }, encoding: { x: { field: 'low' }, x2: { field: 'high' } } },
            {
              mark: { type: 'point', filled: true, size: 90, opacity: 1 },
              encoding: { shape: { field: 'model', type: 'nominal', legend: null, scale: modelShapes(models) } },
            },
          ],
        };
      });
      if (columns === 1) return stack({ ...layout, narrow: true }, panels, { wide: 30, narrow: 62 });
      return { concat: panels, columns, bounds: 'flush', spacing: { row: 62, column: 30 } };
    },
    table: {
      caption: 'Right answers in percent, with 95% intervals',
      columns: [
        { title: 'task' },
        { title: 'model' },
        { title: 'right, %', numeric: true },
        { title: '95% interval', numeric: true },
        { title: 'questions', numeric: true },
      ],
      rows: tasks.flatMap(({ title, rows }) =>
        rows.map(({ model, estimate: { value, low, high, n } }) => [
          title,
          model.label,
          fixed(100 * value, 1),
          interval(low, high, (end) => fixed(100 * end, 1)),
          String(n),
        ]),
      ),
    },
  };
}

/** A row per model, a column per task, with the paired difference from the original where both answered the same. */
function taskTable(data: ReportData, tasks: readonly Task[]): Table {
  const models = data.models.filter((model) => tasks.some(({ rows }) => rows.some((row) => row.model === model)));
  const original = data.reference?.model;
  return {
    caption: 'Right answers, % ± half the 95% interval; in brackets the paired difference from the original',
    columns: [{ title: 'model' }, ...tasks.map(({ title }) => ({ title, numeric: true }))],
    rows: models.map((model) => [
      model.label,
      ...tasks.map(({ measurement, metric, rows }) => {
        const found = rows.find((row) => row.model === model);
        if (!found) return '';
        const gap = original && model !== original ? difference(measurement, metric, model, original) : undefined;
        const clear = gap && gap.low !== null && gap.high !== null && (gap.low > 0 || gap.high < 0);
        const beside = gap ? ` (${signed(100 * gap.value, 1)}${clear ? '*' : ''})` : '';
        return `${measure(found.estimate, { scale: 100 })}${beside}`;
      }),
    ]),
  };
}
