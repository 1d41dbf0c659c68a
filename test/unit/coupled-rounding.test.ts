// Rounding outputs together: less of what predictions feel than output by output, on grids of the same kind.
import { describe, expect, it } from 'vitest';
import { createRng } from '../../src/core/rng.js';
import { hostTensor } from '../../src/core/tensor.js';
import { openBackend } from '../../src/backends/registry.js';
import type { Backend, RoundedWeight } from '../../src/ops/backend.js';
import { createReferenceBackend } from '../../src/ops/reference/backend.js';
import { roundCompensated } from '../../src/quant/recipes/compensated.js';
import { roundCoupled } from '../../src/quant/recipes/coupled.js';
import { paroquant } from '../../src/quant/recipes/paroquant.js';
import { noFold } from '../../src/quant/folding.js';
import type { GroupTask } from '../../src/quant/types.js';

const CHANNELS = 64;
const OUTPUTS = 48;
const GRID = { bits: 3, groupSize: 32 } as const;

/** AᵀA / rows of correlated normal rows [rows, n]. */
function moment(n: number, rows: number, seed: string): Float32Array {
  const rng = createRng(7).fork(seed);
  const mix = Float64Array.from({ length: n * n }, () => rng.normal() / Math.sqrt(n));
  const sum = new Float32Array(n * n);
  for (let r = 0; r < rows; r++) {
    const z = Float64Array.from({ length: n }, () => rng.normal());
    const x = z.map((value, i) => {
      let total = value / 4;
      for (let j = 0; j < n; j++) total += (z[j] * mix[j * n + i] * 2) / (1 + j / 8);
      return total;
    });
    for (let i = 0; i < n; i++) for (let j = 0; j < n; j++) sum[i * n + j] += (x[i] * x[j]) / rows;
  }
  return sum;
}

/** tr(G·Dᵗ·H·D), D [channels, outputs]. */
function felt(d: Float64Array, h: Float32Array, g: Float32Array): number {
  let total = 0;
  for (let i = 0; i < CHANNELS; i++) {
    for (let a = 0; a < OUTPUTS; a++) {
      let hd = 0;
      for (let j = 0; j < CHANNELS; j++) hd += h[i * CHANNELS + j] * d[j * OUTPUTS + a];
      for (let b = 0; b < OUTPUTS; b++) total += hd * g[a * OUTPUTS + b] * d[i * OUTPUTS + b];
    }
  }
  return total;
}

async function problem(backend: Backend) {
  const rng = createRng(3);
  const w = Float32Array.from({ length: CHANNELS * OUTPUTS }, () => rng.normal());
  const h = moment(CHANNELS, 400, 'inputs');
  const g = moment(OUTPUTS, 400, 'outputs');
  const weight = await backend.upload(hostTensor('f32', [CHANNELS, OUTPUTS], w));
  const gram = await backend.upload(hostTensor('f32', [CHANNELS, CHANNELS], h));
  const difference = async (rounded: RoundedWeight) =>
    Float64Array.from(await backend.download(rounded.values), (value, at) => value - w[at]);
  return { w, h, g, weight, gram, difference, outputs: hostTensor('f32', [OUTPUTS, OUTPUTS], g) };
}

describe('roundCoupled', () => {
  it.each([
    ['reference', () => Promise.resolve(createReferenceBackend())],
    ['cpu', () => openBackend('cpu')],
  ] as const)('lowers tr(G·Dᵗ·H·D) on %s', async (_name, open) => {
    const backend: Backend = await open();
    const { h, g, weight, gram, outputs, difference } = await problem(backend);
    const apart = await difference(await roundCompensated(backend, weight, gram, GRID));
    const coupled = await roundCoupled(backend, weight, gram, outputs, GRID);
    expect(felt(await difference(coupled), h, g)).toBeLessThan(0.9 * felt(apart, h, g));
    const values = await backend.download(coupled.values);
    for (let i = 0; i < CHANNELS; i++) {
      for (let c = 0; c < OUTPUTS; c++) {
        const slot = Math.floor(i / GRID.groupSize) * OUTPUTS + c;
        const code = coupled.codes[i * OUTPUTS + c];
        expect(values[i * OUTPUTS + c]).toBeCloseTo((code - coupled.zeros[slot]) * coupled.scales[slot], 6);
      }
    }
    await backend.dispose();
  });

  it('is rounding output by output when nothing was measured', async () => {
    const backend = createReferenceBackend();
    const { weight, gram } = await problem(backend);
    const nothing = hostTensor('f32', [OUTPUTS, OUTPUTS], new Float32Array(OUTPUTS ** 2));
    const coupled = await roundCoupled(backend, weight, gram, nothing, GRID);
    expect(coupled.codes).toEqual((await roundCompensated(backend, weight, gram, GRID)).codes);
  });

  it('couples the outputs of each projection where each has a transform of its own', async () => {
    const backend = await openBackend('cpu');
    const { w, g, gram } = await problem(backend);
    // Outputs by rows, as checkpoints have them: the first 16 and the other 32.
    const rows = Float32Array.from(w, (_, at) => w[(at % CHANNELS) * OUTPUTS + Math.floor(at / CHANNELS)]);
    const sizes = [16, 32];
    const weights = [rows.slice(0, 16 * CHANNELS), rows.slice(16 * CHANNELS)];
    const part = (begin: number, size: number) =>
      hostTensor(
        'f32',
        [size, size],
        Float32Array.from(
          { length: size * size },
          (_, at) => g[(begin + Math.floor(at / size)) * OUTPUTS + begin + (at % size)],
        ),
      );
    const task = (names: string[], which: number[], outputs: GroupTask['outputs']): GroupTask => ({
      layer: 0,
      group: 'gateUp',
      names,
      weights: which.map((i) => weights[i]),
      inFeatures: CHANNELS,
      outFeatures: which.map((i) => sizes[i]),
      grid: GRID,
      gram,
      outputs,
      fold: noFold(CHANNELS),
      settings: {
        method: 'paroquant',
        rounding: undefined,
        bits: 3,
        groupSize: 32,
        krot: 2,
        scales: true,
        share: false,
        steps: 4,
        seed: 0,
      },
    });
    const both = await paroquant.quantizeGroup(
      backend,
      task(['a', 'b'], [0, 1], hostTensor('f32', [OUTPUTS, OUTPUTS], g)),
    );
    const second = await paroquant.quantizeGroup(backend, task(['b'], [1], part(16, 32)));
    const uncoupled = await paroquant.quantizeGroup(backend, task(['b'], [1], undefined));
    expect(both.parts[1].weight.codes).toEqual(second.parts[0].weight.codes);
    expect(both.parts[1].weight.codes).not.toEqual(uncoupled.parts[0].weight.codes);
    await backend.dispose();
  });
});
