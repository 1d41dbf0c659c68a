// Texts to evaluate on: files of plain text or JSON lines made into one, tokenized once.
import { z } from 'zod';
import { GyreError } from '../core/errors.js';
import type { Tokenizer } from '../tokenizer/index.js';

const lineSchema = z.looseObject({ text: z.string() });

/**
 * The texts in a file: the whole file, or for `.jsonl` the `text` of every line (empty lines are passed over).
 * @param name file name, which decides, and for messages.
 * @throws GyreError `config-invalid` naming the line of a .jsonl that is not an object with a text.
 */
export function parseTextFile(name: string, content: string): string[] {
  if (!/\.(jsonl|ndjson)$/i.test(name)) return [content];
  return content.split('\n').flatMap((line, i) => {
    if (line.trim() === '') return [];
    const remedy = 'Every line must be a JSON object with a "text", e.g. {"text": "Once upon a time"}.';
    let json: unknown;
    try {
      json = JSON.parse(line);
    } catch (cause) {
      throw new GyreError('config-invalid', `${name}, line ${i + 1}: not JSON`, { cause, remedy });
    }
    const parsed = lineSchema.safeParse(json);
    if (!parsed.success)
      throw new GyreError('config-invalid', `${name}, line ${i + 1}: no "text" that is a string`, { remedy });
    return [parsed.data.text];
  });
}

/** Texts joined by empty lines and tokenized as one, without special tokens: what `evaluateText` takes. */
export function tokenizeTexts(tokenizer: Tokenizer, texts: readonly string[]): Int32Array {
  return tokenizer.encode(texts.map((text) => text.trim()).join('\n\n'), { addSpecialTokens: false });
}
