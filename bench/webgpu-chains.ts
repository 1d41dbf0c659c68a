// Many chains at once on a GPU: the time of 32 chains against the time of one, the whole way through continuous batching (prompts
// included), at a published model's shapes with random 4-bit weights. Batches take turns within each round; medians of rounds.
// Run: npx tsx bench/webgpu-chains.ts [--shape qwen3-0.6b] [--chains 1,8,32] [--prompt 64] [--tokens 512] [--rounds 3]
import { parseArgs } from 'node:util';
import { openWebGpuBackend } from '../src/backends/webgpu/index.js';
import { createRng } from '../src/core/rng.js';
import { generateContinuously, type ContinuousRequest } from '../src/generate/index.js';
import { buildDecoder, type DecodeVariant } from './support/decode-model.js';
import type { ShapeName } from './support/random-checkpoint.js';
import { median, round, writeResult } from './support/results.js';

const { values: options } = parseArgs({
  options: {
    shape: { type: 'string', default: 'qwen3-0.6b' },
    variant: { type: 'string', default: 'shared' },
    chains: { type: 'string', default: '1,2,4,8,16,32' },
    prompt: { type: 'string', default: '64' },
    tokens: { type: 'string', default: '512' },
    rounds: { type: 'string', default: '3' },
    temperature: { type: 'string', default: '0.6' },
  },
});
const [prompt, tokens, rounds] = [options.prompt, options.tokens, options.rounds].map(Number);
const counts = options.chains.split(',').map(Number);
const rng = createRng(1);
const backend = await openWebGpuBackend();
console.log(backend.info.description);
const decoder = await buildDecoder(backend, options.shape as ShapeName, options.variant as DecodeVariant, 16);
const { vocabSize } = decoder.config;
const requests: ContinuousRequest[] = Array.from({ length: Math.max(...counts) }, (_, stream) => ({
  prompt: Int32Array.from({ length: prompt }, () => rng.int(0, vocabSize)),
  maxTokens: tokens,
  stream,
}));
const sampling = { temperature: Number(options.temperature), topP: 0.95, topK: 20, stopIds: [] };
const seconds = new Map<number, number[]>(counts.map((count) => [count, []]));
// The first round compiles kernels.
for (let i = -1; i < rounds; i++)
  for (const count of counts) {
    const { generatedTokens, ...summary } = await generateContinuously(decoder, requests.slice(0, count), sampling);
    if (generatedTokens !== count * tokens) throw new Error(`${generatedTokens} tokens of ${count} chains`);
    if (i >= 0) seconds.get(count)?.push(summary.seconds);
  }
const one = median(seconds.get(counts[0]) ?? []);
const results = counts.map((chains) => {
  const times = seconds.get(chains) ?? [];
  const middle = median(times);
  const line = {
    chains,
    seconds: round(middle),
    rounds: times.map(round),
    tokensPerSecond: round((chains * tokens) / middle),
    timesOfOne: round(middle / (one / counts[0])),
  };
  console.log(
    `${chains} chains of ${prompt} + ${tokens} tokens: ${line.seconds} s, ${line.tokensPerSecond} tokens/s, ${line.timesOfOne} times one`,
  );
  return line;
});
const { shape, variant } = options;
writeResult('webgpu-chains', { gpu: backend.info.description, shape, variant, prompt, tokens, sampling, results });
decoder.release();
await backend.dispose();
