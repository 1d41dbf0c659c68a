// Wrappers of the float64 kernels that inverse Cholesky factors are built from. Matrices are dense row-major, triangles lower.
import type { KernelPool } from '../pool.js';
import type { Pointer } from './arena.js';
import { checkLength } from './transform-kernels.js';

function push(pool: KernelPool, values: Float64Array): Pointer {
  const pointer = pool.arena.scratch(values.length * 8);
  pool.arena.f64.set(values, pointer >>> 3);
  return pointer;
}

function read(pool: KernelPool, pointer: Pointer, out: Float64Array): void {
  out.set(pool.arena.f64.subarray(pointer >>> 3, (pointer >>> 3) + out.length));
}

/**
 * Lower Cholesky factor L of a symmetric block [n, n] in place (lower triangle read, upper zeroed). Returns −1, or the
 * row whose pivot is not positive: then the block is not positive definite and its contents are undefined.
 */
export function cholesky(pool: KernelPool, a: Float64Array, n: number): number {
  checkLength('block', a, n * n);
  return pool.arena.scoped(() => {
    const pointer = push(pool, a);
    const failed = pool.call('cholesky', pointer, n);
    read(pool, pointer, a);
    return failed;
  });
}

/** The inverse of a lower triangle [n, n]. */
export function invertLower(pool: KernelPool, l: Float64Array, n: number): Float64Array {
  checkLength('triangle', l, n * n);
  return pool.arena.scoped(() => {
    const triangle = push(pool, l);
    const inverse = pool.arena.scratch(l.length * 8);
    pool.call('invertLower', triangle, inverse, n);
    const out = new Float64Array(l.length);
    read(pool, inverse, out);
    return out;
  });
}
