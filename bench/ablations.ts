// Ablations of ParoQuant on the bundled model: one set at a time or all of them, each variant quantized and scored by KL on
// the project's prose and tasks. Results are added to ablations.json as they come, and a variant measured before with the
// same settings is not run again, in another set neither, so a run that was stopped goes on; tables and plots go to docs/.
// Sets are run in the order of their importance, so that a time limit (--seconds) leaves out what matters least.
// Run: npx tsx bench/ablations.ts --set rotations|parts|stages|share|pairs|objective|calibration|bits|groups|all
//      [--device cpu|webgpu] [--samples 64] [--length 512] [--epochs 10] [--batch 16] [--windows 40] [--most-sequences 512]
//      [--threads N] [--seed 0] [--seconds S] [--report | --measure]
import { existsSync, mkdtempSync, readdirSync, readFileSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import path from 'node:path';
import { parseArgs } from 'node:util';
import { openBackend, type BackendName } from '../src/backends/registry.js';
import { writeCalibrationText } from '../src/calibration-text.node.js';
import { evaluateText, formatTask, parseTasks, remembering, tokenizeTexts } from '../src/evaluation/index.js';
import { folderFiles } from '../src/formats/source.node.js';
import { loadDecoder, openModel } from '../src/models/load.js';
import type { CalibrationTokens } from '../src/quant/index.js';
import { quantizeCheckpoint, type QuantizeOptions } from '../src/quantize.node.js';
import { loadTokenizer } from '../src/tokenizer/index.js';
import { writeAblations, type AblationRow } from './support/ablations.js';
import { resultFolder, round, writeResult } from './support/results.js';

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
  objective: {
    'block (paroquant-block)': {},
    'layer (paroquant)': { method: 'paroquant' },
    'layer, then block (paroquant-tuned)': { method: 'paroquant-tuned' },
    awq: { method: 'awq' },
  },
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
  bits: bitsAndMethods,
  calibration: Object.fromEntries([8, 32, 128, 512].map((n) => [`${n} sequences`, { sequences: n }])),
  groups: Object.fromEntries(([32, 64, 128] as const).map((g) => [`groups of ${g}`, { groupSize: g }])),
};

const { values: options } = parseArgs({
  options: {
    set: { type: 'string', default: 'all' },
    model: { type: 'string', default: path.join(import.meta.dirname, '../models/gyre-14m') },
    device: { type: 'string', default: 'cpu' },
    variant: { type: 'string' },
    samples: { type: 'string', default: '64' },
    length: { type: 'string', default: '512' },
    epochs: { type: 'string', default: '10' },
    batch: { type: 'string', default: '16' },
    windows: { type: 'string', default: '40' },
    'most-sequences': { type: 'string', default: '512' },
    seconds: { type: 'string' },
    threads: { type: 'string' },
    seed: { type: 'string', default: '0' },
    report: { type: 'boolean', default: false },
    measure: { type: 'boolean', default: false },
  },
});
const number = (text: string): number => Number(text);
const [samples, length, epochs] = [options.samples, options.length, options.epochs].map(number);
const [batch, windows, seed] = [options.batch, options.windows, options.seed].map(number);
const threads = options.threads === undefined ? undefined : Number(options.threads);
const most = Number(options['most-sequences']);
const started = performance.now();
const device = options.device as BackendName;
const chosen = options.set === 'all' ? Object.keys(SETS) : options.set.split(',');
for (const name of chosen)
  if (!(name in SETS)) throw new Error(`unknown set '${name}'; there are ${Object.keys(SETS).join(', ')}, all`);

const results = path.join(resultFolder(), 'ablations.json');
const rows: AblationRow[] = existsSync(results)
  ? (JSON.parse(readFileSync(results, 'utf8')) as { rows: AblationRow[] }).rows
  : [];
const save = (): void => writeResult('ablations', { model: path.basename(options.model), rows });
if (!options.report) await run();
if (!options.measure)
  await writeAblations(rows, Object.fromEntries(Object.entries(SETS).map(([name, set]) => [name, Object.keys(set)])));

async function run(): Promise<void> {
  const files = await folderFiles(options.model);
  const source = await openModel(files);
  const tokenizer = await loadTokenizer(files);
  const backend = await openBackend(device, { threads });
  console.log(JSON.stringify({ backend: backend.info }));
  const reference = remembering(await loadDecoder(backend, source));
  const prose = readdirSync(path.join(options.model, 'eval/prose'))
    .filter((name) => name.endsWith('.txt'))
    .map((name) => readFileSync(path.join(options.model, 'eval/prose', name), 'utf8'));
  const tasks = parseTasks(readFileSync(path.join(options.model, 'eval/tasks.jsonl'), 'utf8'), 'tasks.jsonl').map(
    formatTask,
  );
  const texts = [
    ['prose', tokenizeTexts(tokenizer, prose)],
    ['tasks', tokenizeTexts(tokenizer, [tasks.join('')])],
  ] as const;
  // One text for all: the first n sequences of the largest set are the set of n.
  const asked = chosen.flatMap((name) => Object.values(SETS[name]).map((v) => v.sequences ?? 0));
  const wanted = Math.max(samples, ...asked.filter((n) => n <= most));
  const written = await writeCalibrationText(source, tokenizer, {
    sequences: wanted,
    length,
    seed,
    threads: backend.info.threads,
    device,
  });
  console.log(JSON.stringify({ calibration: wanted, seconds: elapsed() }));
  const first = (sequences: number): CalibrationTokens => ({
    ...written,
    sequences,
    ids: written.ids.slice(0, sequences * length),
  });
  // Seconds of the slowest variant so far: what the next may take.
  let slowest = 0;
  const folder = mkdtempSync(path.join(tmpdir(), 'gyre-ablations-'));
  for (const set of chosen) {
    for (const [variant, { sequences = samples, block, ...changed }] of Object.entries(SETS[set])) {
      if (options.variant !== undefined && options.variant !== variant) continue;
      if (sequences > most) continue;
      const settings = { sequences, length, epochs, batch, windows, seed };
      const known = (inSet: string, name: string): AblationRow | undefined =>
        rows.find(
          (row) =>
            row.set === inSet && row.variant === name && JSON.stringify(row.settings) === JSON.stringify(settings),
        );
      if (known(set, variant)) continue;
      // Most sets contain the published recipe as it is: what was measured under another name counts here too.
      const same = twinsOf(set, variant).flatMap(([inSet, name]) => known(inSet, name) ?? [])[0];
      if (same) {
        rows.push({ ...same, set, variant });
        save();
        continue;
      }
      if (options.seconds !== undefined && elapsed() + slowest > Number(options.seconds)) {
        console.log(JSON.stringify({ left: `${set}: ${variant}`, seconds: elapsed() }));
        continue;
      }
      const begun = elapsed();
      const out = path.join(folder, 'out');
      const report = await quantizeCheckpoint({
        model: options.model,
        out,
        method: 'paroquant-block',
        seed,
        threads,
        device,
        backend,
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
      slowest = Math.max(slowest, elapsed() - begun);
      const measured = { kl, klStandardError, seconds: round(report.seconds), backend: backend.info.description };
      rows.push({ set, variant, bits, settings, ...measured });
      console.log(JSON.stringify({ ...rows.at(-1), elapsed: elapsed() }));
      save();
    }
  }
  rmSync(folder, { recursive: true });
  await source.checkpoint.close();
  await backend.dispose();
}

/** Seconds since the start. */
function elapsed(): number {
  return round((performance.now() - started) / 1000);
}

/** The same variant under other names, [set, variant]. */
function twinsOf(set: string, variant: string): [string, string][] {
  const key = (v: Variant): string => {
    const { method = 'paroquant-block', bits = 4, krot = 8, groupSize = 128, scales = true, share, block } = v;
    // Settings of blocks are nothing to recipes that train none, and without rotations their pairs are nothing either.
    const trains = method === 'paroquant-block';
    const { stages = 'both', pairs = 'random' } = (trains && block) || {};
    return JSON.stringify([method, bits, krot, groupSize, scales, share, stages, pairs, v.sequences ?? samples]);
  };
  const own = key(SETS[set][variant]);
  return Object.entries(SETS).flatMap(([name, variants]) =>
    Object.entries(variants)
      .filter(([other, v]) => key(v) === own && !(name === set && other === variant))
      .map(([other]): [string, string] => [name, other]),
  );
}
