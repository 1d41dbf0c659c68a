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
import { FIXTURES, randomTokens, sensitivityOf } from '../support/pipeline.js';

describe('measureSensitivity', () => {
  it.each(['qwen3', 'qwen2'])('agrees between backends and with itself in other passes: %s', async (fixture) => {
    const source = await openModel(await folderFiles(path.join(FIXTURES, fixture)));
    const { config } = source;
    const ids = randomTokens(source, 3, 12);
    const backend = await openBackend('cpu');
    const measure = (on: typeof backend, rows: number) =>
      sensitivityOf(on, source, ids, { sequences: 3, rows, rng: createRng(4) });
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

  it('measures tokens in rounds when inputs of all do not fit, outputs in the last of them', async () => {
    const source = await openModel(await folderFiles(path.join(FIXTURES, 'qwen3')));
    const { config } = source;
    const ids = randomTokens(source, 5, 8);
    const backend = createReferenceBackend();
    // Labels of last tokens are drawn by sequence, whoever else is in the round.
    const options = { sequences: 5, rng: createRng(4) };
    const whole = await sensitivityOf(backend, source, ids, options);
    const pair = 2 * 8 * config.hiddenSize * config.layers * 4;
    const rounds = await sensitivityOf(backend, source, ids, { ...options, keptBytes: pair });
    for (const [layer, groups] of rounds.entries()) {
      for (const group of GROUP_NAMES) {
        const { tokens, outputs } = groups[group];
        for (const [at, w] of tokens.entries()) expect(w / whole[layer][group].tokens[at]).toBeCloseTo(1, 5);
        if (!outputs) continue;
        // Σ over outputs of the last pair's squares, against the tokens' own.
        const n = outputs.shape[0];
        const trace = Array.from({ length: n }, (_, i) => floats(outputs)[i * (n + 1)]).reduce((a, b) => a + b, 0);
        const all = floats(whole[layer][group].outputs ?? outputs);
        const wholeTrace = Array.from({ length: n }, (_, i) => all[i * (n + 1)]).reduce((a, b) => a + b, 0);
        const last = tokens.subarray(3 * 8).reduce((a, b) => a + b, 0) / 16;
        expect(trace / wholeTrace / last).toBeCloseTo(1, 4);
      }
    }
    await source.checkpoint.close();
  });
});
