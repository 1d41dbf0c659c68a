// Hugging Face configs of every family, in both styles, and configs that can't be.
import { existsSync, readFileSync, readdirSync } from 'node:fs';
import path from 'node:path';
import { describe, expect, it } from 'vitest';
import { parseModelConfig } from '../../src/models/families.js';
import { TENSOR_NAMES } from '../../src/models/families/names.js';
import { expectError } from './formats/helpers.js';

const llama = {
  architectures: ['LlamaForCausalLM'],
  model_type: 'llama',
  vocab_size: 128256,
  hidden_size: 4096,
  intermediate_size: 14336,
  num_hidden_layers: 4,
  num_attention_heads: 32,
  num_key_value_heads: 8,
  hidden_act: 'silu',
  rms_norm_eps: 1e-5,
  max_position_embeddings: 131072,
  rope_theta: 500000,
  rope_scaling: {
    factor: 8,
    high_freq_factor: 4,
    low_freq_factor: 1,
    original_max_position_embeddings: 8192,
    rope_type: 'llama3',
  },
  tie_word_embeddings: false,
  attention_bias: false,
  bos_token_id: 128000,
  eos_token_id: [128001, 128008, 128009],
};
const of = (architecture: string, rest: Record<string, unknown> = {}): Record<string, unknown> => ({
  ...llama,
  architectures: [architecture],
  rope_scaling: null,
  ...rest,
});
const llama3Rope = {
  type: 'llama3',
  factor: 8,
  lowFreqFactor: 1,
  highFreqFactor: 4,
  originalMaxPositions: 8192,
};

describe('llama', () => {
  it('3.1', () => {
    expect(parseModelConfig(llama)).toEqual({
      family: 'llama',
      vocabSize: 128256,
      hiddenSize: 4096,
      intermediateSize: 14336,
      layers: 4,
      heads: 32,
      kvHeads: 8,
      headDim: 128,
      rmsNormEps: 1e-5,
      maxPositions: 131072,
      ropeTheta: 500000,
      ropeScaling: llama3Rope,
      tiedEmbeddings: false,
      qkvBias: false,
      outputBias: false,
      mlpBias: false,
      qkNorm: false,
      windows: [undefined, undefined, undefined, undefined],
      bosTokenId: 128000,
      eosTokenIds: [128001, 128008, 128009],
    });
  });

  it('in the style of Transformers 5', () => {
    const { rope_theta, rope_scaling, ...rest } = llama;
    expect(parseModelConfig({ ...rest, rope_parameters: { ...rope_scaling, rope_theta } })).toEqual(
      parseModelConfig(llama),
    );
  });

  it('defaults of old configs, biases, head size', () => {
    const { num_key_value_heads: _, rope_theta: __, ...old } = of('LlamaForCausalLM');
    expect(parseModelConfig(old)).toMatchObject({ kvHeads: 32, ropeTheta: 10000, ropeScaling: { type: 'default' } });
    expect(
      parseModelConfig(of('LlamaForCausalLM', { attention_bias: true, mlp_bias: true, head_dim: 64, eos_token_id: 2 })),
    ).toMatchObject({
      qkvBias: true,
      outputBias: true,
      mlpBias: true,
      headDim: 64,
      eosTokenIds: [2],
    });
    expect(parseModelConfig({ ...of('x'), architectures: undefined, model_type: 'llama' }).family).toBe('llama');
  });
});

describe('windows', () => {
  it('mistral: all layers or none', () => {
    expect(parseModelConfig(of('MistralForCausalLM', { sliding_window: 4096 })).windows).toEqual([
      4096, 4096, 4096, 4096,
    ]);
    expect(parseModelConfig(of('MistralForCausalLM', { sliding_window: null })).windows).toEqual(
      new Array(4).fill(undefined),
    );
    expect(parseModelConfig(of('MistralForCausalLM')).windows).toEqual([4096, 4096, 4096, 4096]);
  });

  it('qwen: only when asked for, by layer', () => {
    const fields = { sliding_window: 100, max_window_layers: 3 };
    expect(parseModelConfig(of('Qwen2ForCausalLM', { ...fields, use_sliding_window: false })).windows).toEqual(
      new Array(4).fill(undefined),
    );
    expect(parseModelConfig(of('Qwen2ForCausalLM', { ...fields, use_sliding_window: true })).windows).toEqual([
      undefined,
      undefined,
      undefined,
      100,
    ]);
    const layer_types = ['sliding_attention', 'full_attention', 'sliding_attention', 'full_attention'];
    expect(
      parseModelConfig(of('Qwen3ForCausalLM', { ...fields, use_sliding_window: true, layer_types })).windows,
    ).toEqual([100, undefined, 100, undefined]);
  });

  it('refuses other layer types', async () => {
    const layer_types = ['full_attention', 'linear_attention', 'full_attention', 'full_attention'];
    await expectError(
      () => parseModelConfig(of('Qwen3ForCausalLM', { layer_types })),
      'unsupported',
      /layer 1 is of type "linear_attention"/,
    );
    await expectError(
      () => parseModelConfig(of('Qwen3ForCausalLM', { layer_types: [] })),
      'config-invalid',
      /0 entries for 4 layers/,
    );
  });
});

it('qwen flags', () => {
  expect(parseModelConfig(of('Qwen2ForCausalLM'))).toMatchObject({
    qkvBias: true,
    outputBias: false,
    qkNorm: false,
    headDim: 128,
  });
  expect(parseModelConfig(of('Qwen3ForCausalLM', { hidden_size: 1024, num_attention_heads: 16 }))).toMatchObject({
    qkvBias: false,
    qkNorm: true,
    headDim: 128,
  });
});

describe('rope settings', () => {
  const rope = (rope_scaling: unknown): unknown =>
    parseModelConfig(of('LlamaForCausalLM', { rope_scaling })).ropeScaling;

  it('of every type, new and old spelling', () => {
    expect(rope({ type: 'linear', factor: 4 })).toEqual({ type: 'linear', factor: 4 });
    expect(rope({ rope_type: 'dynamic', factor: 2 })).toEqual({ type: 'dynamic', factor: 2 });
    expect(rope({ rope_type: 'default' })).toEqual({ type: 'default' });
    const yarn = { type: 'yarn', factor: 4, originalMaxPositions: 32768, betaFast: 32, betaSlow: 1, truncate: true };
    expect(rope({ type: 'yarn', factor: 4, original_max_position_embeddings: 32768 })).toEqual(yarn);
    expect(
      rope({
        rope_type: 'yarn',
        original_max_position_embeddings: 32768,
        attention_factor: 1.5,
        beta_fast: 16,
        truncate: false,
      }),
    ).toEqual({
      ...yarn,
      betaFast: 16,
      attentionFactor: 1.5,
      truncate: false,
    });
    const deepseek = rope({ rope_type: 'yarn', factor: 40, mscale: 1, mscale_all_dim: 1 });
    expect(deepseek).toMatchObject({ attentionFactor: 1, originalMaxPositions: 131072 });
  });

  it('that are wrong or unknown', async () => {
    await expectError(
      () => rope({ rope_type: 'longrope', factor: 4 }),
      'unsupported',
      /"longrope"/,
      /default, linear, dynamic, llama3, yarn/,
    );
    await expectError(() => rope({ type: 'linear' }), 'config-invalid', /needs factor/);
    await expectError(
      () => rope({ rope_type: 'llama3', factor: 8, low_freq_factor: 4, high_freq_factor: 4 }),
      'config-invalid',
      /high_freq_factor >/,
    );
    await expectError(() => rope({ rope_type: 'linear', factor: -1 }), 'config-invalid', /rope_scaling\.factor/);
    await expectError(
      () => parseModelConfig({ ...llama, partial_rotary_factor: 0.5 }),
      'unsupported',
      /partial_rotary_factor 0\.5/,
    );
  });
});

describe('configs that cannot be', () => {
  it.each([
    [{ num_key_value_heads: 5 }, /32 attention heads can't share 5/],
    [{ num_attention_heads: 3, num_key_value_heads: 3 }, /head size/],
    [{ head_dim: 127 }, /head size 127/],
    [{ vocab_size: 1e9 }, /vocab_size/],
    [{ vocab_size: 0 }, /vocab_size/],
    [{ hidden_size: '4096' }, /hidden_size/],
    [{ num_hidden_layers: 1e6 }, /num_hidden_layers/],
    [{ num_hidden_layers: undefined }, /num_hidden_layers/],
    [{ rms_norm_eps: -1 }, /rms_norm_eps/],
  ])('%j', async (change, message) => {
    await expectError(() => parseModelConfig({ ...llama, ...change }), 'config-invalid', message);
  });

  it('other architectures, activations, and no config at all', async () => {
    await expectError(
      () => parseModelConfig({ ...llama, architectures: ['GPT2LMHeadModel'] }),
      'unsupported',
      /"GPT2LMHeadModel"/,
      /LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM/,
    );
    await expectError(() => parseModelConfig({ ...llama, hidden_act: 'gelu' }), 'unsupported', /"gelu"/);
    await expectError(() => parseModelConfig([]), 'config-invalid', /whole file/);
    await expectError(() => parseModelConfig({}), 'unsupported', /architecture null/);
  });
});

it('names the tensors of a block', () => {
  expect(`${TENSOR_NAMES.block(3)}.${TENSOR_NAMES.groups.gateUp[1]}.weight`).toBe('model.layers.3.mlp.up_proj.weight');
});

describe('parity fixtures', () => {
  const folder = path.join(import.meta.dirname, '../fixtures/parity');
  const configs = existsSync(folder)
    ? readdirSync(folder).flatMap((name) =>
        ['config.json', 'config.v5.json']
          .map((file) => path.join(folder, name, file))
          .filter((file) => existsSync(file)),
      )
    : [];
  const read = (file: string): ReturnType<typeof parseModelConfig> =>
    parseModelConfig(JSON.parse(readFileSync(file, 'utf8')), file);
  it.skipIf(configs.length === 0)('all parse; both styles alike', () => {
    for (const file of configs) {
      const config = read(file);
      expect(config.windows).toHaveLength(config.layers);
      if (file.endsWith('config.v5.json')) expect(config).toEqual(read(file.replace('config.v5.json', 'config.json')));
    }
  });
});
