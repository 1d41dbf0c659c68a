// gyre stress: a copy of a model with massive activations planted, for studying quantization. Synthetic by design.
import { Command } from 'commander';
import { z } from 'zod';
import { VERSION } from '../../version.js';
import { type CommandContext } from '../context.js';
import { decimalNumber, jsonOption, modelOptions, modelSchema, oneOf, parseOptions, wholeNumber } from '../options.js';
import { formatTable } from '../ui/table.js';

const schema = z.object({
  ...modelSchema,
  out: z.string().min(1),
  magnitude: decimalNumber({ above: 1, max: 100_000 }),
  tokens: oneOf(['all', 'few']),
  channels: wholeNumber(1, 4096),
  blocks: z
    .string()
    .regex(/^(every|\d+(,\d+)*)$/, { error: 'expected block numbers such as 1,7, or every' })
    .transform((text) => (text === 'every' ? text : text.split(',').map(Number)))
    .optional(),
  calib: z.array(z.string()).optional(),
  seed: wholeNumber(0),
  threads: wholeNumber(1, 1024).optional(),
});

/** The command. */
export function stressCommand(context: CommandContext): Command {
  const command = new Command('stress')
    .description(
      'copy a model with massive activations planted, its function unchanged (synthetic, for studying quantization)',
    )
    .argument('<model>', 'folder or hub id')
    .requiredOption('--out <dir>', 'folder to write')
    .option('--magnitude <x>', "peak of a planted channel, times the block's typical channel", '500')
    .option('--tokens <which>', 'all: on every token; few: on the first token, full stops and line breaks', 'all')
    .option('--channels <n>', "channels per block, of the down projection's input", '2')
    .option(
      '--blocks <list>',
      'blocks to plant in, such as 1,7, or every, which with few tokens means all that tell them apart (default: the second and the last; with few tokens the best of either half)',
    )
    .option('--calib <files...>', 'texts on which channels are measured; without, the model writes its own')
    .option('--seed <n>', 'of everything random', '0')
    .option('--threads <n>', 'CPU threads (default: all cores)');
  for (const option of [...modelOptions(), jsonOption()]) command.addOption(option);
  return command
    .addHelpText(
      'after',
      `
Examples:
  $ gyre stress models/gyre-14m --out stressed --magnitude 1000 --tokens few

all: row j of up_proj is multiplied by c and column j of down_proj divided by it. Smoothing can undo that exactly.
few: the MLP gets pairs of channels whose columns in down_proj cancel and whose gates fire on those tokens alone; refused
where a block's inputs do not tell them from other tokens.
Either way the logits stay and the activations between grow. Numbers measured on such a model are synthetic.`,
    )
    .action(async (model: string, raw: unknown) => {
      const options = parseOptions(schema, raw);
      const { stressCheckpoint, SYNTHETIC } = await import('../../stress.node.js');
      const report = await stressCheckpoint({
        model,
        ...options,
        signal: context.signal,
        onProgress: context.progress.listener,
      });
      context.progress.clear();
      context.print(
        formatTable(
          [
            { title: 'block', align: 'right' },
            { title: 'channel', align: 'right' },
            { title: 'factor', align: 'right' },
            { title: 'peak', align: 'right' },
            { title: 'tokens', align: 'right' },
          ],
          report.planted.map((p) => [
            String(p.layer),
            String(p.channel),
            p.factor.toFixed(1),
            p.peak.toFixed(1),
            `${(100 * p.share).toFixed(2)}%`,
          ]),
        ),
      );
      for (const { layer, missed, marked, mistaken, others } of report.separations)
        context.print(
          `block ${layer}: misses ${missed} of ${marked} such tokens, mistakes ${mistaken} of ${others} others`,
        );
      context.print(`\n${report.out} (${SYNTHETIC})`);
      context.result({ ...report, note: SYNTHETIC, version: VERSION });
    });
}
