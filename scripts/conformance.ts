// The conformance suite on this machine's GPU, without the test runner: for machines to which only one bundled file travels.
// Every case of every op against the float64 oracle, with all features of the adapter and with those switched off that have
// other kernels. Writes failures to stdout as they come and all results as JSON; exits with 1 if a case failed.
// Run: npx tsx scripts/conformance.ts [--op matmul,linear] [--variant all,no-f16] [--seconds 35] [--out results.json]
import { writeFileSync } from 'node:fs';
import { parseArgs } from 'node:util';
import { openWebGpuBackend, type WebGpuOptions } from '../src/backends/webgpu/index.js';
import { GyreError } from '../src/core/errors.js';
import type { Backend } from '../src/ops/backend.js';
import { requireGradients } from '../src/ops/gradients.js';
import { createReferenceBackend } from '../src/ops/reference/backend.js';
import { gradientCases } from '../test/conformance/cases-gradients.js';
import { Duo, type Allowance } from '../test/conformance/duo.js';
import { conformanceCases, runCase, STRICT } from '../test/conformance/suite.js';

/** Features that are switched off. Cases of quantization and training use none but the first variant's. */
const VARIANTS: Readonly<Record<string, NonNullable<WebGpuOptions['features']>>> = {
  all: {},
  'no-matrices': { subgroupMatrices: false },
  'no-f16': { f16: false },
  'no-subgroups': { subgroups: false },
};
/** Ops that have other kernels where features are missing. */
const FEATURE_OPS = new Set(['rmsNorm', 'rotate', 'linear', 'embed', 'quantizeRows', 'attention', 'matmul']);

const { values: options } = parseArgs({
  options: {
    op: { type: 'string' },
    variant: { type: 'string', default: Object.keys(VARIANTS).join(',') },
    seconds: { type: 'string' },
    out: { type: 'string' },
  },
});
const chosen = options.op?.split(',');
const budget = Number(options.seconds ?? Infinity);
// Keys and values are cached as f16.
const allowance: Allowance = { ...STRICT, cacheRoundoff: 2 ** -11 };
const oracle = createReferenceBackend();

interface Case {
  readonly op: string;
  readonly name: string;
  run(subject: Backend): Promise<void>;
}

const cases: readonly Case[] = [
  ...conformanceCases.map((test): Case => ({
    op: test.op,
    name: test.name,
    run: (subject) => runCase(test, subject, oracle, allowance),
  })),
  ...gradientCases.map((test): Case => ({
    op: test.op,
    name: test.name,
    run: async (subject) => {
      const duo = new Duo(subject, oracle, allowance, `${test.op} ${test.name}`);
      await test.run(duo, requireGradients(subject), requireGradients(oracle));
      await duo.finish();
    },
  })),
].filter(({ op }) => !chosen || chosen.includes(op));

interface Result {
  readonly variant: string;
  readonly op: string;
  readonly name: string;
  readonly state: 'passed' | 'failed' | 'refused' | 'not run';
  readonly message?: string;
}

const results: Result[] = [];
const started = performance.now();
for (const variant of options.variant.split(',')) {
  const features = VARIANTS[variant];
  if (!features) throw new Error(`unknown variant '${variant}'; there are ${Object.keys(VARIANTS).join(', ')}`);
  const open = (): Promise<Backend> => openWebGpuBackend({ features });
  let backend = await open();
  console.log(`${variant}: ${backend.info.description}`);
  for (const test of cases) {
    if (variant !== 'all' && !FEATURE_OPS.has(test.op)) continue;
    const { op, name } = test;
    if ((performance.now() - started) / 1000 > budget) {
      results.push({ variant, op, name, state: 'not run' });
      continue;
    }
    try {
      await test.run(backend);
      results.push({ variant, op, name, state: 'passed' });
    } catch (error) {
      const refused = error instanceof GyreError && error.code === 'unsupported';
      const message = error instanceof Error ? error.message : String(error);
      results.push({ variant, op, name, state: refused ? 'refused' : 'failed', message });
      if (refused) continue;
      console.log(`FAILED ${variant} ${op}: ${name}\n  ${message}`);
      // An error of the GPU outlasts the case: start anew.
      await backend.dispose();
      backend = await open();
    }
  }
  await backend.dispose();
}
const count = (state: Result['state']): number => results.filter((r) => r.state === state).length;
const summary = {
  seconds: Math.round((performance.now() - started) / 100) / 10,
  passed: count('passed'),
  failed: count('failed'),
  refused: count('refused'),
  notRun: count('not run'),
};
console.log(JSON.stringify(summary));
if (options.out) writeFileSync(options.out, JSON.stringify({ summary, results }, null, 1));
process.exitCode = summary.failed > 0 ? 1 : 0;
