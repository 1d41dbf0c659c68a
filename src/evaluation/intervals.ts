// Means with 95% intervals, and differences of two results item by item.
import { ensure } from '../core/errors.js';
import { createRng } from '../core/rng.js';
import type { Metric } from './results.js';

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

/** Wilson's interval of a share of `right` among `n`. */
export function wilson(right: number, n: number): { low: number; high: number } {
  const p = right / n;
  const center = (p + Z ** 2 / (2 * n)) / (1 + Z ** 2 / n);
  const half = (Z / (1 + Z ** 2 / n)) * Math.sqrt((p * (1 - p)) / n + Z ** 2 / (4 * n * n));
  return { low: Math.max(0, center - half), high: Math.min(1, center + half) };
}

/** What a metric is made of; see the schema of results. */
export interface MetricSpec {
  readonly column: string;
  readonly values: readonly number[];
  /** Name and values of the column of weights. */
  readonly weight?: readonly [name: string, values: readonly number[]];
  readonly transform?: Metric['transform'];
  readonly better: Metric['better'];
  readonly unit?: Metric['unit'];
  /** The values are 0 or 1 and weigh the same. */
  readonly share?: boolean;
}

/** What is done to a metric's mean. */
export const TRANSFORMS: Readonly<Record<Metric['transform'], (mean: number) => number>> = {
  identity: (x) => x,
  exp: Math.exp,
  exp2: (x) => 2 ** x,
};

/** A metric with its 95% interval: Wilson's for shares, Student's t over items otherwise, through the transform. */
export function metric(spec: MetricSpec): Metric {
  const { column, values, weight, transform = 'identity', better, unit = null } = spec;
  const n = values.length;
  const { mean, standardError } = weightedMean(values, weight?.[1]);
  const map = TRANSFORMS[transform];
  const slope = { identity: 1, exp: map(mean), exp2: Math.LN2 * map(mean) }[transform];
  const shared = {
    value: map(mean),
    standardError: standardError === null ? null : standardError * slope,
    n,
    column,
    transform,
    weight: weight?.[0] ?? null,
    better,
    unit,
  };
  if (standardError === null) return { ...shared, low: null, high: null, interval: 'none' };
  if (spec.share) return { ...shared, ...wilson(Math.round(mean * n), n), interval: 'wilson' };
  const half = studentQuantile(n - 1) * standardError;
  return { ...shared, low: map(mean - half), high: map(mean + half), interval: 't' };
}

/** How two results differ on the same items. */
export interface PairedDifference {
  /** Second minus first, after the transform. */
  readonly difference: number;
  /** 95% interval of the difference: percentiles over resampled items. */
  readonly low: number;
  readonly high: number;
  /** Two-sided: how often a resampled difference is as far on the other side of 0, doubled; at least 1 / resamples. */
  readonly pValue: number;
  /** Whether the interval leaves 0 out: only then is it a difference. */
  readonly significant: boolean;
  readonly n: number;
}

/** Options of {@link pairedBootstrap}. */
export interface BootstrapOptions {
  readonly weights?: readonly number[];
  readonly transform?: Metric['transform'];
  /** Default 10 000. */
  readonly resamples?: number;
  /** Default 0. */
  readonly seed?: number;
}

/**
 * Paired bootstrap: items are drawn with replacement, both results' values of an item together, so that what makes
 * an item easy or hard for both cancels.
 * @param first, second values of the same items in the same order, at least two.
 */
export function pairedBootstrap(
  first: readonly number[],
  second: readonly number[],
  options: BootstrapOptions = {},
): PairedDifference {
  const { weights, transform = 'identity', resamples = 10_000, seed = 0 } = options;
  const n = first.length;
  ensure(
    n >= 2 && second.length === n,
    'usage',
    () => `a paired comparison needs the same two or more items, found ${n} and ${second.length}`,
  );
  const map = TRANSFORMS[transform];
  const weight = (i: number): number => (weights ? weights[i] : 1);
  const difference = (pick: (i: number) => number): number => {
    let [a, b, total] = [0, 0, 0];
    for (let i = 0; i < n; i++) {
      const at = pick(i);
      a += weight(at) * first[at];
      b += weight(at) * second[at];
      total += weight(at);
    }
    return map(b / total) - map(a / total);
  };
  const rng = createRng(seed).fork('bootstrap');
  const drawn = Float64Array.from({ length: resamples }, () => difference(() => rng.int(0, n))).sort();
  const below = drawn.filter((d) => d <= 0).length;
  const above = drawn.filter((d) => d >= 0).length;
  const low = drawn[Math.floor(0.025 * resamples)];
  const high = drawn[Math.ceil(0.975 * resamples) - 1];
  return {
    difference: difference((i) => i),
    low,
    high,
    pValue: Math.min(1, Math.max(1 / resamples, (2 * Math.min(below, above)) / resamples)),
    significant: low > 0 || high < 0,
    n,
  };
}
