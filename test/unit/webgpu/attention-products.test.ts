// Attention as products and its gradient against the oracle, with a scratch that holds all heads, one sequence, or one key head.
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { attentionByProducts, attentionGradient } from '../../../src/backends/webgpu/attention-products.js';
import type { WebGpuBackend } from '../../../src/backends/webgpu/index.js';
import { own } from '../../../src/backends/webgpu/tensor.js';
import { createRng } from '../../../src/core/rng.js';
import { hostTensor } from '../../../src/core/tensor.js';
import type { Backend, Tensor } from '../../../src/ops/backend.js';
import { requireGradients } from '../../../src/ops/gradients.js';
import { createReferenceBackend, readF64 } from '../../../src/ops/reference/backend.js';
import { openTestWebGpu, webgpuMissing } from '../../support/webgpu.js';

const [batch, tokens, heads, kvHeads, headDim] = [3, 70, 4, 2, 24];
const perGroup = 4 * (heads / kvHeads) * tokens * tokens;

describe.skipIf(webgpuMissing)(`attention as products${webgpuMissing ? `: skipped, ${webgpuMissing}` : ''}`, () => {
  const oracle = createReferenceBackend();
  let backend: WebGpuBackend;
  beforeAll(async () => {
    backend = await openTestWebGpu();
  });
  afterAll(async () => backend.dispose());

  it.each([
    ['everything', 1e9, undefined],
    ['a sequence', kvHeads * perGroup, undefined],
    ['a key head', perGroup, 33],
  ] as const)('scratch for %s', async (_, scratchBytes, window) => {
    const rng = createRng(1);
    const rows = batch * tokens;
    const host = [heads, kvHeads, kvHeads, heads].map((n) =>
      Float32Array.from({ length: rows * n * headDim }, () => rng.normal()),
    );
    const upload = async (to: Backend): Promise<Tensor[]> =>
      Promise.all(host.map(async (data) => to.upload(hostTensor('f32', [rows, data.length / rows], data.slice()))));
    const [q, k, v, dy] = (await upload(backend)).map(own);
    const [qr, kr, vr, dyr] = await upload(oracle);
    const options = { batch, heads, kvHeads, headDim, window, scale: headDim ** -0.5 };
    const found = {
      y: attentionByProducts(backend.gpu, q, k, v, options, { scratchBytes }),
      ...attentionGradient(backend.gpu, q, k, v, options, dy, { scratchBytes }),
    };
    const expected = {
      y: await oracle.attention(qr, kr, vr, { ...options, start: 0 }),
      ...(await requireGradients(oracle).attentionGradient(qr, kr, vr, options, dyr)),
    };
    for (const name of ['y', 'q', 'k', 'v'] as const) {
      const values = await backend.download(found[name]);
      const error = readF64(expected[name]).reduce((worst, e, i) => Math.max(worst, Math.abs(values[i] - e)), 0);
      expect(error, name).toBeLessThan(1e-5);
    }
  });
});
