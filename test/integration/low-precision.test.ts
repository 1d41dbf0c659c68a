// Rotated and smoothed models with rounded activations and caches, from the pipeline to the loader: they stay near the
// original, resume to equal bytes, decode token by token as they run whole, and say what they need to be run.
import { readdir, readFile, writeFile } from 'node:fs/promises';
import path from 'node:path';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { openBackend } from '../../src/backends/registry.js';
import { parseQuantizationConfig, quantizationConfigJson } from '../../src/formats/quantization-config.js';
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

const ROTATED: Partial<QuantizeSettings> = { rotate: true, smooth: 'down' };

describe('low precision', () => {
  let backend: Backend;
  let scratch: Awaited<ReturnType<typeof temporaryFolder>>;
  beforeAll(async () => {
    backend = await openBackend('cpu', { threads: 1 });
    scratch = await temporaryFolder();
  });
  afterAll(async () => {
    await backend.dispose();
    await scratch.remove();
  });

  const methods: readonly (readonly [string, Partial<QuantizeSettings>])[] = [
    ['smoothquant', { smooth: 'all', groupSize: -1 }],
    ['quarot', { rotate: true, groupSize: -1 }],
    ['smoothrot', { ...ROTATED, groupSize: -1 }],
    ['rtn', ROTATED],
    ['awq', ROTATED],
    ['gptq', { rotate: true }],
    ['paroquant', {}],
    ['paroquant', ROTATED],
    ['lowbit', ROTATED],
  ];
  const cases = methods.flatMap(([method, settings]) =>
    ['qwen3', 'llama', 'qwen2', 'llama2'].map((fixture) => [method, fixture, settings] as const),
  );
  it.each(cases)('%s on %s: W8A8KV8 keeps the logits, through a cache too', async (method, fixture, settings) => {
    const name = `${method}-${fixture}-${Object.keys(settings).join('-')}`;
    const out = path.join(scratch.folder, name);
    const source = await quantizeFixture(backend, fixture, out, {
      method,
      bits: 8,
      ...settings,
      actBits: 8,
      kvBits: 8,
    });
    const ids = randomTokens(source, 1, 24, 7);
    const whole = await logitsOf(backend, out, ids, 1);
    const original = await logitsOf(backend, path.join(FIXTURES, fixture), ids, 1);
    expect(relativeError(whole, original)).toBeLessThan(0.08);

    const model = await openModel(await folderFiles(out));
    expect(model.online?.activations?.bits).toBe(8);
    const decoder = await loadDecoder(backend, model);
    const cache = await decoder.createCache(1, 32);
    const rows: Float32Array[] = [];
    for (const [begin, end] of [[0, 12], ...Array.from({ length: 12 }, (_, i) => [12 + i, 13 + i])]) {
      const hidden = await decoder.hidden(ids.subarray(begin, end), { cache });
      rows.push(await backend.download(await decoder.logits(hidden)));
    }
    const vocab = source.config.vocabSize;
    const stepwise = new Float32Array(24 * vocab);
    rows.reduce((at, part) => (stepwise.set(part, at), at + part.length), 0);
    // Rounded activations near a tie may fall differently: less than what 8 bits change in all.
    expect(relativeError(stepwise, whole)).toBeLessThan(0.02);
    decoder.release();
    await model.checkpoint.close();
  });

  it('smoothrot resumes to the same bytes', async () => {
    const settings = { method: 'smoothrot', groupSize: -1, ...ROTATED, actBits: 4, kvBits: 4 } as const;
    const [whole, resumed] = ['whole', 'resumed'].map((name) => path.join(scratch.folder, name));
    await quantizeFixture(backend, 'qwen3', whole, settings);
    await expect(quantizeFixture(backend, 'qwen3', resumed, settings, { stopAfter: 1 })).rejects.toMatchObject({
      code: 'interrupted',
    });
    await quantizeFixture(backend, 'qwen3', resumed, settings, { resume: true });
    for (const name of await readdir(whole))
      expect(await readFile(path.join(resumed, name)), name).toEqual(await readFile(path.join(whole, name)));
  });

  it('refuses what a newer version wrote, by name', async () => {
    const out = path.join(scratch.folder, 'newer');
    await quantizeFixture(backend, 'qwen3', out, {
      method: 'smoothrot',
      groupSize: -1,
      ...ROTATED,
      actBits: 4,
      kvBits: 4,
    });
    const file = path.join(out, 'config.json');
    const config = JSON.parse(await readFile(file, 'utf8')) as { quantization_config: Record<string, unknown> };
    const stored = config.quantization_config;
    expect(stored).toMatchObject({ version: 2, requires: ['hadamard', 'activations', 'kv_cache'] });
    const parsed = parseQuantizationConfig(stored);
    expect(parsed && quantizationConfigJson(parsed)).toEqual(stored);
    const changes: readonly (readonly [Record<string, unknown>, RegExp])[] = [
      [{ version: 3 }, /version 3 .* newer/],
      [{ requires: ['wavelets'] }, /requires 'wavelets'/],
      [{ online_transforms: [{ kind: 'wavelet', at: 'down' }] }, /online transform 'wavelet'/],
      [
        {
          online_transforms: [
            { kind: 'hadamard', at: 'down', order: 96, inner: 1, construction: 'paley2', base_order: 12 },
          ],
        },
        /order 96 by paley2/,
      ],
    ];
    for (const [change, message] of changes) {
      await writeFile(file, JSON.stringify({ ...config, quantization_config: { ...stored, ...change } }));
      await expect(openModel(await folderFiles(out))).rejects.toThrow(message);
    }
    await writeFile(file, JSON.stringify({ ...config, quantization_config: { ...stored, activations: { bits: 5 } } }));
    await expect(openModel(await folderFiles(out))).rejects.toMatchObject({ code: 'config-invalid' });
  });
});
