// Long multiplication: a number of up to 5 digits times one or two digits, by partial products and their sum.

import type { Rng } from '../../core/rng.js';
import { sameInteger } from './answers.js';
import { additionColumns, digitRange, multiplicationColumns } from './columns.js';
import type { TaskBody, TaskKind } from './types.js';

const PHRASINGS: readonly ((a: number, b: number) => string)[] = [
  (a, b) => `What is ${a} * ${b}?`,
  (a, b) => `${a} * ${b} = ?`,
  (a, b) => `Multiply ${a} by ${b}.`,
  (a, b) => `What is ${a} times ${b}?`,
  (a, b) => `Compute ${a} * ${b}.`,
];

/** Multiplies a number with as many digits as the difficulty says by a number from 2 to 99. */
export const multiplication: TaskKind = {
  name: 'multiplication',
  unit: 'digits',
  difficulties: { min: 1, max: 5 },
  generate(rng: Rng, difficulty: number): TaskBody {
    const a = rng.int(...digitRange(difficulty));
    const b = rng.int(0, 4) === 0 ? rng.int(2, 10) : rng.int(10, 100);
    return { question: rng.pick(PHRASINGS)(a, b), steps: workedProduct(a, b), answer: String(a * b) };
  },
  check: sameInteger,
};

function workedProduct(a: number, b: number): string {
  const units = b % 10;
  const tens = Math.floor(b / 10);
  const byUnits = `${multiplicationColumns(a, units)};${a}*${units}=${a * units}`;
  if (tens === 0) return byUnits;
  const byTens = `${multiplicationColumns(a, tens)};${a}*${tens}=${a * tens}`;
  const shifted = a * tens * 10;
  const sum = `${additionColumns(a * units, shifted)};${a * units}+${shifted}=${a * b}`;
  return `${byUnits}|${byTens}|${sum}`;
}
