// Evaluation against bare forward passes: tokens per second of perplexity and of choices, as shares of the prefill rate.
// Run: npx tsx bench/eval-throughput.ts [--model FOLDER | --shape NAME] [--device cpu|webgpu]
// [--precision auto|f32|f16] [--rounds N] [--threads N] [--out FILE]
//
// Prefill is what the model does with such tokens at best: hidden states and logits of full passes of 1024 rows, or
// of as many as the backend asks for. --shape takes a published model's shapes with random 4-bit weights, rotations included
// (WebGPU), e.g. Qwen3-0.6B. In every
// round each way is run between two prefills and compared with the mean of these, so that a machine that others load in the
// meantime disturbs both sides of a ratio alike. Ratios are medians over rounds, with the 95% interval of the median.
import { writeFileSync } from 'node:fs';
import { parseArgs } from 'node:util';
import { openBackend, PRECISIONS } from '../src/backends/registry.js';
import type { WebGpuBackend } from '../src/backends/webgpu/index.js';
import { createRng } from '../src/core/rng.js';
import { evaluateText, scoreContinuations, type LikelihoodRequest } from '../src/evaluation/index.js';
import { folderFiles } from '../src/formats/source.node.js';
import { loadDecoder, openModel } from '../src/models/load.js';
import { randomDecoder } from './support/random-decoder.js';
import { SHAPES } from './support/random-plan.js';

const { values } = parseArgs({
  options: {
    model: { type: 'string', default: 'models/gyre-14m' },
    shape: { type: 'string' },
    device: { type: 'string', default: 'cpu' },
    precision: { type: 'string', default: 'auto' },
    rounds: { type: 'string', default: '15' },
    threads: { type: 'string' },
    out: { type: 'string' },
  },
});
if (values.device !== 'cpu' && values.device !== 'webgpu') throw new Error('--device is cpu or webgpu');
const backend = await openBackend(values.device, {
  threads: values.threads === undefined ? undefined : Number(values.threads),
  precision: PRECISIONS.find((name) => name === values.precision),
});
const shape = SHAPES.find(({ name }) => name === values.shape);
if (values.shape !== undefined && (!shape || values.device !== 'webgpu'))
  throw new Error(`--shape takes ${SHAPES.map(({ name }) => name).join(', ')}, with --device webgpu`);
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
};

/** Tokens per second. */
async function speed(run: () => Promise<number>): Promise<number> {
  const begun = performance.now();
  const tokens = await run();
  return (1000 * tokens) / (performance.now() - begun);
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
const prefills: number[] = [];
const found = new Map(Object.keys(ways).map((name) => [name, { speeds: [] as number[], ratios: [] as number[] }]));
await prefill();
for (const run of Object.values(ways)) await run(); // compiles
for (let round = 0; round < rounds; round++) {
  let before = await speed(prefill);
  for (const [name, run] of Object.entries(ways)) {
    const own = await speed(run);
    const after = await speed(prefill);
    // Times add, so the mean rate of the two is the harmonic one.
    const { speeds, ratios } = found.get(name) ?? { speeds: [], ratios: [] };
    speeds.push(own);
    ratios.push((own * (before + after)) / (2 * before * after));
    prefills.push(before);
    console.error(`${name.padEnd(11)}  ${own.toFixed(0).padStart(7)} tokens/s, prefill ${after.toFixed(0)}`);
    before = after;
  }
}
console.log(`prefill      ${median(prefills).toFixed(0).padStart(7)} tokens/s`);
const rows = [...found].map(([name, { speeds, ratios }]) => {
  const [low, high] = medianInterval(ratios);
  console.log(
    `${name.padEnd(11)}  ${median(speeds).toFixed(0).padStart(7)} tokens/s  ${(100 * median(ratios)).toFixed(1)} % of prefill (${(100 * low).toFixed(1)} to ${(100 * high).toFixed(1)})`,
  );
  return { name, tokensPerSecond: median(speeds), shareOfPrefill: median(ratios), low, high };
});
if (values.out !== undefined) {
  const { description } = backend.info;
  const result = {
    benchmark: 'eval-throughput',
    model: shape?.name ?? values.model,
    backend: description,
    rounds,
    rows,
  };
  writeFileSync(values.out, `${JSON.stringify(result, null, 1)}\n`);
}
await source?.checkpoint.close();
await backend.dispose();
