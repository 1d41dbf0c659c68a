// Products of several sequences against plain float64 arithmetic: in tiles everywhere, on matrix units where a GPU has them.
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { hasBatchGemm } from '../../../src/backends/webgpu/fast/batch-gemm.js';
import {
  batchProducts,
  type BatchProduct,
  type BatchProductKind,
} from '../../../src/backends/webgpu/fast/batch-products.js';
import type { WebGpuBackend } from '../../../src/backends/webgpu/index.js';
import { ownLinear } from '../../../src/backends/webgpu/linear.js';
import { f16BitsToF32, f32ToF16Bits, roundToF16 } from '../../../src/core/dtype.js';
import { createRng } from '../../../src/core/rng.js';
import { hostTensor } from '../../../src/core/tensor.js';
import type { LinearHandle } from '../../../src/ops/backend.js';
import { openTestWebGpu, webgpuMissing } from '../../support/webgpu.js';

interface Case extends Pick<BatchProduct, 'batch' | 'weights' | 'groupSize' | 'residual' | 'bias' | 'source'> {
  readonly out: number;
  readonly inFeatures: number;
  /** Size of the activations. */
  readonly size: number;
}

const CASES: readonly Case[] = [
  // Rows, channels and sequences that fill no tile.
  {
    batch: 5,
    weights: 'int4',
    groupSize: 32,
    out: 72,
    inFeatures: 352,
    residual: true,
    bias: true,
    source: 'silu',
    size: 1,
  },
  // More sequences than a kernel takes, the rows of the second part at an odd place of the result.
  {
    batch: 44,
    weights: 'bf16',
    groupSize: 32,
    out: 33,
    inFeatures: 96,
    residual: true,
    bias: true,
    source: 'norm',
    size: 1,
  },
  // Activations past f16's range, which the factors of their chunks hold.
  {
    batch: 32,
    weights: 'int4',
    groupSize: 128,
    out: 64,
    inFeatures: 512,
    residual: false,
    bias: false,
    source: 'silu',
    size: 1e5,
  },
  {
    batch: 17,
    weights: 'f16',
    groupSize: 32,
    out: 40,
    inFeatures: 96,
    residual: false,
    bias: false,
    source: 'norm',
    size: 3,
  },
  {
    batch: 6,
    weights: 'bf16',
    groupSize: 32,
    out: 33,
    inFeatures: 64,
    residual: false,
    bias: false,
    source: 'norm',
    size: 0.01,
  },
];

describe.skipIf(webgpuMissing)('products of several sequences', () => {
  let backend: WebGpuBackend;
  beforeAll(async () => {
    backend = await openTestWebGpu();
  });
  afterAll(() => backend.dispose());

  const rng = createRng(9);
  const normals = (n: number, scale = 1): Float32Array => Float32Array.from({ length: n }, () => rng.normal() * scale);
  const toGpu = (data: ArrayBufferView): GPUBuffer => {
    const buffer = backend.gpu.buffer(Math.max(16, data.byteLength));
    backend.gpu.upload(buffer, data);
    return buffer;
  };

  /** A weight as the backend packs it, and what it stands for. */
  async function weight({ weights, groupSize, out, inFeatures }: Case): Promise<[LinearHandle, Float64Array]> {
    if (weights !== 'int4') {
      // Values that both 16-bit types hold.
      const values = normals(out * inFeatures, 0.1).map((e) => Math.fround(Math.round(e * 1024) / 1024));
      const bits = new Uint32Array(values.buffer);
      const data = Uint16Array.from(values, (e, i) => (weights === 'f16' ? f32ToF16Bits(e) : bits[i] >>> 16));
      const held = Float64Array.from(data, (h) =>
        weights === 'f16' ? f16BitsToF32(h) : new Float32Array(Uint32Array.of(h << 16).buffer)[0],
      );
      const dense = hostTensor(weights, [out, inFeatures], data);
      return [await backend.loadLinear({ kind: 'dense', weight: dense }), held];
    }
    const groups = (out * inFeatures) / groupSize;
    const codes = Uint8Array.from({ length: out * inFeatures }, () => rng.int(0, 16));
    const zeros = Uint8Array.from({ length: groups }, () => rng.int(0, 16));
    const scales = Float32Array.from({ length: groups }, () => roundToF16(0.01 + 0.02 * rng.uniform()));
    const held = Float64Array.from(codes, (q, i) => {
      const g = Math.floor(i / groupSize);
      return (q - zeros[g]) * scales[g];
    });
    const quantized = { bits: 4, groupSize, inFeatures, outFeatures: out, codes, zeros, scales } as const;
    return [await backend.loadLinear({ kind: 'quantized', weight: quantized }), held];
  }

  describe.each(CASES)('$weights, $batch × $out × $inFeatures', (v) => {
    it.for(['tiled', 'matrix'] satisfies BatchProductKind[])('%s', async (kind, { skip }) => {
      skip(kind === 'matrix' && !hasBatchGemm(backend.gpu.capabilities), 'this GPU has no matrix units');
      const { batch, out, inFeatures } = v;
      const [handle, w] = await weight(v);
      const linear = ownLinear(handle);
      // Normalised chunks as activations.ts writes them.
      const x = normals(batch * inFeatures, v.size);
      const halves = new Uint16Array(x.length);
      const factors = new Float32Array(x.length / 16);
      for (let c = 0; c < x.length; c += 32) {
        const top = x.subarray(c, c + 32).reduce((a, b) => Math.max(a, Math.abs(b)), 0);
        factors[c / 16] = top;
        for (let i = c; i < c + 32; i++) halves[i] = f32ToF16Bits(x[i] / top);
      }
      const values = Float64Array.from(halves, (h, i) => f16BitsToF32(h) * factors[2 * Math.floor(i / 32)]);
      // Columns of a wider result, from activations behind another product's.
      const [column, stride] = [8, out + 12];
      const first = inFeatures / 32;
      const behind = <T extends Float32Array | Uint16Array>(data: T, gap: number): T => {
        const wide = new (data.constructor as new (n: number) => T)(data.length + gap);
        wide.set(data, gap);
        return wide;
      };
      const residual = normals(batch * stride);
      const bias = normals(out);
      const y = toGpu(new Float32Array(batch * stride).fill(7));
      const buffers = {
        w: linear.weights,
        grid: linear.grids ?? linear.weights,
        x: toGpu(behind(halves, inFeatures)),
        factors: toGpu(behind(factors, inFeatures / 16)),
        y,
        residual: toGpu(residual),
        bias: toGpu(bias),
      };
      const params = { chunks: inFeatures / 32, outFeatures: out, stride, column, first };
      backend.gpu.run(batchProducts(backend.gpu, kind, { ...v, buffers, params }));
      const got = new Float32Array(await backend.gpu.read(y, 0, batch * stride * 4));
      const f16 = kind === 'matrix' || backend.gpu.capabilities.f16;
      for (let b = 0; b < batch; b++)
        for (let c = 0; c < stride; c++) {
          const [at, r] = [b * stride + c, c - column];
          if (r < 0 || r >= out) {
            expect(got[at]).toBe(7);
            continue;
          }
          let want = (v.residual ? residual[at] : 0) + (v.bias ? bias[r] : 0);
          let norm = 0;
          for (let i = 0; i < inFeatures; i++) {
            const term = w[r * inFeatures + i] * values[b * inFeatures + i];
            want += term;
            norm += term ** 2;
          }
          expect(Math.abs(got[at] - want)).toBeLessThan((f16 ? 4e-3 : 1e-5) * Math.sqrt(norm) + 1e-6);
        }
    });
  });
});
