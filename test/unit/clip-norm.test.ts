// The clip search on the host finds what rounding with each ratio and adding up |w − ŵ|ᵖ in float64 finds.
import { describe, expect, it } from 'vitest';
import { createRng } from '../../src/core/rng.js';
import { hostTensor } from '../../src/core/tensor.js';
import type { GridSpec } from '../../src/ops/backend.js';
import { createReferenceBackend } from '../../src/ops/reference/backend.js';
import { roundToNearest } from '../../src/ops/reference/quantize.js';
import { searchClipNorm } from '../../src/quant/grids/clip-norm.js';

const CHANNELS = 256;
const COLUMNS = 24;
const RATIOS = Array.from({ length: 12 }, (_, step) => 1 - (0.5 * step) / 12);

function weights(): Float32Array {
  const rng = createRng(11);
  return Float32Array.from({ length: CHANNELS * COLUMNS }, (_, at) => rng.normal() * (at % 61 === 0 ? 0.2 : 0.03));
}

/** Σ|w − ŵ|ᵖ of every group and column with its own ratio. */
function errors(w: Float32Array, grid: GridSpec, clip: Float32Array, exponent: number): Float64Array {
  const { values } = roundToNearest(Float64Array.from(w), CHANNELS, COLUMNS, grid, clip);
  const sums = new Float64Array(clip.length);
  values.forEach((value, at) => {
    const slot = Math.floor(at / COLUMNS / grid.groupSize) * COLUMNS + (at % COLUMNS);
    sums[slot] += Math.abs(value - w[at]) ** exponent;
  });
  return sums;
}

describe('searchClipNorm', () => {
  it.each([
    [{ bits: 4, groupSize: CHANNELS, symmetric: true }, 2.4],
    [{ bits: 4, groupSize: 64 }, 2.4],
    [{ bits: 3, groupSize: 128, symmetric: true }, 2],
    [{ bits: 8, groupSize: 64 }, 2],
  ] as const)('%o, p = %d: the least error of all ratios', async (grid, exponent) => {
    const w = weights();
    const backend = createReferenceBackend();
    const tensor = await backend.upload(hostTensor('f32', [CHANNELS, COLUMNS], w));
    const found = await searchClipNorm(backend, tensor, grid, { exponent });
    const slots = (CHANNELS / grid.groupSize) * COLUMNS;
    expect(found).toHaveLength(slots);
    const every = RATIOS.map((ratio) => errors(w, grid, new Float32Array(slots).fill(ratio), exponent));
    const own = errors(w, grid, found, exponent);
    // Ratios whose errors agree to a thousandth may change places.
    own.forEach((error, slot) => expect(error).toBeLessThanOrEqual(1.001 * Math.min(...every.map((e) => e[slot]))));
  });
});
