// gyre eval: perplexity and KL of texts, benchmark tasks by likelihood and by generation; one result file.
import path from 'node:path';
import { Command } from 'commander';
import { GyreError } from '../../core/errors.js';
import {
  RESULT_KIND,
  RESULT_VERSION,
  type Evaluation,
  type EvaluationResult,
  type ModelResult,
} from '../../evaluation/results.js';
import { taskNames } from '../../evaluation/data.node.js';
import { evaluationCacheDir } from '../../evaluation/request-cache.node.js';
import { writeFileAtomic } from '../../formats/atomic.node.js';
import type { Decoder } from '../../models/decoder.js';
import { loadTokenizer } from '../../tokenizer/index.js';
import { VERSION } from '../../version.js';
import { evalSchema, type EvalOptions } from '../eval-options.js';
import { machineInfo, withBackend, withDecoder, withModel, type CommandContext } from '../context.js';
import {
  evaluateTask,
  evaluateTexts,
  prepareTask,
  readTexts,
  type EvaluationContext,
  type PreparedTask,
} from '../evaluations.js';
import { describeModel } from '../result-files.js';
import { measureDrift } from './eval-drift.js';
import { jsonOption, modelOptions, parseOptions, runtimeOptions } from '../options.js';
import { formatDuration, formatFields, formatTable } from '../ui/table.js';
import { formatMetric } from '../ui/metrics.js';

/** The command. */
export function evalCommand(context: CommandContext): Command {
  const command = new Command('eval')
    .description('measure a model: perplexity and KL of texts, benchmarks by likelihood and by generation')
    .argument('[model]', 'folder or hub id; quantized checkpoints are run, not expanded')
    .option('--text <files...>', '.txt, or .jsonl with "text"; several are joined')
    .option('--reference <model>', 'the unquantized model to compare with, on --text and on text tasks')
    .option('--seq-len <n>', "tokens per window (default: 1024, or 2048 for text tasks; at most the model's context)")
    .option('--samples <n>', 'windows of --text, spread evenly over the text (default: all)')
    .option('--protocol <name>', 'windows, strided or rolling; see docs/evaluation.md (default: windows)')
    .option('--stride <n>', 'tokens from window to window of the strided protocol (default: half a window)')
    .option('--start-token <where>', 'none, once, or each window (default: each for --text, once for text tasks)')
    .option('--per-document', 'score the documents of --text apart, and report each')
    .option('--tasks <names>', 'tasks, separated by commas: names (--list-tasks), task files (.json), chains (.jsonl)')
    .option('--list-tasks', 'print the names of the tasks and stop')
    .option('--drift <file>', "tasks as .jsonl: KL along the reference's chains, and where the model's own depart")
    .option('--data <folder>', 'where to look for the data of tasks before the hub')
    .option('--limit <n>', 'questions per task (of text tasks: windows), from the first (default: all)')
    .option('--few-shot <n>', 'examples before each question (default: what the task says)')
    .option('--n-samples <n>', 'answers per question of generation tasks (default: what the task says)')
    .option('--max-tokens <n>', 'tokens per answer (default: what the task says)')
    .option('--temperature <t>', 'of answers (default: what the task says), like --top-p and --top-k')
    .option('--top-p <p>', 'smallest set of tokens that reaches this probability')
    .option('--top-k <k>', 'most likely tokens kept')
    .option('--no-thinking', 'ask the chat template not to let the model think')
    .option('--batch-size <n>', 'answers written at a time', '32')
    .option('--seed <n>', 'of samples, drawn examples (0: those of the harness) and shuffled choices', '0')
    .option('--out <file>', 'write the result as JSON, and what the model wrote beside it')
    .option(
      '--cache <folder>',
      'where answers to single requests are kept, for runs that are stopped',
      evaluationCacheDir(),
    )
    .option('--no-cache', 'keep no answers and use none that were kept');
  for (const option of [...runtimeOptions(), ...modelOptions(), jsonOption()]) command.addOption(option);
  return command
    .addHelpText(
      'after',
      `
Examples:
  $ gyre eval qwen3-w4 --text book.txt --reference Qwen/Qwen3-0.6B --samples 32
  $ gyre eval qwen3-w4 --tasks wikitext2,arc_easy,piqa --out w4.json
  $ gyre eval qwen3-w4 --tasks math500,aime25 --n-samples 4 --limit 100 --out reasoning.json
  $ gyre eval models/gyre-14m --tasks chains --limit 100
  $ gyre eval gyre-14m-w3 --drift models/gyre-14m/eval/tasks.jsonl --reference models/gyre-14m --limit 200
  $ gyre compare fp16.json w4.json

Data comes from the hub at pinned commits, or from --data. A run that was stopped goes on where it was when it is
started again. kl is the mean of KL(reference‖model) per token in nats; intervals are 95%.`,
    )
    .action(async (model: string | undefined, raw: unknown) => {
      const options = parseOptions(evalSchema, raw);
      if (options.listTasks) {
        const names = await taskNames();
        context.result({ tasks: names });
        context.print(names.join('\n'));
        return;
      }
      if (model === undefined) throw new GyreError('usage', "missing required argument 'model'");
      if (options.drift === undefined) return run(context, model, options);
      const { result, text } = await measureDrift(context, model, options.drift, options);
      await writeResult(options.out, result);
      context.progress.clear();
      context.result(result);
      context.print(text);
    });
}

async function run(context: CommandContext, model: string, options: EvalOptions): Promise<void> {
  if (!options.text && options.tasks === undefined) {
    throw new GyreError('usage', 'nothing to evaluate on: neither --text nor --tasks was given', {
      remedy: `add --text <file>, e.g. gyre eval ${model} --text book.txt`,
    });
  }
  // What can be refused is refused before a model is loaded.
  const texts = options.text ? await readTexts(options.text) : undefined;
  const tasks: PreparedTask[] = [];
  for (const name of options.tasks?.split(',').map((part) => part.trim()) ?? []) {
    tasks.push(await prepareTask(context, name, options));
  }
  const twice = tasks.find(({ task }, i) => tasks.findIndex((other) => other.task.name === task.name) !== i);
  if (twice) throw new GyreError('usage', `--tasks: ${twice.task.name} is named twice`);
  const needsText = texts !== undefined || tasks.some(({ task }) => task.type === 'text');
  await withModel(context, model, options, (source) =>
    withBackend(context, source, options, async (backend) => {
      const tokenizer = await loadTokenizer(source.files);
      const described = await describeModel(source);
      await withDecoder(
        context,
        backend,
        source,
        (decoder) =>
          withReference(
            context,
            decoder,
            needsText ? options : { ...options, reference: undefined },
            async (reference) => {
              const scope = JSON.stringify([
                described.fingerprint,
                backend.info.name,
                // Another GPU sums in another order, another precision rounds otherwise. What describes a CPU backend is its threads, which change nothing.
                backend.info.name === 'cpu' ? '' : backend.info.description,
                options.activations,
                options.headBits,
              ]);
              const surroundings: EvaluationContext = {
                context,
                decoder,
                tokenizer,
                options,
                scope,
                reference: reference?.decoder,
              };
              const evaluations: Evaluation[] = [];
              if (texts) evaluations.push(await evaluateTexts(surroundings, texts));
              for (const task of tasks) evaluations.push(await evaluateTask(surroundings, task));
              context.progress.clear();
              const result: EvaluationResult = {
                kind: RESULT_KIND,
                schemaVersion: RESULT_VERSION,
                version: VERSION,
                createdAt: new Date().toISOString(),
                model: described,
                reference: reference?.described ?? null,
                backend: backend.info,
                machine: machineInfo(),
                settings: {
                  activations: options.activations,
                  headBits: options.headBits,
                  precision: backend.info.precision ?? 'f32',
                },
                evaluations,
              };
              await writeResult(options.out, result);
              context.result(result);
              context.print(report(result));
            },
          ),
        options,
      );
    }),
  );
}

async function writeResult(out: string | undefined, result: object): Promise<void> {
  if (out !== undefined) await writeFileAtomic(path.resolve(out), `${JSON.stringify(result, null, 1)}\n`);
}

/** The reference, loaded beside the model when there is one. */
async function withReference<T>(
  context: CommandContext,
  decoder: Decoder,
  options: Pick<EvalOptions, 'reference' | 'token'>,
  use: (reference?: { decoder: Decoder; described: ModelResult }) => Promise<T>,
): Promise<T> {
  if (options.reference === undefined) return use();
  // A revision names a state of the model; the reference is taken as it is.
  return withModel(context, options.reference, { token: options.token }, async (source) => {
    const described = await describeModel(source);
    return withDecoder(context, decoder.backend, source, (reference) => use({ decoder: reference, described }));
  });
}

/** The result for people. */
function report({ model, reference, evaluations }: EvaluationResult): string {
  const quantization = model.quantization;
  const kind = quantization
    ? `${String(quantization['method'])} ${String(quantization['bits'])} bits`
    : 'not quantized';
  const fields: [string, string][] = [['model', `${model.name} (${model.family}, ${kind})`]];
  if (reference) fields.push(['reference', reference.name]);
  const rows = evaluations.flatMap((evaluation) => {
    const { name, metrics, throughput, items } = evaluation;
    const speed = `${formatDuration(throughput.seconds)}, ${throughput.tokensPerSecond.toFixed(0)} tokens/s`;
    const count =
      evaluation.type === 'text'
        ? `${evaluation.tokens} tokens in ${evaluation.windows} windows`
        : String(items.ids.length);
    return Object.entries(metrics).map(([metric, value], i) => [
      i === 0 ? name : '',
      metric,
      formatMetric(value),
      i === 0 ? count : '',
      i === 0 ? speed : '',
    ]);
  });
  const columns = [
    { title: 'task' },
    { title: 'metric' },
    { title: 'value [95% interval]' },
    { title: 'of' },
    { title: 'time' },
  ];
  const notes = evaluations.flatMap((evaluation) => {
    if (evaluation.type === 'choices' && evaluation.truncated > 0)
      return [
        `\n\n${evaluation.name}: ${evaluation.truncated} choices were scored without the beginning of their question, which is longer than the model's context.`,
      ];
    const cut = evaluation.type === 'generation' ? evaluation.stopReasons['length'] : 0;
    if (evaluation.type !== 'generation' || !cut) return [];
    const all = Object.values(evaluation.stopReasons).reduce((sum, count) => sum + count, 0);
    return [
      `\n\n${evaluation.name}: ${cut} of ${all} answers were cut off at ${evaluation.settings.maxTokens} tokens.`,
    ];
  });
  const groups = evaluations.flatMap((evaluation) => {
    const parts = evaluation.type === 'text' ? evaluation.documents : evaluation.groups;
    if (parts.length === 0) return [];
    // Documents under a reference are about what changed, too.
    const shown = [evaluation.primary, 'kl', 'top1_agreement'].filter((name) => name in parts[0].metrics);
    const table = formatTable(
      [{ title: evaluation.name }, ...shown.map((title) => ({ title })), { title: 'of', align: 'right' }],
      parts.map(({ name, metrics, items }) => [
        name,
        ...shown.map((metric) => formatMetric(metrics[metric])),
        String(items),
      ]),
    );
    return [`\n\n${table}`];
  });
  return `${formatFields(fields)}\n\n${formatTable(columns, rows)}${groups.join('')}${notes.join('')}`;
}
