// A decoder at a published model's shapes on the general path (Decoder over the ops), with random weights made in GPU memory: for
// timing prefill and evaluation, not for talking.
import { GpuLinear } from '../../src/backends/webgpu/linear.js';
import { elementGroups } from '../../src/backends/webgpu/tensor.js';
import { defineKernel, write } from '../../src/backends/webgpu/kernel.js';
import type { WebGpuBackend } from '../../src/backends/webgpu/index.js';
import { f32ToBf16Bits, f32ToF16Bits } from '../../src/core/dtype.js';
import { createRng } from '../../src/core/rng.js';
import { BlockFrame, DecoderBlock, GROUP_NAMES, type GroupName } from '../../src/models/block.js';
import { Decoder } from '../../src/models/decoder.js';
import { parseModelConfig } from '../../src/models/families.js';
import { LinearGroup } from '../../src/models/linear-group.js';
import { groupShape } from '../../src/models/load.js';
import type {
  Backend,
  InputTransform,
  LinearHandle,
  PairwiseTransform,
  TransformHandle,
} from '../../src/ops/backend.js';
import { hadamardTransform, xorPairs } from '../../src/transforms/index.js';
import type { DecoderShape } from './random-plan.js';

/**
 * Weights of the blocks: 4 bits with a rotation per linear group, 4 bits alone, or 16 bits; SmoothRot's online transforms before o and
 * down with a grid per output, and with 8-bit activations, keys and values on top.
 */
export type DecoderKind = 'paroquant' | 'awq' | 'f16' | 'smoothrot' | 'smoothrot-a8' | 'smoothrot-a8-kv8';

/** Groups whose input takes a Hadamard transform online: channels between neighbours of its axis. */
const ONLINE_INNER: Partial<Record<GroupName, (headDim: number) => number>> = {
  o: (headDim) => headDim,
  down: () => 1,
};

/** Random words: codes as they fall, or pairs of 16-bit floats of random sign around `magnitude` (bits). */
const fillKernel = defineKernel({
  name: 'bench.fill',
  buffers: { out: write('u32') },
  params: { count: 'u32', seed: 'u32', kept: 'u32', added: 'u32' },
  body: /* wgsl */ `
@compute @workgroup_size(256)
fn main(@builtin(global_invocation_id) id: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>) {
  let stride = groups.x * 256u;
  for (var i = id.x; i < params.count; i += stride) {
    var x = (i + params.seed) * 747796405u + 2891336453u;
    x = ((x >> ((x >> 28u) + 4u)) ^ x) * 277803737u;
    out[i] = (((x >> 22u) ^ x) & params.kept) | params.added;
  }
}`,
});

/** Makes decoders that share the device. */
export function randomDecoder(
  backend: WebGpuBackend,
  shape: DecoderShape,
  kind: DecoderKind,
  context: number,
): Promise<Decoder> {
  const { gpu } = backend;
  let seed = 1;
  const fill = (buffer: GPUBuffer, bytes: number, kept: number, added: number): void =>
    gpu.dispatch(
      fillKernel,
      { out: buffer },
      { count: bytes / 4, seed: (seed += 7919), kept, added },
      elementGroups(bytes / 4),
    );
  const online = kind.startsWith('smoothrot');
  const rounds = kind.startsWith('smoothrot-a8');
  const linear = (inFeatures: number, outFeatures: number, type: 'int4' | 'f16' | 'bf16'): LinearHandle => {
    // Outputs about as large as inputs: weights of 1 / √in, codes around 8 have a spread of 4.6.
    const size = inFeatures ** -0.5;
    if (type === 'int4') {
      const groupSize = online ? inFeatures : 128;
      const made = new GpuLinear(gpu, { inFeatures, outFeatures, groupSize }, { kind: 'int', bits: 4 }, undefined);
      if (rounds) made.activations = { bits: 8, symmetric: true, groupSize: -1, clip: 1 };
      if (rounds && gpu.capabilities.integerDot) made.integers = 4;
      fill(made.weights, 4 * outFeatures * made.wordsPerRow, 0xffffffff, 0);
      if (made.grids) fill(made.grids, 4 * outFeatures * made.groupsPerRow, 0, f32ToF16Bits(size / 4.6) | (8 << 16));
      return made;
    }
    const made = new GpuLinear(gpu, { inFeatures, outFeatures }, { kind: type }, undefined);
    const half = type === 'f16' ? f32ToF16Bits(size) : f32ToBf16Bits(size);
    // Random signs and fractions.
    const mask = type === 'f16' ? 0x83ff : 0x807f;
    fill(made.weights, 4 * outFeatures * made.wordsPerRow, mask * 0x10001, (half & ~mask) * 0x10001);
    return made;
  };
  return build(backend, shape, kind, context, linear);
}

async function build(
  backend: WebGpuBackend,
  shape: DecoderShape,
  kind: DecoderKind,
  context: number,
  linear: (inFeatures: number, outFeatures: number, type: 'int4' | 'f16' | 'bf16') => LinearHandle,
): Promise<Decoder> {
  const config = parseModelConfig({
    architectures: [shape.qkNorm ? 'Qwen3ForCausalLM' : 'LlamaForCausalLM'],
    model_type: shape.qkNorm ? 'qwen3' : 'llama',
    hidden_size: shape.hidden,
    intermediate_size: shape.intermediate,
    num_hidden_layers: shape.layers,
    num_attention_heads: shape.heads,
    num_key_value_heads: shape.kvHeads,
    head_dim: shape.headDim,
    vocab_size: shape.vocab,
    max_position_embeddings: context,
    rope_theta: 500000,
    rms_norm_eps: 1e-5,
    tie_word_embeddings: false,
  });
  const ones = (n: number) => backend.upload({ dtype: 'f32', shape: [n], data: new Float32Array(n).fill(1) });
  const rng = createRng(3);
  // One transform per kind of group, shared by all blocks: made once, and read from memory all the same.
  const transforms = new Map<number, TransformHandle>();
  const transformOf = async (channels: number): Promise<TransformHandle> => {
    const known = transforms.get(channels) ?? (await backend.loadTransform(randomTransform(channels, rng)));
    transforms.set(channels, known);
    return known;
  };
  // Groups load through a backend whose weights are made up instead of read.
  const making = Object.assign(Object.create(null) as Backend, backend, {
    loadLinear: (source: { weight: { inFeatures: number; outFeatures: number } }) =>
      Promise.resolve(linear(source.weight.inFeatures, source.weight.outFeatures, kind === 'f16' ? 'f16' : 'int4')),
    loadTransform: (transform: InputTransform) =>
      transform.kind === 'hadamard' ? backend.loadTransform(transform) : transformOf(transform.channels),
  } as unknown as Partial<Backend>);
  const kvGrid = kind === 'smoothrot-a8-kv8' ? { bits: 8 as const, clip: 1 } : undefined;
  const blocks: DecoderBlock[] = [];
  for (let layer = 0; layer < config.layers; layer++) {
    const groups = {} as Record<GroupName, LinearGroup>;
    for (const name of GROUP_NAMES) {
      const { inFeatures, outFeatures } = groupShape(config, name);
      const weight = { inFeatures, outFeatures: outFeatures.reduce((a, b) => a + b, 0) };
      const source = { kind: 'quantized', weight } as unknown as { kind: 'quantized'; weight: never };
      const transform = { channels: inFeatures } as PairwiseTransform;
      const inner = ONLINE_INNER[name]?.(config.headDim);
      const before = kind.startsWith('smoothrot') && inner ? hadamardTransform(inFeatures, { inner }) : undefined;
      groups[name] = await LinearGroup.load(making, [{ source, ...(kind === 'paroquant' && { transform }) }], {
        before,
      });
    }
    const norms = {
      input: await ones(config.hiddenSize),
      postAttention: await ones(config.hiddenSize),
      ...(shape.qkNorm && { q: await ones(config.headDim), k: await ones(config.headDim) }),
    };
    const heads = kvGrid && { kv: kvGrid, transform: await backend.loadTransform(hadamardTransform(config.headDim)) };
    blocks.push(new DecoderBlock(new BlockFrame(backend, config, layer, norms, heads), groups));
  }
  const embedding = linear(config.hiddenSize, config.vocabSize, 'bf16');
  const finalNorm = await ones(config.hiddenSize);
  return new Decoder(backend, config, { embedding, head: embedding, finalNorm, blocks, ...(kvGrid && { kvGrid }) });
}

function randomTransform(channels: number, rng: ReturnType<typeof createRng>): PairwiseTransform {
  const [groupSize, krot] = [128, 8];
  return {
    channels,
    groupSize,
    krot,
    pairs: xorPairs(channels, groupSize, krot, rng),
    theta: new Float32Array((krot * channels) / 2).map(() => 0.3 * rng.normal()),
    channelScales: new Float32Array(channels).map(() => Math.exp(0.1 * rng.normal())),
  };
}
