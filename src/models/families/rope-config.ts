// RoPE settings of a Hugging Face config: `rope_theta` + `rope_scaling` (Transformers 4) or `rope_parameters` (5).
import { z } from 'zod';
import { GyreError, ensure } from '../../core/errors.js';
import type { RopeScaling } from '../config.js';
import { yarnAttentionFactor } from '../rope.js';

/** RoPE types gyre computes. */
export const ROPE_TYPES = ['default', 'linear', 'dynamic', 'llama3', 'yarn'] as const;

const positive = z.number().positive();
const settings = z.looseObject({
  rope_type: z.string().nullish(),
  type: z.string().nullish(),
  rope_theta: positive.nullish(),
  factor: positive.nullish(),
  original_max_position_embeddings: positive.nullish(),
  low_freq_factor: positive.nullish(),
  high_freq_factor: positive.nullish(),
  beta_fast: z.number().nonnegative().nullish(),
  beta_slow: z.number().nonnegative().nullish(),
  attention_factor: positive.nullish(),
  mscale: z.number().nullish(),
  mscale_all_dim: z.number().nullish(),
  truncate: z.boolean().nullish(),
  partial_rotary_factor: positive.nullish(),
});

/** The fields of a config that say how positions turn. */
export const ropeFields = {
  rope_theta: positive.nullish(),
  rope_scaling: settings.nullish(),
  rope_parameters: settings.nullish(),
  partial_rotary_factor: positive.nullish(),
};

/** Transformers' default base. */
const DEFAULT_THETA = 10000;

/** The base and the scaling. @throws `unsupported` for other RoPE types, `config-invalid` for missing numbers. */
export function parseRope(
  config: z.output<z.ZodObject<typeof ropeFields>>,
  maxPositions: number,
  name: string,
): { ropeTheta: number; ropeScaling: RopeScaling } {
  const raw = config.rope_parameters ?? config.rope_scaling ?? {};
  const partial = raw.partial_rotary_factor ?? config.partial_rotary_factor ?? 1;
  ensure(
    partial === 1,
    'unsupported',
    () => `${name}: partial_rotary_factor ${partial}: only part of each head would turn`,
    'gyre runs models whose whole heads turn (factor 1).',
  );
  const ropeTheta = raw.rope_theta ?? config.rope_theta ?? DEFAULT_THETA;
  return { ropeTheta, ropeScaling: scalingOf(raw, maxPositions, name) };
}

function scalingOf(raw: z.output<typeof settings>, maxPositions: number, name: string): RopeScaling {
  const type = raw.rope_type ?? raw.type ?? 'default';
  const needed = (field: 'factor' | 'low_freq_factor' | 'high_freq_factor'): number => {
    const value = raw[field];
    if (typeof value === 'number') return value;
    throw new GyreError('config-invalid', `${name}: RoPE type ${type} needs ${field}, found none`, {
      remedy: 'Compare config.json with the original on the hub.',
    });
  };
  const originalMaxPositions = raw.original_max_position_embeddings ?? maxPositions;
  switch (type) {
    case 'default':
      return { type };
    case 'linear':
    case 'dynamic':
      return { type, factor: needed('factor') };
    case 'llama3': {
      const lowFreqFactor = needed('low_freq_factor');
      const highFreqFactor = needed('high_freq_factor');
      ensure(
        highFreqFactor > lowFreqFactor,
        'config-invalid',
        () =>
          `${name}: RoPE type llama3 needs high_freq_factor > low_freq_factor, found ${highFreqFactor} and ${lowFreqFactor}`,
      );
      return { type, factor: needed('factor'), lowFreqFactor, highFreqFactor, originalMaxPositions };
    }
    case 'yarn': {
      const factor = raw.factor ?? maxPositions / originalMaxPositions;
      // DeepSeek's pair of multipliers, where given, replaces the paper's factor.
      const attentionFactor =
        raw.attention_factor ??
        (raw.mscale && raw.mscale_all_dim
          ? yarnAttentionFactor(factor, raw.mscale) / yarnAttentionFactor(factor, raw.mscale_all_dim)
          : undefined);
      return {
        type,
        factor,
        originalMaxPositions,
        betaFast: raw.beta_fast || 32,
        betaSlow: raw.beta_slow || 1,
        ...(attentionFactor === undefined ? {} : { attentionFactor }),
        truncate: raw.truncate ?? true,
      };
    }
    default:
      throw new GyreError('unsupported', `${name}: RoPE type ${JSON.stringify(type)} is not supported`, {
        remedy: `gyre computes ${ROPE_TYPES.join(', ')}.`,
      });
  }
}
