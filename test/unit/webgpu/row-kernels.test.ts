// Whole-row activation kernels of the decode plan and the products of their codes, against float64.
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import type { ActivationSource } from '../../../src/backends/webgpu/fast/activations.js';
import { gemvKernel, gemvRowsPerGroup } from '../../../src/backends/webgpu/fast/gemv.js';
import { signsOf } from '../../../src/backends/webgpu/fast/hadamard.js';
import { rowKernel, rowTakes } from '../../../src/backends/webgpu/fast/row.js';
import type { WebGpuBackend } from '../../../src/backends/webgpu/index.js';
import { ownLinear } from '../../../src/backends/webgpu/linear.js';
import { f16BitsToF32, roundToF16 } from '../../../src/core/dtype.js';
import { createRng } from '../../../src/core/rng.js';
import type { HadamardTransform } from '../../../src/ops/backend.js';
import { applyHadamard, hadamardTransform } from '../../../src/transforms/index.js';
import { openTestWebGpu, webgpuMissing } from '../../support/webgpu.js';

describe.skipIf(webgpuMissing)('whole-row kernels', () => {
  let backend: WebGpuBackend;
  beforeAll(async () => {
    backend = await openTestWebGpu();
  });
  afterAll(() => backend.dispose());
  const rng = createRng(11);
  const normals = (n: number, scale = 1): Float32Array => Float32Array.from({ length: n }, () => rng.normal() * scale);
  const toGpu = (data: ArrayBufferView): GPUBuffer => {
    const buffer = backend.gpu.buffer(Math.max(16, data.byteLength));
    backend.gpu.upload(buffer, data);
    return buffer;
  };
  const [headDim, splits, eps] = [64, 3, 1e-5];

  /** The source's values in float64, times the gain. */
  function sourceOf(kind: ActivationSource, channels: number, batch: number, gain: Float32Array) {
    const width = kind === 'silu' ? 2 * channels : kind === 'attention' ? channels * splits : channels;
    const source = normals(batch * width, 2);
    const stats = Float32Array.from({ length: (2 * batch * channels * splits) / headDim }, (_, i) =>
      i % 2 === 0 ? rng.normal() : rng.uniform() < 0.2 ? 0 : 1 + rng.uniform(),
    );
    // A head without any keys does not happen.
    for (let i = 1; i < stats.length; i += 2 * splits) stats[i] = 1;
    const rows = Array.from({ length: batch }, (_, b) => {
      const at = b * width;
      const squares = source.subarray(at, at + channels).reduce((s, e) => s + e * e, 0);
      return Float64Array.from({ length: channels }, (_, c) => {
        const raw = (): number => {
          if (kind === 'silu') {
            const g = source[at + c];
            return (g / (1 + Math.exp(-g))) * source[at + channels + c];
          }
          if (kind === 'norm') return source[at + c] / Math.sqrt(squares / channels + eps);
          if (kind === 'plain') return source[at + c];
          const head = Math.floor(c / headDim) + b * (channels / headDim);
          const parts = Array.from({ length: splits }, (_, s) => ({
            top: stats[2 * (head * splits + s)],
            sum: stats[2 * (head * splits + s) + 1],
            value: source[(head * splits + s) * headDim + (c % headDim)],
          })).filter(({ sum }) => sum > 0);
          const top = Math.max(...parts.map((p) => p.top));
          const total = parts.reduce((s, p) => s + Math.exp(p.top - top) * p.sum, 0);
          return parts.reduce((s, p) => s + Math.exp(p.top - top) * p.value, 0) / total;
        };
        return raw() * gain[c];
      });
    });
    return { source, stats, rows };
  }

  const shapes: readonly (readonly [ActivationSource, number, Partial<HadamardTransform> | undefined])[] = [
    ['norm', 320, undefined],
    ['silu', 1536, {}],
    ['silu', 14336, {}],
    ['attention', 768, { order: 12, inner: 64 }],
    ['attention', 512, { order: 8, inner: 64 }],
    ['plain', 640, { order: 64 }],
  ];
  it.each(shapes.flatMap((shape) => [true, false].map((codes) => [...shape, codes] as const)))(
    '%s, %i channels, %o, codes %s',
    async (kind, channels, options, codes) => {
      const { gpu } = backend;
      const batch = 2;
      const transform = options && hadamardTransform(channels, options);
      const gain = normals(channels).map((e) => 1 + 0.2 * e);
      const { source, stats, rows } = sourceOf(kind, channels, batch, gain);
      const m = transform ? Math.sqrt(transform.base.length) : 1;
      const hadamard = transform && {
        m,
        p: transform.order / m,
        inner: transform.inner,
        signs: signsOf(transform.base),
      };
      expect(rowTakes(channels, hadamard)).toBe(true);
      for (const subgroups of [true, false]) {
        const kernel = rowKernel({
          source: kind,
          channels,
          ...(hadamard && { hadamard }),
          codes,
          threads: 256,
          memory: gpu.limits.maxComputeWorkgroupStorageSize,
          subgroups,
          splits,
          headDim,
        });
        const x = gpu.buffer(batch * channels * 2);
        const factors = gpu.buffer((batch * channels) / 4);
        const [top, clip] = [127, 0.9];
        gpu.dispatch(
          kernel,
          { source: toGpu(source), stats: toGpu(stats), gain: toGpu(gain), x, factors },
          { eps, top, clip },
          [1, batch],
        );
        const scales = new Float32Array(await gpu.read(factors, 0, (batch * channels) / 4));
        const bytes = await gpu.read(x, 0, batch * channels * (codes ? 1 : 2));
        for (const [b, row] of rows.entries()) {
          const want = transform ? applyHadamard(row.slice(), transform) : row;
          const largest = want.reduce((t, e) => Math.max(t, Math.abs(e)), 0);
          let wrong = 0;
          for (let c = 0; c < channels; c++) {
            const chunk = Math.floor(c / 32);
            const [factor] = scales.subarray(2 * (b * (channels / 32) + chunk));
            if (codes) {
              const scale = (clip * largest) / top;
              expect(Math.abs(factor / scale - 1)).toBeLessThan(1e-3);
              // Channels 0 4 1 5 and 2 6 3 7 of eight, a byte each.
              const place = [0, 2, 4, 6, 1, 3, 5, 7][c % 8];
              const got = new Int8Array(bytes)[b * channels + c - (c % 8) + place];
              const code = Math.max(-top - 1, Math.min(top, want[c] / scale));
              expect(Math.abs(got - code)).toBeLessThan(0.7);
              if (Math.abs(got - code) > 0.501) wrong++;
            } else {
              const got = factor * f16BitsToF32(new Uint16Array(bytes)[b * channels + c]);
              expect(Math.abs(got - want[c])).toBeLessThan(2e-3 * largest);
            }
          }
          // In f16 between phases a few values near a tie fall to the other side.
          expect(wrong).toBeLessThan(0.05 * channels);
          for (let chunk = 0; chunk < channels / 32; chunk++) {
            let sum = 0;
            for (let i = 0; i < 32; i++) {
              const at = b * channels + chunk * 32 + i;
              sum += codes ? new Int8Array(bytes)[at] : f16BitsToF32(new Uint16Array(bytes)[at]);
            }
            expect(scales[2 * (b * (channels / 32) + chunk) + 1]).toBeCloseTo(sum, 2);
          }
        }
      }
    },
  );

  it.each([
    [512, 40, 128],
    [512, 40, 512],
    [1024, 20, 32],
  ])('products of codes: %i × %i, groups of %i', async (inFeatures, outFeatures, groupSize) => {
    const { gpu } = backend;
    const batch = 2;
    const groups = inFeatures / groupSize;
    const weight = {
      bits: 4 as const,
      groupSize,
      inFeatures,
      outFeatures,
      codes: Uint8Array.from({ length: outFeatures * inFeatures }, () => rng.int(0, 16)),
      zeros: Uint8Array.from({ length: outFeatures * groups }, () => rng.int(0, 16)),
      scales: Float32Array.from({ length: outFeatures * groups }, () => roundToF16(0.01 + rng.uniform() / 50)),
    };
    const linear = ownLinear(await backend.loadLinear({ kind: 'quantized', weight }));
    const codes = Int8Array.from({ length: batch * inFeatures }, () => rng.int(-128, 128));
    const bytes = new Int8Array(codes.length);
    codes.forEach((code, at) => (bytes[at - (at % 8) + [0, 2, 4, 6, 1, 3, 5, 7][at % 8]] = code));
    const factors = Float32Array.from({ length: (2 * batch * inFeatures) / 32 }, (_, i) => {
      const row = Math.floor((i >> 1) / (inFeatures / 32));
      return i % 2 === 0 ? 0.5 + row : codes.subarray((i >> 1) * 32, (i >> 1) * 32 + 32).reduce((s, e) => s + e, 0);
    });
    const residual = normals(batch * outFeatures);
    for (const split of [1, 2]) {
      const variant = { f16: false, shuffle: false, rows: 4, teams: 4, split, batch, groupSize };
      const kernel = gemvKernel({ ...variant, residual: true, bias: false, integers: true });
      const y = gpu.buffer(batch * outFeatures * 4);
      gpu.dispatch(
        kernel,
        {
          w: linear.weights,
          grid: linear.grids ?? linear.weights,
          x: toGpu(bytes),
          factors: toGpu(factors),
          y,
          residual: toGpu(residual),
          bias: linear.weights,
        },
        { chunks: inFeatures / 32, outFeatures, stride: outFeatures, column: 0, first: 0 },
        [Math.ceil(outFeatures / gemvRowsPerGroup(variant))],
      );
      const got = new Float32Array(await gpu.read(y, 0, batch * outFeatures * 4));
      for (let b = 0; b < batch; b++)
        for (let o = 0; o < outFeatures; o++) {
          let [want, magnitude] = [0, 0];
          for (let i = 0; i < inFeatures; i++) {
            const g = o * groups + Math.floor(i / groupSize);
            const w = (weight.codes[o * inFeatures + i] - weight.zeros[g]) * weight.scales[g] * (0.5 + b);
            want += w * codes[b * inFeatures + i];
            magnitude += Math.abs(w * codes[b * inFeatures + i]);
          }
          expect(Math.abs(got[b * outFeatures + o] - want - residual[b * outFeatures + o])).toBeLessThan(
            1e-6 * (magnitude + 1),
          );
        }
    }
    backend.release(linear);
  });
});
