// The preflight plan: what will be done to every linear, and what it costs, before anything is read or written.
import { GyreError } from '../core/errors.js';
import { GROUP_NAMES, RESIDUAL_GROUPS, type GroupName } from '../models/block.js';
import type { ModelConfig } from '../models/config.js';
import { groupShape } from '../models/load.js';
import { findHadamardBase, largestHadamardOrder } from '../transforms/index.js';
import { activationGroup, isPrepared } from './prepare.js';
import { isBlockRecipe, type QuantizeSettings, type Recipe } from './types.js';

/** What happens to a linear group. */
export type GroupDecision =
  { readonly kind: 'quantize'; readonly groupSize: number } | { readonly kind: 'keep'; readonly reason: string };

/** Storage layout of the quantized linears (docs/formats.md). */
export type Layout = 'awq' | 'paroquant' | 'gyre';

/** The plan of a run. Bytes and FLOPs are estimates for people; decisions are binding. */
export interface QuantizePlan {
  readonly decisions: Readonly<Record<GroupName, GroupDecision>>;
  readonly layout: Layout;
  /** Things the user should know: smaller groups, linears left in 16 bits, a layout other loaders don't read. */
  readonly notes: readonly string[];
  readonly calibrationTokens: number;
  /** Peak working memory beside the runtime itself. */
  readonly memoryBytes: number;
  /** Size of the result on disk. */
  readonly outputBytes: number;
  readonly floatingPointOperations: number;
  /** Bits per quantized weight with scales, zero points and transforms. */
  readonly bitsPerWeight: number;
}

/** Group sizes tried, largest first, when the wanted one does not divide the input. */
const FALLBACK_GROUPS = [128, 64, 32] as const;

/** Decides the grid of each group's input and estimates the run. Pure: reads nothing but the config. */
export function planQuantization(
  config: ModelConfig,
  settings: QuantizeSettings,
  recipe: Recipe,
  calibration: { readonly sequences: number; readonly length: number },
  otherBytes: number,
): QuantizePlan {
  const notes: string[] = [];
  const decisions = {} as Record<GroupName, GroupDecision>;
  for (const group of GROUP_NAMES)
    decisions[group] = decide(group, groupShape(config, group).inFeatures, settings.groupSize, notes);
  const quantized = GROUP_NAMES.filter((g) => decisions[g].kind === 'quantize');
  if (quantized.length === 0) {
    throw new GyreError(
      'unsupported',
      `no linear of this model has an input that groups of ${FALLBACK_GROUPS.join(', ')} channels divide`,
      {
        remedy: 'quantize per channel: --group-size -1',
      },
    );
  }
  const layout = chooseLayout(config, settings, recipe, quantized, notes);
  if (settings.rotate) describeRotation(config, notes);
  const { actGroupSize = -1 } = settings;
  const group = activationGroup(config, actGroupSize);
  if (group !== actGroupSize)
    notes.push(
      `activations: groups of ${actGroupSize} do not tile every linear's input; ${group === -1 ? 'one grid per token' : `groups of ${group}`} instead`,
    );
  return {
    decisions,
    layout,
    notes,
    calibrationTokens: recipe.needs === 'nothing' ? 0 : calibration.sequences * calibration.length,
    ...estimate(config, settings, recipe, decisions, calibration, otherBytes),
  };
}

function decide(group: GroupName, inFeatures: number, wanted: number, notes: string[]): GroupDecision {
  if (wanted === -1) return { kind: 'quantize', groupSize: inFeatures };
  if (inFeatures % wanted === 0) return { kind: 'quantize', groupSize: wanted };
  const smaller = FALLBACK_GROUPS.find((size) => size < wanted && inFeatures % size === 0);
  if (smaller !== undefined) {
    notes.push(`${group}: its ${inFeatures} input channels are no multiple of ${wanted}; groups of ${smaller} instead`);
    return { kind: 'quantize', groupSize: smaller };
  }
  const reason = `its ${inFeatures} input channels are no multiple of ${wanted} or any smaller group size; left in 16 bits (--group-size -1 would quantize it per channel)`;
  notes.push(`${group}: ${reason}`);
  return { kind: 'keep', reason };
}

/** What of a model has no Hadamard matrix of its own size. */
function describeRotation(config: ModelConfig, notes: string[]): void {
  const widths: readonly (readonly [string, number])[] = [
    ['the residual stream', config.hiddenSize],
    ["down's input", config.intermediateSize],
    ['heads', config.headDim],
    ...(findHadamardBase(config.heads) ? [] : ([["o's input", config.heads * config.headDim]] as const)),
  ];
  for (const [what, width] of widths) {
    const order = largestHadamardOrder(width);
    if (order < width)
      notes.push(
        `rotation: ${what} of ${width} channels is turned in blocks of ${order}: no Hadamard matrix of its size is known here`,
      );
  }
  if (config.tiedEmbeddings)
    notes.push('rotation: the tied output head becomes a matrix of its own, stored in 16 bits');
}

function chooseLayout(
  config: ModelConfig,
  settings: QuantizeSettings,
  recipe: Recipe,
  quantized: readonly GroupName[],
  notes: string[],
): Layout {
  if (settings.bits !== 4 || recipe.layout === 'gyre') return 'gyre';
  if (isPrepared(settings)) {
    notes.push(
      "online transforms and grids of activations are stored in gyre's own layout, which other loaders do not read",
    );
    return 'gyre';
  }
  if (recipe.layout === 'paroquant' && settings.krot === 0) {
    notes.push("without rotations the transform is stored in gyre's own layout, which other loaders do not read");
    return 'gyre';
  }
  if (settings.groupSize === -1) {
    notes.push("per-channel grids are stored in gyre's own layout, which other loaders do not read");
    return 'gyre';
  }
  const odd = quantized.find((g) => groupShape(config, g).outFeatures.some((out) => out % 8 !== 0));
  if (odd) {
    notes.push(
      `${odd}: output features are no multiple of 8, so the ${recipe.layout} layout cannot hold it; gyre's own layout is used`,
    );
    return 'gyre';
  }
  return recipe.layout;
}

function estimate(
  config: ModelConfig,
  settings: QuantizeSettings,
  recipe: Recipe,
  decisions: Readonly<Record<GroupName, GroupDecision>>,
  calibration: { readonly sequences: number; readonly length: number },
  otherBytes: number,
) {
  const tokens = recipe.needs === 'nothing' ? 0 : calibration.sequences * calibration.length;
  let [weights, storedBits, quantizedWeights, keptBytes, flops, largest, widest] = [0, 0, 0, 0, 0, 0, 0];
  const paths = recipe.needs === 'cross-gram' ? 2 : 1;
  for (const group of GROUP_NAMES) {
    const { inFeatures, outFeatures } = groupShape(config, group);
    const out = outFeatures.reduce((a, b) => a + b, 0);
    const count = inFeatures * out;
    weights += count;
    widest = Math.max(widest, inFeatures);
    const decision = decisions[group];
    if (decision.kind === 'keep') {
      keptBytes += count * 2;
    } else {
      const perWeight = settings.bits + (16 + settings.bits) / decision.groupSize;
      const transform =
        recipe.layout === 'paroquant'
          ? outFeatures.length * inFeatures * (8 * settings.krot + 16 * settings.krot + 16)
          : 0;
      storedBits += count * perWeight + transform;
      quantizedWeights += count;
      const learnedColumns = Math.min(out, 512);
      if (recipe.needs !== 'nothing') flops += 2 * inFeatures ** 2 * (tokens + 3 * out + 3 * inFeatures);
      // With two paths the cross-Gram matrix, or the product with the wanted outputs.
      if (paths === 2) flops += 2 * inFeatures * (RESIDUAL_GROUPS.has(group) ? out : inFeatures) * tokens;
      // Learning; then seven sweeps of descent and two refits, one and a half products with H each.
      if (recipe.layout === 'paroquant') flops += 2 * inFeatures ** 2 * (settings.steps * learnedColumns + 13 * out);
    }
    flops += 2 * count * tokens * 2;
    // Forward, gradient of inputs, gradient of weights.
    flops += 6 * count * tokens * trainingPasses(recipe, settings);
    largest = Math.max(largest, count);
  }
  const stream = tokens * config.hiddenSize * 4 * (paths === 2 ? 2 : 1);
  const intermediate = tokens * Math.max(config.intermediateSize, config.heads * config.headDim) * 4;
  return {
    memoryBytes: isBlockRecipe(recipe)
      ? weights * 4 * TRAINING_COPIES + trainingActivations(config) + stream
      : weights * 8 + largest * 12 + widest ** 2 * 40 + stream + intermediate,
    outputBytes: Math.ceil((storedBits / 8 + keptBytes) * config.layers + otherBytes),
    floatingPointOperations: flops * config.layers,
    bitsPerWeight: quantizedWeights === 0 ? 16 : storedBits / quantizedWeights,
  };
}

/** Copies of a block's weights while it is trained: values, gradients, two moments, and what transforms make of them. */
const TRAINING_COPIES = 10;
/** Tokens of a training pass. */
const TRAINING_TOKENS = 4096;

/** Passes of a whole-block recipe over its calibration tokens. */
function trainingPasses(recipe: Recipe, settings: QuantizeSettings): number {
  if (!isBlockRecipe(recipe)) return 0;
  const { epochs, stages } = settings.block ?? recipe.training;
  return epochs * (stages === 'both' ? 2 : 1);
}

/** Values and gradients that the tape of a training pass holds. */
function trainingActivations({ hiddenSize, intermediateSize, heads, kvHeads, headDim }: ModelConfig): number {
  const perToken = 8 * hiddenSize + 4 * (heads + kvHeads) * headDim + 5 * intermediateSize;
  return 2 * TRAINING_TOKENS * perToken * 4;
}
