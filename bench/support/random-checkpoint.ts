// Writes a checkpoint with the true shapes of a published model and random weights with outlier channels, so that time and
// memory can be measured where no model can be downloaded.
import { copyFile, mkdir, stat, writeFile } from 'node:fs/promises';
import path from 'node:path';
import { f32ToBf16Bits } from '../../src/core/dtype.js';
import { createRng } from '../../src/core/rng.js';
import type { TensorEntry } from '../../src/formats/safetensors-writer.js';
import { writeSafetensors } from '../../src/formats/safetensors-writer.node.js';

/** Shapes of published models. */
export const SHAPES = {
  'qwen3-0.6b': {
    hidden: 1024,
    intermediate: 3072,
    layers: 28,
    heads: 16,
    kvHeads: 8,
    headDim: 128,
    vocab: 151936,
    tied: true,
  },
  'qwen3-1.7b': {
    hidden: 2048,
    intermediate: 6144,
    layers: 28,
    heads: 16,
    kvHeads: 8,
    headDim: 128,
    vocab: 151936,
    tied: true,
  },
  /** With the bundled tokenizer's vocabulary: embeddings and head are not what is timed. */
  'llama-3.1-8b': {
    hidden: 4096,
    intermediate: 14336,
    layers: 32,
    heads: 32,
    kvHeads: 8,
    headDim: 128,
    vocab: 4096,
    tied: true,
  },
} as const;
export type ShapeName = keyof typeof SHAPES;

const TOKENIZER = path.join(import.meta.dirname, '../../models/gyre-14m');

/** A normal table sampled by a fast generator: making half a billion normals one by one would take a minute. */
function bf16Normals(count: number, scale: number, channels: number, seed: number): Uint16Array {
  const rng = createRng(seed);
  const table = Float32Array.from({ length: 65536 }, () => rng.normal());
  // Log-normal channel magnitudes with a few outliers, as trained weights have.
  const channel = Float32Array.from(
    { length: channels },
    () => scale * Math.exp(0.3 * rng.normal()) * (rng.uniform() < 0.005 ? 6 : 1),
  );
  const out = new Uint16Array(count);
  let state = (seed * 2654435761 + 1) >>> 0;
  for (let i = 0; i < count; i++) {
    state ^= state << 13;
    state ^= state >>> 17;
    state ^= state << 5;
    out[i] = f32ToBf16Bits(table[state & 0xffff] * channel[i % channels]);
  }
  return out;
}

/** Makes the checkpoint in `folder` unless it is there. `layers` shortens the model. */
export async function makeRandomCheckpoint(
  folder: string,
  name: ShapeName,
  layers: number = SHAPES[name].layers,
): Promise<void> {
  if (await stat(path.join(folder, 'model.safetensors')).catch(() => undefined)) return;
  const { hidden, intermediate, heads, kvHeads, headDim, vocab, tied } = SHAPES[name];
  await mkdir(folder, { recursive: true });
  const entries: TensorEntry[] = [];
  let seed = 1;
  const matrix = (tensor: string, out: number, inside: number, scale: number): void => {
    const own = seed++;
    entries.push({
      name: tensor,
      dtype: 'bf16',
      shape: [out, inside],
      data: () => bf16Normals(out * inside, scale, inside, own),
    });
  };
  const norm = (tensor: string, size: number): void => {
    entries.push({
      name: tensor,
      dtype: 'bf16',
      shape: [size],
      data: () => new Uint16Array(size).fill(f32ToBf16Bits(1)),
    });
  };
  matrix('model.embed_tokens.weight', vocab, hidden, 0.02);
  for (let i = 0; i < layers; i++) {
    const p = `model.layers.${i}`;
    norm(`${p}.input_layernorm.weight`, hidden);
    norm(`${p}.post_attention_layernorm.weight`, hidden);
    norm(`${p}.self_attn.q_norm.weight`, headDim);
    norm(`${p}.self_attn.k_norm.weight`, headDim);
    matrix(`${p}.self_attn.q_proj.weight`, heads * headDim, hidden, hidden ** -0.5);
    matrix(`${p}.self_attn.k_proj.weight`, kvHeads * headDim, hidden, hidden ** -0.5);
    matrix(`${p}.self_attn.v_proj.weight`, kvHeads * headDim, hidden, hidden ** -0.5);
    matrix(`${p}.self_attn.o_proj.weight`, hidden, heads * headDim, 0.3 * (heads * headDim) ** -0.5);
    matrix(`${p}.mlp.gate_proj.weight`, intermediate, hidden, hidden ** -0.5);
    matrix(`${p}.mlp.up_proj.weight`, intermediate, hidden, hidden ** -0.5);
    matrix(`${p}.mlp.down_proj.weight`, hidden, intermediate, 0.3 * intermediate ** -0.5);
  }
  norm('model.norm.weight', hidden);
  if (!tied) matrix('lm_head.weight', vocab, hidden, 0.02);
  for (const file of ['tokenizer.json', 'tokenizer_config.json'])
    await copyFile(path.join(TOKENIZER, file), path.join(folder, file));
  const config = {
    architectures: ['Qwen3ForCausalLM'],
    model_type: 'qwen3',
    hidden_size: hidden,
    intermediate_size: intermediate,
    num_hidden_layers: layers,
    num_attention_heads: heads,
    num_key_value_heads: kvHeads,
    head_dim: headDim,
    vocab_size: vocab,
    max_position_embeddings: 40960,
    rope_theta: 1000000,
    rms_norm_eps: 1e-6,
    tie_word_embeddings: tied,
    attention_bias: false,
    hidden_act: 'silu',
    torch_dtype: 'bfloat16',
  };
  await writeFile(path.join(folder, 'config.json'), JSON.stringify(config, null, 2));
  await writeSafetensors(path.join(folder, 'model.safetensors'), entries);
}
