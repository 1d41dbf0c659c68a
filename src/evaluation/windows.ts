// How a tokenized text becomes windows, each with the tokens in it that are scored. Three protocols:
//
// windows: the text is cut into windows of `seqLen` tokens; every token of a window but its first is scored. A tail shorter
//   than a window is left out; a text shorter than one window is one window. What papers on quantization report.
// strided: windows of `seqLen` tokens overlap, `stride` tokens apart; each scores what the one before it did not reach, so
//   that every token but the text's first is scored once, with at least seqLen − stride tokens before it but at the start.
// rolling: every token is scored once, the first one too, after the start token (the end-of-text token where there is
//   none); windows of `seqLen` tokens follow on one another, each seeing one token of the last one; the text's last window
//   is filled up from the left. What lm-evaluation-harness calls loglikelihood_rolling.
import { ensure } from '../core/errors.js';

/** Where the start token stands: nowhere, once before the text (as tokenizers put it), or before every window. */
export type StartPlacement = 'none' | 'once' | 'each';

/** Options of {@link cutWindows} beside the length. */
export interface ProtocolOptions {
  /** Default `windows`. */
  readonly protocol?: 'windows' | 'strided' | 'rolling';
  /** Tokens from one window to the next of `strided`; default half a window. */
  readonly stride?: number;
  /** Windows of `windows` to score, spread evenly over the text; default all. */
  readonly samples?: number;
  /** Windows of `windows` and `strided` at most, from the first; default all. */
  readonly windows?: number;
  /** Start token; none by default. Give the tokenizer's. It takes one of a window's `seqLen` places. */
  readonly bosTokenId?: number;
  /** Default `each`. */
  readonly startToken?: StartPlacement;
}

/** A window. */
export interface TextWindow {
  /** Its tokens; the last is only predicted. At least two. */
  readonly ids: Int32Array;
  /** Index of the first token that is scored; all after it are, too. At least 1. */
  readonly first: number;
}

/** Windows of a tokenized text; see the head of this file. @throws GyreError `usage`. */
export function cutWindows(tokens: Int32Array, options: ProtocolOptions & { readonly seqLen: number }): TextWindow[] {
  const { protocol = 'windows', startToken = 'each', bosTokenId } = options;
  ensure(
    tokens.length + (bosTokenId === undefined || startToken === 'none' ? 0 : 1) >= 2 && tokens.length > 0,
    'usage',
    () => `the text has ${tokens.length} tokens: too short to evaluate on`,
    'Give a longer text: a few thousand words make the perplexity steady.',
  );
  const opened =
    bosTokenId !== undefined && startToken === 'once' && protocol !== 'rolling'
      ? Int32Array.from([bosTokenId, ...tokens])
      : tokens;
  switch (protocol) {
    case 'windows':
      return fixedWindows(opened, { ...options, bosTokenId: startToken === 'each' ? bosTokenId : undefined });
    case 'strided':
      return stridedWindows(opened, { ...options, bosTokenId: startToken === 'each' ? bosTokenId : undefined });
    case 'rolling':
      return rollingWindows(tokens, options);
  }
}

type Cut = ProtocolOptions & { readonly seqLen: number };

function opening(bosTokenId: number | undefined, tokens: Int32Array): Int32Array {
  return bosTokenId === undefined ? tokens.slice() : Int32Array.from([bosTokenId, ...tokens]);
}

function fixedWindows(tokens: Int32Array, { seqLen, samples, windows, bosTokenId }: Cut): TextWindow[] {
  const length = Math.min(seqLen - (bosTokenId === undefined ? 0 : 1), tokens.length);
  ensure(
    length + (bosTokenId === undefined ? 0 : 1) >= 2 && length > 0,
    'usage',
    () => `windows of ${seqLen} tokens predict nothing`,
  );
  const count = Math.min(Math.floor(tokens.length / length), windows ?? Infinity);
  const wanted = Math.min(samples ?? count, count);
  return Array.from({ length: wanted }, (_, i) => {
    const begin = Math.floor((i * count) / wanted) * length;
    return { ids: opening(bosTokenId, tokens.subarray(begin, begin + length)), first: 1 };
  });
}

function stridedWindows(tokens: Int32Array, { seqLen, stride, windows = Infinity, bosTokenId }: Cut): TextWindow[] {
  const start = bosTokenId === undefined ? 0 : 1;
  const length = seqLen - start;
  const step = stride ?? Math.max(1, Math.floor(length / 2));
  ensure(
    Number.isInteger(step) && step >= 1 && step < length + start,
    'usage',
    () => `the stride must be a whole number from 1 to less than the window of ${seqLen}, found ${step}`,
  );
  const cut: TextWindow[] = [];
  // Tokens before `scored` are done; the text's first has nothing before it unless a start token stands there.
  let scored = 1 - start;
  for (let begin = 0; scored < tokens.length && cut.length < windows; begin += step) {
    const end = Math.min(begin + length, tokens.length);
    cut.push({ ids: opening(bosTokenId, tokens.subarray(begin, end)), first: scored - begin + start });
    scored = end;
  }
  return cut;
}

function rollingWindows(tokens: Int32Array, { seqLen, windows, bosTokenId }: Cut): TextWindow[] {
  ensure(
    windows === undefined,
    'usage',
    'the rolling protocol scores texts to their end: there is no number of windows to stop at',
    'Leave --limit away, or choose another protocol.',
  );
  ensure(
    bosTokenId !== undefined,
    'usage',
    'the rolling protocol needs a token to begin with',
    'Give the start token, or the end-of-text token of a model without one.',
  );
  const first = Math.min(seqLen, tokens.length);
  const cut: TextWindow[] = [{ ids: opening(bosTokenId, tokens.subarray(0, first)), first: 1 }];
  for (let at = first; at < tokens.length;) {
    const count = Math.min(tokens.length - at, seqLen);
    const end = at + count;
    const ids = tokens.slice(end - seqLen - 1, end);
    cut.push({ ids, first: ids.length - count });
    at = end;
  }
  return cut;
}
