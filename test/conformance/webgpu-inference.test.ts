// The inference ops of the WebGPU backend against the oracle: with all features of the adapter, and without subgroups. (SwiftShader has no
// shader-f16, so the variants without it are the ones that run.)
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

const VARIANTS = [
  { name: 'all features', features: {}, skip },
  { name: 'no subgroups', features: { subgroups: false, integerDot: false }, skip: { ...skip, ...withoutSubgroups } },
];

if (webgpuMissing !== undefined) {
  describe('conformance of webgpu, inference', () => it.skip(String(webgpuMissing), () => undefined));
} else {
  for (const { name, features, skip: left } of VARIANTS)
    // Keys and values are cached as f16.
    runConformance(`webgpu, inference, ${name}`, () => openTestWebGpu({ features }), {
      skip: left,
      cacheRoundoff: 2 ** -11,
    });
}
