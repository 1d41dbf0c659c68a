// Statistics of results: paired differences with Student's t intervals.

/** A mean with the ends of its 95% interval (null when one item leaves it open). */
export interface Estimate {
  readonly value: number;
  readonly low: number | null;
  readonly high: number | null;
  readonly n: number;
}

const SMALL_T = [12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365] as const;

/** Two-sided 95% quantile of Student's t: by table up to 7 degrees of freedom, then Cornish–Fisher (error < 0.001). */
export function studentT95(degrees: number): number {
  if (degrees < 1) return Infinity;
  if (degrees <= SMALL_T.length) return SMALL_T[Math.ceil(degrees) - 1];
  const z = 1.959964;
  const [z3, z5, z7] = [z ** 3, z ** 5, z ** 7];
  const d = degrees;
  return (
    z +
    (z3 + z) / (4 * d) +
    (5 * z5 + 16 * z3 + 3 * z) / (96 * d ** 2) +
    (3 * z7 + 19 * z5 + 17 * z3 - 15 * z) / (384 * d ** 3)
  );
}

/** Mean of weighted items with its interval from their spread (a ratio estimator when weights differ). */
export function weightedMean(
  values: readonly number[],
  weights?: readonly number[],
): Estimate & { readonly standardError: number | null } {
  const n = values.length;
  const w = (i: number): number => weights?.[i] ?? 1;
  let total = 0;
  let sum = 0;
  for (let i = 0; i < n; i++) {
    total += w(i);
    sum += w(i) * values[i];
  }
  const value = sum / total;
  if (n < 2) return { value, low: null, high: null, standardError: null, n };
  let squares = 0;
  for (let i = 0; i < n; i++) squares += (w(i) * (values[i] - value)) ** 2;
  const standardError = Math.sqrt((n / (n - 1)) * squares) / total;
  const error = standardError * studentT95(n - 1);
  return { value, low: value - error, high: value + error, standardError, n };
}

/** Mean of the differences a − b of paired items. */
export function pairedDifference(a: readonly number[], b: readonly number[], weights?: readonly number[]): Estimate {
  return weightedMean(
    a.map((value, i) => value - b[i]),
    weights,
  );
}

/** An estimate with a rising function applied to value and ends. */
export function mapEstimate({ value, low, high, n }: Estimate, f: (x: number) => number): Estimate {
  return { value: f(value), low: low === null ? null : f(low), high: high === null ? null : f(high), n };
}
