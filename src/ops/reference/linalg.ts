// Dense linear algebra of the quantizers in float64: Cholesky factors and what is solved with them.
import { GyreError } from '../../core/errors.js';

/** H + damp · mean(diag H) · I of a symmetric H [n, n]. */
export function damped(h: Float64Array, n: number, damp: number): Float64Array {
  let trace = 0;
  for (let i = 0; i < n; i++) trace += h[i * n + i];
  const sum = h.slice();
  for (let i = 0; i < n; i++) sum[i * n + i] += (damp * trace) / n;
  return sum;
}

/** Lower-triangular L with L·Lᵀ = A [n, n]. Throws `non-finite` when A is not positive definite. */
export function cholesky(a: Float64Array, n: number): Float64Array {
  const l = new Float64Array(n * n);
  for (let i = 0; i < n; i++) {
    for (let j = 0; j <= i; j++) {
      let sum = a[i * n + j];
      for (let k = 0; k < j; k++) sum -= l[i * n + k] * l[j * n + k];
      if (i !== j) {
        l[i * n + j] = sum / l[j * n + j];
      } else if (sum > 0 && sum < Infinity) {
        l[i * n + i] = Math.sqrt(sum);
      } else {
        throw new GyreError('non-finite', `matrix [${n}, ${n}] is not positive definite: pivot ${i} is ${sum}`, {
          remedy: 'use more calibration tokens or a larger damping',
        });
      }
    }
  }
  return l;
}

/** x with L·Lᵀ·x = b, from the lower factor L [n, n]. */
export function choleskySolve(l: Float64Array, n: number, b: Float64Array): Float64Array {
  const x = b.slice();
  for (let i = 0; i < n; i++) {
    for (let k = 0; k < i; k++) x[i] -= l[i * n + k] * x[k];
    x[i] /= l[i * n + i];
  }
  for (let i = n - 1; i >= 0; i--) {
    for (let k = i + 1; k < n; k++) x[i] -= l[k * n + i] * x[k];
    x[i] /= l[i * n + i];
  }
  return x;
}

/** Upper-triangular U [n, n] with UᵀU = (H + damp · mean(diag H) · I)⁻¹. */
export function gptqFactor(h: Float64Array, n: number, damp: number): Float64Array {
  const l = cholesky(damped(h, n, damp), n);
  const inverse = new Float64Array(n * n);
  for (let i = 0; i < n; i++) {
    const unit = new Float64Array(n);
    unit[i] = 1;
    inverse.set(choleskySolve(l, n, unit), i * n);
  }
  const lower = cholesky(inverse, n);
  const upper = new Float64Array(n * n);
  for (let i = 0; i < n; i++) for (let j = 0; j <= i; j++) upper[j * n + i] = lower[i * n + j];
  return upper;
}

/** X [m, n] with X · (H + damp · mean(diag H) · I) = B [m, n]. */
export function solveSymmetric(h: Float64Array, b: Float64Array, m: number, n: number, damp: number): Float64Array {
  const l = cholesky(damped(h, n, damp), n);
  const x = new Float64Array(m * n);
  // The matrix is symmetric, so each row of X solves the same system with the same row of B.
  for (let r = 0; r < m; r++) x.set(choleskySolve(l, n, b.subarray(r * n, (r + 1) * n)), r * n);
  return x;
}
