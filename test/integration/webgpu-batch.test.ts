// Continuous batching through the decode plan: what each text is alone, whatever shares the batch, and wherever in it.
import { copyFile, mkdir } from 'node:fs/promises';
import { fileURLToPath } from 'node:url';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import type { WebGpuBackend } from '../../src/backends/webgpu/index.js';
import { fromFloat32 } from '../../src/core/dtype.js';
import { createRng } from '../../src/core/rng.js';
import { floats } from '../../src/core/tensor.js';
import { writeSafetensors } from '../../src/formats/safetensors-writer.node.js';
import { folderFiles } from '../../src/formats/source.node.js';
import { generateContinuously, type ContinuousOptions, type ContinuousRequest } from '../../src/generate/index.js';
import type { Decoder } from '../../src/models/decoder.js';
import { loadDecoder, openModel, type ModelSource } from '../../src/models/load.js';
import { quantizeCheckpoint } from '../../src/quantize.node.js';
import { temporaryFolder } from '../support/pipeline.js';
import { openTestWebGpu, webgpuMissing } from '../support/webgpu.js';

const MODEL = fileURLToPath(new URL('../fixtures/parity/llama', import.meta.url));

/** The model with weights of 16 bits: a plan reads no others for its head. */
async function half(folder: string): Promise<string> {
  const source = await openModel(await folderFiles(MODEL));
  const { checkpoint } = source;
  await mkdir(folder);
  await copyFile(`${MODEL}/config.json`, `${folder}/config.json`);
  const entries = [...checkpoint.names()].map((name) => ({
    name,
    dtype: 'f16' as const,
    shape: checkpoint.info(name).shape,
    data: async () => fromFloat32(floats(await checkpoint.read(name)), 'f16'),
  }));
  await writeSafetensors(`${folder}/model.safetensors`, entries);
  await checkpoint.close();
  return folder;
}

describe.skipIf(webgpuMissing)('continuous batching on WebGPU', () => {
  let temporary: Awaited<ReturnType<typeof temporaryFolder>>;
  let backend: WebGpuBackend;
  let source: ModelSource;
  let decoder: Decoder;
  /** Sizes of the batches that plans were made for. */
  const plans: number[] = [];
  beforeAll(async () => {
    temporary = await temporaryFolder();
    await quantizeCheckpoint({
      model: await half(`${temporary.folder}/half`),
      out: `${temporary.folder}/rtn`,
      method: 'rtn',
      groupSize: 32,
      device: 'cpu',
    });
    backend = await openTestWebGpu();
    source = await openModel(await folderFiles(`${temporary.folder}/rtn`));
    decoder = await loadDecoder(backend, source);
    const prepare = decoder.prepareDecode.bind(decoder);
    decoder.prepareDecode = async (cache) => {
      const program = await prepare(cache);
      if (program) plans.push(cache.batch);
      return program;
    };
  }, 60_000);
  afterAll(async () => {
    decoder.release();
    await source.checkpoint.close();
    await backend.dispose();
    await temporary.remove();
  });

  const rng = createRng(3);
  const lengths = [1, 9, 3, 9, 1, 20, 2, 6, 4, 5];
  const rooms = [12, 5, 30, 9, 0, 20, 1, 17, 8, 3];
  const prompts = lengths.map((length) => Int32Array.from({ length }, () => rng.int(3, 96)));
  // Equal prompts are computed once.
  prompts[3] = prompts[1].slice();
  const requests: ContinuousRequest[] = prompts.map((prompt, i) => ({ prompt, maxTokens: rooms[i], stream: i }));
  const write = async (options: ContinuousOptions, list = requests): Promise<number[][]> => {
    plans.length = 0;
    const { texts } = await generateContinuously(decoder, list, { stopIds: [], seed: 5, ...options });
    return texts.map(({ ids }) => [...ids]);
  };

  /** Decoding op by op: how far below the likeliest token each of these is. */
  async function gaps(prompt: Int32Array, ids: readonly number[], of = decoder): Promise<number[]> {
    if (ids.length === 0) return [];
    const hidden = await of.hidden(Int32Array.from([...prompt, ...ids]));
    const logits = await of.logits(hidden);
    const rows = await backend.download(logits);
    backend.free(hidden, logits);
    const vocab = of.config.vocabSize;
    return ids.map((id, i) => {
      const row = rows.subarray((prompt.length - 1 + i) * vocab, (prompt.length + i) * vocab);
      return row.reduce((a, b) => Math.max(a, b), -Infinity) - row[id];
    });
  }

  it('chooses greedily what decoding op by op finds likeliest', { timeout: 300_000 }, async () => {
    const texts = await write({ slots: 6 });
    // One plan for six at once, smaller ones as they run out.
    expect(plans[0]).toBe(6);
    expect(texts.map((ids) => ids.length)).toEqual(rooms);
    for (const [i, ids] of texts.entries())
      for (const gap of await gaps(prompts[i], ids)) expect(gap).toBeLessThan(0.01);
    // Three at once are multiplied by other kernels.
    expect(await write({ slots: 3 })).toEqual(texts);
    expect(plans[0]).toBe(3);
    expect(await write({ slots: 1 })).toEqual(texts);
  });

  it('writes more texts at once than a workgroup takes', { timeout: 300_000 }, async () => {
    const many: ContinuousRequest[] = Array.from({ length: 44 }, (_, i) => ({
      prompt: prompts[i % prompts.length],
      maxTokens: 2 + (i % 3),
      stream: i,
    }));
    const sampling = { temperature: 1, slots: 64 };
    const texts = await write(sampling, many);
    expect(plans[0]).toBe(44);
    expect(texts).toEqual(await write({ ...sampling, slots: 8 }, many));
  });

  it('draws the same for a seed, whatever shares the batch', { timeout: 300_000 }, async () => {
    const sampling = { temperature: 1, slots: 6 };
    const texts = await write(sampling);
    expect(await write(sampling)).toEqual(texts);
    const turned = [...requests].reverse();
    expect((await write(sampling, turned)).reverse()).toEqual(texts);
    expect(await write({ ...sampling, seed: 6 })).not.toEqual(texts);
    // Equal prompts, streams of their own.
    expect(texts[1]).not.toEqual(texts[3].slice(0, texts[1].length));
  });

  it('takes models that are not quantized', { timeout: 300_000 }, async () => {
    const original = await openModel(await folderFiles(`${temporary.folder}/half`));
    const dense = await loadDecoder(backend, original);
    try {
      const cache = await dense.createCache(3, 32);
      const program = await dense.prepareDecode(cache);
      expect(program, 'the plan takes this model').toBeDefined();
      program?.release();
      dense.releaseCache(cache);
      const several = await generateContinuously(dense, requests, { stopIds: [], slots: 3 });
      const alone = await generateContinuously(dense, requests, { stopIds: [], slots: 1 });
      for (const [i, { ids }] of several.texts.entries()) {
        expect(ids).toEqual(alone.texts[i].ids);
        for (const gap of await gaps(prompts[i], [...ids], dense)) expect(gap).toBeLessThan(0.01);
      }
    } finally {
      dense.release();
      await original.checkpoint.close();
    }
  });

  it('ends texts at stop ids and gives their places to others', { timeout: 300_000 }, async () => {
    const texts = await write({ slots: 6 });
    const stop = texts[2][6];
    const cut = texts.map((ids) => (ids.includes(stop) ? ids.slice(0, ids.indexOf(stop)) : ids));
    expect(await write({ slots: 6, stopIds: [stop] })).toEqual(cut);
  });

  it('puts texts back that outgrow the memory, and ends with the same', { timeout: 300_000 }, async () => {
    const { layers, kvHeads, headDim } = decoder.config;
    const perToken = layers * kvHeads * headDim * 2 * 2;
    const texts = await write({ slots: 6 });
    expect(await write({ slots: 6, cacheBytes: 100 * perToken })).toEqual(texts);
    await expect(write({ slots: 6, cacheBytes: 10 * perToken })).rejects.toMatchObject({ code: 'out-of-memory' });
  });
});
