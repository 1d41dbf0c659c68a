// Training steps of paroquant-block on one decoder block of a model's true shapes, random weights: seconds per step of each
// stage and projected hours for the whole model with the published settings (2048 training sequences of 2048 tokens, batches
// of 16, 10 epochs per stage); memory of the host and of the GPU; with --profile the time of each kernel in a step.
// Run: npx tsx bench/block-step.ts [--shapes gyre-14m|qwen3-0.6b|qwen3-1.7b|llama-3.1-8b] [--length 512] [--batch 8]
//      [--steps 3, at least 2] [--device cpu|webgpu] [--precision f32|f16] [--stages both] [--profile] [--threads N] [--name block-step]
import path from 'node:path';
import { readFileSync } from 'node:fs';
import { parseArgs } from 'node:util';
import { openBackend, type BackendName } from '../src/backends/registry.js';
import type { WebGpuBackend } from '../src/backends/webgpu/index.js';
import { createRng } from '../src/core/rng.js';
import { hostTensor } from '../src/core/tensor.js';
import { BlockFrame } from '../src/models/block.js';
import { parseModelConfig } from '../src/models/families.js';
import { groupModules, groupShape } from '../src/models/load.js';
import { ropeTable } from '../src/models/rope.js';
import { paroquantBlock } from '../src/quant/recipes/paroquant-block.js';
import { perGroup } from '../src/quant/objectives/block.js';
import { BLOCK_DEFAULTS, type BlockSamples, type BlockSettings, type BlockTask } from '../src/quant/types.js';
import { SHAPES, type ShapeName } from './support/random-checkpoint.js';
import { median, round, writeResult } from './support/results.js';

const { values: options } = parseArgs({
  options: {
    shapes: { type: 'string', default: 'gyre-14m' },
    length: { type: 'string', default: '512' },
    batch: { type: 'string', default: '8' },
    steps: { type: 'string', default: '3' },
    device: { type: 'string', default: 'cpu' },
    precision: { type: 'string', default: 'f32' },
    stages: { type: 'string', default: 'both' },
    profile: { type: 'boolean', default: false },
    model: { type: 'string', default: path.join(import.meta.dirname, '../models/gyre-14m') },
    threads: { type: 'string' },
    name: { type: 'string', default: 'block-step' },
  },
});
const [length, batch, steps] = [options.length, options.batch, options.steps].map(Number);
/** The published run. */
const PUBLISHED = { sequences: 2048, length: 2048, epochs: 10, stages: 2 };

const raw = JSON.parse(readFileSync(path.join(options.model, 'config.json'), 'utf8')) as Record<string, unknown>;
const config =
  options.shapes === 'gyre-14m'
    ? parseModelConfig(raw, 'gyre-14m')
    : parseModelConfig(shaped(options.shapes), options.shapes);
const { hiddenSize, headDim } = config;
const threads = options.threads === undefined ? undefined : Number(options.threads);
const backend = await openBackend(options.device as BackendName, { threads });
const gpu = (backend as Partial<WebGpuBackend>).gpu;
const begun = performance.now();
const note = (what: string): void => console.log(`${((performance.now() - begun) / 1000).toFixed(1)} s: ${what}`);
const rng = createRng(0);
const table = Float32Array.from({ length: 65536 }, () => rng.normal());
/** Normal values from a table, at an offset of their own: a billion drawn one by one would take minutes. */
const normals = (count: number, scale: number): Float32Array => {
  const start = rng.int(0, 65536);
  const values = new Float32Array(count);
  for (let i = 0; i < count; i++) values[i] = scale * table[(start + 7919 * i) & 65535];
  return values;
};
const upload = (shape: readonly number[], data: Float32Array) => backend.upload(hostTensor('f32', shape, data));
const ones = (n: number) => upload([n], new Float32Array(n).fill(1));
const frame = new BlockFrame(backend, config, 0, {
  input: await ones(hiddenSize),
  postAttention: await ones(hiddenSize),
  ...(config.qkNorm && { q: await ones(headDim), k: await ones(headDim) }),
});
const { cos, sin, rotaryDim } = ropeTable(config, length);
/** Sequences as the pipeline keeps them in memory; a few, again and again. */
const kept = Array.from({ length: 4 }, () => normals(length * hiddenSize, 1));
const samples = (count: number): BlockSamples => ({
  count,
  read: async (indices) => {
    const read = (shift: number) => {
      const values = new Float32Array(indices.length * length * hiddenSize);
      for (const [i, index] of indices.entries()) values.set(kept[(index + shift) % 4], i * length * hiddenSize);
      return upload([indices.length * length, hiddenSize], values);
    };
    return { input: await read(0), target: await read(1) };
  },
});
const groups = await perGroup(async (group) => {
  const { inFeatures, outFeatures } = groupShape(config, group);
  return {
    names: groupModules(0, group),
    weights: outFeatures.map((out) => normals(out * inFeatures, inFeatures ** -0.5)),
    outFeatures,
    inFeatures,
    grid: { bits: 4, groupSize: 128 } as const,
  };
});
const weights = Object.values(groups).reduce((sum, g) => sum + g.weights.reduce((s, w) => s + w.length, 0), 0);

// The trainer tells each step as it ends: the times between two tellings of a stage are its steps.
// CPU seconds are taken beside wall seconds: on a machine shared with others only they say what a step costs.
const stamps = new Map<string, { wall: number; cpu: number }[]>();
const task: BlockTask = {
  layer: 0,
  fixed: { frame, biases: {} },
  groups,
  rope: await backend.loadRope(cos, sin, rotaryDim),
  length,
  training: samples(batch * (steps + 1)),
  validation: samples(1),
  settings: {
    method: paroquantBlock.name,
    bits: 4,
    groupSize: 128,
    krot: 8,
    scales: true,
    share: false,
    rounding: undefined,
    steps: 0,
    seed: 0,
    block: {
      ...BLOCK_DEFAULTS,
      epochs: 1,
      batch,
      precision: options.precision as BlockSettings['precision'],
      stages: options.stages as BlockSettings['stages'],
    },
  },
  finishedStage: () => Promise.resolve(undefined),
  keepStage: () => Promise.resolve(),
  tell: (message) => {
    const [stage] = message.split(':');
    const { user, system } = process.cpuUsage();
    const stamp = { wall: performance.now() / 1000, cpu: (user + system) / 1e6 };
    stamps.set(stage, [...(stamps.get(stage) ?? []), stamp]);
    note(message);
  },
  checkAborted: () => undefined,
};
let peak = 0;
let peakGpu = 0;
const watch = setInterval(() => {
  peak = Math.max(peak, process.memoryUsage().rss);
  peakGpu = Math.max(peakGpu, gpu?.allocatedBytes ?? 0);
}, 100);
note(`${weights / 1e6} million weights are made`);
if (options.profile) gpu?.startProfile();
await paroquantBlock.quantizeBlock(backend, task);
clearInterval(watch);
const kernels = options.profile && gpu ? await gpu.stopProfile() : undefined;
const kernelSeconds = kernels?.reduce((sum, k) => sum + k.seconds, 0) ?? 0;
for (const k of kernels?.slice(0, 24) ?? [])
  console.log(
    `${k.name.padEnd(44)} ${((k.seconds / k.calls) * 1e6).toFixed(1).padStart(9)} us x ${String(k.calls).padStart(5)} = ` +
      `${(k.seconds * 1e3).toFixed(1).padStart(9)} ms (${((k.seconds / kernelSeconds) * 100).toFixed(1)}%)`,
  );
const tokens = batch * length;
const stages = Object.fromEntries(
  [...stamps].map(([stage, times]) => {
    // A step is told of when the next is submitted, the last one at once: the interval before it is none.
    const between = (of: 'wall' | 'cpu') => median(times.slice(1, -1).map((t, i) => t[of] - times[i][of]));
    const [seconds, cpuSeconds] = [between('wall'), between('cpu')];
    // Forward, gradient of inputs, gradient of weights; attention and transforms are not counted.
    const operations = 6 * weights * tokens;
    return [
      stage,
      {
        secondsPerStep: round(seconds),
        gflops: round(operations / seconds / 1e9),
        cpuSecondsPerStep: round(cpuSeconds),
        gflopsPerCpuSecond: round(operations / cpuSeconds / 1e9),
      },
    ];
  }),
);
const measured = Object.values(stages);
const perToken = measured.reduce((sum, { secondsPerStep }) => sum + secondsPerStep / tokens, 0) / measured.length;
const { sequences, epochs } = PUBLISHED;
const hours = (perToken * sequences * PUBLISHED.length * epochs * PUBLISHED.stages * config.layers) / 3600;
const result = {
  shapes: options.shapes,
  backend: backend.info,
  weightsPerBlock: weights,
  batch,
  length,
  stages,
  projectedHours: round(hours),
  peakMemoryGB: round(peak / 1e9),
  ...(gpu && { peakGpuMemoryGB: round(peakGpu / 1e9) }),
  precision: options.precision,
};
console.log(JSON.stringify(result, null, 2));
writeResult(options.name, result);
await backend.dispose();

/** A Qwen3-style config with the shapes of a published model. */
function shaped(name: string): Record<string, unknown> {
  if (!(name in SHAPES))
    throw new Error(`unknown shapes '${name}'; there are gyre-14m, ${Object.keys(SHAPES).join(', ')}`);
  const { hidden, intermediate, layers, heads, kvHeads, headDim: dim, vocab } = SHAPES[name as ShapeName];
  return {
    ...raw,
    hidden_size: hidden,
    intermediate_size: intermediate,
    num_hidden_layers: layers,
    max_window_layers: layers,
    num_attention_heads: heads,
    num_key_value_heads: kvHeads,
    head_dim: dim,
    vocab_size: vocab,
    max_position_embeddings: 32768,
  };
}
