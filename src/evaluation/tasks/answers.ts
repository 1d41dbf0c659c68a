// How written answers are compared: whole numbers and lists of whole numbers, forgiving of spacing alone.

import type { TaskSample } from './types.js';

/** True when the answer is the expected whole number. A full stop at the end is allowed. */
export function sameInteger(sample: TaskSample, answer: string): boolean {
  return trimmed(answer) === sample.answer;
}

/** True when the answer lists the expected whole numbers in the expected order, with or without spaces. */
export function sameIntegerList(sample: TaskSample, answer: string): boolean {
  return trimmed(answer).replaceAll(/\s*,\s*/g, ',') === sample.answer;
}

function trimmed(answer: string): string {
  return answer.trim().replace(/\.$/, '');
}
