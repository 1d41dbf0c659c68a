// Quantizes the linear groups of one decoder block while the calibration chunks move through it, in stages: statistics of a
// group's inputs → quantize the group → the next group's inputs. Every product is computed once per path: the reference
// path (original weights) runs ahead just far enough to give the targets.
import { GyreError } from '../core/errors.js';
import { floats, hostTensor, type HostTensor } from '../core/tensor.js';
import { quantizedLinearEntries } from '../formats/quantized-linear.js';
import type { TensorEntry } from '../formats/safetensors-writer.js';
import { GROUP_NAMES, RESIDUAL_GROUPS, type BlockFrame, type ChunkContext, type GroupName } from '../models/block.js';
import { TENSOR_NAMES } from '../models/families/names.js';
import { LinearGroup, type LinearPart } from '../models/linear-group.js';
import { groupModules, groupShape, readLinear } from '../models/load.js';
import { NO_ONLINE, type Online } from '../models/online.js';
import type { Backend, RopeHandle, Tensor, TransformHandle } from '../ops/backend.js';
import type { BlockSensitivity } from './objectives/sensitivity.js';
import { InputSample } from './calibration/sample.js';
import { foldIntoNorm, foldIntoRows, noFold, normFold, rowFold } from './folding.js';
import { copyEntry, type Chunk, type GroupReport, type PipelineReport, type QuantizeRun } from './run.js';
import { divideBy, groupRanges, RangeSample } from './ranges.js';
import { InputStatistics, wantedOutputs, type Statistics } from './statistics.js';
import { isBlockRecipe, type GroupResult, type GroupTask, type QuantizedPart } from './types.js';

/** What a block asks of the pipeline. */
export interface BlockHooks {
  tell(message: string): void;
  checkAborted(): void;
  timed<T>(what: keyof PipelineReport['seconds'], work: () => Promise<T>): Promise<T>;
  report(group: GroupReport): void;
  /** Frees a residual stream unless it must outlive the block. */
  free(tensor: Tensor): void;
}

/** Quantizes the groups of one block, moving the chunks through it. */
export class BlockQuantizer {
  readonly #run: QuantizeRun;
  readonly #frame: BlockFrame;
  readonly #chunks: Chunk[];
  readonly #rope: RopeHandle | undefined;
  readonly #hooks: BlockHooks;
  readonly #sensitivity: BlockSensitivity | undefined;
  /** Tensors of the shard, by module or tensor name; folding replaces earlier ones. */
  readonly #parts = new Map<string, QuantizedPart>();
  readonly #biases = new Map<string, Float32Array>();
  readonly #norms = new Map<string, Float32Array>();

  constructor(
    run: QuantizeRun,
    frame: BlockFrame,
    chunks: Chunk[],
    rope: RopeHandle | undefined,
    hooks: BlockHooks,
    sensitivity?: BlockSensitivity,
  ) {
    this.#sensitivity = sensitivity;
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

  get #online(): Online {
    return this.#run.source.online ?? NO_ONLINE;
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
      return {
        quantized: q,
        reference:
          chunk.reference === chunk.quantized
            ? q
            : await this.#ifTwoPaths(() => frame.attentionInput(chunk.reference), q),
      };
    });
    // Inputs of o: attention of the quantized projections; the reference path moves on to after its o.
    const o = await this.#stage('o', async (chunk) => {
      const context = this.#context(chunk);
      const attend = async (x: Tensor, group: LinearGroup, exact: boolean) => {
        const normed = await frame.attentionInput(x);
        const projected = await group.forward(normed);
        const y = await frame.attend(projected, context, { exact });
        backend.free(normed, projected);
        return y;
      };
      const quantized = await attend(chunk.quantized, qkv.quantized, false);
      return {
        quantized,
        reference: await this.#ifTwoPaths(() => attend(chunk.reference, qkv.reference, true), quantized),
      };
    });
    for (const [i, chunk] of chunks.entries()) await this.#advance(chunk, o, i);
    qkv.release();
    o.release();

    const gateUp = await this.#stage('gateUp', async (chunk) => {
      const quantized = await frame.mlpInput(chunk.quantized);
      return { quantized, reference: await this.#ifTwoPaths(() => frame.mlpInput(chunk.reference), quantized) };
    });
    const down = await this.#stage('down', async (chunk) => {
      const activate = async (x: Tensor, group: LinearGroup) => {
        const normed = await frame.mlpInput(x);
        const projected = await group.forward(normed);
        const y = await frame.activate(projected);
        backend.free(normed, projected);
        return y;
      };
      const quantized = await activate(chunk.quantized, gateUp.quantized);
      return {
        quantized,
        reference: await this.#ifTwoPaths(() => activate(chunk.reference, gateUp.reference), quantized),
      };
    });
    // With folding the stored block is run again from its input; its last product here would be thrown away.
    if (!this.#run.recipe.folds) for (const [i, chunk] of chunks.entries()) await this.#advance(chunk, down, i);
    gateUp.release();
    down.release();
  }

  async #ifTwoPaths(make: () => Tensor | Promise<Tensor>, otherwise: Tensor): Promise<Tensor> {
    return this.#twoPaths ? make() : otherwise;
  }

  /**
   * Gathers statistics of a group's inputs over all chunks, quantizes the group, and returns it ready to run in both
   * forms. For groups that write to the residual stream the quantized path's inputs stay for
   * {@link BlockQuantizer.#advance}, and the reference path moves past the group at once: it says what the group's
   * outputs should be.
   */
  async #stage(
    group: GroupName,
    inputs: (chunk: Chunk) => Promise<{ quantized: Tensor; reference: Tensor }>,
  ): Promise<StagedGroup> {
    const { backend } = this.#run;
    const residual = RESIDUAL_GROUPS.has(group);
    const parts = await this.#readParts(group);
    const { groups, activations } = this.#online;
    const before = groups[group];
    const reference = await LinearGroup.load(backend, parts, { before });
    const turn = before && (await backend.loadTransform(before));
    const statistics = new InputStatistics(backend);
    const ranges = new RangeSample(backend);
    // A transform that is learned comes between these inputs and their grid: then the recipe rounds a sample of them itself.
    const learned = this.#run.recipe.layout === 'paroquant';
    const sample = activations && learned ? new InputSample(backend, this.#run.settings.seed) : undefined;
    const kept: Tensor[] = [];
    const importance = this.#sensitivity && tokenWeights(this.#sensitivity[group].tokens);
    let row = 0;
    for (const [i, chunk] of this.#chunks.entries()) {
      this.#hooks.checkAborted();
      this.#hooks.tell(`${group}: inputs ${i + 1}/${this.#chunks.length}`);
      const x = await this.#hooks.timed('forward', () => inputs(chunk));
      let next: Tensor | undefined;
      if (residual && this.#twoPaths)
        next = await this.#hooks.timed('forward', () => reference.forward(x.reference, chunk.reference));
      await this.#hooks.timed('statistics', async () => {
        const outputs = next && (await wantedOutputs(backend, next, chunk.quantized, parts[0].source.bias));
        const rounded = activations !== undefined && !learned;
        const two = !residual && this.#twoPaths && (x.reference !== x.quantized || rounded);
        const exact = await this.#asSeen(x.quantized, turn);
        const seen = activations && !learned ? await backend.quantizeRows(exact, activations) : exact;
        const wanted = two && x.reference !== x.quantized ? await this.#asSeen(x.reference, turn) : exact;
        const [rows] = exact.shape;
        const weights = importance?.subarray(row, row + rows);
        row += rows;
        await statistics.add(seen, { reference: two ? wanted : undefined, outputs }, weights);
        await sample?.add(exact);
        await ranges.add(exact);
        for (const made of new Set([exact, seen, wanted]))
          if (made !== x.quantized && made !== x.reference) backend.free(made);
        backend.free(outputs);
      });
      if (residual) {
        if (next) {
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
    backend.release(turn);
    const quantizedParts = await this.#group(group, parts, {
      ...finished,
      sample: sample?.rows(),
      ranges: ranges.values(),
    });
    backend.free(finished.gram, finished.cross, finished.target);
    const quantized = await LinearGroup.load(backend, quantizedParts, { before, activations });
    return new StagedGroup(backend, quantized, reference, kept);
  }

  /** Inputs of a group as its weights see them: after the group's online transform. */
  async #asSeen(x: Tensor, transform: TransformHandle | undefined): Promise<Tensor> {
    return transform ? this.#run.backend.rotate(x, transform) : x;
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
    for (let i = 0; i < groupModules(this.#frame.layer, group).length; i++)
      parts.push(await readLinear(source, this.#frame.layer, group, i));
    return parts;
  }

  /** Quantizes one group (or keeps it); returns it as the runtime will load it. */
  async #group(
    group: GroupName,
    parts?: LinearPart[],
    statistics?: Statistics & { readonly sample?: HostTensor; readonly ranges: Float32Array | undefined },
  ): Promise<LinearPart[]> {
    const { backend, source, recipe, settings, plan } = this.#run;
    if (isBlockRecipe(recipe)) throw new Error(`${recipe.name} quantizes whole blocks`);
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
        if (s.kind !== 'dense')
          throw new GyreError('unsupported', `${names[i]} is quantized already`, {
            remedy: 'start from the original checkpoint',
          });
        return floats(s.weight);
      }),
      inFeatures,
      outFeatures,
      grid: { bits: settings.bits, groupSize: decision.groupSize },
      gram: statistics?.gram,
      cross: statistics?.cross,
      target: statistics?.target,
      sample: statistics?.sample,
      activations: this.#online.activations,
      outputs: this.#sensitivity?.[group].outputs,
      fold: await this.#fold(group),
      settings,
    };
    const result = await this.#hooks
      .timed('quantize', () => recipe.quantizeGroup(backend, task))
      .catch((error: unknown) => {
        if (!(error instanceof GyreError) || error.code !== 'non-finite') throw error;
        throw new GyreError(error.code, `${group} of block ${layer}: ${error.message}`, {
          remedy: error.remedy,
          cause: error,
        });
      });
    await this.#store(task, read, result);
    this.#hooks.report({
      layer,
      group,
      modules: names,
      seconds: (performance.now() - start) / 1000,
      stats: result.stats,
      curve: result.curve,
      ranges: await groupRanges(backend, task, result, statistics?.ranges),
    });
    // Until the shard is written, folded scales act at the group itself: the same product, inputs as they are now.
    const { foldedScales } = result;
    return result.parts.map((part, i) => ({
      source: { kind: 'quantized', weight: part.weight, bias: read[i].source.bias },
      transform: foldedScales ? divideBy(foldedScales) : part.transform,
    }));
  }

  /** Where a scaling of this group's input can be folded. */
  async #fold(group: GroupName): Promise<GroupTask['fold']> {
    const { source } = this.#run;
    const { config } = source;
    const prefix = TENSOR_NAMES.block(this.#frame.layer);
    const before = group === 'o' ? 'qkv' : group === 'down' ? 'gateUp' : undefined;
    const blocked = this.#online.groups[group] !== undefined;
    if (blocked || (before && this.#run.plan.decisions[before].kind === 'keep'))
      return noFold(groupShape(config, group).inFeatures);
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
      checkScales(name, result.parts[i]);
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
        if (!part)
          throw new Error(`${module} is left in 16 bits, so the scales of ${task.names[0]} have nowhere to go`);
        const folded = { ...part, weight: foldIntoRows(part.weight, task.fold.source, scales) };
        checkScales(module, folded);
        this.#parts.set(module, folded);
        const bias = this.#biases.get(module);
        if (bias) {
          const foldedBias = bias.slice();
          task.fold.source.forEach((row, c) => (foldedBias[row] = bias[row] / scales[c]));
          this.#biases.set(module, foldedBias);
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
      entries.push(
        ...quantizedLinearEntries(
          module,
          { ...part.weight, bias: this.#biases.get(module), transform: part.transform },
          plan.layout,
        ),
      );
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

/**
 * What a token counts, given its sensitivity (mean 1): half of it is the same for all. A token that the model is certain of has
 * almost none, and its errors are small only as long as they are kept small, which the second order does not know.
 */
function tokenWeights(sensitivity: Float32Array): Float32Array {
  return sensitivity.map((value) => (value + 1) / 2);
}

/** The largest f16, to which grids clamp their scales. */
const MAX_SCALE = 65504;

/** Throws when a linear's weights are too large for the f16 scales of its grid: they would be cut off without a word. */
export function checkScales(module: string, { weight }: QuantizedPart): void {
  if (weight.scales.every((scale) => scale < MAX_SCALE)) return;
  throw new GyreError(
    'non-finite',
    `${module}.weight: its values are too large for ${weight.bits} bits with f16 scales`,
    {
      remedy: 'no trained model has such weights: check the checkpoint with gyre inspect, or fetch it again',
    },
  );
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
