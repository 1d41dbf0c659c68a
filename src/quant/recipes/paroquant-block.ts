// The published ParoQuant recipe (design §4.4): a transform for each projection and then weights with their grids, trained
// on the output of the whole decoder block. Inputs come from the quantized path, targets from the reference path.
//
// The weight that acts is Ŵ = T⁻¹(Q(T(W))): it is computed once per step whatever the number of tokens, where rotating the
// activations, as the runtime does, would cost the same for every token. The two are one function.
import { constant, parameter, type Tape, type Variable } from '../../autograd/index.js';
import { roundToF16 } from '../../core/dtype.js';
import { ensure } from '../../core/errors.js';
import { createRng } from '../../core/rng.js';
import { hostTensor } from '../../core/tensor.js';
import { GROUP_NAMES, type GroupName } from '../../models/block.js';
import type {
  Backend,
  GridSpec,
  PairwiseTransform,
  Tensor,
  TransformHandle,
  TransformObjective,
} from '../../ops/backend.js';
import { roundTransform } from '../../transforms/index.js';
import { byWeights, perGroup, type ApplyLinear } from '../objectives/block.js';
import { USABLE_SCALES } from '../objectives/layer.js';
import { trainBlock, type BlockModel } from '../objectives/block-training.js';
import {
  BLOCK_DEFAULTS,
  type BlockGroup,
  type BlockRecipe,
  type BlockResult,
  type BlockSettings,
  type BlockTask,
  type QuantizedPart,
  type StageCurve,
} from '../types.js';
import { channelMajor, splitRounded } from '../weights.js';
import { choosePairs } from './pair-choice.js';
import { rotationGroup } from './paroquant.js';

/** The smallest grid scale: the smallest normal f16. */
const MIN_GRID_SCALE = 2 ** -14;

export const paroquantBlock: BlockRecipe = {
  name: 'paroquant-block',
  summary: 'the published ParoQuant recipe: transforms, then weights and grids, trained on the output of each block',
  needs: 'cross-gram',
  layout: 'paroquant',
  share: false,
  training: BLOCK_DEFAULTS,
  quantizeBlock: (backend, task) => new BlockTrainer(backend, task).run(),
};

/** One transform and the weight under it: a projection, or a whole group when transforms are shared. */
interface Unit {
  readonly group: GroupName;
  readonly outFeatures: readonly number[];
  readonly inFeatures: number;
  readonly grid: GridSpec;
  /** [in, cols]. */
  readonly weight: Tensor;
  readonly layout: Pick<PairwiseTransform, 'channels' | 'groupSize' | 'krot' | 'pairs'>;
  /** Set by stage 1, at stored precision. */
  transform: PairwiseTransform;
  /** Set by stage 2, [in, cols] (the unit's own copy) and [in / groupSize, cols]. */
  trained?: { readonly weight: Tensor; readonly scales: Float32Array; readonly zeros: Float32Array };
}

class BlockTrainer {
  readonly #backend: Backend;
  readonly #task: BlockTask;
  readonly #settings: BlockSettings;
  readonly #units: Unit[] = [];
  /** Groups left in 16 bits, channel-major. */
  readonly #fixed = new Map<GroupName, Tensor>();

  constructor(backend: Backend, task: BlockTask) {
    this.#backend = backend;
    this.#task = task;
    this.#settings = task.settings.block ?? BLOCK_DEFAULTS;
  }

  async run(): Promise<BlockResult> {
    const { stages } = this.#settings;
    for (const group of GROUP_NAMES) await this.#prepare(group, this.#task.groups[group]);
    const curves: StageCurve[] = [];
    if (stages !== 'weights') curves.push((await this.#recallTransforms()) ?? (await this.#stageTransforms()));
    if (stages !== 'transforms') curves.push(await this.#stageWeights());
    const stats: Record<string, number> = {};
    for (const { stage, validation, best } of curves) {
      stats[`${stage}.before`] = validation[0];
      stats[`${stage}.after`] = validation[best];
    }
    const parts: Partial<Record<GroupName, QuantizedPart[]>> = {};
    for (const unit of this.#units) (parts[unit.group] ??= []).push(...(await this.#round(unit)));
    this.#backend.free(...this.#units.map((unit) => unit.weight), ...this.#fixed.values());
    return { parts, curves, stats };
  }

  async #prepare(group: GroupName, part: BlockGroup): Promise<void> {
    const { settings, layer } = this.#task;
    const { inFeatures, grid } = part;
    if (!grid) {
      this.#fixed.set(group, await channelMajor(this.#backend, part.weights, inFeatures));
      return;
    }
    const indices = part.names.map((_, i) => i);
    for (const members of settings.share ? [indices] : indices.map((i) => [i])) {
      const weight = await channelMajor(
        this.#backend,
        members.map((i) => part.weights[i]),
        inFeatures,
      );
      const { krot } = settings;
      const groupSize = rotationGroup(inFeatures, grid.groupSize);
      const rng = createRng(settings.seed).fork(`${layer}.${part.names[members[0]]}`);
      const pairs = await choosePairs(this.#backend, this.#settings.pairs, weight, { groupSize, krot, grid }, rng);
      const layout = { channels: inFeatures, groupSize, krot, pairs };
      this.#units.push({
        group,
        outFeatures: members.map((i) => part.outFeatures[i]),
        inFeatures,
        grid,
        weight,
        layout,
        transform: roundTransform(
          layout,
          new Float64Array((krot * inFeatures) / 2),
          new Float64Array(inFeatures).fill(1),
        ),
      });
    }
  }

  /** Joins what each unit makes of its weight into the block's weights. */
  async #weights(
    tape: Tape,
    make: (unit: Unit, index: number) => Promise<Variable>,
  ): Promise<(tape: Tape) => ApplyLinear> {
    const weights = await perGroup(async (group) => {
      const fixed = this.#fixed.get(group);
      if (fixed) return constant(fixed);
      const made: Variable[] = [];
      for (const [i, unit] of this.#units.entries()) if (unit.group === group) made.push(await make(unit, i));
      return tape.concatColumns(made);
    });
    return (batchTape) => byWeights(batchTape, weights);
  }

  #rng(stage: string) {
    return createRng(this.#task.settings.seed).fork(`${this.#task.layer}.${stage}`);
  }

  /** Stage 1: angles and channel scales. */
  async #stageTransforms(): Promise<StageCurve> {
    const backend = this.#backend;
    const { settings } = this.#task;
    const learned: { theta: Variable; scales: Variable; objective: TransformObjective }[] = [];
    for (const { layout, weight, grid } of this.#units) {
      const { channels, krot } = layout;
      const theta = hostTensor('f32', [krot, channels / 2], new Float32Array((krot * channels) / 2));
      const scales = hostTensor('f32', [channels], new Float32Array(channels).fill(1));
      learned.push({
        theta: parameter(await backend.upload(theta)),
        scales: parameter(await backend.upload(scales)),
        objective: await backend.createObjective(weight, layout, grid),
      });
    }
    const rate = { learningRate: this.#settings.transformRate };
    const model: BlockModel = {
      groups: [
        ...(settings.krot > 0 ? [{ parameters: learned.map((l) => l.theta), ...rate }] : []),
        ...(settings.scales ? [{ parameters: learned.map((l) => l.scales), ...rate, range: USABLE_SCALES }] : []),
      ],
      prepare: (tape) =>
        this.#weights(tape, (_, i) =>
          tape.transformedWeight(learned[i].objective, learned[i].theta, learned[i].scales),
        ),
      keep: async () => {
        for (const [i, unit] of this.#units.entries()) {
          const theta = await backend.download(learned[i].theta.value);
          unit.transform = roundTransform(unit.layout, theta, await backend.download(learned[i].scales.value));
        }
      },
    };
    const curve = await trainBlock(backend, this.#task, model, {
      ...this.#settings,
      stage: 'transforms',
      rng: this.#rng('transforms'),
    });
    // With one stage there is nothing left to be interrupted in.
    if (this.#settings.stages === 'both') await this.#keepTransforms(curve);
    for (const { theta, scales, objective } of learned) {
      objective.dispose();
      backend.free(theta.value, theta.takeGradient(), scales.value, scales.takeGradient());
    }
    return curve;
  }

  /** Takes up the transforms that an interrupted run has finished; their losses. */
  async #recallTransforms(): Promise<StageCurve | undefined> {
    const finished = await this.#task.finishedStage();
    if (!finished) return undefined;
    const { curve, learned } = finished;
    for (const [i, unit] of this.#units.entries()) {
      const [theta, channelScales] = [learned.get(`${i}.theta`), learned.get(`${i}.scales`)];
      const { channels, krot } = unit.layout;
      ensure(
        theta?.length === (krot * channels) / 2 && channelScales?.length === channels,
        'file-corrupt',
        () => `what was kept of block ${this.#task.layer}'s first stage does not fit the model`,
        'remove the .stage.safetensors file from the partial folder: the stage then starts anew',
      );
      unit.transform = { ...unit.layout, theta, channelScales };
    }
    return curve;
  }

  async #keepTransforms(curve: StageCurve): Promise<void> {
    const learned = new Map<string, Float32Array>();
    for (const [i, { transform }] of this.#units.entries())
      learned.set(`${i}.theta`, transform.theta).set(`${i}.scales`, transform.channelScales);
    await this.#task.keepStage({ curve, learned });
  }

  /** Stage 2: weights, grid scales and float zero points, under the transforms of stage 1. */
  async #stageWeights(): Promise<StageCurve> {
    const backend = this.#backend;
    const trained: { weight: Variable; scales: Variable; zeros: Variable }[] = [];
    const transforms: TransformHandle[] = [];
    for (const unit of this.#units) {
      const { scales, zeros } = await this.#initialGrid(unit);
      transforms.push(await backend.loadTransform(unit.transform));
      const shape = [unit.inFeatures / unit.grid.groupSize, unit.weight.shape[1]];
      trained.push({
        weight: parameter(await copy(backend, unit.weight)),
        scales: parameter(await backend.upload(hostTensor('f32', shape, scales))),
        zeros: parameter(await backend.upload(hostTensor('f32', shape, zeros))),
      });
    }
    const { weightRate, gridRate } = this.#settings;
    const model: BlockModel = {
      groups: [
        { parameters: trained.map((t) => t.weight), learningRate: weightRate },
        { parameters: trained.flatMap((t) => [t.scales, t.zeros]), learningRate: gridRate },
      ],
      prepare: (tape) =>
        this.#weights(tape, async ({ grid }, i) => {
          const { weight, scales, zeros } = trained[i];
          const turned = await tape.transformChannels(weight, transforms[i], 'forward');
          return tape.transformChannels(await tape.fakeQuantize(turned, scales, zeros, grid), transforms[i], 'inverse');
        }),
      keep: async () => {
        for (const [i, unit] of this.#units.entries()) {
          backend.free(unit.trained?.weight);
          unit.trained = {
            weight: await copy(backend, trained[i].weight.value),
            scales: await backend.download(trained[i].scales.value),
            zeros: await backend.download(trained[i].zeros.value),
          };
        }
      },
    };
    const curve = await trainBlock(backend, this.#task, model, {
      ...this.#settings,
      stage: 'weights',
      rng: this.#rng('weights'),
    });
    backend.release(...transforms);
    for (const variables of trained) for (const v of Object.values(variables)) backend.free(v.value, v.takeGradient());
    return curve;
  }

  /** Min–max scales of T(W), and the zero points −min/scale before rounding: floats, so that steps add up. */
  async #initialGrid({ weight, transform, grid }: Unit): Promise<{ scales: Float32Array; zeros: Float32Array }> {
    const backend = this.#backend;
    const turned = await backend.transformChannels(weight, transform, 'forward');
    const rounded = await backend.roundToNearest(turned, grid);
    const values = await backend.download(turned);
    const cols = turned.shape[1];
    const top = 2 ** grid.bits - 1;
    const minimum = new Float32Array(rounded.scales.length).fill(Infinity);
    for (let at = 0; at < values.length; at += cols) {
      const first = Math.floor(at / cols / grid.groupSize) * cols;
      for (let c = 0; c < cols; c++) minimum[first + c] = Math.min(minimum[first + c], values[at + c]);
    }
    backend.free(turned, rounded.values);
    const { scales } = rounded;
    return { scales, zeros: minimum.map((min, slot) => Math.min(Math.max(-min / scales[slot], 0), top)) };
  }

  /** The unit's linears as they will be stored, rounded against what is stored: f16 scales, whole zero points. */
  async #round(unit: Unit): Promise<QuantizedPart[]> {
    const backend = this.#backend;
    const { grid, transform, inFeatures, outFeatures } = unit;
    const turned = await backend.transformChannels(unit.trained?.weight ?? unit.weight, transform, 'forward');
    backend.free(unit.trained?.weight);
    if (!unit.trained) {
      const rounded = await backend.roundToNearest(turned, grid);
      backend.free(turned, rounded.values);
      return splitRounded(rounded, grid, inFeatures, outFeatures, transform);
    }
    const values = await backend.download(turned);
    backend.free(turned);
    const rounded = encode(values, unit.trained, grid, turned.shape[1]);
    return splitRounded(rounded, grid, inFeatures, outFeatures, transform);
  }
}

/** Codes of values [in, cols] on a trained grid. */
function encode(
  values: Float32Array,
  trained: { readonly scales: Float32Array; readonly zeros: Float32Array },
  { bits, groupSize }: GridSpec,
  cols: number,
): { codes: Uint8Array; zeros: Uint8Array; scales: Float32Array } {
  const top = 2 ** bits - 1;
  const clamp = (x: number): number => Math.min(Math.max(x, 0), top);
  const scales = trained.scales.map((s) => roundToF16(Math.max(s, MIN_GRID_SCALE)));
  const zeros = Uint8Array.from(trained.zeros, (z) => clamp(Math.round(z)));
  const codes = new Uint8Array(values.length);
  for (let at = 0; at < values.length; at += cols) {
    const first = Math.floor(at / cols / groupSize) * cols;
    for (let c = 0; c < cols; c++)
      codes[at + c] = clamp(Math.round(values[at + c] / scales[first + c]) + zeros[first + c]);
  }
  return { codes, zeros, scales };
}

async function copy(backend: Backend, tensor: Tensor): Promise<Tensor> {
  return backend.addScaled(tensor, tensor, 0);
}
