// A GPU that computes nothing, in the guise of one with matrix units: the time of a pass is the host's alone. For measuring the host
// where there is no GPU, with the kernels that a GPU with matrix units takes.
//
// `null` is Dawn's null backend: everything is validated and then thrown away, but for uploads and copies, which happen in host memory.
// `vulkan` is the machine's Vulkan driver, with kernels whose bodies are empty: Dawn tracks buffers and records for the driver as ever.
// What is read back is what was uploaded, or zeros. Neither needs the features that kernels ask for: those that the adapter lacks
// are created with the same bindings and no body (on the null backend the ones for matrix units only).
import { readFileSync } from 'node:fs';
import type { GpuDevice } from '../../src/backends/webgpu/device.js';

export const EMPTY_BACKENDS = ['null', 'vulkan'] as const;
export type EmptyBackend = (typeof EMPTY_BACKENDS)[number];

const MATRICES = ['f32', 'f16'].map((resultComponentType) => ({
  M: 16,
  N: 16,
  K: 16,
  componentType: 'f16',
  resultComponentType,
}));
const CLAIMED = ['shader-f16', 'subgroups', 'chromium-experimental-subgroup-matrix'];

/** Dawn's instances, which devices must not outlive. */
const instances: GPU[] = [];

/** WebGPU's entry point over a backend that computes nothing; one per process. */
export async function emptyGpu(backend: EmptyBackend): Promise<GPU> {
  const dawn = (await import('webgpu')) as unknown as { create(options: string[]): GPU; globals: object };
  Object.assign(globalThis, dawn.globals);
  const gpu = dawn.create([`backend=${backend}`, 'enable-dawn-features=allow_unsafe_apis,disable_robustness']);
  instances.push(gpu);
  return {
    wgslLanguageFeatures: gpu.wgslLanguageFeatures,
    requestAdapter: async (options?: GPURequestAdapterOptions) => {
      const adapter = await gpu.requestAdapter(options);
      if (!adapter) throw new Error(`Dawn finds nothing for its backend '${backend}'`);
      const info = {
        vendor: 'none',
        architecture: '',
        description: `Dawn's ${backend} backend without kernels`,
        isFallbackAdapter: false,
        subgroupMinSize: 32,
        subgroupMaxSize: 32,
        subgroupMatrixConfigs: MATRICES,
      };
      return {
        features: new Set(CLAIMED),
        limits: adapter.limits,
        info,
        requestDevice: async (descriptor: GPUDeviceDescriptor) => {
          const requiredFeatures = [...(descriptor.requiredFeatures ?? [])].filter((name) =>
            adapter.features.has(name),
          );
          return emptied(await adapter.requestDevice({ ...descriptor, requiredFeatures }), backend);
        },
      } as unknown as GPUAdapter;
    },
  } as unknown as GPU;
}

/** Takes the bodies of kernels away. */
function emptied(device: GPUDevice, backend: EmptyBackend): GPUDevice {
  const create = device.createShaderModule.bind(device);
  const kept = backend === 'null' ? /^(?![^]*subgroup_matrix)/ : /^$/;
  if (backend === 'vulkan') {
    // A software GPU takes its time to start workgroups, even those that do nothing.
    const pass = globalThis.GPUComputePassEncoder.prototype;
    const dispatch = Object.getOwnPropertyDescriptor(pass, 'dispatchWorkgroups')?.value as (
      ...groups: number[]
    ) => void;
    pass.dispatchWorkgroups = function () {
      dispatch.call(this, 1, 1, 1);
    };
  }
  device.createShaderModule = (descriptor) =>
    create(kept.test(descriptor.code) ? descriptor : { ...descriptor, code: declared(descriptor.code) });
  return device;
}

/** The bindings of a module, and an entry point that names each, so that its buffers are validated as they would be. */
function declared(code: string): string {
  const params = /struct Params \{[^}]*\}/.exec(code)?.[0] ?? '';
  const bindings = code.match(/^@group\(0\) @binding\(\d+\) var<[^>]*> \w+: .*;$/gm) ?? [];
  const typed = bindings.map((line) => line.replace(/array<.*>/, 'array<u32>'));
  const uses = bindings.map((line) => `  _ = &${/> (\w+):/.exec(line)?.[1] ?? ''};`);
  return `${params}\n${typed.join('\n')}\n@compute @workgroup_size(1) fn main() {\n${uses.join('\n')}\n}`;
}

/**
 * Buffers whose description begins with one of these are but beginnings: the null backend has 512 MB, and kernels never read them. For
 * buffers that are bound whole and neither uploaded nor copied.
 */
export function sparing(gpu: GpuDevice, ...beginnings: readonly string[]): void {
  const make = gpu.buffer.bind(gpu);
  gpu.buffer = (bytes, what = '') =>
    make(beginnings.some((one) => what.startsWith(one)) ? Math.min(bytes, 2 ** 16) : bytes, what);
}

/** `fill` writes over what is read back. */
export function feigning(gpu: GpuDevice, fill: (bytes: ArrayBuffer) => void): void {
  const read = gpu.read.bind(gpu);
  gpu.read = async (...args) => {
    const bytes = await read(...args);
    fill(bytes);
    return bytes;
  };
}

/** Ones of f32. */
export function ones(bytes: ArrayBuffer): void {
  new Float32Array(bytes, 0, bytes.byteLength >> 2).fill(1);
}

/** What calls into Dawn come to. */
export interface DawnCalls {
  dispatches: number;
  submissions: number;
  bindGroups: number;
  buffers: number;
  writes: number;
  copies: number;
  reads: number;
}

/** Counts a device's calls while `work` runs; too slow to time. */
export async function countCalls(device: GPUDevice, work: () => Promise<unknown>): Promise<DawnCalls> {
  const calls: DawnCalls = {
    dispatches: 0,
    submissions: 0,
    bindGroups: 0,
    buffers: 0,
    writes: 0,
    copies: 0,
    reads: 0,
  };
  const undo: (() => void)[] = [];
  const count = (target: object, method: string, name: keyof DawnCalls): void => {
    const held = (target as Record<string, (...args: unknown[]) => unknown>)[method];
    const own = Object.hasOwn(target, method);
    Object.defineProperty(target, method, {
      configurable: true,
      writable: true,
      value(this: unknown, ...args: unknown[]) {
        calls[name]++;
        return held.apply(this, args);
      },
    });
    undo.push(() => {
      if (own) Object.defineProperty(target, method, { configurable: true, writable: true, value: held });
      else Reflect.deleteProperty(target, method);
    });
  };
  const { GPUComputePassEncoder: Pass, GPUCommandEncoder: Encoder, GPUBuffer: Buffer } = globalThis;
  count(Pass.prototype, 'dispatchWorkgroups', 'dispatches');
  count(Encoder.prototype, 'copyBufferToBuffer', 'copies');
  count(Buffer.prototype, 'mapAsync', 'reads');
  count(device, 'createBindGroup', 'bindGroups');
  count(device, 'createBuffer', 'buffers');
  count(device.queue, 'submit', 'submissions');
  count(device.queue, 'writeBuffer', 'writes');
  try {
    await work();
  } finally {
    for (const one of undo) one();
  }
  return calls;
}

/** Milliseconds that this process' main thread has been on a processor; on a machine that others load, the clock tells less. */
export function threadMilliseconds(): number {
  // Of the thread whose id is the process': the main one. The first number is in nanoseconds.
  return Number(readFileSync('/proc/self/schedstat', 'latin1').split(' ')[0]) / 1e6;
}
