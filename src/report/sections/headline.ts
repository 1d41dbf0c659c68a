// The answer first: which model is how much smaller and what it lost.
import { bytes, fixed, html, interval, list, significant, signed, type Html } from '../html.js';
import {
  difference,
  estimateOf,
  perplexityIncrease,
  type Measurement,
  type ReportData,
  type ReportModel,
} from '../models.js';
import type { Opening } from '../page.js';

/** Title, lead and tiles of a report. */
export function openingOf(data: ReportData, title: string | undefined): Omit<Opening, 'foot'> {
  const quantized = data.models.filter((model) => model.bits !== null);
  const text = mainText(data, quantized);
  const [best] = text ? quantized.filter((model) => kl(text, model) ?? perplexity(text, model)) : quantized;
  const name = data.reference?.name;
  return {
    title: title ?? titleOf(name, quantized),
    lead: best
      ? html`${sizeSentence(data, best)} ${text ? lossSentence(data, text, best) : ''}${rest(data, text, best)}`
      : emptyLead(data),
    tiles: best ? tilesOf(data, text, best) : [],
  };
}

function titleOf(name: string | undefined, quantized: readonly ReportModel[]): string {
  const widths = [...new Set(quantized.flatMap(({ bits }) => bits ?? []))].sort((a, b) => b - a);
  const what = name ?? quantized[0]?.label ?? 'Measurements';
  return widths.length === 0 ? what : `${what} at ${list(widths.map(String))} bits: size and quality`;
}

/** The text that most quantized models were scored on. */
function mainText(data: ReportData, quantized: readonly ReportModel[]): Measurement | undefined {
  const scored = ({ rows }: Measurement): number => rows.filter(({ model }) => quantized.includes(model)).length;
  return data.measurements
    .filter((measurement) => measurement.type === 'text' && scored(measurement) > 0)
    .sort((a, b) => scored(b) - scored(a))[0];
}

function metricOf(text: Measurement, model: ReportModel, name: string) {
  const found = text.rows.find((row) => row.model === model)?.evaluation.metrics[name];
  return found && estimateOf(found);
}
const kl = (text: Measurement, model: ReportModel) => metricOf(text, model, 'kl');
const perplexity = (text: Measurement, model: ReportModel) => metricOf(text, model, 'perplexity');

function sizeSentence(data: ReportData, { label, linearBitsPerWeight, bytes: size }: ReportModel): Html {
  const original = data.reference?.model;
  const linears = html`<strong>${label}</strong> stores the linear layers in ${fixed(linearBitsPerWeight, 2)} bits per
    weight`;
  if (!original) return html`${linears}; the model takes ${bytes(size)}.`;
  const ratio = original.linearBitsPerWeight / linearBitsPerWeight;
  return html`${linears}, ${significant(ratio, 2)} times smaller than in the original; the whole model goes from
  ${bytes(original.bytes)} to ${bytes(size)}.`;
}

function lossSentence(data: ReportData, text: Measurement, model: ReportModel): Html {
  const divergence = kl(text, model);
  const increase = perplexityIncrease(text, model, data);
  const parts: Html[] = [];
  if (divergence) {
    const range = interval(divergence.low, divergence.high, (end) => significant(end, 2));
    parts.push(
      html`its predictions differ from the original’s by a KL divergence of
        <strong>${significant(divergence.value, 2)}</strong> nats per
        token${range === '' ? '' : html` (95% interval ${range})`}`,
    );
  }
  if (increase) {
    const range = interval(increase.low, increase.high, (end) => signed(100 * end, 2));
    parts.push(
      html`perplexity changes by
        <strong>${signed(100 * increase.value, 2)}%</strong>${range === '' ? '' : html` (${range})`}`,
    );
  }
  if (parts.length === 0) return html``;
  return html`On <em>${text.name}</em> ${parts.length === 2 ? html`${parts[0]}, and ${parts[1]}` : parts[0]}.`;
}

/** How it compares with the next best model of the same width, said only where the paired interval excludes zero. */
function rest(data: ReportData, text: Measurement | undefined, best: ReportModel): Html {
  const others = data.models.filter((model) => model !== best && model.bits === best.bits && text && kl(text, model));
  const [next] = others;
  const gap = text && next ? difference(text, 'kl', next, best) : undefined;
  if (!next || !gap || gap.low === null || gap.high === null) return html``;
  const range = interval(gap.low, gap.high, (end) => significant(end, 2));
  const size = `${fixed(next.linearBitsPerWeight, 2)} bits`;
  return gap.low > 0
    ? html` That KL is lower than ${next.label}’s, the next best of this width (${size}), by
      ${significant(gap.value, 2)} nats (${range}, paired by window).`
    : html` ${next.label} (${size}) comes close: the difference in KL of ${significant(gap.value, 2)} nats (${range},
      paired by window) is within chance.`;
}

function tilesOf(data: ReportData, text: Measurement | undefined, best: ReportModel): Opening['tiles'][number][] {
  const original = data.reference?.model;
  const tiles: Opening['tiles'][number][] = [
    {
      label: 'Linear layers',
      value: `${fixed(best.linearBitsPerWeight, 2)} bits`,
      note: original
        ? `per weight, ${significant(original.linearBitsPerWeight / best.linearBitsPerWeight, 2)}× smaller`
        : 'per weight',
    },
  ];
  const divergence = text && kl(text, best);
  if (divergence) {
    const range = interval(divergence.low, divergence.high, (end) => significant(end, 2));
    tiles.push({
      label: 'KL divergence',
      value: significant(divergence.value, 2),
      note: `nats per token${range && `; ${range}`}`,
    });
  }
  const increase = text && perplexityIncrease(text, best, data);
  if (increase) {
    const range = interval(increase.low, increase.high, (end) => signed(100 * end, 2));
    tiles.push({
      label: 'Perplexity',
      value: `${signed(100 * increase.value, 2)}%`,
      note: range === '' ? 'against the original' : `${range}%`,
    });
  }
  const agreement = text && metricOf(text, best, 'top1_agreement');
  if (agreement) {
    const range = interval(agreement.low, agreement.high, (end) => fixed(100 * end, 1));
    tiles.push({
      label: 'Same next token',
      value: `${fixed(100 * agreement.value, 1)}%`,
      note: range === '' ? 'of positions' : `of positions; ${range}`,
    });
  }
  return tiles;
}

function emptyLead(data: ReportData): Html {
  const kinds = [...new Set(data.inputs.map(({ kind }) => kind))];
  return html`Made from ${list(kinds.map((kind) => `${kind} results`))}; none of them is of a quantized model that was
  measured.`;
}
