// The fused decode kernels against plain float64 arithmetic, every variant that runs here (SwiftShader: no f16), each with shuffles, which are
// emulated where subgroups have fewer than 32 lanes, and without.
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import type { WebGpuBackend } from '../../../src/backends/webgpu/index.js';
import { f16BitsToF32, f32ToF16Bits, roundToF16 } from '../../../src/core/dtype.js';
import { createRng } from '../../../src/core/rng.js';
import {
  activationGroups,
  activationKernel,
  rotationTable,
  stagesOf,
  type ActivationSource,
} from '../../../src/backends/webgpu/fast/activations.js';
import { attentionGroups, decodeAttentionKernel } from '../../../src/backends/webgpu/fast/attention.js';
import { wholeAttentionKernel } from '../../../src/backends/webgpu/fast/attention-whole.js';
import { gemvGroups, gemvKernel, gemvRowsPerGroup } from '../../../src/backends/webgpu/fast/gemv.js';
import { denseGemvKernel, denseRowsPerGroup } from '../../../src/backends/webgpu/fast/gemv-dense.js';
import {
  NO_TOKEN,
  SAMPLE_SPAN,
  samplePickKernel,
  sampleSpansKernel,
} from '../../../src/backends/webgpu/fast/sample.js';
import { ownLinear } from '../../../src/backends/webgpu/linear.js';
import type { PairwiseTransform, QuantizedWeight } from '../../../src/ops/backend.js';
import { randomPairs } from '../../../src/transforms/index.js';
import type { Kernel } from '../../../src/backends/webgpu/kernel.js';
import { emulatedSubgroups } from '../../support/emulated-subgroups.js';
import { openTestWebGpu, webgpuMissing } from '../../support/webgpu.js';

interface ActivationCase {
  readonly channels: number;
  readonly groupSize: number;
  readonly krot: number;
  readonly count: number;
  readonly batch: number;
  readonly threads: number;
}

/** Unit roundoff of f16, in which activations and cached keys are stored. */
const F16 = 2 ** -11;

describe.skipIf(webgpuMissing).each([{ shuffle: false }, { shuffle: true }])('decode kernels %o', ({ shuffle }) => {
  let backend: WebGpuBackend;
  let f16: boolean;
  let emulated: boolean;
  beforeAll(async () => {
    backend = await openTestWebGpu();
    const { capabilities } = backend.gpu;
    f16 = capabilities.f16;
    emulated = shuffle && (capabilities.subgroups?.min ?? 0) < 32;
  });
  afterAll(() => backend.dispose());

  /** The kernel as it is, or with its shuffles replaced where this GPU's subgroups are too small. */
  const runnable = <B extends string, P extends string>(kernel: Kernel<B, P>): Kernel<B, P> =>
    emulated ? emulatedSubgroups(kernel, 32, { oa: 'vec4<f32>', ob: 'vec4<f32>', word: 'u32' }) : kernel;

  const rng = createRng(7);
  const normals = (n: number, scale = 1): Float32Array => Float32Array.from({ length: n }, () => rng.normal() * scale);

  function toGpu(data: ArrayBufferView): GPUBuffer {
    const buffer = backend.gpu.buffer(Math.max(16, data.byteLength));
    backend.gpu.upload(buffer, data);
    return buffer;
  }
  async function floats(buffer: GPUBuffer, n: number): Promise<Float32Array> {
    return new Float32Array(await backend.gpu.read(buffer, 0, n * 4));
  }

  /** Normalised chunks as activations.ts writes them, and what they stand for. */
  function chunks(x: Float32Array): { x: Uint16Array; factors: Float32Array; value: Float64Array } {
    const out = {
      x: new Uint16Array(x.length),
      factors: new Float32Array(x.length / 16),
      value: new Float64Array(x.length),
    };
    for (let c = 0; c < x.length; c += 32) {
      const top = x.subarray(c, c + 32).reduce((a, b) => Math.max(a, Math.abs(b)), 0);
      let sum = 0;
      for (let i = c; i < c + 32; i++) {
        out.x[i] = top === 0 ? 0 : f32ToF16Bits(x[i] / top);
        sum += f16BitsToF32(out.x[i]);
        out.value[i] = f16BitsToF32(out.x[i]) * Math.fround(top);
      }
      out.factors[c / 16] = top;
      out.factors[c / 16 + 1] = sum;
    }
    return out;
  }

  function randomWeight(outFeatures: number, inFeatures: number, groupSize: number): QuantizedWeight {
    const groups = (outFeatures * inFeatures) / groupSize;
    return {
      bits: 4,
      groupSize,
      inFeatures,
      outFeatures,
      codes: Uint8Array.from({ length: outFeatures * inFeatures }, () => rng.int(0, 16)),
      zeros: Uint8Array.from({ length: groups }, () => rng.int(0, 16)),
      scales: Float32Array.from({ length: groups }, () => roundToF16(0.01 + 0.02 * rng.uniform())),
    };
  }

  function dequantized({ codes, zeros, scales, groupSize }: QuantizedWeight): Float64Array {
    return Float64Array.from(codes, (q, i) => {
      const g = Math.floor(i / groupSize);
      return (q - zeros[g]) * scales[g];
    });
  }

  describe.each([
    { out: 40, inFeatures: 256, groupSize: 32, rows: 4, teams: 4, split: 1, batch: 1, residual: false, bias: false },
    { out: 37, inFeatures: 384, groupSize: 128, rows: 2, teams: 2, split: 2, batch: 1, residual: true, bias: false },
    { out: 64, inFeatures: 2752, groupSize: 32, rows: 1, teams: 4, split: 4, batch: 3, residual: true, bias: true },
    { out: 24, inFeatures: 1024, groupSize: 64, rows: 8, teams: 2, split: 1, batch: 2, residual: false, bias: true },
  ])('int4 product %o', (v) => {
    it('matches', async () => {
      const weight = randomWeight(v.out, v.inFeatures, v.groupSize);
      const w = dequantized(weight);
      const x = chunks(normals(v.batch * v.inFeatures));
      const residual = normals(v.batch * v.out);
      const bias = normals(v.out);
      // As the backend packs it.
      const linear = ownLinear(await backend.loadLinear({ kind: 'quantized', weight }));
      const variant = { ...v, f16, shuffle };
      const kernel = runnable(gemvKernel(variant));
      const y = backend.gpu.buffer(v.batch * v.out * 4);
      const optional = { ...(v.residual && { residual: toGpu(residual) }), ...(v.bias && { bias: toGpu(bias) }) };
      backend.gpu.dispatch(
        kernel,
        {
          w: linear.weights,
          grid: linear.grids ?? linear.weights,
          x: toGpu(x.x),
          factors: toGpu(x.factors),
          y,
          ...optional,
        } as Record<'w' | 'grid' | 'x' | 'factors' | 'y' | 'residual' | 'bias', GPUBuffer>,
        { chunks: v.inFeatures / 32, outFeatures: v.out, stride: v.out, column: 0, first: 0 },
        [Math.ceil(v.out / gemvRowsPerGroup(variant))],
      );
      const got = await floats(y, v.batch * v.out);
      for (let b = 0; b < v.batch; b++)
        for (let r = 0; r < v.out; r++) {
          let want = (v.residual ? residual[b * v.out + r] : 0) + (v.bias ? bias[r] : 0);
          let norm = 0;
          for (let c = 0; c < v.inFeatures; c++) {
            const term = w[r * v.inFeatures + c] * x.value[b * v.inFeatures + c];
            want += term;
            norm += term * term;
          }
          // f16 sums of 32 terms, f32 after that.
          const tolerance = (f16 ? 64 * F16 : 2 ** -18) * Math.sqrt(norm) + 1e-5;
          expect(Math.abs(got[b * v.out + r] - want), `row ${r} of ${b}`).toBeLessThan(tolerance);
        }
    });
  });

  it.each([
    { outs: [40, 8, 8], inFeatures: 256, groupSize: 64, rows: 4, teams: 4, split: 2, batch: 1, bias: true },
    { outs: [37, 20], inFeatures: 384, groupSize: 128, rows: 2, teams: 2, split: 1, batch: 2, bias: false },
  ])('int4 products of one dispatch %o', async (v) => {
    const { outs, inFeatures, batch } = v;
    const weights = outs.map((out) => randomWeight(out, inFeatures, v.groupSize));
    const biases = outs.map((out) => normals(out));
    const inputs = outs.map(() => chunks(normals(batch * inFeatures)));
    const linears = await Promise.all(
      weights.map(async (weight) => ownLinear(await backend.loadLinear({ kind: 'quantized', weight }))),
    );
    const variant = { ...v, f16, shuffle, residual: false, products: outs.length };
    const stride = outs.reduce((a, b) => a + b);
    const y = backend.gpu.buffer(batch * stride * 4);
    const name = (base: string, i: number): string => (i === 0 ? base : `${base}${i}`);
    const buffers = Object.fromEntries(
      linears.flatMap((linear, i) => [
        [name('w', i), linear.weights],
        [name('grid', i), linear.grids],
        [name('bias', i), toGpu(biases[i])],
      ]),
    );
    backend.gpu.dispatch(
      runnable(gemvKernel(variant)),
      {
        ...buffers,
        x: toGpu(Uint16Array.from(inputs.flatMap((x) => [...x.x]))),
        factors: toGpu(Float32Array.from(inputs.flatMap((x) => [...x.factors]))),
        y,
      } as Record<'w' | 'grid' | 'bias' | 'x' | 'factors' | 'y' | 'residual', GPUBuffer>,
      {
        chunks: inFeatures / 32,
        stride,
        column: 0,
        first: 0,
        ...(Object.fromEntries(outs.map((out, i) => [name('outFeatures', i), out])) as Record<'outFeatures', number>),
      },
      [gemvGroups(variant, outs)],
    );
    const got = await floats(y, batch * stride);
    let column = 0;
    for (const [i, out] of outs.entries()) {
      const w = dequantized(weights[i]);
      for (let b = 0; b < batch; b++)
        for (let r = 0; r < out; r++) {
          let want = v.bias ? biases[i][r] : 0;
          let norm = 0;
          for (let c = 0; c < inFeatures; c++) {
            const term = w[r * inFeatures + c] * inputs[i].value[b * inFeatures + c];
            want += term;
            norm += term * term;
          }
          const tolerance = (f16 ? 64 * F16 : 2 ** -18) * Math.sqrt(norm) + 1e-5;
          expect(Math.abs(got[b * stride + column + r] - want), `product ${i}, row ${r} of ${b}`).toBeLessThan(
            tolerance,
          );
        }
      column += out;
    }
  });

  it.each([1, 3])('16-bit product with %i rows', async (batch) => {
    const [out, inFeatures] = [29, 416];
    const w = normals(out * inFeatures, 0.05).map(roundToF16);
    const x = chunks(normals(batch * inFeatures));
    const variant = { f16, shuffle, rows: 4, teams: 2, batch, weights: 'f16' as const };
    const y = backend.gpu.buffer(batch * out * 4);
    backend.gpu.dispatch(
      runnable(denseGemvKernel(variant)),
      { w: toGpu(Uint16Array.from(w, f32ToF16Bits)), x: toGpu(x.x), factors: toGpu(x.factors), y },
      { words: inFeatures / 8, outFeatures: out },
      [Math.ceil(out / denseRowsPerGroup(variant))],
    );
    const got = await floats(y, batch * out);
    for (let b = 0; b < batch; b++)
      for (let r = 0; r < out; r++) {
        let want = 0;
        for (let c = 0; c < inFeatures; c++) want += w[r * inFeatures + c] * x.value[b * inFeatures + c];
        expect(Math.abs(got[b * out + r] - want)).toBeLessThan(f16 ? 16 * F16 : 1e-5);
      }
  });

  function transforms(channels: number, groupSize: number, krot: number, count: number): PairwiseTransform[] {
    return Array.from({ length: count }, (_, t) => ({
      channels,
      groupSize,
      krot,
      pairs: randomPairs(channels, groupSize, krot, rng.fork(t)),
      theta: normals((krot * channels) / 2, 1.5),
      channelScales: normals(channels).map((e) => Math.exp(0.3 * e)),
    }));
  }

  function rotated(x: Float64Array, t: PairwiseTransform): Float64Array {
    const y = x.slice();
    for (let k = 0; k < t.krot; k++)
      for (let p = 0; p < t.channels / 2; p++) {
        const base = Math.floor((2 * p) / t.groupSize) * t.groupSize;
        const [i, j] = [0, 1].map((e) => base + t.pairs[k * t.channels + 2 * p + e]);
        const angle = t.theta[(k * t.channels) / 2 + p];
        const [a, b] = [y[i], y[j]];
        y[i] = a * Math.cos(angle) + b * Math.sin(angle);
        y[j] = b * Math.cos(angle) - a * Math.sin(angle);
      }
    return y;
  }

  describe.each(['norm', 'silu', 'plain', 'attention'] as const satisfies readonly ActivationSource[])(
    'activations from %s',
    (source) => {
      it.each([
        { channels: 640, groupSize: 128, krot: 8, count: 1, batch: 1, threads: 128 },
        { channels: 384, groupSize: 64, krot: 5, count: 2, batch: 2, threads: 256 },
        { channels: 224, groupSize: 32, krot: 3, count: 1, batch: 1, threads: 256 },
        { channels: 160, groupSize: 32, krot: 8, count: 1, batch: 2, threads: 128 },
        { channels: 192, groupSize: 64, krot: 0, count: 1, batch: 2, threads: 256 },
      ])('%o', async ({ channels, groupSize, krot, count, batch, threads }: ActivationCase) => {
        const [splits, headDim] = [3, 32];
        const eps = 1e-5;
        const width = source === 'silu' ? 2 * channels : source === 'attention' ? splits * channels : channels;
        const input = normals(batch * width);
        const stats = Float32Array.from({ length: (2 * batch * splits * channels) / headDim }, () => 1 + rng.uniform());
        const ts = transforms(channels, groupSize, krot, count);
        const gain = toGpu(Float32Array.from(ts.flatMap((t) => [...t.channelScales])));
        const x = backend.gpu.buffer(count * batch * channels * 2);
        const factors = backend.gpu.buffer((count * batch * channels) / 4);
        const table = toGpu(Uint32Array.from(ts.flatMap((t) => [...rotationTable(t)])));
        const buffers = {
          source: toGpu(input),
          ...(source === 'attention' && { stats: toGpu(stats) }),
          gain,
          table,
          x,
          factors,
        };
        backend.gpu.dispatch(
          runnable(activationKernel({ shuffle, source, stages: stagesOf(krot), threads, splits, headDim })),
          buffers as Record<keyof typeof buffers | 'stats', GPUBuffer>,
          { channels, eps },
          [activationGroups(channels), batch, count],
        );
        const gotX = new Uint16Array(await backend.gpu.read(x, 0, count * batch * channels * 2));
        const gotF = await floats(factors, (count * batch * channels) / 16);
        for (let t = 0; t < count; t++)
          for (let b = 0; b < batch; b++) {
            const values = new Float64Array(channels);
            const row = input.subarray(b * width, (b + 1) * width);
            const mean = row.reduce((s, e) => s + e * e, 0) / channels;
            for (let c = 0; c < channels; c++) {
              if (source === 'norm') values[c] = row[c] / Math.sqrt(mean + eps);
              else if (source === 'silu') values[c] = (row[c] / (1 + Math.exp(-row[c]))) * row[channels + c];
              else if (source === 'plain') values[c] = row[c];
              else {
                const head = Math.floor(c / headDim);
                let sum = 0;
                for (let s = 0; s < splits; s++) {
                  const at = ((b * channels) / headDim + head) * splits + s;
                  sum += Math.exp(stats[2 * at]) * stats[2 * at + 1];
                  values[c] += Math.exp(stats[2 * at]) * row[(head * splits + s) * headDim + (c % headDim)];
                }
                values[c] /= sum;
              }
              values[c] *= ts[t].channelScales[c];
            }
            const want = rotated(values, ts[t]);
            for (let c = 0; c < channels; c += 32) {
              const at = (t * batch + b) * channels + c;
              const top = gotF[at / 16];
              let sum = 0;
              for (let i = 0; i < 32; i++) {
                const normal = f16BitsToF32(gotX[at + i]);
                sum += normal;
                expect(Math.abs(normal)).toBeLessThanOrEqual(1);
                // Factors are good to 2⁻¹⁷, for values up to a few times top.
                const angles = 4 * krot * 2 ** -17;
                expect(Math.abs(normal * top - want[c + i])).toBeLessThan(top * (F16 + angles) + 1e-6);
              }
              expect(Math.abs(gotF[at / 16 + 1] - sum)).toBeLessThan(1e-4);
            }
          }
      });
    },
  );

  interface AttentionShape {
    readonly heads: number;
    readonly kvHeads: number;
    readonly headDim: number;
    readonly rotaryDim: number;
    readonly qkNorm: boolean;
    readonly window: number;
  }

  /** Random inputs of an attention kernel, and what should come of them. */
  function attentionCase(v: AttentionShape, position: number) {
    const { heads, kvHeads, headDim, rotaryDim, window } = v;
    const [batch, capacity, eps, scale] = [2, 96, 1e-6, headDim ** -0.5];
    const width = (heads + 2 * kvHeads) * headDim;
    const positions = Uint32Array.of(position, Math.max(0, position - 1));
    const qkv = normals(batch * width);
    const keys = normals(batch * kvHeads * capacity * headDim).map(roundToF16);
    const values = normals(batch * kvHeads * capacity * headDim).map(roundToF16);
    // What lies past a sequence's tokens is whatever was there before.
    for (let head = 0; head < batch * kvHeads; head++) {
      const from = head * capacity + positions[Math.floor(head / kvHeads)];
      for (const data of [keys, values]) data.fill(NaN, from * headDim, (head + 1) * capacity * headDim);
    }
    const [qNorm, kNorm] = [normals(headDim), normals(headDim)];
    const rope = new Float32Array(capacity * rotaryDim);
    for (let p = 0; p < capacity; p++)
      for (let d = 0; d < rotaryDim / 2; d++) {
        const angle = p * 100 ** ((-2 * d) / rotaryDim);
        rope.set([Math.cos(angle), Math.sin(angle)], ((p * rotaryDim) / 2) * 2 + 2 * d);
      }
    const head = (b: number, index: number, norm: Float32Array | undefined, turn: boolean): Float64Array => {
      const x = Float64Array.from(qkv.subarray(b * width + index * headDim, b * width + (index + 1) * headDim));
      if (norm && v.qkNorm) {
        const mean = x.reduce((s, e) => s + e * e, 0) / headDim;
        for (let d = 0; d < headDim; d++) x[d] *= norm[d] / Math.sqrt(mean + eps);
      }
      for (let d = 0; turn && d < rotaryDim / 2; d++) {
        const [c, s] = rope.subarray(positions[b] * rotaryDim + 2 * d);
        const [a, e] = [x[d], x[d + rotaryDim / 2]];
        x[d] = a * c - e * s;
        x[d + rotaryDim / 2] = e * c + a * s;
      }
      return x;
    };
    /** [batch, heads, headDim]. */
    const want: Float64Array[] = [];
    /** [batch, kvHeads, headDim] at `position`. */
    const newKeys: Float64Array[] = [];
    for (let b = 0; b < batch; b++) {
      for (let kv = 0; kv < kvHeads; kv++) newKeys.push(head(b, heads + kv, kNorm, true));
      for (let h = 0; h < heads; h++) {
        const kv = Math.floor(h / (heads / kvHeads));
        const q = head(b, h, qNorm, true);
        const newValue = head(b, heads + kvHeads + kv, undefined, false);
        const p = positions[b];
        const out = new Float64Array(headDim);
        let total = 0;
        for (let t = window > 0 ? Math.max(0, p + 1 - window) : 0; t <= p; t++) {
          const at = ((b * kvHeads + kv) * capacity + t) * headDim;
          const key = t === p ? newKeys[b * kvHeads + kv] : keys.subarray(at, at + headDim);
          const value = t === p ? newValue : values.subarray(at, at + headDim);
          let score = 0;
          for (let d = 0; d < headDim; d++) score += q[d] * key[d];
          const weight = Math.exp(score * scale);
          total += weight;
          for (let d = 0; d < headDim; d++) out[d] += weight * value[d];
        }
        want.push(out.map((e) => e / total));
      }
    }
    const bits = (data: Float32Array): Uint16Array => Uint16Array.from(data, f32ToF16Bits);
    const buffers = {
      qkv: toGpu(qkv),
      ...(v.qkNorm && { norms: toGpu(Float32Array.from([...qNorm, ...kNorm])) }),
      rope: toGpu(rope),
      positions: toGpu(Uint32Array.of(...positions, capacity)),
      keys: toGpu(bits(keys)),
      values: toGpu(bits(values)),
    } as Record<'qkv' | 'norms' | 'rope' | 'positions' | 'keys' | 'values', GPUBuffer>;
    const checkKeys = async (): Promise<void> => {
      const got = new Uint16Array(await backend.gpu.read(buffers.keys, 0, keys.length * 2));
      for (const [i, key] of newKeys.entries()) {
        const at = (i * capacity + positions[Math.floor(i / kvHeads)]) * headDim;
        for (let d = 0; d < headDim; d++)
          expect(Math.abs(f16BitsToF32(got[at + d]) - key[d])).toBeLessThan(2 * F16 * (1 + Math.abs(key[d])));
      }
    };
    return { batch, eps, scale, want, buffers, checkKeys };
  }

  describe.each([
    {
      heads: 4,
      kvHeads: 2,
      headDim: 32,
      rotaryDim: 32,
      qkNorm: true,
      splits: 2,
      window: 0,
      together: 2,
      teams: 4,
      unroll: 4,
    },
    {
      heads: 6,
      kvHeads: 1,
      headDim: 16,
      rotaryDim: 16,
      qkNorm: false,
      splits: 1,
      window: 5,
      together: 3,
      teams: 2,
      unroll: 2,
    },
    {
      heads: 8,
      kvHeads: 2,
      headDim: 64,
      rotaryDim: 64,
      qkNorm: true,
      splits: 3,
      window: 0,
      together: 4,
      teams: 4,
      unroll: 4,
    },
    {
      heads: 2,
      kvHeads: 2,
      headDim: 128,
      rotaryDim: 64,
      qkNorm: false,
      splits: 2,
      window: 40,
      together: 1,
      teams: 8,
      unroll: 1,
    },
  ])('attention %o', (v) => {
    it.each([0, 1, 7, 90])('after %i tokens', async (position) => {
      const { heads, headDim, splits } = v;
      const { batch, eps, scale, want, buffers, checkKeys } = attentionCase(v, position);
      const out = backend.gpu.buffer(batch * heads * splits * headDim * 4);
      const stats = backend.gpu.buffer(batch * heads * splits * 8);
      const variant = { ...v, shuffle };
      backend.gpu.dispatch(
        runnable(decodeAttentionKernel(variant)),
        { ...buffers, out, stats },
        { scale, eps },
        attentionGroups(variant, batch),
      );
      const gotOut = await floats(out, batch * heads * splits * headDim);
      const gotStats = await floats(stats, batch * heads * splits * 2);
      await checkKeys();
      for (let h = 0; h < batch * heads; h++) {
        let [top, sum] = [-Infinity, 0];
        const got = new Float64Array(headDim);
        for (let s = 0; s < splits; s++) top = Math.max(top, gotStats[2 * (h * splits + s)]);
        for (let s = 0; s < splits; s++) {
          const at = h * splits + s;
          if (gotStats[2 * at + 1] === 0) continue;
          const weight = Math.exp(gotStats[2 * at] - top);
          sum += weight * gotStats[2 * at + 1];
          for (let d = 0; d < headDim; d++) got[d] += weight * gotOut[at * headDim + d];
        }
        // The new key and value are rounded to f16, as they are stored: scores move by F16·|q|·|k|·scale.
        for (let d = 0; d < headDim; d++) expect(Math.abs(got[d] / sum - want[h][d])).toBeLessThan(30 * F16);
      }
    });
  });

  describe.each([
    { heads: 4, kvHeads: 2, headDim: 128, rotaryDim: 128, qkNorm: true, window: 0, teams: 8, unroll: 2, krot: 8 },
    { heads: 2, kvHeads: 2, headDim: 128, rotaryDim: 64, qkNorm: false, window: 30, teams: 8, unroll: 1, krot: 0 },
  ])('attention of whole heads %o', (v) => {
    it.each([0, 1, 31, 90])('after %i tokens', async (position) => {
      const { heads, headDim, krot } = v;
      const { batch, eps, scale, want, buffers, checkKeys } = attentionCase(v, position);
      const channels = heads * headDim;
      const [transform] = transforms(channels, 64, krot, 1);
      const x = backend.gpu.buffer(batch * channels * 2);
      const factors = backend.gpu.buffer((batch * channels) / 4);
      const table = toGpu(rotationTable(transform));
      backend.gpu.dispatch(
        runnable(wholeAttentionKernel({ ...v, shuffle, stages: stagesOf(krot) })),
        { ...buffers, gain: toGpu(transform.channelScales), table, x, factors },
        { channels, scale, eps },
        [heads, batch],
      );
      const gotX = new Uint16Array(await backend.gpu.read(x, 0, batch * channels * 2));
      const gotF = await floats(factors, (batch * channels) / 16);
      await checkKeys();
      for (let b = 0; b < batch; b++) {
        const attended = Float64Array.from(want.slice(b * heads, (b + 1) * heads).flatMap((e) => [...e]));
        const turned = rotated(
          attended.map((e, c) => e * transform.channelScales[c]),
          transform,
        );
        for (let c = 0; c < channels; c++) {
          const got = f16BitsToF32(gotX[b * channels + c]) * gotF[2 * ((b * channels + c) >> 5)];
          expect(Math.abs(got - turned[c])).toBeLessThan(100 * F16);
        }
      }
    });
  });

  describe.skipIf(shuffle)('choosing tokens', () => {
    const vocab = 5000;
    /** One draw per sequence and position from the same row of logits. */
    async function draws(
      logits: Float32Array,
      [temperature, topP, topK]: [number, number, number],
      positions: number,
      seed = 3,
    ): Promise<number[]> {
      const spanCount = Math.ceil(vocab / SAMPLE_SPAN);
      const [row, spans, tokens] = [toGpu(logits), backend.gpu.buffer(spanCount * 16), backend.gpu.buffer(16)];
      const settings = toGpu(Float32Array.of(temperature, topP, topK, positions));
      const [seeds, at] = [toGpu(Uint32Array.of(seed)), toGpu(new Uint32Array(4))];
      const ring = 256;
      const history = backend.gpu.buffer(ring * 4);
      for (let i = 0; i < positions; i++) {
        backend.gpu.dispatch(sampleSpansKernel, { logits: row, settings, spans }, { vocab }, [spanCount, 1]);
        backend.gpu.dispatch(
          samplePickKernel,
          { logits: row, settings, seeds, spans, tokens, positions: at, history },
          { vocab, spanCount, batch: 1, ring },
          [1],
        );
      }
      return [...new Uint32Array(await backend.gpu.read(history, 0, positions * 4))];
    }

    it('takes the largest logit, the first of equals', async () => {
      const logits = normals(vocab);
      logits[4321] = logits[77] = 9;
      expect(await draws(logits, [0, 1, 0], 2)).toEqual([77, 77]);
    });

    it('keeps to the k largest, in their proportions', async () => {
      const logits = normals(vocab);
      const weights = new Map([
        [10, 4],
        [2500, 2],
        [4999, 1],
      ]);
      for (const [i, w] of weights) logits[i] = 20 + Math.log(w);
      const got = await draws(logits, [1, 1, 3], 256);
      expect(new Set(got)).toEqual(new Set(weights.keys()));
      // 256 draws of probability 4/7: five standard deviations are 40.
      expect(Math.abs(got.filter((id) => id === 10).length - (256 * 4) / 7)).toBeLessThan(40);
      expect(await draws(logits, [1, 1, 3], 256)).toEqual(got);
      expect(await draws(logits, [1, 1, 3], 256, 4)).not.toEqual(got);
    });

    it('keeps the fewest tokens that reach top-p', async () => {
      const logits = new Float32Array(vocab).fill(-30);
      // Probabilities 0.5, 0.3, 0.2: 0.6 is reached with two.
      for (const [i, p] of [0.5, 0.3, 0.2].entries()) logits[1000 * (i + 1)] = Math.log(p);
      expect(new Set(await draws(logits, [1, 0.6, 0], 128))).toEqual(new Set([1000, 2000]));
    });

    it.each([NaN, Infinity])('chooses no token from a row of %s', async (value) => {
      expect(await draws(new Float32Array(vocab).fill(value), [0, 1, 0], 1)).toEqual([NO_TOKEN]);
    });
  });
});
