// Dawn in Node.js. One instance per process: its adapters, devices and buffers must not outlive it.
import { GyreError } from '../../core/errors.js';

/**
 * What we ask of Dawn beyond the standard: `allow_unsafe_apis` shows experimental features (subgroup matrices), and
 * `vulkan_enable_f16_on_nvidia` shader-f16 on NVIDIA under Vulkan, hidden there for failures of its conformance suite
 * in corners (f16 inputs of fragment shaders) that compute kernels never touch. `disable_workgroup_init` saves the zeros
 * that a workgroup's memory starts with, since our kernels write it before they read it: SwiftShader compiles those zeros
 * into one store per element, which takes it seconds per kernel. GYRE_DAWN_TOGGLES replaces the list.
 */
export const DAWN_TOGGLES = ['allow_unsafe_apis', 'vulkan_enable_f16_on_nvidia', 'disable_workgroup_init'] as const;

let instance: Promise<GPU> | undefined;

/** Dawn's entry point. @throws GyreError `unsupported` when the optional package `webgpu` is missing or fails to load. */
export function dawn(): Promise<GPU> {
  instance ??= load();
  return instance;
}

async function load(): Promise<GPU> {
  let module: { create(options: string[]): GPU; globals: object };
  try {
    module = await import('webgpu');
  } catch (cause) {
    throw new GyreError('unsupported', `WebGPU for Node.js could not be loaded: ${message(cause)}`, {
      remedy: 'install the optional package: npm install webgpu',
      cause,
    });
  }
  Object.assign(globalThis, module.globals);
  const toggles = process.env.GYRE_DAWN_TOGGLES ?? DAWN_TOGGLES.join(',');
  return module.create(toggles === '' ? [] : [`enable-dawn-features=${toggles}`]);
}

function message(error: unknown): string {
  return error instanceof Error ? error.message : String(error);
}
