// The quantization ops of the WebGPU backend against the oracle.
import { openTestWebGpu, webgpuMissing } from '../support/webgpu.js';
import { OPS, runConformance } from './suite.js';

const QUANTIZATION = new Set<string>(OPS.slice(OPS.indexOf('matmul')));
const skip: Readonly<Record<string, string>> = {
  ...Object.fromEntries(
    OPS.flatMap((op) => {
      if (webgpuMissing !== undefined) return [[op, webgpuMissing]];
      return QUANTIZATION.has(op) ? [] : [[op, 'in webgpu-inference.test.ts']];
    }),
  ),
};
runConformance('webgpu, quantization', () => openTestWebGpu(), { skip });
