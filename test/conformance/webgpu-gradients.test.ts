// The WebGPU backend's gradient ops against the oracle.
import { describe, it } from 'vitest';
import { openTestWebGpu, webgpuMissing } from '../support/webgpu.js';
import { runGradientConformance } from './cases-gradients.js';

if (webgpuMissing !== undefined) {
  describe('gradient conformance of webgpu', () => it.skip(String(webgpuMissing), () => undefined));
} else {
  runGradientConformance('webgpu', () => openTestWebGpu());
}
