// Every family and RoPE variant against Transformers: logits of committed tiny checkpoints, in prefill and token by token.
import { readdirSync } from 'node:fs';
import path from 'node:path';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { openBackend } from '../../src/backends/registry.js';
import { floats } from '../../src/core/tensor.js';
import { SafetensorsFile } from '../../src/formats/safetensors.js';
import { folderFiles, openFile } from '../../src/formats/source.node.js';
import { loadDecoder, openModel } from '../../src/models/load.js';
import type { Backend } from '../../src/ops/backend.js';
import { openTestWebGpu, webgpuMissing } from '../support/webgpu.js';

const FIXTURES = path.join(import.meta.dirname, '../fixtures/parity');
/** What the project promises for f32 (absolute, on logits of order 1 to 10). */
const TOLERANCE = 2e-4;
/**
 * WebGPU caches keys and values as f16, each off by up to 2^-11 of itself, which moves a logit by about as much of its
 * own size through each of a few blocks: 2^-11 · 10 = 5e-3.
 */
const F16_CACHE_TOLERANCE = 5e-3;
/** Activations in f16 as well: a few more such roundings per block. */
const F16_TOLERANCE = 2e-2;

/** Fixtures fed token by token on WebGPU, and in f16: one of each family, since the rest differ in tables made on the host. */
const FAMILIES = ['llama', 'mistral', 'qwen2-sliding', 'qwen3'];

/** A backend under test, tolerances of whole passes and of tokens one by one, and why it can't run. */
interface Subject {
  readonly name: string;
  readonly open: () => Promise<Backend>;
  readonly whole?: number;
  readonly cached?: number;
  readonly missing?: string;
}

const SUBJECTS: readonly Subject[] = [
  { name: 'reference', open: () => openBackend('reference') },
  { name: 'cpu', open: () => openBackend('cpu') },
  { name: 'webgpu', open: () => openTestWebGpu(), cached: F16_CACHE_TOLERANCE, missing: webgpuMissing },
  {
    name: 'webgpu in f16',
    open: () => openTestWebGpu({ precision: 'f16' }),
    whole: F16_TOLERANCE,
    missing: webgpuMissing,
  },
];
const folders = readdirSync(FIXTURES, { withFileTypes: true }).flatMap((e) => (e.isDirectory() ? [e.name] : []));

function worst(a: Float32Array, b: Float32Array): number {
  let max = 0;
  for (let i = 0; i < a.length; i++) max = Math.max(max, Number.isFinite(a[i]) ? Math.abs(a[i] - b[i]) : Infinity);
  return max;
}

describe.each(SUBJECTS)('parity with Transformers on $name', (subject) => {
  const { name, open, whole: tolerance = TOLERANCE, cached = TOLERANCE, missing } = subject;
  // Token by token a few rows are f32 in either precision.
  const inHalf = tolerance !== TOLERANCE;
  const names = inHalf ? FAMILIES : folders;
  let backend: Backend;
  beforeAll(async () => {
    if (missing === undefined) backend = await open();
  });
  afterAll(() => (backend as Backend | undefined)?.dispose());

  if (missing !== undefined) it.skip(missing, () => undefined);
  it.skipIf(missing !== undefined).each(names)('%s', async (fixture) => {
    const folder = path.join(FIXTURES, fixture);
    const expected = await SafetensorsFile.open(await openFile(path.join(folder, 'expected.safetensors')));
    const [ids, logits] = [await expected.read('input_ids'), await expected.read('logits')];
    await expected.close();
    const [batch, tokens] = ids.shape;
    const vocab = logits.shape[2];
    const input = Int32Array.from(ids.data as BigInt64Array, Number);
    const source = await openModel(await folderFiles(folder));
    const decoder = await loadDecoder(backend, source);

    const whole = await backend.download(await decoder.logits(await decoder.hidden(input, { batch })));
    expect(worst(whole, floats(logits)), 'prefill').toBeLessThan(tolerance);

    // Dynamic NTK changes its angles as a sequence grows, so cached keys keep older ones: only lengths alike agree.
    const stepwise = name !== 'webgpu' || FAMILIES.includes(fixture);
    if (source.config.ropeScaling.type !== 'dynamic' && stepwise && !inHalf) {
      const cache = await decoder.createCache(batch, tokens);
      const half = Math.floor(tokens / 2);
      const steps = new Float32Array(whole.length);
      for (const [begin, end] of [
        [0, half],
        ...Array.from({ length: tokens - half }, (_, i) => [half + i, half + i + 1]),
      ]) {
        const chunk = Int32Array.from({ length: batch * (end - begin) }, (_, i) => {
          const n = end - begin;
          return input[Math.floor(i / n) * tokens + begin + (i % n)];
        });
        const out = await backend.download(await decoder.logits(await decoder.hidden(chunk, { cache })));
        for (let b = 0; b < batch; b++) {
          steps.set(
            out.subarray(b * (end - begin) * vocab, (b + 1) * (end - begin) * vocab),
            (b * tokens + begin) * vocab,
          );
        }
      }
      expect(worst(steps, floats(logits)), 'token by token').toBeLessThan(cached);
      decoder.releaseCache(cache);
    }
    decoder.release();
    await source.checkpoint.close();
  });
});
