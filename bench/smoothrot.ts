// W4A4KV4, W4A8KV8 and W4A16 on the bundled model and on stressed copies of it (synthetic: massive activations planted by
// gyre stress): perplexity, KL and task accuracy of RTN, GPTQ, SmoothQuant, QuaRot, SmoothRot, ParoQuant and lowbit over seeds of
// the rotation. Variants: plain; all-M: two channels in every block, large on all tokens, at M times the typical channel; few-M:
// two in every block that tells first and delimiter tokens apart, large on those alone; two-M: as all-M, but in the second and
// the last block only. One file of results per variant, bench/results/smoothrot-<variant>.json, or
// smoothrot-<variant>.<part>.json with --part; a run goes on where one was stopped, and several can run at once, each with files
// of its own. Seeds come outermost, then variants, then methods: with --seconds the last seeds are left out, not methods.
// Run: npx tsx bench/smoothrot.ts [--variants plain,all-500,few-500] [--methods quarot-gptq,… or a set: main, pair, parts, bits8]
//      [--seeds 0,1,2] [--device cpu|webgpu] [--sequences 64] [--windows 16] [--tasks 120] [--tokens FILE] [--calib FILE…]
//      [--task-seeds 1: tasks with so many of the seeds] [--seconds S]
// Calibration tokens are in a file {ids, sequences, length, description}, so that runs on several devices share them; the model
// wrote them. --calib takes other texts.
//      npx tsx bench/smoothrot.ts --table     writes tables and drawings into docs/ from the files there are
import { mkdtempSync, readFileSync, readdirSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import path from 'node:path';
import { parseArgs } from 'node:util';
import { openBackend, type BackendName } from '../src/backends/registry.js';
import { createRng } from '../src/core/rng.js';
import { evaluateTasks, evaluateText, parseTasks, remembering, tokenizeTexts } from '../src/evaluation/index.js';
import { folderFiles } from '../src/formats/source.node.js';
import { loadDecoder, openModel } from '../src/models/load.js';
import { sampleWindows, type CalibrationTokens } from '../src/quant/calibration/tokens.js';
import { quantizeCheckpoint, type QuantizeOptions } from '../src/quantize.node.js';
import { stressCheckpoint, SYNTHETIC, type StressReport } from '../src/stress.node.js';
import { loadTokenizer } from '../src/tokenizer/index.js';
import { resultFolder, round, writeResult } from './support/results.js';
import { METHODS, SETS, readAllRows, readRows, summarize, type Row } from './support/smoothrot-rows.js';

const { values: options } = parseArgs({
  options: {
    variants: { type: 'string', default: 'plain,all-50,all-500,all-2000,few-50,few-500,few-2000,two-500,two-2000' },
    methods: { type: 'string', default: 'main' },
    seeds: { type: 'string', default: '0,1,2' },
    sequences: { type: 'string', default: '64' },
    windows: { type: 'string', default: '16' },
    tasks: { type: 'string', default: '240' },
    'task-seeds': { type: 'string', default: '1' },
    device: { type: 'string', default: 'cpu' },
    threads: { type: 'string' },
    model: { type: 'string', default: path.join(import.meta.dirname, '../models/gyre-14m') },
    calib: { type: 'string', multiple: true },
    tokens: { type: 'string', default: path.join(import.meta.dirname, 'results/calibration-tokens.json') },
    part: { type: 'string' },
    seconds: { type: 'string' },
    table: { type: 'boolean', default: false },
  },
});
const RESULTS = resultFolder();
const variants = options.variants.split(',');
const suffix = options.part === undefined ? '' : `.${options.part}`;
const methods = options.methods.split(',').flatMap((name) => SETS[name] ?? [name]);
for (const name of methods)
  if (!(name in METHODS)) throw new Error(`unknown method '${name}'; sets are ${Object.keys(SETS).join(', ')}`);
const started = performance.now();

if (options.table) {
  // Here, so that measuring needs no plotting.
  const { writePages } = await import('./support/smoothrot-table.js');
  await writePages(variants.flatMap((variant) => readAllRows(RESULTS, variant)));
} else await measure();

/** Where a stressed variant has its channels; undefined for the model as it is. */
type Planted = (Pick<StressReport, 'separations'> & Pick<StressReport['settings'], 'blocks' | 'channels'>) | undefined;

async function measure(): Promise<void> {
  const device = options.device as BackendName;
  const threads = options.threads === undefined ? undefined : Number(options.threads);
  const files = await folderFiles(options.model);
  const source = await openModel(files);
  const tokenizer = await loadTokenizer(files);
  // What is compared are the models, not the products of f16 that a GPU may take for passes over many rows.
  const backend = await openBackend(device, { threads, precision: 'f32' });
  // Stressed copies compute what the original does: one reference serves all.
  const reference = remembering(await loadDecoder(backend, source));
  const prose = readdirSync(path.join(options.model, 'eval/prose'))
    .filter((name) => name.endsWith('.txt'))
    .map((name) => readFileSync(path.join(options.model, 'eval/prose', name), 'utf8'));
  const text = tokenizeTexts(tokenizer, prose);
  const every = parseTasks(readFileSync(path.join(options.model, 'eval/tasks.jsonl'), 'utf8'), 'tasks.jsonl');
  const wanted = Math.min(Number(options.tasks), every.length);
  // Evenly over the file, which goes through the kinds in turn.
  const tasks = Array.from({ length: wanted }, (_, i) => every[Math.floor((i * every.length) / wanted)]);
  const calibrationTokens = calibration();
  const setup = {
    calibration: calibrationTokens.description,
    windows: Number(options.windows),
    windowTokens: 1024,
    tasks: tasks.length,
  };
  const folder = mkdtempSync(path.join(tmpdir(), 'gyre-bench-'));
  const seeds = options.seeds.split(',').map(Number);
  const models = new Map<string, { folder: string; planted: Planted }>();
  const found = new Map<string, Row[]>(
    variants.map((variant) => [variant, readRows(RESULTS, `${variant}${suffix}`, setup)]),
  );
  console.log(JSON.stringify({ ready: elapsed(), backend: backend.info.description }));
  // Seconds of the slowest row so far: what the next may take.
  let slowest = 0;
  for (const seed of seeds) {
    for (const variant of variants) {
      const rows = found.get(variant) ?? [];
      for (const name of methods) {
        const { seeds: seeded, ...settings } = METHODS[name];
        if (rows.some((row) => row.method === name && row.seed === seed)) continue;
        // What draws nothing at random is measured once.
        if (!seeded && seed !== seeds[0]) continue;
        const begun = elapsed();
        if (options.seconds !== undefined && begun + slowest > Number(options.seconds)) {
          console.log(JSON.stringify({ left: `${variant}: ${name}, seed ${seed}`, elapsed: begun }));
          continue;
        }
        const model = models.get(variant) ?? (await planted(variant, folder));
        models.set(variant, model);
        // Tasks take as long as everything else.
        const withTasks = seeds.indexOf(seed) < Number(options['task-seeds']);
        rows.push(await row(model.folder, variant, name, settings, seed, withTasks));
        slowest = Math.max(slowest, elapsed() - begun);
        save(variant, rows, model.planted);
      }
    }
  }
  rmSync(folder, { recursive: true });
  await source.checkpoint.close();
  await backend.dispose();

  function save(variant: string, rows: readonly Row[], planted: Planted): void {
    writeResult(`smoothrot-${variant}${suffix}`, {
      model: 'gyre-14m',
      ...(planted && { note: `${variant}: ${SYNTHETIC}`, planted }),
      device,
      backend: backend.info.description,
      ...setup,
      speed:
        '4-bit activations are computed on their rounded values: quality is exact to the definition, speed is simulated',
      rows,
      summary: summarize(rows),
    });
  }

  function calibration(): CalibrationTokens {
    const wanted = Number(options.sequences);
    if (options.calib) {
      const texts = options.calib.map((file) => ({ name: path.basename(file), text: readFileSync(file, 'utf8') }));
      return sampleWindows(tokenizer, texts, { sequences: wanted, length: 512 }, createRng(0));
    }
    const stored = JSON.parse(readFileSync(options.tokens, 'utf8')) as Omit<CalibrationTokens, 'ids'> & {
      ids: number[];
    };
    const { sequences, length, description } = stored;
    if (wanted >= sequences) return { ...stored, ids: Int32Array.from(stored.ids) };
    const ids = Int32Array.from(stored.ids.slice(0, wanted * length));
    return { ids, sequences: wanted, length, description: `the first ${wanted} of ${description}` };
  }

  async function planted(variant: string, scratch: string): Promise<{ folder: string; planted: Planted }> {
    if (variant === 'plain') return { folder: options.model, planted: undefined };
    const [where, magnitude] = variant.split('-') as ['all' | 'few' | 'two', string];
    const out = path.join(scratch, variant);
    const report = await stressCheckpoint({
      model: options.model,
      out,
      tokens: where === 'few' ? 'few' : 'all',
      blocks: where === 'two' ? undefined : 'every',
      magnitude: Number(magnitude),
      calibrationTokens,
      threads,
      device,
      backend,
    });
    const { settings, separations } = report;
    console.log(JSON.stringify({ variant, blocks: settings.blocks.join(), separations, elapsed: elapsed() }));
    return { folder: out, planted: { blocks: settings.blocks, channels: settings.channels, separations } };
  }

  async function row(
    model: string,
    variant: string,
    name: string,
    settings: Partial<QuantizeOptions>,
    seed: number,
    withTasks: boolean,
  ): Promise<Row> {
    const out = path.join(folder, 'quantized');
    const given = { model, out, seed, calibrationTokens, threads, device, backend };
    const report = await quantizeCheckpoint({ ...settings, ...given });
    const quantized = await openModel(await folderFiles(out));
    const decoder = await loadDecoder(backend, quantized);
    const e = await evaluateText(decoder, text, {
      reference,
      bosTokenId: tokenizer.bosTokenId,
      seqLen: setup.windowTokens,
      samples: setup.windows,
    });
    const answered =
      withTasks && tasks.length > 0
        ? await evaluateTasks(decoder, tokenizer, tasks, { batchSize: 256, maxTokens: 320 })
        : undefined;
    decoder.release();
    await quantized.checkpoint.close();
    rmSync(out, { recursive: true });
    const increases = e.scores.map(({ nll, referenceNll }) => nll - (referenceNll ?? NaN));
    const made: Row = {
      variant,
      method: name,
      seed,
      kl: round(e.kl ?? NaN),
      klStandardError: round(e.klStandardError ?? NaN),
      windowKl: e.scores.map(({ kl }) => round(kl ?? NaN)),
      windowIncrease: increases.map(round),
      perplexity: round(e.perplexity),
      referencePerplexity: round(e.referencePerplexity ?? NaN),
      top1Agreement: round(e.top1Agreement ?? NaN),
      taskAccuracy: answered ? round(answered.accuracy) : null,
      smoothed: report.smoothing.map(({ rule }) => (rule ? `${rule.by} ${rule.exponent}` : null)),
      seconds: { quantize: round(report.seconds), text: round(e.seconds), tasks: round(answered?.seconds ?? 0) },
    };
    console.log(JSON.stringify({ ...made, windowKl: undefined, windowIncrease: undefined, elapsed: elapsed() }));
    return made;
  }
}

/** Seconds since the start. */
function elapsed(): number {
  return round((performance.now() - started) / 1000);
}
