// The inference ops of the WebGPU backend against the oracle: with all features of the adapter, without subgroups, and with activations
// in f16. (SwiftShader has no shader-f16 and no subgroup matrices, so the variants without them are the ones that run; the others
// are checked on a GPU by bench/webgpu-prefill.ts.)
import { describe, it } from 'vitest';
import { openTestWebGpu, webgpuMissing } from '../support/webgpu.js';
import { conformanceCases, OPS, runConformance, type ConformanceCase, type OpName } from './suite.js';

const skip = {
  // Ops of quantization: all from matmul on.
  ...Object.fromEntries(OPS.slice(OPS.indexOf('matmul')).map((op) => [op, 'in webgpu-quantization.test.ts'])),
};

/** Ops whose kernels use subgroups where there are any; of linears two shapes, which reach every kind of kernel. */
const SUBGROUP_OPS: readonly OpName[] = ['rmsNorm', 'rotate', 'linear'];
const SUBGROUP_LINEARS = ['172 → 24', '352 → 33'];
const usesSubgroups = ({ op, name }: ConformanceCase): boolean =>
  SUBGROUP_OPS.includes(op) && (op !== 'linear' || SUBGROUP_LINEARS.some((shape) => name.startsWith(shape)));
const withoutSubgroups = Object.fromEntries(
  conformanceCases
    .filter((test) => !usesSubgroups(test))
    .map(({ op, name }) => [`${op}: ${name}`, 'the same kernels as with subgroups']),
);

/** Ops that make f16 of f32; those that take f16 are in prefill-checks.ts. */
const HALF_OPS: readonly OpName[] = ['rmsNorm', 'splitHeads', 'siluMul'];
const withoutHalf = Object.fromEntries(
  OPS.filter((op) => !HALF_OPS.includes(op)).map((op) => [op, 'the same kernels as with activations in f32']),
);

const VARIANTS = [
  { name: 'all features', options: {}, skip },
  {
    name: 'no subgroups',
    options: { features: { subgroups: false, integerDot: false } },
    skip: { ...skip, ...withoutSubgroups },
  },
  {
    name: 'activations in f16',
    options: { precision: 'f16' },
    skip: { ...skip, ...withoutHalf },
    activationRoundoff: 2 ** -11,
  },
] as const;

if (webgpuMissing !== undefined) {
  describe('conformance of webgpu, inference', () => it.skip(String(webgpuMissing), () => undefined));
} else {
  for (const { name, options, skip: left, ...allowance } of VARIANTS)
    // Keys and values are cached as f16.
    runConformance(`webgpu, inference, ${name}`, () => openTestWebGpu(options), {
      skip: left,
      cacheRoundoff: 2 ** -11,
      ...allowance,
    });
}
