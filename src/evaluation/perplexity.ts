// Perplexity of a text under a model and, against a reference model, the mean KL divergence and top-1 agreement.
//
// Definition: the text is tokenized once as a whole, without special tokens, and cut into windows of `seqLen` tokens. A
// window opens with the model's start token when it has one (it takes one of the `seqLen` places). Every token of a window
// but its first is predicted from those before it in the window, and scored. A tail shorter than a window is left out;
// a text shorter than one window is one window. nll = mean −log p(next token) in nats, perplexity = exp(nll),
// kl = mean KL(reference ‖ model) in nats over the same tokens.
import { GyreError, ensure } from '../core/errors.js';
import { silent, type ProgressListener } from '../core/progress.js';
import { contextLength, createBreath } from '../generate/index.js';
import { hostTensor } from '../core/tensor.js';
import type { Decoder } from '../models/decoder.js';
import type { Tensor } from '../ops/backend.js';

/** Rows of one forward pass; short windows are run together up to this many. */
const ROWS_PER_PASS = 1024;

/** Bytes of logits held at a time (per model), unless told how many rows. */
const LOGITS_BYTES = 64 * 1024 * 1024;

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
export interface EvaluateOptions {
  /** Tokens per window, 2 … the model's context; default 1024 or the context if that is less. */
  readonly seqLen?: number;
  /** Windows to score, spread evenly over the text; default all. */
  readonly samples?: number;
  /** Start token each window opens with; none by default. Give the tokenizer's. */
  readonly bosTokenId?: number;
  /** A model on the same backend, with the same vocabulary, to compare with. */
  readonly reference?: Predictor;
  /** Rows whose logits are computed at a time; default what fits 64 MiB. */
  readonly rowsPerLogits?: number;
  /** Called with the scores of each window, in order: for paired comparisons of several models on one text. */
  readonly onWindow?: (score: WindowScore) => void;
  /** Stage `evaluate`, in windows. */
  readonly onProgress?: ProgressListener;
  readonly signal?: AbortSignal;
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
}

/**
 * Scores a tokenized text (no special tokens in it). See the head of this file for the definition.
 * @throws GyreError `usage` for a text of fewer than 2 tokens, `context-length` for windows beyond the model's context,
 * `non-finite` when the model's logits are, `interrupted`.
 */
export async function evaluateText(
  decoder: Predictor,
  tokens: Int32Array,
  options: EvaluateOptions = {},
): Promise<TextEvaluation> {
  const { reference, onProgress = silent, signal } = options;
  const begun = performance.now();
  if (reference) checkReference(decoder, reference);
  const seqLen = windowLength(decoder, reference, options.seqLen);
  const windows = cutWindows(tokens, { seqLen, samples: options.samples, bosTokenId: options.bosTokenId });
  const width = windows[0].length;
  const perPass = Math.max(1, Math.floor(ROWS_PER_PASS / width));
  const rowsPerLogits = options.rowsPerLogits ?? Math.max(1, Math.floor(LOGITS_BYTES / (4 * decoder.config.vocabSize)));
  const nll: number[] = [];
  const kl: number[] = [];
  const agree: number[] = [];
  const referenceNll: number[] = [];
  const breathe = createBreath();
  for (let begin = 0; begin < windows.length; begin += perPass) {
    await breathe();
    if (signal?.aborted)
      throw new GyreError('interrupted', 'the evaluation was interrupted', { remedy: 'Run it again.' });
    const batch = windows.slice(begin, begin + perPass);
    const scores = await scoreWindows(decoder, reference, batch, rowsPerLogits);
    for (const window of scores) {
      ensure(
        Number.isFinite(window.nll) && !(window.kl !== undefined && !Number.isFinite(window.kl)),
        'non-finite',
        'the logits of the model are not finite',
        'the model or its quantization is broken: look for damaged tensors with `gyre inspect`',
      );
      options.onWindow?.(window);
      nll.push(window.nll);
      if (window.kl !== undefined) kl.push(window.kl);
      if (window.agree !== undefined) agree.push(window.agree);
      if (window.referenceNll !== undefined) referenceNll.push(window.referenceNll);
    }
    onProgress({
      stage: 'evaluate',
      done: nll.length,
      total: windows.length,
      unit: 'windows',
      message: `perplexity ${Math.exp(mean(nll)).toFixed(3)}`,
    });
  }
  const seconds = (performance.now() - begun) / 1000;
  const scored = windows.length * (width - 1);
  const perplexity = Math.exp(mean(nll));
  const error = standardError(nll);
  return {
    perplexity,
    perplexityStandardError: error === null ? null : perplexity * error,
    nll: mean(nll),
    nllStandardError: error,
    tokens: scored,
    windows: windows.length,
    seqLen: width,
    kl: reference ? mean(kl) : null,
    klStandardError: reference ? standardError(kl) : null,
    top1Agreement: reference ? mean(agree) : null,
    top1AgreementStandardError: reference ? standardError(agree) : null,
    referencePerplexity: reference ? Math.exp(mean(referenceNll)) : null,
    seconds,
    tokensPerSecond: scored / seconds,
  };
}

/** Windows of a tokenized text, all of one length; see the head of this file. @throws GyreError `usage`. */
export function cutWindows(
  tokens: Int32Array,
  options: { seqLen: number; samples?: number; bosTokenId?: number },
): Int32Array[] {
  const { samples, bosTokenId } = options;
  const opening = bosTokenId === undefined ? 0 : 1;
  const length = Math.min(options.seqLen - opening, tokens.length);
  ensure(
    length + opening >= 2 && length > 0,
    'usage',
    () => `the text has ${tokens.length} tokens: too short to evaluate on`,
    'Give a longer text: a few thousand words make the perplexity steady.',
  );
  const count = Math.floor(tokens.length / length);
  const wanted = Math.min(samples ?? count, count);
  return Array.from({ length: wanted }, (_, i) => {
    const begin = Math.floor((i * count) / wanted) * length;
    const window = new Int32Array(opening + length);
    if (bosTokenId !== undefined) window[0] = bosTokenId;
    window.set(tokens.subarray(begin, begin + length), opening);
    return window;
  });
}

/** Mean scores of a window's tokens; all but `nll` are there when a reference was given. */
export interface WindowScore {
  /** Mean −log p, nats. */
  readonly nll: number;
  /** Mean KL(reference ‖ model), nats. */
  readonly kl?: number;
  /** Share of tokens where both models' most likely next token is the same. */
  readonly agree?: number;
  /** The reference's mean −log p, nats. */
  readonly referenceNll?: number;
}

/** Mean scores of each window of a batch of windows of one length. */
async function scoreWindows(
  decoder: Predictor,
  reference: Predictor | undefined,
  batch: readonly Int32Array[],
  rowsPerLogits: number,
): Promise<WindowScore[]> {
  const { backend } = decoder;
  const width = batch[0].length;
  const ids = new Int32Array(batch.length * width);
  for (const [i, window] of batch.entries()) ids.set(window, i * width);
  const hidden = await decoder.hidden(ids, { batch: batch.length });
  const referenceHidden = await reference?.hidden(ids, { batch: batch.length });
  const scores: WindowScore[] = [];
  for (const [i, window] of batch.entries()) {
    let nll = 0;
    let kl = 0;
    let agree = 0;
    let referenceNll = 0;
    for (let begin = 0; begin < width - 1; begin += rowsPerLogits) {
      const end = Math.min(begin + rowsPerLogits, width - 1);
      const targets = window.slice(begin + 1, end + 1);
      const rows = (of: Tensor): Tensor => backend.sliceRows(of, i * width + begin, i * width + end);
      const logits = await decoder.logits(rows(hidden));
      const expected = reference && referenceHidden && (await reference.logits(rows(referenceHidden)));
      const score = await backend.score(logits, targets, expected);
      nll += sum(score.nll);
      if (expected) {
        kl += sum(score.kl ?? []);
        agree += sum(score.agree ?? []);
        referenceNll += sum((await backend.score(expected, targets)).nll);
      }
      backend.free(logits, expected);
    }
    const n = width - 1;
    scores.push(
      reference ? { nll: nll / n, kl: kl / n, agree: agree / n, referenceNll: referenceNll / n } : { nll: nll / n },
    );
  }
  backend.free(hidden, referenceHidden);
  return scores;
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

function mean(values: readonly number[]): number {
  return sum(values) / values.length;
}

/** Standard error of the mean, from the spread of its terms. */
function standardError(values: readonly number[]): number | null {
  if (values.length < 2) return null;
  const center = mean(values);
  const variance = values.reduce((s, v) => s + (v - center) ** 2, 0) / (values.length - 1);
  return Math.sqrt(variance / values.length);
}
