// gyre quantize: a checkpoint in, a smaller one out.
import { Command } from 'commander';
import { z } from 'zod';
import { CALIBRATION_SEQUENCES, LARGE_CALIBRATION_SEQUENCES } from '../../quant/calibration/tokens.js';
import { RECIPES } from '../../quant/recipes/index.js';
import { BLOCK_DEFAULTS } from '../../quant/types.js';
import type { QuantizeReport } from '../../quantize.node.js';
import { VERSION } from '../../version.js';
import { pickDevice, withModel, type CommandContext } from '../context.js';
import {
  decimalNumber,
  deviceOption,
  deviceSchema,
  jsonOption,
  modelOptions,
  modelSchema,
  oneOf,
  parseOptions,
  wholeNumber,
} from '../options.js';
import { formatBytes, formatDuration, formatFields } from '../ui/table.js';

const METHODS = RECIPES.map((recipe) => recipe.name);

const schema = z.object({
  ...modelSchema,
  out: z.string().min(1),
  method: oneOf(METHODS).optional(),
  bits: oneOf([2, 3, 4, 8]).optional(),
  groupSize: oneOf([32, 64, 128, -1]).optional(),
  krot: wholeNumber(0, 31),
  scales: z.boolean(),
  share: z.boolean().optional(),
  rounding: oneOf(['rtn', 'gptq']).optional(),
  sensitivity: z.boolean().default(false),
  steps: wholeNumber(0, 100_000),
  seed: wholeNumber(0),
  epochs: wholeNumber(1, 100_000).optional(),
  batch: wholeNumber(1, 100_000).optional(),
  validation: wholeNumber(1, 1_000_000).optional(),
  blockLoss: oneOf(['smooth-l1', 'mse']).optional(),
  beta: z.coerce.number().positive().optional(),
  transformRate: z.coerce.number().nonnegative().optional(),
  weightRate: z.coerce.number().nonnegative().optional(),
  gridRate: z.coerce.number().nonnegative().optional(),
  weightDecay: z.coerce.number().nonnegative().optional(),
  stages: oneOf(['both', 'transforms', 'weights']).optional(),
  pairs: oneOf(['random', 'magnitude', 'learned']).optional(),
  precision: oneOf(['f32', 'f16']).optional(),
  actBits: oneOf([4, 8, 16]).optional(),
  actClip: decimalNumber({ above: 0, max: 1 }).optional(),
  actGroupSize: oneOf([32, 64, 128, -1]).optional(),
  kvBits: oneOf([4, 8, 16]).optional(),
  rotate: z.boolean().optional(),
  smooth: oneOf(['none', 'down', 'all']).optional(),
  alpha: decimalNumber({ min: 0, max: 1 }).optional(),
  calib: z.array(z.string()).optional(),
  calibSamples: wholeNumber(1, 1_000_000).optional(),
  seqLen: wholeNumber(2, 1_000_000),
  threads: wholeNumber(1, 1024).optional(),
  ...deviceSchema,
  resume: z.boolean().default(false),
  dryRun: z.boolean().default(false),
});

/** The command. */
export function quantizeCommand(context: CommandContext): Command {
  const command = new Command('quantize')
    .description('quantize a model, block by block: memory for one block, resumable at any moment')
    .argument('<model>', 'folder or hub id')
    .requiredOption('--out <dir>', 'folder to write; must be new, empty, or of the same run')
    .option('--method <name>', `${METHODS.join(', ')} (default: paroquant, lowbit with --act-bits 4)`)
    .option('--bits <n>', '2, 3, 4 or 8 (default: 4, 8 with smoothquant)')
    .option(
      '--group-size <n>',
      'input channels per scale: 32, 64, 128, or -1 for one scale per output channel (default: 128, -1 with smoothquant, quarot, smoothrot)',
    )
    .option('--krot <n>', 'rotations per group (paroquant); 0 learns scales alone', '8')
    .option('--no-scales', 'learn no channel scales (paroquant)')
    .option('--share', 'one transform per linear group (the default of paroquant)')
    .option('--no-share', 'a transform for each linear (the default of paroquant-block)')
    .option('--rounding <how>', "rtn or gptq (default: the method's own)")
    .option(
      '--sensitivity',
      "weigh tokens and couple outputs by what the model's predictions feel of their errors (paroquant)",
    )
    .option('--steps <n>', 'optimiser steps per transform (paroquant)', '100')
    .option(
      '--act-bits <n>',
      "bits of the linears' inputs, rounded token by token: 4, 8 or 16 (default: the method's own)",
    )
    .option('--act-clip <x>', "share of the range that a grid of inputs keeps (default: the method's own)")
    .option(
      '--act-group-size <n>',
      "channels per grid of inputs: 32, 64, 128, or -1 per token (default: the method's own)",
    )
    .option('--kv-bits <n>', "bits of the key/value cache: 4, 8 or 16 (default: the method's own)")
    .option('--rotate', 'fold Hadamard rotations into the model first (quarot and smoothrot do)')
    .option('--no-rotate', 'no Hadamard rotations')
    .option(
      '--smooth <where>',
      "scale activation outliers into the weights: none, down or all (default: the method's own)",
    )
    .option(
      '--alpha <x>',
      'exponent of the smoothing scales, 0 to 1, by peaks (default: rule and exponent searched block by block)',
    )
    .option('--seed <n>', 'of everything random', '0')
    .option('--epochs <n>', `passes over the sequences per stage (paroquant-block; default: ${BLOCK_DEFAULTS.epochs})`)
    .option('--batch <n>', `sequences per optimiser step (paroquant-block; default: ${BLOCK_DEFAULTS.batch})`)
    .option('--validation <n>', 'sequences held out to choose the epoch by, at most an eighth (paroquant-block)')
    .option('--block-loss <name>', 'smooth-l1 or mse, on the output of a block (paroquant-block)')
    .option('--beta <x>', `where smooth-l1 turns linear (paroquant-block; default: ${BLOCK_DEFAULTS.beta})`)
    .option(
      '--transform-rate <x>',
      `learning rate of stage 1 (paroquant-block; default: ${BLOCK_DEFAULTS.transformRate})`,
    )
    .option('--weight-rate <x>', `of weights in stage 2 (paroquant-block; default: ${BLOCK_DEFAULTS.weightRate})`)
    .option(
      '--grid-rate <x>',
      `of scales and zero points in stage 2 (paroquant-block; default: ${BLOCK_DEFAULTS.gridRate})`,
    )
    .option('--weight-decay <x>', `of AdamW (paroquant-block; default: ${BLOCK_DEFAULTS.weightDecay})`)
    .option('--stages <which>', 'both, transforms or weights (paroquant-block)')
    .option('--pairs <how>', 'random, magnitude or learned choice of what rotations pair (paroquant-block)')
    .option(
      '--precision <p>',
      'f32 or f16, of products while blocks are trained: f16 is faster on GPUs with matrix units (default: f32)',
    )
    .option(
      '--calib <files...>',
      '.txt or .jsonl with "text"; without it the model calibrates on text it writes itself',
    )
    .option(
      '--calib-samples <n>',
      `calibration sequences (default: ${CALIBRATION_SEQUENCES.webgpu} on a GPU, ${LARGE_CALIBRATION_SEQUENCES} there for blocks of 8B models and above, ${CALIBRATION_SEQUENCES.cpu} on the CPU)`,
    )
    .option('--seq-len <n>', 'tokens per calibration sequence', '512')
    .option('--threads <n>', 'CPU threads (default: all cores); the result does not depend on it')
    .option('--resume', 'go on with a run that was stopped')
    .option('--dry-run', 'print the plan and stop');
  for (const option of [deviceOption(), ...modelOptions(), jsonOption()]) command.addOption(option);
  return command
    .addHelpText(
      'after',
      `
Examples:
  $ gyre quantize Qwen/Qwen3-0.6B --out qwen3-w4
  $ gyre quantize Qwen/Qwen3-0.6B --out qwen3-w4 --calib book.txt chats.jsonl --calib-samples 128
  $ gyre quantize ./my-model --out my-model-w3 --bits 3 --group-size 64
  $ gyre quantize ./my-model --out my-model-awq --method awq --dry-run
  $ gyre quantize ./my-model --out my-model-w4a4 --act-bits 4
  $ gyre quantize ./my-model --out my-model-w4a8 --act-bits 8 --kv-bits 8
  $ gyre quantize ./my-model --out my-model-w4 --resume    # after Ctrl-C or a power cut

Methods:
${RECIPES.map(({ name, summary }) => `  ${name.padEnd(11)} ${summary}`).join('\n')}`,
    )
    .action(async (model: string, raw: unknown) => {
      const options = parseOptions(schema, raw);
      const { print, progress, signal } = context;
      // Loaded when asked for: help and wrong command lines stay quick.
      const { quantizeCheckpoint } = await import('../../quantize.node.js');
      // A dry run needs it too: how much is calibrated on depends on the device.
      const { name: device } = await withModel(context, model, options, (source) =>
        pickDevice(context, source, options),
      );
      const { epochs, batch, validation, blockLoss, beta, stages, pairs, precision, ...shared } = options;
      const { transformRate, weightRate, gridRate, weightDecay, ...common } = shared;
      const rates = { transformRate, weightRate, gridRate, weightDecay };
      const report = await quantizeCheckpoint({
        model,
        ...common,
        device,
        block: { epochs, batch, validation, loss: blockLoss, beta, stages, pairs, precision, ...rates },
        signal,
        onProgress: progress.listener,
        onPlan: (plan) => {
          for (const line of plan.lines) {
            if (options.dryRun) print(line);
            else progress.note(line);
          }
          if (options.dryRun) context.result({ plan, version: VERSION });
        },
      });
      progress.clear();
      if (options.dryRun) return;
      const { record, ...rest } = report;
      context.result({ ...record, ...rest, version: VERSION });
      print(summary(model, report, context));
    });
}

const BREAKDOWN: Readonly<Record<keyof QuantizeReport['breakdown'], string>> = {
  calibrationText: 'calibration text',
  forward: 'forward passes',
  statistics: 'statistics',
  quantize: 'quantizing',
  write: 'writing',
};

function summary(model: string, report: QuantizeReport, { colors }: CommandContext): string {
  const times = Object.entries(report.breakdown)
    .filter(([, seconds]) => seconds > 0)
    .map(([what, seconds]) => `${BREAKDOWN[what as keyof QuantizeReport['breakdown']]} ${formatDuration(seconds)}`)
    .join(', ');
  if (report.skipped) return `${report.out} is finished already: an equal run made it. Nothing was done.`;
  const fields: [string, string][] = [
    [
      'method',
      `${report.method}, ${report.bits} bits, ${report.groupSize === -1 ? 'per channel' : `groups of ${report.groupSize}`}`,
    ],
    ['bits per weight', report.bitsPerWeight.toFixed(3)],
    ['linears', formatBytes(report.linearBytes)],
    ['calibration', report.calibration],
    ['time', `${formatDuration(report.seconds)} (${times})`],
    ['output', report.out],
  ];
  return `${formatFields(fields)}

${colors.dim('Next:')}
  gyre eval ${report.out} --text <file> --reference ${model}
  gyre generate ${report.out} --prompt "Once upon a time"`;
}
