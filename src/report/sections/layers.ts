// What quantizing did to each layer: output errors, and the curves of what was learned.
import type { TopLevelSpec } from 'vega-lite';
import { html, significant } from '../html.js';
import type { ReportData, ReportModel } from '../models.js';
import type { GroupRecord } from '../../quant/results.js';
import type { Figure, KeyItem, Layout } from '../render.js';
import { DEPTHS, PALETTE } from '../theme.js';
import {
  groupPhrase,
  groupTitle,
  GROUPS,
  logAxis,
  modelColors,
  modelKey,
  modelShapes,
  panelTitle,
  panelWidth,
  type Panel,
  type Section,
} from './section.js';

interface Recorded {
  readonly model: ReportModel;
  readonly groups: readonly GroupRecord[];
}

/** Sections on errors by layer and on optimisation, of the models with records. */
export function layerSections(data: ReportData): Section[] {
  const recorded = data.models.flatMap((model): Recorded[] =>
    model.record && model.record.groups.length > 0 ? [{ model, groups: model.record.groups }] : [],
  );
  const errors = errorFigure(recorded);
  const curves: Figure[] = [];
  for (const one of recorded) {
    const figure = curveFigure(one, curves.length + 1);
    if (figure) curves.push(figure);
  }
  for (const model of data.models) {
    const figure = trainingFigure(model, curves.length + 1);
    if (figure) curves.push(figure);
  }
  return [
    ...(errors
      ? [{ id: 'layers', title: 'Error by layer', parts: [{ kind: 'figure' as const, figure: errors }] }]
      : []),
    ...(curves.length > 0
      ? [
          {
            id: 'optimisation',
            title: 'What was learned',
            parts: curves.map((figure) => ({ kind: 'figure' as const, figure })),
          },
        ]
      : []),
  ];
}

/** `error`, or its mean over the projections where each has a transform of its own (`error.0`, …). */
function errorOf({ stats }: GroupRecord): number | undefined {
  const values = Object.entries(stats).flatMap(([name, value]) => (/^error(\.\d+)?$/.test(name) ? [value] : []));
  const positive = values.filter((value) => value > 0);
  return positive.length === 0 ? undefined : positive.reduce((a, b) => a + b, 0) / positive.length;
}

/** Two panels a row on a wide page, one on a phone. */
function grid(layout: Layout, panels: Panel[]): TopLevelSpec {
  return { concat: panels, columns: layout.narrow ? 1 : 2, bounds: 'flush', spacing: { row: 66, column: 56 } };
}

function errorFigure(recorded: readonly Recorded[]): Figure | undefined {
  const values = recorded.flatMap(({ model, groups }) =>
    groups.flatMap((group) => {
      const error = errorOf(group);
      return error === undefined ? [] : [{ model: model.label, layer: group.layer, group: group.group, error }];
    }),
  );
  if (values.length === 0) return undefined;
  const models = recorded.map(({ model }) => model).filter(({ label }) => values.some((row) => row.model === label));
  const groups = GROUPS.filter(([name]) => values.some((row) => row.group === name));
  const all = values.map(({ error }) => error);
  const domain: [number, number] = [Math.min(...all) / 1.15, Math.max(...all) * 1.15];
  const worst = values.reduce((a, b) => (b.error > a.error ? b : a));
  const dots = new Set(values.map(({ layer }) => layer)).size <= 40;
  return {
    id: 'layer-errors',
    title: 'Output error of each linear group',
    alt: `Line charts by layer for ${groups.map(([, title]) => title).join('; ')}. The largest error is ${significant(worst.error)} (${worst.model}, ${groupPhrase(worst.group, worst.layer)}).`,
    key: modelKey(models),
    caption: html`Squared error of the group’s outputs on its own calibration inputs, as a share of the outputs’ square:
    ‖(Ŵ − W)X‖² ÷ ‖WX‖². Logarithmic, the same scale in every panel; lower is better. ParoQuant’s is against its
    least-squares target. RTN looks at no inputs and has none.`,
    spec: (layout) =>
      grid(
        layout,
        groups.map(([group, title], i): Panel => ({
          data: { values: values.filter((row) => row.group === group) },
          width: panelWidth(layout, layout.narrow ? 1 : 2, 74, 56),
          height: 170,
          title: panelTitle(title, true),
          encoding: {
            x: {
              field: 'layer',
              type: 'quantitative',
              scale: { nice: false },
              axis: { tickMinStep: 1, format: 'd', grid: false },
              title: layout.narrow || i >= groups.length - 2 ? 'decoder block' : null,
            },
            y: {
              field: 'error',
              type: 'quantitative',
              scale: { type: 'log', domain, nice: false },
              axis: logAxis(domain),
              title: null,
            },
            color: { field: 'model', type: 'nominal', legend: null, scale: modelColors(models) },
          },
          layer: [
            { mark: { type: 'line', strokeWidth: 2 } },
            ...(dots
              ? [
                  {
                    mark: { type: 'point' as const, filled: true, size: 36, opacity: 1 },
                    encoding: {
                      shape: { field: 'model', type: 'nominal' as const, legend: null, scale: modelShapes(models) },
                    },
                  },
                ]
              : []),
          ],
        })),
      ),
    table: {
      caption: 'Output error of each linear group',
      columns: [
        { title: 'block' },
        { title: 'linear group' },
        ...models.map(({ label }) => ({ title: label, numeric: true })),
      ],
      rows: [...new Set(values.map(({ layer }) => layer))]
        .sort((a, b) => a - b)
        .flatMap((layer) =>
          groups.map(([group, title]) => [
            String(layer),
            title,
            ...models.map(({ label }) => {
              const row = values.find((v) => v.layer === layer && v.group === group && v.model === label);
              return row ? significant(row.error) : '';
            }),
          ]),
        ),
    },
  };
}

/** Lines of blocks, coloured by how deep the block is. */
const DEPTH_COLOR = {
  field: 'depth',
  type: 'ordinal' as const,
  legend: null,
  scale: { domain: DEPTHS.map((_, d) => d), range: DEPTHS.map((name) => PALETTE[name].light) },
};

/** Which run of blocks a block of so many is in, and the key of the runs. */
function depths(layers: number): { depth: (layer: number) => number; key: KeyItem[] } {
  const depth = (layer: number): number => Math.min(DEPTHS.length - 1, Math.floor((layer / layers) * DEPTHS.length));
  const rangeOf = (i: number): string => {
    const own = Array.from({ length: layers }, (_, layer) => layer).filter((layer) => depth(layer) === i);
    return own.length === 0 ? '' : own.length === 1 ? `block ${own[0]}` : `blocks ${own[0]}–${own[own.length - 1]}`;
  };
  const key = DEPTHS.map((name, i) => ({ label: rangeOf(i), color: name, shape: 'line' }) as const);
  return { depth, key: key.filter(({ label }) => label !== '') };
}

function curveFigure({ model, groups }: Recorded, number: number): Figure | undefined {
  const learned = groups.filter(({ curve }) => curve && curve.length > 1);
  if (learned.length === 0) return undefined;
  const shown = GROUPS.filter(([name]) => learned.some(({ group }) => group === name));
  const { depth, key } = depths(Math.max(...learned.map(({ layer }) => layer)) + 1);
  // The loss lacks a constant (the reference outputs' own square), so only its changes mean something.
  const values = learned.flatMap(({ layer, group, curve }) =>
    (curve ?? []).map((loss, step) => ({
      line: layer,
      depth: depth(layer),
      group,
      step,
      change: 100 * (loss - (curve?.[0] ?? 0)),
    })),
  );
  const drops = learned.map(({ curve }) => (curve?.[0] ?? 0) - Math.min(...(curve ?? [0])));
  const mean = 100 * (drops.reduce((a, b) => a + b, 0) / drops.length);
  return {
    id: `curves-${number}`,
    title: `${model.label}: error while its transforms were learned`,
    alt: `Line charts of the change in error by optimiser step, one line per block, for ${shown.map(([, title]) => title).join('; ')}. On average it falls by ${significant(mean, 2)} percent of the outputs’ square.`,
    key,
    caption: html`Change of the squared error of the rounded outputs since the first step, in percent of the outputs’
    square ‖WX‖²; one line per decoder block. The first step is a transform that changes nothing. The best step is kept:
    on average it takes off ${significant(mean, 2)} percent. The rounding that follows (GPTQ and coordinate descent)
    lowers the error further.`,
    spec: (layout) =>
      grid(
        layout,
        shown.map(([group, title], i): Panel => ({
          data: { values: values.filter((row) => row.group === group) },
          width: panelWidth(layout, layout.narrow ? 1 : 2, 74, 56),
          height: 170,
          title: panelTitle(title, true),
          mark: { type: 'line', strokeWidth: 1.5 },
          encoding: {
            x: {
              field: 'step',
              type: 'quantitative',
              scale: { nice: false },
              axis: { grid: false, format: 'd' },
              title: layout.narrow || i >= shown.length - 2 ? 'step' : null,
            },
            y: {
              field: 'change',
              type: 'quantitative',
              axis: { tickCount: 4 },
              title: null,
            },
            detail: { field: 'line' },
            color: DEPTH_COLOR,
          },
        })),
      ),
    table: {
      caption: `${model.label}: fall of the error, in percent of the outputs’ square`,
      columns: [
        { title: 'block' },
        { title: 'linear group' },
        { title: 'fall, %', numeric: true },
        { title: 'best step', numeric: true },
      ],
      rows: learned.map(({ layer, group, curve }, i) => [
        String(layer),
        groupTitle(group),
        significant(100 * drops[i]),
        String((curve ?? []).indexOf(Math.min(...(curve ?? [0])))),
      ]),
    },
  };
}

/** Losses of recipes that train whole blocks, stage by stage. */
function trainingFigure({ label, record }: ReportModel, number: number): Figure | undefined {
  const blocks = record?.training ?? [];
  const stages = [...new Set(blocks.flatMap((block) => block.stages.map(({ stage }) => stage)))];
  if (stages.length === 0) return undefined;
  const { depth, key } = depths(Math.max(...blocks.map(({ layer }) => layer)) + 1);
  const rows = blocks.flatMap(({ layer, stages: own }) => own.map((curve) => ({ layer, ...curve })));
  const line = (layer: number, stage: string, kind: string, losses: readonly number[], first: number) =>
    losses.flatMap((loss, i) =>
      loss > 0 ? [{ line: `${layer} ${kind}`, depth: depth(layer), stage, kind, epoch: first + i, loss }] : [],
    );
  // An epoch's training loss is a mean over its steps: it belongs to its middle.
  const values = rows.flatMap(({ layer, stage, train, validation }) => [
    ...line(layer, stage, 'validation', validation, 0),
    ...line(layer, stage, 'training', train, 0.5),
  ]);
  const falls = rows.map(({ validation, best }) => 1 - validation[best] / validation[0]);
  const mean = significant(100 * (falls.reduce((a, b) => a + b, 0) / falls.length), 2);
  const losses = values.map(({ loss }) => loss);
  const domain: [number, number] = [Math.min(...losses) / 1.1, Math.max(...losses) * 1.1];
  return {
    id: `curves-${number}`,
    title: `${label}: loss while its blocks were trained`,
    alt: `Line charts of the loss by epoch, one for each of ${stages.length} stages (${stages.join(', ')}), with two lines per block: held-out and training sequences. On average a stage takes ${mean} percent off the held-out loss.`,
    key,
    caption: html`Mean error of a block’s output against the original’s, by epoch, one line per decoder block: solid on
    the sequences held out, dashed on those it was trained on. Logarithmic. The epoch with the least held-out loss is
    kept, the start counting as one: on average a stage takes ${mean} percent off it.`,
    spec: (layout) =>
      grid(
        layout,
        stages.map((stage): Panel => ({
          data: { values: values.filter((row) => row.stage === stage) },
          width: panelWidth(layout, layout.narrow ? 1 : 2, 74, 56),
          height: 220,
          title: panelTitle(stage, true),
          mark: { type: 'line', strokeWidth: 1.5 },
          encoding: {
            x: {
              field: 'epoch',
              type: 'quantitative',
              scale: { nice: false },
              axis: { grid: false, format: 'd', tickMinStep: 1 },
              title: 'epoch',
            },
            y: {
              field: 'loss',
              type: 'quantitative',
              scale: { type: 'log', domain, nice: false },
              axis: logAxis(domain),
              title: null,
            },
            detail: { field: 'line' },
            strokeDash: {
              field: 'kind',
              type: 'nominal',
              legend: null,
              scale: {
                domain: ['validation', 'training'],
                range: [
                  [1, 0],
                  [3, 3],
                ],
              },
            },
            color: DEPTH_COLOR,
          },
        })),
      ),
    table: {
      caption: `${label}: held-out loss of each block`,
      columns: [
        { title: 'block' },
        { title: 'stage' },
        { title: 'before', numeric: true },
        { title: 'after', numeric: true },
        { title: 'kept epoch', numeric: true },
      ],
      rows: rows.map(({ layer, stage, validation, best }) => [
        String(layer),
        stage,
        significant(validation[0]),
        significant(validation[best]),
        String(best),
      ]),
    },
  };
}
