// The WebGPU backend against the oracle: with all features of the adapter, and without subgroups. (SwiftShader has no
// shader-f16, so the variants without it are the ones that run.)
import { describe, it } from 'vitest';
import { openTestWebGpu, webgpuMissing } from '../support/webgpu.js';
import { runConformance } from './suite.js';

/** Ops of quantization that are not there yet. */
const NOT_YET = 'not written yet';

const QUANTIZATION = [
  'matmul',
  'transpose',
  'dot',
  'transformChannels',
  'createObjective',
  'roundToNearest',
  'gptq',
  'descend',
  'gptqFactor',
  'solveSymmetric',
  'addScaled',
];
const skip = {
  ...Object.fromEntries(QUANTIZATION.map((op) => [op, NOT_YET])),
  'sliceRows: first, middle, last rows, none; a slice as an input': 'needs transpose',
};
const VARIANTS = {
  'all features': {},
  'no subgroups': { subgroups: false },
};

if (webgpuMissing !== undefined) {
  describe('conformance of webgpu', () => it.skip(String(webgpuMissing), () => undefined));
} else {
  for (const [name, features] of Object.entries(VARIANTS))
    // Keys and values are cached as f16.
    runConformance(`webgpu, ${name}`, () => openTestWebGpu({ features }), { skip, cacheRoundoff: 2 ** -11 });
}
