// Metrics with their 95% intervals, and differences of two results item by item by paired bootstrap.
import { ensure } from '../core/errors.js';
import { shareInterval, studentQuantile, weightedMean } from '../core/intervals.js';
import { createRng } from '../core/rng.js';
import type { Metric } from './results.js';

/** What a metric is made of; see the schema of results. */
export interface MetricSpec {
  readonly column: string;
  readonly values: readonly number[];
  /** Name and values of the column of weights. */
  readonly weight?: readonly [name: string, values: readonly number[]];
  readonly transform?: Metric['transform'];
  readonly better: Metric['better'];
  readonly unit?: Metric['unit'];
  /** The values are shares of so many yes-or-no answers each, and weigh the same. */
  readonly answers?: number;
}

/** What is done to a metric's mean. */
export const TRANSFORMS: Readonly<Record<Metric['transform'], (mean: number) => number>> = {
  identity: (x) => x,
  exp: Math.exp,
  exp2: (x) => 2 ** x,
};

/** A metric with its 95% interval: Wilson's for shares of answers, Student's t over items otherwise, through the transform. */
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
  if (spec.answers !== undefined) return { ...shared, ...shareInterval(values, spec.answers), interval: 'wilson' };
  const half = studentQuantile(n - 1) * standardError;
  // Few items make t reach beyond what can be.
  const [least, most] = unit === null ? [-Infinity, Infinity] : [0, unit === 'share' ? 1 : Infinity];
  const [low, high] = [Math.max(least, map(mean - half)), Math.min(most, map(mean + half))];
  return { ...shared, low, high, interval: 't' };
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
