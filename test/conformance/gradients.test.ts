// The CPU backend's gradient ops against the oracle, on one thread and on two.
import { expect, it } from 'vitest';
import { GRADIENT_OPS, gradientCases, runGradientConformance } from './cases-gradients.js';

it('covers every gradient op, each case named once', () => {
  const names = gradientCases.map((test) => `${test.op}: ${test.name}`);
  expect(new Set(names).size).toBe(names.length);
  expect(GRADIENT_OPS.filter((op) => !gradientCases.some((test) => test.op === op))).toEqual([]);
});

for (const threads of [1, 2]) {
  const open = async () => (await import('../../src/backends/registry.js')).openBackend('cpu', { threads });
  runGradientConformance(`cpu, ${threads} thread${threads > 1 ? 's' : ''}`, open);
}
