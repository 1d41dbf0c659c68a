// A decoder in GPU memory as a decode plan takes it: weights, gains, rotation tables and caches by block, and which of them the
// kernels are written for.
import { GyreError } from '../../../core/errors.js';
import type { KvGrid } from '../../../ops/backend.js';
import type { BufferSlice } from '../device.js';
import type { RowVariant } from './row.js';
import type { EmbeddingType } from './sample.js';

/** A weight in GPU memory: int4 as gemv.ts lays it out, or [out, in] in 16 bits. */
export interface PlanWeight {
  readonly kind: 'int4' | 'f16' | 'bf16';
  readonly inFeatures: number;
  readonly outFeatures: number;
  /** Of int4's grid; the input's chunk otherwise. */
  readonly groupSize: number;
  readonly codes: GPUBuffer | BufferSlice;
  /** Of int4; any buffer otherwise. */
  readonly grid: GPUBuffer | BufferSlice;
  readonly bias?: GPUBuffer;
  /** Its input comes as signed bytes; see PlanRow. */
  readonly integers?: boolean;
}

/** What happens to a group's input as a whole row, in place of rotations inside groups of channels. */
export interface PlanRow {
  readonly hadamard?: RowVariant['hadamard'];
  /** Rounds the row onto a symmetric grid; its weights are `integers`. */
  readonly grid?: { readonly top: number; readonly clip: number };
}

/** The products of one linear group and the transforms of their input. */
export interface PlanGroup {
  /** One per distinct transform, in the order of their output columns. */
  readonly weights: readonly PlanWeight[];
  /** Rotations; 0 for none. */
  readonly krot: number;
  /** Without rotations: [weights, channels] f32, what multiplies the input (a norm's weight). */
  readonly gain?: GPUBuffer;
  /** Instead of rotations, for a single weight. */
  readonly row?: PlanRow;
  /** With rotations: tables of all weights' transforms, see rotationTable; what multiplies the input is in them. */
  readonly table?: GPUBuffer;
}

/** What a group's input is multiplied by and rotated with, by the names of kernels' buffers: a kernel has one of them. */
export function inputTables({ gain, table }: Pick<PlanGroup, 'gain' | 'table'>): { gain: GPUBuffer; table: GPUBuffer } {
  const made = gain ?? table;
  if (!made) throw new GyreError('backend', 'a linear group of a decode plan has neither a gain nor rotations');
  return { gain: made, table: table ?? made };
}

/** One block's weights and cache. */
export interface PlanBlock {
  readonly qkv: PlanGroup;
  readonly o: PlanGroup;
  readonly gateUp: PlanGroup;
  readonly down: PlanGroup;
  /** [2, headDim] f32: of q and k. In one buffer, since devices may allow no more than eight of them per kernel. */
  readonly headNorms?: GPUBuffer;
  /** [batch, kvHeads, capacity, headDim] f16, or codes on `grid`. */
  readonly keys: GPUBuffer;
  readonly values: GPUBuffer;
  readonly grid?: KvGrid | undefined;
  /** Hadamard transform of the heads of q and k after RoPE. */
  readonly turn?: boolean;
  /** Keys seen, 0 for all. */
  readonly window: number;
}

/** A whole decoder in GPU memory. */
export interface PlanModel {
  readonly hidden: number;
  readonly intermediate: number;
  readonly heads: number;
  readonly kvHeads: number;
  readonly headDim: number;
  readonly rotaryDim: number;
  readonly vocab: number;
  readonly eps: number;
  /** [positions, rotaryDim/2] (cos, sin) f32. */
  readonly rope: GPUBuffer;
  readonly embedding: { readonly table: GPUBuffer; readonly type: EmbeddingType };
  /** [vocab, hidden] f16, or int4. */
  readonly head:
    | { readonly kind: 'f16' | 'bf16'; readonly weight: GPUBuffer }
    | { readonly kind: 'int4'; readonly weight: PlanWeight };
  /** [hidden] f32. */
  readonly finalNorm: GPUBuffer;
  readonly blocks: readonly PlanBlock[];
}

/** Channels per grid or rotation group that the kernels take. */
export const PLAN_GROUPS: readonly number[] = [32, 64, 128];
/** Channels per head that the attention kernel takes. */
export const PLAN_HEADS: readonly number[] = [16, 32, 64, 128, 256];

/** Whether kernels for several sequences at once take a weight: neither codes of activations nor one grid per output. */
export const batches = ({ integers, groupSize }: Pick<PlanWeight, 'integers' | 'groupSize'>): boolean =>
  !integers && PLAN_GROUPS.includes(groupSize);
