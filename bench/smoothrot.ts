// W4A4KV4, W4A8KV8 and W4A16 on the bundled model and on stressed copies of it (synthetic: massive activations planted by
// gyre stress): perplexity, KL and task accuracy of RTN, GPTQ, SmoothQuant, QuaRot, SmoothRot and ParoQuant over seeds of the
// rotation. One file of results per variant, bench/results/smoothrot-<variant>.json, or smoothrot-<variant>.<part>.json with
// --part; a run goes on where one was stopped, and several can run at once, each with files of its own.
// Run: npx tsx bench/smoothrot.ts [--variants plain,all-500,few-500] [--methods quarot-gptq,…] [--seeds 0,1,2]
//      [--device cpu|webgpu] [--sequences 64] [--windows 16] [--tasks 120] [--calib FILE…] [--tokens FILE]
// --tokens: a JSON file {ids, sequences, length, description} of calibration tokens instead, so that runs on several devices share them.
//      npx tsx bench/smoothrot.ts --table     writes the tables of docs/recipes/smoothrot.md from the files there are
import { mkdtempSync, readFileSync, readdirSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import path from 'node:path';
import { parseArgs } from 'node:util';
import { openBackend, type BackendName } from '../src/backends/registry.js';
import { writeCalibrationText } from '../src/calibration-text.node.js';
import { createRng } from '../src/core/rng.js';
import { evaluateTasks, evaluateText, parseTasks, remembering, tokenizeTexts } from '../src/evaluation/index.js';
import { folderFiles } from '../src/formats/source.node.js';
import { loadDecoder, openModel } from '../src/models/load.js';
import { sampleWindows, type CalibrationTokens } from '../src/quant/calibration/tokens.js';
import { quantizeCheckpoint, type QuantizeOptions } from '../src/quantize.node.js';
import { stressCheckpoint, SYNTHETIC } from '../src/stress.node.js';
import { loadTokenizer } from '../src/tokenizer/index.js';
import { round, writeResult } from './support/results.js';
import { METHODS, readAllRows, readRows, summarize, tables, type Row } from './support/smoothrot-table.js';

const { values: options } = parseArgs({
  options: {
    variants: { type: 'string', default: 'plain,all-50,all-500,all-2000,few-50,few-500,few-2000' },
    methods: { type: 'string' },
    seeds: { type: 'string', default: '0,1,2' },
    sequences: { type: 'string', default: '64' },
    windows: { type: 'string', default: '16' },
    tasks: { type: 'string', default: '120' },
    device: { type: 'string', default: 'cpu' },
    threads: { type: 'string' },
    model: { type: 'string', default: path.join(import.meta.dirname, '../models/gyre-14m') },
    calib: { type: 'string', multiple: true },
    tokens: { type: 'string' },
    part: { type: 'string' },
    table: { type: 'boolean', default: false },
  },
});
const RESULTS = process.env.GYRE_BENCH_OUT ?? path.join(import.meta.dirname, 'results');
const variants = options.variants.split(',');
const suffix = options.part === undefined ? '' : `.${options.part}`;

if (options.table) writeTables();
else await measure();

/** Replaces the tables between the markers of the page. */
function writeTables(): void {
  const page = path.join(import.meta.dirname, '../docs/recipes/smoothrot.md');
  const rows = variants.flatMap((variant) => readAllRows(RESULTS, variant));
  const text = readFileSync(page, 'utf8');
  const [begin, end] = ['<!-- table -->', '<!-- /table -->'];
  if (!text.includes(begin) || !text.includes(end)) throw new Error(`${page} has no ${begin} … ${end}`);
  const made = `${begin}\n\n${tables(rows)}\n\n${end}`;
  writeFileSync(page, text.slice(0, text.indexOf(begin)) + made + text.slice(text.indexOf(end) + end.length));
}

async function measure(): Promise<void> {
  const device = options.device as BackendName;
  const threads = options.threads === undefined ? undefined : Number(options.threads);
  const files = await folderFiles(options.model);
  const source = await openModel(files);
  const tokenizer = await loadTokenizer(files);
  const backend = await openBackend(device, { threads });
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
  const calibrationTokens = await calibration();
  const setup = {
    calibration: calibrationTokens.description,
    windows: Number(options.windows),
    windowTokens: 1024,
    tasks: tasks.length,
  };
  const folder = mkdtempSync(path.join(tmpdir(), 'gyre-bench-'));
  for (const variant of variants) {
    const rows: Row[] = readRows(RESULTS, `${variant}${suffix}`, setup);
    const save = (): void =>
      writeResult(`smoothrot-${variant}${suffix}`, {
        model: 'gyre-14m',
        ...(variant === 'plain' ? {} : { note: `${variant}: ${SYNTHETIC}` }),
        device,
        ...setup,
        speed:
          '4-bit activations are computed on their rounded values: quality is exact to the definition, speed is simulated',
        rows,
        summary: summarize(rows),
      });
    let model: string | undefined;
    const seeds = options.seeds.split(',').map(Number);
    // Seeds outermost: a run that is stopped has every method at least once.
    for (const seed of seeds) {
      for (const name of (options.methods ?? Object.keys(METHODS).join(',')).split(',')) {
        const { seeds: seeded, ...settings } = METHODS[name];
        if (rows.some((row) => row.method === name && row.seed === seed)) continue;
        // What draws nothing at random is measured once.
        if (!seeded && seed !== seeds[0]) continue;
        model ??= await planted(variant, folder);
        // Tasks take as long as everything else: one seed of them.
        rows.push(await row(model, variant, name, settings, seed, seed === seeds[0]));
        save();
      }
    }
  }
  rmSync(folder, { recursive: true });
  await source.checkpoint.close();
  await backend.dispose();

  async function calibration(): Promise<CalibrationTokens> {
    if (options.tokens) {
      const stored = JSON.parse(readFileSync(options.tokens, 'utf8')) as Omit<CalibrationTokens, 'ids'> & {
        ids: number[];
      };
      return { ...stored, ids: Int32Array.from(stored.ids) };
    }
    const shape = { sequences: Number(options.sequences), length: 512 };
    if (!options.calib)
      return writeCalibrationText(source, tokenizer, { ...shape, seed: 0, threads: backend.info.threads, device });
    const texts = options.calib.map((file) => ({ name: path.basename(file), text: readFileSync(file, 'utf8') }));
    return sampleWindows(tokenizer, texts, shape, createRng(0));
  }

  async function planted(variant: string, scratch: string): Promise<string> {
    if (variant === 'plain') return options.model;
    const [tokens, magnitude] = variant.split('-') as ['all' | 'few', string];
    const out = path.join(scratch, variant);
    const report = await stressCheckpoint({
      model: options.model,
      out,
      tokens,
      magnitude: Number(magnitude),
      calibrationTokens,
      threads,
      device,
    });
    console.log(variant, JSON.stringify({ planted: report.planted, separations: report.separations }));
    return out;
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
    const report = await quantizeCheckpoint({ ...settings, model, out, seed, calibrationTokens, threads, device });
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
        ? await evaluateTasks(decoder, tokenizer, tasks, { batchSize: 128, maxTokens: 320 })
        : undefined;
    decoder.release();
    await quantized.checkpoint.close();
    rmSync(out, { recursive: true });
    const made: Row = {
      variant,
      method: name,
      seed,
      kl: round(e.kl ?? NaN),
      klStandardError: round(e.klStandardError ?? NaN),
      windowKl: e.scores.map(({ kl }) => round(kl ?? NaN)),
      perplexity: round(e.perplexity),
      referencePerplexity: round(e.referencePerplexity ?? NaN),
      top1Agreement: round(e.top1Agreement ?? NaN),
      taskAccuracy: answered ? round(answered.accuracy) : null,
      smoothed: report.smoothing.map(({ rule }) => (rule ? `${rule.by} ${rule.exponent}` : null)),
      seconds: round(report.seconds),
    };
    console.log(JSON.stringify({ ...made, windowKl: undefined }));
    return made;
  }
}
