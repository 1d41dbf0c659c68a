// What the predictions feel of each block's errors, kept beside the shards from when it was measured, last block first, until
// the block is quantized, first block first: in memory there is one block's at a time.
import { floats, hostTensor, type HostTensor } from '../core/tensor.js';
import type { TensorEntry } from '../formats/safetensors-writer.js';
import { SafetensorsFile } from '../formats/safetensors.js';
import { GROUP_NAMES, type GroupName } from '../models/block.js';
import type { ModelConfig } from '../models/config.js';
import { groupShape } from '../models/load.js';
import type { BlockSensitivity, GroupSensitivity } from './objectives/sensitivity.js';
import { blockShard, type CheckpointSink } from './sink.js';

/** Tells these files from other stages. */
const METADATA = { gyre: 'sensitivity' } as const;

/** Keeps one block's sensitivity until its shard is written. */
export async function keepSensitivity(
  sink: CheckpointSink,
  layer: number,
  sensitivity: BlockSensitivity,
  config: ModelConfig,
): Promise<void> {
  const entries: TensorEntry[] = [];
  const add = (name: string, shape: number[], data: Float32Array) =>
    entries.push({ name, dtype: 'f32', shape, data: () => data });
  for (const group of GROUP_NAMES) {
    const { tokens, outputs } = sensitivity[group];
    add(`${group}.tokens`, [tokens.length], tokens);
    if (!outputs) continue;
    const size = blockSize(group, outputs.shape[0], config);
    add(`${group}.outputs`, [outputs.shape[0] / size, size, size], diagonalBlocks(floats(outputs), size));
  }
  await sink.keepStage(blockShard(layer), entries, METADATA);
}

/** What was kept of a block; undefined when nothing was. */
export async function keptSensitivity(sink: CheckpointSink, layer: number): Promise<BlockSensitivity | undefined> {
  const source = await sink.keptStage(blockShard(layer));
  if (!source) return undefined;
  const file = await SafetensorsFile.open(source);
  try {
    const group = async (name: GroupName): Promise<GroupSensitivity> => {
      const tokens = floats(await file.read(`${name}.tokens`));
      const outputs = `${name}.outputs`;
      return file.tensors.has(outputs) ? { tokens, outputs: fromBlocks(await file.read(outputs)) } : { tokens };
    };
    return {
      qkv: await group('qkv'),
      o: await group('o'),
      gateUp: await group('gateUp'),
      down: await group('down'),
    };
  } finally {
    await file.close();
  }
}

/** Bytes of all blocks' files, for `tokens` calibration tokens. */
export function sensitivityBytes(config: ModelConfig, tokens: number): number {
  const outputs = GROUP_NAMES.filter((group) => group !== 'gateUp').map((group) => {
    const n = groupShape(config, group).outFeatures.reduce((a, b) => a + b);
    return n * blockSize(group, n, config);
  });
  return config.layers * 4 * (GROUP_NAMES.length * tokens + outputs.reduce((a, b) => a + b));
}

/** q, k and v meet within heads only, so that all else of their matrix is zero. */
function blockSize(group: GroupName, outputs: number, { headDim }: ModelConfig): number {
  return group === 'qkv' ? headDim : outputs;
}

function diagonalBlocks(matrix: Float32Array, size: number): Float32Array {
  const n = Math.round(Math.sqrt(matrix.length));
  const blocks = new Float32Array(n * size);
  for (let r = 0; r < n; r++) {
    const begin = r * n + Math.floor(r / size) * size;
    blocks.set(matrix.subarray(begin, begin + size), r * size);
  }
  return blocks;
}

/** [count, size, size] → [count·size, count·size], zero between blocks. */
function fromBlocks(blocks: HostTensor): HostTensor {
  const [count, size] = blocks.shape;
  const n = count * size;
  if (count === 1) return hostTensor('f32', [n, n], floats(blocks));
  const values = floats(blocks);
  const matrix = new Float32Array(n * n);
  for (let r = 0; r < n; r++)
    matrix.set(values.subarray(r * size, (r + 1) * size), r * n + Math.floor(r / size) * size);
  return hostTensor('f32', [n, n], matrix);
}
