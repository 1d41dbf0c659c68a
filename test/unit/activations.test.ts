// Dynamic grids by hand: the formulas of the op contract on numbers one can follow.
import { describe, expect, it } from 'vitest';
import { hostTensor } from '../../src/core/tensor.js';
import type { ActivationGrid } from '../../src/ops/backend.js';
import { createReferenceBackend, readF64 } from '../../src/ops/reference/backend.js';

async function quantize(values: readonly number[], grid: ActivationGrid): Promise<number[]> {
  const ops = createReferenceBackend();
  const x = await ops.upload(hostTensor('f64', [1, values.length], Float64Array.from(values)));
  return [...readF64(await ops.quantizeRows(x, grid))];
}

describe('quantizeRows', () => {
  it('symmetric: scale = max|x| / 7, ties to even, one level more below', async () => {
    const grid: ActivationGrid = { bits: 4, symmetric: true, groupSize: -1, clip: 1 };
    expect(await quantize([-14, 1, 3, 5, 2.1, 13.2], grid)).toEqual([-14, 0, 4, 4, 2, 14]);
  });

  it('symmetric with clipping: what lies beyond the range goes to its ends', async () => {
    const grid: ActivationGrid = { bits: 4, symmetric: true, groupSize: -1, clip: 0.5 };
    expect(await quantize([28, -28, 3, 4.5], grid)).toEqual([14, -16, 4, 4]);
  });

  it('asymmetric: the range is shrunk about its middle', async () => {
    const grid: ActivationGrid = { bits: 4, symmetric: false, groupSize: -1, clip: 0.5 };
    // min 10, max 70: mid 40, half 15, low 25, scale 2.
    expect(await quantize([10, 70, 26, 31.5, 40], grid)).toEqual([25, 55, 25, 31, 41]);
  });

  it('has a grid of its own for every group', async () => {
    const grid: ActivationGrid = { bits: 4, symmetric: true, groupSize: 2, clip: 1 };
    expect(await quantize([7, 1.2, 700, 120], grid)).toEqual([7, 1, 700, 100]);
  });

  it('refuses groups that do not tile the row, and clip ratios of 0', async () => {
    await expect(quantize([1, 2, 3], { bits: 4, symmetric: true, groupSize: 2, clip: 1 })).rejects.toThrow(
      /groups of 2/,
    );
    await expect(quantize([1, 2], { bits: 4, symmetric: true, groupSize: -1, clip: 0 })).rejects.toThrow(/clip/);
  });
});
