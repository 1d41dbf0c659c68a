// Clip search: how far to shrink each group's range. A few extreme weights stretch the grid of all the others; giving
// up on them can cost less than it saves. Measured on the layer's own outputs, group by group (AWQ §3, "clip").
import type { Backend, GridSpec, Tensor } from '../../ops/backend.js';

/** Settings of {@link searchClip}. */
export interface ClipSearchOptions {
  /** Smallest ratio tried; default 0.5. */
  readonly minimum?: number;
  /** Ratios tried between 1 and the minimum; default 20. */
  readonly steps?: number;
}

/**
 * For every group and column the ratio r ≤ 1 of the min–max range with the least error
 * (w − ŵ)ᵀ·H_gg·(w − ŵ), H_gg the group's diagonal block of the Gram matrix.
 *
 * @param w [in, cols] channel-major.
 * @param gram [in, in].
 * @returns [in / groupSize, cols].
 */
export async function searchClip(
  backend: Backend,
  w: Tensor,
  gram: Tensor,
  grid: GridSpec,
  { minimum = 0.5, steps = 20 }: ClipSearchOptions = {},
): Promise<Float32Array> {
  const ratios = Array.from({ length: steps }, (_, step) => 1 - ((1 - minimum) * step) / steps);
  return backend.searchClip(w, gram, grid, ratios);
}
