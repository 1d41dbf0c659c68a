// Modular traces: a number carried through additions, subtractions and multiplications modulo a prime.

import type { Rng } from '../../core/rng.js';
import { sameInteger } from './answers.js';
import type { TaskBody, TaskKind } from './types.js';

const MODULI = [7, 13, 23, 37, 53, 71, 89, 97] as const;

interface Operation {
  readonly sign: '+' | '-' | '*';
  readonly operand: number;
}

const WORDS = { '+': 'add', '-': 'subtract', '*': 'multiply by' } as const;

const PHRASINGS: readonly ((start: number, operations: readonly Operation[], modulus: number) => string)[] = [
  (start, operations, modulus) =>
    `Start with ${start}, then ${inWords(operations)}. What is the result modulo ${modulus}?`,
  (start, operations, modulus) => `Working modulo ${modulus}, start with ${start} and ${inWords(operations)}.`,
  (start, operations, modulus) => `x = ${start}; ${inSigns(operations)}. What is x mod ${modulus}?`,
];

/** Carries a number through as many operations as the difficulty says, reducing after each. */
export const modular: TaskKind = {
  name: 'modular',
  unit: 'operations',
  difficulties: { min: 1, max: 12 },
  generate(rng: Rng, difficulty: number): TaskBody {
    const modulus = rng.pick(MODULI);
    const start = rng.int(0, modulus);
    const operations: Operation[] = [];
    const steps: string[] = [];
    let value = start;
    for (let i = 0; i < difficulty; i++) {
      const sign = rng.pick(['+', '-', '*'] as const);
      const operand = rng.int(2, sign === '*' ? Math.min(modulus, 10) : modulus);
      operations.push({ sign, operand });
      const result = apply(value, sign, operand);
      steps.push(`${value}${sign}${operand}=${result}`);
      value = ((result % modulus) + modulus) % modulus;
      if (result < 0) steps.push(`${result}+${modulus}=${value}`);
      else if (result >= modulus) steps.push(`${result}-${result - value}=${value}`);
    }
    return { question: rng.pick(PHRASINGS)(start, operations, modulus), steps: steps.join(';'), answer: String(value) };
  },
  check: sameInteger,
};

function apply(value: number, sign: Operation['sign'], operand: number): number {
  if (sign === '+') return value + operand;
  return sign === '-' ? value - operand : value * operand;
}

function inWords(operations: readonly Operation[]): string {
  return operations.map(({ sign, operand }) => `${WORDS[sign]} ${operand}`).join(', ');
}

function inSigns(operations: readonly Operation[]): string {
  return operations.map(({ sign, operand }) => `x ${sign}= ${operand}`).join('; ');
}
