// Dawn in Node.js. One instance per process: its adapters, devices and buffers must not outlive it.
import { existsSync, readdirSync } from 'node:fs';
import { createRequire } from 'node:module';
import { homedir } from 'node:os';
import path from 'node:path';
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

/** What brings a GPU to WebGPU on Linux. */
export const DRIVER_REMEDY =
  "install the GPU's Vulkan driver and loader (Debian and Ubuntu: libvulkan1, and mesa-vulkan-drivers or NVIDIA's driver); " +
  'for a software GPU install chromium and set VK_ICD_FILENAMES=/usr/lib/chromium/vk_swiftshader_icd.json';

/** Descriptions of Vulkan drivers, where the loader looks for them on Linux. */
function vulkanDrivers(): string[] {
  const { env } = process;
  const list = (text: string | undefined, otherwise = ''): string[] => (text || otherwise).split(':').filter(Boolean);
  const forced = list(env.VK_DRIVER_FILES, env.VK_ICD_FILENAMES);
  if (forced.length > 0) return forced.filter((file) => existsSync(file));
  const folders = [
    ...list(env.XDG_CONFIG_HOME, path.join(homedir(), '.config')),
    ...list(env.XDG_CONFIG_DIRS, '/etc/xdg'),
    '/etc',
    ...list(env.XDG_DATA_HOME, path.join(homedir(), '.local/share')),
    ...list(env.XDG_DATA_DIRS, '/usr/local/share:/usr/share'),
    '/run/opengl-driver/share',
  ].map((folder) => path.join(folder, 'vulkan/icd.d'));
  const found = folders
    .filter((folder) => existsSync(folder))
    .flatMap((folder) => readdirSync(folder).map((file) => path.join(folder, file)));
  return [...found, ...list(env.VK_ADD_DRIVER_FILES)].filter((file) => file.endsWith('.json'));
}

/**
 * Dawn's entry point. @throws GyreError `unsupported` when there is no Vulkan driver on Linux (Dawn would write warnings of
 * its own to stderr), and when the optional package `webgpu` is missing or fails to load.
 */
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
  if (process.platform === 'linux' && vulkanDrivers().length === 0)
    throw new GyreError('unsupported', 'WebGPU found no GPU on this machine: no Vulkan driver is installed', {
      remedy: `${DRIVER_REMEDY}; or use --device cpu`,
    });
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
