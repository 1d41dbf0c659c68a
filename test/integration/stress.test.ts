// Planted activations: the function stays, the planted channels are as large as asked for, on the tokens asked for.
import { readdir, readFile } from 'node:fs/promises';
import path from 'node:path';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { openBackend } from '../../src/backends/registry.js';
import { createRng } from '../../src/core/rng.js';
import { folderFiles } from '../../src/formats/source.node.js';
import { openModel } from '../../src/models/load.js';
import type { Backend, Tensor } from '../../src/ops/backend.js';
import { sampleWindows } from '../../src/quant/calibration/tokens.js';
import { walkInputs } from '../../src/quant/calibration/walk.js';
import { stressCheckpoint } from '../../src/stress.node.js';
import { loadTokenizer } from '../../src/tokenizer/index.js';
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
    ['qwen3', 'all', 500, [0, 1]],
    ['llama', 'all', 50, 'every'],
  ] as const)('%s, %s tokens, magnitude %i: logits stay within 1e-4', async (fixture, tokens, magnitude, blocks) => {
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
      blocks,
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
    for (const { layer, channel, peak } of report.planted)
      expect(peaks.get(layer)?.[channel]).toBeCloseTo(peak, Math.log10(1 / peak) + 2);
    expect(await readFile(path.join(out, 'gyre.json'), 'utf8')).toContain('synthetic');
    await stressed.checkpoint.close();
    await original.checkpoint.close();
  });

  describe('on few tokens', () => {
    const model = path.join(import.meta.dirname, '../../models/gyre-14m');
    const prose = async (count: number) => {
      const names = (await readdir(path.join(model, 'eval/prose'))).filter((name) => name.endsWith('.txt')).sort();
      const texts = names.map(async (name) => ({
        name,
        text: await readFile(path.join(model, 'eval/prose', name), 'utf8'),
      }));
      return (await Promise.all(texts)).slice(0, count);
    };

    it.each([50, 2000])('magnitude %i: only first tokens, full stops and line breaks carry it', async (magnitude) => {
      const original = await openModel(await folderFiles(model));
      const tokenizer = await loadTokenizer(original.files);
      const texts = await prose(9);
      const shape = { sequences: 32, length: 256 };
      const calibrationTokens = sampleWindows(tokenizer, texts.slice(0, 8), shape, createRng(0));
      const out = path.join(scratch.folder, `few-${magnitude}`);
      const blocks = [4];
      const report = await stressCheckpoint({
        model,
        out,
        tokens: 'few',
        magnitude,
        blocks,
        calibrationTokens,
        threads: 1,
      });
      expect(report.planted).toHaveLength(2);

      // A text that no part of the planting has seen.
      const unseen = sampleWindows(tokenizer, texts.slice(8), { sequences: 2, length: 256 }, createRng(1));
      expect(
        relativeError(await logitsOf(backend, out, unseen.ids, 2), await logitsOf(backend, model, unseen.ids, 2)),
      ).toBeLessThan(1e-4);
      const stressed = await openModel(await folderFiles(out));
      const width = stressed.config.intermediateSize;
      expect(width).toBe(1152);
      const rows: Float32Array[] = [];
      await walkInputs({
        backend,
        source: stressed,
        calibration: unseen,
        maxTokens: 512,
        stage: 'test',
        observe: (layer) => {
          const add = async (x: Tensor) => void rows.push(await backend.download(x));
          return new Map(layer === 4 ? [['down' as const, { add }]] : []);
        },
        finish: () => Promise.resolve(),
      });
      const [x] = rows;
      let [hits, misses, mistakes] = [0, 0, 0];
      const { channel, peak } = report.planted[0];
      unseen.ids.forEach((id, t) => {
        const marked = t % 256 === 0 || /^ *[.\n]+ *$/.test(tokenizer.decode([id]));
        const size = Math.abs(x[t * width + channel]) / peak;
        expect(x[t * width + channel + 1]).toBe(x[t * width + channel]);
        if (marked && size > 0.05) hits++;
        else if (marked) misses++;
        else if (size > 0.05) mistakes++;
      });
      expect(hits).toBeGreaterThan(15);
      expect(misses / hits).toBeLessThan(0.1);
      expect(mistakes / unseen.ids.length).toBeLessThan(0.01);
      await stressed.checkpoint.close();
      await original.checkpoint.close();
    });

    it('plants in every block that tells them apart, and in no other', async () => {
      const original = await openModel(await folderFiles(model));
      const tokenizer = await loadTokenizer(original.files);
      const shape = { sequences: 32, length: 256 };
      const calibrationTokens = sampleWindows(tokenizer, await prose(8), shape, createRng(0));
      const out = path.join(scratch.folder, 'few-every');
      const given = { model, out, tokens: 'few', blocks: 'every', calibrationTokens, threads: 1 } as const;
      const { settings, separations } = await stressCheckpoint(given);
      expect(settings.blocks.length).toBeGreaterThanOrEqual(2);
      // The first block's inputs are little more than embeddings.
      expect(settings.blocks).not.toContain(0);
      for (const { missed, marked, mistaken, others } of separations) {
        expect(missed).toBeLessThanOrEqual(0.02 * marked);
        expect(mistaken).toBeLessThanOrEqual(0.002 * others);
      }
      await original.checkpoint.close();
    });

    it('refuses by name a block whose inputs do not tell those tokens from others', async () => {
      const original = await openModel(await folderFiles(model));
      const tokenizer = await loadTokenizer(original.files);
      const calibrationTokens = sampleWindows(tokenizer, await prose(9), { sequences: 4, length: 128 }, createRng(0));
      await original.checkpoint.close();
      const out = path.join(scratch.folder, 'inseparable');
      await expect(
        stressCheckpoint({ model, out, tokens: 'few', blocks: [0], calibrationTokens, threads: 1 }),
      ).rejects.toMatchObject({ code: 'unsupported', message: expect.stringContaining('block 0') as string });
      await expect(
        stressCheckpoint({ model, out, tokens: 'few', channels: 3, calibrationTokens, threads: 1 }),
      ).rejects.toMatchObject({ code: 'usage' });
    });
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
