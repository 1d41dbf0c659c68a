// The main job: block by block, stream the weights in, run both paths, quantize each linear group with what the quantized
// path sees, write the block's shard, go on. Memory: one block, the residual stream of both paths, one group's inputs.
//
// Stages of a block: statistics of a group's inputs → quantize the group → the next group's inputs. Every product is
// computed once per path: the reference path (original weights) runs ahead just far enough to give the targets.
import { GyreError } from '../core/errors.js';
import { silent, type ProgressListener } from '../core/progress.js';
import { floats, hostTensor } from '../core/tensor.js';
import { quantizedLinearEntries } from '../formats/quantized-linear.js';
import type { QuantizationConfig } from '../formats/quantization-config.js';
import { Checkpoint } from '../formats/safetensors.js';
import type { TensorEntry } from '../formats/safetensors-writer.js';
import { GROUP_NAMES, type BlockFrame, type ChunkContext, type GroupName } from '../models/block.js';
import { TENSOR_NAMES } from '../models/families/names.js';
import { LinearGroup, type LinearPart } from '../models/linear-group.js';
import { embedFromFile, groupModules, groupShape, loadBlock, loadFrame, readLinear, type ModelSource } from '../models/load.js';
import { ropeTable } from '../models/rope.js';
import type { Backend, RopeHandle, Tensor } from '../ops/backend.js';
import { normFold, foldIntoNorm, foldIntoRows, rowFold } from './folding.js';
import type { CalibrationTokens } from './calibration/tokens.js';
import type { QuantizePlan } from './plan.js';
import { blockShard, REST_SHARD, type CheckpointSink } from './sink.js';
import { InputStatistics } from './statistics.js';
import type { GroupResult, GroupTask, QuantizedPart, QuantizeSettings, Recipe } from './types.js';

/** Tokens per chunk of the calibration run: large enough for full speed, small enough for memory. */
const CHUNK_TOKENS = 4096;

/** Arguments of {@link quantizeModel}. */
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
}

/** What {@link quantizeModel} returns: reports of the groups quantized by this call (not of blocks finished before), and where time went. */
export interface PipelineReport {
  readonly groups: readonly GroupReport[];
  readonly seconds: Readonly<Record<'forward' | 'statistics' | 'quantize' | 'write', number>>;
}

/** One chunk of calibration sequences as it moves through the blocks. */
interface Chunk {
  readonly batch: number;
  /** Residual streams [batch·length, hidden]; the same tensor until the first quantized block. */
  reference: Tensor;
  quantized: Tensor;
}

/** Quantizes every block into `run.sink`. Resumes after the last finished block, to the same bytes. */
export async function quantizeModel(run: QuantizeRun): Promise<PipelineReport> {
  return new Pipeline(run).run();
}

class Pipeline {
  readonly #run: QuantizeRun;
  readonly #progress: ProgressListener;
  readonly #groups: GroupReport[] = [];
  readonly #seconds = { forward: 0, statistics: 0, quantize: 0, write: 0 };

  constructor(run: QuantizeRun) {
    this.#run = run;
    this.#progress = run.onProgress ?? silent;
  }

  async run(): Promise<PipelineReport> {
    const { backend, source, sink, calibration } = this.#run;
    const { layers } = source.config;
    let first = 0;
    while (first < layers && (await sink.has(blockShard(first)))) first++;
    const chunks = calibration && first < layers ? await this.#embed(calibration) : [];
    const rope = calibration && (await this.#rope(calibration.length));
    for (let layer = 0; layer < layers; layer++) {
      this.#checkAborted();
      if (layer < first) {
        this.#tell(layer, `block ${layer + 1}/${layers} is finished; following it`);
        if (chunks.length > 0 && rope) await this.#follow(layer, chunks, rope);
      } else {
        await this.#quantizeBlock(layer, chunks, rope);
      }
    }
    this.#tell(layers, 'embeddings, norms and head');
    if (!(await sink.has(REST_SHARD))) await this.#timed('write', () => sink.write(REST_SHARD, this.#restEntries()));
    for (const chunk of chunks) freeChunk(backend, chunk);
    if (rope) backend.release(rope);
    return { groups: this.#groups, seconds: this.#seconds };
  }

  #tell(done: number, message: string): void {
    this.#progress({ stage: 'quantize', done, total: this.#run.source.config.layers, unit: 'blocks', message });
  }

  #checkAborted(): void {
    if (this.#run.signal?.aborted) throw new GyreError('interrupted', 'stopped; finished blocks are kept', { remedy: 'run the same command with --resume to go on' });
  }

  async #timed<T>(what: keyof PipelineReport['seconds'], work: () => Promise<T>): Promise<T> {
    const start = performance.now();
    try {
      return await work();
    } finally {
      this.#seconds[what] += (performance.now() - start) / 1000;
    }
  }

  async #embed(calibration: CalibrationTokens): Promise<Chunk[]> {
    const { source, backend } = this.#run;
    const { ids, sequences, length } = calibration;
    const perChunk = Math.max(1, Math.floor(CHUNK_TOKENS / length));
    const chunks: Chunk[] = [];
    for (let begin = 0; begin < sequences; begin += perChunk) {
      const batch = Math.min(perChunk, sequences - begin);
      const x = await backend.upload(await embedFromFile(source, ids.subarray(begin * length, (begin + batch) * length)));
      chunks.push({ batch, reference: x, quantized: x });
    }
    return chunks;
  }

  async #rope(length: number): Promise<RopeHandle> {
    const table = ropeTable(this.#run.source.config, length);
    return this.#run.backend.loadRope(table.cos, table.sin, table.rotaryDim);
  }

  /** Moves both paths through a block that is already on disk. */
  async #follow(layer: number, chunks: Chunk[], rope: RopeHandle): Promise<void> {
    const { backend, source } = this.#run;
    const wantsReference = this.#run.recipe.needs === 'cross-gram';
    await this.#timed('forward', async () => {
      const reference = wantsReference ? await loadBlock(backend, source, layer) : undefined;
      const stored = await this.#openBlock(layer);
      const quantized = await loadBlock(backend, stored, layer);
      for (const chunk of chunks) {
        this.#checkAborted();
        const context = { batch: chunk.batch, start: 0, rope };
        const next = await quantized.forward(chunk.quantized, context);
        const ahead = reference ? await reference.forward(chunk.reference, context) : next;
        freeChunk(backend, chunk);
        chunk.quantized = next;
        chunk.reference = ahead;
      }
      reference?.release();
      quantized.release();
      await stored.checkpoint.close();
    });
    await this.#checkFinite(layer, chunks);
  }

  async #openBlock(layer: number): Promise<ModelSource> {
    const { source, sink, quantization } = this.#run;
    return { ...source, quantization, checkpoint: await Checkpoint.open(sink.open(blockShard(layer))) };
  }

  async #quantizeBlock(layer: number, chunks: Chunk[], rope: RopeHandle | undefined): Promise<void> {
    const { backend, source, sink, recipe } = this.#run;
    const frame = await loadFrame(backend, source, layer);
    // Folding changes norms and earlier rows after the fact: what the next block sees must come from the stored block,
    // so the block's own input is kept to run it again.
    const inputs = recipe.folds ? chunks.map((chunk) => chunk.quantized) : [];
    const block = new BlockQuantizer(this.#run, frame, chunks, rope, {
      tell: (message) => this.#tell(layer, `block ${layer + 1}/${source.config.layers} ${message}`),
      checkAborted: () => this.#checkAborted(),
      timed: (what, work) => this.#timed(what, work),
      report: (group) => this.#groups.push(group),
      free: (tensor) => {
        if (!inputs.includes(tensor)) backend.free(tensor);
      },
    });
    const entries = await block.run();
    await this.#timed('write', () => sink.write(blockShard(layer), entries));
    frame.release();
    for (const [i, input] of inputs.entries()) {
      backend.free(chunks[i].quantized);
      chunks[i].reference = chunks[i].quantized = input;
    }
    if (recipe.folds && rope) await this.#follow(layer, chunks, rope);
    else await this.#checkFinite(layer, chunks);
  }

  async #checkFinite(layer: number, chunks: readonly Chunk[]): Promise<void> {
    for (const chunk of chunks) {
      const value = await this.#run.backend.dot(chunk.quantized, chunk.quantized);
      if (!Number.isFinite(value)) {
        throw new GyreError('non-finite', `the output of block ${layer} is NaN or infinite on the calibration data`, {
          remedy: 'check the model with gyre eval; if it is sound, report this as a bug with the model and command',
        });
      }
    }
  }

  /** Everything outside the blocks' quantized linears, copied as it is, one tensor at a time. */
  #restEntries(): TensorEntry[] {
    const { checkpoint, config } = this.#run.source;
    const prefixes = Array.from({ length: config.layers }, (_, layer) => `${TENSOR_NAMES.block(layer)}.`);
    const inBlocks = new Set(prefixes);
    const blockOf = (name: string) => /^(.*?\.layers\.\d+\.)/.exec(name)?.[1] ?? '';
    return [...checkpoint.names()].filter((name) => !inBlocks.has(blockOf(name))).map((name) => copyEntry(this.#run.source, name));
  }
}

function freeChunk(backend: Backend, chunk: Chunk): void {
  backend.free(chunk.quantized);
  if (chunk.reference !== chunk.quantized) backend.free(chunk.reference);
}

function copyEntry(source: ModelSource, name: string): TensorEntry {
  const { dtype, shape } = source.checkpoint.info(name);
  return { name, dtype, shape, data: async () => (await source.checkpoint.read(name)).data };
}

interface BlockHooks {
  tell(message: string): void;
  checkAborted(): void;
  timed<T>(what: keyof PipelineReport['seconds'], work: () => Promise<T>): Promise<T>;
  report(group: GroupReport): void;
  /** Frees a residual stream unless it must outlive the block. */
  free(tensor: Tensor): void;
}

/** Quantizes the groups of one block, moving the chunks through it. */
class BlockQuantizer {
  readonly #run: QuantizeRun;
  readonly #frame: BlockFrame;
  readonly #chunks: Chunk[];
  readonly #rope: RopeHandle | undefined;
  readonly #hooks: BlockHooks;
  /** Tensors of the shard, by module or tensor name; folding replaces earlier ones. */
  readonly #parts = new Map<string, QuantizedPart>();
  readonly #biases = new Map<string, Float32Array>();
  readonly #norms = new Map<string, Float32Array>();

  constructor(run: QuantizeRun, frame: BlockFrame, chunks: Chunk[], rope: RopeHandle | undefined, hooks: BlockHooks) {
    this.#run = run;
    this.#frame = frame;
    this.#chunks = chunks;
    this.#rope = rope;
    this.#hooks = hooks;
  }

  async run(): Promise<TensorEntry[]> {
    if (this.#chunks.length === 0) {
      for (const group of GROUP_NAMES) await this.#group(group);
    } else {
      await this.#throughBlock();
    }
    return this.#entries();
  }

  get #twoPaths(): boolean {
    return this.#run.recipe.needs === 'cross-gram';
  }

  #context(chunk: Chunk): ChunkContext {
    if (!this.#rope) throw new Error('calibration without rotary tables');
    return { batch: chunk.batch, start: 0, rope: this.#rope };
  }

  /** The staged pass over a block; see the head of this file. */
  async #throughBlock(): Promise<void> {
    const { backend } = this.#run;
    const frame = this.#frame;
    const chunks = this.#chunks;

    const qkv = await this.#stage('qkv', async (chunk) => {
      const q = await frame.attentionInput(chunk.quantized);
      return { quantized: q, reference: chunk.reference === chunk.quantized ? q : await this.#ifTwoPaths(() => frame.attentionInput(chunk.reference), q) };
    });
    // Inputs of o: attention of the quantized projections; the reference path moves on to after its o.
    const o = await this.#stage(
      'o',
      async (chunk) => {
        const context = this.#context(chunk);
        const attend = async (x: Tensor, group: LinearGroup) => {
          const normed = await frame.attentionInput(x);
          const projected = await group.forward(normed);
          const y = await frame.attend(projected, context);
          backend.free(normed, projected);
          return y;
        };
        const quantized = await attend(chunk.quantized, qkv.quantized);
        return { quantized, reference: await this.#ifTwoPaths(() => attend(chunk.reference, qkv.reference), quantized) };
      },
      true,
    );
    for (const [i, chunk] of chunks.entries()) await this.#advance(chunk, o, i);
    qkv.release();
    o.release();

    const gateUp = await this.#stage('gateUp', async (chunk) => {
      const quantized = await frame.mlpInput(chunk.quantized);
      return { quantized, reference: await this.#ifTwoPaths(() => frame.mlpInput(chunk.reference), quantized) };
    });
    const down = await this.#stage(
      'down',
      async (chunk) => {
        const activate = async (x: Tensor, group: LinearGroup) => {
          const normed = await frame.mlpInput(x);
          const projected = await group.forward(normed);
          const y = await frame.activate(projected);
          backend.free(normed, projected);
          return y;
        };
        const quantized = await activate(chunk.quantized, gateUp.quantized);
        return { quantized, reference: await this.#ifTwoPaths(() => activate(chunk.reference, gateUp.reference), quantized) };
      },
      true,
    );
    for (const [i, chunk] of chunks.entries()) await this.#advance(chunk, down, i);
    gateUp.release();
    down.release();
  }

  async #ifTwoPaths(make: () => Tensor | Promise<Tensor>, otherwise: Tensor): Promise<Tensor> {
    return this.#twoPaths ? make() : otherwise;
  }

  /**
   * Gathers statistics of a group's inputs over all chunks, quantizes the group, and returns it ready to run in both
   * forms. With `keep`, the quantized path's inputs stay for {@link BlockQuantizer.#advance} and the reference path
   * moves past the group at once.
   */
  async #stage(
    group: GroupName,
    inputs: (chunk: Chunk) => Promise<{ quantized: Tensor; reference: Tensor }>,
    keep = false,
  ): Promise<StagedGroup> {
    const { backend } = this.#run;
    const parts = await this.#readParts(group);
    const reference = await LinearGroup.load(backend, parts);
    const statistics = new InputStatistics(backend);
    const kept: Tensor[] = [];
    for (const [i, chunk] of this.#chunks.entries()) {
      this.#hooks.checkAborted();
      this.#hooks.tell(`${group}: inputs ${i + 1}/${this.#chunks.length}`);
      const x = await this.#hooks.timed('forward', () => inputs(chunk));
      await this.#hooks.timed('statistics', () => statistics.add(x.quantized, this.#twoPaths && x.reference !== x.quantized ? x.reference : undefined));
      if (keep) {
        if (this.#twoPaths) {
          const next = await this.#hooks.timed('forward', () => reference.forward(x.reference, chunk.reference));
          if (chunk.reference !== chunk.quantized) this.#hooks.free(chunk.reference);
          chunk.reference = next;
        }
        kept.push(x.quantized);
      } else {
        backend.free(x.quantized);
      }
      if (x.reference !== x.quantized) backend.free(x.reference);
    }
    const finished = await statistics.finish(`${group} of block ${this.#frame.layer}`);
    const quantizedParts = await this.#group(group, parts, finished);
    backend.free(finished.gram, finished.cross);
    const quantized = await LinearGroup.load(backend, quantizedParts);
    return new StagedGroup(backend, quantized, reference, kept);
  }

  /** The quantized path past a group whose inputs were kept. */
  async #advance(chunk: Chunk, group: StagedGroup, index: number): Promise<void> {
    const { backend } = this.#run;
    await this.#hooks.timed('forward', async () => {
      const input = group.takeInput(index);
      const next = await group.quantized.forward(input, chunk.quantized);
      backend.free(input);
      this.#hooks.free(chunk.quantized);
      if (!this.#twoPaths) chunk.reference = next;
      chunk.quantized = next;
    });
  }

  async #readParts(group: GroupName): Promise<LinearPart[]> {
    const { source } = this.#run;
    const parts: LinearPart[] = [];
    for (let i = 0; i < groupModules(this.#frame.layer, group).length; i++) parts.push(await readLinear(source, this.#frame.layer, group, i));
    return parts;
  }

  /** Quantizes one group (or keeps it); returns it as the runtime will load it. */
  async #group(group: GroupName, parts?: LinearPart[], statistics?: { gram: Tensor; cross: Tensor | undefined }): Promise<LinearPart[]> {
    const { backend, source, recipe, settings, plan } = this.#run;
    const decision = plan.decisions[group];
    const read = parts ?? (await this.#readParts(group));
    if (decision.kind === 'keep') return read;
    const layer = this.#frame.layer;
    const names = groupModules(layer, group);
    const { inFeatures, outFeatures } = groupShape(source.config, group);
    this.#hooks.checkAborted();
    this.#hooks.tell(`${group}: quantizing`);
    const start = performance.now();
    const task: GroupTask = {
      layer,
      group,
      names,
      weights: read.map(({ source: s }, i) => {
        if (s.kind !== 'dense') throw new GyreError('unsupported', `${names[i]} is quantized already`, { remedy: 'start from the original checkpoint' });
        return floats(s.weight);
      }),
      inFeatures,
      outFeatures,
      grid: { bits: settings.bits, groupSize: decision.groupSize },
      gram: statistics?.gram,
      cross: statistics?.cross,
      fold: await this.#fold(group),
      settings,
    };
    const result = await this.#hooks.timed('quantize', () => recipe.quantizeGroup(backend, task));
    await this.#store(task, read, result);
    this.#hooks.report({ layer, group, modules: names, seconds: (performance.now() - start) / 1000, stats: result.stats, curve: result.curve });
    // Until the shard is written, folded scales act at the group itself: the same product, inputs as they are now.
    const { foldedScales } = result;
    return result.parts.map((part, i) => ({
      source: { kind: 'quantized', weight: part.weight, bias: read[i].source.bias },
      transform: foldedScales ? inverseScaling(foldedScales) : part.transform,
    }));
  }

  /** Where a scaling of this group's input can be folded. */
  async #fold(group: GroupName): Promise<GroupTask['fold']> {
    const { source } = this.#run;
    const { config } = source;
    const prefix = TENSOR_NAMES.block(this.#frame.layer);
    switch (group) {
      case 'qkv':
        return normFold(await source.checkpoint.read(`${prefix}.${TENSOR_NAMES.inputNorm}.weight`));
      case 'gateUp':
        return normFold(await source.checkpoint.read(`${prefix}.${TENSOR_NAMES.postAttentionNorm}.weight`));
      case 'o':
        return rowFold(config.heads * config.headDim, (c) => {
          const head = Math.floor(c / config.headDim);
          return Math.floor(head / (config.heads / config.kvHeads)) * config.headDim + (c % config.headDim);
        });
      case 'down':
        return rowFold(config.intermediateSize, (c) => c);
    }
  }

  /** Keeps a group's result for the shard, folding scales into what stands before it. */
  async #store(task: GroupTask, read: readonly LinearPart[], result: GroupResult): Promise<void> {
    const { source } = this.#run;
    for (const [i, name] of task.names.entries()) {
      this.#parts.set(name, result.parts[i]);
      const { bias } = read[i].source;
      if (bias) this.#biases.set(name, bias);
    }
    const scales = result.foldedScales;
    if (!scales || scales.every((s) => s === 1)) return;
    const prefix = TENSOR_NAMES.block(task.layer);
    switch (task.group) {
      case 'qkv':
      case 'gateUp': {
        const name = `${prefix}.${task.group === 'qkv' ? TENSOR_NAMES.inputNorm : TENSOR_NAMES.postAttentionNorm}.weight`;
        this.#norms.set(name, foldIntoNorm(floats(await source.checkpoint.read(name)), scales));
        return;
      }
      case 'o':
      case 'down': {
        // v feeds o, up feeds down: the last linear of the group before.
        const modules = groupModules(task.layer, task.group === 'o' ? 'qkv' : 'gateUp');
        const module = modules[modules.length - 1];
        const part = this.#parts.get(module);
        if (!part) throw new GyreError('unsupported', `${module} is left in 16 bits, so the scales of ${task.names[0]} have nowhere to go`);
        this.#parts.set(module, { ...part, weight: foldIntoRows(part.weight, task.fold.source, scales) });
        const bias = this.#biases.get(module);
        if (bias) {
          const folded = bias.slice();
          task.fold.source.forEach((row, c) => (folded[row] = bias[row] / scales[c]));
          this.#biases.set(module, folded);
        }
        return;
      }
    }
  }

  /** The shard: quantized linears in place of the originals, everything else of the block as it was. */
  #entries(): TensorEntry[] {
    const { source, plan } = this.#run;
    const prefix = `${TENSOR_NAMES.block(this.#frame.layer)}.`;
    const entries: TensorEntry[] = [];
    for (const [module, part] of this.#parts) {
      entries.push(...quantizedLinearEntries(module, { ...part.weight, bias: this.#biases.get(module), transform: part.transform }, plan.layout));
    }
    for (const name of source.checkpoint.names()) {
      if (!name.startsWith(prefix)) continue;
      const module = name.replace(/\.(weight|bias)$/, '');
      if (this.#parts.has(module)) continue;
      const norm = this.#norms.get(name);
      entries.push(norm ? this.#normEntry(name, norm) : copyEntry(source, name));
    }
    return entries;
  }

  #normEntry(name: string, values: Float32Array): TensorEntry {
    const { shape } = this.#run.source.checkpoint.info(name);
    const stored = hostTensor('f32', shape, values);
    return { name, dtype: 'f32', shape, data: () => stored.data };
  }
}

/** A group in both forms, with the quantized path's inputs when they were kept. */
class StagedGroup {
  readonly #backend: Backend;
  readonly quantized: LinearGroup;
  readonly reference: LinearGroup;
  readonly #inputs: (Tensor | undefined)[];

  constructor(backend: Backend, quantized: LinearGroup, reference: LinearGroup, inputs: Tensor[]) {
    this.#backend = backend;
    this.quantized = quantized;
    this.reference = reference;
    this.#inputs = inputs;
  }

  takeInput(index: number): Tensor {
    const input = this.#inputs[index];
    if (!input) throw new Error(`input ${index} was not kept or already taken`);
    this.#inputs[index] = undefined;
    return input;
  }

  release(): void {
    this.#backend.free(...this.#inputs);
    this.quantized.release();
    this.reference.release();
  }
}

function inverseScaling(scales: Float32Array): LinearPart['transform'] {
  return {
    channels: scales.length,
    groupSize: scales.length,
    krot: 0,
    pairs: new Int16Array(0),
    theta: new Float32Array(0),
    channelScales: scales.map((s) => 1 / s),
  };
}
