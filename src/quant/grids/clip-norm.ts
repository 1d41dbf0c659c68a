// Clip search on the weights alone: per group and column the share of the range whose rounding has the least Σ|w − ŵ|ᵖ.
// p = 2 is the mean squared error; p = 2.4, QuaRot's choice, minds large errors a little more. Needs no calibration, and
// costs per ratio one rounding, where the search on outputs (clip.ts) costs a product with the Gram matrix.
import type { Backend, GridSpec, Tensor } from '../../ops/backend.js';

/** Settings of {@link searchClipNorm}. */
export interface ClipNormOptions {
  /** Exponent p; default 2.4. */
  readonly exponent?: number;
  /** Smallest ratio tried; default 0.5. */
  readonly minimum?: number;
  /** Ratios tried between 1 and the minimum; default 12. */
  readonly steps?: number;
}

/**
 * @param w [in, cols] channel-major.
 * @returns [in / groupSize, cols], ratios in (minimum, 1].
 */
export async function searchClipNorm(
  backend: Backend,
  w: Tensor,
  grid: GridSpec,
  options: ClipNormOptions = {},
): Promise<Float32Array> {
  const { exponent = 2.4, minimum = 0.5, steps = 12 } = options;
  const [channels, cols] = w.shape;
  const size = (channels / grid.groupSize) * cols;
  const best = new Float32Array(size).fill(1);
  const bestError = new Float64Array(size).fill(Infinity);
  for (let step = 0; step < steps; step++) {
    const ratio = 1 - ((1 - minimum) * step) / steps;
    const rounded = await backend.roundToNearest(w, grid, new Float32Array(size).fill(ratio));
    const difference = await backend.download(await backend.addScaled(rounded.values, w, -1, true));
    backend.free(rounded.values);
    const error = new Float64Array(size);
    for (let i = 0, at = 0; i < channels; i++) {
      const group = Math.floor(i / grid.groupSize) * cols;
      for (let c = 0; c < cols; c++, at++) error[group + c] += Math.abs(difference[at]) ** exponent;
    }
    for (let s = 0; s < size; s++) {
      if (error[s] >= bestError[s]) continue;
      bestError[s] = error[s];
      best[s] = ratio;
    }
  }
  return best;
}
