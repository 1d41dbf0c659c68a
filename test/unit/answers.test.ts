// Equivalence and extraction of answers: labelled pairs, none of which may be accepted wrongly.
import { describe, expect, it } from 'vitest';
import { existsSync, readFileSync } from 'node:fs';
import path from 'node:path';
import { equivalent } from '../../src/evaluation/answers/equivalence.js';
import { extractLetter, extractMath } from '../../src/evaluation/answers/extract.js';
import { judgeText } from '../../src/evaluation/judge.js';
import { ANSWERS } from './answer-pairs.js';
import { evalFolder } from '../support/eval-data.js';

const pairs = ANSWERS.flatMap(([expected, accept, refuse]) => [
  ...accept.map((answer) => ({ expected, answer, label: true })),
  ...refuse.map((answer) => ({ expected, answer, label: false })),
]);

describe('equivalent', () => {
  const wrong = pairs.filter(({ expected, answer, label }) => equivalent(expected, answer) !== label);

  it(`agrees with at least 99% of ${pairs.length} labelled pairs`, () => {
    expect(pairs.length).toBeGreaterThanOrEqual(300);
    expect(wrong).toEqual([]);
  });

  it('accepts none wrongly', () => {
    expect(wrong.filter(({ label }) => !label)).toEqual([]);
  });

  it('works both ways, and every answer is itself', () => {
    for (const { expected, answer, label } of pairs) {
      // Empty answers and the like are not even themselves.
      if (label) expect([answer, expected, equivalent(answer, expected)]).toEqual([answer, expected, true]);
      else expect([answer, expected, equivalent(answer, expected)]).toEqual([answer, expected, false]);
    }
    for (const [expected] of ANSWERS) expect([expected, equivalent(expected, expected)]).toEqual([expected, true]);
  });

  it('is quick on long and nested nonsense', () => {
    const begun = performance.now();
    for (const text of [
      '('.repeat(1900),
      '1+'.repeat(900),
      'x^'.repeat(900),
      '\\frac{1}'.repeat(200),
      '-'.repeat(1999),
      '9^{'.repeat(400),
      '|'.repeat(1000),
      '1'.repeat(5000),
    ]) {
      equivalent(text, '5');
      equivalent('5', text);
    }
    expect(performance.now() - begun).toBeLessThan(2000);
  });

  it.skipIf(evalFolder === undefined)(
    'knows every answer of MATH-500 as itself and as no neighbour (needs ../shared/data/eval)',
    () => {
      const file = path.join(evalFolder ?? '', 'math500-test.jsonl');
      if (!existsSync(file)) return;
      const answers = readFileSync(file, 'utf8')
        .trim()
        .split('\n')
        .map((line) => (JSON.parse(line) as { answer: string }).answer);
      const distinct = [...new Set(answers)];
      for (const answer of distinct) expect([answer, equivalent(answer, answer)]).toEqual([answer, true]);
      let equal = 0;
      for (const [i, a] of distinct.entries())
        for (const b of distinct.slice(i + 1, i + 30)) if (equivalent(a, b)) equal++;
      // Some answers of different questions are the same number written in two ways.
      expect(equal).toBeLessThan(10);
    },
  );
});

describe('extraction', () => {
  it.each<[string, string | undefined]>([
    ['<think>maybe \\boxed{3}</think>So it is $\\boxed{\\frac{1}{2}}$.', '\\frac{1}{2}'],
    ['First \\boxed{1}, then \\boxed{2}.', '2'],
    ['\\boxed{\\begin{pmatrix} 1 \\\\ 2 \\end{pmatrix}}', '\\begin{pmatrix} 1 \\\\ 2 \\end{pmatrix}'],
    ['\\boxed{\\{1,2\\}}', '\\{1,2\\}'],
    ['\\boxed{7} and an open \\boxed{8', '7'],
    ['\\boxed 5.', '5'],
    ['The final answer is $\\frac{3}{4}$. I hope it is correct.', '\\frac{3}{4}'],
    ['**Answer:** 12 apples', '12 apples'],
    ['16 - 3 - 4 = 9\n#### 1,800', '1,800'],
    ['She has 3 + 4 = 7 eggs left', '7'],
    ['<think>so it must be 12', undefined],
    ['I do not know.', undefined],
  ])('finds the answer of %s', (text, answer) => {
    expect(extractMath(text)).toBe(answer);
  });

  it.each<[string, string | undefined]>([
    ['\\boxed{C}', 'C'],
    ['\\boxed{\\text{(B)}}', 'B'],
    ['\\boxed{d}', 'D'],
    ['\\boxed{A. An apple}', 'A'],
    ['\\boxed{Apple}', undefined],
    ['The answer is (A).', 'A'],
    ['the correct option is **B**', 'B'],
    ['I weigh A against B.\n\nC', 'C'],
    ['<think>B or C?</think>\n\nAnswer: C', 'C'],
    ['<think>Answer: C', undefined],
    ['\\boxed{E}', undefined],
    ['A good question.', undefined],
    ['It is \\boxed{5.2} m.\n\nAnswer: C', 'C'],
    ['**Answer: $D$**', 'D'],
    ['Answer: $\\text{B}$', 'B'],
    ['Answer: \\(A\\)', 'A'],
    ['**Answer**: B) 12 km', 'B'],
    ['answer: c', 'C'],
    ['ANSWER: D.', 'D'],
    ['The answer is a large number.', undefined],
    ['The answer is a.', 'A'],
    ['Option A is wrong. Answer: B. Option C is wrong too.', 'B'],
    ['Therefore option C', 'C'],
    ['Answer: E', undefined],
  ])('finds the letter of %s', (text, letter) => {
    expect(extractLetter(text, 'ABCD')).toBe(letter);
  });
});

describe('judgeText', () => {
  it.each([
    ['math', '\\boxed{0.5}', '\\frac12', true],
    ['math', '\\boxed{0.51}', '\\frac12', false],
    ['integer', '\\boxed{025}', '25', true],
    ['integer', '\\boxed{25}', '025', true],
    ['integer', '\\boxed{x=25}', '25', false],
    ['integer', '\\boxed{26}', '25', false],
    ['letter', '\\boxed{B}', 'B', true],
    ['letter', 'no idea', 'B', false],
    ['chain', '<think>1+1=2</think>2<|eos|>', '2', true],
    ['chain', '<think>…</think>1, 2, 3', '1,2,3', true],
    ['chain', '<think>1+1=2', '2', false],
  ] as const)('%s: %s for %s is %s', (judge, text, answer, correct) => {
    expect(judgeText(judge, text, { answer, letters: 'ABCD' }).correct).toBe(correct);
  });
});
