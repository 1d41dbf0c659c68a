// Planted activations: the function stays, the planted channels are as large as asked for, on the tokens asked for.
import { readFile } from 'node:fs/promises';
import path from 'node:path';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { openBackend } from '../../src/backends/registry.js';
import { folderFiles } from '../../src/formats/source.node.js';
import { openModel } from '../../src/models/load.js';
import type { Backend, Tensor } from '../../src/ops/backend.js';
import { walkInputs } from '../../src/quant/calibration/walk.js';
import { stressCheckpoint } from '../../src/stress.node.js';
import { FIXTURES, logitsOf, randomTokens, relativeError, temporaryFolder } from '../support/pipeline.js';

describe('gyre stress', () => {
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

  it.each([
    ['qwen3', 'all', 500],
    ['qwen3', 'few', 2000],
    ['llama', 'all', 50],
  ] as const)('%s, %s tokens, magnitude %i: logits stay within 1e-4', async (fixture, tokens, magnitude) => {
    const model = path.join(FIXTURES, fixture);
    const out = path.join(scratch.folder, `${fixture}-${tokens}`);
    const original = await openModel(await folderFiles(model));
    const calibrationTokens = { ids: randomTokens(original, 8, 32), sequences: 8, length: 32, description: 'random' };
    const report = await stressCheckpoint({
      model,
      out,
      tokens,
      magnitude,
      channels: 3,
      blocks: [0, 1],
      calibrationTokens,
      threads: 1,
    });
    expect(report.planted).toHaveLength(6);
    const ids = randomTokens(original, 2, 24, 7);
    expect(relativeError(await logitsOf(backend, out, ids, 2), await logitsOf(backend, model, ids, 2))).toBeLessThan(
      1e-4,
    );

    const stressed = await openModel(await folderFiles(out));
    const peaks = new Map<number, Float64Array>();
    await walkInputs({
      backend,
      source: stressed,
      calibration: calibrationTokens,
      maxTokens: 256,
      stage: 'test',
      observe: (layer) => {
        const own = new Float64Array(stressed.config.intermediateSize);
        peaks.set(layer, own);
        const add = async (x: Tensor): Promise<void> => {
          const values = await backend.download(x);
          values.forEach((v, at) => (own[at % own.length] = Math.max(own[at % own.length], Math.abs(v))));
        };
        return new Map([['down', { add }]]);
      },
      finish: () => Promise.resolve(),
    });
    for (const { layer, channel, peak, share } of report.planted) {
      expect(peaks.get(layer)?.[channel]).toBeCloseTo(peak, Math.log10(1 / peak) + 2);
      if (tokens === 'few') expect(share).toBeLessThan(0.5);
    }
    expect(await readFile(path.join(out, 'gyre.json'), 'utf8')).toContain('synthetic');
    await stressed.checkpoint.close();
    await original.checkpoint.close();
  });

  it('refuses blocks that are not there', async () => {
    const model = path.join(FIXTURES, 'qwen3');
    const original = await openModel(await folderFiles(model));
    const calibrationTokens = { ids: randomTokens(original, 1, 8), sequences: 1, length: 8, description: 'random' };
    await original.checkpoint.close();
    const out = path.join(scratch.folder, 'wrong');
    await expect(stressCheckpoint({ model, out, blocks: [9], calibrationTokens })).rejects.toMatchObject({
      code: 'usage',
    });
  });
});
