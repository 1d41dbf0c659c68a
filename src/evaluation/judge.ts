// Judges of written answers, by name as task files give them: where the answer is found and when it is right.
import { equivalent } from './answers/equivalence.js';
import { extractLetter, extractMath } from './answers/extract.js';
import type { GenerationTask } from './definition.js';
import type { GenerationItem } from './items.js';
import { extractAnswer } from './tasks/index.js';

/** A judged text. */
export interface Verdict {
  /** The answer found; null when there is none. */
  readonly answer: string | null;
  readonly correct: boolean;
}

type Judge = (text: string, item: Pick<GenerationItem, 'answer' | 'letters'>) => Verdict;

const verdict = (answer: string | undefined, right: (answer: string) => boolean): Verdict =>
  answer === undefined ? { answer: null, correct: false } : { answer, correct: right(answer) };

const JUDGES: Readonly<Record<GenerationTask['judge'], Judge>> = {
  /** Mathematical equivalence of the boxed or announced answer. */
  math: (text, item) => verdict(extractMath(text), (answer) => equivalent(item.answer, answer)),
  /** The same, and the answer must be a whole number. */
  integer: (text, item) =>
    verdict(
      extractMath(text),
      (answer) => /^\s*\$?\s*0*\d/.test(answer) && equivalent(item.answer.replace(/^0+(?=\d)/, ''), answer),
    ),
  /** The letter of a choice. */
  letter: (text, item) => verdict(extractLetter(text, item.letters), (answer) => answer === item.answer),
  /** The bundled chains: what follows the thinking, whole numbers and lists of them. */
  chain: (text, item) =>
    verdict(
      extractAnswer(text),
      (answer) =>
        answer
          .trim()
          .replace(/\.$/, '')
          .replaceAll(/\s*,\s*/g, ',') === item.answer,
    ),
};

/** Judges a text by a task's judge. */
export function judgeText(
  judge: GenerationTask['judge'],
  text: string,
  item: Pick<GenerationItem, 'answer' | 'letters'>,
): Verdict {
  return JUDGES[judge](text, item);
}
