// Evaluation against bare forward passes: tokens per second of perplexity and of choices, as shares of the prefill rate.
// Run: npx tsx bench/eval-throughput.ts [--model FOLDER] [--rounds N] [--threads N]
//
// Prefill is what the model does with such tokens at best: hidden states and logits of full passes of 1024 rows. The three
// are run in turn, several rounds; ratios are of medians, so that a busy machine disturbs all alike.
import { parseArgs } from 'node:util';
import { openBackend } from '../src/backends/registry.js';
import { createRng } from '../src/core/rng.js';
import { evaluateText, scoreContinuations, type LikelihoodRequest } from '../src/evaluation/index.js';
import { folderFiles } from '../src/formats/source.node.js';
import { loadDecoder, openModel } from '../src/models/load.js';

const { values } = parseArgs({
  options: {
    model: { type: 'string', default: 'models/gyre-14m' },
    rounds: { type: 'string', default: '7' },
    threads: { type: 'string' },
  },
});
const backend = await openBackend('cpu', {
  threads: values.threads === undefined ? undefined : Number(values.threads),
});
const source = await openModel(await folderFiles(values.model));
const decoder = await loadDecoder(backend, source);
const { vocabSize } = decoder.config;
const rng = createRng(1);
const draw = (length: number): Int32Array => Int32Array.from({ length }, () => rng.int(10, vocabSize));

const WINDOW = 512;
const text = draw(4 * WINDOW);
// Like ARC: 40 questions of 20 to 60 tokens with 4 choices of 2 to 12 tokens.
const requests: LikelihoodRequest[] = Array.from({ length: 40 }, () => draw(rng.int(20, 61))).flatMap((context) =>
  Array.from({ length: 4 }, () => ({ context, continuation: draw(rng.int(2, 13)) })),
);

/** Tokens per second of each way of running the model. */
const ways: Readonly<Record<string, () => Promise<number>>> = {
  prefill: async () => {
    for (let begin = 0; begin < text.length; begin += 2 * WINDOW) {
      const hidden = await decoder.hidden(text.subarray(begin, begin + 2 * WINDOW), { batch: 2 });
      backend.free(hidden, await decoder.logits(hidden));
    }
    return text.length;
  },
  perplexity: async () => {
    await evaluateText(decoder, text, { seqLen: WINDOW });
    return text.length;
  },
  choices: async () => (await scoreContinuations(decoder, requests)).tokens,
};

const speeds = new Map<string, number[]>(Object.keys(ways).map((name) => [name, []]));
for (let round = 0; round <= Number(values.rounds); round++) {
  for (const [name, run] of Object.entries(ways)) {
    const begun = performance.now();
    const tokens = await run();
    // The first round compiles.
    if (round > 0) speeds.get(name)?.push((1000 * tokens) / (performance.now() - begun));
  }
}
const median = (list: readonly number[]): number => [...list].sort((a, b) => a - b)[list.length >> 1];
const prefill = speeds.get('prefill') ?? [];
for (const [name, list] of speeds) {
  const ratio = median(list.map((speed, i) => speed / prefill[i]));
  console.log(
    `${name.padEnd(11)} ${median(list).toFixed(0).padStart(6)} tokens/s  ${(100 * ratio).toFixed(1)} % of prefill`,
  );
}
await source.checkpoint.close();
await backend.dispose();
