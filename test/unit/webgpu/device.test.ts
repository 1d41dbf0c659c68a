// The device layer: memory, errors, loss, disposal.
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import type { WebGpuBackend } from '../../../src/backends/webgpu/index.js';
import { defineKernel, read, write } from '../../../src/backends/webgpu/kernel.js';
import { openTestWebGpu, webgpuMissing } from '../../support/webgpu.js';

const broken = defineKernel({
  name: 'broken',
  buffers: { x: read('f32'), y: write('f32') },
  body: '@compute @workgroup_size(1) fn main() { y[0] = x[0] + nonsense; }',
});

describe.skipIf(webgpuMissing)('WebGPU device', () => {
  let backend: WebGpuBackend;
  beforeAll(async () => {
    backend = await openTestWebGpu();
  });
  afterAll(() => backend.dispose());

  it('uploads, computes and downloads', async () => {
    const x = await backend.upload({
      dtype: 'f32',
      shape: [3, 5],
      data: Float32Array.from({ length: 15 }, (_, i) => i),
    });
    const y = await backend.addScaled(x, x, 2);
    expect([...(await backend.download(y))]).toEqual(Array.from({ length: 15 }, (_, i) => 3 * i));
    const rows = backend.sliceRows(y, 1, 2);
    expect([...(await backend.download(rows))]).toEqual([15, 18, 21, 24, 27]);
    backend.free(x, y, rows);
  });

  it('stages large uploads, in the order of commands', async () => {
    const count = 200_000;
    const first = Float32Array.from({ length: count }, (_, i) => i % 251);
    const a = await backend.upload({ dtype: 'f32', shape: [count], data: first });
    const doubled = await backend.addScaled(a, a, 1);
    // The pool gives the same memory out again; what was recorded before still sees what was there.
    backend.free(a);
    const b = await backend.upload({ dtype: 'f32', shape: [count], data: first.map((v) => v + 1000) });
    expect(await backend.download(doubled)).toEqual(first.map((v) => 2 * v));
    expect((await backend.download(b))[count - 1]).toBe(first[count - 1] + 1000);
    // Staging memory is used again after its copies.
    for (let round = 0; round < 3; round++) {
      const c = await backend.upload({ dtype: 'f32', shape: [count], data: first.map((v) => v + round) });
      expect((await backend.download(c))[count - 1]).toBe(first[count - 1] + round);
      backend.free(c);
    }
    backend.free(b, doubled);
  });

  it('shows new contents only to commands after an upload', async () => {
    const { gpu } = backend;
    const a = await backend.upload({ dtype: 'f32', shape: [4], data: new Float32Array(4).fill(1) });
    const doubled = await backend.addScaled(a, a, 1);
    backend.free(a);
    // The pool hands a's buffer out again while the addition is not yet submitted.
    const b = await backend.upload({ dtype: 'f32', shape: [4], data: new Float32Array(4).fill(7) });
    expect([...(await backend.download(doubled))]).toEqual([2, 2, 2, 2]);
    backend.free(b, doubled);
    await gpu.sync();
  });

  it('refuses to exceed its memory budget', async () => {
    const small = await openTestWebGpu({ memoryBytes: 1 << 20 });
    expect(() => small.gpu.buffer(2 << 20)).toThrow(/budget/);
    const kept = small.gpu.buffer(1 << 19);
    small.gpu.release(kept);
    expect(small.gpu.buffer(1 << 19)).toBe(kept);
    await small.dispose();
  });

  it('refuses a buffer no binding reaches, before allocating', () => {
    const before = backend.gpu.allocatedBytes;
    expect(() => backend.gpu.buffer(2 ** 40, 'the KV cache')).toThrow(/the KV cache needs 1099511627776 bytes/);
    expect(backend.gpu.allocatedBytes).toBe(before);
  });

  it('names the kernel whose shader is wrong', async () => {
    const other = await openTestWebGpu();
    const x = other.gpu.buffer(16);
    const y = other.gpu.buffer(16);
    other.gpu.dispatch(broken, { x, y }, {}, [1]);
    await expect(other.gpu.sync()).rejects.toThrow(/kernel 'broken'[\s\S]*nonsense/);
    await other.dispose();
  });

  it('says that the device was lost, and opens again', async () => {
    const lost = await openTestWebGpu();
    lost.gpu.device.destroy();
    await lost.gpu.device.lost;
    await expect(lost.gpu.sync()).rejects.toMatchObject({ code: 'device-lost' });
    await lost.dispose();
    const again = await openTestWebGpu();
    await again.gpu.sync();
    await again.dispose();
  });

  it('times kernels', async () => {
    const { gpu } = backend;
    if (!gpu.capabilities.timestamps) return;
    const x = await backend.upload({ dtype: 'f32', shape: [64], data: new Float32Array(64) });
    gpu.startProfile();
    for (let i = 0; i < 300; i++) backend.free(await backend.addScaled(x, x, 1));
    const times = await gpu.stopProfile();
    expect(times).toHaveLength(1);
    expect(times[0]).toMatchObject({ name: 'addScaled', calls: 300 });
  });

  it('refuses use after disposal', async () => {
    const done = await openTestWebGpu();
    await done.dispose();
    expect(() => done.gpu.buffer(16)).toThrow(/disposed/);
  });
});
