// Attention of the decode plan over caches of integers, heads turned after RoPE, against the float64 oracle op by op, and what it
// writes into the cache against what the op writes.
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { GpuKvCache } from '../../../src/backends/webgpu/kv-cache.js';
import { attentionGroups, decodeAttentionKernel } from '../../../src/backends/webgpu/fast/attention.js';
import type { WebGpuBackend } from '../../../src/backends/webgpu/index.js';
import { unpackGridKernel } from '../../../src/backends/webgpu/kernels/activation-grid.js';
import { f16BitsToF32 } from '../../../src/core/dtype.js';
import { createRng } from '../../../src/core/rng.js';
import { hostTensor } from '../../../src/core/tensor.js';
import type { Backend, KvGrid } from '../../../src/ops/backend.js';
import { createReferenceBackend, readF64 } from '../../../src/ops/reference/backend.js';
import { hadamardTransform } from '../../../src/transforms/index.js';
import { openTestWebGpu, webgpuMissing } from '../../support/webgpu.js';

describe.skipIf(webgpuMissing)('attention over caches of integers', () => {
  let backend: WebGpuBackend;
  beforeAll(async () => {
    backend = await openTestWebGpu();
  });
  afterAll(() => backend.dispose());
  const oracle = createReferenceBackend();
  const [batch, capacity, eps] = [2, 100, 1e-6];

  it.each([
    { heads: 4, kvHeads: 2, headDim: 64, bits: 8, turn: true, splits: 2, window: 0, position: 70 },
    { heads: 4, kvHeads: 1, headDim: 128, bits: 4, turn: true, splits: 3, window: 0, position: 90 },
    { heads: 2, kvHeads: 2, headDim: 128, bits: 8, turn: false, splits: 1, window: 20, position: 33 },
    { heads: 2, kvHeads: 2, headDim: 32, bits: 4, turn: true, splits: 1, window: 0, position: 0 },
  ] as const)('%o', async ({ heads, kvHeads, headDim, bits, turn, splits, window, position }) => {
    const { gpu } = backend;
    const rng = createRng(headDim + position);
    const width = (heads + 2 * kvHeads) * headDim;
    const grid: KvGrid = { bits, clip: 0.95 };
    const scale = headDim ** -0.5;
    const angles = Float32Array.from({ length: (capacity * headDim) / 2 }, () => 3 * rng.normal());
    const qkv = Float32Array.from({ length: batch * (position + 1) * width }, () => rng.normal());
    const tokens = (from: number, count: number): Float32Array =>
      Float32Array.from({ length: batch * count * width }, (_, i) => {
        const [b, at] = [Math.floor(i / (count * width)), i % (count * width)];
        return qkv[(b * (position + 1) + from) * width + at];
      });
    /** Tokens from `from` on through the ops; their attention's result. */
    const forward = async (
      on: Backend,
      cache: Awaited<ReturnType<Backend['createKvCache']>>,
      from: number,
      n: number,
    ) => {
      const rope = await on.loadRope(angles.map(Math.cos), angles.map(Math.sin), headDim);
      const x = await on.upload(hostTensor('f32', [batch * n, width], tokens(from, n)));
      const headTransform = turn ? await on.loadTransform(hadamardTransform(headDim)) : undefined;
      const shape = { heads, kvHeads, headDim, batch, start: from };
      const { q, k, v } = await on.splitHeads(x, { ...shape, rope, eps, headTransform });
      return on.attention(q, k, v, { ...shape, scale, cache, ...(window > 0 && { window }) });
    };
    const shape = { batch, kvHeads, headDim, capacity, grid };
    const known = await oracle.createKvCache(shape);
    if (position > 0) await forward(oracle, known, 0, position);
    const want = readF64(await forward(oracle, known, position, 1));
    const [byOps, fused] = [await backend.createKvCache(shape), await backend.createKvCache(shape)];
    if (!(byOps instanceof GpuKvCache) || !(fused instanceof GpuKvCache)) throw new Error('caches of another backend');
    for (const cache of [byOps, fused]) if (position > 0) await forward(backend, cache, 0, position);
    await forward(backend, byOps, position, 1);

    const toGpu = (data: ArrayBufferView): GPUBuffer => {
      const buffer = gpu.buffer(Math.max(16, data.byteLength));
      gpu.upload(buffer, data);
      return buffer;
    };
    const variant = {
      shuffle: (gpu.capabilities.subgroups?.min ?? 0) >= 32,
      heads,
      kvHeads,
      headDim,
      rotaryDim: headDim,
      qkNorm: false,
      splits,
      window,
      together: heads / kvHeads,
      teams: 4,
      unroll: 2,
      grid,
      turn,
    };
    const [out, stats] = [gpu.buffer(4 * batch * heads * splits * headDim), gpu.buffer(8 * batch * heads * splits)];
    const input = toGpu(tokens(position, 1));
    gpu.dispatch(
      decodeAttentionKernel(variant),
      {
        qkv: input,
        norms: input,
        rope: toGpu(Float32Array.from([...angles].flatMap((angle) => [Math.cos(angle), Math.sin(angle)]))),
        positions: toGpu(Uint32Array.of(...new Uint32Array(batch).fill(position), capacity)),
        keys: fused.keys,
        values: fused.values,
        out,
        stats,
      },
      { scale, eps },
      attentionGroups(variant, batch),
    );
    const parts = new Float32Array(await gpu.read(out, 0, 4 * batch * heads * splits * headDim));
    const sums = new Float32Array(await gpu.read(stats, 0, 8 * batch * heads * splits));
    for (let h = 0; h < batch * heads; h++) {
      let [top, total] = [-Infinity, 0];
      const got = new Float64Array(headDim);
      for (let s = 0; s < splits; s++) top = Math.max(top, sums[2 * (h * splits + s)]);
      for (let s = 0; s < splits; s++) {
        const at = h * splits + s;
        if (sums[2 * at + 1] === 0) continue;
        const weight = Math.exp(sums[2 * at] - top);
        total += weight * sums[2 * at + 1];
        for (let d = 0; d < headDim; d++) got[d] += weight * parts[at * headDim + d];
      }
      for (let d = 0; d < headDim; d++) expect(Math.abs(got[d] / total - want[h * headDim + d])).toBeLessThan(1e-4);
    }
    // The same codes as the op's, but for values that float rounding tips onto the next one; low and scale to f32's rounding.
    for (const name of ['keys', 'values'] as const) {
      const { words } = byOps;
      let tipped = 0;
      for (let run = 0; run < batch * kvHeads; run++) {
        const at = 4 * words * (run * capacity + position);
        const [a, b] = [await gpu.read(byOps[name], at, 4 * words), await gpu.read(fused[name], at, 4 * words)];
        const [x, y] = [new Float32Array(a, 0, 2), new Float32Array(b, 0, 2)];
        for (const i of [0, 1]) expect(Math.abs(x[i] - y[i])).toBeLessThan(1e-5);
        const [p, q] = [new Uint8Array(a, 8), new Uint8Array(b, 8)];
        tipped += p.filter((code, i) => code !== q[i]).length;
      }
      expect(tipped).toBeLessThanOrEqual(2);
    }

    // What prefill's attention on matrix units reads instead: the entries so far as f16.
    const reach = position + 1;
    const count = (batch * kvHeads * reach * headDim) / 8;
    const unpacked = gpu.buffer(16 * count);
    gpu.dispatch(
      unpackGridKernel(headDim, bits, gpu.capabilities.f16),
      { cache: byOps.keys, out: unpacked },
      { count, reach, capacity },
      [Math.ceil(count / 256)],
    );
    const halves = new Uint16Array(await gpu.read(unpacked, 0, 16 * count));
    const stored = await gpu.read(byOps.keys, 0, 4 * byOps.words * batch * kvHeads * capacity);
    for (let run = 0; run < batch * kvHeads; run++)
      for (let token = 0; token < reach; token++) {
        const at = 4 * byOps.words * (run * capacity + token);
        const [low, step] = new Float32Array(stored, at, 2);
        const codes = new Uint8Array(stored, at + 8, (headDim * bits) / 8);
        for (let d = 0; d < headDim; d++) {
          const code = bits === 8 ? codes[d] : (codes[d >> 1] >> (4 * (d & 1))) & 15;
          const got = f16BitsToF32(halves[(run * reach + token) * headDim + d]);
          expect(Math.abs(got - (low + step * code))).toBeLessThan(2 ** -11 * (Math.abs(low + step * code) + 1e-3));
        }
      }
  });
});
