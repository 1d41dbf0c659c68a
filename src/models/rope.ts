// Rotary position tables: inverse frequencies per RoPE type as Transformers computes them (modeling_rope_utils.py), in f64.
import { ensure, unreachable } from '../core/errors.js';
import type { ModelConfig } from './config.js';

/** Most entries of one table of cosines: 2^28 f32, 1 GiB. */
export const MAX_ROPE_ENTRIES = 2 ** 28;

/** What {@link inverseFrequencies} needs of a model. */
export type RopeConfig = Pick<ModelConfig, 'headDim' | 'maxPositions' | 'ropeTheta' | 'ropeScaling'>;

/** Frequencies and the factor on cos and sin. */
export interface RopeFrequencies {
  /** [rotaryDim / 2], radians per position. */
  readonly inverseFrequencies: Float64Array;
  /** Factor on cos and sin (YaRN; 1 for the others). */
  readonly attentionFactor: number;
}

/** Tables for positions 0 … positions − 1. */
export interface RopeTable {
  /** [positions, rotaryDim / 2], attention factor folded in. */
  readonly cos: Float32Array;
  /** [positions, rotaryDim / 2], attention factor folded in. */
  readonly sin: Float32Array;
  /** Leading channels of a head that turn: all of them in the supported families. */
  readonly rotaryDim: number;
}

/**
 * Inverse frequencies of a model.
 * @param sequenceLength tokens of the sequence at hand; matters to `dynamic` alone, whose base grows once it exceeds
 * `maxPositions`. Default: `maxPositions`.
 */
export function inverseFrequencies(config: RopeConfig, sequenceLength = config.maxPositions): RopeFrequencies {
  const { headDim: dim, maxPositions, ropeTheta: theta, ropeScaling: scaling } = config;
  const plain = (base: number): Float64Array =>
    Float64Array.from({ length: dim / 2 }, (_, i) => base ** ((-2 * i) / dim));
  switch (scaling.type) {
    case 'default':
      return { inverseFrequencies: plain(theta), attentionFactor: 1 };
    case 'linear':
      return { inverseFrequencies: plain(theta).map((f) => f / scaling.factor), attentionFactor: 1 };
    case 'dynamic': {
      const length = Math.max(sequenceLength, maxPositions);
      const growth = (scaling.factor * length) / maxPositions - (scaling.factor - 1);
      return { inverseFrequencies: plain(theta * growth ** (dim / (dim - 2))), attentionFactor: 1 };
    }
    case 'llama3': {
      const { factor, lowFreqFactor, highFreqFactor, originalMaxPositions } = scaling;
      const frequencies = plain(theta).map((f) => {
        const wavelength = (2 * Math.PI) / f;
        if (wavelength < originalMaxPositions / highFreqFactor) return f;
        if (wavelength > originalMaxPositions / lowFreqFactor) return f / factor;
        const smooth = (originalMaxPositions / wavelength - lowFreqFactor) / (highFreqFactor - lowFreqFactor);
        return ((1 - smooth) * f) / factor + smooth * f;
      });
      return { inverseFrequencies: frequencies, attentionFactor: 1 };
    }
    case 'yarn': {
      const { factor, originalMaxPositions, betaFast, betaSlow, truncate } = scaling;
      // The dimension whose frequency makes this many turns over the original context.
      const dimensionOf = (turns: number): number =>
        (dim * Math.log(originalMaxPositions / (turns * 2 * Math.PI))) / (2 * Math.log(theta));
      let low = dimensionOf(betaFast);
      let high = dimensionOf(betaSlow);
      if (truncate) {
        low = Math.floor(low);
        high = Math.ceil(high);
      }
      low = Math.max(low, 0);
      high = Math.min(high, dim - 1);
      if (low === high) high += 0.001;
      // High frequencies (small i) stay, low ones are interpolated, with a linear ramp between.
      const frequencies = plain(theta).map((f, i) => {
        const ramp = Math.min(1, Math.max(0, (i - low) / (high - low)));
        return (f / factor) * ramp + f * (1 - ramp);
      });
      return {
        inverseFrequencies: frequencies,
        attentionFactor: scaling.attentionFactor ?? yarnAttentionFactor(factor),
      };
    }
    default:
      return unreachable(scaling);
  }
}

/** YaRN's factor on cos and sin: 0.1 · mscale · ln(factor) + 1, and 1 for factors that don't stretch. */
export function yarnAttentionFactor(factor: number, mscale = 1): number {
  return factor <= 1 ? 1 : 0.1 * mscale * Math.log(factor) + 1;
}

/**
 * cos and sin for positions 0 … positions − 1, computed in f64 and stored in f32.
 * @param sequenceLength see {@link inverseFrequencies}: pass the sequence's length for `dynamic` models, as
 * Transformers does; by default the model's `maxPositions`.
 * @throws `limit-exceeded` above {@link MAX_ROPE_ENTRIES}, before allocating.
 */
export function ropeTable(config: RopeConfig, positions: number, sequenceLength?: number): RopeTable {
  const { inverseFrequencies: frequencies, attentionFactor } = inverseFrequencies(config, sequenceLength);
  const half = frequencies.length;
  ensure(
    Number.isInteger(positions) && positions >= 0 && positions * half <= MAX_ROPE_ENTRIES,
    'limit-exceeded',
    () =>
      `rotary tables of ${positions} positions × ${half} frequencies are over the limit of ${MAX_ROPE_ENTRIES} entries`,
    'Ask for a shorter context.',
  );
  const cos = new Float32Array(positions * half);
  const sin = new Float32Array(positions * half);
  for (let p = 0, at = 0; p < positions; p++) {
    for (let i = 0; i < half; i++, at++) {
      const angle = p * frequencies[i];
      cos[at] = Math.cos(angle) * attentionFactor;
      sin[at] = Math.sin(angle) * attentionFactor;
    }
  }
  return { cos, sin, rotaryDim: 2 * half };
}
