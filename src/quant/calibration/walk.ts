// One pass of a model over calibration tokens, block by block, in which the inputs of its linear groups can be looked at.
// Memory: one block and the residual stream.
import { GyreError } from '../../core/errors.js';
import { silent, type ProgressListener } from '../../core/progress.js';
import { GROUP_NAMES, type BlockFrame, type ChunkContext, type GroupName } from '../../models/block.js';
import type { LinearGroup } from '../../models/linear-group.js';
import { embedFromFile, loadFrame, loadGroup, type ModelSource } from '../../models/load.js';
import { exact, NO_ONLINE } from '../../models/online.js';
import { ropeTable } from '../../models/rope.js';
import type { Backend, Tensor } from '../../ops/backend.js';
import type { CalibrationTokens } from './tokens.js';

/** Tokens per chunk. */
const CHUNK_TOKENS = 4096;

/** Sees the inputs [rows, in] of one linear group, chunk by chunk; must not keep or free them. */
export interface InputObserver {
  add(x: Tensor): Promise<void>;
}

/** Arguments of {@link walkInputs}. */
export interface Walk {
  readonly backend: Backend;
  readonly source: ModelSource;
  readonly calibration: CalibrationTokens;
  /** Whole sequences of at most so many tokens are used. */
  readonly maxTokens: number;
  /** Name of the stage, for progress. */
  readonly stage: string;
  readonly onProgress?: ProgressListener;
  readonly signal?: AbortSignal;
  /** Observers of a block's groups. */
  observe(layer: number): ReadonlyMap<GroupName, InputObserver>;
  /** Called when all tokens have gone through the block. */
  finish(layer: number): Promise<void>;
}

/** Runs a model without rounding anything. Inputs are those before a group's online transform. @throws `interrupted`. */
export async function walkInputs(walk: Walk): Promise<void> {
  const { backend, calibration, maxTokens, stage, onProgress = silent, signal } = walk;
  const source = { ...walk.source, online: exact(walk.source.online ?? NO_ONLINE) };
  const { config } = source;
  const { ids, length } = calibration;
  const sequences = Math.max(1, Math.min(calibration.sequences, Math.floor(maxTokens / length)));
  const perChunk = Math.max(1, Math.floor(CHUNK_TOKENS / length));
  const chunks: { x: Tensor; batch: number }[] = [];
  for (let begin = 0; begin < sequences; begin += perChunk) {
    const batch = Math.min(perChunk, sequences - begin);
    const part = ids.subarray(begin * length, (begin + batch) * length);
    chunks.push({ x: await backend.upload(await embedFromFile(source, part)), batch });
  }
  const table = ropeTable(config, length);
  const rope = await backend.loadRope(table.cos, table.sin, table.rotaryDim);
  try {
    for (let layer = 0; layer < config.layers; layer++) {
      if (signal?.aborted)
        throw new GyreError('interrupted', 'stopped before the first block', { remedy: 'run it again' });
      onProgress({ stage, done: layer, total: config.layers, unit: 'blocks' });
      const frame = await loadFrame(backend, source, layer);
      const groups = {} as Record<GroupName, LinearGroup>;
      for (const group of GROUP_NAMES) groups[group] = await loadGroup(backend, source, layer, group);
      const observers = walk.observe(layer);
      for (const chunk of chunks) {
        const next = await throughBlock(frame, groups, chunk.x, { batch: chunk.batch, start: 0, rope }, observers);
        backend.free(chunk.x);
        chunk.x = next;
      }
      frame.release();
      for (const group of GROUP_NAMES) groups[group].release();
      await walk.finish(layer);
    }
  } finally {
    for (const { x } of chunks) backend.free(x);
    backend.release(rope);
  }
}

async function throughBlock(
  frame: BlockFrame,
  groups: Readonly<Record<GroupName, LinearGroup>>,
  x: Tensor,
  context: ChunkContext,
  observers: ReadonlyMap<GroupName, InputObserver>,
): Promise<Tensor> {
  const { backend } = frame;
  const see = async (group: GroupName, input: Tensor, residual?: Tensor): Promise<Tensor> => {
    await observers.get(group)?.add(input);
    const y = await groups[group].forward(input, residual);
    backend.free(input);
    return y;
  };
  const qkv = await see('qkv', await frame.attentionInput(x));
  const middle = await see('o', await frame.attend(qkv, context), x);
  const gateUp = await see('gateUp', await frame.mlpInput(middle));
  const y = await see('down', await frame.activate(gateUp), middle);
  backend.free(qkv, middle, gateUp);
  return y;
}
