// The main job for recipes that train whole blocks: for each block, the original block's outputs on the reference path are
// the targets, the recipe trains the block on the quantized path's inputs, its shard is written, and both paths move on.
// Residual streams live in an ActivationStore, a sequence at a time: one block and one batch are on the backend.
import { GyreError } from '../core/errors.js';
import { floats, hostTensor } from '../core/tensor.js';
import { quantizedLinearEntries } from '../formats/quantized-linear.js';
import { Checkpoint, SafetensorsFile } from '../formats/safetensors.js';
import type { TensorEntry } from '../formats/safetensors-writer.js';
import { GROUP_NAMES, type DecoderBlock, type GroupName } from '../models/block.js';
import { TENSOR_NAMES } from '../models/families/names.js';
import {
  embedFromFile,
  groupModules,
  groupShape,
  loadBlock,
  loadFrame,
  readLinear,
  type ModelSource,
} from '../models/load.js';
import { exact, NO_ONLINE } from '../models/online.js';
import { ropeTable } from '../models/rope.js';
import type { Backend, RopeHandle } from '../ops/backend.js';
import { memoryActivations, type ActivationStore, type Stream } from './activations.js';
import { checkScales } from './block-quantizer.js';
import type { CalibrationTokens } from './calibration/tokens.js';
import { perGroup } from './objectives/block.js';
import { copyEntry, MAX_SQUARES, restEntries, type BlockReport, type PipelineReport, type QuantizeRun } from './run.js';
import { RunMonitor } from './monitor.js';
import { stageCurveSchema } from './results.js';
import { blockShard, REST_SHARD } from './sink.js';
import { type BlockGroup, type BlockRecipe, type BlockResult, type BlockSamples, type FinishedStage } from './types.js';

/** Tokens of a forward pass, and of a training pass. */
export const PASS_TOKENS = 4096;
/** Key of the losses in a shard's metadata: a StageCurve list as JSON. */
export const TRAINING_KEY = 'gyre.training';

/** See the head of this file. */
export class BlockPipeline {
  readonly #run: QuantizeRun;
  readonly #recipe: BlockRecipe;
  readonly #monitor: RunMonitor;
  readonly #store: ActivationStore;
  readonly #blocks: BlockReport[] = [];

  constructor(run: QuantizeRun, recipe: BlockRecipe) {
    this.#run = run;
    this.#recipe = recipe;
    this.#monitor = new RunMonitor(run);
    this.#store = run.activations ?? memoryActivations();
  }

  async run(): Promise<PipelineReport> {
    const { source, sink, backend } = this.#run;
    const calibration = this.#calibration;
    const { layers } = source.config;
    let first = 0;
    while (first < layers && (await sink.has(blockShard(first)))) first++;
    const table = ropeTable(source.config, calibration.length);
    const rope = await backend.loadRope(table.cos, table.sin, table.rotaryDim);
    if (first < layers) await this.#embed();
    for (let layer = 0; layer < layers; layer++) {
      this.#monitor.checkAborted();
      if (layer >= first) await this.#quantizeBlock(layer, rope);
      else if (first < layers) {
        this.#monitor.tell(layer, `block ${layer + 1}/${layers} is finished; following it`);
        await this.#advanceReference(layer, rope);
        await this.#advanceQuantized(layer, rope);
      }
    }
    this.#monitor.tell(layers, 'embeddings, norms and head');
    if (!(await sink.has(REST_SHARD)))
      await this.#monitor.timed('write', () => sink.write(REST_SHARD, restEntries(source)));
    backend.release(rope);
    return { groups: [], blocks: this.#blocks, seconds: this.#monitor.seconds };
  }

  get #calibration(): CalibrationTokens {
    const { calibration } = this.#run;
    if (!calibration) throw new Error(`${this.#recipe.name} trains on calibration tokens`);
    return calibration;
  }

  /** The original without grids of activations: what is trained towards, and how. Later blocks see inputs that were rounded. */
  get #exact(): ModelSource {
    const { source } = this.#run;
    return { ...source, online: exact(source.online ?? NO_ONLINE) };
  }

  async #embed(): Promise<void> {
    const { ids, sequences, length } = this.#calibration;
    const rows = new Map<number, Float32Array>();
    for (let i = 0; i < sequences; i++) {
      const x = floats(await embedFromFile(this.#run.source, ids.subarray(i * length, (i + 1) * length), rows));
      checkStream(TENSOR_NAMES.embedding, x);
      await this.#store.write('reference', i, x);
      await this.#store.write('quantized', i, x);
    }
  }

  /** Runs a block over a stream, in place. */
  async #advance(stream: Stream, layer: number, block: DecoderBlock, rope: RopeHandle): Promise<void> {
    const { backend, source } = this.#run;
    const { sequences, length } = this.#calibration;
    const perPass = Math.max(1, Math.floor(PASS_TOKENS / length));
    await this.#monitor.timed('forward', async () => {
      for (let begin = 0; begin < sequences; begin += perPass) {
        this.#monitor.checkAborted();
        const batch = Math.min(perPass, sequences - begin);
        const indices = Array.from({ length: batch }, (_, i) => begin + i);
        const x = await readSequences(backend, this.#store, stream, indices, length, source.config.hiddenSize);
        const y = await block.forward(x, { batch, start: 0, rope });
        const values = await backend.download(y);
        backend.free(x, y);
        const size = values.length / batch;
        for (const [i, index] of indices.entries()) {
          const sequence = values.slice(i * size, (i + 1) * size);
          checkStream(`the output of block ${layer} on the ${stream} path`, sequence);
          await this.#store.write(stream, index, sequence);
        }
      }
    });
  }

  /** The original block over the reference path: its outputs are the targets, and the next block's reference inputs. */
  async #advanceReference(layer: number, rope: RopeHandle): Promise<void> {
    const block = await loadBlock(this.#run.backend, this.#exact, layer);
    await this.#advance('reference', layer, block, rope);
    block.release();
  }

  /** The stored block, as inference will load it, over the quantized path. */
  async #advanceQuantized(layer: number, rope: RopeHandle): Promise<void> {
    const { backend, source, sink, quantization } = this.#run;
    const checkpoint = await Checkpoint.open(sink.open(blockShard(layer)));
    try {
      const block = await loadBlock(backend, { ...source, quantization, checkpoint }, layer);
      await this.#advance('quantized', layer, block, rope);
      block.release();
    } finally {
      await checkpoint.close();
    }
  }

  async #quantizeBlock(layer: number, rope: RopeHandle): Promise<void> {
    const { backend, source, sink, settings } = this.#run;
    const { length, sequences } = this.#calibration;
    const started = performance.now();
    const tell = (message: string) =>
      this.#monitor.tell(layer, `block ${layer + 1}/${source.config.layers} ${message}`);
    tell('targets');
    await this.#advanceReference(layer, rope);
    const frame = await loadFrame(backend, this.#exact, layer);
    const biases: Partial<Record<GroupName, Float32Array>> = {};
    const partBiases = new Map<string, Float32Array>();
    const groups = await perGroup((group) => this.#readGroup(layer, group, biases, partBiases));
    // Validation sequences are spread over the set, so that texts given one after the other are all in both parts.
    const held = validationCount(sequences, (settings.block ?? this.#recipe.training).validation);
    const isHeld = (i: number) => Math.floor(((i + 1) * held) / sequences) > Math.floor((i * held) / sequences);
    const all = Array.from({ length: sequences }, (_, i) => i);
    const samples = (indices: readonly number[]): BlockSamples => ({
      count: indices.length,
      read: async (chosen) => {
        const of = chosen.map((i) => indices[i]);
        const read = (stream: Stream) =>
          readSequences(backend, this.#store, stream, of, length, source.config.hiddenSize);
        return { input: await read('quantized'), target: await read('reference') };
      },
    });
    const result = await this.#monitor.timed('quantize', () =>
      this.#recipe.quantizeBlock(backend, {
        layer,
        fixed: { frame, biases },
        groups,
        rope,
        length,
        training: samples(all.filter((i) => !isHeld(i))),
        validation: samples(all.filter(isHeld)),
        settings,
        finishedStage: () => this.#finishedStage(layer),
        keepStage: (stage) => this.#keepStage(layer, stage),
        tell,
        checkAborted: () => this.#monitor.checkAborted(),
      }),
    );
    frame.release();
    const { curves, stats } = result;
    await this.#monitor.timed('write', () =>
      sink.write(blockShard(layer), this.#entries(layer, groups, partBiases, result), {
        [TRAINING_KEY]: JSON.stringify(curves),
      }),
    );
    await this.#advanceQuantized(layer, rope);
    this.#blocks.push({ layer, seconds: (performance.now() - started) / 1000, stats, curves });
  }

  async #keepStage(layer: number, { curve, learned }: FinishedStage): Promise<void> {
    const entries = [...learned].map(([name, data]): TensorEntry => {
      return { name, dtype: 'f32', shape: [data.length], data: () => data };
    });
    await this.#run.sink.keepStage(blockShard(layer), entries, { [TRAINING_KEY]: JSON.stringify(curve) });
  }

  async #finishedStage(layer: number): Promise<FinishedStage | undefined> {
    const source = await this.#run.sink.keptStage(blockShard(layer));
    if (!source) return undefined;
    const file = await SafetensorsFile.open(source);
    try {
      const curve = stageCurveSchema.parse(JSON.parse(file.metadata[TRAINING_KEY]));
      const learned = new Map<string, Float32Array>();
      for (const name of file.tensors.keys()) learned.set(name, floats(await file.read(name)));
      return { curve, learned };
    } finally {
      await file.close();
    }
  }

  async #readGroup(
    layer: number,
    group: GroupName,
    biases: Partial<Record<GroupName, Float32Array>>,
    partBiases: Map<string, Float32Array>,
  ): Promise<BlockGroup> {
    const { source, plan, settings } = this.#run;
    const { inFeatures, outFeatures } = groupShape(source.config, group);
    const names = groupModules(layer, group);
    const weights: Float32Array[] = [];
    const merged: number[] = [];
    for (const [i, name] of names.entries()) {
      const { source: linear } = await readLinear(source, layer, group, i);
      if (linear.kind !== 'dense')
        throw new GyreError('unsupported', `${name} is quantized already`, {
          remedy: 'start from the original checkpoint',
        });
      weights.push(floats(linear.weight));
      if (!linear.bias) continue;
      merged.push(...linear.bias);
      partBiases.set(name, linear.bias);
    }
    if (merged.length > 0) biases[group] = Float32Array.from(merged);
    const decision = plan.decisions[group];
    const grid = decision.kind === 'quantize' ? { bits: settings.bits, groupSize: decision.groupSize } : undefined;
    return { names, weights, outFeatures, inFeatures, ...(grid && { grid }) };
  }

  /** The shard: quantized linears in place of the originals, everything else of the block as it was. */
  #entries(
    layer: number,
    groups: Readonly<Record<GroupName, BlockGroup>>,
    biases: ReadonlyMap<string, Float32Array>,
    result: BlockResult,
  ): TensorEntry[] {
    const { source, plan } = this.#run;
    const entries: TensorEntry[] = [];
    const done = new Set<string>();
    for (const group of GROUP_NAMES) {
      for (const [i, part] of (result.parts[group] ?? []).entries()) {
        const module = groups[group].names[i];
        checkScales(module, part);
        done.add(module);
        const linear = { ...part.weight, bias: biases.get(module), transform: part.transform };
        entries.push(...quantizedLinearEntries(module, linear, plan.layout));
      }
    }
    for (const name of source.checkpoint.names()) {
      if (!name.startsWith(`${TENSOR_NAMES.block(layer)}.`)) continue;
      if (!done.has(name.replace(/\.(weight|bias)$/, ''))) entries.push(copyEntry(source, name));
    }
    return entries;
  }
}

/** Throws when a residual stream is not finite, or so large that sums over it are not. */
function checkStream(what: string, values: Float32Array): void {
  let squares = 0;
  for (let i = 0; i < values.length; i++) squares += values[i] * values[i];
  // Negated, so that NaN is caught too.
  if (squares <= MAX_SQUARES) return;
  throw new GyreError('non-finite', `${what} is NaN, infinite or overflows on the calibration data`, {
    remedy: 'check the model with gyre eval; if it is sound, report this as a bug with the model and command',
  });
}

/** Sequences held out for validation: as many as asked, at most an eighth, at least one. */
export function validationCount(sequences: number, wanted: number): number {
  return Math.max(1, Math.min(wanted, Math.floor(sequences / 8)));
}

async function readSequences(
  backend: Backend,
  store: ActivationStore,
  stream: Stream,
  indices: readonly number[],
  length: number,
  width: number,
) {
  const values = new Float32Array(indices.length * length * width);
  for (const [i, index] of indices.entries()) values.set(await store.read(stream, index), i * length * width);
  return backend.upload(hostTensor('f32', [indices.length * length, width], values));
}
