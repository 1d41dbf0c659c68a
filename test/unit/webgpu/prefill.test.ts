// Ops of many rows with activations in f16, beyond what conformance reaches: edges of tiles, attention over f16 heads; views and
// ops that don't know f16; which precision is taken.
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { openBackend } from '../../../src/backends/registry.js';
import type { GpuCapabilities } from '../../../src/backends/webgpu/capabilities.js';
import { choosePrecision, type WebGpuBackend } from '../../../src/backends/webgpu/index.js';
import { HalfTensor } from '../../../src/backends/webgpu/tensor.js';
import { createRng } from '../../../src/core/rng.js';
import { hostTensor } from '../../../src/core/tensor.js';
import { prefillChecks } from '../../conformance/prefill-checks.js';
import { openTestWebGpu, webgpuMissing } from '../../support/webgpu.js';

describe.skipIf(webgpuMissing)('WebGPU, activations in f16', () => {
  let gpu: WebGpuBackend;
  beforeAll(async () => {
    gpu = await openTestWebGpu({ precision: 'f16' });
  });
  afterAll(() => gpu.dispose());

  it.each(prefillChecks.map((check) => [check.name, check] as const))('%s', async (_, check) => {
    await check.run(gpu);
  });

  const random = (rows: number, cols: number, scale = 1) => {
    const rng = createRng(4);
    const values = Float32Array.from({ length: rows * cols }, () => scale * rng.normal());
    return hostTensor('f32', [rows, cols], values);
  };
  const ones = (n: number) => hostTensor('f32', [n], new Float32Array(n).fill(1));

  it('takes f16 by itself only where there are matrix units, and says what it took', async () => {
    expect(gpu.info).toMatchObject({ precision: 'f16' });
    const matrices = (['f32', 'f16'] as const).map((result) => ({ m: 16, n: 16, k: 16, component: 'f16', result }));
    const able: GpuCapabilities = {
      ...gpu.gpu.capabilities,
      f16: true,
      subgroups: { min: 32, max: 32 },
      subgroupMatrices: matrices,
    };
    expect(choosePrecision(able, 'auto')).toBe('f16');
    expect(choosePrecision(able)).toBe('f32');
    for (const lacking of [{ f16: false }, { subgroups: { min: 8, max: 32 } }, { subgroupMatrices: matrices.slice(1) }])
      expect(choosePrecision({ ...able, ...lacking }, 'auto')).toBe('f32');
    const auto = await openTestWebGpu({ precision: 'auto' });
    expect(auto.info.precision).toBe(choosePrecision(auto.gpu.capabilities, 'auto'));
    await auto.dispose();
    await expect(openBackend('cpu', { precision: 'f16' })).rejects.toThrow(/CPU backend computes in f32/);
  });

  it('keeps f16 to many rows, and shows other ops f32', async () => {
    const weight = await gpu.upload(ones(64));
    const few = await gpu.rmsNorm(await gpu.upload(random(8, 64)), weight, 1e-6);
    const many = await gpu.rmsNorm(await gpu.upload(random(24, 64)), weight, 1e-6);
    expect(few).not.toBeInstanceOf(HalfTensor);
    expect(many).toBeInstanceOf(HalfTensor);
    const values = await gpu.download(many);
    const turned = await gpu.download(await gpu.transpose(many));
    expect(turned[1]).toBe(values[64]);
    // 64 columns of f16 are 128 bytes: views begin at every other row, the rest are copies.
    for (const begin of [0, 2, 5]) {
      const slice = gpu.sliceRows(many, begin, 24);
      expect(await gpu.download(slice)).toEqual(values.slice(begin * 64));
      gpu.free(slice);
    }
    expect((await gpu.concatColumns([many, many])).shape).toEqual([24, 128]);
  });

  it('frees what it widens', async () => {
    const weight = await gpu.upload(ones(64));
    const x = await gpu.upload(random(24, 64));
    const run = async (): Promise<void> => {
      const y = await gpu.rmsNorm(x, weight, 1e-6);
      await gpu.download(y);
      gpu.free(y);
    };
    await run();
    const before = gpu.gpu.allocatedBytes;
    for (let i = 0; i < 5; i++) await run();
    expect(gpu.gpu.allocatedBytes).toBe(before);
  });

  it('shows what f16 cannot hold', async () => {
    const values = Float32Array.from({ length: 16 * 16 }, (_, i) => (i < 16 ? 300 : 1));
    const y = await gpu.download(await gpu.siluMul(await gpu.upload(hostTensor('f32', [16, 16], values))));
    expect(y.subarray(0, 8).some((value) => Number.isFinite(value))).toBe(false);
    expect(y.subarray(8).every((value) => Number.isFinite(value))).toBe(true);
  });
});
