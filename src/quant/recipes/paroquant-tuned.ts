// The layer objective, then a short training of what stays continuous: each group of the block is quantized as `paroquant`
// does, its codes are kept, and grid scales, angles and channel scales are tuned on the output of the block. With the codes
// fixed nothing is rounded on the way: the loss is smooth, and a few epochs at a small rate are enough.
import { constant, parameter, type Variable } from '../../autograd/index.js';
import { roundToF16 } from '../../core/dtype.js';
import { createRng } from '../../core/rng.js';
import { hostTensor } from '../../core/tensor.js';
import { GROUP_NAMES, type GroupName } from '../../models/block.js';
import { LinearGroup, sameTransform, type LinearPart } from '../../models/linear-group.js';
import type { Backend, Tensor } from '../../ops/backend.js';
import { roundTransform } from '../../transforms/index.js';
import { noFold } from '../folding.js';
import type { ApplyLinear } from '../objectives/block.js';
import { trainBlock, type BlockModel } from '../objectives/block-training.js';
import { InputStatistics } from '../statistics.js';
import {
  BLOCK_DEFAULTS,
  type BlockRecipe,
  type BlockResult,
  type BlockSettings,
  type BlockTask,
  type QuantizedPart,
} from '../types.js';
import { channelMajor } from '../weights.js';
import { paroquant } from './paroquant.js';

/** Tokens of a pass that gathers statistics. */
const PASS_TOKENS = 4096;
/** The smallest grid scale: the smallest normal f16. */
const MIN_GRID_SCALE = 2 ** -14;

/** Rates are those of a fine adjustment; scales are tuned relative to where they start. */
const DEFAULTS: BlockSettings = {
  ...BLOCK_DEFAULTS,
  epochs: 3,
  batch: 8,
  transformRate: 5e-4,
  gridRate: 1e-3,
  weightDecay: 0,
};

export const paroquantTuned: BlockRecipe = {
  name: 'paroquant-tuned',
  summary: 'paroquant, then grid scales, angles and channel scales tuned on the output of each block',
  needs: 'cross-gram',
  layout: 'paroquant',
  share: true,
  training: DEFAULTS,
  quantizeBlock: (backend, task) => new BlockTuner(backend, task).run(),
};

/** Neighbouring parts of a group under one transform. */
interface Unit {
  readonly group: GroupName;
  /** Indices of its parts in the group. */
  readonly members: readonly number[];
  /** (code − zero)·scale, channel-major [in, cols]. */
  readonly values: Tensor;
  readonly groupSize: number;
  readonly layout: NonNullable<QuantizedPart['transform']>;
  readonly theta: Variable;
  readonly channelScales: Variable;
  /** Factors on the grid scales, [in / groupSize, cols]. */
  readonly factors: Variable;
  kept?: { readonly theta: Float32Array; readonly channelScales: Float32Array; readonly factors: Float32Array };
}

class BlockTuner {
  readonly #backend: Backend;
  readonly #task: BlockTask;
  readonly #parts = new Map<GroupName, readonly QuantizedPart[]>();

  constructor(backend: Backend, task: BlockTask) {
    this.#backend = backend;
    this.#task = task;
  }

  async run(): Promise<BlockResult> {
    const stats = await this.#quantizeGroups();
    const units: Unit[] = [];
    for (const [group, parts] of this.#parts) units.push(...(await this.#units(group, parts)));
    const fixed = new Map<GroupName, Variable>();
    for (const group of GROUP_NAMES) {
      const { grid, weights, inFeatures } = this.#task.groups[group];
      if (!grid) fixed.set(group, constant(await channelMajor(this.#backend, weights, inFeatures)));
    }
    const curve = await this.#tune(units, fixed);
    const parts: Partial<Record<GroupName, QuantizedPart[]>> = {};
    for (const [group, before] of this.#parts) {
      parts[group] = before.map((part, i) => {
        const unit = units.find((u) => u.group === group && u.members.includes(i));
        return unit ? tuned(unit, part, before) : part;
      });
    }
    this.#backend.free(...units.map((u) => u.values), ...[...fixed.values()].map((v) => v.value));
    for (const { theta, channelScales, factors } of units)
      for (const v of [theta, channelScales, factors]) this.#backend.free(v.value, v.takeGradient());
    return {
      parts,
      curves: [curve],
      stats: { ...stats, 'tune.before': curve.validation[0], 'tune.after': curve.validation[curve.best] },
    };
  }

  /** The layer objective, group after group; each sees what the ones before it leave of its inputs. */
  async #quantizeGroups(): Promise<Record<string, number>> {
    const { layer, groups, settings } = this.#task;
    const backend = this.#backend;
    const loaded = new Map<GroupName, LinearGroup>();
    const stats: Record<string, number> = {};
    for (const group of GROUP_NAMES) {
      const { names, weights, outFeatures, inFeatures, grid } = groups[group];
      if (grid) {
        this.#task.checkAborted();
        this.#task.tell(`${group}: quantizing`);
        const statistics = new InputStatistics(backend);
        await this.#eachInput(group, loaded, (x) => statistics.add(x, {}));
        const { gram, cross } = await statistics.finish(`${group} of block ${layer}`);
        const layerRecipe = paroquant;
        const result = await layerRecipe.quantizeGroup(backend, {
          layer,
          group,
          names,
          weights,
          outFeatures,
          inFeatures,
          grid,
          gram,
          fold: noFold(inFeatures),
          settings,
        });
        backend.free(gram, cross);
        this.#parts.set(group, result.parts);
        stats[`${group}.error`] = result.stats['error'] ?? result.stats['error.0'];
      }
      loaded.set(group, await LinearGroup.load(backend, this.#loadable(group)));
    }
    for (const group of loaded.values()) group.release();
    return stats;
  }

  /** A group as the runtime would load it. */
  #loadable(group: GroupName): LinearPart[] {
    const { weights, outFeatures, inFeatures } = this.#task.groups[group];
    const bias = this.#task.fixed.biases[group];
    let begin = 0;
    return outFeatures.map((out, i) => {
      const part = this.#parts.get(group)?.[i];
      const own = bias?.slice(begin, begin + out);
      begin += out;
      return part
        ? { source: { kind: 'quantized', weight: part.weight, bias: own }, transform: part.transform }
        : { source: { kind: 'dense', weight: hostTensor('f32', [out, inFeatures], weights[i]), bias: own } };
    });
  }

  /** Runs the training sequences up to a group's input, through the groups loaded so far. */
  async #eachInput(
    group: GroupName,
    loaded: ReadonlyMap<GroupName, LinearGroup>,
    use: (x: Tensor) => Promise<void>,
  ): Promise<void> {
    const { training, length, fixed, rope } = this.#task;
    const { frame } = fixed;
    const backend = this.#backend;
    const perPass = Math.max(1, Math.floor(PASS_TOKENS / length));
    const depth = GROUP_NAMES.indexOf(group);
    const through = (name: GroupName, x: Tensor, residual?: Tensor): Promise<Tensor> => {
      const linear = loaded.get(name);
      if (!linear) throw new Error(`${name} is not loaded yet`);
      return linear.forward(x, residual);
    };
    for (let begin = 0; begin < training.count; begin += perPass) {
      const indices = Array.from({ length: Math.min(perPass, training.count - begin) }, (_, i) => begin + i);
      const { input, target } = await training.read(indices);
      const made: Tensor[] = [input, target];
      const keep = async (tensor: Tensor | Promise<Tensor>): Promise<Tensor> => {
        made.push(await tensor);
        return tensor;
      };
      const context = { batch: indices.length, start: 0, rope };
      let x = await keep(frame.attentionInput(input));
      if (depth > 0) x = await keep(frame.attend(await keep(through('qkv', x)), context));
      if (depth > 1) {
        const middle = await keep(through('o', x, input));
        x = await keep(frame.mlpInput(middle));
        if (depth > 2) x = await keep(frame.activate(await keep(through('gateUp', x))));
      }
      await use(x);
      backend.free(...made);
    }
  }

  async #units(group: GroupName, parts: readonly QuantizedPart[]): Promise<Unit[]> {
    const backend = this.#backend;
    const units: Unit[] = [];
    for (let i = 0; i < parts.length;) {
      const { transform, weight } = parts[i];
      if (!transform) throw new Error(`${group} has no transform to tune`);
      const members = [i++];
      while (i < parts.length && sameTransform(parts[i].transform, transform)) members.push(i++);
      const dense = members.map((m) => dequantized(parts[m]));
      const values = await channelMajor(backend, dense, weight.inFeatures);
      const { krot, channels } = transform;
      const ones = new Float32Array((channels / weight.groupSize) * values.shape[1]).fill(1);
      const upload = async (shape: readonly number[], data: Float32Array): Promise<Variable> =>
        parameter(await backend.upload(hostTensor('f32', shape, data.slice())));
      units.push({
        group,
        members,
        values,
        groupSize: weight.groupSize,
        layout: transform,
        theta: await upload([krot, channels / 2], transform.theta),
        channelScales: await upload([channels], transform.channelScales),
        factors: await upload([channels / weight.groupSize, values.shape[1]], ones),
      });
    }
    return units;
  }

  #tune(units: readonly Unit[], fixed: ReadonlyMap<GroupName, Variable>) {
    const backend = this.#backend;
    const { settings } = this.#task;
    const training = settings.block ?? DEFAULTS;
    const { transformRate, gridRate } = training;
    const model: BlockModel = {
      groups: [
        { parameters: units.map((u) => u.factors), learningRate: gridRate },
        ...(settings.krot > 0 ? [{ parameters: units.map((u) => u.theta), learningRate: transformRate }] : []),
        ...(settings.scales ? [{ parameters: units.map((u) => u.channelScales), learningRate: transformRate }] : []),
      ],
      prepare: async (tape) => {
        const weights = new Map<Unit, Variable>();
        for (const unit of units) weights.set(unit, await tape.scaleGroups(unit.values, unit.factors, unit.groupSize));
        return (batchTape): ApplyLinear =>
          async (group, input) => {
            const dense = fixed.get(group);
            if (dense) return batchTape.matmul(input, dense);
            const outputs: Variable[] = [];
            for (const [unit, weight] of weights) {
              if (unit.group !== group) continue;
              const turned = await batchTape.rotate(input, unit.layout, unit.theta, unit.channelScales);
              outputs.push(await batchTape.matmul(turned, weight));
            }
            return batchTape.concatColumns(outputs);
          };
      },
      keep: async () => {
        for (const unit of units) {
          unit.kept = {
            theta: await backend.download(unit.theta.value),
            channelScales: await backend.download(unit.channelScales.value),
            factors: await backend.download(unit.factors.value),
          };
        }
      },
    };
    return trainBlock(backend, this.#task, model, { ...training, stage: 'tune', rng: this.#rng() });
  }

  #rng() {
    return createRng(this.#task.settings.seed).fork(`${this.#task.layer}.tune`);
  }
}

/** (code − zero)·scale, [out, in]. */
function dequantized({ weight }: QuantizedPart): Float32Array {
  const { codes, zeros, scales, inFeatures, groupSize } = weight;
  return Float32Array.from(codes, (code, at) => {
    const slot = Math.floor(at / groupSize);
    return (code - zeros[slot]) * scales[slot];
  }).subarray(0, weight.outFeatures * inFeatures);
}

/** A part with its unit's tuned scales and transform, at stored precision. */
function tuned(unit: Unit, part: QuantizedPart, parts: readonly QuantizedPart[]): QuantizedPart {
  const { kept, layout } = unit;
  if (!kept) return part;
  const cols = unit.factors.value.shape[1];
  const index = parts.indexOf(part);
  const before = unit.members.filter((m) => m < index).reduce((sum, m) => sum + parts[m].weight.outFeatures, 0);
  const groups = part.weight.inFeatures / part.weight.groupSize;
  const scales = part.weight.scales.map((scale, at) => {
    const [out, group] = [Math.floor(at / groups), at % groups];
    return roundToF16(Math.max(scale * kept.factors[group * cols + before + out], MIN_GRID_SCALE));
  });
  const transform = roundTransform(
    layout,
    kept.theta,
    Float32Array.from(kept.channelScales, (a) => 1 / a),
  );
  return { weight: { ...part.weight, scales }, transform };
}
