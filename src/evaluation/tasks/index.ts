// Synthetic chain-of-thought tasks with checkable answers: what the bundled model trains on and is judged by.

import type { Rng } from '../../core/rng.js';
import { addition } from './addition.js';
import { extractAnswer } from './format.js';
import { modular } from './modular.js';
import { multiplication } from './multiplication.js';
import { sorting } from './sorting.js';
import type { TaskKind, TaskSample } from './types.js';
import { wordSums } from './word-sums.js';

export { extractAnswer, formatPrompt, formatTask } from './format.js';
export type { TaskBody, TaskKind, TaskSample } from './types.js';

/** Every task kind. A new kind is a file beside this one and an entry here. */
export const TASK_KINDS: readonly TaskKind[] = [addition, multiplication, modular, sorting, wordSums];

/** What `sampleTask` leaves to chance unless told. */
export interface SampleOptions {
  /** Name of the kind; one of `TASK_KINDS` at random by default. */
  readonly kind?: string;
  /** Difficulty inside the kind's range; uniform over it by default. */
  readonly difficulty?: number;
}

/** The kind with that name. Throws a RangeError that lists the names there are. */
export function taskKind(name: string): TaskKind {
  const found = TASK_KINDS.find((kind) => kind.name === name);
  if (found) return found;
  throw new RangeError(`unknown task kind '${name}'; there are ${TASK_KINDS.map((kind) => kind.name).join(', ')}`);
}

/** Draws one task. The same state of `rng` and the same options give the same task. */
export function sampleTask(rng: Rng, options: SampleOptions = {}): TaskSample {
  const kind = options.kind === undefined ? rng.pick(TASK_KINDS) : taskKind(options.kind);
  const { min, max } = kind.difficulties;
  const difficulty = options.difficulty ?? rng.int(min, max + 1);
  if (!Number.isInteger(difficulty) || difficulty < min || difficulty > max) {
    throw new RangeError(`difficulty of '${kind.name}' is a whole number from ${min} to ${max}, got ${difficulty}`);
  }
  return { kind: kind.name, difficulty, ...kind.generate(rng, difficulty) };
}

/**
 * So many tasks, the kinds in turn and the difficulties spread evenly over each kind's range, no question twice.
 * Throws when the kinds cannot give so many different questions.
 */
export function taskSet(rng: Rng, count: number): TaskSample[] {
  const samples: TaskSample[] = [];
  const seen = new Set<string>();
  for (let i = 0; i < count; i++) {
    const kind = TASK_KINDS[i % TASK_KINDS.length];
    const { min, max } = kind.difficulties;
    const difficulty = min + (Math.floor(i / TASK_KINDS.length) % (max - min + 1));
    samples.push(freshTask(rng, { kind: kind.name, difficulty }, seen));
  }
  return samples;
}

/** Whether the text a model wrote after the question (its steps included or not) ends in the right answer. */
export function isCorrect(sample: TaskSample, text: string): boolean {
  const answer = extractAnswer(text);
  return answer !== undefined && taskKind(sample.kind).check(sample, answer);
}

function freshTask(rng: Rng, options: SampleOptions, seen: Set<string>): TaskSample {
  for (let attempt = 0; attempt < 1000; attempt++) {
    const sample = sampleTask(rng, options);
    if (seen.has(sample.question)) continue;
    seen.add(sample.question);
    return sample;
  }
  throw new RangeError(`no further '${options.kind}' question of difficulty ${options.difficulty} was found`);
}
