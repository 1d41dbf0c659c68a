// Hadamard transforms on the GPU beyond the conformance suite's: orders that take two stages, the inverse, in place, per head.
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { f16BitsToF32, f32ToF16Bits, roundToF16 } from '../../../src/core/dtype.js';
import { createRng } from '../../../src/core/rng.js';
import { hostTensor } from '../../../src/core/tensor.js';
import {
  hadamardAhead,
  hadamardRowsKernel,
  hadamardRowsMemory,
  signsOf,
} from '../../../src/backends/webgpu/fast/hadamard.js';
import { applyHadamard as onGpu, GpuHadamard } from '../../../src/backends/webgpu/hadamard.js';
import type { WebGpuBackend } from '../../../src/backends/webgpu/index.js';
import { own } from '../../../src/backends/webgpu/tensor.js';
import { applyHadamard, hadamardTransform } from '../../../src/transforms/index.js';
import { openTestWebGpu, webgpuMissing } from '../../support/webgpu.js';

describe.skipIf(webgpuMissing)('Hadamard transforms on the GPU', () => {
  let backend: WebGpuBackend;
  beforeAll(async () => {
    backend = await openTestWebGpu();
  });
  afterAll(() => backend.dispose());
  const rng = createRng(3);

  /** Relative to the norm of a transformed run: an f32 sum of n terms in log₂ p + m steps, far below 1e-5. */
  function expectClose(got: Float32Array, want: Float64Array, tolerance = 1e-6): void {
    let [difference, norm] = [0, 0];
    want.forEach((w, i) => {
      difference += (got[i] - w) ** 2;
      norm += w * w;
    });
    expect(Math.sqrt(difference / norm)).toBeLessThan(tolerance);
  }

  // The orders of DESIGN §8, across heads too; 14336 and 11008 are longer than a workgroup's memory.
  it.each([
    [14336, 14336, 1, 2],
    [11008, 11008, 1, 1],
    [13824, 13824, 1, 1],
    [32768, 32768, 1, 1],
    [8960, 8960, 1, 1],
    [1536, 12, 128, 3],
    [4096, 32, 128, 3],
  ])('%i channels of order %i, inner %i: forward, inverse, in place', async (channels, order, inner, rows) => {
    const transform = hadamardTransform(channels, { order, inner });
    const handle = new GpuHadamard(backend.gpu, transform);
    const host = Float32Array.from({ length: rows * channels }, () => rng.normal());
    const x = backend.upload(hostTensor('f32', [rows, channels], host));
    for (const direction of ['forward', 'inverse'] as const) {
      const want = applyHadamard(Float64Array.from(host), transform, direction);
      const y = onGpu(backend.gpu, own(await x), handle, { direction });
      expectClose(await backend.download(y), want);
      const there = onGpu(backend.gpu, y, handle, {
        direction: direction === 'forward' ? 'inverse' : 'forward',
        inPlace: true,
      });
      expect(there).toBe(y);
      expectClose(await backend.download(there), Float64Array.from(host));
      backend.free(y);
    }
    handle.free(backend.gpu);
  });

  it.each([
    [64, 32],
    [1536, 64],
    [4096, 128],
    [4096, 256],
    [10240, 256],
    [14336, 256],
  ])('many rows of %i channels, %i threads: f16 and f32', async (channels, threads) => {
    const { gpu } = backend;
    const rows = 3;
    const host = Float32Array.from({ length: rows * channels }, () => roundToF16(rng.normal()));
    const transform = hadamardTransform(channels);
    const m = Math.sqrt(transform.base.length);
    for (const halves of [true, false]) {
      const shape = { channels, inner: 1, m, p: channels / m, halves };
      if (hadamardRowsMemory(shape) > gpu.limits.maxComputeWorkgroupStorageSize) continue;
      for (const direction of ['forward', 'inverse'] as const) {
        const data = halves ? Uint16Array.from(host, f32ToF16Bits) : host;
        const [x, y] = [gpu.buffer(data.byteLength), gpu.buffer(data.byteLength)];
        gpu.upload(x, data);
        const variant = { ...shape, signs: signsOf(transform.base, direction), threads, bits: 4 };
        for (const ahead of hadamardAhead(variant) ? [1, 2] : [1]) {
          const kernel = hadamardRowsKernel({ ...variant, ahead });
          gpu.dispatch(kernel, { x, y }, { rows }, [Math.ceil(rows / ahead)]);
          const bytes = await gpu.read(y, 0, data.byteLength);
          const got = halves ? Float32Array.from(new Uint16Array(bytes), f16BitsToF32) : new Float32Array(bytes);
          // Three roundings to f16 of 2^-11 / √12 each, or those of f32.
          expectClose(got, applyHadamard(Float64Array.from(host), transform, direction), halves ? 6e-4 : 1e-6);
        }
        gpu.release(x);
        gpu.release(y);
      }
    }
  });

  it('takes rows of several runs: heads', async () => {
    const transform = hadamardTransform(64);
    const handle = new GpuHadamard(backend.gpu, transform);
    const host = Float32Array.from({ length: 3 * 5 * 64 }, () => rng.normal());
    const x = await backend.upload(hostTensor('f32', [3, 5 * 64], host));
    expectClose(
      await backend.download(onGpu(backend.gpu, own(x), handle)),
      applyHadamard(Float64Array.from(host), transform),
    );
  });
});
