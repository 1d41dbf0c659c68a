// gyre inspect: what a checkpoint is, and which of its linears have channels that stand out.
import { Command } from 'commander';
import { z } from 'zod';
import { GyreError } from '../../core/errors.js';
import {
  linearStatistics,
  modelFingerprint,
  summarizeModel,
  type LinearStatistics,
  type ModelSummary,
} from '../../evaluation/index.js';
import type { ModelSource } from '../../models/load.js';
import { VERSION } from '../../version.js';
import { writeActivationReport } from '../activation-report.js';
import { withModel, type CommandContext } from '../context.js';
import { jsonOption, modelOptions, modelSchema, parseOptions } from '../options.js';
import { formatBytes, formatCount, formatFields, formatTable } from '../ui/table.js';

const schema = z.object({
  ...modelSchema,
  layers: z.string().optional(),
  statistics: z.boolean(),
  activations: z.string().min(1).optional(),
  png: z.boolean().default(false),
});

/** The command. */
export function inspectCommand(context: CommandContext): Command {
  const command = new Command('inspect')
    .description('show architecture, tensors, sizes, bits per weight, quantization, and outliers of every linear')
    .argument('<model>', 'folder or hub id')
    .option(
      '--layers <filter>',
      'linears to show: numbers and ranges of blocks (0,4-7), or a part of the name (down_proj)',
    )
    .option('--no-statistics', 'read the headers only')
    .option(
      '--activations <dir>',
      "run the model as it is, smoothed, rotated and smooth-rotated, and write figures (SVG) and numbers (JSON) of the linears' inputs",
    )
    .option('--png', 'the figures as PNG too; needs Chromium or Chrome (CHROMIUM_PATH)');
  for (const option of [...modelOptions(), jsonOption()]) command.addOption(option);
  return command
    .addHelpText(
      'after',
      `
Examples:
  $ gyre inspect models/gyre-14m
  $ gyre inspect Qwen/Qwen3-0.6B --layers 0,27
  $ gyre inspect models/gyre-14m --layers 7 --activations figures --png
  $ gyre inspect out/demo/paroquant --layers down_proj --json

max/median compares the input channels' largest weights: near 1 no channel stands out. Kurtosis is 3 for a normal
distribution. Quantized linears are measured as stored: with ParoQuant, in the rotated space that the grid holds.`,
    )
    .action(async (model: string, raw: unknown) => {
      const options = parseOptions(schema, raw);
      if (options.png && options.activations === undefined)
        throw new GyreError('usage', '--png draws the figures of --activations', { remedy: 'add --activations <dir>' });
      await withModel(context, model, options, async (source) => {
        const matches = layerFilter(options.layers, source.config.layers);
        const summary = summarizeModel(source);
        const fingerprint = await modelFingerprint(source);
        context.print(overview(source, summary, fingerprint));
        const linears: LinearStatistics[] = [];
        if (options.statistics) {
          const total = summary.layers * 7;
          let seen = 0;
          const wanted = (module: string): boolean => {
            context.progress.listener({ stage: 'inspect', done: seen++, total, unit: 'linears', message: module });
            return matches(module);
          };
          for await (const one of linearStatistics(source, wanted)) {
            if (context.signal.aborted)
              throw new GyreError('interrupted', 'the inspection was interrupted', {
                remedy: 'run it again, for fewer --layers',
              });
            linears.push(one);
          }
          context.progress.clear();
          if (linears.length === 0) {
            throw new GyreError('usage', `--layers: no linear matches '${options.layers}'`, {
              remedy: `blocks are 0 to ${summary.layers - 1}; names are like ${'model.layers.0.mlp.down_proj'}`,
            });
          }
          context.print(`\n${statisticsTable(linears)}`);
        }
        const activations =
          options.activations === undefined
            ? undefined
            : await writeActivationReport(context, source, options.activations, matches, options.png);
        if (activations)
          context.print(`\n${activationTable(activations)}\n\nFigures and numbers: ${options.activations}`);
        context.result({
          ...summary,
          fingerprint,
          quantization: source.quantization ?? null,
          ...(options.statistics && { linears }),
          ...(activations && { activations }),
          version: VERSION,
        });
      });
    });
}

/** `0,4-7` chooses blocks, anything else a part of the module's name. @throws GyreError `usage` for blocks that are not there. */
export function layerFilter(filter: string | undefined, layers: number): (module: string) => boolean {
  if (filter === undefined) return () => true;
  if (!/^\d+(-\d+)?(,\d+(-\d+)?)*$/.test(filter)) return (module) => module.includes(filter);
  const wanted = new Set<number>();
  for (const part of filter.split(',')) {
    const [first, last = first] = part.split('-').map(Number);
    if (last >= layers || first > last) {
      throw new GyreError('usage', `--layers: the model has no blocks '${part}'`, {
        remedy: `blocks are 0 to ${layers - 1}`,
      });
    }
    for (let layer = first; layer <= last; layer++) wanted.add(layer);
  }
  return (module) => wanted.has(Number(/\.(\d+)\./.exec(module)?.[1]));
}

function overview(source: ModelSource, summary: ModelSummary, fingerprint: string): string {
  const { quantization } = source;
  const { hiddenSize, heads, kvHeads, headDim, intermediateSize, layers, vocabSize, contextLength } = summary;
  const fields: [string, string][] = [
    ['model', `${source.name} (fingerprint ${fingerprint})`],
    [
      'architecture',
      `${summary.family}: ${layers} blocks, hidden ${hiddenSize}, ${heads} heads of ${headDim} (${kvHeads} for keys and values), MLP ${intermediateSize}`,
    ],
    [
      'vocabulary',
      `${vocabSize}${summary.tiedEmbeddings ? ', head tied to the embedding' : ''}; context ${contextLength}`,
    ],
    [
      'parameters',
      `${formatCount(summary.parameters)}, of which ${formatCount(summary.linearParameters)} in the linears of the blocks`,
    ],
    [
      'tensors',
      `${summary.tensors}: ${summary.dtypes.map((d) => `${d.tensors} ${d.dtype} (${formatBytes(d.bytes)})`).join(', ')}`,
    ],
    ['size', `${formatBytes(summary.bytes)}, linears ${formatBytes(summary.linearBytes)}`],
    [
      'bits per weight',
      `${summary.linearBitsPerWeight.toFixed(3)} in the linears, ${summary.bitsPerWeight.toFixed(3)} over the whole model`,
    ],
    ['quantization', quantization ? quantizationLine(quantization) : 'none'],
  ];
  return formatFields(fields);
}

function quantizationLine(quantization: NonNullable<ModelSource['quantization']>): string {
  const { method, recipe, bits, groupSize, krot, modulesToNotConvert, groupSizeOverrides, online } = quantization;
  const parts = [
    `${method} layout${recipe ? ` (${recipe})` : ''}`,
    `${bits} bits`,
    groupSize === -1 ? 'per channel' : `groups of ${groupSize}`,
  ];
  if (krot > 0) parts.push(`${krot} rotations`);
  for (const { at, order } of online?.hadamard ?? []) parts.push(`Hadamard ${order} at ${at}`);
  if (online?.activations) parts.push(`${online.activations.bits}-bit activations`);
  if (online?.kvCache) parts.push(`${online.kvCache.bits}-bit cache`);
  const others = Object.keys(groupSizeOverrides).length;
  if (others > 0) parts.push(`${others} linears with other groups`);
  if (modulesToNotConvert.length > 0) parts.push(`${modulesToNotConvert.length} modules in 16 bits`);
  return parts.join(', ');
}

function activationTable(profiles: Awaited<ReturnType<typeof writeActivationReport>>): string {
  return formatTable(
    [
      { title: 'inputs of' },
      { title: 'model' },
      { title: 'abs max', align: 'right' },
      { title: 'typical channel', align: 'right' },
      { title: 'max/typical', align: 'right' },
      { title: 'kurtosis', align: 'right' },
    ],
    profiles.map((p) => [
      `${p.layer} ${p.group}`,
      p.variant,
      p.absMax.toPrecision(4),
      p.typical.toPrecision(3),
      (p.absMax / Math.max(p.typical, 1e-30)).toFixed(1),
      p.kurtosis.toFixed(1),
    ]),
  );
}

function statisticsTable(linears: readonly LinearStatistics[]): string {
  return formatTable(
    [
      { title: 'linear' },
      { title: 'shape', align: 'right' },
      { title: 'space' },
      { title: 'std', align: 'right' },
      { title: 'abs max', align: 'right' },
      { title: 'max/median', align: 'right' },
      { title: 'kurtosis', align: 'right' },
    ],
    linears.map((l) => [
      l.module.replace(/^model\.layers\./, ''),
      `${l.outFeatures}×${l.inFeatures}`,
      l.space,
      l.standardDeviation.toFixed(4),
      l.absMax.toFixed(3),
      l.channelRatio.toFixed(2),
      l.kurtosis.toFixed(2),
    ]),
  );
}
