// Decoding by the fused plan against decoding op by op on the same backend: each token the plan chooses must be one that the plain
// path finds as likely as its own, up to f16's rounding of activations.
import path from 'node:path';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import type { WebGpuBackend } from '../../src/backends/webgpu/index.js';
import { createRng } from '../../src/core/rng.js';
import { folderFiles } from '../../src/formats/source.node.js';
import { collect, generate } from '../../src/generate/index.js';
import { loadDecoder, openModel } from '../../src/models/load.js';
import { quantizeCheckpoint } from '../../src/quantize.node.js';
import { temporaryFolder } from '../support/pipeline.js';
import { openTestWebGpu, webgpuMissing } from '../support/webgpu.js';

const MODEL = path.join(import.meta.dirname, '../../models/gyre-14m');
const [SEQUENCES, LENGTH] = [2, 32];

describe.skipIf(webgpuMissing)('fused decoding on WebGPU', () => {
  let temporary: Awaited<ReturnType<typeof temporaryFolder>>;
  let backend: WebGpuBackend;
  beforeAll(async () => {
    temporary = await temporaryFolder();
    backend = await openTestWebGpu();
  });
  afterAll(async () => {
    await backend.dispose();
    await temporary.remove();
  });

  // Few cases with every feature between them: SwiftShader takes seconds to compile each of their kernels.
  it.each([
    [0.05, { method: 'paroquant', groupSize: 64, krot: 3, share: false }],
    // Hadamard transforms before o and down, codes of 8 bits, one grid per output, caches of 8-bit integers. An f16 rounding that
    // tips an activation onto the next code moves it by 2^-7 of the row's largest, not by f16's 2^-11.
    [0.2, { method: 'smoothrot', actBits: 8, kvBits: 8 }],
    // Activations as they are: the transforms end in f16 chunks.
    [0.05, { method: 'quarot', actBits: 16, kvBits: 4 }],
  ] as const)(
    'within %f: chooses the tokens that decoding op by op finds likeliest, %o',
    { timeout: 400_000 },
    async (tolerance, settings) => {
      const rng = createRng(2);
      const ids = Int32Array.from({ length: SEQUENCES * LENGTH }, () => rng.int(0, 4096));
      const out = path.join(temporary.folder, settings.method);
      await quantizeCheckpoint({
        model: MODEL,
        out,
        device: 'cpu',
        steps: 2,
        calibrationTokens: { ids, sequences: SEQUENCES, length: LENGTH, description: 'random' },
        ...settings,
      });
      const source = await openModel(await folderFiles(out));
      const decoder = await loadDecoder(backend, source);
      try {
        const prompt = Int32Array.from({ length: 9 }, () => rng.int(0, 4096));
        const cache = await decoder.createCache(1, 32);
        const program = await decoder.prepareDecode(cache);
        expect(program, 'the plan takes this model').toBeDefined();
        program?.release();
        decoder.releaseCache(cache);
        const fused = await collect(generate(decoder, prompt, { maxTokens: 6, stopIds: [] }));
        expect(fused.ids).toHaveLength(6);
        // The plain path over prompt and answer at once: every chosen token's logit beside the largest of its row.
        const text = Int32Array.from([...prompt, ...fused.ids]);
        const hidden = await decoder.hidden(text);
        const logits = await decoder.logits(hidden);
        const rows = await backend.download(logits);
        backend.free(hidden, logits);
        const vocab = decoder.config.vocabSize;
        for (const [i, id] of fused.ids.entries()) {
          const row = rows.subarray((prompt.length - 1 + i) * vocab, (prompt.length + i) * vocab);
          const top = row.reduce((a, b) => Math.max(a, b), -Infinity);
          expect(top - row[id], `token ${i}`).toBeLessThan(tolerance);
        }
        // Drawn tokens: the same for a seed.
        const draw = () =>
          collect(
            generate(decoder, prompt, { maxTokens: 3, stopIds: [], temperature: 1, topK: 5, topP: 0.95, seed: 1 }),
          );
        expect((await draw()).ids).toEqual((await draw()).ids);
      } finally {
        decoder.release();
        await source.checkpoint.close();
      }
    },
  );
});
