// Evaluation on WebGPU (SwiftShader): packed passes and scores that are read later give what the CPU gives, with windows and without.
import path from 'node:path';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import type { WebGpuBackend } from '../../src/backends/webgpu/index.js';
import { openBackend } from '../../src/backends/registry.js';
import { createRng } from '../../src/core/rng.js';
import { evaluateText, scoreContinuations } from '../../src/evaluation/index.js';
import { folderFiles } from '../../src/formats/source.node.js';
import { loadDecoder, openModel } from '../../src/models/load.js';
import type { Backend } from '../../src/ops/backend.js';
import { openTestWebGpu, webgpuMissing } from '../support/webgpu.js';

describe.skipIf(webgpuMissing !== undefined)('evaluation on WebGPU', () => {
  let cpu: Backend;
  let exact: WebGpuBackend;
  let half: WebGpuBackend;
  beforeAll(async () => {
    cpu = await openBackend('cpu');
    exact = await openTestWebGpu();
    half = await openTestWebGpu({ precision: 'f16' });
  });
  afterAll(async () => {
    for (const backend of [cpu, exact, half]) await backend.dispose();
  });

  it.each(['qwen3', 'mistral'])(
    'of the tiny %s',
    async (name) => {
      const source = await openModel(await folderFiles(path.join(import.meta.dirname, '../fixtures/parity', name)));
      const rng = createRng(4);
      const draw = (length: number): Int32Array => Int32Array.from({ length }, () => rng.int(3, 96));
      const head = draw(20);
      const requests = Array.from({ length: 12 }, (_, i) => {
        const context = Int32Array.from([...(i % 2 === 1 ? head : []), ...draw(rng.int(1, 20))]);
        return Array.from({ length: 1 + (i % 4) }, () => ({ context, continuation: draw(rng.int(1, 9)) }));
      }).flat();
      const text = draw(400);
      const measure = async (backend: Backend) => {
        const decoder = await loadDecoder(backend, source);
        const { results, tokens } = await scoreContinuations(decoder, requests, { greedy: true });
        const alone = await evaluateText(decoder, text, { seqLen: 24 });
        const compared = await evaluateText(decoder, text, { seqLen: 24, reference: decoder });
        decoder.release();
        return { results, tokens, alone, compared };
      };
      const expected = await measure(cpu);
      // Halves leave about three digits.
      for (const [backend, tolerance] of [
        [exact, 1e-3],
        [half, 3e-2],
      ] as const) {
        const found = await measure(backend);
        expect(found.tokens).toBe(expected.tokens);
        for (const [i, { logLikelihood }] of found.results.entries())
          expect(Math.abs(logLikelihood - expected.results[i].logLikelihood)).toBeLessThan(tolerance);
        for (const { perplexity } of [found.alone, found.compared])
          expect(Math.abs(perplexity / expected.alone.perplexity - 1)).toBeLessThan(tolerance / 10);
        expect(found.compared.kl).toBeCloseTo(0, 6);
        expect(found.compared.top1Agreement).toBe(1);
      }
      await source.checkpoint.close();
    },
    300_000,
  );
});
