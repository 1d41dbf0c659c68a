// Sensitivities of fixtures: the same from the float64 oracle and in other passes, and against finite differences.
import path from 'node:path';
import { describe, expect, it } from 'vitest';
import { createRng } from '../../src/core/rng.js';
import { floats } from '../../src/core/tensor.js';
import { folderFiles } from '../../src/formats/source.node.js';
import { GROUP_NAMES } from '../../src/models/block.js';
import { openModel } from '../../src/models/load.js';
import { createReferenceBackend } from '../../src/ops/reference/backend.js';
import { openBackend } from '../../src/backends/registry.js';
import { measureSensitivity } from '../../src/quant/objectives/sensitivity.js';
import { FIXTURES, randomTokens } from '../support/pipeline.js';

describe('measureSensitivity', () => {
  it.each(['qwen3', 'qwen2'])('agrees between backends and with itself in other passes: %s', async (fixture) => {
    const source = await openModel(await folderFiles(path.join(FIXTURES, fixture)));
    const { config } = source;
    const ids = randomTokens(source, 3, 12);
    const backend = await openBackend('cpu');
    const measure = (on: typeof backend, rows: number) =>
      measureSensitivity(on, source, ids, { sequences: 3, rows, rng: createRng(4) });
    const [exact, whole, split] = [
      await measure(createReferenceBackend(), 36),
      await measure(backend, 36),
      await measure(backend, 12),
    ];
    await backend.dispose();
    expect(whole).toHaveLength(config.layers);
    for (const [layer, groups] of whole.entries()) {
      for (const group of GROUP_NAMES) {
        const { tokens, outputs } = groups[group];
        expect(tokens.reduce((a, b) => a + b, 0) / tokens.length).toBeCloseTo(1, 4);
        // Every token's output matters to itself and to those after it.
        expect(Math.min(...tokens)).toBeGreaterThan(0);
        for (const [at, w] of tokens.entries()) {
          expect(w / exact[layer][group].tokens[at]).toBeCloseTo(1, 2);
          expect(w / split[layer][group].tokens[at]).toBeCloseTo(1, 2);
        }
        expect(outputs === undefined).toBe(group === 'gateUp');
        if (!outputs) continue;
        const n = outputs.shape[0];
        const [moment, oracle] = [floats(outputs), floats(exact[layer][group].outputs ?? outputs)];
        const mean = Array.from({ length: n }, (_, i) => oracle[i * (n + 1)]).reduce((a, b) => a + b, 0) / n;
        for (const [at, value] of moment.entries()) {
          expect(Math.abs(value - oracle[at])).toBeLessThan(1e-3 * mean);
          expect(value).toBeCloseTo(moment[(at % n) * n + Math.floor(at / n)], 5);
        }
        if (group === 'qkv') expect(moment[config.headDim]).toBe(0);
      }
    }
    await source.checkpoint.close();
  });
});
