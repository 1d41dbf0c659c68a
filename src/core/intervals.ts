// Means with 95% intervals: weighted means over independent items, Student's t, Wilson's interval of a share.
import { ensure } from './errors.js';

/** Two-sided quantile of the normal distribution for 95%. */
const Z = 1.959963984540054;

/** A mean and how sure it is. */
export interface Mean {
  readonly mean: number;
  /** Null for fewer than two items. */
  readonly standardError: number | null;
}

/**
 * Weighted mean Σwx / Σw. Its standard error is that of a ratio of sums over independent items:
 * √(n/(n−1) · Σ(w(x − mean))²) / Σw, which for equal weights is the usual one.
 */
export function weightedMean(values: readonly number[], weights?: readonly number[]): Mean {
  const n = values.length;
  let sum = 0;
  let total = 0;
  for (let i = 0; i < n; i++) {
    const weight = weights ? weights[i] : 1;
    sum += weight * values[i];
    total += weight;
  }
  const mean = sum / total;
  if (n < 2) return { mean, standardError: null };
  let squares = 0;
  for (let i = 0; i < n; i++) squares += ((weights ? weights[i] : 1) * (values[i] - mean)) ** 2;
  return { mean, standardError: Math.sqrt((n / (n - 1)) * squares) / total };
}

/** Half-width of Student's t interval in standard errors: the 97.5% quantile for so many degrees of freedom. */
export function studentQuantile(degrees: number): number {
  ensure(degrees >= 1, 'usage', 'an interval needs at least two items');
  if (degrees > 1e6) return Z;
  let [low, high] = [Z, 13];
  while (high - low > 1e-10) {
    const middle = (low + high) / 2;
    if (studentTail(middle, degrees) > 0.025) low = middle;
    else high = middle;
  }
  return (low + high) / 2;
}

/** P(T > t): half the regularised incomplete beta function I_x(ν/2, 1/2) at x = ν/(ν + t²). */
function studentTail(t: number, degrees: number): number {
  return incompleteBeta(degrees / (degrees + t * t), degrees / 2, 0.5) / 2;
}

/** Regularised incomplete beta function by its continued fraction (Lentz). */
function incompleteBeta(x: number, a: number, b: number): number {
  const front = Math.exp(logGamma(a + b) - logGamma(a) - logGamma(b) + a * Math.log(x) + b * Math.log1p(-x));
  if (x > (a + 1) / (a + b + 2)) return 1 - (front * betaFraction(1 - x, b, a)) / b;
  return (front * betaFraction(x, a, b)) / a;
}

function betaFraction(x: number, a: number, b: number): number {
  const tiny = 1e-300;
  const guard = (v: number): number => (Math.abs(v) < tiny ? tiny : v);
  let c = 1;
  let d = 1 / guard(1 - ((a + b) * x) / (a + 1));
  let result = d;
  for (let m = 1; m < 1000; m++) {
    const even = (m * (b - m) * x) / ((a + 2 * m - 1) * (a + 2 * m));
    d = 1 / guard(1 + even * d);
    c = guard(1 + even / c);
    result *= d * c;
    const odd = (-(a + m) * (a + b + m) * x) / ((a + 2 * m) * (a + 2 * m + 1));
    d = 1 / guard(1 + odd * d);
    c = guard(1 + odd / c);
    result *= d * c;
    if (Math.abs(d * c - 1) < 1e-15) break;
  }
  return result;
}

/** Stirling's series after shifting the argument above 10. */
function logGamma(x: number): number {
  let shift = 0;
  let z = x;
  while (z < 10) shift -= Math.log(z++);
  const r = 1 / (z * z);
  const series = (1 / 12 - r * (1 / 360 - r * (1 / 1260 - r / 1680))) / z;
  return shift + (z - 0.5) * Math.log(z) - z + Math.log(2 * Math.PI) / 2 + series;
}

/** Wilson's interval of a share of `right` among `n`; neither need be whole. */
export function wilson(right: number, n: number): { low: number; high: number } {
  const p = right / n;
  const center = (p + Z ** 2 / (2 * n)) / (1 + Z ** 2 / n);
  const half = (Z / (1 + Z ** 2 / n)) * Math.sqrt((p * (1 - p)) / n + Z ** 2 / (4 * n * n));
  return { low: Math.max(0, center - half), high: Math.min(1, center + half) };
}

/**
 * 95% interval of a mean of shares, each of up to `answers` yes-or-no answers to one item: Wilson's for as many answers as
 * are worth as much as these (p(1−p) over the squared standard error over items), at least one per item. For one answer per
 * item that is Wilson's interval itself.
 */
export function shareInterval(values: readonly number[], answers: number): { low: number; high: number } {
  const n = values.length;
  const { mean, standardError } = weightedMean(values);
  const variance = mean * (1 - mean);
  // Answers to one item that all agree are worth one; that no item has been missed says nothing of how alike they are.
  const worth = variance === 0 || answers === 1 ? n : standardError ? variance / standardError ** 2 : n * answers;
  const effective = Math.min(n * answers, Math.max(n, worth));
  return wilson(mean * effective, effective);
}
