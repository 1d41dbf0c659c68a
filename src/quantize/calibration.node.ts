// Calibration tokens of a run: how many, from which texts, and where they are kept while it runs.
import { readFile, stat } from 'node:fs/promises';
import path from 'node:path';
import { GyreError, ensure } from '../core/errors.js';
import { hostTensor } from '../core/tensor.js';
import type { RunFolder } from '../formats/run-folder.node.js';
import { TOKENS_FILE } from '../formats/run-folder.node.js';
import { SafetensorsFile } from '../formats/safetensors.js';
import { writeSafetensors } from '../formats/safetensors-writer.node.js';
import { openFile } from '../formats/source.node.js';
import { MAX_TEXT_BYTES } from '../formats/source.js';
import { GROUP_NAMES } from '../models/block.js';
import type { ModelConfig } from '../models/config.js';
import { groupShape, type ModelSource } from '../models/load.js';
import { documentsOf, type CalibrationText, type CalibrationTokens } from '../quant/calibration/tokens.js';

export function checkShape(
  source: ModelSource,
  shape: { sequences: number; length: number },
  given: CalibrationTokens | undefined,
): void {
  const { sequences, length } = shape;
  ensure(
    Number.isInteger(sequences) && Number.isInteger(length) && sequences >= 1 && length >= 2,
    'usage',
    () => `calibration needs at least one sequence of two tokens, found ${sequences} of ${length}`,
    'raise --calib-samples or --seq-len',
  );
  ensure(
    !given || given.ids.length === sequences * length,
    'calibration',
    () => `the calibration tokens should be ${sequences} × ${length} ids, found ${given?.ids.length}`,
    'pass sequences of equal length, one after the other',
  );
  ensure(
    shape.length <= source.config.maxPositions,
    'context-length',
    () =>
      `calibration sequences of ${shape.length} tokens are longer than the model's context of ${source.config.maxPositions}`,
    'use a smaller --seq-len',
  );
}

export async function readTexts(names: readonly string[]): Promise<CalibrationText[]> {
  const texts: CalibrationText[] = [];
  for (const name of names) {
    const info = await stat(name).catch(() => undefined);
    if (!info?.isFile())
      throw new GyreError('file-missing', `calibration text ${name} is not a file`, {
        remedy: 'check the path given to --calib',
      });
    ensure(
      info.size <= MAX_TEXT_BYTES,
      'limit-exceeded',
      `calibration text ${name} has ${info.size} bytes, the limit is ${MAX_TEXT_BYTES}`,
      'give a part of it',
    );
    const text = { name: path.basename(name), text: decodeText(await readFile(name), name) };
    const documents = documentsOf(text); // names a line that is wrong before anything is done
    ensure(
      documents.some((document) => document.trim() !== ''),
      'calibration',
      () => `calibration text ${name} is empty`,
      'give a file with text in it',
    );
    texts.push(text);
  }
  return texts;
}

function decodeText(bytes: Uint8Array, name: string): string {
  try {
    return new TextDecoder('utf-8', { fatal: true }).decode(bytes);
  } catch (cause) {
    throw new GyreError('calibration', `calibration text ${name} is not UTF-8 text`, {
      remedy: 'save it as UTF-8',
      cause,
    });
  }
}

/** Tokens that take long to make, kept beside the shards: those of the interrupted run if there are any. */
export async function storedTokens(
  folder: RunFolder,
  shape: { sequences: number; length: number },
  make: () => Promise<CalibrationTokens>,
): Promise<CalibrationTokens> {
  const stored = folder.temporary(TOKENS_FILE);
  if (await stat(stored).catch(() => undefined)) {
    const file = await SafetensorsFile.open(await openFile(stored));
    const ids = await file.read('ids');
    await file.close();
    return { ...shape, ids: ids.data as Int32Array, description: file.metadata['description'] ?? '' };
  }
  const tokens = await make();
  const ids = hostTensor('i32', [shape.sequences, shape.length], tokens.ids);
  await writeSafetensors(stored, [{ name: 'ids', dtype: 'i32', shape: ids.shape, data: () => ids.data }], {
    metadata: { description: tokens.description },
  });
  return tokens;
}

/** Weights of a block's linears. */
export function blockWeights(config: ModelConfig): number {
  const shapes = GROUP_NAMES.map((group) => groupShape(config, group));
  return shapes.reduce((sum, { inFeatures, outFeatures }) => sum + inFeatures * outFeatures.reduce((a, b) => a + b), 0);
}
