// The forward pass's kernels against plain float64 loops, on odd sizes, and the same bits for every number of threads.
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import {
  attention,
  KernelPool,
  KvCache,
  PackedLinear,
  rmsNorm,
  RopeTable,
  RowTransform,
  score,
  siluMul,
  splitHeads,
} from '../../src/backends/cpu/kernels.js';
import { fromFloat32, toFloat32 } from '../../src/core/dtype.js';
import { createRng } from '../../src/core/rng.js';
import type { QuantizedWeight, WeightBits } from '../../src/ops/backend.js';
import { roundToF16 } from '../../src/core/dtype.js';

let pool: KernelPool;
let plain: KernelPool;
beforeAll(async () => {
  pool = await KernelPool.create({ threads: 2 });
  plain = await KernelPool.create({ shared: false });
});
afterAll(async () => {
  await pool.dispose();
  await plain.dispose();
});

function normals(n: number, seed: number, scale = 1): Float32Array {
  const rng = createRng(seed);
  return Float32Array.from({ length: n }, () => rng.normal() * scale);
}

/** Largest difference relative to the largest expected value. */
function relativeError(found: ArrayLike<number>, expected: ArrayLike<number>): number {
  let size = 1e-30;
  let error = 0;
  for (let i = 0; i < expected.length; i++) {
    size = Math.max(size, Math.abs(expected[i]));
    error = Math.max(error, Math.abs(found[i] - expected[i]));
  }
  return error / size;
}

describe('norms and activations', () => {
  for (const [rows, n] of [
    [1, 352],
    [7, 2752],
    [33, 43],
    [100, 256],
  ]) {
    it(`rmsNorm and siluMul [${rows}, ${n}]`, () => {
      const x = normals(rows * n, 1, 3);
      const weight = normals(n, 2);
      const out = new Float32Array(x.length);
      const resident = { pointer: pool.arena.alloc(n * 4), length: n };
      pool.arena.view(resident).set(weight);
      rmsNorm(pool, x, resident, 1e-6, out);
      pool.arena.free(resident.pointer);
      const expected = new Float64Array(x.length);
      for (let r = 0; r < rows; r++) {
        let sum = 0;
        for (let i = 0; i < n; i++) sum += x[r * n + i] ** 2;
        for (let i = 0; i < n; i++) expected[r * n + i] = (x[r * n + i] * weight[i]) / Math.sqrt(sum / n + 1e-6);
      }
      expect(relativeError(out, expected)).toBeLessThan(1e-6);
      rmsNorm(pool, x, weight, 1e-6, out);
      expect(relativeError(out, expected)).toBeLessThan(1e-6);

      const gateUp = normals(rows * 2 * n, 3, 5);
      siluMul(pool, gateUp, rows, out);
      for (let r = 0; r < rows; r++) {
        for (let i = 0; i < n; i++) {
          const gate = gateUp[r * 2 * n + i];
          expected[r * n + i] = (gate / (1 + Math.exp(-gate))) * gateUp[r * 2 * n + n + i];
        }
      }
      expect(relativeError(out, expected)).toBeLessThan(5e-7);
    });
  }

  it('siluMul keeps relative accuracy at every magnitude and never overflows', () => {
    const gates = Float32Array.from({ length: 4000 }, (_, i) => (i - 2000) / 20);
    const out = new Float32Array(4000);
    siluMul(pool, Float32Array.of(...gates, ...new Float32Array(4000).fill(1)), 1, out);
    gates.forEach((gate, i) => {
      const expected = gate / (1 + Math.exp(-gate));
      if (gate > -85) expect(Math.abs(out[i] - expected)).toBeLessThanOrEqual(6e-7 * Math.abs(expected));
      else expect(Math.abs(out[i])).toBeLessThan(1e-34);
    });
  });
});

describe('RowTransform', () => {
  for (const [channels, groupSize] of [
    [352, 32],
    [2752, 64],
    [172, 4],
    [516, 172],
    [256, 128],
    [90, 6],
  ]) {
    for (const rows of [1, 3, 4, 7, 16, 33, 100]) {
      for (const krot of [0, 1, 8]) {
        if (krot === 1 && rows !== 7) continue;
        it(`[${rows}, ${channels}], groups of ${groupSize}, ${krot} rotations`, () => {
          const rng = createRng(5);
          const pairs = new Int16Array(krot * channels);
          for (let at = 0; at < pairs.length; at += groupSize) pairs.set(rng.permutation(groupSize), at);
          const theta = normals(krot * (channels / 2), 6);
          const scales = Float32Array.from({ length: channels }, () => 0.5 + rng.uniform());
          const x = normals(rows * channels, 7);
          const expected = Float64Array.from(x, (v, at) => v * scales[at % channels]);
          for (let r = 0; r < rows; r++) {
            for (let k = 0; k < krot; k++) {
              for (let p = 0; p < channels / 2; p++) {
                const base = r * channels + Math.floor((2 * p) / groupSize) * groupSize;
                const i = base + pairs[k * channels + 2 * p];
                const j = base + pairs[k * channels + 2 * p + 1];
                const c = Math.cos(theta[k * (channels / 2) + p]);
                const s = Math.sin(theta[k * (channels / 2) + p]);
                const a = expected[i];
                expected[i] = a * c + expected[j] * s;
                expected[j] = expected[j] * c - a * s;
              }
            }
          }
          const transform = new RowTransform(pool, { channels, groupSize, krot, pairs }, theta, scales);
          const out = new Float32Array(x.length);
          transform.apply(x, rows, out);
          transform.free();
          expect(relativeError(out, expected)).toBeLessThan(1e-6);
        });
      }
    }
  }
});

describe('heads and attention', () => {
  const cases: [
    batch: number,
    tokens: number,
    heads: number,
    kvHeads: number,
    d: number,
    rotary: number,
    start: number,
    window: number | undefined,
  ][] = [
    [1, 1, 4, 2, 64, 64, 0, undefined],
    [2, 1, 6, 2, 40, 20, 130, undefined],
    [1, 3, 4, 4, 64, 64, 9, 5],
    [2, 5, 4, 1, 22, 10, 77, 16],
    [1, 33, 2, 1, 128, 128, 0, undefined],
    [1, 1, 8, 2, 128, 128, 300, 100],
    [1, 70, 2, 2, 16, 16, 3, undefined],
  ];
  for (const [batch, tokens, heads, kvHeads, d, rotary, start, window] of cases) {
    for (const normed of [false, true]) {
      it(`${batch} × ${tokens} tokens at ${start}, ${heads}/${kvHeads} heads of ${d}, window ${window}, norm ${normed}`, () => {
        const rows = batch * tokens;
        const width = (heads + 2 * kvHeads) * d;
        const half = rotary / 2;
        const positions = start + tokens;
        const angle = Float32Array.from(
          { length: positions * half },
          (_, i) => Math.floor(i / half) / 100 ** ((i % half) / half),
        );
        const cos = angle.map(Math.cos);
        const sin = angle.map(Math.sin);
        const rope = new RopeTable(pool, cos, sin, rotary);
        const qkv = normals(rows * width, 11);
        const norms = normed ? [normals(d, 12), normals(d, 13)] : [undefined, undefined];
        const [q, k, v] = [heads, kvHeads, kvHeads].map((h) => new Float32Array(rows * h * d));
        splitHeads(pool, {
          qkv,
          q,
          k,
          v,
          batch,
          heads,
          kvHeads,
          headDim: d,
          start,
          rope,
          qNorm: norms[0],
          kNorm: norms[1],
          eps: 1e-6,
        });
        const wanted = [heads, kvHeads, kvHeads].map((h) => new Float64Array(rows * h * d));
        for (let r = 0; r < rows; r++) {
          for (let h = 0; h < heads + 2 * kvHeads; h++) {
            const part = h < heads ? 0 : h < heads + kvHeads ? 1 : 2;
            const x = Float64Array.from(qkv.subarray(r * width + h * d, r * width + (h + 1) * d));
            const norm = part < 2 ? norms[part] : undefined;
            if (norm) {
              const f = 1 / Math.sqrt(x.reduce((a, b) => a + b * b, 0) / d + 1e-6);
              x.forEach((value, i) => (x[i] = value * f * norm[i]));
            }
            if (part < 2) {
              const at = (start + (r % tokens)) * half;
              for (let i = 0; i < half; i++) {
                const [a, b] = [x[i], x[i + half]];
                x[i] = a * cos[at + i] - b * sin[at + i];
                x[i + half] = b * cos[at + i] + a * sin[at + i];
              }
            }
            const count = part ? kvHeads : heads;
            wanted[part].set(x, (r * count + (part === 0 ? h : part === 1 ? h - heads : h - heads - kvHeads)) * d);
          }
        }
        [q, k, v].forEach((found, i) => expect(relativeError(found, wanted[i])).toBeLessThan(2e-6));
        rope.free();

        // History, then this call's tokens, in a cache with room to spare.
        const cache = new KvCache(pool, { batch, kvHeads, headDim: d, capacity: positions + 3 });
        const history = [normals(batch * start * kvHeads * d, 14), normals(batch * start * kvHeads * d, 15)];
        if (start) cache.append(history[0], history[1], 0);
        cache.append(k, v, start);
        const out = new Float32Array(q.length);
        attention(pool, { q, out, batch, heads, kvHeads, headDim: d, scale: d ** -0.5, window, start, source: cache });
        const expected = new Float64Array(q.length);
        const at = (which: 0 | 1, b: number, p: number, h: number, i: number): number =>
          p < start
            ? history[which][((b * start + p) * kvHeads + h) * d + i]
            : [k, v][which][((b * tokens + p - start) * kvHeads + h) * d + i];
        for (let b = 0; b < batch; b++) {
          for (let t = 0; t < tokens; t++) {
            for (let h = 0; h < heads; h++) {
              const base = ((b * tokens + t) * heads + h) * d;
              const kv = Math.floor(h / (heads / kvHeads));
              const weights: number[] = [];
              const first = Math.max(0, window ? start + t + 1 - window : 0);
              for (let p = first; p <= start + t; p++) {
                let dot = 0;
                for (let i = 0; i < d; i++) dot += q[base + i] * at(0, b, p, kv, i);
                weights.push(dot * d ** -0.5);
              }
              const top = Math.max(...weights);
              const sum = weights.reduce((a, w) => a + Math.exp(w - top), 0);
              weights.forEach((w, n) => {
                for (let i = 0; i < d; i++)
                  expected[base + i] += (Math.exp(w - top) / sum) * at(1, b, first + n, kv, i);
              });
            }
          }
        }
        expect(relativeError(out, expected)).toBeLessThan(3e-6);
        if (start === 0) {
          const direct = new Float32Array(q.length);
          attention(pool, {
            q,
            out: direct,
            batch,
            heads,
            kvHeads,
            headDim: d,
            scale: d ** -0.5,
            window,
            start,
            source: { k, v },
          });
          expect(relativeError(direct, expected)).toBeLessThan(3e-6);
        }
        const read = new Float32Array(d);
        cache.read('keys', batch - 1, kvHeads - 1, 1, read);
        expect(read[0]).toBe(Math.fround(at(0, batch - 1, 0, kvHeads - 1, 0)));
        cache.free();
      });
    }
  }

  it('refuses to write past a cache', () => {
    const cache = new KvCache(pool, { batch: 1, kvHeads: 1, headDim: 8, capacity: 4 });
    expect(() => cache.append(new Float32Array(16), new Float32Array(16), 3)).toThrow(
      expect.objectContaining({ code: 'context-length' }),
    );
    cache.free();
  });
});

function quantizedWeight(
  outFeatures: number,
  inFeatures: number,
  groupSize: number,
  bits: WeightBits,
  seed: number,
): QuantizedWeight {
  const rng = createRng(seed);
  const top = 2 ** bits;
  const groups = inFeatures / groupSize;
  return {
    bits,
    groupSize,
    inFeatures,
    outFeatures,
    codes: Uint8Array.from({ length: outFeatures * inFeatures }, () => rng.int(0, top)),
    zeros: Uint8Array.from({ length: outFeatures * groups }, () => rng.int(0, top)),
    scales: Float32Array.from({ length: outFeatures * groups }, () => roundToF16(0.01 + 0.1 * rng.uniform())),
  };
}

function values(w: QuantizedWeight): Float32Array {
  const groups = w.inFeatures / w.groupSize;
  return Float32Array.from(w.codes, (code, at) => {
    const row = Math.floor(at / w.inFeatures);
    const group = row * groups + Math.floor((at % w.inFeatures) / w.groupSize);
    return (code - w.zeros[group]) * w.scales[group];
  });
}

function product(
  x: Float32Array,
  w: Float32Array,
  rows: number,
  outFeatures: number,
  inFeatures: number,
  residual?: Float32Array,
): Float64Array {
  const y = new Float64Array(rows * outFeatures);
  for (let r = 0; r < rows; r++) {
    for (let o = 0; o < outFeatures; o++) {
      let sum = residual ? residual[r * outFeatures + o] : 0;
      for (let i = 0; i < inFeatures; i++) sum += x[r * inFeatures + i] * w[o * inFeatures + i];
      y[r * outFeatures + o] = sum;
    }
  }
  return y;
}

describe('PackedLinear', () => {
  const shapes: [outFeatures: number, inFeatures: number, groupSize: number][] = [
    [33, 352, 32],
    [100, 2752, 64],
    [7, 172, 4],
    [65, 172, 43],
    [256, 256, 128],
    [64, 512, 16],
    [31, 512, 512],
    [10, 352, 352],
    [1, 48, 48],
    [512, 1024, 128],
  ];
  for (const [outFeatures, inFeatures, groupSize] of shapes) {
    for (const bits of [2, 3, 4, 8] as const) {
      it(`${bits} bits, [${outFeatures}, ${inFeatures}], groups of ${groupSize}`, () => {
        const weight = quantizedWeight(outFeatures, inFeatures, groupSize, bits, 21);
        const used = pool.arena.used;
        const linear = PackedLinear.quantized(pool, weight);
        const dense = values(weight);
        const back = new Float32Array(dense.length);
        linear.dequantize(back);
        expect(back.every((v, at) => v === dense[at])).toBe(true);
        const ids = Int32Array.of(outFeatures - 1, 0, outFeatures >> 1);
        const rows = new Float32Array(3 * inFeatures);
        linear.gatherRows(ids, rows);
        expect(
          rows.every((v, at) => v === dense[ids[Math.floor(at / inFeatures)] * inFeatures + (at % inFeatures)]),
        ).toBe(true);
        for (const count of [1, 4]) {
          const x = normals(count * inFeatures, 22);
          const residual = normals(count * outFeatures, 23);
          const y = new Float32Array(count * outFeatures);
          linear.gemv(x, count, y, residual);
          // 16-bit activations: half a step, 1.5e-5 of a group's maximum, per element; few outputs, so not averaged out.
          expect(relativeError(y, product(x, dense, count, outFeatures, inFeatures, residual))).toBeLessThan(2e-4);
        }
        linear.gemv(new Float32Array(inFeatures), 1, new Float32Array(outFeatures));
        linear.free();
        expect(pool.arena.used).toBe(used);
      });
    }
  }

  it('does not overflow at the largest codes and activations', () => {
    const weight = quantizedWeight(2, 1024, 256, 8, 1);
    for (const bits of [4, 8] as const) {
      const extreme = {
        ...weight,
        bits,
        codes: weight.codes.map(() => 2 ** bits - 1),
        zeros: weight.zeros.map(() => 0),
      };
      const linear = PackedLinear.quantized(pool, extreme);
      const x = new Float32Array(1024).fill(1000);
      const y = new Float32Array(2);
      linear.gemv(x, 1, y);
      expect(relativeError(y, product(x, values(extreme), 1, 2, 1024))).toBeLessThan(1e-6);
      linear.free();
    }
  });

  for (const dtype of ['f32', 'f16', 'bf16'] as const) {
    for (const [outFeatures, inFeatures] of [
      [33, 352],
      [7, 43],
      [100, 2752],
    ]) {
      it(`${dtype} [${outFeatures}, ${inFeatures}]`, () => {
        const data = fromFloat32(normals(outFeatures * inFeatures, 31, 0.02), dtype);
        const dense = toFloat32(data, dtype);
        const linear = PackedLinear.dense(pool, { dtype, shape: [outFeatures, inFeatures], data });
        const back = new Float32Array(dense.length);
        linear.dequantize(back);
        expect(back.every((v, at) => v === dense[at])).toBe(true);
        const row = new Float32Array(inFeatures);
        linear.gatherRows(Int32Array.of(outFeatures - 1), row);
        expect(row.every((v, at) => v === dense[(outFeatures - 1) * inFeatures + at])).toBe(true);
        for (const count of [1, 3]) {
          const x = normals(count * inFeatures, 32, 100);
          const y = new Float32Array(count * outFeatures);
          linear.gemv(x, count, y);
          expect(relativeError(y, product(x, dense, count, outFeatures, inFeatures))).toBeLessThan(2e-6);
        }
        linear.free();
      });
    }
  }

  it('decodes denormal f16 weights and survives large activations', () => {
    const data = Uint16Array.from({ length: 64 }, (_, i) => (i % 2 ? 0x8000 : 0) | (i * 16));
    const linear = PackedLinear.dense(pool, { dtype: 'f16', shape: [1, 64], data });
    const x = normals(64, 33, 1e6);
    const y = new Float32Array(1);
    linear.gemv(x, 1, y);
    expect(relativeError(y, product(x, toFloat32(data, 'f16'), 1, 1, 64))).toBeLessThan(1e-6);
    linear.free();
  });

  it('names what is wrong', () => {
    const weight = quantizedWeight(4, 64, 32, 4, 1);
    expect(() => PackedLinear.quantized(pool, { ...weight, groupSize: 48 })).toThrow(/do not tile/);
    const linear = PackedLinear.quantized(pool, weight);
    expect(() => linear.gatherRows(Int32Array.of(4), new Float32Array(64))).toThrow(/outside/);
    expect(() => linear.gemv(new Float32Array(65), 1, new Float32Array(4))).toThrow(/64 elements/);
    linear.free();
  });
});

describe('score', () => {
  for (const [rows, vocab] of [
    [1, 5],
    [7, 1000],
    [33, 4099],
  ]) {
    it(`[${rows}, ${vocab}]`, () => {
      const logits = normals(rows * vocab, 41, 3);
      const reference = logits.map((v, i) => v + 0.05 * Math.sin(i));
      const targets = Int32Array.from({ length: rows }, (_, r) => (r * 7919) % vocab);
      const found = score(pool, logits, targets, reference);
      const logSoftmax = (x: Float32Array): Float64Array => {
        const top = x.reduce((a, b) => Math.max(a, b));
        const lse = top + Math.log(Float64Array.from(x).reduce((a, v) => a + Math.exp(v - top), 0));
        return Float64Array.from(x, (v) => v - lse);
      };
      for (let r = 0; r < rows; r++) {
        const p = logSoftmax(logits.subarray(r * vocab, (r + 1) * vocab));
        const q = logSoftmax(reference.subarray(r * vocab, (r + 1) * vocab));
        expect(Math.abs(found.nll[r] + p[targets[r]])).toBeLessThan(2e-6);
        const kl = q.reduce((a, v, i) => a + Math.exp(v) * (v - p[i]), 0);
        expect(Math.abs((found.kl?.[r] ?? NaN) - kl)).toBeLessThan(1e-7 + 1e-4 * kl);
        expect(found.agree?.[r]).toBe(p.indexOf(Math.max(...p)) === q.indexOf(Math.max(...q)) ? 1 : 0);
      }
      expect(score(pool, logits, targets).kl).toBeUndefined();
      expect(score(pool, logits, targets, logits).kl?.every((v) => v >= 0 && v < 1e-12)).toBe(true);
    });
  }
});

describe('threads', () => {
  function everything(with_: KernelPool): number[] {
    const weight = quantizedWeight(1023, 1024, 128, 4, 51);
    const linear = PackedLinear.quantized(with_, weight);
    const x = normals(4 * 1024, 52);
    const y = new Float32Array(4 * 1023);
    linear.gemv(x, 4, y);
    linear.free();
    const cache = new KvCache(with_, { batch: 1, kvHeads: 3, headDim: 64, capacity: 200 });
    cache.append(normals(200 * 192, 53), normals(200 * 192, 54), 0);
    const out = new Float32Array(384);
    attention(with_, {
      q: normals(384, 55),
      out,
      batch: 1,
      heads: 6,
      kvHeads: 3,
      headDim: 64,
      scale: 0.125,
      start: 199,
      source: cache,
    });
    cache.free();
    const pairs = Int16Array.from({ length: 2048 }, (_, i) => i % 128);
    const transform = new RowTransform(
      with_,
      { channels: 1024, groupSize: 128, krot: 2, pairs },
      normals(1024, 56),
      normals(1024, 57),
    );
    const rotated = new Float32Array(x.length * 10);
    transform.apply(normals(rotated.length, 58), 40, rotated);
    transform.free();
    return [...y, ...out, ...rotated];
  }

  it('give the same bits for 1 and 2 threads, and without shared memory', () => {
    const two = everything(pool);
    pool.activeThreads = 1;
    const one = everything(pool);
    pool.activeThreads = 2;
    const unshared = everything(plain);
    expect(two.every((v, at) => Object.is(v, one[at]))).toBe(true);
    expect(two.every((v, at) => Object.is(v, unshared[at]))).toBe(true);
  });
});
