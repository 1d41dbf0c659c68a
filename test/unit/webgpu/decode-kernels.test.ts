// The fused decode kernels against plain float64 arithmetic, every variant that runs here (SwiftShader: no f16, subgroups of 4).
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import type { WebGpuBackend } from '../../../src/backends/webgpu/index.js';
import { f16BitsToF32, f32ToF16Bits, roundToF16 } from '../../../src/core/dtype.js';
import { createRng } from '../../../src/core/rng.js';
import {
  activationGroups,
  activationKernel,
  rotationTable,
  type ActivationSource,
} from '../../../src/backends/webgpu/fast/activations.js';
import { attentionGroups, decodeAttentionKernel } from '../../../src/backends/webgpu/fast/attention.js';
import { gemvKernel, gemvRowsPerGroup } from '../../../src/backends/webgpu/fast/gemv.js';
import { denseGemvKernel, denseRowsPerGroup } from '../../../src/backends/webgpu/fast/gemv-dense.js';
import {
  NO_TOKEN,
  SAMPLE_SPAN,
  samplePickKernel,
  sampleSpansKernel,
} from '../../../src/backends/webgpu/fast/sample.js';
import { ownLinear } from '../../../src/backends/webgpu/linear.js';
import type { PairwiseTransform, QuantizedWeight } from '../../../src/ops/backend.js';
import { randomPairs, xorPairs } from '../../../src/transforms/index.js';
import { openTestWebGpu, webgpuMissing } from '../../support/webgpu.js';

interface ActivationCase {
  readonly channels: number;
  readonly groupSize: number;
  readonly krot: number;
  readonly count: number;
  readonly batch: number;
  readonly xor?: boolean;
}

/** Unit roundoff of f16, in which activations and cached keys are stored. */
const F16 = 2 ** -11;

describe.skipIf(webgpuMissing)('decode kernels', () => {
  let backend: WebGpuBackend;
  let f16: boolean;
  let shuffle: boolean;
  beforeAll(async () => {
    backend = await openTestWebGpu();
    const { capabilities } = backend.gpu;
    f16 = capabilities.f16;
    shuffle = (capabilities.subgroups?.min ?? 0) >= 32;
  });
  afterAll(() => backend.dispose());

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
      const kernel = gemvKernel(variant);
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

  it.each([1, 3])('16-bit product with %i rows', async (batch) => {
    const [out, inFeatures] = [29, 416];
    const w = normals(out * inFeatures, 0.05).map(roundToF16);
    const x = chunks(normals(batch * inFeatures));
    const variant = { f16, shuffle, rows: 4, teams: 2, batch, weights: 'f16' as const };
    const y = backend.gpu.buffer(batch * out * 4);
    backend.gpu.dispatch(
      denseGemvKernel(variant),
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

  function transforms(
    channels: number,
    groupSize: number,
    krot: number,
    count: number,
    xor = false,
  ): PairwiseTransform[] {
    return Array.from({ length: count }, (_, t) => ({
      channels,
      groupSize,
      krot,
      pairs: (xor ? xorPairs : randomPairs)(channels, groupSize, krot, rng.fork(t)),
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
        { channels: 640, groupSize: 128, krot: 8, count: 1, batch: 1 },
        { channels: 640, groupSize: 128, krot: 8, count: 2, batch: 1, xor: true },
        { channels: 192, groupSize: 64, krot: 5, count: 1, batch: 2, xor: true },
        { channels: 160, groupSize: 32, krot: 8, count: 1, batch: 1, xor: true },
        { channels: 384, groupSize: 64, krot: 3, count: 2, batch: 2 },
        { channels: 352, groupSize: 32, krot: 8, count: 1, batch: 2 },
        { channels: 256, groupSize: 128, krot: 0, count: 1, batch: 1 },
      ])('%o', async ({ channels, groupSize, krot, count, batch, xor }: ActivationCase) => {
        const [splits, headDim] = [3, 32];
        const eps = 1e-5;
        const width = source === 'silu' ? 2 * channels : source === 'attention' ? splits * channels : channels;
        const input = normals(batch * width);
        const stats = Float32Array.from({ length: (2 * batch * splits * channels) / headDim }, () => 1 + rng.uniform());
        const ts = transforms(channels, groupSize, krot, count, xor);
        const tables = ts.map((t) => rotationTable(t));
        const pairing = tables[0].pairing;
        expect(pairing).toBe(xor || krot === 0 ? 'xor' : 'any');
        const gain = ts.map((t) => t.channelScales);
        const variant = { f16, shuffle, source, krot, pairing, groupSize, splits, headDim };
        const x = backend.gpu.buffer(count * batch * channels * 2);
        const factors = backend.gpu.buffer((count * batch * channels) / 4);
        backend.gpu.dispatch(
          activationKernel(variant),
          {
            source: toGpu(input),
            ...(source === 'attention' && { stats: toGpu(stats) }),
            gain: toGpu(Float32Array.from(gain.flatMap((g) => [...g]))),
            ...(krot > 0 && {
              table: toGpu(Uint32Array.from(tables.flatMap((t) => [...t.table]))),
              masks: toGpu(Uint32Array.from(tables.flatMap((t) => [...t.masks]))),
            }),
            x,
            factors,
          } as Record<'source' | 'stats' | 'gain' | 'table' | 'masks' | 'x' | 'factors', GPUBuffer>,
          { channels, eps, krot },
          [activationGroups(channels, groupSize), batch, count],
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
              values[c] *= gain[t][c];
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
                // Table angles are good to 2⁻¹³ each, over krot rotations of values up to a few times top.
                expect(Math.abs(normal * top - want[c + i])).toBeLessThan(top * (F16 + 4 * krot * 2 ** -13) + 1e-6);
              }
              expect(Math.abs(gotF[at / 16 + 1] - sum)).toBeLessThan(1e-4);
            }
          }
      });
    },
  );

  describe.each([
    { heads: 4, kvHeads: 2, headDim: 32, rotaryDim: 32, qkNorm: true, splits: 2, window: 0 },
    { heads: 6, kvHeads: 1, headDim: 16, rotaryDim: 16, qkNorm: false, splits: 1, window: 5 },
    { heads: 8, kvHeads: 2, headDim: 64, rotaryDim: 64, qkNorm: true, splits: 3, window: 0 },
    { heads: 2, kvHeads: 2, headDim: 128, rotaryDim: 64, qkNorm: false, splits: 2, window: 40 },
  ])('attention %o', (v) => {
    it.each([0, 1, 7, 90])('after %i tokens', async (position) => {
      const { heads, kvHeads, headDim, rotaryDim, splits, window } = v;
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
      const bits = (data: Float32Array): Uint16Array => Uint16Array.from(data, f32ToF16Bits);
      const [keyBuffer, valueBuffer] = [toGpu(bits(keys)), toGpu(bits(values))];
      const out = backend.gpu.buffer(batch * heads * splits * headDim * 4);
      const stats = backend.gpu.buffer(batch * heads * splits * 8);
      const variant = { ...v, shuffle };
      backend.gpu.dispatch(
        decodeAttentionKernel(variant),
        {
          qkv: toGpu(qkv),
          ...(v.qkNorm && { qNorm: toGpu(qNorm), kNorm: toGpu(kNorm) }),
          rope: toGpu(rope),
          positions: toGpu(positions),
          keys: keyBuffer,
          values: valueBuffer,
          out,
          stats,
        } as Record<'qkv' | 'qNorm' | 'kNorm' | 'rope' | 'positions' | 'keys' | 'values' | 'out' | 'stats', GPUBuffer>,
        { capacity, scale, eps },
        attentionGroups(variant, batch),
      );
      const gotOut = await floats(out, batch * heads * splits * headDim);
      const gotStats = await floats(stats, batch * heads * splits * 2);
      const gotKeys = new Uint16Array(await backend.gpu.read(keyBuffer, 0, keys.length * 2));

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
      for (let b = 0; b < batch; b++)
        for (let h = 0; h < heads; h++) {
          const kv = Math.floor(h / (heads / kvHeads));
          const q = head(b, h, qNorm, true);
          const newKey = head(b, heads + kv, kNorm, true);
          const newValue = head(b, heads + kvHeads + kv, undefined, false);
          const p = positions[b];
          const want = new Float64Array(headDim);
          let total = 0;
          for (let t = window > 0 ? Math.max(0, p + 1 - window) : 0; t <= p; t++) {
            const at = ((b * kvHeads + kv) * capacity + t) * headDim;
            const key = t === p ? newKey : keys.subarray(at, at + headDim);
            const value = t === p ? newValue : values.subarray(at, at + headDim);
            let score = 0;
            for (let d = 0; d < headDim; d++) score += q[d] * key[d];
            const weight = Math.exp(score * scale);
            total += weight;
            for (let d = 0; d < headDim; d++) want[d] += weight * value[d];
            if (t === p)
              for (let d = 0; d < headDim; d++)
                expect(Math.abs(f16BitsToF32(gotKeys[at + d]) - newKey[d])).toBeLessThan(
                  2 * F16 * (1 + Math.abs(newKey[d])),
                );
          }
          let [top, sum] = [-Infinity, 0];
          const got = new Float64Array(headDim);
          for (let s = 0; s < splits; s++) top = Math.max(top, gotStats[2 * ((b * heads + h) * splits + s)]);
          for (let s = 0; s < splits; s++) {
            const at = (b * heads + h) * splits + s;
            if (gotStats[2 * at + 1] === 0) continue;
            const weight = Math.exp(gotStats[2 * at] - top);
            sum += weight * gotStats[2 * at + 1];
            for (let d = 0; d < headDim; d++) got[d] += weight * gotOut[at * headDim + d];
          }
          // The new key and value are rounded to f16, as they are stored: scores move by F16·|q|·|k|·scale.
          for (let d = 0; d < headDim; d++) expect(Math.abs(got[d] / sum - want[d] / total)).toBeLessThan(30 * F16);
        }
    });
  });

  describe('choosing tokens', () => {
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
