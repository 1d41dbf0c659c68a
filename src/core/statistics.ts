// Statistics of a matrix's values: how far single values and whole channels stand out.

/** See {@link valueStatistics}. */
export interface ValueStatistics {
  /** Largest magnitude. */
  readonly absMax: number;
  readonly rms: number;
  readonly standardDeviation: number;
  /** Largest over median of the channels' largest magnitudes; 1 means that no channel stands out. */
  readonly channelRatio: number;
  /** Fourth standardised moment of the values: 3 for a normal distribution, more with heavier tails. */
  readonly kurtosis: number;
  /** Largest magnitude of each channel. */
  readonly channelMax: Float64Array;
}

/** Statistics of a matrix [rows, channels], row-major, of at least one row. */
export function valueStatistics(values: ArrayLike<number>, channels: number): ValueStatistics {
  const channelMax = new Float64Array(channels);
  let sum = 0;
  for (let i = 0; i < values.length; i++) sum += values[i];
  const mean = sum / values.length;
  let second = 0;
  let fourth = 0;
  for (let begin = 0; begin < values.length; begin += channels) {
    for (let channel = 0; channel < channels; channel++) {
      const value = values[begin + channel];
      const magnitude = Math.abs(value);
      if (magnitude > channelMax[channel]) channelMax[channel] = magnitude;
      const square = (value - mean) * (value - mean);
      second += square;
      fourth += square * square;
    }
  }
  const sorted = channelMax.slice().sort();
  const middle = channels >> 1;
  const median = channels % 2 === 1 ? sorted[middle] : (sorted[middle - 1] + sorted[middle]) / 2;
  const absMax = sorted[channels - 1];
  const variance = second / values.length;
  return {
    absMax,
    rms: Math.sqrt(variance + mean ** 2),
    standardDeviation: Math.sqrt(variance),
    // Pruned layers: no outliers when all is zero, and a finite number (JSON has no other) when the median is.
    channelRatio: absMax === 0 ? 1 : absMax / Math.max(median, 1e-6 * absMax),
    kurtosis: variance === 0 ? 0 : fourth / values.length / variance ** 2,
    channelMax,
  };
}
