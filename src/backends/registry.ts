// The one place that knows the concrete backends; each is loaded when it is asked for.
import type { Backend } from '../ops/backend.js';
import { GyreError, unreachable } from '../core/errors.js';

/** Backends by name. `reference` is the slow float64 oracle. */
export const BACKENDS = ['cpu', 'webgpu', 'reference'] as const;
export type BackendName = (typeof BACKENDS)[number];

/** Options of {@link openBackend}. */
export interface BackendOptions {
  /** CPU threads; default: the machine's cores. */
  threads?: number;
  /**
   * How products with quantized weights treat activations on the CPU: `exact` (f32 products; a few rows at a time
   * with activations rounded to 15 or 16 bits per group, the default) or `int8` (rounded to 8 bits: faster, some quality lost).
   */
  activations?: 'exact' | 'int8';
}

/** Opens a backend by name. @throws GyreError `unsupported` for an unknown name. */
export async function openBackend(name: BackendName, options: BackendOptions = {}): Promise<Backend> {
  switch (name) {
    case 'cpu':
      return (await import('./cpu/index.js')).openCpuBackend(options);
    case 'webgpu':
      return (await import('./webgpu/index.js')).openWebGpuBackend();
    case 'reference':
      return (await import('../ops/reference/backend.js')).createReferenceBackend();
    default:
      unreachable(name);
      throw new GyreError('unsupported', `unknown backend '${String(name)}'`, {
        remedy: `choose one of: ${BACKENDS.join(', ')}`,
      });
  }
}
