// Ablations of ParoQuant on the bundled model: one set at a time or all of them, each variant quantized and scored by KL on
// the project's prose and tasks. Results are added to bench/results/ablations.json as they come, and a variant measured
// before with the same settings is not run again, so a run that was stopped goes on; tables and plots go to docs/.
// Run: npx tsx bench/ablations.ts --set rotations|parts|stages|share|pairs|objective|calibration|bits|groups|all
//      [--samples 64] [--length 512] [--epochs 10] [--batch 16] [--windows 40] [--threads N] [--seed 0] [--report]
import { existsSync, mkdtempSync, readdirSync, readFileSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import path from 'node:path';
import { parseArgs } from 'node:util';
import { openBackend } from '../src/backends/registry.js';
import { writeCalibrationText } from '../src/calibration-text.node.js';
import { evaluateText, formatTask, parseTasks, remembering, tokenizeTexts } from '../src/evaluation/index.js';
import { folderFiles } from '../src/formats/source.node.js';
import { loadDecoder, openModel } from '../src/models/load.js';
import type { CalibrationTokens } from '../src/quant/index.js';
import { quantizeCheckpoint, type QuantizeOptions } from '../src/quantize.node.js';
import { loadTokenizer } from '../src/tokenizer/index.js';
import { writeAblations, type AblationRow } from './support/ablations.js';
import { round, writeResult } from './support/results.js';

const MODEL = path.join(import.meta.dirname, '../models/gyre-14m');
const RESULTS = path.join(import.meta.dirname, 'results/ablations.json');

/** What a variant changes of the published recipe at 4 bits in groups of 128. */
interface Variant extends Partial<QuantizeOptions> {
  /** Calibration sequences, where they are what varies. */
  readonly sequences?: number;
}

const bitsAndMethods = Object.fromEntries(
  ([4, 3, 2] as const).flatMap((bits) =>
    ['awq', 'paroquant-block', 'paroquant'].map((method) => [`W${bits} ${method}`, { bits, method }]),
  ),
);

/** Every ablation: a set of variants by name. Methods are paroquant-block unless named. */
const SETS: Readonly<Record<string, Readonly<Record<string, Variant>>>> = {
  rotations: Object.fromEntries([0, 1, 2, 4, 8, 16].map((krot) => [`K = ${krot}`, { krot }])),
  parts: {
    'rotations and scales': {},
    'no scales': { scales: false },
    'scales only': { krot: 0 },
    'rotations only, no stage 2': { scales: false, block: { stages: 'transforms' } },
    'neither (stage 2 only)': { block: { stages: 'weights' } },
  },
  stages: {
    'both stages': {},
    'no stage 2': { block: { stages: 'transforms' } },
    'stage 2 only': { block: { stages: 'weights' } },
  },
  share: { 'per projection': {}, 'shared by a linear group': { share: true } },
  pairs: {
    random: {},
    'by magnitude': { block: { pairs: 'magnitude' } },
    learned: { block: { pairs: 'learned' } },
  },
  objective: {
    'block (paroquant-block)': {},
    'layer (paroquant)': { method: 'paroquant' },
    'layer, then block (paroquant-tuned)': { method: 'paroquant-tuned' },
    awq: { method: 'awq' },
  },
  calibration: Object.fromEntries([8, 32, 128, 512].map((n) => [`${n} sequences`, { sequences: n }])),
  bits: bitsAndMethods,
  groups: Object.fromEntries(([32, 64, 128] as const).map((g) => [`groups of ${g}`, { groupSize: g }])),
};

const { values: options } = parseArgs({
  options: {
    set: { type: 'string', default: 'all' },
    variant: { type: 'string' },
    samples: { type: 'string', default: '64' },
    length: { type: 'string', default: '512' },
    epochs: { type: 'string', default: '10' },
    batch: { type: 'string', default: '16' },
    windows: { type: 'string', default: '40' },
    threads: { type: 'string' },
    seed: { type: 'string', default: '0' },
    report: { type: 'boolean', default: false },
  },
});
const number = (text: string): number => Number(text);
const [samples, length, epochs] = [options.samples, options.length, options.epochs].map(number);
const [batch, windows, seed] = [options.batch, options.windows, options.seed].map(number);
const threads = options.threads === undefined ? undefined : Number(options.threads);
const chosen = options.set === 'all' ? Object.keys(SETS) : options.set.split(',');
for (const name of chosen)
  if (!(name in SETS)) throw new Error(`unknown set '${name}'; there are ${Object.keys(SETS).join(', ')}, all`);

const rows: AblationRow[] = existsSync(RESULTS)
  ? (JSON.parse(readFileSync(RESULTS, 'utf8')) as { rows: AblationRow[] }).rows
  : [];
const save = (): void => writeResult('ablations', { model: path.basename(MODEL), rows });
if (!options.report) await run();
await writeAblations(rows, Object.fromEntries(Object.entries(SETS).map(([name, set]) => [name, Object.keys(set)])));

async function run(): Promise<void> {
  const files = await folderFiles(MODEL);
  const source = await openModel(files);
  const tokenizer = await loadTokenizer(files);
  const backend = await openBackend('cpu', { threads });
  const reference = remembering(await loadDecoder(backend, source));
  const prose = readdirSync(path.join(MODEL, 'eval/prose'))
    .filter((name) => name.endsWith('.txt'))
    .map((name) => readFileSync(path.join(MODEL, 'eval/prose', name), 'utf8'));
  const tasks = parseTasks(readFileSync(path.join(MODEL, 'eval/tasks.jsonl'), 'utf8'), 'tasks.jsonl').map(formatTask);
  const texts = [
    ['prose', tokenizeTexts(tokenizer, prose)],
    ['tasks', tokenizeTexts(tokenizer, [tasks.join('')])],
  ] as const;
  // One text for all: the first n sequences of the largest set are the set of n.
  const wanted = Math.max(samples, ...chosen.flatMap((name) => Object.values(SETS[name]).map((v) => v.sequences ?? 0)));
  const written = await writeCalibrationText(source, tokenizer, {
    sequences: wanted,
    length,
    seed,
    threads: backend.info.threads,
  });
  const first = (sequences: number): CalibrationTokens => ({
    ...written,
    sequences,
    ids: written.ids.slice(0, sequences * length),
  });
  const folder = mkdtempSync(path.join(tmpdir(), 'gyre-ablations-'));
  for (const set of chosen) {
    for (const [variant, { sequences = samples, block, ...changed }] of Object.entries(SETS[set])) {
      if (options.variant !== undefined && options.variant !== variant) continue;
      const settings = { sequences, length, epochs, batch, windows, seed };
      const known = (row: AblationRow): boolean =>
        row.set === set && row.variant === variant && JSON.stringify(row.settings) === JSON.stringify(settings);
      if (rows.some(known)) continue;
      const out = path.join(folder, 'out');
      const report = await quantizeCheckpoint({
        model: MODEL,
        out,
        method: 'paroquant-block',
        seed,
        threads,
        calibrationTokens: first(sequences),
        ...changed,
        block: { epochs, batch, ...block },
      });
      const quantized = await openModel(await folderFiles(out));
      const decoder = await loadDecoder(backend, quantized);
      const kl: Record<string, number> = {};
      const klStandardError: Record<string, number> = {};
      for (const [name, tokens] of texts) {
        const options = { reference, bosTokenId: tokenizer.bosTokenId, seqLen: 1024, samples: windows };
        const found = await evaluateText(decoder, tokens, options);
        kl[name] = round(found.kl ?? NaN);
        klStandardError[name] = round(found.klStandardError ?? NaN);
      }
      decoder.release();
      await quantized.checkpoint.close();
      rmSync(out, { recursive: true });
      const bits = changed.bits ?? 4;
      rows.push({ set, variant, bits, settings, kl, klStandardError, seconds: round(report.seconds) });
      console.log(JSON.stringify(rows.at(-1)));
      save();
    }
  }
  rmSync(folder, { recursive: true });
  await source.checkpoint.close();
  await backend.dispose();
}
