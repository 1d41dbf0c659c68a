// Perplexity, KL and agreement against sums written out by hand over the logits of the float64 backend.
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { fileURLToPath } from 'node:url';
import { openBackend } from '../../src/backends/registry.js';
import { createRng } from '../../src/core/rng.js';
import { cutWindows, evaluateText, parseTextFile, remembering } from '../../src/evaluation/index.js';
import { folderFiles } from '../../src/formats/source.node.js';
import type { Decoder } from '../../src/models/decoder.js';
import { loadDecoder, openModel, type ModelSource } from '../../src/models/load.js';
import type { Backend } from '../../src/ops/backend.js';

const parity = (name: string): string => fileURLToPath(new URL(`../fixtures/parity/${name}`, import.meta.url));

let backend: Backend;
let decoder: Decoder;
let reference: Decoder;
const rng = createRng(1);
const tokens = Int32Array.from({ length: 100 }, () => rng.int(3, 96));

const sources: ModelSource[] = [];
async function open(folder: string): Promise<ModelSource> {
  const source = await openModel(await folderFiles(folder));
  sources.push(source);
  return source;
}

beforeAll(async () => {
  backend = await openBackend('reference');
  decoder = await loadDecoder(backend, await open(parity('qwen3')));
  reference = await loadDecoder(backend, await open(parity('llama')));
});
afterAll(async () => {
  await Promise.all(sources.map((source) => source.checkpoint.close()));
  await backend.dispose();
});

/** log p of every token, row by row. */
async function logProbabilities(model: Decoder, ids: Int32Array): Promise<number[][]> {
  const vocab = model.config.vocabSize;
  const logits = await backend.download(await model.logits(await model.hidden(ids)));
  return Array.from({ length: ids.length }, (_, row) => {
    const values = [...logits.subarray(row * vocab, (row + 1) * vocab)];
    const total = Math.log(values.reduce((sum, v) => sum + Math.exp(v), 0));
    return values.map((v) => v - total);
  });
}

const best = (row: number[]): number => row.indexOf(Math.max(...row));
const mean = (values: number[]): number => values.reduce((sum, v) => sum + v, 0) / values.length;

describe('evaluateText', () => {
  it('is what the definition says', async () => {
    const windows = [0, 24, 48, 72].map((at) => tokens.slice(at, at + 24));
    const nll: number[][] = [];
    const kl: number[] = [];
    const agree: number[] = [];
    for (const window of windows) {
      const p = await logProbabilities(decoder, window);
      const q = await logProbabilities(reference, window);
      nll.push([]);
      for (let t = 0; t < 23; t++) {
        nll.at(-1)?.push(-p[t][window[t + 1]]);
        kl.push(q[t].reduce((sum, lq, v) => sum + Math.exp(lq) * (lq - p[t][v]), 0));
        agree.push(best(p[t]) === best(q[t]) ? 1 : 0);
      }
    }
    for (const rowsPerLogits of [undefined, 1, 7]) {
      const found = await evaluateText(decoder, tokens, { seqLen: 24, reference, rowsPerLogits });
      expect(found.tokens).toBe(4 * 23);
      expect(found.windows).toBe(4);
      expect(found.nll).toBeCloseTo(mean(nll.flat()), 5);
      expect(found.perplexity).toBeCloseTo(Math.exp(mean(nll.flat())), 3);
      expect(found.kl).toBeCloseTo(mean(kl), 5);
      expect(found.top1Agreement).toBeCloseTo(mean(agree), 10);
      const perWindow = nll.map(mean);
      const spread = Math.sqrt(perWindow.reduce((s, v) => s + (v - mean(perWindow)) ** 2, 0) / 3);
      expect(found.nllStandardError).toBeCloseTo(spread / 2, 5);
    }
  });

  it('says nothing of a reference it does not have, and nothing bad of one that is itself', async () => {
    const alone = await evaluateText(decoder, tokens, { seqLen: 50 });
    expect(alone).toMatchObject({ kl: null, top1Agreement: null, referencePerplexity: null, klStandardError: null });
    const same = await evaluateText(decoder, tokens, { seqLen: 50, reference: decoder });
    expect(same.kl).toBeCloseTo(0, 10);
    expect(same.top1Agreement).toBe(1);
    expect(same.referencePerplexity).toBeCloseTo(same.perplexity, 8);
    expect(same.nll).toBeCloseTo(alone.nll, 10);
  });

  it('comes out the same against a reference that remembers', async () => {
    const once = remembering(reference);
    const plain = await evaluateText(decoder, tokens, { seqLen: 24, reference });
    for (let i = 0; i < 2; i++) {
      const found = await evaluateText(decoder, tokens, { seqLen: 24, reference: once });
      expect(found.kl).toBeCloseTo(plain.kl ?? NaN, 6);
      expect(found.referencePerplexity).toBeCloseTo(plain.referencePerplexity ?? NaN, 4);
    }
  });

  it('refuses windows beyond the context, texts of one token, and another vocabulary', async () => {
    await expect(evaluateText(decoder, tokens, { seqLen: 65 })).rejects.toMatchObject({ code: 'context-length' });
    await expect(evaluateText(decoder, tokens.slice(0, 1))).rejects.toMatchObject({ code: 'usage' });
    const other = { backend, config: { ...decoder.config, vocabSize: 7 } } as Decoder;
    await expect(evaluateText(decoder, tokens, { reference: other })).rejects.toThrow(/vocabulary/);
    const run = evaluateText(decoder, tokens, { signal: AbortSignal.abort() });
    await expect(run).rejects.toMatchObject({ code: 'interrupted' });
  });
});

describe('cutWindows', () => {
  const ids = Int32Array.from({ length: 10 }, (_, i) => i);
  const cut = (options: { seqLen: number; samples?: number; bosTokenId?: number }): number[][] =>
    cutWindows(ids, options).map(({ ids: window }) => [...window]);

  it('leaves a short tail out, and takes a short text whole', () => {
    expect(cut({ seqLen: 4 })).toEqual([
      [0, 1, 2, 3],
      [4, 5, 6, 7],
    ]);
    expect(cut({ seqLen: 64 })).toEqual([[...ids]]);
  });

  it('opens windows with the start token, which takes one of their places', () => {
    expect(cut({ seqLen: 5, bosTokenId: 99 })).toEqual([
      [99, 0, 1, 2, 3],
      [99, 4, 5, 6, 7],
    ]);
  });

  it('overlap by the strided protocol, and score every token once; a number of them is taken from the first', () => {
    const strided = (windows?: number): [number[], number][] =>
      cutWindows(ids, { seqLen: 4, protocol: 'strided', stride: 2, windows }).map((w) => [[...w.ids], w.first]);
    expect(strided()).toEqual([
      [[0, 1, 2, 3], 1],
      [[2, 3, 4, 5], 2],
      [[4, 5, 6, 7], 2],
      [[6, 7, 8, 9], 2],
    ]);
    expect(strided(2)).toEqual(strided().slice(0, 2));
    expect(() => cutWindows(ids, { seqLen: 4, protocol: 'strided', stride: 4 })).toThrow(/stride/);
  });

  it('follow one another by the rolling protocol, each after a token of the last one, the last filled up', () => {
    const rolling = { seqLen: 4, protocol: 'rolling', bosTokenId: 99 } as const;
    expect(cutWindows(ids, rolling).map((w) => [[...w.ids], w.first])).toEqual([
      [[99, 0, 1, 2, 3], 1],
      [[3, 4, 5, 6, 7], 1],
      [[5, 6, 7, 8, 9], 3],
    ]);
    expect(() => cutWindows(ids, { ...rolling, windows: 1 })).toThrow(/to their end/);
  });

  it('spreads a number of windows over the text', () => {
    expect(cut({ seqLen: 2, samples: 2 })).toEqual([
      [0, 1],
      [4, 5],
    ]);
    expect(cut({ seqLen: 2, samples: 100 }).length).toBe(5);
  });
});

describe('parseTextFile', () => {
  it('takes text as it is and the texts of JSON lines', () => {
    expect(parseTextFile('a.txt', '{"text": "b"}')).toEqual(['{"text": "b"}']);
    expect(parseTextFile('a.jsonl', '{"text": "b"}\n\n{"text": "c", "id": 1}\n')).toEqual(['b', 'c']);
  });

  it('names the line that is wrong', () => {
    expect(() => parseTextFile('a.jsonl', '{"text": "b"}\n{"txt": "c"}')).toThrow(/line 2/);
    expect(() => parseTextFile('a.jsonl', 'x')).toThrow(/line 1: not JSON/);
  });
});
