// How a task becomes a document of the bundled model, and how an answer is read out of what the model wrote.

import type { TaskSample } from './types.js';

const THINK_START = '<think>';
const THINK_END = '</think>';
const ASSISTANT = '<|assistant|>';
const END = '<|eos|>';

/** The whole document: question, steps and answer, as in training and as the model's chat template renders them. */
export function formatTask(sample: TaskSample): string {
  return `${formatPrompt(sample)}${THINK_START}${sample.steps}${THINK_END}${sample.answer}${END}`;
}

/** The document up to where the model's turn starts. */
export function formatPrompt(sample: Pick<TaskSample, 'question'>): string {
  return `<|bos|><|user|>${sample.question}${ASSISTANT}`;
}

/**
 * The answer in a text written by a model: what follows the last `</think>`, up to the end token if there is one.
 * A text with no thinking in it is all answer; thinking that never ends, or an empty answer, gives undefined.
 */
export function extractAnswer(text: string): string | undefined {
  const turn = text.slice(afterLast(text, ASSISTANT));
  const start = afterLast(turn, THINK_END);
  if (start === 0 && turn.includes(THINK_START)) return undefined;
  const [answer = ''] = turn.slice(start).split(END);
  return answer.trim() || undefined;
}

function afterLast(text: string, mark: string): number {
  const at = text.lastIndexOf(mark);
  return at < 0 ? 0 : at + mark.length;
}
