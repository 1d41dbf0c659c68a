// What of the op contract has no WebGPU kernels yet: refused by name, never run as something else.
import { GyreError } from '../../core/errors.js';

/** Throws `unsupported`, naming what was asked for. */
export function refuse(what: string): never {
  throw new GyreError('unsupported', `the WebGPU backend cannot run ${what} yet`, { remedy: 'use --device cpu' });
}
