// Makes SentencePiece-style BPE (Llama 2, Mistral) fast on long texts without changing a single token.
//
// Such tokenizers hand the whole text to BPE as one word: seconds per MB, and no word is ever seen twice. A text may be
// cut between two characters that stand side by side in no token of the vocabulary: a merge makes a token, so no merge
// can cross that place, and the merges on either side do not see each other. In practice that cuts before every space.
import { z } from 'zod';
import type { PreTokenize } from './library.js';

/** Shorter texts are not worth cutting, characters. */
const MIN_LENGTH = 256;

const bpeSchema = z.looseObject({
  type: z.literal('BPE'),
  vocab: z.record(z.string(), z.number()),
  merges: z.array(z.union([z.string(), z.tuple([z.string(), z.string()])])),
  dropout: z.number().nullish(),
  ignore_merges: z.boolean().nullish(),
  end_of_word_suffix: z.string().nullish(),
  continuing_subword_prefix: z.string().nullish(),
  continuing_subword_suffix: z.string().nullish(),
});
const metaspaceSchema = z.looseObject({ type: z.literal('Metaspace') });

/** Whether a tokenizer.json's pre-tokenizer leaves a text in one piece. */
export function splitsNothing(preTokenizer: unknown): boolean {
  return preTokenizer === null || preTokenizer === undefined || metaspaceSchema.safeParse(preTokenizer).success;
}

/**
 * A pre-tokenizer that cuts where no token can reach across.
 * @param model `model` of a tokenizer.json. @param inner the pre-tokenizer to run before.
 * @returns undefined when the argument above doesn't hold for the model.
 */
export function safeSplit(model: unknown, inner: PreTokenize | null): PreTokenize | undefined {
  const parsed = bpeSchema.safeParse(model);
  if (!parsed.success) return undefined;
  const { vocab, merges, dropout, ignore_merges, end_of_word_suffix, ...affixes } = parsed.data;
  const { continuing_subword_prefix: prefix, continuing_subword_suffix: suffix } = affixes;
  if (dropout || ignore_merges || end_of_word_suffix || prefix || suffix) return undefined;
  const joined = new Set<number>();
  const add = (token: string): void => {
    let last = -1;
    for (const character of token) {
      const code = character.codePointAt(0) ?? 0;
      if (last >= 0) joined.add(pairOf(last, code));
      last = code;
    }
  };
  for (const token of Object.keys(vocab)) add(token);
  for (const merge of merges) add(typeof merge === 'string' ? merge.replace(' ', '') : merge.join(''));
  return (text, options) => (inner ? inner(text, options) : [text]).flatMap((part) => cut(part, joined));
}

/** Two neighbouring code points as one number. */
function pairOf(first: number, second: number): number {
  return first * 2 ** 21 + second;
}

function cut(text: string, joined: ReadonlySet<number>): string[] {
  if (text.length < MIN_LENGTH) return [text];
  const pieces: string[] = [];
  let start = 0;
  let last = -1;
  for (let i = 0; i < text.length;) {
    const code = text.codePointAt(i) ?? 0;
    if (last >= 0 && !joined.has(pairOf(last, code))) {
      pieces.push(text.slice(start, i));
      start = i;
    }
    last = code;
    i += code > 0xffff ? 2 : 1;
  }
  pieces.push(text.slice(start));
  return pieces;
}
