// Metrics of results for people.
import type { Metric } from '../../evaluation/results.js';

/** A value in the unit of its metric: shares in percent. */
export function formatValue(value: number, unit: Metric['unit'], digits?: number): string {
  if (unit === 'share') return `${(100 * value).toFixed(digits ?? 1)} %`;
  if (unit === 'tokens') return value.toFixed(digits ?? 0);
  return value.toFixed(digits ?? (Math.abs(value) < 1 ? 5 : 3));
}

/** `57.14 [55.2, 59.1]`. */
export function formatMetric({ value, low, high, unit }: Metric): string {
  const interval = low === null || high === null ? '' : ` [${formatValue(low, unit)}, ${formatValue(high, unit)}]`;
  return `${formatValue(value, unit)}${interval}`;
}
