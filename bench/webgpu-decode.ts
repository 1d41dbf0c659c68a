// Decoding on the GPU: tokens per second of whole decoders at true shapes with random weights, AWQ against ParoQuant in one engine,
// interleaved; contexts, batches, and the time split by kernel. Usage: tsx bench/webgpu-decode.ts [--quick]
import { openWebGpuBackend } from '../src/backends/webgpu/index.js';
import { DecodePlan } from '../src/backends/webgpu/fast/plan.js';
import { copyBandwidth, timeDispatches } from './support/gpu.js';
import { RandomDecoder, SHAPES, type DecoderShape, type PlanKind } from './support/random-plan.js';
import { median, round, writeResult } from './support/results.js';

const quick = process.argv.includes('--quick');
const only = process.argv.includes('--shape') ? process.argv[process.argv.indexOf('--shape') + 1] : undefined;
const backend = await openWebGpuBackend();
const { gpu } = backend;
for (const end = performance.now() + 1000; performance.now() < end;) await copyBandwidth(gpu, 1 << 28);
const bandwidth = await copyBandwidth(gpu);
console.log(`${backend.info.description}, copy ${(bandwidth / 1e9).toFixed(0)} GB/s`);
/** Steps submitted at once; the next are submitted before the last ones' tokens are read. */
const AT_ONCE = 4;
const results: Record<string, unknown>[] = [];

/** Tokens per second of several plans, steps interleaved in blocks. */
async function compare(
  shape: DecoderShape,
  decoder: RandomDecoder,
  kinds: readonly PlanKind[],
  batch: number,
  context: number,
): Promise<void> {
  const capacity = Math.ceil((context + 512) / 256) * 256;
  const plans = kinds.map((kind) => {
    const model = decoder.model(kind, batch, capacity);
    return { kind, model, plan: new DecodePlan(gpu, model, { batch, capacity }), times: [] as number[] };
  });
  const tokens = new Uint32Array(batch).fill(11);
  const positions = new Uint32Array(batch).fill(context);
  const greedy = Array.from({ length: batch }, () => ({ temperature: 0 }));
  const steps = quick ? 128 : 256;
  for (let roundIndex = -1; roundIndex < (quick ? 3 : 5); roundIndex++)
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
    { milliseconds: 20, rounds: 3 },
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
  const steps = quick ? 64 : 256;
  const capacity = context + steps + AT_ONCE;
  const plans = [1, 2, 4, 8, 16, 32].map((batch) => {
    const model = decoder.model(kind, batch, capacity);
    return { batch, model, plan: new DecodePlan(gpu, model, { batch, capacity }), times: [] as number[] };
  });
  for (let roundIndex = -1; roundIndex < (quick ? 3 : 5); roundIndex++)
    for (const { batch, plan, times } of plans) {
      const greedy = Array.from({ length: batch }, () => ({ temperature: 0 }));
      plan.begin(new Uint32Array(batch).fill(11), new Uint32Array(batch).fill(context), greedy);
      const start = performance.now();
      const pending: Promise<Uint32Array>[] = [];
      for (let i = 0; i < steps; i += AT_ONCE) {
        pending.push(plan.steps(AT_ONCE));
        if (pending.length > 1) await pending.shift();
      }
      await Promise.all(pending);
      if (roundIndex >= 0) times.push((performance.now() - start) / 1000 / steps);
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
      context: `${context}-${context + steps}`,
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

for (const shape of SHAPES.filter((s) => !only || s.name === only)) {
  const decoder = new RandomDecoder(gpu, shape, 33_000);
  const main = shape.name.endsWith('8B');
  await compare(shape, decoder, ['awq', 'paroquant', ...(main ? (['paroquant-per-projection'] as const) : [])], 1, 512);
  if (!quick) {
    await compare(shape, decoder, ['awq', 'paroquant'], 1, 4096);
    await compare(shape, decoder, ['awq', 'paroquant'], 1, 32256);
    await compareBatches(shape, decoder, 'paroquant', 512);
  }
}
writeResult('webgpu-decode', { gpu: backend.info.description, copyBytesPerSecond: bandwidth, results });
await backend.dispose();
