// Sorting: up to 10 numbers put in order by taking the smallest (or largest) of the rest again and again.

import type { Rng } from '../../core/rng.js';
import { sameIntegerList } from './answers.js';
import type { TaskBody, TaskKind } from './types.js';

const ASCENDING: readonly ((list: string) => string)[] = [
  (list) => `Sort ${list}.`,
  (list) => `Sort these numbers: ${list}.`,
  (list) => `Put ${list} in order, smallest first.`,
];

const DESCENDING: readonly ((list: string) => string)[] = [
  (list) => `Sort ${list} from largest to smallest.`,
  (list) => `Put ${list} in order, largest first.`,
];

/** Sorts as many numbers below 100 as the difficulty says; one task in four asks for descending order. */
export const sorting: TaskKind = {
  name: 'sorting',
  unit: 'numbers',
  difficulties: { min: 2, max: 10 },
  generate(rng: Rng, difficulty: number): TaskBody {
    const numbers = Array.from({ length: difficulty }, () => rng.int(0, 100));
    const descending = rng.int(0, 4) === 0;
    const rest = [...numbers];
    const sorted: number[] = [];
    const steps: string[] = [];
    while (rest.length > 0) {
      const next = descending ? Math.max(...rest) : Math.min(...rest);
      rest.splice(rest.indexOf(next), 1);
      sorted.push(next);
      steps.push(`${next}[${rest.join(',')}]`);
    }
    const phrase = rng.pick(descending ? DESCENDING : ASCENDING);
    return { question: phrase(numbers.join(', ')), steps: steps.join(';'), answer: sorted.join(',') };
  },
  check: sameIntegerList,
};
