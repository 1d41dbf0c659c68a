// gyre compare: result files against the first of them, item by item.
import { readFile } from 'node:fs/promises';
import path from 'node:path';
import { Command } from 'commander';
import { z } from 'zod';
import { GyreError } from '../../core/errors.js';
import {
  compareResults,
  parseResult,
  type Comparison,
  type EvaluationResult,
  type Metric,
} from '../../evaluation/index.js';
import type { CommandContext } from '../context.js';
import { jsonOption, parseOptions, wholeNumber } from '../options.js';
import { formatValue } from '../ui/metrics.js';
import { formatTable } from '../ui/table.js';

const schema = z.object({ seed: wholeNumber(0) });

/** The command. */
export function compareCommand(context: CommandContext): Command {
  return new Command('compare')
    .description('compare results of gyre eval: differences that are real, by paired bootstrap')
    .argument('<results...>', 'files that `gyre eval --out` wrote; the first is what the others are compared with')
    .option('--seed <n>', 'of the bootstrap', '0')
    .addOption(jsonOption())
    .addHelpText(
      'after',
      `
Examples:
  $ gyre compare fp16.json w4.json w3.json

Items are paired by name and content, and drawn together with replacement 10,000 times. A difference is called better
or worse only when its 95% interval leaves 0 out.`,
    )
    .action(async (files: string[], raw: unknown) => {
      const { seed } = parseOptions(schema, raw);
      const results: { name: string; result: EvaluationResult }[] = [];
      for (const file of files) {
        const text = await readFile(file, 'utf8').catch((cause: unknown) => {
          throw new GyreError('file-missing', `can't read ${file}: ${cause instanceof Error ? cause.message : ''}`, {
            remedy: 'Check the path.',
            cause,
          });
        });
        results.push({ name: path.basename(file), result: parseResult(text, file) });
      }
      const comparisons = compareResults(results, seed);
      context.result({ comparisons });
      const units = new Map(
        results[0].result.evaluations.flatMap((e) =>
          Object.entries(e.metrics).map(([name, { unit }]) => [`${e.name} ${name}`, unit] as const),
        ),
      );
      context.print(comparisons.map((comparison) => report(comparison, units)).join('\n\n'));
    });
}

function report({ first, second, metrics, missing }: Comparison, units: ReadonlyMap<string, Metric['unit']>): string {
  const rows = metrics.map(({ task, metric, first, second, difference, unpaired, verdict }) => {
    const unit = units.get(`${task} ${metric}`) ?? null;
    const signed = (value: number): string => (value >= 0 ? '+' : '') + formatValue(value, unit);
    const shown = difference
      ? `${signed(difference.difference)} [${signed(difference.low)}, ${signed(difference.high)}]`
      : (unpaired ?? '');
    return [
      task,
      metric,
      formatValue(first, unit),
      formatValue(second, unit),
      shown,
      difference ? String(difference.n) : '',
      verdict,
    ];
  });
  const table = formatTable(
    [
      { title: 'task' },
      { title: 'metric' },
      { title: first, align: 'right' },
      { title: second, align: 'right' },
      { title: 'difference [95% interval]' },
      { title: 'items', align: 'right' },
      { title: '' },
    ],
    rows,
  );
  return missing.length > 0 ? `${table}\nOnly in one of them: ${missing.join(', ')}` : table;
}
