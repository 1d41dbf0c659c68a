// Intervals for ratios of paired measurements: two models scored on the same windows of one text.
import { createRng } from '../../src/core/rng.js';

/** Resamples drawn. */
const RESAMPLES = 10_000;

/** A ratio with its bootstrap standard error and 95% interval. */
export interface RatioEstimate {
  readonly ratio: number;
  readonly standardError: number;
  readonly interval95: readonly [number, number];
}

/**
 * Σ a / Σ b over windows, with a block bootstrap: whole windows are drawn with replacement, the same for both, so that
 * what the two share (and the dependence of tokens inside a window) is kept. Seeded. Where b's sum is not safely above
 * zero the interval is wide or meaningless, and says so by its width.
 */
export function pairedRatio(a: readonly number[], b: readonly number[]): RatioEstimate {
  if (a.length !== b.length || a.length < 2) throw new Error(`${a.length} and ${b.length} windows cannot be paired`);
  const rng = createRng(0).fork('bootstrap');
  const ratios = new Float64Array(RESAMPLES);
  for (let r = 0; r < RESAMPLES; r++) {
    let [above, below] = [0, 0];
    for (let i = 0; i < a.length; i++) {
      const at = rng.int(0, a.length);
      above += a[at];
      below += b[at];
    }
    ratios[r] = above / below;
  }
  ratios.sort();
  const mean = ratios.reduce((s, v) => s + v, 0) / RESAMPLES;
  const sum = (values: readonly number[]): number => values.reduce((s, v) => s + v, 0);
  return {
    ratio: sum(a) / sum(b),
    standardError: Math.sqrt(ratios.reduce((s, v) => s + (v - mean) ** 2, 0) / (RESAMPLES - 1)),
    interval95: [ratios[Math.floor(0.025 * RESAMPLES)], ratios[Math.ceil(0.975 * RESAMPLES) - 1]],
  };
}
