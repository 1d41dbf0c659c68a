// Decoding on the GPU: tokens per second of whole decoders at true shapes with random weights, AWQ against ParoQuant in one engine,
// interleaved; contexts, batches, and the time split by kernel. Writes its JSON after every part, so that a run cut short keeps what it has.
// Usage: tsx bench/webgpu-decode.ts [--shape Llama-3.1-8B,Qwen3-8B] [--parts step,contexts,batches] [--rounds 5] [--steps 128]
// [--seconds 300]: no part begins after that; the result names those left out. [--name webgpu-decode]
import { parseArgs } from 'node:util';
import { openWebGpuBackend } from '../src/backends/webgpu/index.js';
import { DecodePlan } from '../src/backends/webgpu/fast/plan.js';
import { copyBandwidth, timeDispatches } from './support/gpu.js';
import { RandomDecoder, SHAPES, type DecoderShape, type PlanKind } from './support/random-plan.js';
import { median, round, writeResult } from './support/results.js';

const { values: options } = parseArgs({
  options: {
    shape: { type: 'string', default: SHAPES.map((s) => s.name).join(',') },
    parts: { type: 'string', default: 'step,contexts,batches' },
    rounds: { type: 'string', default: '5' },
    steps: { type: 'string', default: '128' },
    seconds: { type: 'string', default: '600' },
    name: { type: 'string', default: 'webgpu-decode' },
  },
});
const began = performance.now();
const [rounds, steps, budget] = [options.rounds, options.steps, options.seconds].map(Number);
const backend = await openWebGpuBackend();
const { gpu } = backend;
// An idle GPU's clocks take a second to rise.
for (const end = performance.now() + 1500; performance.now() < end;) await copyBandwidth(gpu, 1 << 28);
const bandwidth = await copyBandwidth(gpu);
console.log(`${backend.info.description}, copy ${(bandwidth / 1e9).toFixed(0)} GB/s`);
/** Steps submitted at once; the next are submitted before the last ones' tokens are read. */
const AT_ONCE = 4;
const results: Record<string, unknown>[] = [];
const leftOut: string[] = [];

/** Tokens per second of several plans, steps interleaved in blocks. */
async function compare(
  shape: DecoderShape,
  decoder: RandomDecoder,
  kinds: readonly PlanKind[],
  batch: number,
  context: number,
): Promise<void> {
  const capacity = Math.ceil((context + steps + 64) / 256) * 256;
  const plans = kinds.map((kind) => {
    const model = decoder.model(kind, batch, capacity);
    return { kind, model, plan: new DecodePlan(gpu, model, { batch, capacity }), times: [] as number[] };
  });
  const tokens = new Uint32Array(batch).fill(11);
  const positions = new Uint32Array(batch).fill(context);
  const greedy = Array.from({ length: batch }, () => ({ temperature: 0 }));
  for (let roundIndex = -1; roundIndex < rounds; roundIndex++)
    for (const { plan, times } of plans) {
      plan.begin(tokens, positions, greedy);
      await plan.steps(1);
      const start = performance.now();
      // Submitted ahead of the tokens being read: the GPU never waits for the host.
      const pending: Promise<Uint32Array>[] = [];
      for (let i = 0; i < steps; i += AT_ONCE) {
        pending.push(plan.steps(AT_ONCE));
        if (pending.length > 1) await pending.shift();
      }
      await Promise.all(pending);
      if (roundIndex >= 0) times.push((performance.now() - start) / 1000 / steps);
    }
  const logits = await plans[0].plan.logits();
  if (!logits.every(Number.isFinite)) throw new Error('logits are not finite');
  // What the GPU alone needs, and what the host needs to submit a step.
  const gpuTimes = await timeDispatches(
    gpu,
    plans.map(({ kind, plan }) => ({ name: kind, dispatches: plan.dispatches })),
    { milliseconds: 20, rounds: 9 },
  );
  // What the host needs to submit a step, and steps submitted without reading tokens back.
  const encode: number[] = [];
  const unread: number[] = [];
  for (const { plan } of plans) {
    plan.begin(tokens, positions, greedy);
    await gpu.sync();
    const start = performance.now();
    for (let i = 0; i < 10; i++) plan.run();
    encode.push((performance.now() - start) / 10);
    for (let i = 0; i < 30; i++) plan.run();
    await gpu.sync();
    unread.push((performance.now() - start) / 40);
  }
  await gpu.sync();
  const base = median(plans[0].times);
  for (const [i, { kind, plan, times }] of plans.entries()) {
    const seconds = median(times);
    const line = {
      model: shape.name,
      kind,
      batch,
      context,
      tokensPerSecond: round(batch / seconds),
      millisecondsPerStep: round(seconds * 1e3),
      dispatches: plan.dispatches.length,
      gpuMilliseconds: round((gpuTimes.get(kind) ?? NaN) * plan.dispatches.length * 1e3),
      encodeMilliseconds: round(encode[i]),
      unreadMilliseconds: round(unread[i]),
      ofBandwidth: round(decoder.bytesPerToken / seconds / bandwidth),
      againstFirst: round(seconds / base),
    };
    results.push(line);
    console.log(
      `${shape.name.padEnd(13)} ${kind.padEnd(25)} batch ${batch} context ${context}: ${line.tokensPerSecond} tokens/s, ${line.millisecondsPerStep} ms, ${(100 * line.ofBandwidth).toFixed(0)}% of bandwidth, x${line.againstFirst} (${plan.dispatches.length} dispatches), GPU ${line.gpuMilliseconds} ms, encoding ${line.encodeMilliseconds} ms, unread ${line.unreadMilliseconds} ms`,
    );
  }
  if (batch === 1 && context === 512) {
    const { plan, kind } = plans[1] ?? plans[0];
    plan.begin(tokens, positions, greedy);
    gpu.startProfile();
    for (let i = 0; i < 4; i++) plan.run();
    const times = (await gpu.stopProfile()).slice(0, 12);
    const total = times.reduce((sum, t) => sum + t.seconds, 0);
    for (const t of times)
      console.log(
        `    ${t.name.padEnd(48)} ${((t.seconds / t.calls) * 1e6).toFixed(2).padStart(8)} us x ${t.calls / 4} = ${((t.seconds / 4) * 1e3).toFixed(3)} ms (${((100 * t.seconds) / total).toFixed(1)}%)`,
      );
    results.push({
      model: shape.name,
      kind,
      kernels: times.map((t) => ({ ...t, calls: t.calls / 4, seconds: t.seconds / 4 })),
    });
  }
  for (const { plan, model } of plans) {
    plan.release();
    decoder.releaseCaches(model);
  }
}

/** Steps of 1 to 32 sequences, batches in turn within each round, contexts growing alike: the time of 32 against the time of one. */
async function compareBatches(
  shape: DecoderShape,
  decoder: RandomDecoder,
  kind: PlanKind,
  context: number,
): Promise<void> {
  const few = Math.max(AT_ONCE, Math.ceil(steps / 4 / AT_ONCE) * AT_ONCE);
  const capacity = context + few + AT_ONCE;
  const plans = [1, 2, 4, 8, 16, 32].map((batch) => {
    const model = decoder.model(kind, batch, capacity);
    return { batch, model, plan: new DecodePlan(gpu, model, { batch, capacity }), times: [] as number[] };
  });
  for (let roundIndex = -1; roundIndex < rounds; roundIndex++)
    for (const { batch, plan, times } of plans) {
      const greedy = Array.from({ length: batch }, () => ({ temperature: 0 }));
      plan.begin(new Uint32Array(batch).fill(11), new Uint32Array(batch).fill(context), greedy);
      const start = performance.now();
      const pending: Promise<Uint32Array>[] = [];
      for (let i = 0; i < few; i += AT_ONCE) {
        pending.push(plan.steps(AT_ONCE));
        if (pending.length > 1) await pending.shift();
      }
      await Promise.all(pending);
      if (roundIndex >= 0) times.push((performance.now() - start) / 1000 / few);
    }
  const one = median(plans[0].times);
  for (const { batch, model, plan, times } of plans) {
    const logits = await plan.logits();
    if (!logits.every(Number.isFinite)) throw new Error('logits are not finite');
    const seconds = median(times);
    const line = {
      model: shape.name,
      kind,
      batch,
      context: `${context}-${context + few}`,
      tokensPerSecond: round(batch / seconds),
      millisecondsPerStep: round(seconds * 1e3),
      timesOfOne: round(seconds / one),
    };
    results.push(line);
    console.log(
      `${shape.name.padEnd(13)} ${kind.padEnd(25)} batch ${batch} context ${line.context}: ${line.tokensPerSecond} tokens/s, ${line.millisecondsPerStep} ms, ${line.timesOfOne} times one`,
    );
    plan.release();
    decoder.releaseCaches(model);
  }
}

/** What is measured of each shape. */
const PARTS: Readonly<Record<string, (shape: DecoderShape, decoder: RandomDecoder) => Promise<void>>> = {
  step: (shape, decoder) => {
    const kinds = ['awq', 'paroquant', ...(shape.name.endsWith('8B') ? (['paroquant-per-projection'] as const) : [])];
    return compare(shape, decoder, kinds as PlanKind[], 1, 512);
  },
  contexts: async (shape, decoder) => {
    for (const context of [4096, 32256]) await compare(shape, decoder, ['awq', 'paroquant'], 1, context);
  },
  batches: (shape, decoder) => compareBatches(shape, decoder, 'paroquant', 512),
};

const record = (): void =>
  writeResult(options.name, {
    gpu: backend.info.description,
    copyBytesPerSecond: bandwidth,
    results,
    ...(leftOut.length > 0 && { leftOut }),
  });
const shapes = options.shape.split(',');
for (const shape of SHAPES.filter(({ name }) => shapes.includes(name))) {
  let decoder: RandomDecoder | undefined;
  for (const [part, measure] of Object.entries(PARTS)) {
    if (!options.parts.split(',').includes(part)) continue;
    if ((performance.now() - began) / 1000 > budget) {
      leftOut.push(`${shape.name}: ${part}`);
      continue;
    }
    decoder ??= new RandomDecoder(gpu, shape, 33_000);
    await measure(shape, decoder);
    record();
  }
  decoder?.release();
}
record();
await backend.dispose();
