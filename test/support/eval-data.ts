// Real evaluation sets, where this machine has them beside the repository: three of them come as one text per question and
// are taken apart into the schemas they are published in. Nothing of theirs is in the repository.
import { existsSync, readFileSync } from 'node:fs';
import path from 'node:path';

/** The folder of evaluation sets, or undefined. */
export const evalFolder: string | undefined = [path.join(import.meta.dirname, '../../../shared/data/eval')].find(
  (folder) => existsSync(folder),
);

type Entry = Readonly<{ instruction: string; answer: string }>;
type Row = Record<string, unknown>;

const after = (text: string, prefix: string): string => (text.startsWith(prefix) ? text.slice(prefix.length) : text);

function arcRow({ instruction, answer }: Entry, index: number): Row {
  const [, question, rest] =
    /^Please choose the correct answer to the question: ([^]*)\n\nAnswer1: ([^]*)\n\nAnswer format: [^\n]*$/.exec(
      instruction,
    ) ?? [];
  const text = rest.split(/ Answer[2-9]: /);
  const label = text.map((_, i) => String(i + 1));
  return { id: String(index), question, choices: { text, label }, answerKey: after(answer, 'answer') };
}

function piqaRow({ instruction, answer }: Entry): Row {
  const [, goal, sol1, sol2] =
    /^Please choose the correct solution to the question: ([^]*)\n\nSolution1: ([^]*)\n\nSolution2: ([^]*)\n\nAnswer format: [^\n]*$/.exec(
      instruction,
    ) ?? [];
  return { goal, sol1, sol2, label: Number(after(answer, 'solution')) - 1 };
}

function winograndeRow({ instruction, answer }: Entry): Row {
  const [, sentence, option1, option2] =
    /^Please choose the correct answer to fill in the blank to complete the given sentence: ([^]*)\n\nOption1: ([^]*) Option2: ([^]*) Answer format: [^]*$/.exec(
      instruction,
    ) ?? [];
  return { sentence, option1, option2, answer: after(answer, 'option') };
}

const SETS = {
  arc_challenge: ['ARC-Challenge_test.json', arcRow],
  piqa: ['piqa_test.json', piqaRow],
  winogrande: ['winogrande_test.json', winograndeRow],
} as const;

/** Names of the sets that {@link choiceRows} gives. */
export type ChoiceSet = keyof typeof SETS;

/** Rows of a multiple-choice set in its published schema. */
export function choiceRows(folder: string, set: ChoiceSet): Row[] {
  const [file, toRow] = SETS[set];
  const entries = JSON.parse(readFileSync(path.join(folder, 'commonsense', file), 'utf8')) as Entry[];
  return entries.map((entry, i) => toRow(entry, i));
}
