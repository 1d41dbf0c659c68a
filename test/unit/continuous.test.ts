// Continuous batching against one text at a time: the same texts, whatever shares the batch.
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { fileURLToPath } from 'node:url';
import { openBackend } from '../../src/backends/registry.js';
import { createRng } from '../../src/core/rng.js';
import { hostTensor, type HostTensor } from '../../src/core/tensor.js';
import { folderFiles } from '../../src/formats/source.node.js';
import { collect, generate, generateContinuously, type ContinuousRequest } from '../../src/generate/index.js';
import type { Decoder } from '../../src/models/decoder.js';
import { loadDecoder, openModel, type ModelSource } from '../../src/models/load.js';
import type { Backend, Tensor } from '../../src/ops/backend.js';

const parity = (name: string): string => fileURLToPath(new URL(`../fixtures/parity/${name}`, import.meta.url));

let backend: Backend;
let source: ModelSource;
let decoder: Decoder;
const rng = createRng(3);
// Short and long prompts, equal ones among them, answers of different lengths, one with no room at all.
const lengths = [1, 9, 3, 9, 1, 20, 2, 6];
const prompts = lengths.map((length) => Int32Array.from({ length }, () => rng.int(3, 96)));
prompts[3] = prompts[1].slice();
const rooms = [12, 5, 30, 9, 0, 20, 1, 17];
const requests: ContinuousRequest[] = prompts.map((prompt, i) => ({ prompt, maxTokens: rooms[i], stream: i }));

beforeAll(async () => {
  backend = await openBackend('cpu', { threads: 1 });
  source = await openModel(await folderFiles(parity('qwen3')));
  decoder = await loadDecoder(backend, source);
});
afterAll(async () => {
  await source.checkpoint.close();
  await backend.dispose();
});

describe('generateContinuously', () => {
  it.each([
    ['greedily', { temperature: 0 }],
    ['by sampling', { temperature: 1, topP: 0.9 }],
  ])('writes %s what each text would be alone', async (_, sampling) => {
    const stopIds = [7, 11, 13, 40, 41, 42];
    const { texts: alone } = await generateContinuously(decoder, requests, { ...sampling, slots: 1, stopIds, seed: 5 });
    const finished: number[] = [];
    for (const slots of [2, 3, 8]) {
      finished.length = 0;
      const { texts, generatedTokens, promptTokens } = await generateContinuously(decoder, requests, {
        ...sampling,
        slots,
        stopIds,
        seed: 5,
        onFinished: (index) => void finished.push(index),
      });
      expect(texts.map(({ ids, reason }) => [[...ids], reason])).toEqual(
        alone.map(({ ids, reason }) => [[...ids], reason]),
      );
      expect([...finished].sort((a, b) => a - b)).toEqual(prompts.map((_, i) => i));
      expect(generatedTokens).toBe(texts.reduce((sum, { ids }) => sum + ids.length, 0));
      expect(promptTokens).toBeLessThanOrEqual(lengths.reduce((sum, n) => sum + n, 0));
    }
  });

  it('writes greedily what one text at a time gives', async () => {
    const { texts } = await generateContinuously(decoder, requests, { stopIds: [] });
    for (const [i, prompt] of prompts.entries()) {
      const { ids } = await collect(generate(decoder, prompt, { maxTokens: rooms[i], stopIds: [] }));
      expect([...texts[i].ids]).toEqual([...ids]);
    }
  });

  it('reports tokens up to their total', async () => {
    const seen: [number, number][] = [];
    await generateContinuously(decoder, requests, {
      slots: 2,
      stopIds: [7, 11, 13],
      onProgress: ({ done, total }) => void seen.push([done, total ?? NaN]),
    });
    const room = rooms.reduce((a, b) => a + b, 0);
    expect(seen.at(-1)).toEqual([room, room]);
    expect(seen.every(([done], i) => i === 0 || done >= seen[i - 1][0])).toBe(true);
  });

  it('puts texts back that outgrow the memory, and ends with the same', async () => {
    const { config } = decoder;
    const perToken = config.layers * config.kvHeads * config.headDim * 2 * 4;
    const stopIds: number[] = [];
    const roomy = await generateContinuously(decoder, requests, { slots: 8, stopIds });
    const tight = await generateContinuously(decoder, requests, { slots: 8, stopIds, cacheBytes: 100 * perToken });
    expect(tight.texts.map(({ ids }) => [...ids])).toEqual(roomy.texts.map(({ ids }) => [...ids]));
    await expect(
      generateContinuously(decoder, requests, { slots: 8, stopIds, cacheBytes: 10 * perToken }),
    ).rejects.toMatchObject({ code: 'out-of-memory' });
  });

  it.each([4, 8] as const)('copies sequences of %d-bit caches, each at its own position', async (bits) => {
    const shape = { kvHeads: 2, headDim: 16, grid: { bits, clip: 0.95 } };
    const draw = (rows: number, columns: number): HostTensor =>
      hostTensor(
        'f32',
        [rows, columns],
        Float32Array.from({ length: rows * columns }, () => rng.normal()),
      );
    const options = { heads: 4, kvHeads: 2, headDim: 16, scale: 0.25 };
    const upload = (tensor: HostTensor) => backend.upload(tensor);
    for (const tokens of [1, 12]) {
      // Two prompts of 5 and 9 tokens, then a chunk for each from a copy; the same again, each alone.
      const cache = await backend.createKvCache({ ...shape, batch: 2, capacity: 9 });
      const fork = await backend.createKvCache({ ...shape, batch: 2, capacity: 30 });
      const prompt = [draw(18, 64), draw(18, 32), draw(18, 32)];
      const chunk = [draw(2 * tokens, 64), draw(2 * tokens, 32), draw(2 * tokens, 32)];
      const [pq, pk, pv] = await Promise.all(prompt.map(upload));
      const [cq, ck, cv] = await Promise.all(chunk.map(upload));
      await backend.attention(pq, pk, pv, { ...options, batch: 2, start: 0, cache });
      const copies = [
        { from: 1, to: 0, tokens: 9 },
        { from: 0, to: 1, tokens: 5 },
      ];
      await backend.copySequences(cache, fork, copies);
      const together = await backend.download(
        await backend.attention(cq, ck, cv, { ...options, batch: 2, start: Int32Array.of(9, 5), cache: fork }),
      );
      for (const { from, to, tokens: length } of copies) {
        const alone = await backend.createKvCache({ ...shape, batch: 1, capacity: 30 });
        const rows = (tensor: Tensor, begin: number, count: number): Tensor =>
          backend.sliceRows(tensor, begin, begin + count);
        const part = (all: readonly Tensor[], begin: number, count: number): Tensor[] =>
          all.map((tensor) => rows(tensor, begin, count));
        const [q, k, v] = part([pq, pk, pv], 9 * from, length);
        await backend.attention(q, k, v, { ...options, batch: 1, start: 0, cache: alone });
        const [nq, nk, nv] = part([cq, ck, cv], tokens * to, tokens);
        const wanted = await backend.download(
          await backend.attention(nq, nk, nv, { ...options, batch: 1, start: length, cache: alone }),
        );
        const found = together.subarray(to * wanted.length, (to + 1) * wanted.length);
        for (const [i, value] of wanted.entries()) expect(found[i]).toBeCloseTo(value, 5);
        backend.release(alone);
      }
      backend.release(cache, fork);
    }
  });

  it('refuses prompts without tokens or room', async () => {
    const ask = (prompt: Int32Array): Promise<unknown> =>
      generateContinuously(decoder, [{ prompt, maxTokens: 1, stream: 0 }]);
    await expect(ask(new Int32Array(0))).rejects.toMatchObject({ code: 'usage' });
    await expect(ask(new Int32Array(64).fill(5))).rejects.toMatchObject({ code: 'context-length' });
  });

  it('stops when it is told to', async () => {
    const controller = new AbortController();
    const run = generateContinuously(decoder, requests, {
      slots: 1,
      stopIds: [],
      signal: controller.signal,
      onFinished: () => controller.abort(),
    });
    await expect(run).rejects.toMatchObject({ code: 'interrupted' });
  });
});
