// Variants of the f32 product that the conformance suite's sizes don't reach: large tiles, batches, parts of matrices, slices of k.
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { gemm, type GemmCall } from '../../../src/backends/webgpu/gemm.js';
import type { WebGpuBackend } from '../../../src/backends/webgpu/index.js';
import { createRng } from '../../../src/core/rng.js';
import { openTestWebGpu, webgpuMissing } from '../../support/webgpu.js';

type Operands = Omit<GemmCall, 'a' | 'b' | 'c'>;

const CASES: Readonly<Record<string, Operands>> = {
  'tiles of 128': { m: 131, n: 150, k: 37, tile: 128 },
  'tiles of 128, a transposed': { m: 131, n: 150, k: 37, tile: 128, transposeA: true },
  'tiles of 128, b transposed': { m: 131, n: 150, k: 37, tile: 128, transposeB: true },
  'tiles of 128, both transposed': { m: 131, n: 150, k: 37, tile: 128, transposeA: true, transposeB: true },
  'three slices of k': { m: 13, n: 70, k: 100, slices: 3, alpha: 0.5 },
  'three slices of k, added': { m: 13, n: 70, k: 100, slices: 3, accumulate: true },
  'part of larger matrices, subtracted': {
    m: 20,
    n: 30,
    k: 17,
    transposeA: true,
    lda: 50,
    ldb: 33,
    ldc: 41,
    offsetA: 55,
    offsetB: 7,
    offsetC: 90,
    alpha: -1,
    accumulate: true,
  },
  'a batch': { m: 8, n: 40, k: 12, batch: { count: 3, a: 100, b: 480, c: 330 } },
};

describe.skipIf(webgpuMissing)('f32 products', () => {
  let backend: WebGpuBackend;
  beforeAll(async () => {
    backend = await openTestWebGpu();
  });
  afterAll(() => backend.dispose());

  it.each(Object.entries(CASES))('%s', async (_, call) => {
    const { m, n, k, transposeA = false, transposeB = false, alpha = 1, accumulate = false } = call;
    const { offsetA = 0, offsetB = 0, offsetC = 0, batch = { count: 1, a: 0, b: 0, c: 0 } } = call;
    const [lda, ldb, ldc] = [call.lda ?? (transposeA ? m : k), call.ldb ?? (transposeB ? k : n), call.ldc ?? n];
    const rng = createRng(3);
    const [a, b, c] = [0, 1, 2].map(() => Float32Array.from({ length: 25_000 }, () => rng.normal()));
    const { gpu } = backend;
    const [ga, gb, gc] = [a, b, c].map((data) => {
      const buffer = gpu.buffer(data.byteLength);
      gpu.upload(buffer, data);
      return buffer;
    });
    gemm(gpu, { ...call, a: ga, b: gb, c: gc });
    const expected = Float64Array.from(c);
    for (let z = 0; z < batch.count; z++) {
      for (let i = 0; i < m; i++) {
        for (let j = 0; j < n; j++) {
          let sum = 0;
          for (let l = 0; l < k; l++)
            sum +=
              a[offsetA + z * batch.a + (transposeA ? l * lda + i : i * lda + l)] *
              b[offsetB + z * batch.b + (transposeB ? j * ldb + l : l * ldb + j)];
          const at = offsetC + z * batch.c + i * ldc + j;
          expected[at] = alpha * sum + (accumulate ? c[at] : 0);
        }
      }
    }
    const actual = new Float32Array(await gpu.read(gc, 0, c.byteLength));
    let worst = 0;
    for (let i = 0; i < c.length; i++) worst = Math.max(worst, Math.abs(actual[i] - expected[i]));
    // Sums of up to 100 products of normal values: |sum| < 60, a few of its ulps.
    expect(worst).toBeLessThan(2e-5);
    for (const buffer of [ga, gb, gc]) gpu.release(buffer);
  });
});
