// Writes safetensors files to disk, whole or not at all (Node.js).
import path from 'node:path';
import { AtomicFile, writeFileAtomic } from './atomic.node.js';
import {
  encodeIndex,
  safetensorsBytes,
  streamSafetensors,
  type SafetensorsOptions,
  type TensorEntry,
} from './safetensors-writer.js';
import { INDEX_FILE } from './safetensors.js';

/**
 * Writes a safetensors file: under a temporary name beside it first, renamed when whole and on the disk.
 * @returns bytes written.
 * @throws `disk-full` (nothing is left behind), `usage` when data doesn't match its entry.
 */
export async function writeSafetensors(
  file: string,
  entries: readonly TensorEntry[],
  options: SafetensorsOptions = {},
): Promise<number> {
  safetensorsBytes(entries, options); // names and shapes are checked before a file is made
  const out = await AtomicFile.create(file);
  return out.finish(() => streamSafetensors(out, entries, options));
}

/** Writes `model.safetensors.index.json` into a folder; see {@link encodeIndex}. */
export async function writeIndex(
  folder: string,
  weightMap: ReadonlyMap<string, string>,
  totalSize: number,
): Promise<void> {
  await writeFileAtomic(path.join(folder, INDEX_FILE), encodeIndex(weightMap, totalSize));
}
