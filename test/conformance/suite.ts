// The conformance suite: one table of cases over every op of the contract, run on any backend against the oracle.
import { afterAll, beforeAll, describe, it } from 'vitest';
import type { Backend, InferenceOps, QuantizationOps } from '../../src/ops/backend.js';
import { createReferenceBackend } from '../../src/ops/reference/backend.js';
import { activationCases } from './cases-activations.js';
import { inferenceCases } from './cases-inference.js';
import { quantizationCases } from './cases-quantization.js';
import { Duo, type Allowance } from './duo.js';

/** Name of an op of the contract. */
export type OpName = keyof InferenceOps | keyof QuantizationOps;

/** One check of one op. */
export interface ConformanceCase {
  readonly op: OpName;
  /** Ops that the case exercises on the way, and that have no result of their own to compare. */
  readonly also?: readonly OpName[];
  /** Unique within the op. */
  readonly name: string;
  /** The case checks that the op refuses its input: there is no result. */
  readonly refuses?: boolean;
  /** Throws when the subject deviates from the oracle. */
  run(duo: Duo): Promise<void>;
}

/** All cases. */
export const conformanceCases: readonly ConformanceCase[] = [
  ...inferenceCases,
  ...quantizationCases,
  ...activationCases,
];

/** Every op of the contract; the compiler refuses this table when one is missing. */
export const OPS = Object.keys({
  upload: true,
  download: true,
  free: true,
  sliceRows: true,
  gatherRows: true,
  concatColumns: true,
  loadLinear: true,
  loadTransform: true,
  loadRope: true,
  createKvCache: true,
  copySequences: true,
  release: true,
  embed: true,
  rmsNorm: true,
  rotate: true,
  quantizeRows: true,
  linear: true,
  splitHeads: true,
  attention: true,
  siluMul: true,
  score: true,
  matmul: true,
  addScaled: true,
  transpose: true,
  dot: true,
  diagonal: true,
  gatherColumns: true,
  scaleRows: true,
  rowSquares: true,
  transformChannels: true,
  createObjective: true,
  roundToNearest: true,
  searchClip: true,
  gptq: true,
  descend: true,
  refitScales: true,
  gptqFactor: true,
  solveSymmetric: true,
} satisfies Record<OpName, true>) as readonly OpName[];

/** Runs one case; inputs are seeded by the names of op and case. */
export async function runCase(
  test: ConformanceCase,
  subject: Backend,
  oracle: Backend,
  allowance: Allowance,
): Promise<void> {
  const duo = new Duo(subject, oracle, allowance, `${test.op} ${test.name}`);
  await test.run(duo);
  await duo.finish();
}

/** Options of {@link runConformance}. */
export interface ConformanceOptions extends Partial<Allowance> {
  /** Cases left out, by `op` or `op: name`, each with the reason. */
  readonly skip?: Readonly<Record<string, string>>;
}

/** f32 arithmetic, activations untouched. */
export const STRICT: Allowance = { roundoff: 2 ** -24, int16Rows: 0, activationRoundoff: 0, cacheRoundoff: 0 };

/** Declares a vitest suite that runs every case on one backend. */
export function runConformance(
  name: string,
  openBackend: () => Promise<Backend>,
  { skip = {}, ...allowance }: ConformanceOptions = {},
): void {
  describe(`conformance of ${name}`, () => {
    const oracle = createReferenceBackend();
    let subject: Backend;
    beforeAll(async () => {
      subject = await openBackend();
    });
    afterAll(async () => {
      await subject?.dispose();
    });
    for (const op of OPS) {
      const cases = conformanceCases.filter((test) => test.op === op);
      if (cases.length === 0) continue;
      describe(op, () => {
        for (const test of cases) {
          const reason = skip[op] ?? skip[`${op}: ${test.name}`];
          if (reason !== undefined) it.skip(`${test.name} (${reason})`, () => undefined);
          else it(test.name, () => runCase(test, subject, oracle, { ...STRICT, ...allowance }));
        }
      });
    }
  });
}
