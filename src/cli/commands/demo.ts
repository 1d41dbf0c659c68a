// gyre demo: the whole way on the bundled model, offline: four methods quantize it to 4 bits, each result is measured against
// the original and asked one question.
import { readdir, readFile, rm, stat } from 'node:fs/promises';
import { availableParallelism } from 'node:os';
import path from 'node:path';
import { fileURLToPath } from 'node:url';
import { Command } from 'commander';
import { z } from 'zod';
import { GyreError } from '../../core/errors.js';
import { writeCalibrationText } from '../../calibration-text.node.js';
import {
  evaluateText,
  judge,
  parseTasks,
  remembering,
  summarizeModel,
  taskPrompt,
  tokenizeTexts,
  type TaskSample,
  type TextEvaluation,
} from '../../evaluation/index.js';
import { writeFileAtomic } from '../../formats/atomic.node.js';
import { FINGERPRINT_FILE } from '../../formats/run-folder.node.js';
import { collect, generate } from '../../generate/index.js';
import type { Decoder } from '../../models/decoder.js';
import type { ModelSource } from '../../models/load.js';
import { loadTokenizer, type Tokenizer } from '../../tokenizer/index.js';
import { VERSION } from '../../version.js';
import { machineInfo, onDevice, pickDevice, withDecoder, withModel, type CommandContext } from '../context.js';
import { describeModel, textResultFile } from '../result-files.js';
import { deviceOption, deviceSchema, jsonOption, parseOptions, wholeNumber } from '../options.js';
import { formatBytes, formatDuration, formatTable } from '../ui/table.js';

/** Quantized in this order: each is a step up from the one before. */
const METHODS = ['rtn', 'awq', 'gptq', 'paroquant'] as const;

/** Calibration: less than half of `gyre quantize`'s default, so that the demo stays under three minutes. */
const CALIBRATION = { sequences: 24, length: 512 } as const;

/** Windows of 1024 tokens that are scored, spread over the texts. */
const SCORED_WINDOWS = 12;

/** The question: the first task of this kind and difficulty, whatever the models make of it. */
const QUESTION = { kind: 'multiplication', difficulty: 3 } as const;

/** Folder of the measurements, inside the output folder. */
const RESULTS = 'results';

/** The texts that are scored, as the report calls them. */
const TEXT_NAME = 'prose';

const MODEL = fileURLToPath(new URL('../../../models/gyre-14m', import.meta.url));

const schema = z.object({
  out: z.string().min(1),
  seed: wholeNumber(0),
  threads: wholeNumber(1, 1024).optional(),
  ...deviceSchema,
});

type DemoOptions = z.output<typeof schema>;

/** One row of the demo's table. */
interface DemoRow {
  readonly method: string;
  /** Undefined for the original. */
  readonly out?: string;
  readonly linearBytes: number;
  readonly fileBytes: number;
  readonly bitsPerWeight: number;
  readonly evaluation: TextEvaluation;
  /** Seconds it took to quantize; undefined for the original, and for what an earlier demo made. */
  readonly seconds?: number;
  readonly answer: DemoAnswer;
}

interface DemoAnswer {
  readonly text: string;
  readonly answer: string | null;
  readonly correct: boolean;
}

/** The command. */
export function demoCommand(context: CommandContext): Command {
  const command = new Command('demo')
    .description('quantize the bundled model by four methods, compare them, and let each answer a question (npm start)')
    .option(
      '--out <dir>',
      'folder for the quantized models; finished ones are taken up again',
      path.join('out', 'demo'),
    )
    .option('--seed <n>', 'of everything random', '0')
    .option('--threads <n>', 'CPU threads (default: all cores)');
  for (const option of [deviceOption(), jsonOption()]) command.addOption(option);
  return command
    .addHelpText(
      'after',
      `
Examples:
  $ gyre demo
  $ gyre demo --out /tmp/demo --json`,
    )
    .action(async (raw: unknown) => runDemo(context, parseOptions(schema, raw)));
}

async function runDemo(context: CommandContext, options: DemoOptions): Promise<void> {
  const { quantizeCheckpoint } = await import('../../quantize.node.js');
  const begun = performance.now();
  const { print, progress, colors } = context;
  const texts = await readProse();
  const task = await readTask();
  const model = displayPath(MODEL);
  print(colors.bold(`gyre ${VERSION}: quantizing ${model} to 4 bits in groups of 128, four ways`));
  print(
    colors.dim('Calibration text is written by the model itself; the texts it is measured on were never trained on.'),
  );
  print();
  // One text for all methods: a fair comparison, and the writing is a good part of the time.
  const { name: device } = await withModel(context, MODEL, {}, (source) => pickDevice(context, source, options));
  const calibrationTokens = await withModel(context, MODEL, {}, async (source) =>
    writeCalibrationText(source, await loadTokenizer(source.files), {
      ...CALIBRATION,
      seed: options.seed,
      threads: options.threads ?? availableParallelism(),
      device,
      signal: context.signal,
      onProgress: progress.listener,
    }),
  );
  progress.note(`calibration text written: ${calibrationTokens.description}`);
  const made: { method: string; out: string; seconds: number | undefined }[] = [];
  for (const [i, method] of METHODS.entries()) {
    const out = path.join(options.out, method);
    const quantize = () =>
      quantizeCheckpoint({
        model: MODEL,
        out,
        method,
        bits: 4,
        groupSize: 128,
        seed: options.seed,
        calibrationTokens,
        device,
        threads: options.threads,
        resume: true,
        signal: context.signal,
        onProgress: (event) =>
          progress.listener({ ...event, stage: `${method} (${i + 1}/${METHODS.length}) ${event.stage}` }),
      });
    const report = await quantize().catch(async (error: unknown) => {
      if (!(error instanceof GyreError) || error.code !== 'output-exists' || !(await removeOurs(out))) throw error;
      progress.note(`${displayPath(out)} was made with another seed, device or version: making it again`);
      return quantize();
    });
    progress.note(`${method.padEnd(10)} ${report.skipped ? 'made by an earlier run' : formatDuration(report.seconds)}`);
    made.push({ method, out, seconds: report.skipped ? undefined : report.seconds });
  }
  const rows = await withModel(context, MODEL, {}, (source) =>
    onDevice(device, options, async (backend) => {
      const tokenizer = await loadTokenizer(source.files);
      const tokens = tokenizeTexts(tokenizer, texts);
      const prose = { name: TEXT_NAME, text: texts.join('\n\n') };
      const originalModel = await describeModel({ ...source, name: path.basename(MODEL) });
      return withDecoder(context, backend, source, async (original) => {
        const reference = remembering(original);
        const measure = async (method: string, decoder: Decoder, from: ModelSource, folder: string) => {
          const evaluation = await evaluateText(decoder === original ? reference : decoder, tokens, {
            bosTokenId: tokenizer.bosTokenId,
            samples: SCORED_WINDOWS,
            reference: decoder === original ? undefined : reference,
            signal: context.signal,
            onProgress: (event) => progress.listener({ ...event, stage: `evaluate ${method}` }),
          });
          const result = await textResultFile(prose, evaluation, {
            model: decoder === original ? originalModel : await describeModel({ ...from, name: method }),
            reference: decoder === original ? null : originalModel,
            backend: backend.info,
          });
          await writeFileAtomic(path.join(options.out, RESULTS, `${method}.json`), `${JSON.stringify(result)}\n`);
          return {
            method,
            linearBytes: summarizeModel(from).linearBytes,
            fileBytes: await weightBytes(folder),
            bitsPerWeight: summarizeModel(from).linearBitsPerWeight,
            evaluation,
            answer: await answerTask(context, decoder, tokenizer, task),
          };
        };
        const found: DemoRow[] = [await measure('original', original, source, MODEL)];
        for (const { method, out, seconds } of made) {
          const row = await withModel(context, out, {}, (quantized) =>
            withDecoder(context, backend, quantized, (decoder) => measure(method, decoder, quantized, out)),
          );
          found.push({ ...row, out, seconds });
        }
        return found;
      });
    }),
  );
  const page = await demoReport(options.out, made);
  progress.clear();
  const seconds = (performance.now() - begun) / 1000;
  const memoryBytes = process.resourceUsage().maxRSS * 1024;
  context.result({
    model,
    rows,
    task,
    seconds,
    memoryBytes,
    report: page,
    version: VERSION,
    machine: machineInfo(),
  });
  print();
  print(resultTable(rows, context));
  print();
  print(answersText(rows, task, context));
  print();
  print(`${formatDuration(seconds)} in all, ${formatBytes(memoryBytes)} of memory at the peak.`);
  print(`A report with charts: ${colors.bold(displayPath(page))} (open it in a browser)`);
  print(`The quantized models lie in ${made.map(({ out }) => displayPath(out)).join(', ')}.`);
  print();
  print(colors.dim('Next:'));
  const best = displayPath(path.join(options.out, 'paroquant'));
  print(`  npx gyre generate ${best} --chat --prompt "What is 80 times 22?" --temperature 0`);
  print(`  npx gyre inspect ${best}`);
  print(`  npx gyre eval ${best} --text README.md --reference ${model}`);
  print(`  npx gyre quantize Qwen/Qwen3-0.6B --out out/qwen3-0.6b-w4`);
}

/** Writes the page about what was made and measured; only of this run's models, whatever else lies in the folder. */
async function demoReport(out: string, made: readonly { readonly out: string }[]): Promise<string> {
  const { findInputs, writeReport } = await import('../../report.node.js');
  const page = path.join(out, 'report.html');
  const folders = [path.join(out, RESULTS), ...made.map((model) => model.out)];
  await writeReport(await findInputs(folders, { allowEmpty: true }), {
    out: page,
    madeBy: `gyre ${VERSION}, gyre demo`,
  });
  return page;
}

/** Removes a result, finished or not, that gyre made; leaves anything else alone and says false. */
async function removeOurs(out: string): Promise<boolean> {
  let removed = false;
  for (const folder of [out, `${out}.partial`]) {
    const ours = await stat(path.join(folder, FINGERPRINT_FILE)).catch(() => undefined);
    if (!ours) continue;
    await rm(folder, { recursive: true });
    removed = true;
  }
  return removed;
}

/** The texts that come with the bundled model. */
async function readProse(): Promise<string[]> {
  const folder = path.join(MODEL, 'eval', 'prose');
  const names = await bundled(() => readdir(folder));
  const files = names.filter((name) => name.endsWith('.txt')).sort();
  return Promise.all(files.map((name) => readFile(path.join(folder, name), 'utf8')));
}

async function readTask(): Promise<TaskSample> {
  const file = path.join(MODEL, 'eval', 'tasks.jsonl');
  const tasks = parseTasks(await bundled(() => readFile(file, 'utf8')), file);
  return tasks.find(({ kind, difficulty }) => kind === QUESTION.kind && difficulty === QUESTION.difficulty) ?? tasks[0];
}

async function bundled<T>(read: () => Promise<T>): Promise<T> {
  try {
    return await read();
  } catch (cause) {
    throw new GyreError(
      'file-missing',
      `the bundled model is not whole: ${cause instanceof Error ? cause.message : ''}`,
      {
        remedy: 'install gyre again, or clone the repository afresh',
        cause,
      },
    );
  }
}

async function answerTask(
  context: CommandContext,
  decoder: Decoder,
  tokenizer: Tokenizer,
  task: TaskSample,
): Promise<DemoAnswer> {
  const stopIds = [...new Set([...decoder.config.eosTokenIds, ...tokenizer.eosTokenIds])];
  const { ids, summary } = await collect(
    generate(decoder, taskPrompt(tokenizer, task), { maxTokens: 512, stopIds, signal: context.signal }),
  );
  if (summary.reason === 'interrupted') {
    throw new GyreError('interrupted', 'the demo was stopped; finished models are kept', {
      remedy: 'run it again to go on',
    });
  }
  const { text, answer, correct } = judge(task, tokenizer.decode(ids, { skipSpecialTokens: false }));
  return { text, answer, correct };
}

/** Bytes of a folder's safetensors files. */
async function weightBytes(folder: string): Promise<number> {
  const names = (await readdir(folder)).filter((name) => name.endsWith('.safetensors'));
  const sizes = await Promise.all(names.map(async (name) => (await stat(path.join(folder, name))).size));
  return sizes.reduce((sum, size) => sum + size, 0);
}

function resultTable(rows: readonly DemoRow[], { colors }: CommandContext): string {
  const percent = (value: number | null): string => (value === null ? '' : `${(100 * value).toFixed(2)} %`);
  const best = Math.min(...rows.map((row) => row.evaluation.kl ?? Infinity));
  return formatTable(
    [
      { title: 'method' },
      { title: 'linears', align: 'right' },
      { title: 'file', align: 'right' },
      { title: 'bits/weight', align: 'right' },
      { title: 'perplexity', align: 'right' },
      { title: 'KL', align: 'right' },
      { title: 'top-1 agreement', align: 'right' },
      { title: 'time', align: 'right' },
    ],
    rows.map(({ method, linearBytes, fileBytes, bitsPerWeight, evaluation, seconds }) => [
      evaluation.kl === best ? colors.bold(method) : method,
      formatBytes(linearBytes),
      formatBytes(fileBytes),
      bitsPerWeight.toFixed(3),
      evaluation.perplexity.toFixed(3),
      evaluation.kl === null
        ? ''
        : evaluation.kl === best
          ? colors.green(evaluation.kl.toFixed(5))
          : evaluation.kl.toFixed(5),
      percent(evaluation.top1Agreement),
      seconds !== undefined ? formatDuration(seconds) : method === 'original' ? '' : 'earlier',
    ]),
  );
}

function answersText(rows: readonly DemoRow[], task: TaskSample, { colors }: CommandContext): string {
  const lines = [`${colors.bold('Question:')} ${task.question} ${colors.dim(`(the answer is ${task.answer})`)}`];
  for (const { method, answer } of rows) {
    const mark = answer.correct ? colors.green('✓') : colors.red('✗');
    lines.push(`  ${mark} ${method.padEnd(10)} ${shorten(answer.text.trim(), 140)}`);
  }
  return lines.join('\n');
}

/** The end of a text matters most (the answer stands there), its beginning next. */
function shorten(text: string, limit: number): string {
  const line = text.replaceAll(/\s+/g, ' ');
  if (line.length <= limit) return line;
  const tail = Math.floor(limit / 2);
  return `${line.slice(0, limit - tail - 3)} … ${line.slice(-tail)}`;
}

/** Relative to the working folder when inside it. */
function displayPath(file: string): string {
  const relative = path.relative(process.cwd(), path.resolve(file));
  return relative.startsWith('..') || path.isAbsolute(relative) ? path.resolve(file) : relative || '.';
}
