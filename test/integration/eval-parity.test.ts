// Perplexities, choice log-likelihoods and accuracies against PyTorch and transformers in float64 (test/fixtures/eval).
import { createHash } from 'node:crypto';
import { existsSync, readdirSync, readFileSync } from 'node:fs';
import path from 'node:path';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { z } from 'zod';
import { openBackend } from '../../src/backends/registry.js';
import { evaluateChoices } from '../../src/evaluation/choices.js';
import { loadTask } from '../../src/evaluation/data.node.js';
import { evaluateText, tokenizeTexts, type EvaluateOptions } from '../../src/evaluation/index.js';
import { choiceItems } from '../../src/evaluation/items.js';
import { folderFiles } from '../../src/formats/source.node.js';
import { loadDecoder, openModel } from '../../src/models/load.js';
import type { Decoder } from '../../src/models/decoder.js';
import type { Backend } from '../../src/ops/backend.js';
import { loadTokenizer, type Tokenizer } from '../../src/tokenizer/index.js';
import { choiceRows, evalFolder, type ChoiceSet } from '../support/eval-data.js';

const root = path.join(import.meta.dirname, '../..');
const text = z.object({ perplexity: z.number(), tokens: z.number() });
const fixture = z
  .object({
    parity: z.record(z.string(), text),
    prose: z.record(z.string(), text.extend({ ids: z.number(), idsHash: z.string() })),
    choices: z.record(
      z.string(),
      z.object({
        acc: z.number(),
        acc_norm: z.number().optional(),
        items: z.array(
          z.object({
            hash: z.string(),
            logLikelihoods: z.array(z.number()),
            gold: z.number(),
            right: z.number(),
            rightNormed: z.number(),
          }),
        ),
      }),
    ),
  })
  .parse(JSON.parse(readFileSync(path.join(root, 'test/fixtures/eval/expected.json'), 'utf8')));

const sha = (value: string): string => createHash('sha256').update(value).digest('hex').slice(0, 16);
const relative = (found: number, wanted: number): number => Math.abs(found / wanted - 1);

let backend: Backend;
let decoder: Decoder;
let tokenizer: Tokenizer;
const closing: (() => Promise<void>)[] = [];

async function load(folder: string): Promise<Decoder> {
  const source = await openModel(await folderFiles(folder));
  closing.push(() => source.checkpoint.close());
  return loadDecoder(backend, source);
}

beforeAll(async () => {
  backend = await openBackend('cpu');
  decoder = await load(path.join(root, 'models/gyre-14m'));
  tokenizer = await loadTokenizer(await folderFiles(path.join(root, 'models/gyre-14m')));
});
afterAll(async () => {
  for (const close of closing) await close();
  await backend.dispose();
});

describe('perplexity equals PyTorch to 1e-4', () => {
  it.each(Object.keys(fixture.parity))('of the tiny %s', async (name) => {
    const tokens = Int32Array.from({ length: 120 }, (_, i) => 3 + ((i * i * 7 + i * 13) % 93));
    const model = await load(path.join(root, 'test/fixtures/parity', name));
    const found = await evaluateText(model, tokens, { seqLen: 24 });
    expect(found.tokens).toBe(fixture.parity[name].tokens);
    expect(relative(found.perplexity, fixture.parity[name].perplexity)).toBeLessThan(1e-4);
    model.release();
  });

  const protocols: Record<string, EvaluateOptions> = {
    windows: { startToken: 'none' },
    'windows-start-once': { startToken: 'once' },
    'windows-start-each': { startToken: 'each' },
    strided: { protocol: 'strided', stride: 256, startToken: 'none' },
    rolling: { protocol: 'rolling' },
  };
  it.each(Object.keys(fixture.prose))(
    'of the bundled model on prose: %s',
    async (name) => {
      const folder = path.join(root, 'models/gyre-14m/eval/prose');
      const texts = readdirSync(folder)
        .sort()
        .map((file) => readFileSync(path.join(folder, file), 'utf8'));
      const wanted = fixture.prose[name];
      const ids = tokenizeTexts(tokenizer, texts).slice(0, wanted.ids);
      expect(sha(ids.join(','))).toBe(wanted.idsHash);
      const found = await evaluateText(decoder, ids, {
        seqLen: 512,
        bosTokenId: tokenizer.bosTokenId,
        ...protocols[name],
      });
      expect(found.tokens).toBe(wanted.tokens);
      expect(relative(found.perplexity, wanted.perplexity)).toBeLessThan(1e-4);
    },
    300_000,
  );
});

const missing = evalFolder === undefined || !existsSync(path.join(evalFolder, 'commonsense'));
describe.skipIf(missing)('choices equal PyTorch on real questions (needs ../shared/data/eval)', () => {
  it.each(Object.keys(fixture.choices) as ChoiceSet[])(
    '%s: log-likelihoods to 1e-3, the same answers',
    async (name) => {
      const task = await loadTask(name);
      if (task.type !== 'choices') throw new Error(`${name} is no multiple-choice task`);
      const wanted = fixture.choices[name];
      // The first forty here; GYRE_ALL_ITEMS=1 for all there are.
      const count = process.env['GYRE_ALL_ITEMS'] === '1' ? wanted.items.length : Math.min(40, wanted.items.length);
      const expected = wanted.items.slice(0, count);
      const rows = choiceRows(evalFolder ?? '', name).slice(0, count);
      expect(rows.map((row) => sha(JSON.stringify(row)))).toEqual(expected.map(({ hash }) => hash));
      const items = choiceItems(task, rows);
      expect(items.map(({ answer }) => answer)).toEqual(expected.map(({ gold }) => gold));
      const found = await evaluateChoices(decoder, tokenizer, task, items);
      const off = found.logLikelihoods.flatMap((scores, i) =>
        scores.map((score, choice) => Math.abs(score - expected[i].logLikelihoods[choice])),
      );
      expect(Math.max(...off)).toBeLessThan(1e-3);
      expect(found.items.columns['acc']).toEqual(expected.map(({ right }) => right));
      if (task.metrics.includes('acc_norm')) {
        expect(found.items.columns['acc_norm']).toEqual(expected.map(({ rightNormed }) => rightNormed));
      }
      if (count === wanted.items.length) {
        expect(found.metrics['acc'].value).toBeCloseTo(wanted.acc, 12);
        if (wanted.acc_norm !== undefined) expect(found.metrics['acc_norm'].value).toBeCloseTo(wanted.acc_norm, 12);
      }
    },
    300_000,
  );
});
