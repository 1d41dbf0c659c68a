// What a quantization run is made of and what it reports: the types shared by the pipeline and its blocks.
import type { ProgressListener } from '../core/progress.js';
import type { QuantizationConfig } from '../formats/quantization-config.js';
import type { TensorEntry } from '../formats/safetensors-writer.js';
import type { GroupName } from '../models/block.js';
import { TENSOR_NAMES } from '../models/families/names.js';
import { checkFinite, type ModelSource } from '../models/load.js';
import type { Backend, Tensor } from '../ops/backend.js';
import type { CalibrationTokens } from './calibration/tokens.js';
import type { QuantizePlan } from './plan.js';
import type { GroupRanges } from './results.js';
import type { CheckpointSink } from './sink.js';
import type { ActivationStore } from './activations.js';
import type { QuantizeSettings, Recipe, StageCurve } from './types.js';

/** Sum of squares of a residual stream from which on f32 norms overflow, and quietly give zeros. */
export const MAX_SQUARES = 3.4e38;

/** Arguments of quantizeModel. */
export interface QuantizeRun {
  readonly backend: Backend;
  readonly source: ModelSource;
  readonly recipe: Recipe;
  readonly settings: QuantizeSettings;
  readonly plan: QuantizePlan;
  readonly quantization: QuantizationConfig;
  /** Undefined for recipes that need none. */
  readonly calibration: CalibrationTokens | undefined;
  readonly sink: CheckpointSink;
  /** Where whole-block recipes keep residual streams; in memory unless given. */
  readonly activations?: ActivationStore;
  readonly onProgress?: ProgressListener;
  readonly signal?: AbortSignal;
}

/** What became of one linear group. */
export interface GroupReport {
  readonly layer: number;
  readonly group: GroupName;
  readonly modules: readonly string[];
  readonly seconds: number;
  readonly stats: Readonly<Record<string, number>>;
  readonly curve?: readonly number[];
  readonly ranges: GroupRanges;
}

/** What became of one block under a whole-block recipe. */
export interface BlockReport {
  readonly layer: number;
  readonly seconds: number;
  readonly stats: Readonly<Record<string, number>>;
  readonly curves: readonly StageCurve[];
}

/**
 * What quantizeModel returns: reports of all groups (those of blocks finished before as they were kept, with 0 seconds),
 * and where the time of this call went.
 */
export interface PipelineReport {
  readonly groups: readonly GroupReport[];
  /** Of whole-block recipes. */
  readonly blocks?: readonly BlockReport[];
  readonly seconds: Readonly<Record<'forward' | 'statistics' | 'quantize' | 'write', number>>;
}

/** One chunk of calibration sequences as it moves through the blocks. */
export interface Chunk {
  readonly batch: number;
  /** Residual streams [batch·length, hidden]; the same tensor until the first quantized block. */
  reference: Tensor;
  quantized: Tensor;
}

/** A tensor of the source as it is. @throws `non-finite`, when it is read, for NaN and infinity. */
export function copyEntry(source: ModelSource, name: string): TensorEntry {
  const { dtype, shape } = source.checkpoint.info(name);
  const data = async () => {
    const tensor = await source.checkpoint.read(name);
    checkFinite(name, tensor);
    return tensor.data;
  };
  return { name, dtype, shape, data };
}

/** Everything outside the blocks, copied as it is, one tensor at a time. */
export function restEntries(source: ModelSource): TensorEntry[] {
  const { checkpoint, config } = source;
  const inBlocks = new Set(Array.from({ length: config.layers }, (_, layer) => `${TENSOR_NAMES.block(layer)}.`));
  const blockOf = (name: string) => /^(.*?\.layers\.\d+\.)/.exec(name)?.[1] ?? '';
  return [...checkpoint.names()].filter((name) => !inBlocks.has(blockOf(name))).map((name) => copyEntry(source, name));
}
