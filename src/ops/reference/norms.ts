// Row-wise ops in float64: RMSNorm, gated activation, and the scores of logits.
import type { RowScores } from '../backend.js';
import { ensure } from '../../core/errors.js';

/** x · weight / sqrt(mean(x²) + eps) over each run of `weight.length` values. x [rows, n], weight [n]. */
export function rmsNorm(x: Float64Array, weight: Float64Array, eps: number): Float64Array {
  const n = weight.length;
  const y = new Float64Array(x.length);
  for (let base = 0; base < x.length; base += n) {
    let squares = 0;
    for (let i = 0; i < n; i++) squares += x[base + i] ** 2;
    const norm = Math.sqrt(squares / n + eps);
    for (let i = 0; i < n; i++) y[base + i] = (x[base + i] * weight[i]) / norm;
  }
  return y;
}

/** silu(gate) · up with silu(z) = z / (1 + e⁻ᶻ). gateUp [rows, 2n] → [rows, n]. */
export function siluMul(gateUp: Float64Array, rows: number, n: number): Float64Array {
  const y = new Float64Array(rows * n);
  for (let r = 0; r < rows; r++) {
    for (let i = 0; i < n; i++) {
      const gate = gateUp[r * 2 * n + i];
      const up = gateUp[r * 2 * n + n + i];
      y[r * n + i] = (gate / (1 + Math.exp(-gate))) * up;
    }
  }
  return y;
}

/** log softmax of one row. */
function logSoftmax(row: Float64Array): Float64Array {
  const max = row.reduce((a, b) => Math.max(a, b), -Infinity);
  const logSum = Math.log(row.reduce((sum, z) => sum + Math.exp(z - max), 0));
  return row.map((z) => z - max - logSum);
}

/** Index of the largest value, the first of equals. */
function argmax(row: Float64Array): number {
  return row.reduce((best, value, i) => (value > row[best] ? i : best), 0);
}

/** −log p(target), and KL(reference ‖ logits) and argmax agreement when there is a reference. logits [rows, vocab]. */
export function score(
  logits: Float64Array,
  vocab: number,
  targets: Int32Array,
  reference: Float64Array | undefined,
): RowScores {
  const rows = targets.length;
  const nll = new Float64Array(rows);
  const hit = new Uint8Array(rows);
  const kl = new Float64Array(rows);
  const agree = new Uint8Array(rows);
  for (let r = 0; r < rows; r++) {
    const target = targets[r];
    ensure(target >= 0 && target < vocab, 'usage', () => `target ${target} is outside the vocabulary of ${vocab}`);
    const logQ = logSoftmax(logits.subarray(r * vocab, (r + 1) * vocab));
    nll[r] = -logQ[target];
    hit[r] = argmax(logQ) === target ? 1 : 0;
    if (!reference) continue;
    const logP = logSoftmax(reference.subarray(r * vocab, (r + 1) * vocab));
    // p = 0 contributes nothing, also where log q is −∞.
    kl[r] = logP.reduce((sum, lp, i) => (lp === -Infinity ? sum : sum + Math.exp(lp) * (lp - logQ[i])), 0);
    agree[r] = argmax(logP) === argmax(logQ) ? 1 : 0;
  }
  return reference ? { nll, hit, kl, agree } : { nll, hit };
}
