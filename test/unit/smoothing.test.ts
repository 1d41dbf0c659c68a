// The search for smoothing scales: rules undo a planted scaling exactly; smoothing is chosen where it lowers the error of the
// rounded group on unseen tokens, and left out where it does not.
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { openBackend } from '../../src/backends/registry.js';
import { createRng } from '../../src/core/rng.js';
import { hostTensor } from '../../src/core/tensor.js';
import type { Backend } from '../../src/ops/backend.js';
import { activationGrid } from '../../src/quant/grids/activations.js';
import { searchSmoothing, type SmoothingTask } from '../../src/quant/objectives/smoothing.js';
import { findRecipe } from '../../src/quant/recipes/index.js';
import { hadamardTransform } from '../../src/transforms/index.js';

const IN = 128;
const OUT = 256;
const ROWS = 2048;

describe('smoothing', () => {
  let backend: Backend;
  beforeAll(async () => {
    backend = await openBackend('cpu', { threads: 1 });
  });
  afterAll(() => backend.dispose());

  /** Gaussian inputs and weights; channel c of the inputs times factors[c], its weights divided by them. */
  function task(factors: ReadonlyMap<number, number>, rounding: 'rtn' | 'gptq'): SmoothingTask {
    const rng = createRng(1);
    const factor = (c: number): number => factors.get(c) ?? 1;
    const x = Float32Array.from({ length: ROWS * IN }, (_, at) => rng.normal() * factor(at % IN));
    const w = Float32Array.from({ length: OUT * IN }, (_, at) => rng.normal() / factor(at % IN));
    const peaks = new Float64Array(IN);
    x.forEach((v, at) => (peaks[at % IN] = Math.max(peaks[at % IN], Math.abs(v))));
    const recipe = findRecipe('smoothrot');
    return {
      weights: [w],
      peaks,
      rows: hostTensor('f32', [ROWS, IN], x),
      transform: hadamardTransform(IN, { order: IN }),
      grid: { bits: 4, groupSize: IN, symmetric: true },
      activations: activationGrid(4),
      round: async (weight, gram, grid) => {
        const rounded = await recipe.roundWeight?.(backend, weight, gram, grid, rounding);
        if (!rounded) throw new Error('smoothrot rounds weights as they are');
        return rounded.values;
      },
    };
  }

  const PLANTED = new Map([
    [3, 300],
    [77, 500],
  ]);

  it.each(['rtn', 'gptq'] as const)('undoes a planted scaling, %s', async (rounding) => {
    const choice = await searchSmoothing(backend, task(PLANTED, rounding));
    expect(choice.rule?.by).toBe('energies');
    const plain = await searchSmoothing(backend, { ...task(new Map(), rounding), alpha: 0.5 });
    expect(plain.rule).toEqual({ by: 'peaks', exponent: 0.5 });
    const scales = choice.scales ?? new Float64Array(IN);
    const others = scales.filter((_, c) => !PLANTED.has(c));
    const typical = Math.exp(others.reduce((sum, s) => sum + Math.log(s), 0) / others.length);
    // Up to the exponent chosen and what random inputs differ by.
    for (const [c, factor] of PLANTED)
      expect(Math.log(scales[c] / typical) / Math.log(factor)).toBeCloseTo(choice.rule?.exponent ?? 0, 1);
    const chosen = choice.errors.find(({ rule }) => rule?.by === 'energies' && rule.exponent === choice.rule?.exponent);
    expect(chosen?.error).toBeLessThan(0.2);
  });

  it.each(['rtn', 'gptq'] as const)('leaves inputs without outliers alone, %s', async (rounding) => {
    const choice = await searchSmoothing(backend, task(new Map(), rounding));
    expect(choice.rule).toBeUndefined();
    expect(choice.scales).toBeUndefined();
    expect(choice.errors[0]).toEqual({ rule: null, error: 1 });
  });

  it('gives channels that must share a scale the same one', async () => {
    const shared = { ...task(PLANTED, 'rtn'), sharedChannel: (c: number) => c % 64 };
    const { scales } = await searchSmoothing(backend, shared);
    expect(scales).toBeDefined();
    scales?.forEach((s, c) => expect(s).toBe(scales[c % 64]));
  });
});
