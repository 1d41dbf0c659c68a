// What WebGPU offers on this machine, without a model: for choosing a device and for `gyre doctor`.
import { inNode } from '../../core/environment.js';
import { GyreError } from '../../core/errors.js';
import { probe, readLimits, type GpuCapabilities, type GpuLimits } from './capabilities.js';
import { GpuDevice } from './device.js';
import { webgpuEntry } from './provider.js';

export { hasMatrixUnits } from './capabilities.js';

/** See {@link probeWebGpu}. */
export type WebGpuProbe =
  | {
      readonly available: true;
      readonly capabilities: GpuCapabilities;
      /** All features of the adapter, sorted. */
      readonly features: readonly string[];
      /** Those limits that kernels and weights depend on. */
      readonly limits: GpuLimits;
      /** Bytes of the largest weight that fits. */
      readonly largestWeight: number;
      /** Version of Dawn's package, in Node.js. */
      readonly version: string | undefined;
    }
  | { readonly available: false; readonly reason: string; readonly remedy: string };

/** Looks for an adapter; opens no device. */
export async function probeWebGpu(): Promise<WebGpuProbe> {
  let gpu: GPU;
  let adapter: GPUAdapter | null;
  try {
    gpu = await webgpuEntry();
    adapter = await gpu.requestAdapter({ powerPreference: 'high-performance' });
  } catch (error) {
    if (!(error instanceof GyreError)) throw error;
    return { available: false, reason: error.message, remedy: error.remedy ?? '' };
  }
  if (!adapter) {
    const remedy = inNode
      ? (await import('./provider.node.js')).DRIVER_REMEDY
      : 'allow hardware acceleration in the settings of the browser';
    return { available: false, reason: 'WebGPU found no GPU on this machine', remedy };
  }
  const limits = readLimits(adapter);
  return {
    available: true,
    capabilities: probe(gpu, adapter),
    features: [...adapter.features].sort(),
    limits,
    largestWeight: Math.min(limits.maxBufferSize, limits.maxStorageBufferBindingSize),
    version: inNode ? (await import('./provider.node.js')).dawnVersion() : undefined,
  };
}

/** Bytes copied at a time: more than any cache. */
const COPY_BYTES = 256 * 2 ** 20;

/** Bytes per second of copies inside GPU memory, reads and writes both counted; best of five. */
export async function measureGpuCopy(): Promise<number> {
  const gpu = await GpuDevice.open();
  try {
    // Software GPUs run at the speed of the CPU's memory: less will do.
    const bytes = Math.min(gpu.capabilities.software ? COPY_BYTES / 8 : COPY_BYTES, gpu.limits.maxBufferSize);
    const copies = gpu.capabilities.software ? 2 : 64;
    const [from, to] = [gpu.buffer(bytes), gpu.buffer(bytes)];
    let best = 0;
    for (let run = 0; run < 5; run++) {
      await gpu.sync();
      const start = performance.now();
      for (let i = 0; i < copies; i++) gpu.copy(from, 0, to, 0, bytes);
      await gpu.sync();
      best = Math.max(best, (2 * bytes * copies) / ((performance.now() - start) / 1000));
    }
    return best;
  } finally {
    await gpu.dispose();
  }
}
