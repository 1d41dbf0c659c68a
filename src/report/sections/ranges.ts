// Ranges of weights and activations before a transform and after it: outlier channels by layer, and for the linear group
// with the most of them the channels and the distribution of values.
import type { TopLevelSpec } from 'vega-lite';
import type { GroupRanges, GroupRecord, Range } from '../../quant/results.js';
import { fixed, html, significant } from '../html.js';
import type { ReportData, ReportModel } from '../models.js';
import type { Figure, KeyItem, Layout } from '../render.js';
import { color } from '../theme.js';
import {
  groupPhrase,
  groupTitle,
  GROUPS,
  logAxis,
  panelTitle,
  panelWidth,
  stack,
  type Panel,
  type Section,
} from './section.js';

type WithRanges = GroupRecord & { readonly ranges: GroupRanges };
type What = 'weights' | 'activations';

const WHAT: readonly What[] = ['weights', 'activations'];
const KEY: readonly KeyItem[] = [
  { label: 'before the transform', color: 'gray', shape: 'circle' },
  { label: 'after', color: 'orange', shape: 'square' },
];
const STATES = { domain: ['before', 'after'], range: [color('gray'), color('orange')] };
const STATE_SHAPES = { domain: ['before', 'after'], range: ['circle', 'square'] };

/** The section, of the model with the least loss that has a transform. */
export function rangeSections(data: ReportData): Section[] {
  for (const model of data.models) {
    const groups = (model.record?.groups ?? []).filter(
      (group): group is WithRanges => group.ranges !== undefined && group.ranges.weights.after !== null,
    );
    if (groups.length === 0) continue;
    const worst = groups.reduce((a, b) => (outlying(b) > outlying(a) ? b : a));
    const figures = [outlierFigure(model, groups), channelFigure(model, worst), histogramFigure(model, worst)];
    const intro = html`<p>
      A grid has as many steps for a group of channels as it has bits; one channel that stands out stretches the steps
      for all. The transform of <strong>${model.label}</strong> moves weights and activations into a space where fewer
      do, and leaves their product as it was.
    </p>`;
    return [
      {
        id: 'ranges',
        title: 'Ranges before and after the transform',
        parts: [{ kind: 'text', html: intro }, ...figures.map((figure) => ({ kind: 'figure' as const, figure }))],
      },
    ];
  }
  return [];
}

function outlying({ ranges }: WithRanges): number {
  return Math.max(...present(ranges).map((what) => ranges[what]?.before.channelRatio ?? 0));
}

function present(ranges: GroupRanges): What[] {
  return WHAT.filter((what) => ranges[what]?.after);
}

/** Before and after of one quantity. */
function states(ranges: GroupRanges, what: What): { state: 'before' | 'after'; range: Range }[] {
  const found = ranges[what];
  if (!found?.after) return [];
  return [
    { state: 'before', range: found.before },
    { state: 'after', range: found.after },
  ];
}

function outlierFigure(model: ReportModel, groups: readonly WithRanges[]): Figure {
  const values = groups.flatMap(({ layer, group, ranges }) =>
    present(ranges).flatMap((what) =>
      states(ranges, what).map(({ state, range }) => ({ layer, group, what, state, ratio: range.channelRatio })),
    ),
  );
  const shown = GROUPS.filter(([name]) => values.some((row) => row.group === name));
  const kinds = WHAT.filter((what) => values.some((row) => row.what === what));
  const median = (state: string, what: string): number => {
    const sorted = values
      .flatMap((row) => (row.state === state && row.what === what ? [row.ratio] : []))
      .sort((a, b) => a - b);
    return sorted[sorted.length >> 1];
  };
  const summary = kinds
    .map((what) => `${what} from ${significant(median('before', what))} to ${significant(median('after', what))}`)
    .join(', ');
  return {
    id: 'outlier-channels',
    title: `${model.label}: how far the largest channel stands out`,
    alt: `Largest over median channel maximum by layer before and after the transform, for weights and activations of every linear group. Medians: ${summary}.`,
    key: KEY,
    caption: html`The largest channel’s maximum ÷ the median channel’s, by decoder block; 1 means that no channel stands
    out. Logarithmic. Median over all groups: ${summary}. From a sample of output rows and of calibration tokens.`,
    spec: (layout): TopLevelSpec => {
      const columns = layout.narrow ? 1 : kinds.length;
      const domainOf = (what: What): [number, number] => [
        1,
        1.1 * Math.max(...values.flatMap((row) => (row.what === what ? [row.ratio] : []))),
      ];
      const panels = shown.flatMap(([group, title]) =>
        kinds.map((what): Panel => ({
          data: { values: values.filter((row) => row.group === group && row.what === what) },
          width: panelWidth(layout, columns, 70, 50),
          height: layout.narrow ? 90 : 104,
          title: panelTitle(`${title}: ${what === 'weights' ? 'weights' : 'inputs'}`),
          encoding: {
            x: {
              field: 'layer',
              type: 'quantitative',
              scale: { nice: false },
              axis: { tickMinStep: 1, format: 'd', grid: false },
              title: null,
            },
            y: {
              field: 'ratio',
              type: 'quantitative',
              scale: { type: 'log', nice: false, domain: domainOf(what) },
              axis: logAxis(domainOf(what)),
              title: null,
            },
            color: { field: 'state', type: 'nominal', legend: null, scale: STATES },
          },
          layer: [
            { mark: { type: 'line', strokeWidth: 1.5 } },
            {
              mark: { type: 'point', filled: true, size: 30, opacity: 1 },
              encoding: { shape: { field: 'state', type: 'nominal', legend: null, scale: STATE_SHAPES } },
            },
          ],
        })),
      );
      return { concat: panels, columns, bounds: 'flush', spacing: { row: 54, column: 50 } };
    },
    table: {
      caption: `${model.label}: largest over median channel, and kurtosis (3 for a normal distribution)`,
      columns: [
        { title: 'block' },
        { title: 'linear group' },
        { title: 'of' },
        { title: 'largest ÷ median before', numeric: true },
        { title: 'after', numeric: true },
        { title: 'kurtosis before', numeric: true },
        { title: 'after', numeric: true },
      ],
      rows: groups.flatMap(({ layer, group, ranges }) =>
        present(ranges).map((what) => {
          const [before, after] = states(ranges, what).map(({ range }) => range);
          return [
            String(layer),
            groupTitle(group),
            what,
            fixed(before.channelRatio, 2),
            fixed(after.channelRatio, 2),
            fixed(before.kurtosis, 1),
            fixed(after.kurtosis, 1),
          ];
        }),
      ),
    },
  };
}

function nameOf({ layer, group }: WithRanges): string {
  return groupPhrase(group, layer);
}

function channelFigure(model: ReportModel, worst: WithRanges): Figure {
  const { ranges } = worst;
  const kinds = present(ranges);
  const per = ranges.channelsPerBin;
  const valuesOf = (what: What) =>
    states(ranges, what).flatMap(({ state, range }) =>
      range.channels.map((value, i) => ({ state, channel: i * per, end: (i + 1) * per, value })),
    );
  const facts = kinds
    .map((what) => {
      const [before, after] = states(ranges, what).map(({ range }) => Math.max(...range.channels));
      return `${what} peak at ${significant(before)} times the root mean square before and ${significant(after)} after`;
    })
    .join('; ');
  const runs = per === 1 ? 'each channel' : `each run of ${per} channels`;
  return {
    id: 'channels',
    title: `${model.label}: channels of ${nameOf(worst)}`,
    alt: `Largest magnitude of ${runs} before and after the transform: ${facts}.`,
    key: KEY.map((item) => ({ ...item, shape: item.label === 'after' ? 'line' : 'block' })),
    caption: html`Largest magnitude of ${runs}, ÷ the root mean square of all values; the linear group whose channels
    stand out most before the transform. The ${facts}.`,
    spec: (layout): TopLevelSpec =>
      stack(
        { ...layout, narrow: true },
        kinds.map((what, i): Panel => ({
          data: { values: valuesOf(what) },
          width: layout.width - 60,
          height: layout.narrow ? 120 : 150,
          title: panelTitle(`${what}, largest ÷ RMS`),
          encoding: {
            x: {
              field: 'channel',
              type: 'quantitative',
              scale: { nice: false },
              axis: { grid: false, format: 'd' },
              title: i === kinds.length - 1 ? 'input channel' : null,
            },
            y: { field: 'value', type: 'quantitative', title: null, axis: { tickCount: 4 } },
            color: { field: 'state', type: 'nominal', legend: null, scale: STATES },
          },
          layer: [
            {
              transform: [{ filter: { field: 'state', equal: 'before' } }],
              mark: { type: 'rect' },
              encoding: { x2: { field: 'end' }, y2: { datum: 0 } },
            },
            {
              transform: [{ filter: { field: 'state', equal: 'after' } }],
              mark: { type: 'line', interpolate: 'step-after', strokeWidth: 1.5 },
            },
          ],
        })),
        { wide: 58, narrow: 58 },
      ),
    table: {
      caption: `Largest magnitude ÷ root mean square, ${nameOf(worst)}`,
      columns: [
        { title: per === 1 ? 'channel' : 'channels' },
        ...kinds.flatMap((what) => [
          { title: `${what} before`, numeric: true },
          { title: 'after', numeric: true },
        ]),
      ],
      rows: ranges.weights.before.channels.map((_, i) => [
        per === 1 ? String(i) : `${i * per}–${(i + 1) * per - 1}`,
        ...kinds.flatMap((what) => states(ranges, what).map(({ range }) => significant(range.channels[i]))),
      ]),
    },
  };
}

function histogramFigure(model: ReportModel, worst: WithRanges): Figure {
  const { ranges } = worst;
  const kinds = present(ranges);
  const valuesOf = (what: What) =>
    states(ranges, what).flatMap(({ state, range: { histogram } }) => {
      const total = histogram.counts.reduce((a, b) => a + b, 0);
      const width = (2 * histogram.limit) / histogram.counts.length;
      return histogram.counts.flatMap((count, i) => {
        const from = -histogram.limit + i * width;
        return count === 0 ? [] : [{ state, from, to: from + width, share: count / total }];
      });
    });
  const facts = kinds
    .map((what) => {
      const [before, after] = states(ranges, what).map(({ range }) => range.kurtosis);
      return `the kurtosis of the ${what} goes from ${significant(before)} to ${significant(after)}`;
    })
    .join(', ');
  return {
    id: 'histogram',
    title: `${model.label}: values of ${nameOf(worst)}`,
    alt: `Histograms of values before and after the transform on a logarithmic axis; ${facts} (3 for a normal distribution).`,
    key: KEY.map((item) => ({ ...item, shape: item.label === 'after' ? 'line' : 'block' })),
    caption: html`Share of values by size in units of the root mean square, logarithmic, so that the tails are seen:
    ${facts} (3 for a normal distribution).`,
    spec: (layout: Layout): TopLevelSpec => {
      const width = panelWidth(layout, layout.narrow ? 1 : kinds.length, layout.narrow ? 70 : 80, 66);
      const panels = kinds.map((what): Panel => {
        const values = valuesOf(what);
        const least = Math.min(...values.map(({ share }) => share)) / 2;
        return {
          data: { values },
          width,
          height: 170,
          title: panelTitle(`${what}, share of values`),
          encoding: {
            x: {
              field: 'from',
              type: 'quantitative',
              scale: { nice: false },
              axis: { grid: false },
              title: 'value ÷ RMS',
            },
            y: {
              field: 'share',
              type: 'quantitative',
              scale: { type: 'log', domain: [least, 1], nice: false },
              axis: logAxis([least, 1]),
              title: null,
            },
            color: { field: 'state', type: 'nominal', legend: null, scale: STATES },
          },
          layer: [
            {
              transform: [{ filter: { field: 'state', equal: 'before' } }],
              mark: { type: 'rect' },
              encoding: { x2: { field: 'to' }, y2: { datum: least } },
            },
            {
              transform: [{ filter: { field: 'state', equal: 'after' } }],
              mark: { type: 'line', interpolate: 'step-after', strokeWidth: 2 },
            },
          ],
        };
      });
      return stack(layout, panels, { wide: 66, narrow: 86 });
    },
    table: {
      caption: `Distribution of values, ${nameOf(worst)}`,
      columns: [
        { title: 'of' },
        { title: 'state' },
        { title: 'RMS', numeric: true },
        { title: 'largest', numeric: true },
        { title: 'largest ÷ RMS', numeric: true },
        { title: 'kurtosis', numeric: true },
      ],
      rows: kinds.flatMap((what) =>
        states(ranges, what).map(({ state, range }) => [
          what,
          state,
          significant(range.rms),
          significant(range.absMax),
          significant(range.absMax / range.rms),
          significant(range.kurtosis),
        ]),
      ),
    },
  };
}
