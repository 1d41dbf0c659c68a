// Every recipe on the bundled model at 4 and 3 bits: KL and perplexity on the project's prose and tasks (and on other texts
// given), against the numbers to reach: KL(paroquant) ≤ 0.65 × KL(awq), perplexity increase ≤ 0.50 × AWQ's. Ratios come with
// 95% intervals of a paired block bootstrap over windows; a text of 300k tokens or more (--windows) makes them narrow.
// Run: npx tsx bench/recipes.ts [--bits 4,3] [--calib FILE…] [--text FILE…] [--methods a,b] [--name NAME] [--seeds 0,1]
//   [--windows 40] windows of 1024 tokens scored per text, spread evenly
import { mkdtempSync, readFileSync, readdirSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import path from 'node:path';
import { parseArgs } from 'node:util';
import { openBackend } from '../src/backends/registry.js';
import { writeCalibrationText } from '../src/calibration-text.node.js';
import { evaluateText, formatTask, parseTasks, remembering, tokenizeTexts } from '../src/evaluation/index.js';
import { folderFiles } from '../src/formats/source.node.js';
import { loadDecoder, openModel } from '../src/models/load.js';
import type { WeightBits } from '../src/ops/backend.js';
import { quantizeCheckpoint } from '../src/quantize.node.js';
import { loadTokenizer } from '../src/tokenizer/index.js';
import { pairedRatio } from './support/bootstrap.js';
import { plotRecipes } from './support/plot.js';
import { round, writeResult } from './support/results.js';

const MODEL = path.join(import.meta.dirname, '../models/gyre-14m');
const { values: options } = parseArgs({
  options: {
    bits: { type: 'string', default: '4,3' },
    calib: { type: 'string', multiple: true },
    text: { type: 'string', multiple: true, default: [] },
    methods: { type: 'string', default: 'rtn,awq,gptq,paroquant' },
    name: { type: 'string', default: 'recipes' },
    seeds: { type: 'string', default: '0' },
    samples: { type: 'string', default: '64' },
    windows: { type: 'string', default: '40' },
    model: { type: 'string', default: MODEL },
  },
});

/** One row of the result. */
export interface RecipeRow {
  bits: number;
  method: string;
  seed: number;
  text: string;
  kl: number;
  klStandardError: number;
  perplexity: number;
  perplexityIncrease: number;
  /** Tokens scored. */
  tokens: number;
  /** Mean increase of −log p per token over the original, nats, and its standard error over windows. */
  nllIncrease: number;
  nllIncreaseStandardError: number;
  top1Agreement: number;
  seconds: number;
  bitsPerWeight: number;
}

const files = await folderFiles(options.model);
const source = await openModel(files);
const tokenizer = await loadTokenizer(files);
const backend = await openBackend('cpu');
const reference = remembering(await loadDecoder(backend, source));
const prose = readdirSync(path.join(MODEL, 'eval/prose'))
  .filter((name) => name.endsWith('.txt'))
  .map((name) => readFileSync(path.join(MODEL, 'eval/prose', name), 'utf8'));
const tasks = parseTasks(readFileSync(path.join(MODEL, 'eval/tasks.jsonl'), 'utf8'), 'tasks.jsonl').map(formatTask);
const texts = new Map<string, readonly string[]>([
  ['prose', prose],
  ['tasks', [tasks.join('')]],
  ...options.text.map((file): [string, string[]] => [path.basename(file), [readFileSync(file, 'utf8')]]),
]);
const folder = mkdtempSync(path.join(tmpdir(), 'gyre-bench-'));
const rows: RecipeRow[] = [];
/** Per row, the windows' KL and increase of −log p, for paired intervals. */
const windows = new Map<RecipeRow, { kl: number[]; increase: number[] }>();
for (const seed of options.seeds.split(',').map(Number)) {
  const shape = { sequences: Number(options.samples), length: 512, seed, threads: backend.info.threads };
  const calibrationTokens = options.calib ? undefined : await writeCalibrationText(source, tokenizer, shape);
  for (const bits of options.bits.split(',').map(Number) as WeightBits[]) {
    for (const method of options.methods.split(',')) {
      const out = path.join(folder, `${method}-${bits}-${seed}`);
      const report = await quantizeCheckpoint({
        model: options.model,
        out,
        method,
        bits,
        seed,
        calib: options.calib,
        calibrationTokens,
        calibSamples: shape.sequences,
      });
      const quantized = await openModel(await folderFiles(out));
      const decoder = await loadDecoder(backend, quantized);
      for (const [text, parts] of texts) {
        const e = await evaluateText(decoder, tokenizeTexts(tokenizer, parts), {
          reference,
          bosTokenId: tokenizer.bosTokenId,
          seqLen: 1024,
          samples: Number(options.windows),
        });
        const scores = {
          kl: e.scores.map(({ kl }) => kl ?? NaN),
          increase: e.scores.map(({ nll, referenceNll }) => nll - (referenceNll ?? NaN)),
        };
        const increase = mean(scores.increase);
        const row: RecipeRow = {
          bits,
          method,
          seed,
          text,
          kl: round(e.kl ?? NaN),
          klStandardError: round(e.klStandardError ?? NaN),
          perplexity: round(e.perplexity),
          perplexityIncrease: round(e.perplexity - (e.referencePerplexity ?? NaN)),
          tokens: e.tokens,
          nllIncrease: round(increase),
          nllIncreaseStandardError: round(
            Math.sqrt(mean(scores.increase.map((v) => (v - increase) ** 2)) / (e.windows - 1)),
          ),
          top1Agreement: round(e.top1Agreement ?? NaN),
          seconds: round(report.seconds),
          bitsPerWeight: round(report.bitsPerWeight),
        };
        rows.push(row);
        windows.set(row, scores);
        console.log(JSON.stringify(row));
      }
      decoder.release();
      await quantized.checkpoint.close();
    }
  }
}
rmSync(folder, { recursive: true });

/** ParoQuant over AWQ, per text, bits and seed: KL and the mean increase of −log p, paired by windows. */
const ratios: object[] = [];
for (const awq of rows.filter((row) => row.method === 'awq')) {
  const ours = rows.find(
    (row) => row.method === 'paroquant' && row.bits === awq.bits && row.text === awq.text && row.seed === awq.seed,
  );
  const [a, b] = [ours && windows.get(ours), windows.get(awq)];
  if (!ours || !a || !b) continue;
  const kl = pairedRatio(a.kl, b.kl);
  const increase = pairedRatio(a.increase, b.increase);
  ratios.push({
    bits: awq.bits,
    seed: awq.seed,
    text: awq.text,
    tokens: awq.tokens,
    kl: round(kl.ratio),
    klInterval95: kl.interval95.map(round),
    perplexityIncrease: round(ours.perplexityIncrease / awq.perplexityIncrease),
    nllIncrease: round(increase.ratio),
    nllIncreaseStandardError: round(increase.standardError),
    nllIncreaseInterval95: increase.interval95.map(round),
  });
}
console.table(ratios);
writeResult(options.name, {
  model: path.basename(options.model),
  calibration: options.calib?.map((f) => path.basename(f)) ?? 'self-written',
  samples: Number(options.samples),
  rows,
  ratios,
});
await plotRecipes(rows, options.name);
await source.checkpoint.close();
await backend.dispose();

function mean(values: readonly number[]): number {
  return values.reduce((sum, value) => sum + value, 0) / values.length;
}
