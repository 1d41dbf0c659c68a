// The table of model families, and the mapping from a Hugging Face config.json to gyre's normal form.
import { z } from 'zod';
import { GyreError, ensure } from '../core/errors.js';
import { validate } from '../formats/huggingface-config.js';
import type { ModelConfig } from './config.js';
import { llama } from './families/llama.js';
import { mistral } from './families/mistral.js';
import { qwen2 } from './families/qwen2.js';
import { qwen3 } from './families/qwen3.js';
import { parseRope, ropeFields } from './families/rope-config.js';
import type { BiasRule, Family } from './families/types.js';

export type { TensorNames } from './families/names.js';
export type { Family } from './families/types.js';

/** All supported families. A new one is a file in families/ and a line here. */
export const FAMILIES: readonly Family[] = [llama, mistral, qwen2, qwen3];

/** Limits on what a config may claim, checked before anything of that size is allocated. */
export const CONFIG_LIMITS = {
  vocab_size: 1_000_000,
  hidden_size: 65_536,
  intermediate_size: 1_048_576,
  num_hidden_layers: 1024,
  num_attention_heads: 1024,
  head_dim: 4096,
  max_position_embeddings: 100_000_000,
} as const;

const count = (max: number): z.ZodNumber => z.number().int().positive().max(max);
const tokenId = z.number().int().nonnegative();

const schema = z.looseObject({
  architectures: z.array(z.string()).nullish(),
  model_type: z.string().nullish(),
  vocab_size: count(CONFIG_LIMITS.vocab_size),
  hidden_size: count(CONFIG_LIMITS.hidden_size),
  intermediate_size: count(CONFIG_LIMITS.intermediate_size),
  num_hidden_layers: count(CONFIG_LIMITS.num_hidden_layers),
  num_attention_heads: count(CONFIG_LIMITS.num_attention_heads),
  num_key_value_heads: count(CONFIG_LIMITS.num_attention_heads).nullish(),
  head_dim: count(CONFIG_LIMITS.head_dim).nullish(),
  hidden_act: z.string().default('silu'),
  rms_norm_eps: z.number().positive().max(1).default(1e-6),
  max_position_embeddings: count(CONFIG_LIMITS.max_position_embeddings).nullish(),
  tie_word_embeddings: z.boolean().default(false),
  attention_bias: z.boolean().nullish(),
  mlp_bias: z.boolean().nullish(),
  sliding_window: z.number().int().positive().nullish(),
  use_sliding_window: z.boolean().nullish(),
  max_window_layers: z.number().int().nonnegative().nullish(),
  layer_types: z.array(z.string()).nullish(),
  bos_token_id: tokenId.nullish(),
  eos_token_id: z.union([tokenId, z.array(tokenId)]).nullish(),
  ...ropeFields,
});
type RawConfig = z.output<typeof schema>;

/**
 * Maps a parsed config.json to the normal form.
 * @param name for messages. Default: `config.json`.
 * @throws `unsupported` for other architectures, activations, RoPE types and layer types, naming what is supported;
 * `config-invalid` for fields that are missing, out of their limits, or contradict each other.
 */
export function parseModelConfig(json: unknown, name = 'config.json'): ModelConfig {
  const family = detectFamily(json, name);
  const raw = validate(schema, json, name);
  ensure(
    raw.hidden_act === 'silu',
    'unsupported',
    () => `${name}: hidden_act ${JSON.stringify(raw.hidden_act)} is not supported`,
    'gyre runs models with silu.',
  );
  const heads = raw.num_attention_heads;
  // An absent field takes the family's default, an explicit null means "as many as heads" (as in Transformers).
  const kvHeads =
    raw.num_key_value_heads ?? (raw.num_key_value_heads === null ? heads : (family.defaults.kvHeads ?? heads));
  const headDim =
    raw.head_dim ?? (raw.head_dim === undefined ? family.defaults.headDim : undefined) ?? raw.hidden_size / heads;
  ensure(
    Number.isInteger(headDim) && headDim % 2 === 0,
    'config-invalid',
    () => `${name}: head size ${headDim} (hidden_size ${raw.hidden_size}, ${heads} heads) must be an even whole number`,
    'Compare config.json with the original on the hub.',
  );
  ensure(
    heads % kvHeads === 0,
    'config-invalid',
    () => `${name}: ${heads} attention heads can't share ${kvHeads} key/value heads evenly`,
    'Compare config.json with the original on the hub.',
  );
  const maxPositions = raw.max_position_embeddings ?? family.defaults.maxPositions;
  const flag = (rule: BiasRule): boolean => (typeof rule === 'boolean' ? rule : (raw[rule] ?? false));
  const eos = raw.eos_token_id ?? [];
  return {
    family: family.name,
    vocabSize: raw.vocab_size,
    hiddenSize: raw.hidden_size,
    intermediateSize: raw.intermediate_size,
    layers: raw.num_hidden_layers,
    heads,
    kvHeads,
    headDim,
    rmsNormEps: raw.rms_norm_eps,
    maxPositions,
    ...parseRope(raw, maxPositions, name),
    tiedEmbeddings: raw.tie_word_embeddings,
    qkvBias: flag(family.qkvBias),
    outputBias: flag(family.outputBias),
    mlpBias: flag(family.mlpBias),
    qkNorm: family.qkNorm,
    windows: windowsOf(family, raw, name),
    ...(typeof raw.bos_token_id === 'number' ? { bosTokenId: raw.bos_token_id } : {}),
    eosTokenIds: typeof eos === 'number' ? [eos] : eos,
  };
}

/** The family of a config, by `architectures`, else by `model_type`. */
function detectFamily(json: unknown, name: string): Family {
  const hint = validate(
    z.looseObject({ architectures: z.array(z.string()).nullish(), model_type: z.string().nullish() }),
    json,
    name,
  );
  const architecture = hint.architectures?.[0];
  const family = FAMILIES.find((f) =>
    architecture === undefined ? f.name === hint.model_type : f.architecture === architecture,
  );
  if (family) return family;
  throw new GyreError(
    'unsupported',
    `${name}: architecture ${JSON.stringify(architecture ?? hint.model_type ?? null)} is not supported`,
    { remedy: `gyre runs ${FAMILIES.map((f) => f.architecture).join(', ')}.` },
  );
}

/** Sliding window of each layer. */
function windowsOf(family: Family, raw: RawConfig, name: string): (number | undefined)[] {
  const layers = raw.num_hidden_layers;
  const rule = family.windows;
  switch (rule.kind) {
    case 'none':
      return new Array<undefined>(layers).fill(undefined);
    case 'all': {
      const window = raw.sliding_window === undefined ? rule.fallback : (raw.sliding_window ?? undefined);
      return new Array<number | undefined>(layers).fill(window);
    }
    case 'by-layer': {
      const size = raw.sliding_window === undefined ? rule.fallback : (raw.sliding_window ?? undefined);
      const window = raw.use_sliding_window ? size : undefined;
      const full = raw.max_window_layers ?? rule.fallbackFullLayers;
      const types =
        raw.layer_types ??
        Array.from({ length: layers }, (_, i) => (i < full ? 'full_attention' : 'sliding_attention'));
      ensure(
        types.length === layers,
        'config-invalid',
        () => `${name}: layer_types has ${types.length} entries for ${layers} layers`,
        'Compare config.json with the original on the hub.',
      );
      return types.map((type, i) => {
        if (type === 'full_attention') return undefined;
        if (type === 'sliding_attention') return window;
        throw new GyreError('unsupported', `${name}: layer ${i} is of type ${JSON.stringify(type)}`, {
          remedy: 'gyre runs full_attention and sliding_attention layers.',
        });
      });
    }
  }
}

/** The family of a parsed config, by its name. @throws `unsupported`. */
export function familyNamed(name: string): Family {
  const family = FAMILIES.find((f) => f.name === name);
  if (family) return family;
  throw new GyreError('unsupported', `there is no model family ${name}`, {
    remedy: `gyre has ${FAMILIES.map((f) => f.name).join(', ')}.`,
  });
}
