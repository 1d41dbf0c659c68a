// Low-precision activations and caches on WebGPU: it quantizes models that stay near the
// original, and runs them as the CPU does, whole and through a cache of integers.
import path from 'node:path';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { openBackend } from '../../src/backends/registry.js';
import { folderFiles } from '../../src/formats/source.node.js';
import { loadDecoder, openModel } from '../../src/models/load.js';
import type { Backend } from '../../src/ops/backend.js';
import type { QuantizeSettings } from '../../src/quant/types.js';
import {
  FIXTURES,
  logitsOf,
  quantizeFixture,
  randomTokens,
  relativeError,
  temporaryFolder,
} from '../support/pipeline.js';
import { openTestWebGpu, webgpuMissing } from '../support/webgpu.js';

describe.skipIf(webgpuMissing)('low precision on WebGPU', () => {
  let cpu: Backend;
  let gpu: Backend;
  let scratch: Awaited<ReturnType<typeof temporaryFolder>>;
  beforeAll(async () => {
    gpu = await openTestWebGpu();
    cpu = await openBackend('cpu', { threads: 1 });
    scratch = await temporaryFolder();
  });
  afterAll(async () => {
    await gpu.dispose();
    await cpu.dispose();
    await scratch.remove();
  });

  const methods: readonly (readonly [string, string, Partial<QuantizeSettings>])[] = [
    ['smoothquant', 'llama2', { smooth: 'all', groupSize: -1, actBits: 8, kvBits: 8 }],
    ['quarot', 'qwen3', { rotate: true, groupSize: -1, actBits: 8, kvBits: 4 }],
    ['smoothrot', 'llama', { rotate: true, smooth: 'down', groupSize: -1, actBits: 8, kvBits: 8 }],
    ['paroquant', 'qwen2', { actBits: 8, kvBits: 8 }],
    ['lowbit', 'qwen3', { rotate: true, smooth: 'down', actBits: 8, actGroupSize: 32, kvBits: 8 }],
  ];
  it.each(methods)('%s on %s', { timeout: 180_000 }, async (method, fixture, settings) => {
    const out = path.join(scratch.folder, method);
    const source = await quantizeFixture(
      gpu,
      fixture,
      out,
      { method, bits: 8, steps: 4, ...settings },
      { sequences: 4 },
    );
    const ids = randomTokens(source, 2, 24, 7);
    await source.checkpoint.close();
    const whole = await logitsOf(gpu, out, ids, 2);
    // A code at a tie falls either way on the two backends, and moves others: less than what rounding to 8 bits changes.
    expect(relativeError(whole, await logitsOf(cpu, out, ids, 2))).toBeLessThan(0.02);
    const original = await logitsOf(cpu, path.join(FIXTURES, fixture), ids, 2);
    expect(relativeError(whole, original)).toBeLessThan(settings.kvBits === 4 ? 0.2 : 0.08);

    // Through a cache of integers, in chunks.
    const model = await openModel(await folderFiles(out));
    const decoder = await loadDecoder(gpu, model);
    const cache = await decoder.createCache(1, 32);
    const rows: number[] = [];
    for (const [begin, end] of [
      [0, 12],
      [12, 20],
      [20, 21],
      [21, 24],
    ])
      rows.push(
        ...(await gpu.download(await decoder.logits(await decoder.hidden(ids.subarray(begin, end), { cache })))),
      );
    const first = whole.subarray(0, rows.length);
    expect(relativeError(Float32Array.from(rows), first)).toBeLessThan(settings.kvBits === 4 ? 0.1 : 0.02);
    decoder.release();
    await model.checkpoint.close();
  });
});
