// Decode speed at a published model's shapes: AWQ layout (no rotations) against shared ParoQuant transforms in the same
// engine, interleaved, batch 1; against the memory bandwidth measured in the same run.
// Prediction and outcome: docs/log.md. Run: npx tsx bench/cpu-decode.ts [qwen3-0.6b] [context]
import { openBackend } from '../src/backends/registry.js';
import { f32ToBf16Bits, roundToF16, toFloat32 } from '../src/core/dtype.js';
import { createRng, type Rng } from '../src/core/rng.js';
import { BlockFrame, DecoderBlock, GROUP_NAMES, type GroupName } from '../src/models/block.js';
import { Decoder } from '../src/models/decoder.js';
import { parseModelConfig } from '../src/models/families.js';
import { LinearGroup, type LinearPart } from '../src/models/linear-group.js';
import { groupShape } from '../src/models/load.js';
import { roundRows } from '../src/models/round.js';
import type { Backend, PairwiseTransform, QuantizedWeight } from '../src/ops/backend.js';
import { randomPairs, roundTransform } from '../src/transforms/index.js';
import { measureReadBandwidth } from './support/bandwidth.js';
import { SHAPES, type ShapeName } from './support/random-checkpoint.js';
import { median, round, writeResult } from './support/results.js';

const name = (process.argv[2] ?? 'qwen3-0.6b') as ShapeName;
const context = Number(process.argv[3] ?? 128);
const steps = Number(process.env.STEPS ?? 12);
const rounds = Number(process.env.ROUNDS ?? 5);
const shape = SHAPES[name];
const config = parseModelConfig({
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

/** Frames and embeddings are shared by all variants; linears differ. */
async function build(backend: Backend, variant: 'awq' | 'shared' | 'separate', headBits: 8 | 16): Promise<Decoder> {
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

const backend = await openBackend('cpu');
const variants = (process.env.VARIANTS ?? 'awq,shared').split(',') as ('awq' | 'shared' | 'separate')[];
const headBits = Number(process.env.HEAD ?? 8) as 8 | 16;
const decoders = new Map<string, Decoder>();
for (const variant of variants) decoders.set(variant, await build(backend, variant, headBits));
const bandwidth = await measureReadBandwidth();
const times = new Map<string, number[]>();
const logitsAt: Record<string, number> = {};
for (let r = 0; r < rounds; r++) {
  for (const [variant, decoder] of decoders) {
    const cache = await decoder.createCache(1, context + steps + 2);
    await decoder.hidden(
      Int32Array.from({ length: context }, (_, i) => (i * 37) % 1000),
      { cache },
    );
    for (let s = 0; s < steps; s++) {
      const start = performance.now();
      const hidden = await decoder.hidden(Int32Array.of(s), { cache });
      const logits = await backend.download(await decoder.logits(hidden));
      const seconds = (performance.now() - start) / 1000;
      logitsAt[variant] = logits[0];
      if (s > 0) times.set(variant, [...(times.get(variant) ?? []), seconds]);
    }
    decoder.releaseCache(cache);
  }
}
const rows = [...decoders].map(([variant, decoder]) => {
  const seconds = median(times.get(variant) ?? []);
  const bound = (bandwidth * 1e9) / decoder.bytesPerToken;
  return {
    variant,
    tokensPerSecond: round(1 / seconds),
    millisecondsPerToken: round(seconds * 1000),
    megabytesPerToken: round(decoder.bytesPerToken / 1e6),
    bandwidthBoundTokensPerSecond: round(bound),
    shareOfBandwidth: round(1 / seconds / bound),
  };
});
const [base, ...others] = rows;
const ratios = others.map((row) => ({
  variant: row.variant,
  slowerThanAwq: round(row.millisecondsPerToken / base.millisecondsPerToken - 1),
}));
console.table(rows);
console.table(ratios);
writeResult(`cpu-decode-head${headBits}`, {
  model: name,
  context,
  headBits,
  readBandwidthGBs: round(bandwidth),
  rows,
  ratios,
});
await backend.dispose();
