// W4A4KV4 (and W4A8KV8) on the bundled model and on stressed copies of it (synthetic: massive activations planted by gyre
// stress): perplexity and KL of RTN, SmoothQuant, QuaRot, SmoothRot (RTN, GPTQ) and ParoQuant, over seeds of the rotation.
// Run: npx tsx bench/smoothrot.ts [--variants plain,all-500,few-500] [--methods quarot-gptq,…] [--seeds 0,1,2]
//      [--sequences 24] [--windows 8] [--tasks 0] [--name smoothrot] [--calib FILE…]
import { mkdtempSync, readFileSync, readdirSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import path from 'node:path';
import { parseArgs } from 'node:util';
import { openBackend } from '../src/backends/registry.js';
import { writeCalibrationText } from '../src/calibration-text.node.js';
import { createRng } from '../src/core/rng.js';
import { evaluateTasks, evaluateText, parseTasks, remembering, tokenizeTexts } from '../src/evaluation/index.js';
import { folderFiles } from '../src/formats/source.node.js';
import { loadDecoder, openModel } from '../src/models/load.js';
import { sampleWindows } from '../src/quant/calibration/tokens.js';
import { quantizeCheckpoint, type QuantizeOptions } from '../src/quantize.node.js';
import { stressCheckpoint, SYNTHETIC } from '../src/stress.node.js';
import { loadTokenizer } from '../src/tokenizer/index.js';
import { round, writeResult } from './support/results.js';

const MODEL = path.join(import.meta.dirname, '../models/gyre-14m');
const { values: options } = parseArgs({
  options: {
    variants: { type: 'string', default: 'plain,all-50,all-500,all-2000,few-50,few-500,few-2000' },
    methods: { type: 'string' },
    seeds: { type: 'string', default: '0,1,2' },
    sequences: { type: 'string', default: '24' },
    windows: { type: 'string', default: '8' },
    tasks: { type: 'string', default: '0' },
    threads: { type: 'string' },
    name: { type: 'string', default: 'smoothrot' },
    calib: { type: 'string', multiple: true },
  },
});

type Settings = Partial<QuantizeOptions>;
const W4A4: Settings = { bits: 4, actBits: 4, kvBits: 4 };
const W4A8: Settings = { bits: 4, actBits: 8, kvBits: 8 };
const perChannel: Settings = { groupSize: -1 };
/** Rows of the table. SmoothQuant with α = 0 and no groups smoothed is what others call RTN W4A4. */
const METHODS: Readonly<Record<string, Settings>> = {
  rtn: { ...W4A4, ...perChannel, method: 'smoothquant', smooth: 'none', rounding: 'rtn' },
  gptq: { ...W4A4, ...perChannel, method: 'smoothquant', smooth: 'none', rounding: 'gptq' },
  'smoothquant-rtn': { ...W4A4, method: 'smoothquant', rounding: 'rtn' },
  'smoothquant-gptq': { ...W4A4, method: 'smoothquant', rounding: 'gptq' },
  'quarot-rtn': { ...W4A4, method: 'quarot', rounding: 'rtn' },
  'quarot-gptq': { ...W4A4, method: 'quarot', rounding: 'gptq' },
  'smoothrot-rtn': { ...W4A4, method: 'smoothrot', rounding: 'rtn' },
  'smoothrot-gptq': { ...W4A4, method: 'smoothrot', rounding: 'gptq' },
  paroquant: { ...W4A4, method: 'paroquant' },
  'paroquant-rotated': { ...W4A4, method: 'paroquant', rotate: true, smooth: 'down' },
  'paroquant-w4a16': { bits: 4, method: 'paroquant' },
  'paroquant-w4a8': { ...W4A8, method: 'paroquant' },
  'smoothrot-w4a16': { bits: 4, actBits: 16, kvBits: 16, method: 'smoothrot' },
  'smoothrot-w4a8': { ...W4A8, method: 'smoothrot' },
};

/** One measurement. */
interface Row {
  variant: string;
  method: string;
  seed: number;
  kl: number;
  klStandardError: number;
  perplexity: number;
  referencePerplexity: number;
  top1Agreement: number;
  taskAccuracy: number | null;
  smoothed: number;
  seconds: number;
}

const files = await folderFiles(MODEL);
const source = await openModel(files);
const tokenizer = await loadTokenizer(files);
const threads = options.threads === undefined ? undefined : Number(options.threads);
const backend = await openBackend('cpu', { threads });
// Stressed copies compute what the original does: one reference serves all.
const reference = remembering(await loadDecoder(backend, source));
const prose = readdirSync(path.join(MODEL, 'eval/prose'))
  .filter((name) => name.endsWith('.txt'))
  .map((name) => readFileSync(path.join(MODEL, 'eval/prose', name), 'utf8'));
const text = tokenizeTexts(tokenizer, prose);
const tasks = parseTasks(readFileSync(path.join(MODEL, 'eval/tasks.jsonl'), 'utf8'), 'tasks.jsonl').slice(
  0,
  Number(options.tasks),
);
const shape = { sequences: Number(options.sequences), length: 512 };
const calibrationTokens = options.calib
  ? sampleWindows(
      tokenizer,
      options.calib.map((file) => ({ name: path.basename(file), text: readFileSync(file, 'utf8') })),
      shape,
      createRng(0),
    )
  : await writeCalibrationText(source, tokenizer, { ...shape, seed: 0, threads: backend.info.threads });
const folder = mkdtempSync(path.join(tmpdir(), 'gyre-bench-'));
const rows: Row[] = [];
const save = (): void =>
  writeResult(options.name, {
    model: 'gyre-14m',
    note: `variants other than plain are ${SYNTHETIC}`,
    calibration: calibrationTokens.description,
    windows: Number(options.windows),
    windowTokens: 1024,
    speed:
      '4-bit activations are computed on their rounded values: quality is exact to the definition, speed is simulated',
    rows,
    gaps: gaps(rows),
  });

for (const variant of options.variants.split(',')) {
  let model = MODEL;
  if (variant !== 'plain') {
    const [tokens, magnitude] = variant.split('-') as ['all' | 'few', string];
    model = path.join(folder, variant);
    await stressCheckpoint({
      model: MODEL,
      out: model,
      tokens,
      magnitude: Number(magnitude),
      calibrationTokens,
      threads,
    });
  }
  for (const name of (options.methods ?? Object.keys(METHODS).join(',')).split(',')) {
    for (const seed of options.seeds.split(',').map(Number)) {
      const out = path.join(folder, 'quantized');
      const report = await quantizeCheckpoint({ ...METHODS[name], model, out, seed, calibrationTokens, threads });
      const quantized = await openModel(await folderFiles(out));
      const decoder = await loadDecoder(backend, quantized);
      const e = await evaluateText(decoder, text, {
        reference,
        bosTokenId: tokenizer.bosTokenId,
        seqLen: 1024,
        samples: Number(options.windows),
      });
      const answered = tasks.length > 0 ? await evaluateTasks(decoder, tokenizer, tasks) : undefined;
      rows.push({
        variant,
        method: name,
        seed,
        kl: round(e.kl ?? NaN),
        klStandardError: round(e.klStandardError ?? NaN),
        perplexity: round(e.perplexity),
        referencePerplexity: round(e.referencePerplexity ?? NaN),
        top1Agreement: round(e.top1Agreement ?? NaN),
        taskAccuracy: answered ? round(answered.accuracy) : null,
        smoothed: report.smoothing.filter(({ alpha }) => alpha !== null).length,
        seconds: round(report.seconds),
      });
      console.log(JSON.stringify(rows.at(-1)), report.smoothing.map(({ alpha }) => alpha ?? '-').join(' '));
      decoder.release();
      await quantized.checkpoint.close();
      rmSync(out, { recursive: true });
      save();
    }
  }
}
rmSync(folder, { recursive: true });
console.table(gaps(rows));
await source.checkpoint.close();
await backend.dispose();

/** Per variant and method: means over seeds with their spread, and the share of QuaRot's KL that is gone. */
function gaps(all: readonly Row[]): object[] {
  const mean = (values: readonly number[]): number => values.reduce((a, b) => a + b, 0) / values.length;
  const of = (variant: string, method: string): number[] =>
    all.filter((r) => r.variant === variant && r.method === method).map((r) => r.kl);
  const pairs = new Map(all.map((r) => [`${r.variant} ${r.method}`, r]));
  return [...pairs.values()].map(({ variant, method }) => {
    const kl = of(variant, method);
    const quarot = of(variant, method.endsWith('rtn') ? 'quarot-rtn' : 'quarot-gptq');
    return {
      variant,
      method,
      kl: round(mean(kl)),
      spread: round(Math.max(...kl) - Math.min(...kl)),
      closesOfQuarotGap: quarot.length > 0 ? round(1 - mean(kl) / mean(quarot)) : null,
    };
  });
}
