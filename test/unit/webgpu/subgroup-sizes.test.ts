// Rotations inside subgroups of every size that GPUs have: the sizes that are not this GPU's own run emulated.
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import type { WebGpuBackend } from '../../../src/backends/webgpu/index.js';
import { MAX_PER_LANE, rotateInSubgroupKernel } from '../../../src/backends/webgpu/kernels/rotation-rows.js';
import { createRng } from '../../../src/core/rng.js';
import { randomPairs } from '../../../src/transforms/index.js';
import { emulatedSubgroups } from '../../support/emulated-subgroups.js';
import { openTestWebGpu, webgpuMissing } from '../../support/webgpu.js';

describe.skipIf(webgpuMissing)('rotations inside subgroups', () => {
  let backend: WebGpuBackend;
  beforeAll(async () => {
    backend = await openTestWebGpu();
  });
  afterAll(() => backend.dispose());

  const sizes = [4, 8, 16, 32, 64].flatMap((lanes) =>
    [16, 32, 64, 128]
      .filter((groupSize) => groupSize % lanes === 0 && groupSize / lanes <= MAX_PER_LANE)
      .map((groupSize) => [lanes, groupSize] as const),
  );
  it.each(sizes)('of %i lanes, groups of %i', async (lanes, groupSize) => {
    const { gpu } = backend;
    const [rows, channels, krot] = [3, 3 * groupSize, 5];
    const rng = createRng(lanes * 1000 + groupSize);
    const pairs = randomPairs(channels, groupSize, krot, rng);
    const theta = Float32Array.from({ length: (krot * channels) / 2 }, () => 2 * rng.normal());
    const [x, scales] = [rows * channels, channels].map((n) => Float32Array.from({ length: n }, () => rng.normal()));
    // As GpuTransform lays them out: each element's partner, and (cos, ± sin).
    const [partners, turns] = [new Uint32Array(krot * channels), new Float32Array(2 * krot * channels)];
    const want = Float64Array.from(x, (value, at) => value * scales[at % channels]);
    for (const [p, angle] of theta.entries()) {
      const base = Math.floor((2 * p) / groupSize) * groupSize;
      const [i, j] = [pairs[2 * p], pairs[2 * p + 1]];
      const [cos, sin] = [Math.cos(angle), Math.sin(angle)];
      partners.set([j], base + i);
      partners.set([i], base + j);
      turns.set([cos, sin], 2 * (base + i));
      turns.set([cos, -sin], 2 * (base + j));
      for (let row = 0; row < rows; row++) {
        const [a, b] = [i, j].map((e) => row * channels + (base % channels) + e);
        [want[a], want[b]] = [want[a] * cos + want[b] * sin, want[b] * cos - want[a] * sin];
      }
    }
    const load = (data: ArrayBufferView): GPUBuffer => {
      const buffer = gpu.buffer(data.byteLength);
      gpu.upload(buffer, data);
      return buffer;
    };
    const kernel = rotateInSubgroupKernel(groupSize, lanes, krot);
    const { subgroups } = gpu.capabilities;
    const own = subgroups?.min === lanes && subgroups.max === lanes;
    const out = gpu.buffer(x.byteLength);
    const items = rows * (channels / groupSize);
    gpu.dispatch(
      own ? kernel : emulatedSubgroups(kernel, lanes),
      { x: load(x), scales: load(scales), partners: load(partners), turns: load(turns), out },
      { items, channels },
      [Math.ceil(items / (Math.max(64, lanes) / lanes))],
    );
    const got = new Float32Array(await gpu.read(out, 0, x.byteLength));
    for (const [i, value] of want.entries()) expect(Math.abs(got[i] - value)).toBeLessThan(1e-5);
  });
});
