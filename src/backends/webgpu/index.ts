// The WebGPU backend: hand-written WGSL, the same in Node.js (Dawn) and in browsers.
import type { Backend, BackendInfo } from '../../ops/backend.js';
import type { DecodeSpec } from '../../ops/decode.js';
import { hasMatrixUnits, type GpuCapabilities } from './capabilities.js';
import { GpuDevice, type GpuDeviceOptions } from './device.js';
import { MOST_SEQUENCES } from './fast/batch-products.js';
import { prepareDecode } from './fast/prepare.js';
import { WebGpuGradients } from './gradients.js';
import { WebGpuInference } from './inference.js';
import { WebGpuQuantization } from './quantization.js';
import type { Precision } from './tensor.js';

export { GpuDevice, type GpuDeviceOptions } from './device.js';
export type { Precision } from './tensor.js';

/** Options of {@link openWebGpuBackend}. */
export interface WebGpuOptions extends GpuDeviceOptions {
  /** Of the forward pass over many rows; `auto`: f16 where the GPU has matrix units for it, else f32. Default f32. */
  readonly precision?: Precision | 'auto';
}

/** The WebGPU backend, with its device for code that knows it runs on one. */
export interface WebGpuBackend extends Backend {
  readonly gpu: GpuDevice;
}

/** Opens the machine's GPU. @throws GyreError `unsupported` when there is none. */
export async function openWebGpuBackend(options: WebGpuOptions = {}): Promise<WebGpuBackend> {
  const gpu = await GpuDevice.open(options);
  const precision = choosePrecision(gpu.capabilities, options.precision);
  const inference = new WebGpuInference(gpu, precision);
  return compose(gpu, inference, new WebGpuQuantization(gpu), new WebGpuGradients(gpu), describe(gpu, precision));
}

/** The precision that was asked for, or the one that `auto` comes to: without matrix units f16 would gain little. */
export function choosePrecision(capabilities: GpuCapabilities, wanted: WebGpuOptions['precision'] = 'f32'): Precision {
  if (wanted !== 'auto') return wanted;
  return hasMatrixUnits(capabilities) ? 'f16' : 'f32';
}

/** For GPUs with matrix units: enough rows that a block's pass outlasts its encoding, on small models too. */
const PASS = { rows: 2048, logitsBytes: 2 ** 29 };

function describe(gpu: GpuDevice, precision: Precision): BackendInfo {
  const { capabilities } = gpu;
  const features = [
    capabilities.f16 ? 'f16' : 'no f16',
    capabilities.subgroups
      ? `subgroups of ${[...new Set([capabilities.subgroups.min, capabilities.subgroups.max])].join('–')}`
      : 'no subgroups',
    capabilities.subgroupMatrices.length > 0 ? 'subgroup matrices' : 'no subgroup matrices',
    `many rows in ${precision}${precision === 'f16' && hasMatrixUnits(capabilities) ? ' on matrix units' : ''}`,
  ];
  return {
    name: 'webgpu',
    description: `${capabilities.description} (${features.join(', ')})`,
    threads: 1,
    precision,
    ...(hasMatrixUnits(capabilities) && { pass: PASS }),
  };
}

/** One object with the ops of both halves, and those of training beside them. */
function compose(
  gpu: GpuDevice,
  inference: WebGpuInference,
  quantization: WebGpuQuantization,
  gradients: WebGpuGradients,
  info: BackendInfo,
): WebGpuBackend {
  return Object.assign(Object.create(null), {
    gpu,
    info,
    gradients,
    prepareDecode: (spec: DecodeSpec) => prepareDecode(gpu, spec),
    decodeSequences: MOST_SEQUENCES,
    cacheValueBytes: 2,
    dispose: () => gpu.dispose(),
    ...methods(inference),
    ...methods(quantization),
  }) as WebGpuBackend;
}

/** An object's methods, bound. */
function methods(target: object): Record<string, unknown> {
  const bound: Record<string, unknown> = {};
  for (const name of Object.getOwnPropertyNames(Object.getPrototypeOf(target))) {
    const value = (target as Record<string, unknown>)[name];
    if (name !== 'constructor' && typeof value === 'function')
      bound[name] = (value as (...args: unknown[]) => unknown).bind(target);
  }
  return bound;
}
