// The quantization ops of the WebGPU backend against the oracle.
import { openTestWebGpu, webgpuMissing } from '../support/webgpu.js';
import { activationCases } from './cases-activations.js';
import { OPS, runConformance } from './suite.js';

const QUANTIZATION = new Set<string>(OPS.slice(OPS.indexOf('matmul')));
const skip: Readonly<Record<string, string>> = {
  // Refused by name until there are kernels.
  ...Object.fromEntries(activationCases.map(({ op, name }) => [`${op}: ${name}`, 'not written yet'])),
  ...Object.fromEntries(
    OPS.flatMap((op) => {
      if (webgpuMissing !== undefined) return [[op, webgpuMissing]];
      return QUANTIZATION.has(op) ? [] : [[op, 'in webgpu-inference.test.ts']];
    }),
  ),
};
runConformance('webgpu, quantization', () => openTestWebGpu(), { skip });
