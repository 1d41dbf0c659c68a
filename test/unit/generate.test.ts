// Generation on a tiny model: the cached, chunked path against running everything again from the start.
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { fileURLToPath } from 'node:url';
import { openBackend } from '../../src/backends/registry.js';
import { folderFiles } from '../../src/formats/source.node.js';
import { argmax, collect, contextLength, generate } from '../../src/generate/index.js';
import type { Decoder } from '../../src/models/decoder.js';
import { loadDecoder, openModel, type ModelSource } from '../../src/models/load.js';
import type { Backend } from '../../src/ops/backend.js';

const folder = fileURLToPath(new URL('../fixtures/parity/qwen3', import.meta.url));
const prompt = Int32Array.of(1, 17, 42, 9, 63);

let backend: Backend;
let decoder: Decoder;

const sources: ModelSource[] = [];
async function open(folder: string): Promise<ModelSource> {
  const source = await openModel(await folderFiles(folder));
  sources.push(source);
  return source;
}

beforeAll(async () => {
  backend = await openBackend('reference');
  decoder = await loadDecoder(backend, await open(folder));
});
afterAll(async () => {
  await Promise.all(sources.map((source) => source.checkpoint.close()));
  await backend.dispose();
});

/** Greedy continuation, the whole text run again for every token. */
async function slowly(ids: Int32Array, count: number): Promise<number[]> {
  const text = [...ids];
  for (let i = 0; i < count; i++) {
    const hidden = await decoder.hidden(Int32Array.from(text));
    const logits = await backend.download(await decoder.logits(hidden));
    text.push(argmax(logits.subarray(-decoder.config.vocabSize)));
  }
  return text.slice(ids.length);
}

describe('generate', () => {
  it('gives greedily what running everything again gives', async () => {
    const { ids, summary } = await collect(generate(decoder, prompt, { maxTokens: 12, stopIds: [] }));
    expect([...ids]).toEqual(await slowly(prompt, 12));
    expect(summary).toMatchObject({ reason: 'length', promptTokens: 5, tokens: 12 });
    expect(summary.decodeTokensPerSecond).toBeGreaterThan(0);
    expect(summary.prefillTokensPerSecond).toBeGreaterThan(0);
  });

  it('numbers its tokens and ends before a stop id', async () => {
    const wanted = await slowly(prompt, 6);
    const stop = wanted[3];
    const first = wanted.indexOf(stop);
    const { ids, summary } = await collect(generate(decoder, prompt, { maxTokens: 6, stopIds: [stop] }));
    expect([...ids]).toEqual(wanted.slice(0, first));
    expect(summary.reason).toBe('eos');
    const indices: number[] = [];
    for await (const { index } of generate(decoder, prompt, { maxTokens: 3, stopIds: [] })) indices.push(index);
    expect(indices).toEqual([0, 1, 2]);
  });

  it('draws the same for the same seed', async () => {
    const run = async (seed: number): Promise<number[]> => {
      const options = { maxTokens: 20, stopIds: [], temperature: 1.5, topP: 0.95, topK: 50, seed };
      return [...(await collect(generate(decoder, prompt, options))).ids];
    };
    expect(await run(4)).toEqual(await run(4));
    expect(await run(4)).not.toEqual(await run(5));
  });

  it('stops where the context ends and refuses prompts that fill it', async () => {
    const context = contextLength(decoder.config);
    const long = Int32Array.from({ length: context - 3 }, (_, i) => 3 + (i % 80));
    const { ids, summary } = await collect(generate(decoder, long, { maxTokens: 50, stopIds: [] }));
    expect(ids.length).toBe(3);
    expect(summary.reason).toBe('length');
    await expect(collect(generate(decoder, new Int32Array(context)))).rejects.toMatchObject({ code: 'context-length' });
    await expect(collect(generate(decoder, new Int32Array(0)))).rejects.toMatchObject({ code: 'usage' });
  });

  it('stops when told to', async () => {
    const stopping = new AbortController();
    const generation = generate(decoder, prompt, { maxTokens: 50, stopIds: [], signal: stopping.signal });
    await generation.next();
    stopping.abort();
    const { ids, summary } = await collect(generation);
    expect(ids.length).toBe(0);
    expect(summary).toMatchObject({ reason: 'interrupted', tokens: 1 });
  });
});
