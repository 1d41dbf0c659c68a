// Every family and RoPE variant against Transformers: logits of committed tiny checkpoints, in prefill and token by token.
import { readdirSync } from 'node:fs';
import path from 'node:path';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { openBackend, type BackendName } from '../../src/backends/registry.js';
import { floats } from '../../src/core/tensor.js';
import { SafetensorsFile } from '../../src/formats/safetensors.js';
import { folderFiles, openFile } from '../../src/formats/source.node.js';
import { loadDecoder, openModel } from '../../src/models/load.js';
import type { Backend } from '../../src/ops/backend.js';

const FIXTURES = path.join(import.meta.dirname, '../fixtures/parity');
/** What the project promises for f32 (absolute, on logits of order 1 to 10). */
const TOLERANCE = 2e-4;
const names = readdirSync(FIXTURES, { withFileTypes: true }).flatMap((e) => (e.isDirectory() ? [e.name] : []));

function worst(a: Float32Array, b: Float32Array): number {
  let max = 0;
  for (let i = 0; i < a.length; i++) max = Math.max(max, Number.isFinite(a[i]) ? Math.abs(a[i] - b[i]) : Infinity);
  return max;
}

describe.each(['reference', 'cpu'] satisfies BackendName[])('parity with Transformers on %s', (name) => {
  let backend: Backend;
  beforeAll(async () => {
    backend = await openBackend(name);
  });
  afterAll(() => backend.dispose());

  it.each(names)('%s', async (fixture) => {
    const folder = path.join(FIXTURES, fixture);
    const expected = await SafetensorsFile.open(await openFile(path.join(folder, 'expected.safetensors')));
    const [ids, logits] = [await expected.read('input_ids'), await expected.read('logits')];
    await expected.close();
    const [batch, tokens] = ids.shape;
    const vocab = logits.shape[2];
    const input = Int32Array.from(ids.data as BigInt64Array, Number);
    const source = await openModel(await folderFiles(folder));
    const decoder = await loadDecoder(backend, source);

    const whole = await backend.download(await decoder.logits(await decoder.hidden(input, { batch })));
    expect(worst(whole, floats(logits)), 'prefill').toBeLessThan(TOLERANCE);

    // Dynamic NTK changes its angles as a sequence grows, so cached keys keep older ones: only lengths alike agree.
    if (source.config.ropeScaling.type !== 'dynamic') {
      const cache = await decoder.createCache(batch, tokens);
      const half = Math.floor(tokens / 2);
      const stepwise = new Float32Array(whole.length);
      for (const [begin, end] of [
        [0, half],
        ...Array.from({ length: tokens - half }, (_, i) => [half + i, half + i + 1]),
      ]) {
        const chunk = Int32Array.from({ length: batch * (end - begin) }, (_, i) => {
          const n = end - begin;
          return input[Math.floor(i / n) * tokens + begin + (i % n)];
        });
        const out = await backend.download(await decoder.logits(await decoder.hidden(chunk, { cache })));
        for (let b = 0; b < batch; b++) {
          stepwise.set(
            out.subarray(b * (end - begin) * vocab, (b + 1) * (end - begin) * vocab),
            (b * tokens + begin) * vocab,
          );
        }
      }
      expect(worst(stepwise, floats(logits)), 'token by token').toBeLessThan(TOLERANCE);
      decoder.releaseCache(cache);
    }
    decoder.release();
    await source.checkpoint.close();
  });
});
