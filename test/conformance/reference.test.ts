// The oracle against closed forms and properties that do not come from its own code, and the suite against itself.
import { describe, expect, it } from 'vitest';
import { roundToF16 } from '../../src/core/dtype.js';
import { createRng, type Rng } from '../../src/core/rng.js';
import { hostTensor } from '../../src/core/tensor.js';
import type { Backend, GridSpec, Tensor, TransformObjective } from '../../src/ops/backend.js';
import { createReferenceBackend, readF64 } from '../../src/ops/reference/backend.js';
import { MIN_SCALE, roundHalfEven, roundToNearest } from '../../src/ops/reference/quantize.js';
import { forestRoots } from '../../src/ops/sequences.js';
import { ReferenceTensor } from '../../src/ops/reference/tensor.js';
import { randomPairs } from '../../src/transforms/index.js';
import { randomTransform } from './duo.js';
import { conformanceCases, OPS, runCase, runConformance, STRICT, type OpName } from './suite.js';

const ops = createReferenceBackend();

async function tensor(shape: readonly number[], values: ArrayLike<number>): Promise<Tensor> {
  return ops.upload(hostTensor('f64', shape, Float64Array.from(values)));
}

function normals(count: number, rng: Rng): Float64Array {
  return Float64Array.from({ length: count }, () => rng.normal());
}

function expectClose(actual: ArrayLike<number>, expected: ArrayLike<number>, tolerance: number): void {
  expect(actual.length).toBe(expected.length);
  for (let i = 0; i < expected.length; i++) {
    if (!(Math.abs(actual[i] - expected[i]) <= tolerance)) {
      expect.fail(`element ${i}: ${actual[i]}, expected ${expected[i]} ± ${tolerance}`);
    }
  }
}

/** H = XᵀX/n with strongly correlated channels: [channels, channels]. */
function gram(channels: number, rng: Rng): Float64Array {
  const tokens = 3 * channels;
  const h = new Float64Array(channels * channels);
  for (let t = 0; t < tokens; t++) {
    const common = 2 * rng.normal();
    const x = Float64Array.from({ length: channels }, (_, i) => rng.normal() * (1 + (i % 3)) + common);
    for (let i = 0; i < channels; i++) {
      for (let j = 0; j < channels; j++) h[i * channels + j] += (x[i] * x[j]) / tokens;
    }
  }
  return h;
}

describe('closed forms', () => {
  it('linear: products, bias, residual; dense and quantized', async () => {
    const x = await tensor([1, 2], [3, -1]);
    const dense = await ops.loadLinear({
      kind: 'dense',
      weight: hostTensor('f32', [2, 2], Float32Array.of(1, 2, 0, 5)),
      bias: Float32Array.of(0.5, 0),
    });
    expect([...readF64(await ops.linear(x, dense))]).toEqual([1.5, -5]);
    expect([...readF64(await ops.linear(x, dense, await tensor([1, 2], [10, 20])))]).toEqual([11.5, 15]);
    expect([...readF64(await ops.embed(dense, Int32Array.of(1, 0)))]).toEqual([0, 5, 1, 2]);
    const quantized = await ops.loadLinear({
      kind: 'quantized',
      weight: {
        bits: 4,
        groupSize: 2,
        inFeatures: 2,
        outFeatures: 1,
        codes: Uint8Array.of(15, 0),
        zeros: Uint8Array.of(8),
        scales: Float32Array.of(0.5),
      },
    });
    expect([...readF64(await ops.linear(x, quantized))]).toEqual([3 * 3.5 + 4]);
  });

  it('rmsNorm and siluMul', async () => {
    const y = readF64(await ops.rmsNorm(await tensor([1, 2], [3, 4]), await tensor([2], [1, 10]), 0));
    expectClose(y, [3 / Math.sqrt(12.5), 40 / Math.sqrt(12.5)], 1e-15);
    const gated = readF64(await ops.siluMul(await tensor([1, 4], [0, Math.log(3), 7, 8])));
    expectClose(gated, [0, Math.log(3) * 0.75 * 8], 1e-14);
  });

  it('a quarter turn swaps a pair, after its scales', async () => {
    const transform = {
      channels: 4,
      groupSize: 4,
      krot: 1,
      pairs: Int16Array.of(0, 2, 3, 1),
      theta: Float32Array.of(Math.PI / 2, 0),
      channelScales: Float32Array.of(2, 1, 1, 0.5),
    };
    const y = await ops.rotate(await tensor([1, 4], [1, 10, 100, 1000]), await ops.loadTransform(transform));
    // x_i ← x_j, x_j ← −x_i for (0, 2); (3, 1) is not turned. The angle is π/2 rounded to f32.
    expectClose(readF64(y), [100, 10, -2, 500], 1e-5);
  });

  it('RoPE turns the halves of a head by position · frequency', async () => {
    const angle = [0, 0.3, 0.6];
    const rope = await ops.loadRope(Float32Array.from(angle, Math.cos), Float32Array.from(angle, Math.sin), 2);
    const { q, k, v } = await ops.splitHeads(await tensor([2, 9], [...Array(18).keys()]), {
      heads: 1,
      kvHeads: 1,
      headDim: 3,
      batch: 1,
      start: 1,
      rope,
      eps: 0,
    });
    const turned = (a: number, b: number, t: number) => [
      a * Math.cos(t) - b * Math.sin(t),
      b * Math.cos(t) + a * Math.sin(t),
    ];
    expectClose(readF64(q), [...turned(0, 1, 0.3), 2, ...turned(9, 10, 0.6), 11], 1e-6);
    expectClose(readF64(k), [...turned(3, 4, 0.3), 5, ...turned(12, 13, 0.6), 14], 1e-6);
    expect([...readF64(v)]).toEqual([6, 7, 8, 15, 16, 17]);
  });

  it('attention is a softmax over the past; a window of 1 returns the own value', async () => {
    const q = await tensor([2, 2], [1, 0, 0, 2]);
    const k = await tensor([2, 1], [0.5, -0.25]);
    const v = await tensor([2, 1], [10, 20]);
    const options = { heads: 2, kvHeads: 1, headDim: 1, batch: 1, scale: 2, start: 0 };
    const [e1, e2] = [Math.exp(2 * 2 * 0.5), Math.exp(2 * 2 * -0.25)];
    const expected = [10, 10, 15, (10 * e1 + 20 * e2) / (e1 + e2)];
    expectClose(readF64(await ops.attention(q, k, v, options)), expected, 1e-13);
    expectClose(readF64(await ops.attention(q, k, v, { ...options, window: 1 })), [10, 10, 20, 20], 0);
    expectClose(readF64(await ops.attention(q, k, v, { ...options, window: 2 })), expected, 1e-13);
    // Two sequences of one token do not see each other.
    expectClose(readF64(await ops.attention(q, k, v, { ...options, batch: 2 })), [10, 10, 20, 20], 0);
  });

  it('packed sequences with a common beginning attend as each alone; a forest that is none is refused', async () => {
    const rng = createRng(5);
    const [heads, kvHeads, headDim] = [4, 2, 3];
    // Tokens 0 1 2, after which 3 4 or 5; then another sequence.
    const paths = [
      [0, 1, 2, 3, 4],
      [0, 1, 2, 5],
      [6, 7],
    ];
    const ends = Int32Array.of(6, 6, 6, 5, 5, 6, 8, 8);
    const start = Int32Array.of(0, 1, 2, 3, 4, 3, 0, 1);
    const [q, k, v] = [normals(8 * 12, rng), normals(8 * 6, rng), normals(8 * 6, rng)];
    const rows = (x: Float64Array, width: number, path: readonly number[]) =>
      tensor(
        [path.length, width],
        path.flatMap((row) => [...x.subarray(row * width, (row + 1) * width)]),
      );
    const every = [0, 1, 2, 3, 4, 5, 6, 7];
    for (const window of [undefined, 3]) {
      const options = { heads, kvHeads, headDim, scale: 0.7, window };
      const packed = await ops.attention(await rows(q, 12, every), await rows(k, 6, every), await rows(v, 6, every), {
        ...options,
        batch: 8,
        start,
        ends,
      });
      for (const path of paths) {
        const alone = await ops.attention(await rows(q, 12, path), await rows(k, 6, path), await rows(v, 6, path), {
          ...options,
          batch: 1,
          start: 0,
        });
        expectClose(readF64(await rows(readF64(packed), 12, path)), [...readF64(alone)], 1e-14);
      }
    }
    const refused = (bad: Int32Array, positions: Int32Array) => () => forestRoots(bad, positions);
    expect([...forestRoots(ends, start)]).toEqual([0, 0, 0, 0, 0, 0, 6, 6]);
    expect(refused(Int32Array.of(2, 3, 3), Int32Array.of(0, 1, 1))).toThrow(/ends at 3/);
    expect(refused(Int32Array.of(2, 2, 3), Int32Array.of(0, 0, 0))).toThrow(/position 0, not 1/);
  });

  it('score: uniform logits cost log(vocab); KL of two coins', async () => {
    const uniform = await ops.score(await tensor([1, 8], new Float64Array(8).fill(3)), Int32Array.of(5));
    expectClose(uniform.nll, [Math.log(8)], 1e-14);
    expect(uniform.kl).toBeUndefined();
    const q = await tensor([1, 2], [Math.log(0.75), Math.log(0.25)]);
    const p = await tensor([1, 2], [Math.log(0.4), Math.log(0.6)]);
    const { kl, agree } = await ops.score(q, Int32Array.of(0), p);
    expectClose(kl ?? [], [0.4 * Math.log(0.4 / 0.75) + 0.6 * Math.log(0.6 / 0.25)], 1e-14);
    expect([...(agree ?? [])]).toEqual([0]);
  });

  it('rounds ties to even', () => {
    expect([0.5, 1.5, 2.5, -0.5, -1.5, 2.49, -2.51].map(roundHalfEven).map((x) => x + 0)).toEqual([
      0, 2, 2, 0, -2, 2, -3,
    ]);
  });

  it('grid: the scale is an f16 before the codes are found, and never 0', async () => {
    const w = Float64Array.from({ length: 16 }, (_, i) => (i - 5) / 15);
    const rounded = await ops.roundToNearest(await tensor([16, 1], w), { bits: 4, groupSize: 16 });
    expect([...rounded.codes]).toEqual([...Array(16).keys()]);
    expect([...rounded.zeros]).toEqual([5]);
    expect([...rounded.scales]).toEqual([roundToF16(1 / 15)]);
    const flat = await ops.roundToNearest(await tensor([2, 1], [0, 0]), { bits: 4, groupSize: 2 });
    expect([...flat.scales]).toEqual([MIN_SCALE]);
    expect([...readF64(flat.values)]).toEqual([0, 0]);
    for (const constant of [0.25, -3]) {
      const group = await ops.roundToNearest(await tensor([2, 1], [constant, constant]), { bits: 4, groupSize: 2 });
      expect(readF64(group.values)[1]).toBe(15 * roundToF16(Math.abs(constant) / 15) * Math.sign(constant));
    }
    const clipped = await ops.roundToNearest(
      await tensor([2, 1], [-1, 2]),
      { bits: 2, groupSize: 2 },
      Float32Array.of(0.5),
    );
    expect([...readF64(clipped.values)]).toEqual([-0.5, 1]);
  });

  it('matmul with transposes, addScaled, dot, transpose', async () => {
    const a = await tensor([2, 3], [1, 2, 3, 4, 5, 6]);
    const b = await tensor([2, 3], [1, 0, -1, 2, 1, 0]);
    expect([...readF64(await ops.matmul(a, b, { transposeB: true }))]).toEqual([-2, 4, -2, 13]);
    expect([...readF64(await ops.matmul(a, b, { transposeA: true }))]).toEqual([9, 4, -1, 12, 5, -2, 15, 6, -3]);
    expect([...readF64(await ops.addScaled(a, b, 2))]).toEqual([3, 2, 1, 8, 7, 6]);
    expect(await ops.dot(a, b)).toBe(1 - 3 + 8 + 5);
    expect([...readF64(await ops.transpose(a))]).toEqual([1, 4, 2, 5, 3, 6]);
  });

  it('refuses tensors that were freed or belong elsewhere', async () => {
    const x = await tensor([2, 2], [1, 2, 3, 4]);
    const view = ops.sliceRows(x, 1, 2);
    ops.free(view);
    expect([...readF64(x)]).toEqual([1, 2, 3, 4]);
    ops.free(x);
    expect(() => readF64(view)).toThrow(/freed/);
    expect(() => readF64({ shape: [1] })).toThrow(/another backend/);
  });
});

describe('properties', () => {
  const shapes = [
    [24, 4, 3],
    [172, 172, 8],
    [256, 128, 8],
    [64, 32, 40],
  ] as const;

  it.each(shapes)('T⁻¹(T(W)) = W and T(W)·T⁻ᵀx = W·x: %i channels, groups of %i, K = %i', async (channels, g, krot) => {
    const rng = createRng(channels);
    const transform = randomTransform(channels, g, krot, rng);
    const w = await tensor([channels, 5], normals(channels * 5, rng));
    const x = await tensor([channels, 3], normals(channels * 3, rng));
    const forward = await ops.transformChannels(w, transform, 'forward');
    expectClose(readF64(await ops.transformChannels(forward, transform, 'inverse')), readF64(w), 1e-12);
    const rotated = await ops.transformChannels(x, transform, 'forward', 'activation');
    const plain = readF64(await ops.matmul(w, x, { transposeA: true }));
    expectClose(readF64(await ops.matmul(forward, rotated, { transposeA: true })), plain, 1e-12 * channels);
    // The op on rows is the same map.
    const rows = await ops.rotate(await ops.transpose(x), await ops.loadTransform(transform));
    expectClose(readF64(await ops.transpose(rows)), readF64(rotated), 0);
  });

  it("the loss is the same in the transformed space: tr(ŴHŴᵀ) = tr(T(Ŵ)·H'·T(Ŵ)ᵀ), H' = T⁻ᵀHT⁻¹", async () => {
    const rng = createRng(3);
    const transform = randomTransform(24, 8, 5, rng);
    const h = await tensor([24, 24], gram(24, rng));
    const w = await tensor([24, 4], normals(96, rng));
    const loss = async (weight: Tensor, metric: Tensor) => ops.dot(weight, await ops.matmul(metric, weight));
    const half = await ops.transpose(await ops.transformChannels(h, transform, 'forward', 'activation'));
    const both = await ops.transformChannels(half, transform, 'forward', 'activation');
    const expected = await loss(w, h);
    const actual = await loss(await ops.transformChannels(w, transform, 'forward'), both);
    expect(Math.abs(actual / expected - 1)).toBeLessThan(1e-12);
  });

  it('gptqFactor: UᵀU(H + λI) = I with U upper triangular; solveSymmetric: X(H + λI) = B', async () => {
    const n = 40;
    const rng = createRng(4);
    const h = gram(n, rng);
    const damp = 0.01;
    let trace = 0;
    for (let i = 0; i < n; i++) trace += h[i * n + i];
    const damped = await tensor(
      [n, n],
      h.map((v, at) => (at % (n + 1) === 0 ? v + (damp * trace) / n : v)),
    );
    const u = await ops.gptqFactor(await tensor([n, n], h), damp);
    readF64(u).forEach((value, at) => {
      if (at % n < Math.floor(at / n)) expect(value).toBe(0);
    });
    const product = await ops.matmul(await ops.matmul(u, u, { transposeA: true }), damped);
    expectClose(
      readF64(product),
      Float64Array.from({ length: n * n }, (_, at) => (at % (n + 1) === 0 ? 1 : 0)),
      1e-10,
    );
    const b = await tensor([3, n], normals(3 * n, rng));
    const x = await ops.solveSymmetric(await tensor([n, n], h), b, damp);
    expectClose(readF64(await ops.matmul(x, damped)), readF64(b), 1e-10);
  });

  it('GPTQ with an identity factor is rounding to nearest', async () => {
    const rng = createRng(5);
    const w = await tensor([32, 6], normals(192, rng));
    const identity = await tensor(
      [32, 32],
      Float64Array.from({ length: 1024 }, (_, at) => (at % 33 === 0 ? 1 : 0)),
    );
    for (const groupSize of [8, 32]) {
      const grid: GridSpec = { bits: 3, groupSize };
      const gptq = await ops.gptq(w, identity, grid);
      const rtn = await ops.roundToNearest(w, grid);
      expect(gptq.codes).toEqual(rtn.codes);
      expect(gptq.zeros).toEqual(rtn.zeros);
      expect(gptq.scales).toEqual(rtn.scales);
      expect(readF64(gptq.values)).toEqual(readF64(rtn.values));
    }
  });

  it.each([
    [2, 16],
    [3, 8],
    [3, 64],
    [4, 32],
  ] as const)('GPTQ loses less than rounding to nearest in the norm of H: %i bits, groups of %i', async (bits, g) => {
    for (let seed = 0; seed < 5; seed++) {
      const rng = createRng(100 + seed);
      const h = await tensor([64, 64], gram(64, rng));
      const w = await tensor([64, 16], normals(64 * 16, rng));
      const error = async (values: Tensor): Promise<number> => {
        const difference = await ops.addScaled(w, values, -1);
        return ops.dot(difference, await ops.matmul(h, difference));
      };
      const grid: GridSpec = { bits, groupSize: g };
      const gptq = await error((await ops.gptq(w, await ops.gptqFactor(h, 0.01), grid)).values);
      expect(gptq).toBeLessThan(await error((await ops.roundToNearest(w, grid)).values));
    }
  });
});

describe('transform objective', () => {
  /** The rotations of one column in float64, written apart from the code under test. */
  function turn(x: Float64Array, layout: Layout, theta: ArrayLike<number>, inverse: boolean): Float64Array {
    const y = x.slice();
    const { channels, groupSize, krot, pairs } = layout;
    for (let n = 0; n < krot; n++) {
      const k = inverse ? krot - 1 - n : n;
      for (let at = 0; at < channels; at += 2) {
        const group = at - (at % groupSize);
        const i = group + pairs[k * channels + at];
        const j = group + pairs[k * channels + at + 1];
        const angle = (inverse ? -1 : 1) * theta[(k * channels + at) / 2];
        const turned = [
          Math.cos(angle) * y[i] + Math.sin(angle) * y[j],
          Math.cos(angle) * y[j] - Math.sin(angle) * y[i],
        ];
        [y[i], y[j]] = turned;
      }
    }
    return y;
  }
  interface Layout {
    channels: number;
    groupSize: number;
    krot: number;
    pairs: Int16Array;
  }

  it.each([
    ['values around zero', 0, 4, 8],
    ['one-sided groups, where codes saturate', 1.5, 4, 4],
    ['2 bits per channel', 0.2, 2, 16],
  ] as const)('gradients are those of the straight-through surrogate: %s', async (_, offset, bits, group) => {
    const rng = createRng(7);
    const cols = 3;
    const layout: Layout = { channels: 16, groupSize: 8, krot: 3, pairs: randomPairs(16, 8, 3, rng) };
    const { channels, krot } = layout;
    const w = normals(channels * cols, rng).map((v) => v + offset);
    const theta = Float32Array.from({ length: (krot * channels) / 2 }, () => 0.4 * rng.normal());
    const scales = Float32Array.from({ length: channels }, () => Math.exp(0.3 * rng.normal()));
    const gradient = normals(channels * cols, rng);
    const column = (x: ArrayLike<number>, c: number): Float64Array =>
      Float64Array.from({ length: channels }, (_, i) => x[i * cols + c]);
    const forward = (t: ArrayLike<number>, s: ArrayLike<number>, c: number): Float64Array =>
      turn(
        column(w, c).map((v, i) => v * s[i]),
        layout,
        t,
        false,
      );

    // Freeze everything that rounds at this point. Straight through, code − zero = y/scale + r with r constant, so the
    // rounded value is y + r·scale, and only the scale's range max − min still moves.
    const frozen = Array.from({ length: cols }, (_, c) => {
      const y = forward(theta, scales, c);
      const rounding = roundToNearest(y, channels, 1, { bits, groupSize: group }, undefined);
      return Array.from({ length: channels / group }, (_, g) => {
        const part = [...y.subarray(g * group, (g + 1) * group)];
        const scale = rounding.scales[g];
        return {
          lo: g * group + part.indexOf(Math.min(...part)),
          hi: g * group + part.indexOf(Math.max(...part)),
          // What the f16 rounding added to the scale.
          added: scale - (Math.max(...part) - Math.min(...part)) / (2 ** bits - 1),
          r: part.map((v, i) => rounding.codes[g * group + i] - rounding.zeros[g] - v / scale),
        };
      });
    });
    const surrogate = (t: ArrayLike<number>, s: ArrayLike<number>): Float64Array => {
      const out = new Float64Array(channels * cols);
      for (let c = 0; c < cols; c++) {
        const y = forward(t, s, c);
        const q = y.map((v, i) => {
          const { lo, hi, added, r } = frozen[c][Math.floor(i / group)];
          return v + r[i % group] * ((y[hi] - y[lo]) / (2 ** bits - 1) + added);
        });
        turn(q, layout, t, true).forEach((v, i) => (out[i * cols + c] = v / s[i]));
      }
      return out;
    };
    const loss = (t: ArrayLike<number>, s: ArrayLike<number>): number =>
      surrogate(t, s).reduce((sum, v, at) => sum + v * gradient[at], 0);
    const slope = (values: Float32Array, at: number, f: (values: Float64Array) => number): number => {
      const step = 1e-5;
      const moved = (by: number): Float64Array => Float64Array.from(values, (v, i) => (i === at ? v + by : v));
      return (f(moved(step)) - f(moved(-step))) / (2 * step);
    };

    const objective = await ops.createObjective(await tensor([channels, cols], w), layout, { bits, groupSize: group });
    expectClose(readF64(await objective.forward(theta, scales)), surrogate(theta, scales), 1e-12);
    const found = await objective.backward(await tensor([channels, cols], gradient));
    expectClose(
      found.theta,
      Array.from(theta, (_, at) => slope(theta, at, (t) => loss(t, scales))),
      1e-6,
    );
    expectClose(
      found.scales,
      Array.from(scales, (_, at) => slope(scales, at, (s) => loss(theta, s))),
      1e-6,
    );
  });

  it('is rounding to nearest when the transform is the identity', async () => {
    const rng = createRng(8);
    const w = await tensor([32, 4], normals(128, rng));
    const layout = { channels: 32, groupSize: 16, krot: 2, pairs: randomPairs(32, 16, 2, rng) };
    const grid: GridSpec = { bits: 4, groupSize: 16 };
    const objective = await ops.createObjective(w, layout, grid);
    const values = await objective.forward(new Float32Array(32), new Float32Array(32).fill(1));
    expect(readF64(values)).toEqual(readF64((await ops.roundToNearest(w, grid)).values));
  });

  it('has no gradient before a forward', async () => {
    const w = await tensor([4, 1], [1, 2, 3, 4]);
    const layout = { channels: 4, groupSize: 4, krot: 0, pairs: new Int16Array(0) };
    const objective = await ops.createObjective(w, layout, { bits: 4, groupSize: 4 });
    expect(() => objective.backward(w)).toThrow(/forward/);
  });
});

describe('the suite', () => {
  it('covers every op, and no two cases share a name', () => {
    const covered = new Set(conformanceCases.flatMap((test) => [test.op, ...(test.also ?? [])]));
    expect(OPS.filter((op) => !covered.has(op))).toEqual([]);
    const names = conformanceCases.map((test) => `${test.op}: ${test.name}`);
    expect(names.filter((name, at) => names.indexOf(name) !== at)).toEqual([]);
  });

  /** A result with its largest value off by 2^-9, what a kernel that rounds to f16 somewhere may do, or one code off. */
  function spoil(result: unknown): unknown {
    if (typeof result === 'number') return result * (1 + 2 ** -9);
    if (result instanceof Float32Array || result instanceof Float64Array) {
      const copy: Float32Array | Float64Array = result.slice();
      let largest = 0;
      for (let at = 1; at < copy.length; at++) if (Math.abs(copy[at]) > Math.abs(copy[largest])) largest = at;
      copy[largest] *= 1 + 2 ** -9;
      return copy;
    }
    if (result instanceof Uint8Array) return result.map((code, at) => (at === result.length - 1 ? code ^ 1 : code));
    if (result instanceof ReferenceTensor)
      return new ReferenceTensor(result.shape, spoil(readF64(result)) as Float64Array);
    if (typeof result === 'object' && result !== null) {
      if ('forward' in result) return spoilObjective(result as TransformObjective);
      return Object.fromEntries(Object.entries(result).map(([key, value]) => [key, spoil(value)]));
    }
    return result;
  }

  function spoilObjective(objective: TransformObjective): TransformObjective {
    return {
      forward: (theta, scales) => objective.forward(theta, scales),
      backward: (gradient) => spoil(objective.backward(gradient)) as never,
      backwardOn: (gradient) => spoil(objective.backwardOn(gradient)) as never,
      dispose: () => objective.dispose(),
    };
  }

  /** The oracle with one op spoiled. */
  function sabotaged(op: OpName): Backend {
    return new Proxy(createReferenceBackend(), {
      get: (target, key) => {
        const method: unknown = Reflect.get(target, key);
        if (typeof method !== 'function') return method;
        return (...args: unknown[]): unknown => {
          const result: unknown = Reflect.apply(method, target, args);
          if (key !== op) return result;
          return result instanceof Promise ? result.then(spoil) : spoil(result);
        };
      },
    });
  }

  it.each([...new Set(conformanceCases.map((test) => test.op))])(
    'fails a backend whose %s is off by 2^-9',
    async (op) => {
      const oracle = createReferenceBackend();
      const tests = conformanceCases.filter((test) => test.op === op && !test.refuses);
      expect(tests.length).toBeGreaterThan(0);
      for (const test of tests) {
        const outcome = await runCase(test, sabotaged(op), oracle, STRICT).then(
          () => 'passed',
          () => 'failed',
        );
        expect(`${test.name}: ${outcome}`).toBe(`${test.name}: failed`);
      }
    },
  );
});

runConformance('reference', async () => createReferenceBackend());
