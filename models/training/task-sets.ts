// The two task sets of the bundled model: the evaluation tasks, and training tasks that share no question with them.

import { createRng } from '../../src/core/rng.js';
import { formatTask, sampleTask, taskSet } from '../../src/evaluation/tasks/index.js';
import type { TaskSample } from '../../src/evaluation/tasks/index.js';

const SEED = 20261122;
const EVALUATION_COUNT = 600;

/** The evaluation tasks as JSON lines; always the same bytes. */
export function evaluationTasks(): string {
  return evaluationSet().map((sample) => `${JSON.stringify(sample)}\n`).join('');
}

/** Training documents without end, none of whose questions is among the evaluation tasks. */
export function* trainingDocuments(): Generator<string, never> {
  const rng = createRng(SEED).fork('training');
  const heldOut = new Set(evaluationSet().map(({ question }) => question));
  for (;;) {
    const sample = sampleTask(rng);
    if (!heldOut.has(sample.question)) yield formatTask(sample);
  }
}

function evaluationSet(): TaskSample[] {
  return taskSet(createRng(SEED).fork('evaluation'), EVALUATION_COUNT);
}
