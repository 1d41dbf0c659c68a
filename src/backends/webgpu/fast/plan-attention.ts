// A plan's attention: from the new q, k and v to the input of o's product, in one dispatch while contexts are short, in two after that.
import type { GpuLimits } from '../capabilities.js';
import type { GpuDevice, PreparedDispatch } from '../device.js';
import { withConstants } from '../kernel.js';
import { stagesOf } from './activations.js';
import { WHOLE_HEAD, wholeAttentionKernel, wholeMemory, type WholeAttentionVariant } from './attention-whole.js';
import { attentionGroups, decodeAttentionKernel } from './attention.js';
import { inputTables, type PlanBlock, type PlanModel } from './plan-model.js';
import { arithmetic } from './plan-products.js';

/** Where attention reads and writes, beside a block's caches. */
export interface AttentionBuffers {
  /** [batch, (heads + 2·kvHeads)·headDim] f32. */
  readonly qkv: GPUBuffer;
  /** [batch + 1]: tokens already in each cache, and how many they hold. */
  readonly positions: GPUBuffer;
  /** Parts of attention's result, and their statistics; see decodeAttentionKernel. */
  readonly parts: GPUBuffer;
  readonly stats: GPUBuffer;
  /** o's input, see activationKernel. */
  readonly x: GPUBuffer;
  readonly factors: GPUBuffer;
}

/** Attention of one block. */
export interface PlannedAttention {
  /** Writes x and factors; undefined where no kernel takes the model or the device. */
  readonly whole: PreparedDispatch | undefined;
  /** Writes parts and stats. */
  readonly ranged: PreparedDispatch;
}

/** Attention of `batch` sequences in `splits` ranges of keys. */
export function planAttention(
  gpu: GpuDevice,
  model: PlanModel,
  block: PlanBlock,
  { batch, splits }: { readonly batch: number; readonly splits: number },
  { qkv, positions, parts, stats, x, factors }: AttentionBuffers,
): PlannedAttention {
  const { heads, kvHeads, headDim, rotaryDim, eps } = model;
  const { headNorms, keys, values, grid, turn, window, o } = block;
  const scale = headDim ** -0.5;
  const cached = { qkv, norms: headNorms ?? qkv, rope: model.rope, positions, keys, values };
  const { shuffle } = arithmetic(gpu);
  const shape = { shuffle, heads, kvHeads, headDim, rotaryDim, qkNorm: headNorms !== undefined, window };
  const ranges = { ...shape, splits, grid, turn, ...attentionShape(heads / kvHeads) };
  // That kernel ends with o's rotations inside a head.
  const whole =
    o.row || grid || turn ? undefined : wholeVariant({ ...shape, stages: stagesOf(o.krot) }, batch, gpu.limits);
  return {
    whole:
      whole &&
      gpu.prepare(
        withConstants(wholeAttentionKernel(whole), { channels: heads * headDim, scale, eps }),
        { ...cached, ...inputTables(o), x, factors },
        {},
        [heads, batch],
      ),
    ranged: gpu.prepare(
      withConstants(decodeAttentionKernel(ranges), { scale, eps }),
      { ...cached, out: parts, stats },
      {},
      attentionGroups(ranges, batch),
    ),
  };
}

/** Keys up to which a head's attention in one workgroup is quicker than many, and their combination. */
export const WHOLE_KEYS = 1024;

/** Workgroups of wholeAttentionKernel up to which they run at once on a large GPU. */
const WHOLE_GROUPS = 128;

/** The variant of wholeAttentionKernel for a model's attention, where the kernel takes it and the device has room for it. */
function wholeVariant(
  shape: Omit<WholeAttentionVariant, 'teams' | 'unroll'> & { readonly headDim: number },
  batch: number,
  limits: GpuLimits,
): WholeAttentionVariant | undefined {
  if (shape.headDim !== WHOLE_HEAD || shape.heads * batch > WHOLE_GROUPS) return undefined;
  for (const teams of [16, 8]) {
    const variant = { ...shape, teams, unroll: 4 };
    if (
      teams * 32 <= limits.maxComputeInvocationsPerWorkgroup &&
      wholeMemory(variant) <= limits.maxComputeWorkgroupStorageSize &&
      Object.keys(wholeAttentionKernel(variant).buffers).length <= limits.maxStorageBuffersPerShaderStage
    )
      return variant;
  }
  return undefined;
}

/** How attention shares its work: up to four query heads per workgroup, as many as keep the accumulators in registers. */
export function attentionShape(group: number): { together: number; teams: number; unroll: number } {
  return { together: [4, 3, 2].find((n) => group % n === 0) ?? 1, teams: 4, unroll: 4 };
}

/** Ranges of keys: enough workgroups for short contexts to be quick, ranges of at least 64 keys. */
export function splitsFor(capacity: number, workgroups: number, fill = 256): number {
  const wanted = Math.ceil(fill / workgroups);
  return Math.max(1, Math.min(wanted, Math.ceil(capacity / 64), 48));
}
