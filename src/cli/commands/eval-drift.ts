// The --drift part of gyre eval: runs the evaluation against the reference, makes its file and formats it.
import { readFile, stat } from 'node:fs/promises';
import path from 'node:path';
import { GyreError, ensure } from '../../core/errors.js';
import { evaluateDrift, parseTasks, type DriftEvaluation, type TaskSample } from '../../evaluation/index.js';
import { MAX_TEXT_BYTES } from '../../formats/source.js';
import { DRIFT_KIND, DRIFT_VERSION, type DriftResult } from '../../report/drift-schema.js';
import { loadTokenizer } from '../../tokenizer/index.js';
import { VERSION } from '../../version.js';
import type { EvalOptions } from '../eval-options.js';
import { withBackend, withDecoder, withModel, type CommandContext } from '../context.js';
import { describeModel } from '../result-files.js';
import { formatFields, formatTable } from '../ui/table.js';

/** Follows the reference's chains on tasks of a .jsonl file. Returns the file of the result, and the result for people. */
export async function measureDrift(
  context: CommandContext,
  model: string,
  file: string,
  options: EvalOptions,
): Promise<{ result: DriftResult; text: string }> {
  const { reference, limit, maxTokens, batchSize, token } = options;
  ensure(
    options.text === undefined && options.tasks === undefined,
    'usage',
    '--drift has a result file of its own kind, and goes with neither --text nor --tasks',
    'run gyre eval once for each',
  );
  if (reference === undefined)
    throw new GyreError('usage', '--drift follows the chains of a reference, and none was given', {
      remedy: 'add --reference <model>, the unquantized one',
    });
  // Read before any model is: a wrong path should cost nothing.
  const tasks = (await readTasks(file)).slice(0, limit);
  return withModel(context, model, options, (source) =>
    withModel(context, reference, { token }, (original) =>
      withBackend(context, source, options, async (backend) => {
        const tokenizer = await loadTokenizer(source.files);
        const drift = await withDecoder(
          context,
          backend,
          source,
          (decoder) =>
            withDecoder(context, backend, original, (theirs) =>
              evaluateDrift(decoder, theirs, tokenizer, tasks, {
                maxTokens,
                batchSize,
                onProgress: context.progress.listener,
                signal: context.signal,
              }),
            ),
          options,
        );
        ensure(drift.byPosition.length > 0, 'usage', 'the reference answers every task with nothing at once');
        const [own, theirs] = [await describeModel(source), await describeModel(original)];
        const count = limit === undefined ? '' : `, the first ${tasks.length}`;
        const result: DriftResult = {
          kind: DRIFT_KIND,
          schemaVersion: DRIFT_VERSION,
          version: VERSION,
          model: { name: own.name, fingerprint: own.fingerprint },
          reference: { name: theirs.name, fingerprint: theirs.fingerprint },
          text: `the original's answers to ${path.basename(file)}${count}`,
          chains: tasks.length,
          positions: [...drift.byPosition],
          kl: drift.kl,
          top1Agreement: drift.top1Agreement,
          freeRunning: freeRunning(drift),
        };
        return { result, text: driftReport(drift) };
      }),
    ),
  );
}

async function readTasks(file: string): Promise<TaskSample[]> {
  const info = await stat(file).catch(() => undefined);
  if (!info?.isFile())
    throw new GyreError('file-missing', `--drift: ${file} is not a file`, {
      remedy: 'name tasks as .jsonl, e.g. models/gyre-14m/eval/tasks.jsonl',
    });
  ensure(
    info.size <= MAX_TEXT_BYTES,
    'limit-exceeded',
    () => `${file} has ${info.size} bytes, the limit is ${MAX_TEXT_BYTES}`,
  );
  return parseTasks(await readFile(file, 'utf8'), file);
}

function freeRunning(drift: DriftEvaluation): NonNullable<DriftResult['freeRunning']> {
  const { tasks, departed, medianDeparture, sameAnswer, sameAnswerAfterDeparture, correct, referenceCorrect } = drift;
  return {
    tasks,
    departed,
    medianDeparture,
    sameAnswer,
    sameAnswerAfterDeparture,
    correct,
    referenceCorrect,
    byLength: [...drift.byLength],
    outcomes: [...drift.outcomes],
  };
}

const percent = (part: number, of: number): string => (of === 0 ? '–' : `${((100 * part) / of).toFixed(1)} %`);
const range = ({ from, to }: { from: number; to: number | null }): string =>
  to === null ? `${from}…` : `${from}–${to - 1}`;

/** The result for people. */
function driftReport(drift: DriftEvaluation): string {
  const { tasks, departed } = drift;
  const fields: [string, string][] = [
    ['chains', `${tasks} by the reference, ${drift.chainTokens} tokens`],
    [
      'KL along them',
      `${drift.kl.value.toFixed(5)} nats per token, top-1 agreement ${percent(drift.top1Agreement.value, 1)}`,
    ],
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
    drift.byPosition.map((p) => [range(p), String(p.tokens), p.kl.value.toFixed(5), percent(p.top1Agreement.value, 1)]),
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
