// Sensitivities of fixtures: the same from the float64 oracle and in other batches, and what they are used for.
import path from 'node:path';
import { describe, expect, it } from 'vitest';
import { createRng } from '../../src/core/rng.js';
import { folderFiles } from '../../src/formats/source.node.js';
import { GROUP_NAMES } from '../../src/models/block.js';
import { openModel } from '../../src/models/load.js';
import { createReferenceBackend } from '../../src/ops/reference/backend.js';
import { openBackend } from '../../src/backends/registry.js';
import { measureSensitivity, weighRows } from '../../src/quant/objectives/sensitivity.js';
import { FIXTURES, randomTokens } from '../support/pipeline.js';

describe('measureSensitivity', () => {
  it.each(['qwen3', 'qwen2'])('agrees between backends and with itself in other batches: %s', async (fixture) => {
    const source = await openModel(await folderFiles(path.join(FIXTURES, fixture)));
    const ids = randomTokens(source, 3, 12);
    const backend = await openBackend('cpu');
    const measure = (on: typeof backend, batch: number) =>
      measureSensitivity(on, source, ids, { sequences: 3, batch, rng: createRng(4) });
    const [exact, whole, split] = [
      await measure(createReferenceBackend(), 3),
      await measure(backend, 3),
      await measure(backend, 1),
    ];
    await backend.dispose();
    expect(whole).toHaveLength(source.config.layers);
    for (const [layer, groups] of whole.entries()) {
      for (const group of GROUP_NAMES) {
        const weights = groups[group];
        expect(weights.reduce((a, b) => a + b, 0) / weights.length).toBeCloseTo(1, 4);
        // Every token's output matters to itself and to those after it.
        expect(Math.min(...weights)).toBeGreaterThan(0);
        for (const [at, w] of weights.entries()) {
          expect(w / exact[layer][group][at]).toBeCloseTo(1, 2);
          expect(w / split[layer][group][at]).toBeCloseTo(1, 2);
        }
      }
    }
    await source.checkpoint.close();
  });

  it('weighRows makes the weighted Gram matrix', async () => {
    const backend = createReferenceBackend();
    const x = backend.upload({ dtype: 'f32', shape: [2, 2], data: Float32Array.of(1, 2, 3, 4) });
    const weighed = await weighRows(backend, await x, Float32Array.of(4, 0.25));
    expect([...(await backend.download(weighed))]).toEqual([2, 4, 1.5, 2]);
  });
});
