// Intervals, likelihoods, resuming, reasoning and comparison.
import { appendFileSync, readFileSync } from 'node:fs';
import { mkdtemp, rm } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import path from 'node:path';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { openBackend } from '../../src/backends/registry.js';
import { shareInterval, studentQuantile, weightedMean, wilson } from '../../src/core/intervals.js';
import { createRng } from '../../src/core/rng.js';
import { evaluateChoices } from '../../src/evaluation/choices.js';
import { compareResults, parseResult } from '../../src/evaluation/compare.js';
import { loadTask } from '../../src/evaluation/data.node.js';
import type { ChoicesTask, GenerationTask } from '../../src/evaluation/definition.js';
import { metric, pairedBootstrap } from '../../src/evaluation/metrics.js';
import { choiceItems, generationItems, type ChoiceItem } from '../../src/evaluation/items.js';
import {
  encodePair,
  scoreContinuations,
  truncateLeft,
  type LikelihoodRequest,
} from '../../src/evaluation/likelihood.js';
import { evaluateReasoning, type Transcript } from '../../src/evaluation/reasoning.js';
import { openRequestCache } from '../../src/evaluation/request-cache.node.js';
import { evaluateText } from '../../src/evaluation/perplexity.js';
import { textResult } from '../../src/evaluation/text-result.js';
import { resultSchema, type Evaluation, type EvaluationResult } from '../../src/evaluation/results.js';
import { folderFiles } from '../../src/formats/source.node.js';
import { Decoder } from '../../src/models/decoder.js';
import { loadDecoder, openModel, type ModelSource } from '../../src/models/load.js';
import type { Backend } from '../../src/ops/backend.js';
import { loadTokenizer, type Tokenizer } from '../../src/tokenizer/index.js';

const bundled = path.join(import.meta.dirname, '../../models/gyre-14m');
let backend: Backend;
let source: ModelSource;
let decoder: Decoder;
let tokenizer: Tokenizer;
let folder: string;
beforeAll(async () => {
  folder = await mkdtemp(path.join(tmpdir(), 'gyre-eval-'));
  backend = await openBackend('cpu');
  const files = await folderFiles(bundled);
  source = await openModel(files);
  decoder = await loadDecoder(backend, source);
  tokenizer = await loadTokenizer(files);
});
afterAll(async () => {
  await source.checkpoint.close();
  await backend.dispose();
  await rm(folder, { recursive: true, force: true });
});

describe('intervals', () => {
  it.each([
    [1, 12.706204736],
    [2, 4.30265273],
    [5, 2.570581836],
    [29, 2.045229642],
    [1000, 1.962339081],
    [1e7, 1.959963985],
  ])("Student's quantile for %d degrees of freedom", (degrees, wanted) => {
    expect(studentQuantile(degrees)).toBeCloseTo(wanted, 6);
  });

  it("are Wilson's for shares", () => {
    // By hand: 8 of 10.
    expect(wilson(8, 10).low).toBeCloseTo(0.4901624715, 8);
    expect(wilson(8, 10).high).toBeCloseTo(0.9433178485, 8);
    expect(wilson(0, 5)).toMatchObject({ low: 0 });
    expect(wilson(5, 5)).toMatchObject({ high: 1 });
  });

  it('of shares of several answers stay within 0 and 1, and between those of as many items and as many answers', () => {
    const width = ({ low, high }: { low: number; high: number }): number => high - low;
    expect(shareInterval([0, 1, 1, 0, 1], 1)).toEqual(wilson(3, 5));
    // Nothing right in two answers to two questions is no proof of 0.
    expect(shareInterval([0, 0], 2)).toEqual(wilson(0, 2));
    const half = shareInterval([0.5, 0], 2);
    expect(half.low).toBeGreaterThan(0);
    expect(half.high).toBeLessThan(1);
    // Answers that agree within a question are worth one each; those that vary as coins do are worth all.
    const alike = Array.from({ length: 40 }, (_, i) => i % 2);
    expect(width(shareInterval(alike, 4))).toBeCloseTo(width(wilson(20, 40)), 2);
    expect(
      shareInterval(
        Array.from({ length: 40 }, () => 0.5),
        4,
      ),
    ).toEqual(wilson(80, 160));
    const found = metric({ column: 'agree', values: [0.999, 0.9], better: 'higher', unit: 'share' });
    expect([found.low, found.high]).toEqual([expect.any(Number), 1]);
  });

  it('of weighted means are those of the ratio', () => {
    const equal = weightedMean([1, 2, 3, 6]);
    expect(equal.mean).toBe(3);
    expect(equal.standardError).toBeCloseTo(Math.sqrt((4 + 1 + 0 + 9) / 3 / 4), 12);
    expect(weightedMean([1, 5], [3, 1]).mean).toBe(2);
    expect(weightedMean([7]).standardError).toBeNull();
  });

  it('go through the transform', () => {
    const found = metric({ column: 'nll', values: [1, 2, 3], transform: 'exp', better: 'lower' });
    expect(found.value).toBeCloseTo(Math.exp(2), 12);
    expect(Math.log(found.high ?? 0) - 2).toBeCloseTo((4.30265273 * 1) / Math.sqrt(3), 6);
    expect(metric({ column: 'nll', values: [1], better: 'lower' })).toMatchObject({ low: null, interval: 'none' });
  });

  it('of differences hold what they promise: 95% of them leave out 0 wrongly in 5%', () => {
    const rng = createRng(9);
    let called = 0;
    for (let trial = 0; trial < 200; trial++) {
      const hard = Array.from({ length: 60 }, () => rng.normal());
      const noisy = (): number[] => hard.map((h) => h + 0.3 * rng.normal());
      if (pairedBootstrap(noisy(), noisy(), { resamples: 400, seed: trial }).significant) called++;
    }
    expect(called / 200).toBeLessThan(0.12);
    const base = Array.from({ length: 60 }, () => rng.normal());
    const shifted = base.map((value) => value + 0.1 + 0.05 * rng.normal());
    expect(pairedBootstrap(base, shifted)).toMatchObject({ significant: true, n: 60 });
    expect(pairedBootstrap(base, base)).toMatchObject({ significant: false, difference: 0, pValue: 1 });
  });
});

/** Log-likelihood of a continuation, the sequence alone and whole. */
async function alone({ context, continuation }: LikelihoodRequest): Promise<number> {
  const ids = Int32Array.from([...context, ...continuation]);
  // The last token is only predicted.
  const hidden = await decoder.hidden(ids.slice(0, -1));
  const logits = await decoder.logits(hidden);
  const rows = backend.sliceRows(logits, context.length - 1, ids.length - 1);
  const { nll } = await backend.score(rows, continuation);
  backend.free(hidden, logits);
  return -nll.reduce((sum, x) => sum + x, 0);
}

describe('scoreContinuations', () => {
  it('gives what every sequence gives alone: shared, lone, short and long ones, with and without a common beginning', async () => {
    const rng = createRng(4);
    const draw = (length: number): Int32Array => Int32Array.from({ length }, () => rng.int(10, 4000));
    for (const header of [0, 40]) {
      const common = draw(header);
      const requests = [1, 3, 30, 30, 7, 65, 2, 1].flatMap((length, i) => {
        const context = Int32Array.from([...common, ...draw(length)]);
        return Array.from({ length: 1 + (i % 4) }, () => ({ context, continuation: draw(rng.int(1, 14)) }));
      });
      const seen: number[] = [];
      const { results, tokens } = await scoreContinuations(decoder, requests, {
        greedy: true,
        onScored: (indices) => void seen.push(...indices),
      });
      expect([...seen].sort((a, b) => a - b)).toEqual(requests.map((_, i) => i));
      for (const [i, request] of requests.entries()) {
        expect(results[i].logLikelihood).toBeCloseTo(await alone(request), 3);
      }
      expect(results.some(({ greedy }) => greedy === false)).toBe(true);
      // What is shared was computed once.
      const separate = requests.reduce((sum, r) => sum + r.context.length + r.continuation.length - 1, 0);
      expect(tokens).toBeLessThan(0.75 * separate);
    }
  });

  it('gives the same through a cache where sequences are too long for a pass', async () => {
    const rng = createRng(6);
    const draw = (length: number): Int32Array => Int32Array.from({ length }, () => rng.int(10, 4000));
    // Passes of 24 rows: whatever exceeds 96 is long.
    const narrow = Object.assign(Object.create(null) as Backend, backend, {
      info: { ...backend.info, pass: { rows: 24, logitsBytes: 5 * 4 * decoder.config.vocabSize } },
    });
    const small = new Decoder(narrow, decoder.config, decoder.parts);
    const shared = draw(100);
    const requests = [shared, shared, draw(4), Int32Array.from([...shared, ...draw(3)])].flatMap((context) =>
      [1, 11].map((length) => ({ context, continuation: draw(length) })),
    );
    const { results, tokens } = await scoreContinuations(small, requests, { greedy: true });
    for (const [i, request] of requests.entries())
      expect(results[i].logLikelihood).toBeCloseTo(await alone(request), 3);
    expect(results.every(({ greedy }) => greedy !== null)).toBe(true);
    expect(tokens).toBeLessThanOrEqual(100 + 1 + 4 * 11 + 3 + 4 + 10);
  });

  it('knows what greedy decoding would say', async () => {
    const context = tokenizer.encode('<|bos|><|user|>Compute 413 + 436.<|assistant|>', { addSpecialTokens: false });
    const continuation = tokenizer.encode('<think>', { addSpecialTokens: false });
    const other = tokenizer.encode('the', { addSpecialTokens: false });
    const { results } = await scoreContinuations(
      decoder,
      [
        { context, continuation },
        { context, continuation: other },
      ],
      { greedy: true },
    );
    expect(results.map(({ greedy }) => greedy)).toEqual([true, false]);
  });

  it('cuts questions that do not fit as the harness does: their last tokens stay', () => {
    const request = { context: Int32Array.of(1, 2, 3, 4, 5), continuation: Int32Array.of(6, 7, 8) };
    // The last token is only predicted, so seven go through the model.
    expect(truncateLeft(request, 7)).toBe(request);
    const { context, continuation } = truncateLeft(request, 5);
    expect([[...context], [...continuation]]).toEqual([
      [3, 4, 5],
      [6, 7, 8],
    ]);
    expect([...truncateLeft(request, 3).context]).toEqual([5]);
    // A continuation that fills the context by itself is left to be refused.
    expect(truncateLeft(request, 2)).toBe(request);
  });

  it('refuses what does not fit the context', async () => {
    const long = new Int32Array(2049).fill(20);
    await expect(
      scoreContinuations(decoder, [{ context: long, continuation: Int32Array.of(1) }]),
    ).rejects.toMatchObject({ code: 'context-length' });
  });

  it('splits as the harness does', () => {
    const pair = encodePair(tokenizer, 'The cat  ', ' sat');
    const whole = tokenizer.encode('The cat   sat', { addSpecialTokens: false });
    expect([...pair.context, ...pair.continuation]).toEqual([...whole]);
    expect([...pair.context]).toEqual([...tokenizer.encode('The cat', { addSpecialTokens: false })]);
    expect([...encodePair(tokenizer, '', 'sat').context]).toEqual([tokenizer.bosTokenId]);
    expect(encodePair(tokenizer, 'The', ' cat', 1).context[0]).toBe(1);
  });
});

describe('evaluateChoices', () => {
  const rows = Array.from({ length: 12 }, (_, i) => ({
    goal: `open a jar number ${i}`,
    sol1: 'turn the lid',
    sol2: 'paint it blue all over',
    label: i % 2,
  }));
  let task: ChoicesTask;
  let items: ChoiceItem[];
  beforeAll(async () => {
    const loaded = await loadTask('piqa');
    if (loaded.type !== 'choices') throw new Error('no choices');
    task = loaded;
    items = choiceItems(task, rows);
  });

  it('measures questions longer than the context, and counts them', async () => {
    const long = { goal: 'open a jar '.repeat(1500), sol1: 'turn the lid', sol2: 'paint it', label: 0 };
    const found = await evaluateChoices(decoder, tokenizer, task, choiceItems(task, [rows[0], long]));
    expect(found.truncated).toBe(2);
    const [, scores] = found.logLikelihoods;
    const whole = encodePair(tokenizer, `Question: ${long.goal}\nAnswer:`, ' turn the lid');
    const kept = Int32Array.from([...whole.context, ...whole.continuation]).slice(-(decoder.config.maxPositions + 1));
    const length = whole.continuation.length;
    expect(scores[0]).toBeCloseTo(
      await alone({ context: kept.slice(0, -length), continuation: whole.continuation }),
      3,
    );
  });

  it('gives the same however many items are scored together, and tells of all of them', async () => {
    const whole = await evaluateChoices(decoder, tokenizer, task, items);
    const done: number[] = [];
    const parts = await evaluateChoices(decoder, tokenizer, task, items, {
      itemsAtOnce: 5,
      onProgress: (event) => {
        expect(event.total).toBe(24);
        done.push(event.done);
      },
    });
    expect(parts.items).toEqual(whole.items);
    expect(done).toEqual([10, 20, 24]);
    parts.logLikelihoods.flat().forEach((score, i) => expect(score).toBeCloseTo(whole.logLikelihoods.flat()[i], 4));
    const stopped = new AbortController();
    const cut = evaluateChoices(decoder, tokenizer, task, items, {
      itemsAtOnce: 5,
      onProgress: () => stopped.abort(),
      signal: stopped.signal,
    });
    await expect(cut).rejects.toMatchObject({ code: 'interrupted' });
  });

  it('goes on after a run that was killed in the middle of a line, and ends with the same', async () => {
    const file = path.join(folder, 'cache', 'piqa.jsonl');
    const whole = await evaluateChoices(decoder, tokenizer, task, items);
    const first = await openRequestCache(file);
    await evaluateChoices(decoder, tokenizer, task, items.slice(0, 7), { cache: first, cacheScope: 'model a' });
    await first.close();
    appendFileSync(file, '["0123456789abcdef", [-1.5, nu');
    const second = await openRequestCache(file);
    expect(second.known).toBe(14);
    const resumed = await evaluateChoices(decoder, tokenizer, task, items, { cache: second, cacheScope: 'model a' });
    await second.close();
    expect(resumed.items).toEqual(whole.items);
    expect(resumed.throughput.promptTokens).toBeLessThan(whole.throughput.promptTokens);
    resumed.logLikelihoods.flat().forEach((score, i) => expect(score).toBeCloseTo(whole.logLikelihoods.flat()[i], 4));
    // Another model shares nothing; everything known costs nothing.
    const third = await openRequestCache(file);
    expect(third.known).toBe(24);
    const other = await evaluateChoices(decoder, tokenizer, task, items, { cache: third, cacheScope: 'model b' });
    expect(other.throughput.promptTokens).toBe(whole.throughput.promptTokens);
    const again = await evaluateChoices(decoder, tokenizer, task, items, { cache: third, cacheScope: 'model a' });
    expect(again.throughput.promptTokens).toBe(0);
    expect(again.items).toEqual(whole.items);
    await third.close();
    expect(readFileSync(file, 'utf8').endsWith('\n')).toBe(true);
  });
});

describe('evaluateReasoning', () => {
  it('answers, judges and keeps transcripts; resumes', async () => {
    const task = (await loadTask('chains')) as GenerationTask;
    const rows = [
      { kind: 'addition', question: 'Compute 413 + 436.', answer: '849' },
      { kind: 'addition', question: 'What is 8 + 9?', answer: '17' },
      { kind: 'sorting', question: 'Put 96, 19 in order, smallest first.', answer: '19,96' },
    ];
    const items = generationItems(task, rows);
    const file = path.join(folder, 'cache', 'chains.jsonl');
    const cache = await openRequestCache(file);
    const transcripts: Transcript[] = [];
    const found = await evaluateReasoning(decoder, tokenizer, task, items, {
      samples: 2,
      temperature: 0.3,
      slots: 4,
      cache,
      onTranscript: (transcript) => void transcripts.push(transcript),
    });
    expect(found.metrics['pass@1'].value).toBeGreaterThan(0.6);
    expect(found.items.columns['pass@1']).toHaveLength(3);
    expect(found.groups.map(({ name, items }) => [name, items])).toEqual([
      ['addition', 2],
      ['sorting', 1],
    ]);
    expect(found.stopReasons).toEqual({ eos: 6, length: 0 });
    expect(transcripts).toHaveLength(6);
    expect(transcripts[0]).toMatchObject({ id: '0', sample: 0, expected: '849', stop: 'eos' });
    expect(transcripts[0].prompt).toContain('Compute 413 + 436.');
    const again = await evaluateReasoning(decoder, tokenizer, task, items, {
      samples: 2,
      temperature: 0.3,
      slots: 1,
      cache,
    });
    expect(again.throughput.generatedTokens).toBe(0);
    expect(again.items).toEqual(found.items);
    await cache.close();
    const cut = await evaluateReasoning(decoder, tokenizer, task, items, { maxTokens: 3 });
    expect(cut.stopReasons).toEqual({ eos: 0, length: 3 });
    expect(cut.metrics['answered'].value).toBe(0);
  });
});

describe('compareResults', () => {
  const evaluation = (values: readonly number[], settings: Record<string, number> = {}): Evaluation => ({
    type: 'choices',
    name: 'piqa',
    version: 1,
    source: { dataset: null, revision: null, split: 'validation', files: [] },
    settings,
    primary: 'acc',
    metrics: { acc: metric({ column: 'acc', values, better: 'higher', unit: 'share', answers: 1 }) },
    items: { ids: values.map((_, i) => `q${i}`), hashes: values.map((_, i) => `h${i}`), columns: { acc: [...values] } },
    throughput: { seconds: 1, promptTokens: 1, generatedTokens: 0, tokensPerSecond: 1 },
    groups: [],
    truncated: 0,
  });
  const result = (evaluations: Evaluation[]): EvaluationResult => ({
    kind: 'gyre.evaluation',
    schemaVersion: 1,
    version: '0',
    createdAt: '2026-01-01T00:00:00Z',
    model: {
      name: 'm',
      family: 'qwen3',
      fingerprint: 'f',
      quantization: null,
      parameters: 1,
      bytes: 2,
      bitsPerWeight: 16,
      linearBitsPerWeight: 16,
    },
    reference: null,
    backend: { name: 'cpu', description: '', threads: 1 },
    machine: {},
    settings: {},
    evaluations,
  });
  const rng = createRng(2);
  const base = Array.from({ length: 400 }, () => (rng.uniform() < 0.7 ? 1 : 0));
  const compare = (a: Evaluation, b: Evaluation) =>
    compareResults([
      { name: 'a', result: result([a]) },
      { name: 'b', result: result([b]) },
    ])[0];

  it('calls a difference one only when it is', () => {
    const worse = base.map((right, i) => (i % 9 === 0 ? 0 : right));
    const nearly = base.map((right, i) => (i === 5 ? 1 - right : right));
    expect(compare(evaluation(base), evaluation(worse)).metrics[0]).toMatchObject({ verdict: 'worse', unpaired: null });
    expect(compare(evaluation(worse), evaluation(base)).metrics[0]).toMatchObject({ verdict: 'better' });
    expect(compare(evaluation(base), evaluation(nearly)).metrics[0]).toMatchObject({ verdict: 'no difference shown' });
  });

  it('pairs what both have, by content, and says what cannot be paired', () => {
    const fewer = evaluation(base.slice(0, 300), { limit: 300 });
    expect(compare(evaluation(base, { limit: 400 }), fewer).metrics[0].difference).toMatchObject({ n: 300 });
    const other = evaluation(base);
    const renamed: Evaluation = { ...other, items: { ...other.items, hashes: other.items.ids.map(() => 'x') } };
    expect(compare(evaluation(base), renamed).metrics[0]).toMatchObject({ verdict: 'not compared', difference: null });
    expect(compare(evaluation(base, { fewShot: 0 }), evaluation(base, { fewShot: 5 })).metrics[0].unpaired).toContain(
      'fewShot 0 and 5',
    );
    expect(compare(evaluation(base), { ...evaluation(base), version: 2 }).metrics[0].unpaired).toContain('versions');
    expect(compare(evaluation(base), { ...evaluation(base), name: 'arc' })).toMatchObject({
      metrics: [],
      missing: ['piqa', 'arc'],
    });
  });

  it('compares windows of a text by what is in them', async () => {
    const ids = (seed: number): Int32Array => {
      const draw = createRng(seed);
      return Int32Array.from({ length: 160 }, () => draw.int(10, 4000));
    };
    const measured = async (seed: number): Promise<Evaluation> => ({
      type: 'text',
      name: 'text',
      version: 1,
      source: { dataset: null, revision: null, split: null, files: [] },
      settings: {},
      ...(await textResult(await evaluateText(decoder, ids(seed), { seqLen: 32 }), [{ name: 'a', text: '' }], false)),
    });
    const [first, again, other] = [await measured(1), await measured(1), await measured(2)];
    expect(compare(first, again).metrics[0]).toMatchObject({ verdict: 'no difference shown', difference: { n: 5 } });
    expect(compare(first, other).metrics[0]).toMatchObject({ verdict: 'not compared', difference: null });
  });

  it('reads result files, and nothing else', () => {
    const good = result([evaluation([0, 1, 1])]);
    expect(parseResult(JSON.stringify(good), 'a.json')).toEqual(resultSchema.parse(good));
    expect(() => parseResult('{', 'a.json')).toThrow(/not JSON/);
    expect(() => parseResult('[]', 'a.json')).toThrow(/no evaluation result/);
    expect(() => parseResult(JSON.stringify({ ...good, schemaVersion: 2 }), 'a.json')).toThrow(/version 2/);
    const short = evaluation([0, 1, 1]);
    const uneven = { ...short, items: { ...short.items, columns: { acc: [1] } } };
    expect(() => parseResult(JSON.stringify(result([uneven as Evaluation])), 'a.json')).toThrow(/as long as ids/);
    expect(() => compareResults([{ name: 'a', result: good }])).toThrow(/two results/);
  });
});
