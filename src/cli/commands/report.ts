// gyre report: result files in, one HTML page out, and its charts as pictures.
import { Command } from 'commander';
import { z } from 'zod';
import { INPUT_KINDS } from '../../report/inputs.js';
import { VERSION } from '../../version.js';
import { type CommandContext } from '../context.js';
import { jsonOption, parseOptions } from '../options.js';
import { formatBytes } from '../ui/table.js';

const schema = z.object({
  out: z.string().min(1),
  title: z.string().min(1).optional(),
  svg: z.string().min(1).optional(),
  png: z.string().min(1).optional(),
});

/** The command. */
export function reportCommand(context: CommandContext): Command {
  const command = new Command('report')
    .description(
      'make one self-contained HTML page of result files: size against quality, tasks, layers, ranges, speed',
    )
    .argument('<results...>', 'result .json files, or folders: every result in them and one level below')
    .option('--out <file>', 'page to write', 'report.html')
    .option('--title <text>', 'title of the page (default: the model and its widths)')
    .option('--svg <dir>', 'also write each chart as an SVG file that follows the reader\u2019s theme')
    .option('--png <dir>', 'also write each chart as a PNG file; needs Chromium or Chrome (CHROMIUM_PATH)');
  command.addOption(jsonOption());
  return command
    .addHelpText(
      'after',
      `
Examples:
  $ gyre eval qwen3-w4 --text book.txt --reference Qwen/Qwen3-0.6B --json > results/w4.json
  $ gyre report results qwen3-w4 --out qwen3.html
  $ gyre report out/demo --out demo.html --svg charts --title "Four methods at 4 bits"

Results it reads:
${Object.values(INPUT_KINDS)
  .map((made) => `  ${made.replaceAll('`', '')}`)
  .join('\n')}

Sections without data are left out. The page has no scripts and loads nothing; docs/report.md explains every chart.`,
    )
    .action(async (results: string[], raw: unknown) => {
      const options = parseOptions(schema, raw);
      // Loaded when asked for: the plotting library takes a moment.
      const { findInputs, writeReport } = await import('../../report.node.js');
      const inputs = await findInputs(results);
      const written = await writeReport(inputs, { ...options, madeBy: `gyre ${VERSION}` });
      context.result({ ...written, version: VERSION });
      context.print(
        `${written.out}: ${formatBytes(written.bytes)}, ${written.charts.length} charts from ${inputs.length} results (${written.sections.join(', ')})`,
      );
      for (const [what, folder] of [
        ['SVG', options.svg],
        ['PNG', options.png],
      ] as const)
        if (folder !== undefined) context.print(`${what} files of the charts: ${folder}`);
    });
}
