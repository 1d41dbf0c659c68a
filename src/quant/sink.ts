// Where a run's results go, shard by shard. The pipeline knows this interface; formats/ has the folder behind it.
import type { TensorEntry } from '../formats/safetensors-writer.js';
import type { FileSource, ModelFiles } from '../formats/source.js';

/** Storage of a run that may be interrupted at any moment. Shards are whole or absent. */
export interface CheckpointSink {
  /** Shards finished by this run or an earlier one with the same fingerprint. */
  has(shard: string): Promise<boolean>;
  /** Writes a shard atomically; what {@link keepStage} kept of it goes. */
  write(shard: string, entries: readonly TensorEntry[], metadata?: Readonly<Record<string, string>>): Promise<void>;
  /** Keeps what a shard that takes long has come to, atomically and in place of what was kept before, as a safetensors file. */
  keepStage(shard: string, entries: readonly TensorEntry[], metadata: Readonly<Record<string, string>>): Promise<void>;
  /** That file; undefined when there is none. */
  keptStage(shard: string): Promise<FileSource | undefined>;
  /** Keeps what is to be reported of a shard, before it is written, for a run that goes on after it. */
  keepRecord(shard: string, record: string): Promise<void>;
  /** What was kept of a finished shard; undefined when nothing was. */
  keptRecord(shard: string): Promise<string | undefined>;
  /** One finished shard as a model of a single file. */
  open(shard: string): ModelFiles;
}

/** Shard of one decoder block. */
export function blockShard(layer: number): string {
  return `block-${layer}`;
}

/** Shard of everything outside the blocks. */
export const REST_SHARD = 'rest';
