// Calibration tokens: fixed-length sequences cut from text the user names, or handed in by whoever wrote them.
import { GyreError, ensure } from '../../core/errors.js';
import type { Rng } from '../../core/rng.js';
import type { Tokenizer } from '../../tokenizer/index.js';

/**
 * Calibration sequences when the user names no number, by device. Four times as many take an eighth off the KL to the
 * original (docs/log.md); a GPU has the time for them, two CPU cores would write them for minutes.
 */
export const CALIBRATION_SEQUENCES = { cpu: 64, webgpu: 256, reference: 64 } as const;
/** On a GPU for models with large blocks, where a pass over the tokens takes as long as the learning. */
export const LARGE_CALIBRATION_SEQUENCES = 128;
/** Weights from which a block is large: between Qwen3-4B's and Qwen3-8B's. */
const LARGE_BLOCK = 128e6;

/** The default for a model on a device. */
export function calibrationSequences(device: keyof typeof CALIBRATION_SEQUENCES, blockWeights: number): number {
  const sequences = CALIBRATION_SEQUENCES[device];
  return blockWeights > LARGE_BLOCK ? Math.min(sequences, LARGE_CALIBRATION_SEQUENCES) : sequences;
}

/** Sequences for calibration. */
export interface CalibrationTokens {
  /** [sequences, length], row-major. */
  readonly ids: Int32Array;
  readonly sequences: number;
  readonly length: number;
  /** Where they come from, for the result's record. */
  readonly description: string;
}

/** A named text. */
export interface CalibrationText {
  readonly name: string;
  readonly text: string;
}

/** Documents of a file: the `text` fields of a .jsonl, otherwise the whole. @throws GyreError `calibration` naming the line. */
export function documentsOf(file: CalibrationText): string[] {
  if (!file.name.endsWith('.jsonl')) return [file.text];
  return file.text.split('\n').flatMap((line, i) => {
    if (line.trim() === '') return [];
    let value: unknown;
    try {
      value = JSON.parse(line);
    } catch {
      value = undefined;
    }
    const text = typeof value === 'object' && value !== null && 'text' in value ? value.text : undefined;
    if (typeof text !== 'string') {
      throw new GyreError('calibration', `${file.name}, line ${i + 1}: expected a JSON object with a string "text"`, {
        remedy: 'one JSON object per line, or give a plain .txt file',
      });
    }
    return [text];
  });
}

/**
 * Cuts `sequences` windows of `length` tokens at seeded random places of the joined texts; each starts with the start
 * token when the tokenizer has one, as in evaluation. Windows may overlap when the text is short.
 * @throws GyreError `calibration` when the text has fewer tokens than one window.
 */
export function sampleWindows(
  tokenizer: Tokenizer,
  files: readonly CalibrationText[],
  shape: { readonly sequences: number; readonly length: number },
  rng: Rng,
  options: { readonly evenly?: boolean } = {},
): CalibrationTokens {
  const { sequences, length } = shape;
  if (options.evenly && files.length > 1) return sampleEvenly(tokenizer, files, shape, rng);
  const pieces = files.flatMap(documentsOf).map((text) => tokenizer.encode(text, { addSpecialTokens: false }));
  const total = pieces.reduce((sum, p) => sum + p.length, 0);
  const names = files.map((f) => f.name).join(', ');
  ensure(
    total >= length,
    'calibration',
    () => `calibration text is too short: ${total} tokens in ${names}, one sequence needs ${length}`,
    'give more text with --calib, or shorter sequences with --seq-len',
  );
  const joined = new Int32Array(total);
  let offset = 0;
  for (const piece of pieces) {
    joined.set(piece, offset);
    offset += piece.length;
  }
  const bos = tokenizer.bosTokenId;
  const body = bos === undefined ? length : length - 1;
  const ids = new Int32Array(sequences * length);
  for (let s = 0; s < sequences; s++) {
    const start = rng.int(0, total - body + 1);
    if (bos !== undefined) ids[s * length] = bos;
    ids.set(joined.subarray(start, start + body), s * length + length - body);
  }
  return { ids, sequences, length, description: `${sequences} × ${length} tokens from ${names}` };
}

/** As many windows of each file, in turn, however long the files are. */
function sampleEvenly(
  tokenizer: Tokenizer,
  files: readonly CalibrationText[],
  shape: { readonly sequences: number; readonly length: number },
  rng: Rng,
): CalibrationTokens {
  const { sequences, length } = shape;
  const ids = new Int32Array(sequences * length);
  for (const [i, file] of files.entries()) {
    const count = Math.ceil((sequences - i) / files.length);
    if (count <= 0) break;
    const part = sampleWindows(tokenizer, [file], { sequences: count, length }, rng.fork(i));
    for (let s = 0; s < count; s++)
      ids.set(part.ids.subarray(s * length, (s + 1) * length), (s * files.length + i) * length);
  }
  const names = files.map((f) => f.name).join(', ');
  return { ids, sequences, length, description: `${sequences} × ${length} tokens, evenly from ${names}` };
}
