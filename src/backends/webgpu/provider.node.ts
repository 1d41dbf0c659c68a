// Dawn in Node.js. One instance per process: its adapters, devices and buffers must not outlive it.
import { createRequire } from 'node:module';
import { GyreError } from '../../core/errors.js';

/**
 * What we ask of Dawn beyond the standard: `allow_unsafe_apis` shows experimental features (subgroup matrices),
 * `vulkan_enable_f16_on_nvidia` shader-f16 on NVIDIA under Vulkan, hidden there for failures of its conformance suite
 * in corners (f16 inputs of fragment shaders) that compute kernels never touch. `disable_robustness` leaves out the clamp
 * around every array access (a third of a matrix product's time): our kernels stay in bounds by themselves, which tests
 * in browsers, where it can't be left out, confirm. `disable_workgroup_init` saves the zeros that a workgroup's memory
 * starts with, since kernels write it before they read it: SwiftShader compiles those zeros into one store per element,
 * which takes it seconds per kernel. Timestamps are not rounded to 0.1 ms, which hides most kernels. The variable
 * GYRE_DAWN_TOGGLES replaces the list ('-name' switches off).
 */
export const DAWN_TOGGLES: readonly string[] = [
  'allow_unsafe_apis',
  'vulkan_enable_f16_on_nvidia',
  'disable_robustness',
  'disable_workgroup_init',
  '-timestamp_quantization',
];

let instance: Promise<GPU> | undefined;

/** Dawn's entry point. @throws GyreError `unsupported` when the optional package `webgpu` is missing or fails to load. */
export function dawn(): Promise<GPU> {
  instance ??= load();
  return instance;
}

/** Version of the package that brings Dawn. */
export function dawnVersion(): string {
  const { version } = createRequire(import.meta.url)('webgpu/package.json') as { version: string };
  return version;
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
  const toggles = process.env.GYRE_DAWN_TOGGLES?.split(',').filter(Boolean) ?? DAWN_TOGGLES;
  const on = toggles.filter((t) => !t.startsWith('-'));
  const off = toggles.filter((t) => t.startsWith('-')).map((t) => t.slice(1));
  return module.create([
    ...(on.length > 0 ? [`enable-dawn-features=${on.join(',')}`] : []),
    ...(off.length > 0 ? [`disable-dawn-features=${off.join(',')}`] : []),
  ]);
}

function message(error: unknown): string {
  return error instanceof Error ? error.message : String(error);
}
