// Long addition: two whole numbers of up to 12 digits, worked column by column.

import type { Rng } from '../../core/rng.js';
import { sameInteger } from './answers.js';
import { additionColumns, digitRange } from './columns.js';
import type { TaskBody, TaskKind } from './types.js';

const PHRASINGS: readonly ((a: number, b: number) => string)[] = [
  (a, b) => `What is ${a} + ${b}?`,
  (a, b) => `${a} + ${b} = ?`,
  (a, b) => `Add ${a} and ${b}.`,
  (a, b) => `What is the sum of ${a} and ${b}?`,
  (a, b) => `Compute ${a} + ${b}.`,
];

/** Adds two whole numbers; the longer one has as many digits as the difficulty says. */
export const addition: TaskKind = {
  name: 'addition',
  unit: 'digits',
  difficulties: { min: 1, max: 12 },
  generate(rng: Rng, difficulty: number): TaskBody {
    const otherDigits = rng.int(0, 3) === 0 ? rng.int(1, difficulty + 1) : difficulty;
    const longest = integerWithDigits(rng, difficulty);
    const other = integerWithDigits(rng, otherDigits);
    const [a, b] = rng.int(0, 2) === 0 ? [longest, other] : [other, longest];
    return {
      question: rng.pick(PHRASINGS)(a, b),
      steps: additionColumns(a, b),
      answer: String(a + b),
    };
  },
  check: sameInteger,
};

/** A whole number with so many digits; `int` spans at most 2^32, so long ones are drawn in two parts. */
function integerWithDigits(rng: Rng, digits: number): number {
  if (digits <= 9) return rng.int(...digitRange(digits));
  return rng.int(...digitRange(digits - 6)) * 10 ** 6 + rng.int(0, 10 ** 6);
}
