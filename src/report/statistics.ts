// Estimates as the report shows them: a value with the ends of its 95% interval, and what is made of such.
import { studentQuantile, weightedMean } from '../core/intervals.js';

/** A mean with the ends of its 95% interval (null when one item leaves it open). */
export interface Estimate {
  readonly value: number;
  readonly low: number | null;
  readonly high: number | null;
  readonly n: number;
}

/** Mean of the differences a − b of paired items, with Student's t interval over items. */
export function pairedDifference(a: readonly number[], b: readonly number[], weights?: readonly number[]): Estimate {
  const differences = a.map((value, i) => value - b[i]);
  const { mean, standardError } = weightedMean(differences, weights);
  const n = differences.length;
  if (standardError === null) return { value: mean, low: null, high: null, n };
  const error = standardError * studentQuantile(n - 1);
  return { value: mean, low: mean - error, high: mean + error, n };
}

/** An estimate with a rising function applied to value and ends. */
export function mapEstimate({ value, low, high, n }: Estimate, f: (x: number) => number): Estimate {
  return { value: f(value), low: low === null ? null : f(low), high: high === null ? null : f(high), n };
}
