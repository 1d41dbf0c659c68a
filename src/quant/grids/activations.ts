// The grids of activations, keys and values that recipes use, by bit width.
import type { ActivationGrid, KvGrid } from '../../ops/backend.js';

/** Bits of activations, keys and values below 16. */
export type NarrowBits = 4 | 8;

/** Share of a token's range that its grid keeps: at 4 bits, giving up the extremes costs less than the steps they save. */
const ACTIVATION_CLIP: Readonly<Record<NarrowBits, number>> = { 4: 0.9, 8: 1 };
const KV_CLIP: Readonly<Record<NarrowBits, number>> = { 4: 0.95, 8: 1 };

/** Symmetric, one grid per token, or per token and run of `groupSize` channels. */
export function activationGrid(
  bits: NarrowBits,
  options: { readonly clip?: number; readonly groupSize?: number } = {},
): ActivationGrid {
  return { bits, symmetric: true, groupSize: options.groupSize ?? -1, clip: options.clip ?? ACTIVATION_CLIP[bits] };
}

/** Asymmetric, one grid per token and head. */
export function kvGrid(bits: NarrowBits): KvGrid {
  return { bits, clip: KV_CLIP[bits] };
}
