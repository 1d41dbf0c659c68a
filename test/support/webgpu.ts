// WebGPU for tests: Chromium's SwiftShader, so that results don't depend on the machine's GPU; GYRE_TEST_GPU=1 takes the real one.
import { existsSync } from 'node:fs';
import { openWebGpuBackend, type WebGpuBackend, type WebGpuOptions } from '../../src/backends/webgpu/index.js';

/** Where Debian's chromium keeps the description of its software Vulkan driver. */
const SWIFTSHADER = process.env.SWIFTSHADER_ICD ?? '/usr/lib/chromium/vk_swiftshader_icd.json';

/** Makes every WebGPU backend opened from here on the one under test. Dawn reads the environment when it is first loaded. */
export function useSoftwareGpu(): void {
  if (process.env.GYRE_TEST_GPU !== '1') process.env.VK_ICD_FILENAMES = SWIFTSHADER;
}

/** Opens the backend under test. */
export function openTestWebGpu(options: WebGpuOptions = {}): Promise<WebGpuBackend> {
  useSoftwareGpu();
  return openWebGpuBackend(options);
}

/**
 * Why WebGPU tests can't run here; undefined when they can. In CI they must: a missing driver fails there instead of
 * skipping.
 */
export const webgpuMissing: string | undefined =
  process.env.GYRE_TEST_GPU === '1' || existsSync(SWIFTSHADER) || process.env.CI === 'true'
    ? undefined
    : `no SwiftShader at ${SWIFTSHADER} (install chromium and libvulkan1, or set SWIFTSHADER_ICD)`;
