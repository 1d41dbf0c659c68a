// The result of scoring a text, from its windows: metrics with intervals, and the same per document.
import { metric, type MetricSpec } from './metrics.js';
import type { TextEvaluation, WindowScore } from './perplexity.js';
import { hexDigest } from './request-cache.js';
import type { Metric, TextResult } from './results.js';

/** A document as it was scored. */
export interface ScoredDocument {
  readonly name: string;
  readonly text: string;
}

/**
 * The measured part of a result; source and settings are the caller's to add.
 * @param documents what was scored, one entry for a text scored as a whole.
 * @param complete whether every token of the documents was scored (the rolling protocol): only then do perplexities per
 * byte and per word, which do not depend on the tokenizer, mean anything.
 */
export async function textResult(
  evaluation: TextEvaluation,
  documents: readonly ScoredDocument[],
  complete: boolean,
): Promise<Pick<TextResult, 'primary' | 'metrics' | 'items' | 'documents' | 'throughput' | 'tokens' | 'windows'>> {
  const { scores } = evaluation;
  // Perplexities per byte need whole documents as items; otherwise windows are.
  const items = complete ? byDocument(scores, documents) : scores;
  const size = (of: (text: string) => number): number[] => documents.map(({ text }) => of(text));
  const sizes = complete ? { bytes: size(utf8Bytes), words: size(countWords) } : undefined;
  const columns = columnsOf(items, sizes);
  const counts = new Map<number, number>();
  const ids = complete
    ? documents.map(({ name }) => name)
    : scores.map(({ document }) => {
        const n = counts.get(document) ?? 0;
        counts.set(document, n + 1);
        return documents.length > 1 ? `${documents[document].name}#${n}` : `window-${n}`;
      });
  return {
    primary: 'perplexity',
    metrics: metricsOf(columns),
    items: {
      ids,
      hashes: complete
        ? await Promise.all(documents.map(({ text }) => hexDigest(text, 8)))
        : scores.map(({ hash }) => hash),
      columns,
    },
    documents:
      documents.length < 2
        ? []
        : documents.map(({ name }, document) => {
            const own = scores.filter((score) => score.document === document);
            return { name, items: own.length, metrics: metricsOf(columnsOf(own)) };
          }),
    throughput: {
      seconds: evaluation.seconds,
      promptTokens: evaluation.tokens,
      generatedTokens: 0,
      tokensPerSecond: evaluation.tokensPerSecond,
    },
    tokens: evaluation.tokens,
    windows: evaluation.windows,
  };
}

const utf8Bytes = (text: string): number => new TextEncoder().encode(text).length;
/** As lm-evaluation-harness counts: pieces between runs of white space. */
const countWords = (text: string): number => text.split(/\s+/).length;

type Score = Omit<WindowScore, 'hash'>;

/** Windows of a document as one score. */
function byDocument(scores: readonly Score[], documents: readonly ScoredDocument[]): Score[] {
  return documents.map((_, document) => {
    const own = scores.filter((score) => score.document === document);
    const tokens = own.reduce((sum, score) => sum + score.tokens, 0);
    const mean = (pick: (score: Score) => number | undefined): number | undefined => {
      const parts = own.map((score) => pick(score));
      if (parts.includes(undefined)) return undefined;
      return own.reduce((sum, score, i) => sum + score.tokens * (parts[i] ?? 0), 0) / tokens;
    };
    return {
      document,
      tokens,
      nll: mean((s) => s.nll) ?? NaN,
      kl: mean((s) => s.kl),
      agree: mean((s) => s.agree),
      referenceNll: mean((s) => s.referenceNll),
    };
  });
}

/** Columns of items; with sizes also nats per byte and word. */
function columnsOf(
  scores: readonly Score[],
  sizes?: { readonly bytes: readonly number[]; readonly words: readonly number[] },
): Record<string, number[]> {
  const columns: Record<string, number[]> = {
    tokens: scores.map(({ tokens }) => tokens),
    nll: scores.map(({ nll }) => nll),
  };
  if (scores.every(({ kl }) => kl !== undefined)) {
    columns['kl'] = scores.map(({ kl }) => kl ?? NaN);
    columns['top1_agreement'] = scores.map(({ agree }) => agree ?? NaN);
    columns['reference_nll'] = scores.map(({ referenceNll }) => referenceNll ?? NaN);
  }
  if (sizes) {
    columns['bytes'] = [...sizes.bytes];
    columns['words'] = [...sizes.words];
    columns['nll_per_byte'] = scores.map(({ nll, tokens }, i) => (nll * tokens) / sizes.bytes[i]);
    columns['bits_per_byte'] = columns['nll_per_byte'].map((nats) => nats / Math.LN2);
    columns['nll_per_word'] = scores.map(({ nll, tokens }, i) => (nll * tokens) / sizes.words[i]);
  }
  return columns;
}

type Row = readonly [
  name: string,
  column: string,
  weight: string,
  rest: Pick<MetricSpec, 'transform' | 'better' | 'unit'>,
];

const METRICS: readonly Row[] = [
  ['perplexity', 'nll', 'tokens', { transform: 'exp', better: 'lower' }],
  ['nll', 'nll', 'tokens', { better: 'lower', unit: 'nats' }],
  ['kl', 'kl', 'tokens', { better: 'lower', unit: 'nats' }],
  ['top1_agreement', 'top1_agreement', 'tokens', { better: 'higher', unit: 'share' }],
  ['reference_perplexity', 'reference_nll', 'tokens', { transform: 'exp', better: 'neither' }],
  ['bits_per_byte', 'bits_per_byte', 'bytes', { better: 'lower', unit: 'bits' }],
  ['byte_perplexity', 'nll_per_byte', 'bytes', { transform: 'exp', better: 'lower' }],
  ['word_perplexity', 'nll_per_word', 'words', { transform: 'exp', better: 'lower' }],
];

/** The metrics that the columns allow. */
function metricsOf(columns: Readonly<Record<string, readonly number[]>>): Record<string, Metric> {
  return Object.fromEntries(
    METRICS.filter(([, column]) => columns[column] !== undefined).map(([name, column, weight, rest]) => [
      name,
      metric({ column, values: columns[column], weight: [weight, columns[weight]], ...rest }),
    ]),
  );
}
