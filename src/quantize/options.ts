// What `gyre quantize` takes and gives back.
import type { BackendName } from '../backends/registry.js';
import type { ProgressListener } from '../core/progress.js';
import type { Backend, WeightBits } from '../ops/backend.js';
import type { CalibrationTokens } from '../quant/calibration/tokens.js';
import type { BlockReport, GroupReport, PipelineReport } from '../quant/run.js';
import type { QuantizePlan } from '../quant/plan.js';
import type { SmoothingRule } from '../quant/objectives/smoothing.js';
import type { QuantizationRecord } from '../quant/results.js';
import type { NarrowBits } from '../quant/grids/activations.js';
import type { BlockSettings, QuantizeSettings, Rounding, SmoothedGroups } from '../quant/types.js';

/** Options of quantizeCheckpoint (quantize.node.ts); all but `model` and `out` have defaults. */
export interface QuantizeOptions {
  /** Folder, or hub id `owner/name`. */
  readonly model: string;
  readonly revision?: string;
  /** Hub access token; default HF_TOKEN or the stored one. */
  readonly token?: string;
  /** Folder to make. It appears whole, at the end. */
  readonly out: string;
  /** Recipe; default `lowbit` with 4-bit activations, otherwise `paroquant`. */
  readonly method?: string;
  /** Default 4 (8 with `smoothquant`). */
  readonly bits?: WeightBits;
  /** Input channels per group, -1 per channel; default 128, -1 with `smoothquant`, `quarot` and `smoothrot`. */
  readonly groupSize?: number;
  /** Rotations; default 8. */
  readonly krot?: number;
  readonly scales?: boolean;
  readonly share?: boolean;
  readonly rounding?: Rounding;
  /** Weigh tokens and couple outputs by what the model's predictions feel of their errors (paroquant); default false. */
  readonly sensitivity?: boolean;
  /** Optimiser steps per transform; default 100. */
  readonly steps?: number;
  readonly seed?: number;
  /** Settings of recipes that train whole blocks; the rest default to the published ones. */
  readonly block?: Partial<BlockSettings>;
  /** Bytes of residual streams that such recipes may keep in memory; more goes to disk. Default half of what is free. */
  readonly activationBytes?: number;
  /** Bits of activations; default 16, or the recipe's own. */
  readonly actBits?: NarrowBits | 16;
  /** Share of the range that a grid of activations keeps, 0 … 1; default by bits, or the recipe's own. */
  readonly actClip?: number;
  /** Channels per grid of activations: 32, 64, 128, or −1 for one per token; default −1, or the recipe's own. */
  readonly actGroupSize?: number;
  /** Bits of keys and values; default 16, or the recipe's own; with a recipe that rounds them, as many as activations have. */
  readonly kvBits?: NarrowBits | 16;
  /** Fold Hadamard rotations into the model first; default as the recipe has it. */
  readonly rotate?: boolean;
  /** Where activation outliers are scaled into the weights; default as the recipe has it. */
  readonly smooth?: SmoothedGroups;
  /** Exponent of the smoothing scales, 0 … 1; searched block by block when undefined. */
  readonly alpha?: number;
  /** Calibration texts (.txt, .jsonl with "text"); without any, the model writes its own. */
  readonly calib?: readonly string[];
  /** Calibration sequences made before (by writeCalibrationText, say), instead of texts. */
  readonly calibrationTokens?: CalibrationTokens;
  /** Calibration sequences; default calibrationSequences (quant/calibration/tokens.ts). */
  readonly calibSamples?: number;
  /** Tokens per calibration sequence; default 512. */
  readonly seqLen?: number;
  /** Default: the machine's cores. */
  readonly threads?: number;
  readonly device?: BackendName;
  /** An open backend to run on, in place of one of `device` opened for the call; it stays open. */
  readonly backend?: Backend;
  /** Continue an interrupted run. */
  readonly resume?: boolean;
  /** Plan only. */
  readonly dryRun?: boolean;
  readonly signal?: AbortSignal;
  readonly onProgress?: ProgressListener;
  /** Called with the plan before anything is written. */
  readonly onPlan?: (plan: QuantizePlan & { readonly lines: readonly string[] }) => void;
}

/** What quantizeCheckpoint (quantize.node.ts) returns; also written to `gyre.json` (without `out` and times). */
export interface QuantizeReport {
  readonly out: string;
  /** True when an equal run had finished it before, or for a dry run: nothing was done. */
  readonly skipped: boolean;
  readonly method: string;
  readonly bits: WeightBits;
  /** -1: per channel. */
  readonly groupSize: number;
  readonly settings: QuantizeSettings;
  readonly layout: QuantizePlan['layout'];
  readonly bitsPerWeight: number;
  /** Bytes of the quantized linears and of all tensors; 0 when skipped. */
  readonly linearBytes: number;
  readonly calibration: string;
  readonly notes: readonly string[];
  readonly seconds: number;
  readonly breakdown: PipelineReport['seconds'] & { readonly calibrationText: number };
  readonly groups: readonly GroupReport[];
  /** Of recipes that train whole blocks; losses by epoch are in `training.json` beside the weights. */
  readonly blocks?: readonly BlockReport[];
  /** Smoothing as searched or given, per block and group. */
  readonly smoothing: readonly {
    readonly layer: number;
    readonly group: string;
    /** Null: no smoothing. */
    readonly rule: SmoothingRule | null;
  }[];
  /** What was written to `gyre-report.json`; undefined when nothing was done. */
  readonly record: QuantizationRecord | undefined;
}
