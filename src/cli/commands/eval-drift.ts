// The --drift part of gyre eval: runs the evaluation against the reference and formats it.
import { GyreError } from '../../core/errors.js';
import { evaluateDrift, type DriftEvaluation } from '../../evaluation/drift.js';
import { parseTasks } from '../../evaluation/index.js';
import type { Decoder } from '../../models/decoder.js';
import type { Tokenizer } from '../../tokenizer/index.js';
import { withDecoder, withModel, type CommandContext } from '../context.js';
import { formatFields, formatTable } from '../ui/table.js';

/** What --drift takes from the command line. */
export interface DriftCommandOptions {
  readonly reference?: string;
  readonly limit?: number;
  readonly maxTokens: number;
  readonly token?: string;
}

/** Follows the reference's chains on tasks given as the text of a .jsonl file. */
export async function onDrift(
  context: CommandContext,
  decoder: Decoder,
  tokenizer: Tokenizer,
  file: { readonly name: string; readonly text: string },
  options: DriftCommandOptions,
): Promise<DriftEvaluation> {
  const { reference, limit, maxTokens, token } = options;
  if (reference === undefined)
    throw new GyreError('usage', '--drift follows the chains of a reference, and none was given', {
      remedy: 'add --reference <model>, the unquantized one',
    });
  const tasks = parseTasks(file.text, file.name).slice(0, limit);
  return withModel(context, reference, { token }, (source) =>
    withDecoder(context, decoder.backend, source, (original) =>
      evaluateDrift(decoder, original, tokenizer, tasks, {
        maxTokens,
        onProgress: context.progress.listener,
        signal: context.signal,
      }),
    ),
  );
}

const percent = (part: number, of: number): string => (of === 0 ? '–' : `${((100 * part) / of).toFixed(1)} %`);
const range = ({ from, to }: { from: number; to: number | null }): string =>
  to === null ? `${from}…` : `${from}–${to - 1}`;

/** The result for people. */
export function driftReport(drift: DriftEvaluation): string {
  const { tasks, departed } = drift;
  const fields: [string, string][] = [
    ['chains', `${tasks} by the reference, ${drift.chainTokens} tokens`],
    ['KL along them', `${drift.kl.toFixed(5)} nats per token, top-1 agreement ${percent(drift.top1Agreement, 1)}`],
    [
      'own chains',
      `${percent(departed, tasks)} depart${drift.medianDeparture === null ? '' : `, half of them before token ${drift.medianDeparture + 1}`}`,
    ],
    [
      'final answer',
      `the reference's in ${percent(drift.sameAnswer, tasks)}, after a departure in ${percent(drift.sameAnswerAfterDeparture, departed)}; right ${percent(drift.correct, tasks)} (reference ${percent(drift.referenceCorrect, tasks)})`,
    ],
  ];
  const right = (title: string) => ({ title, align: 'right' as const });
  const positions = formatTable(
    [{ title: 'position' }, right('tokens'), right('KL'), right('agreement')],
    drift.byPosition.map((p) => [range(p), String(p.tokens), p.kl.toFixed(5), percent(p.top1Agreement, 1)]),
  );
  const lengths = formatTable(
    [{ title: 'chain length' }, right('tasks'), right('departed'), right('same answer'), right('right')],
    drift.byLength.map((l) => [
      range(l),
      String(l.tasks),
      percent(l.departed, l.tasks),
      percent(l.sameAnswer, l.tasks),
      percent(l.correct, l.tasks),
    ]),
  );
  return `${formatFields(fields)}\n\n${positions}\n\n${lengths}`;
}
