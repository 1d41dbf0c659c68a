// A decoder with a published model's shapes and random 4-bit weights, for measuring decoding speed without a checkpoint.
import { f32ToBf16Bits, roundToF16, toFloat32 } from '../../src/core/dtype.js';
import { createRng, type Rng } from '../../src/core/rng.js';
import { BlockFrame, DecoderBlock, GROUP_NAMES, type GroupName } from '../../src/models/block.js';
import type { ModelConfig } from '../../src/models/config.js';
import { Decoder } from '../../src/models/decoder.js';
import { parseModelConfig } from '../../src/models/families.js';
import { LinearGroup, type LinearPart } from '../../src/models/linear-group.js';
import { groupShape } from '../../src/models/load.js';
import { roundRows } from '../../src/models/round.js';
import type { Backend, PairwiseTransform, QuantizedWeight } from '../../src/ops/backend.js';
import { randomPairs, roundTransform } from '../../src/transforms/index.js';
import { SHAPES, type ShapeName } from './random-checkpoint.js';

/** Layouts of the 4-bit weights: without rotations, one transform per linear group, one per linear. */
export type DecodeVariant = 'awq' | 'shared' | 'separate';

function configOf(name: ShapeName): ModelConfig {
  const shape = SHAPES[name];
  return parseModelConfig({
    architectures: ['Qwen3ForCausalLM'],
    model_type: 'qwen3',
    hidden_size: shape.hidden,
    intermediate_size: shape.intermediate,
    num_hidden_layers: shape.layers,
    num_attention_heads: shape.heads,
    num_key_value_heads: shape.kvHeads,
    head_dim: shape.headDim,
    vocab_size: shape.vocab,
    max_position_embeddings: 40960,
    rope_theta: 1000000,
    rms_norm_eps: 1e-6,
    tie_word_embeddings: shape.tied,
  });
}

function randomWeight(rng: Rng, inFeatures: number, outFeatures: number): QuantizedWeight {
  const groups = (inFeatures / 128) * outFeatures;
  const codes = new Uint8Array(inFeatures * outFeatures);
  const words = new Uint32Array(codes.buffer);
  for (let i = 0; i < words.length; i++) words[i] = rng.nextUint32() & 0x0f0f0f0f;
  const scale = roundToF16((0.25 * inFeatures ** -0.5) / 4);
  return {
    bits: 4,
    groupSize: 128,
    inFeatures,
    outFeatures,
    codes,
    zeros: new Uint8Array(groups).fill(8),
    scales: new Float32Array(groups).fill(scale),
  };
}

function randomTransform(rng: Rng, channels: number): PairwiseTransform {
  const layout = { channels, groupSize: 128, krot: 8, pairs: randomPairs(channels, 128, 8, rng) };
  const theta = Float64Array.from({ length: (8 * channels) / 2 }, () => rng.normal() * 0.3);
  return roundTransform(
    layout,
    theta,
    Float64Array.from({ length: channels }, () => Math.exp(0.1 * rng.normal())),
  );
}

/** Groups of 128, norms of ones, a tied embedding in bf16 and a head in `headBits` bits; the same weights in every variant. */
export async function buildDecoder(
  backend: Backend,
  name: ShapeName,
  variant: DecodeVariant,
  headBits: 8 | 16,
): Promise<Decoder> {
  const config = configOf(name);
  const rng = createRng(5);
  const ones = (n: number) => backend.upload({ dtype: 'f32', shape: [n], data: new Float32Array(n).fill(1) });
  const blocks: DecoderBlock[] = [];
  for (let layer = 0; layer < config.layers; layer++) {
    const groups = {} as Record<GroupName, LinearGroup>;
    for (const group of GROUP_NAMES) {
      const { inFeatures, outFeatures } = groupShape(config, group);
      const shared = randomTransform(rng, inFeatures);
      const parts: LinearPart[] = outFeatures.map((out) => ({
        source: { kind: 'quantized', weight: randomWeight(rng, inFeatures, out) },
        transform: variant === 'awq' ? undefined : variant === 'shared' ? shared : randomTransform(rng, inFeatures),
      }));
      groups[group] = await LinearGroup.load(backend, parts);
    }
    const norms = {
      input: await ones(config.hiddenSize),
      postAttention: await ones(config.hiddenSize),
      q: await ones(config.headDim),
      k: await ones(config.headDim),
    };
    blocks.push(new DecoderBlock(new BlockFrame(backend, config, layer, norms), groups));
  }
  const table = new Uint16Array(config.vocabSize * config.hiddenSize);
  for (let i = 0; i < table.length; i++) table[i] = f32ToBf16Bits(((i * 2654435761) % 1000) / 25000 - 0.02);
  const shapeOf = [config.vocabSize, config.hiddenSize];
  const embedding = await backend.loadLinear({ kind: 'dense', weight: { dtype: 'bf16', shape: shapeOf, data: table } });
  let head = embedding;
  if (headBits === 8) {
    const dense = toFloat32(table, 'bf16');
    const weight = roundRows(dense, config.vocabSize, config.hiddenSize, { bits: 8, groupSize: 128 });
    if (!weight) throw new Error('head does not divide into groups');
    head = await backend.loadLinear({ kind: 'quantized', weight });
  }
  return new Decoder(backend, config, { embedding, head, finalNorm: await ones(config.hiddenSize), blocks });
}
