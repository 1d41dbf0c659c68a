// How the numbers were made: models with their settings, machines, input files.
import { bytes, fixed, html, type Html, type Table } from '../html.js';
import type { ReportData, ReportModel } from '../models.js';
import type { Part, Section } from './section.js';

/** The last section. */
export function provenanceSections(data: ReportData): Section[] {
  const parts: Part[] = [];
  if (data.models.length > 0) parts.push({ kind: 'table', table: modelTable(data) });
  if (data.measurements.length > 0) parts.push({ kind: 'table', table: throughputTable(data) });
  const facts = factsOf(data);
  if (facts.length > 0) {
    const items = facts.map(
      ([name, value]) =>
        html`<dt>${name}</dt>
          <dd>${value}</dd>`,
    );
    parts.push({ kind: 'text', html: html`<dl class="facts">${items}</dl>` });
  }
  return parts.length === 0 ? [] : [{ id: 'provenance', title: 'How this was made', parts }];
}

function modelTable(data: ReportData): Table {
  const settings = ({ record, bits }: ReportModel): string => {
    if (bits === null) return 'not quantized';
    if (!record) return `${bits} bits`;
    const { groupSize, krot, steps, rounding, share } = record.settings;
    const learned = record.groups.some(({ curve }) => curve && curve.length > 1);
    return [
      `${bits} bits`,
      groupSize === -1 ? 'per channel' : `groups of ${String(groupSize)}`,
      ...(learned ? [`${String(krot)} rotations`, `${String(steps)} steps`] : []),
      ...(learned && share === false ? ['a transform per linear'] : []),
      ...(typeof rounding === 'string' ? [rounding] : []),
      `${record.layout} layout`,
    ].join(', ');
  };
  return {
    caption: 'Models',
    columns: [
      { title: 'model' },
      { title: 'settings' },
      { title: 'calibration' },
      { title: 'bytes', numeric: true },
      { title: 'bits/weight, whole model', numeric: true },
      { title: 'fingerprint' },
    ],
    rows: data.models.map((model) => [
      model.label,
      settings(model),
      model.record?.calibration ?? '',
      bytes(model.bytes),
      fixed(model.bitsPerWeight, 2),
      html`<code>${model.fingerprint}</code>`,
    ]),
  };
}

/** How fast the measurements ran, which is no benchmark: the reference's work is in it. */
function throughputTable({ models, measurements }: ReportData): Table {
  return {
    caption: 'Tokens per second while measuring (all work counted, on a machine that may have been busy)',
    columns: [{ title: 'model' }, ...measurements.map(({ name }) => ({ title: name, numeric: true }))],
    rows: models
      .filter((model) => measurements.some(({ rows }) => rows.some((row) => row.model === model)))
      .map((model) => [
        model.label,
        ...measurements.map(({ rows }) => {
          const found = rows.find((row) => row.model === model);
          return found ? fixed(found.evaluation.throughput.tokensPerSecond, 0) : '';
        }),
      ]),
  };
}

function factsOf(data: ReportData): [string, Html][] {
  const results = data.inputs.flatMap((input) => (input.kind === 'evaluation' ? [input.result] : []));
  const unique = (values: readonly string[]): string => [...new Set(values)].filter((value) => value !== '').join('; ');
  const text = (name: string, values: readonly string[]): [string, Html][] => {
    const joined = unique(values);
    return joined === '' ? [] : [[name, html`${joined}`]];
  };
  const notes = data.models.flatMap(({ label, record }) => (record?.notes ?? []).map((note) => `${label}: ${note}`));
  return [
    ...(data.reference ? text('Original', [`${data.reference.name} (${data.reference.fingerprint})`]) : []),
    ...text(
      'Measured by',
      results.map(({ version }) => `gyre ${version}`),
    ),
    ...text(
      'Backend',
      results.map(({ backend }) => backend.description),
    ),
    ...text(
      'Run as',
      results.map(({ settings }) =>
        Object.entries(settings)
          .map(([name, value]) => `${name} ${String(value)}`)
          .join(', '),
      ),
    ),
    ...text(
      'Machine',
      results.map(({ machine }) =>
        Object.entries(machine)
          .map(([name, value]) => (name === 'memoryBytes' ? `${bytes(Number(value))} of memory` : `${name} ${value}`))
          .join(', '),
      ),
    ),
    ...text(
      'Date',
      results.map(({ createdAt }) => createdAt.slice(0, 10)),
    ),
    ...text('Notes', notes),
    ['Inputs', html`${data.inputs.map(({ file }, i) => html`${i === 0 ? '' : ', '}<code>${file}</code>`)}`],
  ];
}
