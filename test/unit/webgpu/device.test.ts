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

/** y = 2·x + what `added` makes different kernels of. */
const doubled = (added: number) =>
  defineKernel({
    name: `doubled${added}`,
    buffers: { x: read('f32'), y: write('f32') },
    params: { factor: 'f32' },
    body: `@compute @workgroup_size(4) fn main(@builtin(local_invocation_index) i: u32) { y[i] = params.factor * x[i] + ${added}.0; }`,
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

  it('keeps the order of commands while kernels are being compiled', async () => {
    const { gpu } = await openTestWebGpu();
    const [x, y, z] = [gpu.buffer(16), gpu.buffer(16), gpu.buffer(16)];
    const data = Float32Array.of(1, 2, 3, 4);
    gpu.upload(x, data);
    gpu.dispatch(doubled(1), { x, y }, { factor: 2 }, [1]); // 3 5 7 9
    data.fill(10);
    gpu.upload(x, data);
    data.fill(0); // the upload was of what it held then
    const early = gpu.read(y, 0, 16);
    gpu.dispatch(doubled(2), { x: y, y: z }, { factor: 2 }, [1]); // 8 12 16 20
    gpu.copy(z, 0, y, 0, 8);
    gpu.flush();
    gpu.run([gpu.prepare(doubled(3), { x, y: z }, { factor: 3 }, [1])]); // 33
    gpu.dispatch(doubled(1), { x: z, y: x }, { factor: 2 }, [1]); // 67
    gpu.release(z);
    const big = new Float32Array(100_000).fill(5);
    const large = gpu.buffer(big.byteLength);
    gpu.upload(large, big);
    gpu.dispatch(doubled(4), { x: large, y: large }, { factor: 2 }, [0]); // no workgroups: nothing
    const results = await Promise.all([early, gpu.read(y, 0, 16), gpu.read(x, 0, 16), gpu.read(large, 399_984, 16)]);
    expect(results.map((bytes) => [...new Float32Array(bytes)])).toEqual([
      [3, 5, 7, 9],
      [8, 12, 7, 9],
      [67, 67, 67, 67],
      [5, 5, 5, 5],
    ]);
    await gpu.dispose();
  });

  it('can be disposed of while kernels are being compiled', async () => {
    const { gpu } = await openTestWebGpu();
    const [x, y] = [gpu.buffer(16), gpu.buffer(16)];
    gpu.dispatch(doubled(5), { x, y }, { factor: 2 }, [1]);
    const unread = gpu.read(y, 0, 16);
    const refused = expect(unread).rejects.toThrow(/disposed/);
    await gpu.dispose();
    await refused;
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
