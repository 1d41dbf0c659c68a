// Decode speed at a published model's shapes: AWQ layout (no rotations) against shared ParoQuant transforms in the same
// engine, batch 1, against the streaming bandwidth. Each round measures the bandwidth and every variant in turn; figures are
// medians over rounds and the best token. With BREAKDOWN=1 also the time spent in each op: the least of all tokens, op by op,
// since neighbours on the machine only ever add to it.
// Prediction and outcome: docs/log-kernels.md. Run: npx tsx bench/cpu-decode.ts [qwen3-0.6b] [context]
import { openBackend } from '../src/backends/registry.js';
import type { Decoder } from '../src/models/decoder.js';
import type { Backend } from '../src/ops/backend.js';
import { BandwidthMeter } from './support/bandwidth.js';
import { buildDecoder, type DecodeVariant } from './support/decode-model.js';
import type { ShapeName } from './support/random-checkpoint.js';
import { median, round, writeResult } from './support/results.js';

/** Context tokens fed at a time. */
const PREFILL = 8;

const name = (process.argv[2] ?? 'qwen3-0.6b') as ShapeName;
const context = Number(process.argv[3] ?? 128);
const steps = Number(process.env.STEPS ?? 12);
const rounds = Number(process.env.ROUNDS ?? 9);
const variants = (process.env.VARIANTS ?? 'awq,shared').split(',') as DecodeVariant[];
const headBits = Number(process.env.HEAD ?? 8) as 8 | 16;
const threads = process.env.THREADS ? Number(process.env.THREADS) : undefined;
const activations = (process.env.ACTIVATIONS ?? 'exact') as 'exact' | 'int8';

/** The backend with its forward ops timed: milliseconds by op. */
function timed(backend: Backend, spent: Map<string, number>): Backend {
  const copy = Object.assign(Object.create(null), backend) as Record<string, unknown>;
  for (const op of ['embed', 'rmsNorm', 'rotate', 'linear', 'splitHeads', 'attention', 'siluMul', 'download']) {
    const call = copy[op] as (...args: unknown[]) => unknown;
    copy[op] = (...args: unknown[]) => {
      const start = performance.now();
      // CPU kernels run before the call returns, whether or not it returns a promise.
      const result = call(...args);
      const { outFeatures } = (args[1] ?? {}) as { outFeatures?: number };
      const key = op === 'linear' ? `linear ${outFeatures}` : op;
      spent.set(key, (spent.get(key) ?? 0) + performance.now() - start);
      return result;
    };
  }
  return copy as unknown as Backend;
}

const spent = new Map<string, number>();
const opened = await openBackend('cpu', { activations, threads });
const backend = process.env.BREAKDOWN ? timed(opened, spent) : opened;
const decoders = new Map<DecodeVariant, Decoder>();
for (const variant of variants) decoders.set(variant, await buildDecoder(backend, name, variant, headBits));
const meter = await BandwidthMeter.open();

/** Milliseconds of tokens after `context` others. */
async function measure(decoder: Decoder, least: Map<string, number>): Promise<number[]> {
  const cache = await decoder.createCache(1, context + steps + 2);
  // A few tokens at a time: so many rows run in our own kernels, and the bench where ONNX Runtime is not.
  for (let at = 0; at < context; at += PREFILL) {
    const ids = Int32Array.from({ length: Math.min(PREFILL, context - at) }, (_, i) => ((at + i) * 37) % 1000);
    backend.free(await decoder.hidden(ids, { cache }));
  }
  const times: number[] = [];
  for (let s = 0; s <= steps; s++) {
    spent.clear();
    const start = performance.now();
    const hidden = await decoder.hidden(Int32Array.of(s), { cache });
    await backend.download(await decoder.logits(hidden));
    const total = performance.now() - start;
    // The first step wakes the workers up.
    if (s === 0) continue;
    times.push(total);
    for (const [op, ms] of [...spent, ['total', total] as const]) least.set(op, Math.min(ms, least.get(op) ?? ms));
  }
  decoder.releaseCache(cache);
  return times;
}

const bandwidths: number[] = [];
const times = new Map<DecodeVariant, number[]>(variants.map((variant) => [variant, []]));
const best = new Map<DecodeVariant, number>();
const breakdown = new Map<DecodeVariant, Map<string, number>>(variants.map((variant) => [variant, new Map()]));
for (let r = 0; r < rounds; r++) {
  bandwidths.push(await meter.measure());
  // Every other round backwards, so that no variant always follows the same neighbour.
  const order = r % 2 ? [...variants].reverse() : variants;
  for (const variant of order) {
    const decoder = decoders.get(variant) as Decoder;
    const round = await measure(decoder, breakdown.get(variant) as Map<string, number>);
    times.get(variant)?.push(median(round));
    best.set(variant, Math.min(...round, best.get(variant) ?? Infinity));
  }
}
await meter.close();
const rows = variants.map((variant) => {
  const decoder = decoders.get(variant) as Decoder;
  const milliseconds = times.get(variant) ?? [];
  const bestToken = best.get(variant) as number;
  /** Tokens per second over bandwidth ÷ bytes per token. */
  const share = (ms: number, gigabytesPerSecond: number, bytes = decoder.bytesPerToken): number =>
    bytes / (gigabytesPerSecond * 1e6) / ms;
  const { layers, kvHeads, headDim } = decoder.config;
  /** Keys and values (f32) of the tokens before, which every token reads as well as the weights. */
  const cacheBytes = layers * kvHeads * headDim * 2 * 4 * (context + (steps >> 1));
  const together = decoder.bytesPerToken + cacheBytes;
  return {
    variant,
    tokensPerSecond: round(1000 / median(milliseconds)),
    bestTokensPerSecond: round(1000 / bestToken),
    millisecondsPerToken: round(median(milliseconds)),
    megabytesPerToken: round(decoder.bytesPerToken / 1e6),
    shareOfBandwidth: round(median(milliseconds.map((ms, r) => share(ms, bandwidths[r])))),
    bestShareOfBestBandwidth: round(share(bestToken, Math.max(...bandwidths))),
    cacheMegabytesPerToken: round(cacheBytes / 1e6),
    shareWithCache: round(median(milliseconds.map((ms, r) => share(ms, bandwidths[r], together)))),
  };
});
const base = times.get(variants[0]) ?? [];
const ratios = variants.slice(1).map((variant) => ({
  variant,
  slowerThan: variants[0],
  median: round(median((times.get(variant) ?? []).map((ms, r) => ms / base[r])) - 1),
  best: round((best.get(variant) as number) / (best.get(variants[0]) as number) - 1),
}));
console.log('read bandwidth GB/s: median', round(median(bandwidths)), 'best', round(Math.max(...bandwidths)));
console.table(rows);
console.table(ratios);
for (const variant of process.env.BREAKDOWN ? variants : []) {
  console.log(variant, 'least milliseconds per token:');
  console.table([...(breakdown.get(variant) ?? [])].map(([op, ms]) => ({ op, ms: round(ms) })));
}
if (!process.env.BREAKDOWN) {
  writeResult(`cpu-decode-head${headBits}${activations === 'exact' ? '' : '-int8'}`, {
    model: name,
    context,
    headBits,
    activations,
    rounds,
    readBandwidthGBs: { median: round(median(bandwidths)), best: round(Math.max(...bandwidths)) },
    rows,
    ratios,
  });
}
await backend.dispose();
