// What recipes receive and return: one linear group at a time, with the statistics of its inputs.
import type { Backend, GridSpec, PairwiseTransform, QuantizedWeight, Tensor, WeightBits } from '../ops/backend.js';
import type { GroupName } from '../models/block.js';

/** How values land on the grid. */
export type Rounding = 'rtn' | 'gptq';

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
}

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
  /** Cross-Gram X̃ᵀX/n, X̃ the reference path's inputs [in, in]; absent when equal to `gram` (first block). */
  readonly cross?: Tensor;
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

/** A quantization method as an entry of the table in recipes/index.ts. */
export interface Recipe {
  readonly name: string;
  /** One line for `--help` and reports. */
  readonly summary: string;
  /** Statistics it needs: nothing, the Gram matrix, or also the cross-Gram matrix with the reference path. */
  readonly needs: 'nothing' | 'gram' | 'cross-gram';
  /** Whether it returns scales to fold into what comes before a linear. */
  readonly folds?: boolean;
  /** Layout of the checkpoint at 4 bits with groups; other widths use gyre's own. */
  readonly layout: 'awq' | 'paroquant';
  quantizeGroup(backend: Backend, task: GroupTask): Promise<GroupResult>;
}
