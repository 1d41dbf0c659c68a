// Evaluation against bare forward passes: tokens per second of perplexity, of choices given as tokens and of questions given as text, as
// shares of the prefill rate.
// Run: npx tsx bench/eval-throughput.ts [--model FOLDER | --shape NAME] [--device cpu|webgpu]
// [--precision auto|f32|f16] [--rounds N] [--seconds N] [--threads N] [--profile] [--host null|vulkan] [--out FILE]
//
// Prefill is what the model does with such tokens at best: hidden states and logits of full passes of 1024 rows, or
// of as many as the backend asks for, submitted one after the other and waited for at the end. --shape takes a published model's
// shapes with random 4-bit weights, rotations included (WebGPU), e.g. Qwen3-0.6B. Tokens are those that go through the model: padding
// does not count, and what sequences share counts once.
//
// In every round each way is run between two prefills and compared with the mean of these, so that a machine that others load in the
// meantime disturbs both sides of a ratio alike. Ratios are medians over rounds, with the 95% interval of the median; the
// result is written after every round, of which there are --rounds or as many as begin within --seconds. On a GPU the host's
// share is the time that went into submitting passes. --profile adds the GPU's time by kernel, once and after the rounds.
//
// --host null|vulkan leaves the GPU out: passes of --shape (default Qwen3-0.6B) on Dawn's null backend, which validates everything and computes
// nothing, or on the machine's Vulkan driver with empty kernels, both with the kernels that a GPU with matrix units takes. What is left
// is what the main thread does, in milliseconds on a processor per 2048 rows: it must stay well below what a GPU takes for them.
// --profile then tells the host's functions instead of kernels. Least is what counts on a machine that others load; on `vulkan` medians hold the
// main thread's polling, too. The null backend has 512 MB: nobody reads weights, so they are but beginnings; the vocabulary is cut to
// 4096, logits come in as many parts as the whole one's. (Its choices and questions make buffers anew for that reason; a GPU does not.)
import { readdirSync, readFileSync, writeFileSync } from 'node:fs';
import path from 'node:path';
import { parseArgs } from 'node:util';
import { openBackend, PRECISIONS } from '../src/backends/registry.js';
import { openWebGpuBackend, type WebGpuBackend } from '../src/backends/webgpu/index.js';
import { createRng } from '../src/core/rng.js';
import { evaluateChoices } from '../src/evaluation/choices.js';
import { evaluateText, scoreContinuations, type ChoiceItem, type LikelihoodRequest } from '../src/evaluation/index.js';
import { folderFiles } from '../src/formats/source.node.js';
import { loadDecoder, openModel } from '../src/models/load.js';
import { loadTokenizer } from '../src/tokenizer/index.js';
import { profileHost } from './support/host-profile.js';
import {
  countCalls,
  EMPTY_BACKENDS,
  emptyGpu,
  feigning,
  ones,
  sparing,
  threadMilliseconds,
} from './support/empty-gpu.js';
import { randomDecoder } from './support/random-decoder.js';
import { SHAPES } from './support/random-plan.js';
import { machine } from './support/results.js';

const { values } = parseArgs({
  options: {
    model: { type: 'string', default: 'models/gyre-14m' },
    shape: { type: 'string' },
    device: { type: 'string', default: 'cpu' },
    precision: { type: 'string', default: 'auto' },
    rounds: { type: 'string', default: '15' },
    seconds: { type: 'string', default: '600' },
    threads: { type: 'string' },
    profile: { type: 'boolean', default: false },
    host: { type: 'string' },
    out: { type: 'string' },
  },
});
if (values.device !== 'cpu' && values.device !== 'webgpu') throw new Error('--device is cpu or webgpu');
const empty = EMPTY_BACKENDS.find((name) => name === values.host);
if (values.host !== empty) throw new Error(`--host is ${EMPTY_BACKENDS.join(' or ')}`);
const backend = empty
  ? await openWebGpuBackend({
      entry: await emptyGpu(empty),
      precision: 'auto',
      ...(empty === 'null' && { memoryBytes: 440 * 2 ** 20 }),
    })
  : await openBackend(values.device, {
      threads: values.threads === undefined ? undefined : Number(values.threads),
      precision: PRECISIONS.find((name) => name === values.precision),
    });
const named = SHAPES.find(({ name }) => name === (values.shape ?? (empty ? 'Qwen3-0.6B' : undefined)));
if (values.shape !== undefined && (!named || (values.device !== 'webgpu' && !empty)))
  throw new Error(`--shape takes ${SHAPES.map(({ name }) => name).join(', ')}, with --device webgpu or --host`);
const shape = named && empty ? { ...named, vocab: 4096 } : named;
if (named && empty) {
  const { pass } = backend.info;
  if (!pass) throw new Error('this backend is not taken for a GPU with matrix units');
  const logitsBytes = (pass.logitsBytes * 4096) / named.vocab;
  Object.assign(backend, { info: { ...backend.info, pass: { ...pass, logitsBytes } } });
  sparing((backend as WebGpuBackend).gpu, 'a weight of');
}
const source = shape ? undefined : await openModel(await folderFiles(values.model));
const decoder = source
  ? await loadDecoder(backend, source)
  : await randomDecoder(backend as WebGpuBackend, shape ?? SHAPES[0], 'paroquant', 4096);
const { vocabSize } = decoder.config;
const rng = createRng(1);
const draw = (length: number): Int32Array => Int32Array.from({ length }, () => rng.int(10, vocabSize));

const WINDOW = 512;
const large = backend.info.pass !== undefined;
const { rows: passRows = 2 * WINDOW } = backend.info.pass ?? {};
const text = draw(large ? 8 * passRows : 4 * WINDOW);
// Like ARC: questions of 20 to 60 tokens with 4 choices of 2 to 12 tokens; where passes are large, as many as its test set has.
const requests: LikelihoodRequest[] = Array.from({ length: large ? 1000 : 40 }, () => draw(rng.int(20, 61))).flatMap(
  (context) => Array.from({ length: 4 }, () => ({ context, continuation: draw(rng.int(2, 13)) })),
);

// Such questions as text, to be encoded, hashed and judged: runs of words of the prose beside the bundled model, by its tokenizer, whose
// ids every model has.
const BUNDLED = 'models/gyre-14m';
const tokenizer = await loadTokenizer(await folderFiles(source ? values.model : BUNDLED));
const prose = path.join(BUNDLED, 'eval/prose');
const vocabulary = readdirSync(prose).flatMap((file) => readFileSync(path.join(prose, file), 'utf8').split(/\s+/));
const words = (count: number): string => {
  const begin = rng.int(0, vocabulary.length - count);
  return vocabulary.slice(begin, begin + count).join(' ');
};
const questions = Array.from({ length: requests.length / 4 }, (_, i): ChoiceItem => {
  const context = `Question: ${words(rng.int(14, 43))}\nAnswer:`;
  const continuations = Array.from({ length: 4 }, () => ` ${words(rng.int(1, 9))}`);
  return {
    id: String(i),
    group: null,
    contexts: continuations.map(() => context),
    continuations,
    bytes: continuations.map((text) => text.length - 1),
    answer: 0,
  };
});
const QUESTIONS = { type: 'choices', metrics: ['acc', 'acc_norm'] } as const;

/** Full passes; the host waits for the last one. Tokens that went through. */
async function prefill(): Promise<number> {
  for (let begin = 0; begin < text.length; begin += passRows) {
    const hidden = await decoder.hidden(text.subarray(begin, begin + passRows), { batch: passRows / WINDOW });
    const logits = await decoder.logits(hidden);
    if (begin + passRows >= text.length) await backend.download(backend.sliceRows(logits, 0, 1));
    backend.free(hidden, logits);
  }
  return text.length;
}

/** What is compared with it. */
const ways: Readonly<Record<string, () => Promise<number>>> = {
  perplexity: async () => {
    await evaluateText(decoder, text, { seqLen: WINDOW });
    return text.length;
  },
  choices: async () => (await scoreContinuations(decoder, requests)).tokens,
  questions: async () => (await evaluateChoices(decoder, tokenizer, QUESTIONS, questions)).throughput.promptTokens,
};

/** Milliseconds spent in the decoder's own calls, which wait for nothing on a GPU. */
let submitting = 0;
for (const name of ['hidden', 'logits'] as const) {
  const method = decoder[name].bind(decoder) as (...args: never[]) => unknown;
  Object.assign(decoder, {
    [name]: async (...args: never[]): Promise<unknown> => {
      const begun = performance.now();
      const result = await method(...args);
      submitting += performance.now() - begun;
      return result;
    },
  });
}

interface Run {
  readonly tokensPerSecond: number;
  /** Share of the time in which passes were submitted. */
  readonly host: number;
}

async function measure(run: () => Promise<number>): Promise<Run> {
  submitting = 0;
  const begun = performance.now();
  const tokens = await run();
  const milliseconds = performance.now() - begun;
  return { tokensPerSecond: (1000 * tokens) / milliseconds, host: submitting / milliseconds };
}

const sorted = (list: readonly number[]): number[] => [...list].sort((a, b) => a - b);
const median = (list: readonly number[]): number => sorted(list)[list.length >> 1];

/** 95% interval of a median: order statistics, by the binomial distribution of how many lie below it. */
function medianInterval(list: readonly number[]): [low: number, high: number] {
  const n = list.length;
  let below = 0;
  let probability = 0.5 ** n;
  let tail = probability;
  while (tail <= 0.025 && below < n) {
    below++;
    probability *= (n - below + 1) / below;
    tail += probability;
  }
  const at = Math.max(0, below - 1);
  return [sorted(list)[at], sorted(list)[n - 1 - at]];
}

const rounds = Number(values.rounds);
if (empty) {
  await measureHost();
  process.exit();
}

/** The main thread's time per 2048 rows of each way. */
async function measureHost(): Promise<void> {
  const { gpu } = backend as WebGpuBackend;
  // Zeros are no scores: a sum of exponentials of 1 is one.
  feigning(gpu, ones);
  const all: Readonly<Record<string, () => Promise<number>>> = { prefill, ...ways };
  for (const run of Object.values(all)) for (let i = 0; i < 3; i++) await run(); // compiled by V8 too
  const times = Object.keys(all).map((name) => ({
    name,
    thread: [] as number[],
    clock: [] as number[],
    submitting: [] as number[],
  }));
  const until = performance.now() + 1000 * Number(values.seconds);
  for (let round = 0; round < rounds && (round === 0 || performance.now() < until); round++)
    for (const { name, thread, clock, submitting: inside } of times) {
      submitting = 0;
      const [begunThread, begun] = [threadMilliseconds(), performance.now()];
      const per = passRows / (await all[name]());
      clock.push((performance.now() - begun) * per);
      thread.push((threadMilliseconds() - begunThread) * per);
      inside.push(submitting * per);
    }
  const rows: unknown[] = [];
  for (const { name, ...lists } of times) {
    let tokens = 0;
    const calls = await countCalls(gpu.device, async () => (tokens = await all[name]()));
    const passes = tokens / passRows;
    const perPass = Object.fromEntries(Object.entries(calls).map(([call, count]) => [call, count / passes]));
    const row = {
      name,
      ...Object.fromEntries(Object.entries(lists).map(([key, list]) => [key, median(list)])),
      least: Math.min(...lists.thread),
      calls: perPass,
    };
    rows.push(row);
    console.log(
      `${name.padEnd(11)} ${median(lists.thread).toFixed(2).padStart(6)} ms of the main thread per ${passRows} rows (least ${row.least.toFixed(2)}), ` +
        `${median(lists.clock).toFixed(2)} by the clock, ${median(lists.submitting).toFixed(2)} in hidden and logits; ` +
        Object.entries(perPass)
          .map(([call, count]) => `${count.toFixed(1)} ${call}`)
          .join(', '),
    );
  }
  for (const [name, run] of values.profile ? Object.entries(all) : []) {
    let tokens = 0;
    const functions = await profileHost(async () => {
      for (let i = 0; i < 4; i++) tokens += await run();
    });
    const total = functions.reduce((sum, { milliseconds }) => sum + milliseconds, 0);
    const per = passRows / tokens;
    console.log(`${name}: ${(total * per).toFixed(2)} ms per ${passRows} rows under the profiler`);
    for (const { where, milliseconds } of functions.slice(0, 30))
      console.log(`  ${(milliseconds * per).toFixed(3).padStart(7)} ms ${where}`);
  }
  if (values.out !== undefined) {
    const found = { benchmark: 'eval-throughput --host', model: shape?.name, backend: backend.info.description };
    writeFileSync(values.out, `${JSON.stringify({ machine: machine(), ...found, rounds, passRows, rows }, null, 1)}\n`);
  }
}

const inTime = (): boolean => performance.now() - begun < 1000 * Number(values.seconds);
const prefills: Run[] = [];
const found = new Map(Object.keys(ways).map((name) => [name, [] as (Run & { readonly ratio: number })[]]));
await prefill();
for (const run of Object.values(ways)) await run(); // compiles
// A GPU takes a second to come to its clocks.
if (large) for (const warm = performance.now(); performance.now() - warm < 1500;) await prefill();
const begun = performance.now();
const profiles: Record<string, unknown> = {};

/** Everything so far. */
function result(): Record<string, unknown> {
  const rows = [...found].map(([name, runs]) => {
    const [low, high] = medianInterval(runs.map(({ ratio }) => ratio));
    return {
      name,
      tokensPerSecond: median(runs.map((run) => run.tokensPerSecond)),
      shareOfPrefill: median(runs.map(({ ratio }) => ratio)),
      low,
      high,
      host: median(runs.map(({ host }) => host)),
    };
  });
  const speeds = prefills.map((run) => run.tokensPerSecond);
  return {
    benchmark: 'eval-throughput',
    model: shape?.name ?? values.model,
    backend: backend.info.description,
    rounds: Math.min(...[...found.values()].map((runs) => runs.length)),
    passRows,
    prefill: { tokensPerSecond: median(speeds), host: median(prefills.map(({ host }) => host)) },
    rows,
    ...(values.profile && { profiles }),
  };
}
const write = (): void => {
  if (values.out !== undefined) writeFileSync(values.out, `${JSON.stringify(result(), null, 1)}\n`);
};

for (let round = 0; round < rounds && (round === 0 || inTime()); round++) {
  let before = await measure(prefill);
  for (const [name, run] of Object.entries(ways)) {
    const own = await measure(run);
    const after = await measure(prefill);
    // Times add, so the mean rate of the two is the harmonic one.
    const [a, b] = [before.tokensPerSecond, after.tokensPerSecond];
    found.get(name)?.push({ ...own, ratio: (own.tokensPerSecond * (a + b)) / (2 * a * b) });
    prefills.push(before);
    console.error(
      `${name.padEnd(11)}  ${own.tokensPerSecond.toFixed(0).padStart(7)} tokens/s, prefill ${b.toFixed(0)}`,
    );
    before = after;
  }
  write();
}
console.log(
  `prefill      ${median(prefills.map((run) => run.tokensPerSecond))
    .toFixed(0)
    .padStart(7)} tokens/s`,
);
for (const [name, runs] of found) {
  const ratios = runs.map(({ ratio }) => ratio);
  const [low, high] = medianInterval(ratios).map((ratio) => (100 * ratio).toFixed(1));
  const rate = median(runs.map((run) => run.tokensPerSecond))
    .toFixed(0)
    .padStart(7);
  const host = (100 * median(runs.map((run) => run.host))).toFixed(0);
  console.log(
    `${name.padEnd(11)}  ${rate} tokens/s  ${(100 * median(ratios)).toFixed(1)} % of prefill (${low} to ${high}), submitting ${host} % of the time`,
  );
}
if (values.profile && shape) {
  const { gpu } = backend as WebGpuBackend;
  for (const [name, run] of Object.entries({ prefill, ...ways })) {
    gpu.startProfile();
    const tokens = await run();
    const kernels = await gpu.stopProfile();
    const calls = kernels.reduce((sum, kernel) => sum + kernel.calls, 0);
    const milliseconds = kernels.reduce((sum, { seconds }) => sum + 1000 * seconds, 0);
    profiles[name] = { tokens, dispatches: calls, milliseconds, kernels };
    console.log(`${name}: ${tokens} tokens, ${calls} dispatches, ${milliseconds.toFixed(1)} ms on the GPU`);
    for (const kernel of kernels.slice(0, 12))
      console.log(
        `  ${kernel.name.padEnd(44)} ${String(kernel.calls).padStart(5)} ${(1000 * kernel.seconds).toFixed(2)} ms`,
      );
  }
  write();
}
await source?.checkpoint.close();
await backend.dispose();
