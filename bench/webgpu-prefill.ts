// Prefill on the GPU: tokens per second of whole decoders at true shapes with random weights, ParoQuant against AWQ against 16 bits,
// the time split by kernel, attention alone at short and long contexts. Usage: tsx bench/webgpu-prefill.ts [--check [--only PATTERN]] [--attention]
// [--model NAME]… [--long] [--f32] [--kinds A,B] [--layers N]; without flags all of it. --f32 runs the models on the tiled kernels instead.
import { parseArgs } from 'node:util';
import { matrixChecks, prefillChecks } from '../test/conformance/prefill-checks.js';
import { openWebGpuBackend } from '../src/backends/webgpu/index.js';
import { flashKernel, flashRows } from '../src/backends/webgpu/fast/flash.js';
import type { Decoder } from '../src/models/decoder.js';
import { f32ToF16Bits } from '../src/core/dtype.js';
import { createRng } from '../src/core/rng.js';
import { attentionRow, randomHalves, widen } from './support/attention-oracle.js';
import { copyBandwidth, randomBuffer, timeDispatches, type GpuCandidate } from './support/gpu.js';
import { randomDecoder, type DecoderKind } from './support/random-decoder.js';
import { SHAPES } from './support/random-plan.js';
import { median, round, writeResult } from './support/results.js';

const { values } = parseArgs({
  options: {
    check: { type: 'boolean' },
    attention: { type: 'boolean' },
    model: { type: 'string', multiple: true },
    long: { type: 'boolean' },
    f32: { type: 'boolean' },
    only: { type: 'string' },
    kinds: { type: 'string' },
    layers: { type: 'string' },
  },
});
const all = !values.check && !values.attention && !values.model && !values.long;
const backend = await openWebGpuBackend({ precision: values.f32 ? 'f32' : 'f16' });
const { gpu } = backend;
const results: Record<string, unknown>[] = [];
const only = new RegExp(values.only ?? '');

if (all || values.check) {
  let [passed, failed] = [0, 0];
  for (const check of [...matrixChecks(gpu), ...prefillChecks]) {
    if (!only.test(check.name)) continue;
    try {
      const worst = await check.run(backend);
      passed++;
      results.push({ check: check.name, ofTolerance: round(worst) });
      console.log(`ok     ${check.name}: ${worst.toFixed(3)} of the tolerance`);
    } catch (error) {
      failed++;
      console.log(`FAILED ${check.name}: ${(error as Error).message}`);
    }
  }
  console.log(`checks against the oracle: ${passed} passed, ${failed} failed`);
  if (failed > 0) process.exitCode = 1;
}

for (const end = performance.now() + 1000; performance.now() < end;) await copyBandwidth(gpu, 1 << 28);
const bandwidth = await copyBandwidth(gpu);
console.log(`${backend.info.description}, copy ${(bandwidth / 1e9).toFixed(0)} GB/s`);

/** A long attention at Llama-3.1-8B's heads. */
interface LongAttention {
  readonly name: string;
  /** The last `tokens` of a context. */
  readonly tokens: number;
  readonly context: number;
  readonly source: 'cache' | 'rows';
  readonly window?: number;
  /** Factor on the queries: large ones leave few keys with weight. */
  readonly sharp?: number;
  /** Query positions that are checked, each in {@link HEADS_CHECKED} heads. */
  readonly positions: number;
}

const LONG_ATTENTION: readonly LongAttention[] = [
  { name: 'one pass of 2k', tokens: 2048, context: 2048, source: 'cache', positions: 40 },
  { name: 'the last pass of 32k', tokens: 2048, context: 32768, source: 'cache', positions: 24 },
  { name: 'the last pass of 32k, sharp', tokens: 2048, context: 32768, source: 'cache', sharp: 8, positions: 16 },
  { name: '32k at once', tokens: 32768, context: 32768, source: 'rows', positions: 48 },
  { name: '32k at once, window of 4096', tokens: 32768, context: 32768, source: 'rows', window: 4096, positions: 64 },
];

/** Query heads that are checked: of the first, a middle and the last key head, at both ends of their groups. */
const HEADS_CHECKED = [0, 3, 17, 31];

/** Times one attention and checks sampled rows against float64. */
async function attention(test: LongAttention): Promise<void> {
  const { name, tokens, context, source, window, sharp = 1, positions } = test;
  const [heads, kvHeads, headDim] = [32, 8, 128];
  const rng = createRng(2);
  const share = heads / kvHeads;
  // Keys and values that don't repeat: equal weights would have equal rounding errors, which add up.
  const upload = (halves: Uint16Array): GPUBuffer => {
    const buffer = gpu.buffer(halves.byteLength);
    gpu.upload(buffer, halves);
    return buffer;
  };
  const pair = (): number => f32ToF16Bits(sharp * rng.normal()) | (f32ToF16Bits(sharp * rng.normal()) << 16);
  const q = randomBuffer(gpu, tokens * heads * headDim * 2, pair);
  const k = upload(randomHalves(context * kvHeads * headDim, rng.int(1, 2 ** 30)));
  const v = upload(randomHalves(context * kvHeads * headDim, rng.int(1, 2 ** 30)));
  const out = gpu.buffer(tokens * heads * headDim * 2);
  const read = async (buffer: GPUBuffer, at: number, n: number): Promise<Float32Array> =>
    widen(new Uint16Array(await gpu.read(buffer, at * 2, n * 2)));
  const start = context - tokens;
  const scale = headDim ** -0.5;
  const [allKeys, allValues] = [
    await read(k, 0, context * kvHeads * headDim),
    await read(v, 0, context * kvHeads * headDim),
  ];
  // Both ends of the rows, the edges of their tiles and the window's, and places between at random.
  const places = new Set([0, tokens - 1, 15, 16, 63, 64].filter((at) => at < tokens));
  if (window) for (const at of [window - 1, window, window + 1]) if (at < tokens) places.add(at);
  while (places.size < positions) places.add(rng.int(0, tokens));
  const rows = [...places].flatMap((token) =>
    HEADS_CHECKED.map((head) => {
      const kvHead = Math.floor(head / share);
      const [first, stride] =
        source === 'cache' ? [kvHead * context * headDim, headDim] : [kvHead * headDim, kvHeads * headDim];
      return { token, head, first, stride };
    }),
  );
  const oracle = await Promise.all(
    rows.map(async ({ token, head, first, stride }) => {
      const end = start + token + 1;
      const query = await read(q, (token * heads + head) * headDim, headDim);
      const begin = Math.max(0, end - (window ?? end));
      return attentionRow({
        query,
        keys: { data: allKeys, first, stride },
        values: { data: allValues, first, stride },
        begin,
        end,
        scale,
      });
    }),
  );
  const list: (GpuCandidate & { error: number; ofTolerance: number; relative: number })[] = [];
  for (const warps of [4, 8]) {
    const kernel = flashKernel({ headDim, source, warps });
    const groups = [Math.ceil((tokens * share) / flashRows({ warps })), 1, kvHeads] as const;
    const params = { tokens, heads, kvHeads, start, ragged: 0, window: window ?? 0x7fffffff, stride: context, scale };
    const dispatch = gpu.prepare(kernel, { q, k, v, starts: q, out }, params, groups);
    gpu.run([dispatch]);
    let [error, ofTolerance, relative] = [0, 0, 0];
    for (const [i, { token, head }] of rows.entries()) {
      const { expected, tolerance } = oracle[i];
      const got = await read(out, (token * heads + head) * headDim, headDim);
      let [difference, size] = [0, 0];
      for (let d = 0; d < headDim; d++) {
        const off = Math.abs(got[d] - expected[d]);
        // What is not a number must not pass for no error.
        error = off <= error ? error : off;
        ofTolerance = off / tolerance[d] <= ofTolerance ? ofTolerance : off / tolerance[d];
        difference += off ** 2;
        size += expected[d] ** 2;
      }
      relative = Math.max(relative, Math.sqrt(difference / size));
    }
    if (!(ofTolerance <= 1)) process.exitCode = 1;
    list.push({ name: kernel.name, dispatches: [dispatch], error, ofTolerance, relative });
  }
  const times = await timeDispatches(gpu, list, { rounds: 3 });
  // Keys that each query sees, summed.
  let seen = 0;
  for (let token = 0; token < tokens; token++) seen += Math.min(start + token + 1, window ?? Infinity);
  const flops = 4 * heads * headDim * seen;
  for (const { name: kernel, error, ofTolerance, relative } of list) {
    const seconds = times.get(kernel) ?? NaN;
    results.push({
      attention: kernel,
      case: name,
      tokens,
      context,
      ...(window && { window }),
      ...(sharp !== 1 && { sharp }),
      microseconds: round(seconds * 1e6),
      teraflops: round(flops / seconds / 1e12),
      rowsChecked: rows.length,
      maxError: round(error),
      relativeError: round(relative),
      ofTolerance: round(ofTolerance),
    });
    console.log(
      `${ofTolerance <= 1 ? 'ok    ' : 'FAILED'} attention, ${name}: ${kernel.padEnd(24)} ${(seconds * 1e6).toFixed(0).padStart(7)} us ${(flops / seconds / 1e12).toFixed(1)} TFLOP/s; ${rows.length} rows, worst error ${error.toExponential(1)} (${ofTolerance.toFixed(3)} of the tolerance), ${relative.toExponential(1)} of a row`,
    );
  }
  for (const buffer of [q, k, v, out]) gpu.release(buffer);
}
if (all || values.attention) for (const test of LONG_ATTENTION) await attention(test);

/** What is timed: 4-bit weights with 16-bit activations, and SmoothRot with 8-bit activations and caches. */
const KINDS: readonly DecoderKind[] = ['awq', 'paroquant', 'f16', 'smoothrot', 'smoothrot-a8', 'smoothrot-a8-kv8'];

/** Runs a prompt through a decoder in passes of `rows`, up to the logits of the last token; seconds. */
async function prefill(decoder: Decoder, ids: Int32Array, rows: number): Promise<number> {
  const cache = await decoder.createCache(1, ids.length);
  await gpu.sync();
  const begun = performance.now();
  for (let at = 0; at < ids.length; at += rows) {
    const part = ids.subarray(at, at + rows);
    const hidden = await decoder.hidden(part, { cache });
    if (at + rows >= ids.length) {
      const last = backend.sliceRows(hidden, part.length - 1, part.length);
      const logits = await decoder.logits(last);
      const row = await backend.download(logits);
      if (!row.every(Number.isFinite)) throw new Error('logits are not finite');
      backend.free(last, logits);
    }
    backend.free(hidden);
  }
  const seconds = (performance.now() - begun) / 1000;
  decoder.releaseCache(cache);
  return seconds;
}

for (const shape of SHAPES.filter(({ name }) =>
  (values.model ?? (all ? ['Llama-3.1-8B', 'Qwen3-0.6B'] : [])).includes(name),
)) {
  const rng = createRng(9);
  const ids = Int32Array.from({ length: 2048 }, () => rng.int(0, shape.vocab));
  const times = new Map<DecoderKind, number[]>();
  const kinds = (values.kinds?.split(',') ?? (values.f32 ? ['paroquant'] : KINDS)) as readonly DecoderKind[];
  const decoders = new Map<DecoderKind, Decoder>();
  for (const kind of kinds) {
    const layers = values.layers ? Number(values.layers) : shape.layers;
    decoders.set(kind, await randomDecoder(backend, { ...shape, layers }, kind, 40960));
    times.set(kind, []);
  }
  for (let round = 0; round < (values.f32 ? 4 : 7); round++)
    for (const [kind, decoder] of decoders) {
      const seconds = await prefill(decoder, ids, ids.length);
      if (round > 1) times.get(kind)?.push(seconds);
    }
  for (const [kind, decoder] of decoders) {
    const seconds = median(times.get(kind) ?? []);
    gpu.startProfile();
    await prefill(decoder, ids, ids.length);
    const kernels = (await gpu.stopProfile()).slice(0, 14);
    const total = kernels.reduce((sum, t) => sum + t.seconds, 0);
    console.log(
      `${shape.name} ${kind.padEnd(10)} ${ids.length} rows: ${(ids.length / seconds).toFixed(0)} tokens/s, ${(1e3 * seconds).toFixed(1)} ms; kernels ${(1e3 * total).toFixed(1)} ms`,
    );
    for (const t of kernels)
      console.log(
        `    ${t.name.padEnd(40)} ${((t.seconds / t.calls) * 1e6).toFixed(1).padStart(9)} us x ${String(t.calls).padStart(3)} = ${(t.seconds * 1e3).toFixed(2).padStart(8)} ms (${((100 * t.seconds) / total).toFixed(1)}%)`,
      );
    results.push({
      model: shape.name,
      kind,
      rows: ids.length,
      tokensPerSecond: round(ids.length / seconds),
      milliseconds: round(1e3 * seconds),
      kernelMilliseconds: round(1e3 * total),
      kernels,
    });
  }
  if (all || values.long) {
    const decoder = decoders.get('paroquant');
    if (decoder) {
      const long = Int32Array.from({ length: 32768 }, () => rng.int(0, shape.vocab));
      const seconds = await prefill(decoder, long, 2048);
      console.log(
        `${shape.name} paroquant 32768 tokens in passes of 2048: ${(long.length / seconds).toFixed(0)} tokens/s; ${(gpu.allocatedBytes / 1e9).toFixed(1)} GB allocated, all models together`,
      );
      results.push({
        model: shape.name,
        kind: 'paroquant',
        rows: 2048,
        context: 32768,
        tokensPerSecond: round(long.length / seconds),
        allocatedBytes: gpu.allocatedBytes,
      });
    }
  }
  for (const decoder of decoders.values()) decoder.release();
}
writeResult('webgpu-prefill', { gpu: backend.info.description, copyBytesPerSecond: bandwidth, results });
await backend.dispose();
