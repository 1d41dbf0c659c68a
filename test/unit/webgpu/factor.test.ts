// Factorizations of ill-conditioned Gram matrices with the damping that quantization uses, against float64.
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import type { WebGpuBackend } from '../../../src/backends/webgpu/index.js';
import { createRng } from '../../../src/core/rng.js';
import { hostTensor } from '../../../src/core/tensor.js';
import { gptqFactor, solveSymmetric } from '../../../src/ops/reference/linalg.js';
import { openTestWebGpu, webgpuMissing } from '../../support/webgpu.js';

/** XᵀX/n of few tokens with massive channels: rank deficient, condition number about n·100 after damping. */
function outlierGram(n: number, tokens: number): Float32Array {
  const rng = createRng(5);
  const scale = Float64Array.from({ length: n }, () => Math.exp(rng.normal()) * (rng.uniform() < 0.02 ? 300 : 1));
  const x = Float64Array.from({ length: tokens * n }, (_, at) => rng.normal() * scale[at % n]);
  const h = new Float64Array(n * n);
  for (let t = 0; t < tokens; t++)
    for (let i = 0; i < n; i++) for (let j = 0; j < n; j++) h[i * n + j] += (x[t * n + i] * x[t * n + j]) / tokens;
  return Float32Array.from(h);
}

describe.skipIf(webgpuMissing)('factorizations', () => {
  let backend: WebGpuBackend;
  beforeAll(async () => {
    backend = await openTestWebGpu();
  });
  afterAll(() => backend.dispose());

  it('keep f32 accuracy in every element on a rank-deficient Gram matrix with massive channels', async () => {
    const n = 200;
    const h = outlierGram(n, 60);
    const gram = await backend.upload(hostTensor('f32', [n, n], h));
    const expected = gptqFactor(Float64Array.from(h), n, 0.01);
    const factor = await backend.gptqFactor(gram, 0.01);
    const actual = await backend.download(factor);
    // One rounding to f32, and as much again for what is not in the element itself but in its row's diagonal, which GPTQ
    // divides by. An f32 factorization would be off by n·κ·2^-24 ≈ 0.1.
    let worst = 0;
    for (let i = 0; i < n; i++) {
      for (let j = 0; j < n; j++) {
        const e = expected[i * n + j];
        worst = Math.max(worst, Math.abs(actual[i * n + j] - e) / Math.max(Math.abs(e), expected[i * n + i]));
      }
    }
    expect(worst).toBeLessThan(2 ** -23);

    const rng = createRng(6);
    const b = Float32Array.from({ length: 3 * n }, () => rng.normal());
    const right = await backend.upload(hostTensor('f32', [3, n], b));
    const solution = await backend.download(await backend.solveSymmetric(gram, right, 0.01));
    const wanted = solveSymmetric(Float64Array.from(h), Float64Array.from(b), 3, n, 0.01);
    let error = 0;
    const size = wanted.reduce((max, value) => Math.max(max, Math.abs(value)), 0);
    for (let i = 0; i < wanted.length; i++) error = Math.max(error, Math.abs(solution[i] - wanted[i]));
    expect(error / size).toBeLessThan(2 ** -23);
  });
});
