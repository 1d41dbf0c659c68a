// Rows of the decode plan over several workgroups: every source, orders with and without a base matrix, chunks and codes, against float64.
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import type { ActivationSource } from '../../../src/backends/webgpu/fast/activations.js';
import { signsOf } from '../../../src/backends/webgpu/fast/hadamard.js';
import { RowSlices, sliceShape } from '../../../src/backends/webgpu/fast/row-slices.js';
import type { WebGpuBackend } from '../../../src/backends/webgpu/index.js';
import { f16BitsToF32 } from '../../../src/core/dtype.js';
import { createRng } from '../../../src/core/rng.js';
import type { HadamardTransform } from '../../../src/ops/backend.js';
import { applyHadamard, hadamardTransform } from '../../../src/transforms/index.js';
import { openTestWebGpu, webgpuMissing } from '../../support/webgpu.js';

describe.skipIf(webgpuMissing).each([{}, { subgroups: false }])(
  'rows over several workgroups, features %o',
  (features) => {
    let backend: WebGpuBackend;
    beforeAll(async () => {
      backend = await openTestWebGpu({ features });
    });
    afterAll(() => backend.dispose());
    const rng = createRng(5);
    const normals = (n: number): Float32Array => Float32Array.from({ length: n }, () => 2 * rng.normal());
    const [splits, batch, eps] = [5, 2, 1e-5];

    /** The source's buffers, and its rows in float64. */
    function sourceOf(kind: ActivationSource, channels: number, heads: number, gain: Float32Array) {
      const width = { silu: 2 * channels, attention: channels * splits, plain: channels, norm: channels }[kind];
      const source = normals(batch * width);
      const stats = Float32Array.from({ length: 2 * batch * heads * splits }, (_, i) =>
        i % 2 === 0 ? rng.normal() : i % (2 * splits) === 1 || rng.uniform() > 0.3 ? 1 + rng.uniform() : 0,
      );
      const rms = Array.from({ length: batch }, (_, b) =>
        Math.sqrt(source.subarray(b * width, (b + 1) * width).reduce((s, e) => s + e * e, 0) / width + eps),
      );
      const rows = Array.from({ length: batch }, (_, b) =>
        Float64Array.from({ length: channels }, (_, c) => {
          const at = b * width + c;
          if (kind === 'plain') return source[at];
          if (kind === 'norm') return gain[c] * (source[at] / rms[b]);
          if (kind === 'silu') return (source[at] / (1 + Math.exp(-source[at]))) * source[at + channels];
          const inner = channels / heads;
          const first = (b * heads + Math.floor(c / inner)) * splits;
          let [top, total, value] = [-Infinity, 0, 0];
          for (let s = 0; s < splits; s++)
            if (stats[2 * (first + s) + 1] > 0) top = Math.max(top, stats[2 * (first + s)]);
          for (let s = 0; s < splits; s++) {
            if (stats[2 * (first + s) + 1] === 0) continue;
            const weight = Math.exp(stats[2 * (first + s)] - top);
            total += weight * stats[2 * (first + s) + 1];
            value += weight * source[(first + s) * inner + (c % inner)];
          }
          return value / total;
        }),
      );
      return { source, stats, rows };
    }

    const shapes: readonly (readonly [ActivationSource, number, Partial<HadamardTransform> | undefined])[] = [
      ['silu', 14336, {}],
      ['silu', 11008, {}],
      ['silu', 1024, {}],
      ['plain', 768, {}],
      ['attention', 4096, { order: 32, inner: 128 }],
      ['attention', 768, { order: 12, inner: 64 }],
      ['attention', 5120, { order: 40, inner: 128 }],
      ['norm', 4096, undefined],
      ['norm', 352, undefined],
    ];
    // A norm without codes is activationKernel's.
    const cases = shapes
      .flatMap((shape) => [true, false].map((codes) => [...shape, codes] as const))
      .filter(([kind, , , codes]) => codes || kind !== 'norm');
    it.each(cases)('%s, %i channels, %o, codes %s', async (kind, channels, options, codes) => {
      const { gpu } = backend;
      const transform = options && hadamardTransform(channels, options);
      const m = transform ? Math.sqrt(transform.base.length) : 1;
      const hadamard = transform && {
        m,
        p: transform.order / m,
        inner: transform.inner,
        signs: signsOf(transform.base),
      };
      const heads = kind === 'attention' && transform ? transform.order : 1;
      const gain = normals(channels);
      const { source, stats, rows } = sourceOf(kind, channels, heads, gain);
      const upload = (data: Float32Array): GPUBuffer => {
        const buffer = gpu.buffer(Math.max(16, data.byteLength));
        gpu.upload(buffer, data);
        return buffer;
      };
      const x = gpu.buffer(batch * channels * 2);
      const factors = gpu.buffer((batch * channels) / 4);
      const [top, clip] = [127, 0.9];
      const row = { ...(hadamard && { hadamard }), ...(codes && { grid: { top, clip } }) };
      const buffers = { source: upload(source), stats: upload(stats), gain: upload(gain), x, factors };
      const slices = new RowSlices(gpu, (bytes) => gpu.buffer(bytes));
      const dispatches = slices.prepare({ source: kind, channels, row, batch, splits, eps, buffers });
      expect(dispatches).toHaveLength(codes && kind !== 'norm' ? 2 : 1);
      gpu.run(dispatches ?? []);
      const scales = new Float32Array(await gpu.read(factors, 0, (batch * channels) / 4));
      const bytes = await gpu.read(x, 0, batch * channels * (codes ? 1 : 2));
      for (const [b, values] of rows.entries()) {
        const want = transform ? applyHadamard(values, transform) : values;
        const largest = want.reduce((t, e) => Math.max(t, Math.abs(e)), 0);
        for (let c = 0; c < channels; c++) {
          const at = b * channels + c;
          const factor = scales[2 * Math.floor(at / 32)];
          if (codes) {
            const scale = (clip * largest) / top;
            expect(Math.abs(factor / scale - 1)).toBeLessThan(1e-5);
            const code = Math.max(-top - 1, Math.min(top, want[c] / scale));
            const got = new Int8Array(bytes)[at - (c % 8) + [0, 2, 4, 6, 1, 3, 5, 7][c % 8]];
            expect(Math.abs(got - code)).toBeLessThan(0.501);
          } else {
            const got = factor * f16BitsToF32(new Uint16Array(bytes)[at]);
            expect(Math.abs(got - want[c])).toBeLessThan(5e-4 * Math.abs(factor));
          }
        }
        for (let chunk = 0; chunk < channels / 32; chunk++) {
          let sum = 0;
          for (let i = 0; i < 32; i++) {
            const at = b * channels + chunk * 32 + i;
            sum += codes ? new Int8Array(bytes)[at] : f16BitsToF32(new Uint16Array(bytes)[at]);
          }
          expect(scales[2 * (b * (channels / 32) + chunk) + 1]).toBeCloseTo(sum, 2);
        }
      }
    });

    it('leaves to the kernel of one workgroup what it does not take', () => {
      expect(sliceShape(640, { m: 1, p: 64, inner: 1 })).toBeUndefined();
      expect(sliceShape(48, { m: 12, p: 4, inner: 1 })).toBeUndefined();
      expect(sliceShape(9728, { m: 76, p: 128, inner: 1 })).toEqual({ rows: 76, columns: 128, sylvester: true });
      expect(sliceShape(12288, { m: 12, p: 1024, inner: 1 })).toEqual({ rows: 24, columns: 512, sylvester: true });
    });
  },
);
