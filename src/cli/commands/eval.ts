// gyre eval: perplexity of a text, KL and agreement with a reference model, accuracy on tasks.
import { readFile } from 'node:fs/promises';
import { Command } from 'commander';
import { z } from 'zod';
import { GyreError } from '../../core/errors.js';
import {
  evaluateTasks,
  evaluateText,
  modelFingerprint,
  parseTasks,
  parseTextFile,
  tokenizeTexts,
  type TasksEvaluation,
  type TextEvaluation,
} from '../../evaluation/index.js';
import type { Decoder } from '../../models/decoder.js';
import type { ModelSource } from '../../models/load.js';
import { loadTokenizer, type Tokenizer } from '../../tokenizer/index.js';
import { VERSION } from '../../version.js';
import { machineInfo, withBackend, withDecoder, withModel, type CommandContext } from '../context.js';
import {
  jsonOption,
  modelOptions,
  modelSchema,
  parseOptions,
  runtimeOptions,
  runtimeSchema,
  wholeNumber,
} from '../options.js';
import { driftReport, onDrift } from './eval-drift.js';
import { formatDuration, formatFields, formatMeasure, formatTable } from '../ui/table.js';

const schema = z.object({
  ...modelSchema,
  ...runtimeSchema,
  text: z.array(z.string()).optional(),
  reference: z.string().optional(),
  seqLen: wholeNumber(2, 10_000_000).optional(),
  samples: wholeNumber(1).optional(),
  tasks: z.string().optional(),
  drift: z.string().optional(),
  limit: wholeNumber(1).optional(),
  maxTokens: wholeNumber(1),
});

type EvalOptions = z.output<typeof schema>;

/** The command. */
export function evalCommand(context: CommandContext): Command {
  const command = new Command('eval')
    .description('measure a model: perplexity of a text, KL and top-1 agreement with a reference, accuracy on tasks')
    .argument('<model>', 'folder or hub id; quantized checkpoints are run, not expanded')
    .option('--text <files...>', '.txt, or .jsonl with "text"; several are joined')
    .option('--reference <model>', 'the unquantized model to compare with')
    .option('--seq-len <n>', "tokens per window (default: 1024, or the model's context)")
    .option('--samples <n>', 'windows, spread evenly over the text (default: all)')
    .option('--tasks <file>', 'tasks as .jsonl (models/gyre-14m/eval/tasks.jsonl): greedy answers, exact match')
    .option('--drift <file>', "tasks as .jsonl: KL along the reference's chains, and where the model's own depart")
    .option('--limit <n>', 'tasks, from the first (default: all)')
    .option('--max-tokens <n>', 'tokens per answer of --tasks', '512');
  for (const option of [...runtimeOptions(), ...modelOptions(), jsonOption()]) command.addOption(option);
  return command
    .addHelpText(
      'after',
      `
Examples:
  $ gyre eval qwen3-w4 --text book.txt
  $ gyre eval qwen3-w4 --text book.txt --reference Qwen/Qwen3-0.6B --samples 32 --json
  $ gyre eval models/gyre-14m --tasks models/gyre-14m/eval/tasks.jsonl --limit 100
  $ gyre eval gyre-14m-w3 --drift models/gyre-14m/eval/tasks.jsonl --reference models/gyre-14m --limit 200

The text is tokenized once and cut into windows of --seq-len tokens, each opened by the start token if the model has
one; every next token of a window is scored. kl is the mean of KL(reference‖model) per token in nats.`,
    )
    .action(async (model: string, raw: unknown) => {
      const options = parseOptions(schema, raw);
      if (options.text === undefined && options.tasks === undefined && options.drift === undefined) {
        throw new GyreError('usage', 'nothing to evaluate on: neither --text nor --tasks was given', {
          remedy: `add --text <file>, e.g. gyre eval ${model} --text book.txt`,
        });
      }
      if (options.reference !== undefined && options.text === undefined && options.drift === undefined) {
        throw new GyreError('usage', '--reference compares on a text, and no --text was given', {
          remedy: 'add --text <file>',
        });
      }
      // Read before any model is: a wrong path should cost nothing.
      const texts = (await Promise.all((options.text ?? []).map(readTexts))).flat();
      const tasks = options.tasks === undefined ? [] : parseTasks(await readInput(options.tasks), options.tasks);
      const drift =
        options.drift === undefined ? undefined : { name: options.drift, text: await readInput(options.drift) };
      await withModel(context, model, options, (source) =>
        withBackend(context, source, options, async (backend) => {
          const tokenizer = await loadTokenizer(source.files);
          const found = await withDecoder(
            context,
            backend,
            source,
            async (decoder) => ({
              text: options.text && (await onText(context, decoder, tokenizer, texts, options)),
              tasks:
                tasks.length > 0
                  ? await evaluateTasks(decoder, tokenizer, tasks.slice(0, options.limit), {
                      maxTokens: options.maxTokens,
                      onProgress: context.progress.listener,
                      signal: context.signal,
                    })
                  : undefined,
              drift: drift && (await onDrift(context, decoder, tokenizer, drift, options)),
            }),
            options,
          );
          context.progress.clear();
          context.result({
            ...found.text,
            ...(found.tasks && { tasksEvaluation: found.tasks }),
            ...(found.drift && { drift: found.drift }),
            model: await describe(source),
            reference: options.reference ?? null,
            text: options.text ?? null,
            backend: backend.info,
            activations: options.activations,
            headBits: options.headBits,
            version: VERSION,
            machine: machineInfo(),
          });
          context.print(report(source, found.text, found.tasks, options.reference));
          if (found.drift) context.print(`\n${driftReport(found.drift)}`);
        }),
      );
    });
}

/** The evaluation of a text, with the reference loaded beside the model when there is one. */
async function onText(
  context: CommandContext,
  decoder: Decoder,
  tokenizer: Tokenizer,
  texts: readonly string[],
  options: EvalOptions,
): Promise<TextEvaluation> {
  const tokens = tokenizeTexts(tokenizer, texts);
  const run = (reference?: Decoder): Promise<TextEvaluation> =>
    evaluateText(decoder, tokens, {
      seqLen: options.seqLen,
      samples: options.samples,
      bosTokenId: tokenizer.bosTokenId,
      reference,
      onProgress: context.progress.listener,
      signal: context.signal,
    });
  if (options.reference === undefined) return run();
  // A revision names a state of the model; the reference is taken as it is.
  return withModel(context, options.reference, { token: options.token }, (source) =>
    withDecoder(context, decoder.backend, source, run),
  );
}

async function readTexts(file: string): Promise<string[]> {
  return parseTextFile(file, await readInput(file));
}

/** A UTF-8 file named on the command line. */
async function readInput(file: string): Promise<string> {
  let bytes: Buffer;
  try {
    bytes = await readFile(file);
  } catch (cause) {
    throw new GyreError('file-missing', `can't read ${file}: ${cause instanceof Error ? cause.message : ''}`, {
      remedy: 'check the path and that you may read it',
      cause,
    });
  }
  try {
    return new TextDecoder('utf-8', { fatal: true }).decode(bytes);
  } catch (cause) {
    throw new GyreError('file-corrupt', `${file} is not UTF-8 text`, { remedy: 'convert it to UTF-8', cause });
  }
}

/** What a result says of a model. */
async function describe(source: ModelSource) {
  return {
    name: source.name,
    family: source.config.family,
    fingerprint: await modelFingerprint(source),
    quantization: source.quantization ?? null,
  };
}

function report(
  source: ModelSource,
  text: TextEvaluation | undefined,
  tasks: TasksEvaluation | undefined,
  reference: string | undefined,
): string {
  const { quantization } = source;
  const fields: [string, string][] = [
    [
      'model',
      `${source.name} (${source.config.family}, ${quantization ? `${quantization.method} ${quantization.bits} bits` : 'not quantized'})`,
    ],
  ];
  if (text) {
    fields.push([
      'perplexity',
      `${formatMeasure(text.perplexity, text.perplexityStandardError, 3)}  (nll ${text.nll.toFixed(4)})`,
    ]);
    if (text.kl !== null && text.top1Agreement !== null && text.referencePerplexity !== null) {
      fields.push(
        ['reference', `${reference ?? ''}, perplexity ${text.referencePerplexity.toFixed(3)}`],
        ['KL', `${formatMeasure(text.kl, text.klStandardError, 5)} nats per token`],
        ['top-1 agreement', `${(100 * text.top1Agreement).toFixed(2)} %`],
      );
    }
    fields.push(
      ['tokens', `${text.tokens} in ${text.windows} windows of ${text.seqLen}`],
      ['time', `${formatDuration(text.seconds)} (${text.tokensPerSecond.toFixed(0)} tokens/s)`],
    );
  }
  if (tasks) {
    fields.push([
      'tasks',
      `${tasks.correct} of ${tasks.tasks} right: ${(100 * tasks.accuracy).toFixed(1)} ± ${(100 * tasks.accuracyStandardError).toFixed(1)} %, ${formatDuration(tasks.seconds)}`,
    ]);
  }
  const table = tasks
    ? `\n\n${formatTable(
        [
          { title: 'kind' },
          { title: 'right', align: 'right' },
          { title: 'of', align: 'right' },
          { title: '%', align: 'right' },
        ],
        tasks.kinds.map((k) => [k.kind, String(k.correct), String(k.tasks), (100 * k.accuracy).toFixed(1)]),
      )}`
    : '';
  return formatFields(fields) + table;
}
