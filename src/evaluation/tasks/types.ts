// The shapes shared by the task kinds: what a generated task is, and what a kind must provide.

import type { Rng } from '../../core/rng.js';

/** One generated task with its worked solution. */
export interface TaskSample {
  /** Name of the task kind that made it. */
  readonly kind: string;
  /** Size of the task: digits, numbers or operations, depending on the kind. */
  readonly difficulty: number;
  /** The question as a user would ask it. */
  readonly question: string;
  /** The worked solution, one line, steps separated by `;` and sections by `|`. */
  readonly steps: string;
  /** The canonical answer. */
  readonly answer: string;
}

/** What a kind generates; the table adds the kind's name and the difficulty. */
export type TaskBody = Pick<TaskSample, 'question' | 'steps' | 'answer'>;

/** A kind of task: a row of the table in `index.ts`. */
export interface TaskKind {
  /** Its name in samples and result files. */
  readonly name: string;
  /** What the difficulty counts, for help texts and reports. */
  readonly unit: string;
  /** The smallest and the largest difficulty that `generate` takes, both included. */
  readonly difficulties: { readonly min: number; readonly max: number };
  /** Makes one task. The same state of `rng` and the same difficulty give the same task. */
  generate(rng: Rng, difficulty: number): TaskBody;
  /** Whether `answer`, as a model wrote it, says the same as the sample's answer. */
  check(sample: TaskSample, answer: string): boolean;
}
