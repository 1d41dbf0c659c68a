// What recipes receive and return: one linear group at a time, with the statistics of its inputs.
import type { HostTensor } from '../core/tensor.js';
import type {
  ActivationGrid,
  Backend,
  GridSpec,
  PairwiseTransform,
  QuantizedWeight,
  RopeHandle,
  RoundedWeight,
  Tensor,
  WeightBits,
} from '../ops/backend.js';
import type { GroupName } from '../models/block.js';
import type { NarrowBits } from './grids/activations.js';
import type { FixedBlock } from './objectives/block.js';
import type { StageCurve } from './results.js';

export type { StageCurve } from './results.js';

/** How values land on the grid. */
export type Rounding = 'rtn' | 'gptq';

/** Where activation outliers are scaled into the weights: nowhere, before the down projection, at every linear group. */
export type SmoothedGroups = 'none' | 'down' | 'all';

/** Every setting of a quantization run that changes its result. Part of the fingerprint. */
export interface QuantizeSettings {
  readonly method: string;
  readonly bits: WeightBits;
  /** Input channels per grid group; -1: the whole input (per channel). */
  readonly groupSize: number;
  /** Rotations per group (ParoQuant); 0 learns scales alone. */
  readonly krot: number;
  /** Learn channel scales (ParoQuant). */
  readonly scales: boolean;
  /** One transform per linear group rather than one per projection (ParoQuant). */
  readonly share: boolean;
  /** Undefined: the recipe's own. */
  readonly rounding: Rounding | undefined;
  /** Optimiser steps per transform (ParoQuant). */
  readonly steps: number;
  readonly seed: number;
  /** Settings of recipes that train whole blocks; absent for the others. */
  readonly block?: BlockSettings;
  /** Bits of activations; 16 when undefined. */
  readonly actBits?: NarrowBits;
  /** Share of the range that a grid of activations keeps; by their bits when undefined. */
  readonly actClip?: number;
  /** Channels per grid of activations, −1: the token; which it is when undefined. */
  readonly actGroupSize?: number;
  /** Bits of keys and values; 16 when undefined. */
  readonly kvBits?: NarrowBits;
  /** Weigh tokens, and couple outputs, by what the model's predictions feel of their errors. */
  readonly sensitivity?: boolean;
  /** Fold Hadamard rotations into the model first (QuaRot). */
  readonly rotate?: boolean;
  /** Default none. */
  readonly smooth?: SmoothedGroups;
  /** Exponent of the smoothing scales by peaks; rule and exponent are searched when undefined. */
  readonly alpha?: number;
}

/** How a whole-block recipe trains; the defaults ({@link BLOCK_DEFAULTS}) are the published ones (design §4.4). */
export interface BlockSettings {
  /** Passes over the training sequences, per stage. */
  readonly epochs: number;
  /** Sequences per optimiser step. */
  readonly batch: number;
  /** Sequences held out to choose the best epoch; at most an eighth of all. */
  readonly validation: number;
  /** Loss on the block's output, and where smooth-L1 turns from squares to absolute values. */
  readonly loss: 'smooth-l1' | 'mse';
  readonly beta: number;
  /** Peak learning rate of angles and channel scales (stage 1), of weights, and of grid scales and zero points (stage 2). */
  readonly transformRate: number;
  readonly weightRate: number;
  readonly gridRate: number;
  readonly weightDecay: number;
  /** Stage 1 learns transforms, stage 2 weights and grids. */
  readonly stages: 'both' | 'transforms' | 'weights';
  /** How rotations pair channels: at random, largest with smallest magnitude, or those that learn the largest angles. */
  readonly pairs: 'random' | 'magnitude' | 'learned';
  /** Of products in training: f16 rounds their operands where the backend has matrix units for it; sums are f32. */
  readonly precision: 'f32' | 'f16';
}

/** The published settings. */
export const BLOCK_DEFAULTS: BlockSettings = {
  epochs: 10,
  batch: 16,
  validation: 64,
  loss: 'smooth-l1',
  beta: 1,
  transformRate: 0.05,
  weightRate: 1e-5,
  gridRate: 1e-6,
  weightDecay: 0.01,
  stages: 'both',
  pairs: 'random',
  precision: 'f32',
};

/** The linears of one group and what is known of their inputs. */
export interface GroupTask {
  readonly layer: number;
  readonly group: GroupName;
  /** Module names, e.g. `model.layers.0.self_attn.q_proj`, in merged order. */
  readonly names: readonly string[];
  /** Weights [out, in], f32, one per name. */
  readonly weights: readonly Float32Array[];
  readonly outFeatures: readonly number[];
  readonly inFeatures: number;
  readonly grid: GridSpec;
  /** Gram matrix XᵀX/n of the inputs the quantized model sees [in, in]; present when the recipe asked for it. */
  readonly gram?: Tensor;
  /** Cross-Gram X̃ᵀX/n, X̃ the reference path's inputs [in, in]; absent when equal to `gram` (first block) or replaced by `target`. */
  readonly cross?: Tensor;
  /** Rows of the inputs [rows, in], after the group's online transform and before any rounding; present when activations are
   * rounded after a transform that the recipe learns. */
  readonly sample?: HostTensor;
  /** Grid of the inputs, when they are rounded. */
  readonly activations?: ActivationGrid;
  /**
   * What the outputs should be, seen through the inputs the quantized model sees: Pᵗ = XᵀY/n [in, Σ out], Y the wanted
   * outputs. Present for groups that write to the residual stream (o, down), in place of `cross`: there Y is what brings
   * the quantized path's residual stream to the reference path's, so that it also makes good for earlier blocks' errors.
   */
  readonly target?: Tensor;
  /**
   * Second moment of the gradients of the merged outputs [Σ out, Σ out] (objectives/sensitivity.ts): present when it was
   * measured, and the recipe may round outputs together by it.
   */
  readonly outputs?: HostTensor;
  /** Where a scaling of the input can be folded: the preceding norm's weight, or the output rows of the preceding linear. */
  readonly fold: InputFold;
  readonly settings: QuantizeSettings;
}

/** See {@link GroupTask.fold}. */
export interface InputFold {
  /** For each input channel, the channel of the preceding op that scales it; several may share one. */
  readonly source: Int32Array;
  /** The nearest scale that the op before can take over; f16 rounding when undefined. */
  readonly roundScale?: (channel: number, scale: number) => number;
}

/** A linear as it will be stored. */
export interface QuantizedPart {
  readonly weight: QuantizedWeight;
  readonly transform?: PairwiseTransform;
}

/** What a recipe returns for a group. */
export interface GroupResult {
  readonly parts: readonly QuantizedPart[];
  /** Scales s [in] to fold: the input will arrive divided by s (AWQ). */
  readonly foldedScales?: Float32Array;
  /** Numbers for the log and the report, e.g. relative errors before and after. */
  readonly stats: Readonly<Record<string, number>>;
  /** Loss per optimiser step, when something was learned. */
  readonly curve?: readonly number[];
}

/** One linear group of a block to be trained. */
export interface BlockGroup {
  readonly names: readonly string[];
  /** Weights [out, in], f32, one per name. */
  readonly weights: readonly Float32Array[];
  readonly outFeatures: readonly number[];
  readonly inFeatures: number;
  /** Absent for groups that stay in 16 bits. */
  readonly grid?: GridSpec;
}

/** Sequences of one length with what a block should make of them. */
export interface BlockSamples {
  readonly count: number;
  /** Inputs of the quantized path and outputs of the reference path, [indices.length · length, hidden] each; the caller frees them. */
  read(indices: readonly number[]): Promise<{ input: Tensor; target: Tensor }>;
}

/** A whole decoder block, for recipes that train it as one function. */
export interface BlockTask {
  readonly layer: number;
  readonly fixed: FixedBlock;
  readonly groups: Readonly<Record<GroupName, BlockGroup>>;
  readonly rope: RopeHandle;
  /** Tokens per sequence. */
  readonly length: number;
  readonly training: BlockSamples;
  readonly validation: BlockSamples;
  readonly settings: QuantizeSettings;
  /** The stage that an interrupted run has finished of this block, if there is one. */
  finishedStage(): Promise<FinishedStage | undefined>;
  /** Keeps a stage for a run that goes on after it. */
  keepStage(stage: FinishedStage): Promise<void>;
  tell(message: string): void;
  checkAborted(): void;
}

/** A stage of a block's training that is over. */
export interface FinishedStage {
  readonly curve: StageCurve;
  /** What it has learned, f32, by names that the recipe gives. */
  readonly learned: ReadonlyMap<string, Float32Array>;
}

/** What a whole-block recipe returns. */
export interface BlockResult {
  /** Of every group with a grid. */
  readonly parts: Readonly<Partial<Record<GroupName, readonly QuantizedPart[]>>>;
  readonly stats: Readonly<Record<string, number>>;
  readonly curves: readonly StageCurve[];
}

interface RecipeBase {
  readonly name: string;
  /** One line for `--help` and reports. */
  readonly summary: string;
  /** Statistics it needs: nothing, the Gram matrix, or also what the reference path wants of each group (`cross` or `target`). */
  readonly needs: 'nothing' | 'gram' | 'cross-gram';
  /** Whether settings may ask for sensitivities. */
  readonly sensitive?: boolean;
  /** Whether it returns scales to fold into what comes before a linear. */
  readonly folds?: boolean;
  /** Layout of the checkpoint at 4 bits with groups; other widths use gyre's own. */
  readonly layout: 'awq' | 'paroquant' | 'gyre';
  /** Weights are on grids symmetric about 0. */
  readonly symmetric?: boolean;
  /**
   * How it rounds a weight [in, cols], stored channel-major, whose inputs have this Gram matrix, when it rounds in the space it is
   * given: what a search for smoothing scales judges them by.
   */
  readonly roundWeight?: (
    backend: Backend,
    w: Tensor,
    gram: Tensor,
    grid: GridSpec,
    rounding: Rounding | undefined,
  ) => Promise<RoundedWeight>;
  /** Settings where they differ from the common ones. */
  readonly defaults?: Partial<
    Pick<
      QuantizeSettings,
      'bits' | 'groupSize' | 'rotate' | 'smooth' | 'actBits' | 'actClip' | 'actGroupSize' | 'kvBits'
    >
  >;
}

/** A quantization method that works on one linear group at a time. */
export interface GroupRecipe extends RecipeBase {
  quantizeGroup(backend: Backend, task: GroupTask): Promise<GroupResult>;
}

/** A quantization method that trains a whole decoder block. */
export interface BlockRecipe extends RecipeBase {
  /** Whether a linear group shares one transform unless settings say otherwise. */
  readonly share: boolean;
  /** Settings of training unless given. */
  readonly training: BlockSettings;
  quantizeBlock(backend: Backend, task: BlockTask): Promise<BlockResult>;
}

/** A quantization method as an entry of the table in recipes/index.ts. */
export type Recipe = GroupRecipe | BlockRecipe;

/** Whether a recipe trains whole blocks. */
export function isBlockRecipe(recipe: Recipe): recipe is BlockRecipe {
  return 'quantizeBlock' in recipe;
}
