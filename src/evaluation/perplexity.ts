// Perplexity of a text under a model and, against a reference model, the mean KL divergence and top-1 agreement.
//
// The text is tokenized once as a whole, without special tokens, and cut into windows; windows.ts has the protocols.
// nll = mean −log p(next token) in nats over all scored tokens, perplexity = exp(nll), kl = mean KL(reference ‖ model) in
// nats over the same tokens.
import { GyreError, ensure } from '../core/errors.js';
import { silent, type ProgressListener } from '../core/progress.js';
import { contextLength, createBreath } from '../generate/index.js';
import { weightedMean, type Mean } from '../core/intervals.js';
import { InFlight, logitRows, settled, submitScores, type PendingScores } from './passes.js';
import { hexDigest } from './request-cache.js';
import { cutWindows, type ProtocolOptions, type TextWindow } from './windows.js';
import { hostTensor } from '../core/tensor.js';
import type { Decoder } from '../models/decoder.js';
import type { Tensor } from '../ops/backend.js';

/** Rows of one forward pass, unless the backend asks for more; short windows are run together up to this many. */
const ROWS_PER_PASS = 1024;

/** What is evaluated: a {@link Decoder}, or something that answers like one. */
export type Predictor = Pick<Decoder, 'backend' | 'config' | 'hidden' | 'logits'>;

/**
 * A model that remembers its hidden states, in host memory (hidden size × 4 bytes a token): a reference that several
 * models are compared with runs its blocks only once over the text.
 */
export function remembering(decoder: Decoder): Predictor {
  const { backend, config } = decoder;
  const seen = new Map<string, Float32Array>();
  return {
    backend,
    config,
    logits: (hidden) => decoder.logits(hidden),
    hidden: async (ids, options) => {
      const key = `${options?.batch ?? 1}:${ids.join()}`;
      const known = seen.get(key);
      if (known) return backend.upload(hostTensor('f32', [ids.length, config.hiddenSize], known));
      const hidden = await decoder.hidden(ids, options);
      seen.set(key, (await backend.download(hidden)).slice());
      return hidden;
    },
  };
}

/** Options of {@link evaluateText}. */
export interface EvaluateOptions extends ProtocolOptions {
  /** Tokens per window, 2 … the model's context; default 1024 or the context if that is less. */
  readonly seqLen?: number;
  /** A model on the same backend, with the same vocabulary, to compare with. */
  readonly reference?: Predictor;
  /** Rows whose logits are computed at a time; default what fits 64 MiB. */
  readonly rowsPerLogits?: number;
  /** Stage `evaluate`, in windows. */
  readonly onProgress?: ProgressListener;
  readonly signal?: AbortSignal;
}

/** Scores of one window: means over its tokens. */
export interface WindowScore {
  /** Tokens scored. */
  readonly tokens: number;
  readonly nll: number;
  /** Present with a reference, like the next two. */
  readonly kl?: number;
  readonly agree?: number;
  readonly referenceNll?: number;
  /** Which of the documents it is of; 0 for a single text. */
  readonly document: number;
  /** First 16 hexadecimal digits of the SHA-256 of its tokens and of where scoring begins: tells same windows from others. */
  readonly hash: string;
}

/** What {@link evaluateText} measures. Standard errors are over windows, null when there is only one. */
export interface TextEvaluation {
  readonly perplexity: number;
  readonly perplexityStandardError: number | null;
  /** Mean −log p of a token, nats. */
  readonly nll: number;
  readonly nllStandardError: number | null;
  /** Tokens scored. */
  readonly tokens: number;
  readonly windows: number;
  readonly seqLen: number;
  /** Mean KL(reference ‖ model) per token, nats; null without a reference. */
  readonly kl: number | null;
  readonly klStandardError: number | null;
  /** Share of tokens where both models' most likely next token is the same; null without a reference. */
  readonly top1Agreement: number | null;
  readonly top1AgreementStandardError: number | null;
  /** Perplexity of the reference on the same tokens; null without one. */
  readonly referencePerplexity: number | null;
  readonly seconds: number;
  /** Tokens scored per second, the reference's work included. */
  readonly tokensPerSecond: number;
  /** Every window's own means, in the order of the text. */
  readonly scores: readonly WindowScore[];
}

/**
 * Scores a tokenized text (no special tokens in it), or documents each on its own. See the head of this file for the
 * definition.
 * @throws GyreError `usage` for a text of fewer than 2 tokens, `context-length` for windows beyond the model's context,
 * `non-finite` when the model's logits are, `interrupted`.
 */
export async function evaluateText(
  decoder: Predictor,
  text: Int32Array | readonly Int32Array[],
  options: EvaluateOptions = {},
): Promise<TextEvaluation> {
  const { reference, onProgress = silent, signal } = options;
  const begun = performance.now();
  if (reference) checkReference(decoder, reference);
  const seqLen = windowLength(decoder, reference, options.seqLen);
  const documents = text instanceof Int32Array ? [text] : text;
  const windows = documents.flatMap((tokens, document) =>
    cutWindows(tokens, { ...options, seqLen }).map((window) => ({ ...window, document })),
  );
  ensure(windows.length > 0, 'usage', 'there is no text to evaluate on', 'Give at least one document.');
  const { rows = ROWS_PER_PASS } = decoder.backend.info.pass ?? {};
  const step = options.rowsPerLogits ?? logitRows(decoder.backend, decoder.config.vocabSize);
  const scores: WindowScore[] = [];
  const flight = new InFlight();
  const breathe = createBreath();
  let running = 0;
  let tokens = 0;
  /** Reads the scores of a batch that was submitted. */
  const read = async (batch: readonly DocumentWindow[], pending: SubmittedWindows): Promise<void> => {
    const hashes = batch.map(({ first, ids }) => hexDigest(`${first}:${ids.join()}`, 8));
    for (const [i, score] of (await meanScores(batch, pending)).entries()) {
      ensure(
        Number.isFinite(score.nll) && !(score.kl !== undefined && !Number.isFinite(score.kl)),
        'non-finite',
        'the logits of the model are not finite',
        'the model or its quantization is broken: look for damaged tensors with `gyre inspect`',
      );
      scores.push({ ...score, document: batch[i].document, hash: await hashes[i] });
      running += score.nll * score.tokens;
      tokens += score.tokens;
    }
    onProgress({
      stage: 'evaluate',
      done: scores.length,
      total: windows.length,
      unit: 'windows',
      message: `perplexity ${Math.exp(running / tokens).toFixed(3)}`,
    });
  };
  for (let begin = 0; begin < windows.length;) {
    await breathe();
    if (signal?.aborted) {
      await flight.drain();
      throw new GyreError('interrupted', 'the evaluation was interrupted', { remedy: 'Run it again.' });
    }
    // Neighbours of one length run together; only a text's last window differs.
    const { length } = windows[begin].ids;
    let end = begin + 1;
    const most = Math.max(1, Math.floor(rows / length));
    while (end < windows.length && end - begin < most && windows[end].ids.length === length) end++;
    const batch = windows.slice(begin, end);
    // A window's last token is only predicted. It is fed all the same where it fits, as papers have it: dynamic RoPE
    // scaling depends on the length.
    const pending = await submitWindows(decoder, reference, batch, Math.min(length, seqLen), step);
    await flight.add(
      pending.ranges.flatMap(({ own }) => own),
      () => read(batch, pending),
    );
    begin = end;
  }
  await flight.drain();
  const seconds = (performance.now() - begun) / 1000;
  const weights = scores.map((score) => score.tokens);
  const over = (pick: (score: WindowScore) => number | undefined): Mean =>
    weightedMean(
      scores.map((score) => pick(score) ?? NaN),
      weights,
    );
  const nll = over((score) => score.nll);
  const kl = over((score) => score.kl);
  const agree = over((score) => score.agree);
  const perplexity = Math.exp(nll.mean);
  return {
    perplexity,
    perplexityStandardError: nll.standardError === null ? null : perplexity * nll.standardError,
    nll: nll.mean,
    nllStandardError: nll.standardError,
    tokens,
    windows: windows.length,
    seqLen: Math.min(seqLen, Math.max(...windows.map((window) => window.ids.length))),
    kl: reference ? kl.mean : null,
    klStandardError: reference ? kl.standardError : null,
    top1Agreement: reference ? agree.mean : null,
    top1AgreementStandardError: reference ? agree.standardError : null,
    referencePerplexity: reference ? Math.exp(over((score) => score.referenceNll).mean) : null,
    seconds,
    tokensPerSecond: tokens / seconds,
    scores,
  };
}

/** A window of one of the documents. */
type DocumentWindow = TextWindow & { readonly document: number };

/** Scores that are on their way, range of rows by range. */
interface SubmittedWindows {
  readonly width: number;
  readonly ranges: readonly { readonly from: number; readonly own: PendingScores; readonly reference: PendingScores }[];
}

/** Runs a batch of windows of one length, without waiting for its scores. */
async function submitWindows(
  decoder: Predictor,
  reference: Predictor | undefined,
  batch: readonly TextWindow[],
  width: number,
  step: number,
): Promise<SubmittedWindows> {
  const { backend } = decoder;
  const scored = batch[0].ids.length - 1;
  const rows = batch.length * width;
  const ids = new Int32Array(rows);
  const targets = new Int32Array(rows);
  for (const [i, window] of batch.entries()) {
    ids.set(window.ids.subarray(0, width), i * width);
    targets.set(window.ids.subarray(1), i * width);
  }
  const hidden = await decoder.hidden(ids, { batch: batch.length });
  const referenceHidden = await reference?.hidden(ids, { batch: batch.length });
  const ranges = [];
  for (const [from, to] of scoredRows(batch, width, scored)) {
    const part = targets.slice(from, to);
    const own = backend.sliceRows(hidden, from, to);
    if (reference && referenceHidden) {
      const theirs = backend.sliceRows(referenceHidden, from, to);
      ranges.push({ from, ...(await submitComparison(decoder, own, reference, theirs, part, step)) });
      backend.free(theirs);
    } else {
      ranges.push({ from, own: await submitScores(decoder, own, part, step), reference: [] });
    }
    backend.free(own);
  }
  backend.free(hidden, referenceHidden);
  return { width, ranges };
}

/** Submits the scores of rows of a model against those of its reference, and the reference's own. */
async function submitComparison(
  decoder: Predictor,
  hidden: Tensor,
  reference: Predictor,
  referenceHidden: Tensor,
  targets: Int32Array,
  step: number,
): Promise<{ own: PendingScores; reference: PendingScores }> {
  const { backend } = decoder;
  const own = [];
  const theirs = [];
  for (let begin = 0; begin < targets.length; begin += step) {
    const end = Math.min(begin + step, targets.length);
    const part = targets.slice(begin, end);
    const rows = backend.sliceRows(hidden, begin, end);
    const referenceRows = backend.sliceRows(referenceHidden, begin, end);
    const logits = await decoder.logits(rows);
    const expected = await reference.logits(referenceRows);
    own.push(settled(backend.score(logits, part, expected)));
    theirs.push(settled(backend.score(expected, part)));
    backend.free(rows, referenceRows, logits, expected);
  }
  return { own, reference: theirs };
}

/** Mean scores of each window of a batch of windows of one length. */
async function meanScores(
  batch: readonly TextWindow[],
  { width, ranges }: SubmittedWindows,
): Promise<Omit<WindowScore, 'document' | 'hash'>[]> {
  const scored = batch[0].ids.length - 1;
  const rows = batch.length * width;
  const found = { nll: new Float64Array(rows), kl: new Float64Array(rows), agree: new Uint8Array(rows) };
  const referenceNll = new Float64Array(rows);
  let compared = false;
  for (const { from, own, reference } of ranges) {
    let at = from;
    for (const [i, part] of own.entries()) {
      const { nll, kl, agree } = await part;
      found.nll.set(nll, at);
      if (i < reference.length) {
        compared = true;
        found.kl.set(kl ?? [], at);
        found.agree.set(agree ?? [], at);
        referenceNll.set((await reference[i]).nll, at);
      }
      at += nll.length;
    }
  }
  return batch.map(({ first }, i) => {
    const [begin, end] = [i * width + first - 1, i * width + scored];
    const mean = (values: Float64Array | Uint8Array): number => sum(values.subarray(begin, end)) / (end - begin);
    const own = { tokens: end - begin, nll: mean(found.nll) };
    return compared ? { ...own, kl: mean(found.kl), agree: mean(found.agree), referenceNll: mean(referenceNll) } : own;
  });
}

/** Ranges of rows that are scored, neighbours joined. */
function scoredRows(batch: readonly TextWindow[], width: number, scored: number): [from: number, to: number][] {
  const ranges: [number, number][] = [];
  for (const [i, { first }] of batch.entries()) {
    const [from, to] = [i * width + first - 1, i * width + scored];
    const last = ranges.at(-1);
    // A row between two windows is cheaper to score than a pass of its own.
    if (last && from - last[1] <= 1) last[1] = to;
    else ranges.push([from, to]);
  }
  return ranges;
}

function windowLength(decoder: Predictor, reference: Predictor | undefined, seqLen: number | undefined): number {
  const contexts = [decoder, reference].flatMap((d) => (d ? [contextLength(d.config)] : []));
  const context = Math.min(...contexts);
  if (seqLen === undefined) return Math.min(1024, context);
  ensure(
    Number.isInteger(seqLen) && seqLen >= 2,
    'usage',
    () => `the window must be a whole number of at least 2 tokens, found ${seqLen}`,
  );
  ensure(
    seqLen <= context,
    'context-length',
    () => `windows of ${seqLen} tokens do not fit the model's context of ${context}`,
    `Choose a sequence length of at most ${context}.`,
  );
  return seqLen;
}

function checkReference(decoder: Predictor, reference: Predictor): void {
  ensure(reference.backend === decoder.backend, 'usage', 'the model and its reference must be on the same backend');
  const [own, other] = [decoder.config.vocabSize, reference.config.vocabSize];
  ensure(
    own === other,
    'usage',
    () => `the model has a vocabulary of ${own}, the reference one of ${other}: their predictions can't be compared`,
    'Name the model that this one was quantized from as the reference.',
  );
}

function sum(values: ArrayLike<number>): number {
  let total = 0;
  for (let i = 0; i < values.length; i++) total += values[i];
  return total;
}
