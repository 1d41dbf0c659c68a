// Word sums: a short story in plain English in which somebody gains, loses and multiplies some things.

import type { Rng } from '../../core/rng.js';
import { sameInteger } from './answers.js';
import type { TaskBody, TaskKind } from './types.js';

const NAMES = ['Ann', 'Bob', 'Cora', 'Dan', 'Eve', 'Fay', 'Gus', 'Hal', 'Ivy', 'Jon'] as const;
const THINGS = ['apples', 'books', 'coins', 'eggs', 'marbles', 'nuts', 'shells', 'stamps'] as const;

/** Above this a multiplication would make numbers too long for a one-line step. */
const LARGEST_MULTIPLICAND = 400;

interface Scene {
  readonly owner: string;
  readonly other: string;
  readonly things: string;
}

interface Turn {
  readonly sentence: string;
  readonly sign: '+' | '-' | '*';
  readonly operand: number;
}

const GAINS: readonly ((scene: Scene, count: number) => string)[] = [
  ({ owner, other }, count) => `${other} gives ${owner} ${count} more.`,
  ({ owner, things }, count) => `${owner} finds ${count} ${things}.`,
  ({ owner, things }, count) => `Then ${owner} buys ${count} more ${things}.`,
];

const LOSSES: readonly ((scene: Scene, count: number) => string)[] = [
  ({ owner }, count) => `${owner} loses ${count}.`,
  ({ owner, other, things }, count) => `${owner} gives ${count} ${things} to ${other}.`,
  ({ owner }, count) => `Then ${owner} sells ${count} of them.`,
];

const MULTIPLES: readonly ((scene: Scene, count: number) => string)[] = [
  ({ owner, things }, count) => `Then the number of ${things} that ${owner} has grows ${count} times as large.`,
  ({ owner }, count) => `By trading, ${owner} ends up with ${count} times as many.`,
];

const ENDINGS: readonly ((scene: Scene) => string)[] = [
  ({ owner, things }) => `How many ${things} does ${owner} have now?`,
  ({ owner, things }) => `How many ${things} does ${owner} have in the end?`,
];

/** Tells a story with as many turns as the difficulty says and asks what is left. */
export const wordSums: TaskKind = {
  name: 'word-sums',
  unit: 'turns',
  difficulties: { min: 1, max: 8 },
  generate(rng: Rng, difficulty: number): TaskBody {
    const [owner, other] = rng.shuffle([...NAMES]) as [string, string];
    const scene: Scene = { owner, other, things: rng.pick(THINGS) };
    let value = rng.int(5, 90);
    const sentences = [`${owner} has ${value} ${scene.things}.`];
    const steps: string[] = [];
    for (let i = 0; i < difficulty; i++) {
      const { sentence, sign, operand } = turn(rng, scene, value);
      const result = sign === '+' ? value + operand : sign === '-' ? value - operand : value * operand;
      sentences.push(sentence);
      steps.push(`${value}${sign}${operand}=${result}`);
      value = result;
    }
    sentences.push(rng.pick(ENDINGS)(scene));
    return { question: sentences.join(' '), steps: steps.join(';'), answer: String(value) };
  },
  check: sameInteger,
};

function turn(rng: Rng, scene: Scene, value: number): Turn {
  const sign = rng.pick(['+', '+', '-', '*'] as const);
  if (sign === '-' && value > 3) {
    const operand = rng.int(2, value);
    return { sentence: rng.pick(LOSSES)(scene, operand), sign, operand };
  }
  if (sign === '*' && value <= LARGEST_MULTIPLICAND) {
    const operand = rng.int(2, 6);
    return { sentence: rng.pick(MULTIPLES)(scene, operand), sign, operand };
  }
  const operand = rng.int(2, 60);
  return { sentence: rng.pick(GAINS)(scene, operand), sign: '+', operand };
}
