// The CPU backend: ONNX Runtime for matrix products and prefill attention, our WebAssembly SIMD kernels for the rest.
import type { Backend, BackendInfo } from '../../ops/backend.js';
import { CpuGradients } from './gradients.js';
import { CpuInference } from './inference.js';
import { KernelPool } from './kernels.js';
import { OrtKernels } from './ort.js';
import { CpuQuantization } from './quantization.js';
import { loadRuntime } from './runtime.js';
import { TensorPool } from './tensor.js';

/** Options of {@link openCpuBackend}; see BackendOptions of the registry. */
export interface CpuOptions {
  readonly threads?: number;
  readonly activations?: 'exact' | 'int8';
}

/** Opens the CPU backend: compiles the kernels, starts their threads, loads ONNX Runtime. */
export async function openCpuBackend(options: CpuOptions = {}): Promise<Backend> {
  const pool = await KernelPool.create({ threads: options.threads });
  const ort = new OrtKernels(await loadRuntime(pool.threads), pool.threads);
  const info: BackendInfo = {
    name: 'cpu',
    description: `${ort.name} and WebAssembly SIMD kernels, ${pool.threads} thread${pool.threads === 1 ? '' : 's'}`,
    threads: pool.threads,
  };
  const dispose = async (): Promise<void> => {
    await ort.dispose();
    await pool.dispose();
  };
  const tensors = new TensorPool(pool.arena);
  return compose(
    new CpuInference(pool, ort, tensors, options.activations ?? 'exact'),
    new CpuQuantization(pool, ort, tensors),
    new CpuGradients(pool, tensors),
    info,
    dispose,
  );
}

/** One object with the ops of both halves, and those of training beside them. */
function compose(
  inference: CpuInference,
  quantization: CpuQuantization,
  gradients: CpuGradients,
  info: BackendInfo,
  dispose: () => Promise<void>,
): Backend {
  return Object.assign(Object.create(null), {
    info,
    dispose,
    gradients,
    ...methods(inference),
    ...methods(quantization),
  }) as Backend;
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
