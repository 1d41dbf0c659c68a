// What conformance does not reach: long contexts (keys split over workgroups), groups beyond workgroup memory, other
// subgroup sizes than the adapter's, heads of odd sizes, misuse.
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import type { WebGpuBackend } from '../../../src/backends/webgpu/index.js';
import type { Backend, KvCacheHandle, Tensor } from '../../../src/ops/backend.js';
import { createRng } from '../../../src/core/rng.js';
import { hostTensor } from '../../../src/core/tensor.js';
import { createReferenceBackend, readF64 } from '../../../src/ops/reference/backend.js';
import { closeArrays, maxAbs, randomQuantized, randomTransform } from '../../conformance/duo.js';
import { openTestWebGpu, webgpuMissing } from '../../support/webgpu.js';

describe.skipIf(webgpuMissing)('WebGPU inference', () => {
  const oracle = createReferenceBackend();
  const rng = createRng(3);
  let gpu: WebGpuBackend;
  beforeAll(async () => {
    gpu = await openTestWebGpu();
  });
  afterAll(() => gpu.dispose());

  const random = (shape: readonly number[]) =>
    hostTensor(
      'f32',
      shape,
      Float32Array.from({ length: shape.reduce((a, b) => a * b, 1) }, () => rng.normal()),
    );

  it.each([
    { heads: 4, kvHeads: 2, headDim: 64, window: undefined, batch: 1 },
    { heads: 6, kvHeads: 6, headDim: 10, window: 300, batch: 2 },
    { heads: 8, kvHeads: 1, headDim: 7, window: undefined, batch: 1 },
    { heads: 2, kvHeads: 1, headDim: 256, window: 200, batch: 1 },
  ])('attends to a long context: %o', async ({ heads, kvHeads, headDim, window, batch }) => {
    const shape = { heads, kvHeads, headDim, batch, window, scale: headDim ** -0.5 };
    const tokens = 400;
    const caches = {
      gpu: await gpu.createKvCache({ batch, kvHeads, headDim, capacity: tokens + 3 }),
      oracle: await oracle.createKvCache({ batch, kvHeads, headDim, capacity: tokens + 3 }),
    };
    for (const [start, count] of [
      [0, tokens],
      [tokens, 1],
      [tokens + 1, 2],
    ]) {
      // The first chunk only fills the cache: one query head per key head and a window of one make that quick.
      const options = { ...shape, start, ...(start === 0 && { heads: kvHeads, window: 1 }) };
      const q = random([batch * count, options.heads * headDim]);
      const k = random([batch * count, kvHeads * headDim]);
      const v = random([batch * count, kvHeads * headDim]);
      const run = async (backend: Backend, cache: KvCacheHandle): Promise<Tensor> =>
        backend.attention(await backend.upload(q), await backend.upload(k), await backend.upload(v), {
          ...options,
          cache,
        });
      const actual = await gpu.download(await run(gpu, caches.gpu));
      const expected = readF64(await run(oracle, caches.oracle));
      // f16 keys move a logit by 2^-11·‖q‖‖k‖·scale, about 2^-11·√d; values move by 2^-11 of themselves.
      const tolerance = 2 ** -11 * (2 * Math.sqrt(headDim) + 1) * maxAbs(v.data as Float32Array);
      closeArrays(actual, expected, tolerance, `${count} tokens at ${start}`);
    }
    gpu.release(caches.gpu);
  });

  it('rotates groups of every size, in few rows and many', async () => {
    for (const [channels, groupSize] of [
      [16384, 16384],
      [8192, 4096],
      [256, 2],
      [48, 12],
    ]) {
      const transform = randomTransform(channels, groupSize, 2, rng);
      const handle = await gpu.loadTransform(transform);
      const expectedHandle = await oracle.loadTransform(transform);
      for (const rows of [1, 40]) {
        const x = random([rows, channels]);
        const expected = readF64(await oracle.rotate(await oracle.upload(x), expectedHandle));
        const y = await gpu.rotate(await gpu.upload(x), handle);
        closeArrays(await gpu.download(y), expected, 2e-5, `${rows} × ${channels} in groups of ${groupSize}`);
        gpu.free(y);
      }
      gpu.release(handle);
    }
  });

  it('frees what it loads', async () => {
    const weight = randomQuantized(64, 128, 4, 32, rng);
    const handle = await gpu.loadLinear({ kind: 'quantized', weight });
    gpu.release(handle);
    const before = gpu.gpu.allocatedBytes;
    for (let i = 0; i < 10; i++) gpu.release(await gpu.loadLinear({ kind: 'quantized', weight }));
    expect(gpu.gpu.allocatedBytes).toBe(before);
  });

  it('refuses shapes that do not fit', async () => {
    const x = await gpu.upload(random([2, 6]));
    const linear = await gpu.loadLinear({ kind: 'dense', weight: random([4, 5]) });
    expect(() => gpu.linear(x, linear)).toThrow(/linear of 5 inputs was given 6/);
    expect(() => gpu.embed(linear, Int32Array.of(4))).toThrow(/token id 4 is outside the vocabulary of 4/);
    const transform = await gpu.loadTransform(randomTransform(8, 4, 1, rng));
    expect(() => gpu.rotate(x, transform)).toThrow(/transform of 8 channels was given 6/);
    const cache = await gpu.createKvCache({ batch: 1, kvHeads: 1, headDim: 3, capacity: 1 });
    const options = { heads: 1, kvHeads: 1, headDim: 3, batch: 1, scale: 1, start: 1, cache };
    const row = await gpu.upload(random([1, 3]));
    expect(() => gpu.attention(row, row, row, options)).toThrow(/2 tokens do not fit a key\/value cache of 1/);
  });
});
