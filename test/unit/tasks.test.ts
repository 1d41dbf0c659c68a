// The task generator: same seed same tasks, answers right by other arithmetic, steps true and leading to the answer.

import { readFileSync } from 'node:fs';
import { describe, expect, it } from 'vitest';
import { evaluationTasks, trainingDocuments } from '../../models/training/task-sets.js';
import { createRng } from '../../src/core/rng.js';
import {
  TASK_KINDS,
  extractAnswer,
  formatPrompt,
  formatTask,
  isCorrect,
  sampleTask,
  taskKind,
  taskSet,
} from '../../src/evaluation/tasks/index.js';
import type { TaskKind, TaskSample } from '../../src/evaluation/tasks/index.js';

const everyDifficulty = ({ difficulties: { min, max } }: TaskKind): number[] =>
  Array.from({ length: max - min + 1 }, (_, i) => min + i);

const numbersIn = (text: string): bigint[] => Array.from(text.matchAll(/\d+/g), ([digits]) => BigInt(digits));

const modulo = (value: bigint, modulus: bigint): bigint => ((value % modulus) + modulus) % modulus;

/** Reads each question anew and answers it without the generator's help. */
const SOLVERS: Readonly<Record<string, (question: string) => string>> = {
  addition(question) {
    const [a = 0n, b = 0n] = numbersIn(question);
    return String(a + b);
  },
  multiplication(question) {
    const [a = 0n, b = 0n] = numbersIn(question);
    return String(a * b);
  },
  modular(question) {
    const modulus = numbersIn(/modulo \d+|mod \d+/.exec(question)?.[0] ?? '')[0] ?? 1n;
    let value = numbersIn(/start with \d+|x = \d+/i.exec(question)?.[0] ?? '')[0] ?? 0n;
    const operations = question.matchAll(/(add|subtract|multiply by|x \+=|x -=|x \*=) (\d+)/g);
    for (const [, verb = '', digits = ''] of operations) {
      const operand = BigInt(digits);
      if (verb === 'add' || verb === 'x +=') value += operand;
      else if (verb === 'subtract' || verb === 'x -=') value -= operand;
      else value *= operand;
    }
    return String(modulo(value, modulus));
  },
  sorting(question) {
    const numbers = numbersIn(question).map(Number);
    const sign = question.includes('largest') ? -1 : 1;
    return numbers.sort((a, b) => sign * (a - b)).join(',');
  },
  'word-sums'(question) {
    const [first = '', ...sentences] = question.split('. ');
    let value = numbersIn(first)[0] ?? 0n;
    for (const sentence of sentences) {
      const count = numbersIn(sentence)[0];
      if (count === undefined) continue;
      if (sentence.includes('times')) value *= count;
      else if (/loses|sells|gives \d+ \w+ to/.test(sentence)) value -= count;
      else value += count;
    }
    return String(value);
  },
};

/** Whether every `left=right` in the steps is true arithmetic. */
function equationsHold(steps: string): boolean {
  return steps.split(/[;|]/).every((step) => {
    const [left = '', right] = step.split('=');
    if (right === undefined) return step.includes('[');
    const terms = Array.from(left.matchAll(/([+*-]?)(-?\d+)/g)).map(([, sign = '', digits = '']) => ({
      sign,
      value: BigInt(digits),
    }));
    // A product comes first if there is one, so left to right is the order of precedence.
    const result = terms.reduce((total, { sign, value }, i) => {
      if (i === 0) return sign === '-' ? -value : value;
      if (sign === '*') return total * value;
      return sign === '-' ? total - value : total + value;
    }, 0n);
    return result === BigInt(right);
  });
}

/** The answer as the steps leave it. */
function answerFromSteps(sample: TaskSample): string {
  const steps = sample.steps.split(/[;|]/);
  const totals = steps.map((step) => step.split('=')[1] ?? '');
  if (sample.kind === 'sorting') return steps.map((step) => step.split('[')[0]).join(',');
  if (sample.kind !== 'addition') return totals.at(-1) ?? '';
  const written = totals.map((total, i) => (i === totals.length - 1 ? total : total.slice(-1)));
  return written.reverse().join('');
}

describe.each(TASK_KINDS.map((kind) => [kind.name, kind] as const))('%s', (name, kind) => {
  const samples = everyDifficulty(kind).flatMap((difficulty) => {
    const rng = createRng(11).fork(difficulty);
    return Array.from({ length: 100 }, () => sampleTask(rng, { kind: name, difficulty }));
  });

  it('gives the same tasks for the same seed', () => {
    const draw = (seed: number): TaskSample[] => {
      const rng = createRng(seed);
      return Array.from({ length: 20 }, () => sampleTask(rng, { kind: name }));
    };
    expect(draw(1)).toEqual(draw(1));
    expect(draw(1)).not.toEqual(draw(2));
  });

  it('has the right answer at every difficulty', () => {
    for (const sample of samples) expect(SOLVERS[name]?.(sample.question), sample.question).toBe(sample.answer);
  });

  it('has steps that are true and end in the answer', () => {
    for (const sample of samples) {
      expect(equationsHold(sample.steps), sample.steps).toBe(true);
      expect(answerFromSteps(sample), sample.steps).toBe(sample.answer);
    }
  });

  it('keeps every document on one line and short enough for the bundled model', () => {
    for (const sample of samples) {
      const document = formatTask(sample);
      expect(document).not.toMatch(/[\r\n]/);
      expect(document.length).toBeLessThan(900);
    }
  });

  it('grows with the difficulty', () => {
    const length = (difficulty: number): number =>
      samples.filter((sample) => sample.difficulty === difficulty).reduce((sum, { steps }) => sum + steps.length, 0);
    const lengths = everyDifficulty(kind).map(length);
    expect(lengths).toEqual([...lengths].sort((a, b) => a - b));
  });

  it('accepts the right answer and nothing else', () => {
    for (const sample of samples.slice(0, 50)) {
      expect(isCorrect(sample, formatTask(sample))).toBe(true);
      expect(isCorrect(sample, `<think>${sample.steps}</think> ${sample.answer}. <|eos|>`)).toBe(true);
      expect(isCorrect(sample, `<think>${sample.steps}</think>${sample.answer}1<|eos|>`)).toBe(false);
      expect(isCorrect(sample, `<think>${sample.steps}`)).toBe(false);
    }
  });

  it('refuses a difficulty outside its range', () => {
    const { min, max } = kind.difficulties;
    for (const difficulty of [min - 1, max + 1, min + 0.5]) {
      expect(() => sampleTask(createRng(1), { kind: name, difficulty })).toThrow(RangeError);
    }
  });
});

describe('documents', () => {
  const sample: TaskSample = {
    kind: 'addition',
    difficulty: 2,
    question: 'What is 19 + 3?',
    steps: '9+3+0=12;1+0+1=2',
    answer: '22',
  };

  it('follow the chat template', () => {
    expect(formatTask(sample)).toBe(
      '<|bos|><|user|>What is 19 + 3?<|assistant|><think>9+3+0=12;1+0+1=2</think>22<|eos|>',
    );
    expect(formatTask(sample).startsWith(formatPrompt(sample))).toBe(true);
  });

  it.each([
    ['<think>9+3+0=12</think>22<|eos|>', '22'],
    ['<think>9+3+0=12</think> 22 ', '22'],
    ['22', '22'],
    ['<think>a</think>1<think>b</think>2', '2'],
    ['<|bos|><|user|>q<|assistant|><think>a</think>1<|eos|><|user|>r<|assistant|>2<|eos|>', '2'],
    ['<think>9+3+0=1', undefined],
    ['<think>9</think>', undefined],
    ['', undefined],
  ])('give %j the answer %j', (text, answer) => {
    expect(extractAnswer(text)).toBe(answer);
  });

  it('lists of numbers may be written with spaces', () => {
    const list: TaskSample = { ...sample, kind: 'sorting', answer: '3,5,9' };
    expect(isCorrect(list, '3, 5, 9')).toBe(true);
    expect(isCorrect(list, '3,9,5')).toBe(false);
  });
});

describe('task sets', () => {
  it('take the kinds in turn, spread the difficulties and repeat no question', () => {
    const tasks = taskSet(createRng(3), 300);
    expect(new Set(tasks.map(({ question }) => question)).size).toBe(300);
    for (const { name, difficulties } of TASK_KINDS) {
      const own = tasks.filter(({ kind }) => kind === name);
      expect(own).toHaveLength(60);
      expect(new Set(own.map(({ difficulty }) => difficulty)).size).toBe(difficulties.max - difficulties.min + 1);
    }
  });

  it('say so when there are not that many questions', () => {
    expect(() => taskSet(createRng(3), 100_000)).toThrow(RangeError);
  });

  it('name the kinds there are when one is unknown', () => {
    expect(() => taskKind('division')).toThrow(/addition.*word-sums/);
  });

  it('the bundled evaluation tasks are what the generator makes', () => {
    const file = new URL('../../models/gyre-14m/eval/tasks.jsonl', import.meta.url);
    expect(evaluationTasks()).toBe(readFileSync(file, 'utf8'));
  });

  it('training shares no question with them', () => {
    const prompts = new Set(
      evaluationTasks()
        .trim()
        .split('\n')
        .map((line) => formatPrompt(JSON.parse(line) as TaskSample)),
    );
    const documents = trainingDocuments();
    for (let i = 0; i < 20_000; i++) {
      const [prompt = ''] = /^.*<\|assistant\|>/.exec(documents.next().value) ?? [];
      expect(prompts.has(prompt)).toBe(false);
    }
  });
});
