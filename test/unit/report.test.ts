// The report from result files: what it says, what it refuses, what it leaves out.
import { describe, expect, it } from 'vitest';
import { weightedMean } from '../../src/core/intervals.js';
import type { EvaluationResult, Metric } from '../../src/evaluation/results.js';
import type { QuantizationRecord, Range } from '../../src/quant/results.js';
import { readInput, renderReport, type ReportInput } from '../../src/report/index.js';
import { escape, fixed, html, measure, renderTable, significant, signed } from '../../src/report/html.js';
import { joinInputs } from '../../src/report/models.js';
import { logAxis } from '../../src/report/sections/section.js';
import { pairedDifference } from '../../src/report/statistics.js';
import { PALETTE } from '../../src/report/theme.js';

/** A result of one text over windows, as `gyre eval` writes it. */
function evaluation(
  name: string,
  fingerprint: string,
  columns: { nll: number[]; kl?: number[]; reference_nll?: number[] },
  bits: number | null,
): EvaluationResult {
  const metric = (column: keyof typeof columns, transform: Metric['transform']): Metric => {
    const values = columns[column] ?? [];
    const { value, low, high, n } = pairedDifference(
      values,
      values.map(() => 0),
    );
    const { standardError } = weightedMean(values);
    const map = (x: number | null) => (x === null ? null : transform === 'exp' ? Math.exp(x) : x);
    return {
      value: map(value) ?? NaN,
      low: map(low),
      high: map(high),
      standardError,
      interval: 't',
      n,
      column,
      transform,
      weight: null,
      better: 'lower',
      unit: null,
    };
  };
  const model = (of: string, print: string, width: number | null) => ({
    name: of,
    family: 'qwen3',
    fingerprint: print,
    quantization: width === null ? null : { method: 'awq', bits: width },
    parameters: 1000,
    bytes: width === null ? 2000 : 700,
    bitsPerWeight: width === null ? 16 : 5.6,
    linearBitsPerWeight: width === null ? 16 : width + 0.2,
  });
  return {
    kind: 'gyre.evaluation',
    schemaVersion: 1,
    version: '0.1.0',
    createdAt: '2026-01-02T03:04:05Z',
    model: model(name, fingerprint, bits),
    reference: bits === null ? null : model('hub/tiny', 'original', null),
    backend: { name: 'cpu', description: 'a backend', threads: 2 },
    machine: { cpu: 'a processor', memoryBytes: 8e9 },
    settings: { activations: 'exact' },
    evaluations: [
      {
        type: 'text',
        name: 'book',
        version: 1,
        source: { dataset: null, revision: null, split: null, files: [] },
        settings: { seqLen: 64 },
        primary: 'perplexity',
        metrics: {
          perplexity: metric('nll', 'exp'),
          ...(columns.kl && { kl: metric('kl', 'identity') }),
          ...(columns.reference_nll && { reference_perplexity: metric('reference_nll', 'exp') }),
        },
        items: { ids: columns.nll.map((_, i) => `window-${i}`), hashes: null, columns: { ...columns } },
        throughput: { seconds: 1, promptTokens: 256, generatedTokens: 0, tokensPerSecond: 256 },
        tokens: 256,
        windows: 4,
        documents: [],
      },
    ],
  };
}

const REFERENCE_NLL = [3, 3.5, 4, 4.5];
const original = evaluation('hub/tiny', 'original', { nll: REFERENCE_NLL }, null);
const good = evaluation(
  'out/good',
  'good',
  {
    nll: REFERENCE_NLL.map((x, i) => x + 0.01 + 0.001 * i),
    kl: [0.01, 0.011, 0.012, 0.013],
    reference_nll: REFERENCE_NLL,
  },
  4,
);
const bad = evaluation(
  'out/bad',
  'bad',
  {
    nll: REFERENCE_NLL.map((x, i) => x + 0.05 + 0.001 * i),
    kl: [0.03, 0.0312, 0.032, 0.033],
    reference_nll: REFERENCE_NLL,
  },
  4,
);

const range = (ratio: number): Range => ({
  rows: 8,
  rms: 0.5,
  absMax: 0.5 * ratio,
  channelRatio: ratio,
  kurtosis: 3 + ratio,
  channels: [1, ratio, 2, 1],
  histogram: { limit: 10, counts: [0, 4, 24, 4, 0] },
});
const record: QuantizationRecord = {
  kind: 'gyre.quantization',
  schemaVersion: 1,
  version: '0.1.0',
  method: 'paroquant',
  settings: { method: 'paroquant', bits: 4, groupSize: 32, krot: 4, steps: 2 },
  layout: 'paroquant',
  calibration: 'random',
  notes: ['a note <with> markup'],
  model: {
    fingerprint: 'good',
    parameters: 1000,
    bytes: 700,
    bitsPerWeight: 5.6,
    linearBytes: 500,
    linearBitsPerWeight: 4.2,
  },
  source: {
    name: 'hub/tiny',
    family: 'qwen3',
    fingerprint: 'original',
    parameters: 1000,
    bytes: 2000,
    bitsPerWeight: 16,
    linearBytes: 1600,
    linearBitsPerWeight: 16,
  },
  groups: [0, 1].flatMap((layer) =>
    (['qkv', 'down'] as const).map((group) => ({
      layer,
      group,
      modules: ['a'],
      stats: { error: 0.001 * (layer + 1) },
      curve: [-0.01, -0.012, -0.013],
      ranges: {
        channelsPerBin: 2,
        weights: { before: range(9), after: range(2) },
        activations: { before: range(40), after: range(4) },
      },
    })),
  ),
};

const read = (result: object, file = 'results.json'): ReportInput => {
  const input = readInput(file, JSON.stringify(result));
  if (!input) throw new Error('not recognised');
  return input;
};
const text = (page: string): string =>
  page
    .replaceAll(/<style>[\s\S]*?<\/style>|<svg[\s\S]*?<\/svg>/g, '')
    .replaceAll(/<[^>]+>/g, '')
    .replaceAll(/\s+/g, ' ');

describe('reading results', () => {
  it('tells every kind', () => {
    expect(read(good).kind).toBe('evaluation');
    expect(read(record).kind).toBe('quantization');
    const measured = { value: 1, low: null, high: null };
    const drift = {
      kind: 'gyre.drift',
      schemaVersion: 1,
      version: '0.1.0',
      model: { name: 'good', fingerprint: 'good' },
      reference: { name: 'tiny', fingerprint: 'original' },
      text: 'chains',
      chains: 2,
      positions: [{ from: 0, to: 8, kl: measured, top1Agreement: measured }],
    };
    expect(read(drift).kind).toBe('drift');
    expect(read({ date: 'today', machine: 'one', results: [{ kernel: 'a', gflops: 2 }] }).kind).toBe('benchmark');
  });

  it('draws how blocks were trained', async () => {
    const stage = { train: [0.3, 0.2], validation: [0.4, 0.3, 0.35], best: 1 };
    const training = [0, 1].map((layer) => ({
      layer,
      stages: ['transforms', 'weights'].map((name) => ({ stage: name, ...stage })),
    }));
    const trained = { ...record, method: 'paroquant-block', groups: [], training };
    const { html: page, charts } = await renderReport([read(trained)], { madeBy: 'a test' });
    expect(charts.map(({ name }) => name)).toEqual(['curves-1']);
    expect(text(page)).toContain('a stage takes 25 percent off it');
  });

  it('passes over JSON that is no result', () => {
    expect(readInput('config.json', '{"model_type": "qwen3"}')).toBeUndefined();
    expect(readInput('list.json', '[1, 2]')).toBeUndefined();
  });

  it.each([
    ['no JSON', '{"kind":', /^broken\.json is not JSON/],
    ['a field that is missing', JSON.stringify({ ...good, version: undefined }), /^broken\.json, version: /],
    [
      'a field that is wrong, deep inside',
      JSON.stringify(good).replace('"transform":"identity"', '"transform":"cube"'),
      /^broken\.json, evaluations\.0\.metrics\.kl\.transform: /,
    ],
    ['another version', JSON.stringify({ ...record, schemaVersion: 2 }), /^broken\.json, schemaVersion: /],
    [
      'columns of unequal length',
      JSON.stringify(good).replace('"window-3"', '"window-3","window-4"'),
      /^broken\.json, evaluations\.0\.items: every column/,
    ],
  ])('refuses %s, naming file and field', (_, content, message) => {
    expect(() => readInput('broken.json', content)).toThrowError(expect.objectContaining({ code: 'config-invalid' }));
    expect(() => readInput('broken.json', content)).toThrowError(message);
  });
});

describe('a report', () => {
  it('says first which model is how much smaller and what it lost', async () => {
    const report = await renderReport([read(bad), read(good), read(original), read(record)], { madeBy: 'a test' });
    expect(report.title).toBe('tiny at 4 bits: size and quality');
    const said = text(report.html);
    expect(said).toContain('ParoQuant stores the linear layers in 4.20 bits per weight, 3.8 times smaller');
    expect(said).toContain('KL divergence of 0.011 nats per token (95% interval 0.0094 to 0.014)');
    // exp(0.0115) − 1, paired: the spread of the text does not blur it.
    expect(said).toMatch(/perplexity changes by \+1\.16% \(\+0\.95 to \+1\.36\)/);
    expect(said).toContain('That KL is lower than bad’s, the next best of this width (4.20 bits), by 0.020 nats');
    expect(report.sections).toEqual(['quality', 'ranges', 'layers', 'optimisation', 'provenance']);
  });

  it('calls a difference within chance what it is', async () => {
    const columns = good.evaluations[0].items.columns;
    const twin = evaluation(
      'out/twin',
      'twin',
      { nll: columns['nll'], kl: [0.0101, 0.0109, 0.0122, 0.0129], reference_nll: REFERENCE_NLL },
      4,
    );
    const { html: page } = await renderReport([read(twin), read(good), read(original)], { madeBy: 'a test' });
    expect(text(page)).toMatch(
      /twin \(4\.20 bits\) comes close: the difference in KL of \S+ nats \(.*\) is within chance/,
    );
  });

  it('leaves out sections without data', async () => {
    const report = await renderReport(
      [read({ date: 'today', machine: 'one', results: [{ kernel: 'a', gflops: 2 }] })],
      {
        madeBy: 'a test',
      },
    );
    expect(report.sections).toEqual(['speed', 'provenance']);
  });

  it('is one file without scripts, addresses or markup from its inputs', async () => {
    const { html: page, charts } = await renderReport([read(good), read(record, 'a<b>.json')], {
      title: 'A & B <script>alert(1)</script>',
      madeBy: 'a test',
    });
    expect(page).not.toMatch(/<script|<link[^>]+href="(?!data:)|@import|url\((?!#)/);
    expect(
      page.replaceAll('http://www.w3.org/2000/svg', '').replaceAll('http://www.w3.org/1999/xlink', ''),
    ).not.toMatch(/https?:/);
    expect(page).toContain('A &amp; B &lt;script&gt;');
    expect(page).toContain('a note &lt;with&gt; markup');
    expect(page).toContain('a&lt;b&gt;.json');
    for (const { svg } of charts) expect(svg).not.toMatch(/<script|href=/);
  });

  it('describes every chart, gives its numbers, and repeats no id', async () => {
    const { html: page, charts } = await renderReport([read(good), read(bad), read(record)], { madeBy: 'a test' });
    const figures = [...page.matchAll(/<figure id="([^"]+)">[\s\S]*?<\/figure>/g)];
    expect(figures.map(([, id]) => id)).toEqual(charts.map(({ name }) => name));
    for (const [figure, id] of figures) {
      expect(figure.match(/role="img" aria-labelledby/g), id).toHaveLength(2);
      expect(figure, id).toMatch(/<title id="[^"]+">.+<\/title><desc id="[^"]+">.{20,}<\/desc>/);
      expect(figure, id).toContain('<table>');
    }
    const ids = [...page.matchAll(/ id="([^"]+)"/g)].map(([, id]) => id);
    expect(new Set(ids).size).toBe(ids.length);
    const referred = [...page.matchAll(/url\(#([^)]+)\)|aria-labelledby="([^"]+)"|href="#([^"]+)"/g)];
    for (const [, a, b, c] of referred) for (const id of (a ?? b ?? c).split(' ')) expect(ids, id).toContain(id);
  });

  it('draws charts in colours that have a dark counterpart', async () => {
    const { charts } = await renderReport([read(good), read(bad), read(record)], { madeBy: 'a test' });
    const known = new Set<string>(Object.values(PALETTE).map(({ light }) => light));
    for (const { name, svg } of charts) {
      const body = svg.replace(/<style>[\s\S]*?<\/style>/, '');
      const used = [...body.matchAll(/(?:fill|stroke)="(#[^"]+|rgb[^"]+)"/g)].map(([, value]) => value);
      expect(used.length, name).toBeGreaterThan(0);
      expect(
        [...new Set(used)].filter((value) => !known.has(value)),
        name,
      ).toEqual([]);
    }
  });

  it('is the same for the same inputs', async () => {
    const inputs = [read(good), read(bad), read(record)];
    const [a, b] = [await renderReport(inputs, { madeBy: 'x' }), await renderReport(inputs, { madeBy: 'x' })];
    expect(a.html).toBe(b.html);
  });
});

describe('joining inputs', () => {
  it('gives every model a name of its own', () => {
    const other = {
      ...record,
      model: { ...record.model, fingerprint: 'other' },
      settings: { ...record.settings, groupSize: 64 },
    };
    const wide = {
      ...record,
      model: { ...record.model, fingerprint: 'wide' },
      settings: { ...record.settings, bits: 8 },
    };
    const labels = joinInputs([read(record), read(other), read(wide)]).models.map(({ label }) => label);
    expect(labels).toEqual(['original', 'ParoQuant 4-bit (g32)', 'ParoQuant 4-bit (g64)', 'ParoQuant 8-bit']);
  });

  it('orders models by loss and knows the original', () => {
    const data = joinInputs([read(bad), read(good), read(original)]);
    expect(data.models.map(({ label }) => label)).toEqual(['original', 'good', 'bad']);
    expect(data.reference?.name).toBe('tiny');
  });
});

describe('statistics', () => {
  it('weighs items, and pairs them', () => {
    expect(pairedDifference([1, 3], [0, 0], [3, 1]).value).toBe(1.5);
    const { value, low, high } = pairedDifference([1, 2, 4], [0, 1, 2]);
    expect(value).toBeCloseTo(4 / 3, 12);
    // sd 0.5774, standard error 1/3, t(2) = 4.30265.
    expect(low).toBeCloseTo(4 / 3 - 4.30265273 / 3, 7);
    expect(high).toBeCloseTo(4 / 3 + 4.30265273 / 3, 7);
    expect(pairedDifference([5], [0]).low).toBeNull();
  });
});

describe('numbers and markup', () => {
  it('are written for people', () => {
    expect([significant(0.010512), significant(1234.5), significant(-2), significant(0)]).toEqual([
      '0.0105',
      '1235',
      '−2.00',
      '0',
    ]);
    expect([fixed(-0.04, 1), signed(0.56, 2), signed(-0.5, 1), signed(0.001, 1)]).toEqual([
      '0.0',
      '+0.56',
      '−0.5',
      '0.0',
    ]);
    expect(measure({ value: 0.0105, low: 0.0088, high: 0.01223 })).toBe('0.0105 ± 0.0017');
    expect(measure({ value: 92.63, low: null, high: null })).toBe('92.6');
  });

  it('escapes what it did not make', () => {
    expect(escape(`<a href="x">'&`)).toBe('&lt;a href=&quot;x&quot;&gt;&#39;&amp;');
    expect(html`<b>${'<i>'}</b>${html`<u>${1}</u>`}`.markup).toBe('<b>&lt;i&gt;</b><u>1</u>');
    const table = renderTable({
      caption: '<c>',
      columns: [{ title: 'a' }, { title: 'b', numeric: true }],
      rows: [['<x>', '1']],
    });
    expect(table.markup).toContain('<th scope="row">&lt;x&gt;</th><td class="n">1</td>');
  });

  it('puts few round ticks on logarithmic axes', () => {
    expect(logAxis([1, 12]).values).toEqual([1, 2, 5, 10]);
    expect(logAxis([1e-5, 1]).values).toEqual([1e-5, 1e-4, 1e-3, 1e-2, 0.1, 1]);
    expect(logAxis([0.0006, 0.009]).values).toEqual([0.001, 0.002, 0.005]);
  });
});
