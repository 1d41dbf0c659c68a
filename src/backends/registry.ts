// The one place that knows the concrete backends; each is loaded when it is asked for.
import type { Backend } from '../ops/backend.js';
import { ensure, GyreError, unreachable } from '../core/errors.js';

/** Backends by name. `reference` is the slow float64 oracle. */
export const BACKENDS = ['cpu', 'webgpu', 'reference'] as const;
export type BackendName = (typeof BACKENDS)[number];

/** What `--device` takes. */
export const DEVICES = ['auto', 'cpu', 'webgpu'] as const;
export type DeviceName = (typeof DEVICES)[number];

/** A device, and why it was taken. */
export interface ChosenDevice {
  readonly name: Exclude<DeviceName, 'auto'>;
  readonly reason: string;
}

/** What a job asks of a device. */
export interface DeviceNeeds {
  /** Bytes of the largest tensor: on a GPU each is one buffer. */
  readonly largestTensor?: number;
  readonly activations?: BackendOptions['activations'];
}

/**
 * Decides where a job runs: on the device asked for, without looking; for `auto` on WebGPU if there is a GPU (a software
 * one doesn't count: the CPU backend is faster) that holds the job's largest tensor, else on the CPU.
 */
export async function chooseDevice(wanted: DeviceName, needs: DeviceNeeds = {}): Promise<ChosenDevice> {
  if (wanted !== 'auto') return { name: wanted, reason: 'as asked' };
  if (needs.activations === 'int8') return { name: 'cpu', reason: '8-bit activations are its own' };
  const found = await (await import('./webgpu/probe.js')).probeWebGpu();
  if (!found.available) return { name: 'cpu', reason: found.reason };
  const { description, software } = found.capabilities;
  if (software) return { name: 'cpu', reason: `WebGPU has only a software GPU (${description})` };
  const { largestTensor = 0 } = needs;
  if (largestTensor > found.largestWeight)
    return {
      name: 'cpu',
      reason: `a tensor of ${largestTensor} bytes exceeds the ${found.largestWeight} that ${description} takes in one buffer`,
    };
  return { name: 'webgpu', reason: `found ${description}` };
}

/** Options of {@link openBackend}. */
export interface BackendOptions {
  /** CPU threads; default: the machine's cores. */
  threads?: number;
  /**
   * How products with quantized weights treat activations on the CPU: `exact` (f32 products; a few rows at a time
   * with activations rounded to 16 bits per group, the default) or `int8` (rounded to 8 bits: faster, some quality lost).
   */
  activations?: 'exact' | 'int8';
  /**
   * Of the forward pass over many rows (prefill, evaluation) on WebGPU: `f16` rounds activations inside blocks to f16 and
   * multiplies on matrix units where there are any, `auto` is f16 on GPUs that have them and f32 on others. Default f32.
   * The CPU computes in f32, which `auto` is there.
   */
  precision?: PrecisionName;
}

/** What `--precision` takes. */
export const PRECISIONS = ['auto', 'f32', 'f16'] as const;
export type PrecisionName = (typeof PRECISIONS)[number];

/** Opens a backend by name. @throws GyreError `unsupported` for an unknown name. */
export async function openBackend(name: BackendName, options: BackendOptions = {}): Promise<Backend> {
  switch (name) {
    case 'cpu':
      ensure(
        options.precision !== 'f16',
        'usage',
        'the CPU backend computes in f32; f16 is a choice of WebGPU',
        'leave out --precision, or use --device webgpu',
      );
      return (await import('./cpu/index.js')).openCpuBackend(options);
    case 'webgpu':
      ensure(
        options.activations !== 'int8',
        'usage',
        '8-bit activations are a choice of the CPU backend; WebGPU has none',
        'leave out --activations, or use --device cpu',
      );
      return (await import('./webgpu/index.js')).openWebGpuBackend({ precision: options.precision });
    case 'reference':
      return (await import('../ops/reference/backend.js')).createReferenceBackend();
    default:
      unreachable(name);
      throw new GyreError('unsupported', `unknown backend '${String(name)}'`, {
        remedy: `choose one of: ${BACKENDS.join(', ')}`,
      });
  }
}
