// The tape against finite differences in float64, checkpoints against plain recording, sums over uses and tapes, AdamW.
import { describe, expect, it } from 'vitest';
import {
  constant,
  Optimizer,
  cosineRate,
  parameter,
  Tape,
  type Loss,
  type Variable,
} from '../../src/autograd/index.js';
import { createRng } from '../../src/core/rng.js';
import { hostTensor } from '../../src/core/tensor.js';
import type { GridSpec, Tensor } from '../../src/ops/backend.js';
import { requireGradients } from '../../src/ops/gradients.js';
import { createReferenceBackend, readF64 } from '../../src/ops/reference/backend.js';
import { randomPairs } from '../../src/transforms/index.js';

const backend = createReferenceBackend();
/** Central differences at this step: values are multiples of it, so that f32 parts of the way (tables, angles) stay exact. */
const STEP = 2 ** -10;

const upload = async (shape: readonly number[], values: ArrayLike<number>): Promise<Tensor> =>
  backend.upload(hostTensor('f64', shape, Float64Array.from(values)));

type Leaves = Readonly<Record<string, { shape: readonly number[]; values: Float64Array }>>;

function leaf(shape: readonly number[], rng: ReturnType<typeof createRng>, scale = 1, offset = 0) {
  const count = shape.reduce((a, b) => a * b, 1);
  return {
    shape,
    values: Float64Array.from({ length: count }, () => Math.round((offset + scale * rng.normal()) / STEP) * STEP),
  };
}

/** Gradients of a scalar function of leaves by the tape, and by central differences of sampled elements. */
async function check(
  leaves: Leaves,
  build: (tape: Tape, v: Record<string, Variable>) => Promise<Loss>,
  tolerance = 2e-5,
): Promise<void> {
  const evaluate = async (changed?: { name: string; at: number; by: number }): Promise<number> => {
    const variables: Record<string, Variable> = {};
    for (const [name, { shape, values }] of Object.entries(leaves)) {
      const used = values.slice();
      if (changed?.name === name) used[changed.at] += changed.by;
      variables[name] = constant(await upload(shape, used));
    }
    return readF64((await build(new Tape(backend, { record: false }), variables)).value)[0];
  };
  const variables: Record<string, Variable> = {};
  for (const [name, { shape, values }] of Object.entries(leaves))
    variables[name] = parameter(await upload(shape, values));
  const tape = new Tape(backend);
  const loss = await build(tape, variables);
  expect(readF64(loss.value)[0]).toBe(await evaluate());
  await loss.backward();
  tape.free();
  const rng = createRng(3);
  for (const [name, { values }] of Object.entries(leaves)) {
    const { gradient } = variables[name];
    expect(gradient, `gradient of ${name}`).toBeDefined();
    const found = readF64(gradient as Tensor);
    const size = Math.max(...found.map(Math.abs));
    expect(size, `gradient of ${name}`).toBeGreaterThan(0);
    for (let n = 0; n < 12; n++) {
      const at = rng.int(0, values.length);
      const slope = ((await evaluate({ name, at, by: STEP })) - (await evaluate({ name, at, by: -STEP }))) / (2 * STEP);
      expect(Math.abs(found[at] - slope), `${name}[${at}]: tape ${found[at]}, difference ${slope}`).toBeLessThan(
        tolerance * size,
      );
    }
  }
}

/** Mean squared distance of a result to fixed random numbers: a scalar that depends on every element differently. */
async function scalar(tape: Tape, y: Variable, seed = 9): Promise<Loss> {
  const rng = createRng(seed);
  const count = y.value.shape.reduce((a, b) => a * b, 1);
  const target = await upload(
    y.value.shape,
    Array.from({ length: count }, () => rng.normal()),
  );
  return tape.elementLoss(y, target, { kind: 'mse' });
}

describe('gradients against finite differences, float64', () => {
  const rng = createRng(1);

  it.each([
    [false, false],
    [true, false],
    [false, true],
    [true, true],
  ])('matmul, transposed %s %s', async (transposeA, transposeB) => {
    const leaves = {
      a: leaf(transposeA ? [5, 4] : [4, 5], rng),
      b: leaf(transposeB ? [3, 5] : [5, 3], rng),
    };
    await check(leaves, async (tape, v) => scalar(tape, await tape.matmul(v.a, v.b, { transposeA, transposeB })));
  });

  it('add, scale, concatColumns; a variable used twice', async () => {
    const leaves = { a: leaf([4, 3], rng), b: leaf([4, 3], rng) };
    await check(leaves, async (tape, v) => {
      const sum = await tape.add(await tape.scale(v.a, -2.5), v.b, 0.5);
      return scalar(tape, await tape.concatColumns([sum, v.a, await tape.add(v.b, v.b)]));
    });
  });

  it('rmsNorm', async () => {
    const leaves = { x: leaf([3, 7], rng), weight: leaf([7], rng, 0.3, 1) };
    await check(leaves, async (tape, v) => scalar(tape, await tape.rmsNorm(v.x, v.weight, 1e-3)));
  });

  it('siluMul', async () => {
    await check({ x: leaf([3, 10], rng, 2) }, async (tape, v) => scalar(tape, await tape.siluMul(v.x)));
  });

  it('splitHeads: per-head norms and RoPE', async () => {
    const shape = { heads: 4, kvHeads: 2, headDim: 6, batch: 2 };
    const angles = Float32Array.from({ length: 5 * 2 }, () => rng.uniform() * 3);
    const rope = await backend.loadRope(angles.map(Math.cos), angles.map(Math.sin), 4);
    const leaves = { qkv: leaf([6, 48], rng), q: leaf([6], rng, 0.3, 1), k: leaf([6], rng, 0.3, 1) };
    await check(leaves, async (tape, v) => {
      const heads = await tape.splitHeads(v.qkv, { ...shape, start: 1, rope, eps: 1e-3 }, { q: v.q, k: v.k });
      return scalar(tape, await tape.concatColumns([heads.q, heads.k, heads.v]));
    });
    // A result nobody uses has no gradient, and takes none of the others'.
    await check({ qkv: leaves.qkv }, async (tape, v) =>
      scalar(tape, (await tape.splitHeads(v.qkv, { ...shape, start: 1, rope, eps: 1e-3 })).k),
    );
  });

  it.each([undefined, 3])('attention, window %s', async (window) => {
    const shape = { heads: 4, kvHeads: 2, headDim: 5, batch: 2, scale: 0.5, window };
    const leaves = { q: leaf([12, 20], rng), k: leaf([12, 10], rng), v: leaf([12, 10], rng) };
    await check(leaves, async (tape, v) => scalar(tape, await tape.attention(v.q, v.k, v.v, shape)));
  });

  it('rotate: activations, angles and scales', async () => {
    const layout = { channels: 16, groupSize: 8, krot: 3, pairs: randomPairs(16, 8, 3, rng) };
    const leaves = { x: leaf([5, 16], rng), theta: leaf([3, 8], rng), scales: leaf([16], rng, 0.2, 1) };
    await check(leaves, async (tape, v) => scalar(tape, await tape.rotate(v.x, layout, v.theta, v.scales)));
  });

  it('transformChannels, both ways', async () => {
    const transform = {
      channels: 16,
      groupSize: 8,
      krot: 3,
      pairs: randomPairs(16, 8, 3, rng),
      theta: Float32Array.from({ length: 24 }, () => rng.normal()),
      channelScales: Float32Array.from({ length: 16 }, () => 2 ** rng.int(-1, 2)),
    };
    for (const direction of ['forward', 'inverse'] as const)
      await check({ w: leaf([16, 5], rng) }, async (tape, v) =>
        scalar(tape, await tape.transformChannels(v.w, transform, direction)),
      );
  });

  it('scaleGroups', async () => {
    const codes = await upload([8, 5], leaf([8, 5], rng, 3).values);
    await check({ scales: leaf([2, 5], rng, 0.2, 1) }, async (tape, v) =>
      scalar(tape, await tape.scaleGroups(codes, v.scales, 4)),
    );
  });

  it('losses: smooth-L1, MSE, cross-entropy, KL', async () => {
    const x = leaf([4, 9], rng);
    const reference = await upload([4, 9], leaf([4, 9], rng).values);
    for (const loss of [{ kind: 'mse' }, { kind: 'smooth-l1', beta: 0.7 }] as const)
      await check({ x }, (tape, v) => tape.elementLoss(v.x, reference, loss));
    await check({ x }, (tape, v) => tape.crossEntropy(v.x, Int32Array.of(3, 0, 8, 3)));
    await check({ x }, (tape, v) => tape.klDivergence(v.x, reference));
  });

  it('fakeQuantize: what is differentiable of it, the roundings held still', async () => {
    const grid: GridSpec = { bits: 3, groupSize: 4 };
    const [w, scales, zeros] = [leaf([8, 5], rng, 1.5), leaf([2, 5], rng, 0.05, 0.4), leaf([2, 5], rng, 0.2, 3)];
    const dy = leaf([8, 5], rng);
    const ops = requireGradients(backend);
    const tensors = await Promise.all([w, scales, zeros, dy].map(({ shape, values }) => upload(shape, values)));
    const out = await ops.fakeQuantizeGradient(tensors[0], tensors[1], tensors[2], grid, tensors[3]);
    const round = (x: number) => {
      const nearest = Math.round(x);
      return Math.abs(x % 1) === 0.5 && nearest % 2 !== 0 ? nearest - 1 : nearest;
    };
    const clamp = (x: number) => Math.min(Math.max(x, 0), 7);
    // The surrogate: offsets of both roundings (and of the zero point's clamp) are constants of the unperturbed point.
    const total = (dw: number, ds: number, dz: number, at: number, slot: number): number => {
      let sum = 0;
      for (let i = 0; i < 40; i++) {
        const s = Math.floor(i / 20) * 5 + (i % 5);
        const [w0, s0, z0] = [w.values[i], scales.values[s], zeros.values[s]];
        const [w1, s1, z1] = [w0 + (i === at ? dw : 0), s0 + (s === slot ? ds : 0), z0 + (s === slot ? dz : 0)];
        const z = z1 + (clamp(round(z0)) - z0);
        const code = w1 / s1 + (round(w0 / s0) - w0 / s0) + z;
        sum += dy.values[i] * (clamp(code) - z) * s1;
      }
      return sum;
    };
    const h = 1e-6;
    // Codes that sit exactly on an end of the range have a kink: the op counts them as inside, the surrogate sees half.
    const edge = (i: number) => {
      const s = Math.floor(i / 20) * 5 + (i % 5);
      const code = round(w.values[i] / scales.values[s]) + clamp(round(zeros.values[s]));
      return code === 0 || code === 7;
    };
    const inner = (slot: number) =>
      ![...Array(40).keys()].some((i) => Math.floor(i / 20) * 5 + (i % 5) === slot && edge(i));
    let checked = 0;
    for (let at = 0; at < 40; at++) {
      if (edge(at)) continue;
      const slope = (total(h, 0, 0, at, -1) - total(-h, 0, 0, at, -1)) / (2 * h);
      expect(readF64(out.w)[at]).toBeCloseTo(slope, 6);
      checked++;
    }
    for (let slot = 0; slot < 10; slot++) {
      if (!inner(slot)) continue;
      expect(readF64(out.scales)[slot]).toBeCloseTo(
        (total(0, h, 0, -1, slot) - total(0, -h, 0, -1, slot)) / (2 * h),
        5,
      );
      expect(readF64(out.zeros)[slot]).toBeCloseTo((total(0, 0, h, -1, slot) - total(0, 0, -h, -1, slot)) / (2 * h), 5);
      checked++;
    }
    expect(checked).toBeGreaterThan(25);
  });
});

describe('checkpoints', () => {
  it('give the same loss and gradients as plain recording, for inputs and for leaves inside', async () => {
    const rng = createRng(5);
    const [xs, ws, ns] = [leaf([6, 8], rng), leaf([8, 8], rng, 0.5), leaf([8], rng, 0.2, 1)];
    const results: Float64Array[][] = [];
    for (const useCheckpoint of [false, true]) {
      const x = parameter(await upload(xs.shape, xs.values));
      const w = parameter(await upload(ws.shape, ws.values));
      const n = parameter(await upload(ns.shape, ns.values));
      const tape = new Tape(backend);
      const segment = async (t: Tape, [input]: readonly Variable[]): Promise<Variable> =>
        t.add(input, await t.matmul(await t.rmsNorm(input, n, 1e-3), w));
      let y: Variable = x;
      for (let layer = 0; layer < 3; layer++)
        y = useCheckpoint ? await tape.checkpoint([y], segment) : await segment(tape, [y]);
      const loss = await scalar(tape, y);
      await loss.backward();
      const value = readF64(loss.value);
      tape.free();
      results.push([value, ...[x, w, n].map((v) => readF64(v.gradient as Tensor))]);
    }
    for (const [i, plain] of results[0].entries())
      for (const [at, value] of plain.entries()) expect(results[1][i][at]).toBeCloseTo(value, 12);
  });
});

describe('accumulation', () => {
  it('two halves of a batch give the gradient of the whole', async () => {
    const rng = createRng(6);
    const [x, w] = [leaf([8, 5], rng), leaf([5, 3], rng)];
    const target = leaf([8, 3], rng);
    const run = async (parts: readonly (readonly [number, number])[]): Promise<Float64Array> => {
      const weight = parameter(await upload(w.shape, w.values));
      for (const [begin, end] of parts) {
        const tape = new Tape(backend);
        const rows = await upload([end - begin, 5], x.values.subarray(begin * 5, end * 5));
        const y = await tape.matmul(constant(rows), weight);
        const expected = await upload([end - begin, 3], target.values.subarray(begin * 3, end * 3));
        const loss = await tape.elementLoss(y, expected, { kind: 'mse' });
        await loss.backward((end - begin) / 8);
        tape.free();
      }
      return readF64(weight.takeGradient() as Tensor);
    };
    const whole = await run([[0, 8]]);
    const halves = await run([
      [0, 4],
      [4, 8],
    ]);
    for (const [i, value] of whole.entries()) expect(halves[i]).toBeCloseTo(value, 14);
  });

  it('a weight made on one tape takes gradients from others, then passes them on', async () => {
    const rng = createRng(7);
    const w = parameter(await upload([4, 3], leaf([4, 3], rng).values));
    const weights = new Tape(backend);
    const doubled = await weights.scale(w, 2);
    for (let n = 0; n < 2; n++) {
      const tape = new Tape(backend);
      const x = constant(await upload([2, 4], leaf([2, 4], rng).values));
      const loss = await scalar(tape, await tape.matmul(x, doubled));
      await loss.backward();
      tape.free();
    }
    expect(w.gradient).toBeUndefined();
    const arrived = readF64(doubled.gradient as Tensor);
    await weights.backward();
    readF64(w.gradient as Tensor).forEach((g, i) => expect(g).toBeCloseTo(2 * arrived[i], 14));
  });

  it('a loss is walked back from once, and never from an unrecorded tape', async () => {
    const x = parameter(await upload([1, 2], [1, 2]));
    const target = await upload([1, 2], [0, 0]);
    const loss = await new Tape(backend).elementLoss(x, target, { kind: 'mse' });
    await loss.backward();
    await expect(loss.backward()).rejects.toThrow(/walked back/);
    const silent = await new Tape(backend, { record: false }).elementLoss(x, target, { kind: 'mse' });
    await expect(silent.backward()).rejects.toThrow(/unrecorded/);
  });
});

describe('Optimizer', () => {
  it('follows AdamW with the cosine schedule, keeps domains', async () => {
    const p = parameter(await upload([2], [1, -1]));
    const optimizer = new Optimizer(
      backend,
      [
        {
          parameters: [p],
          learningRate: 0.1,
          range: { minimum: -1.05, maximum: 2 },
        },
      ],
      { steps: 2 },
    );
    let [m, v, x] = [0, 0, 1];
    for (let step = 0; step < 2; step++) {
      p.gradient = await upload([2], [0.3, 0.3]);
      await optimizer.step();
      m = 0.9 * m + 0.1 * 0.3;
      v = 0.95 * v + 0.05 * 0.09;
      const rate = cosineRate(step, 2, 0.1);
      x -= rate * (m / (1 - 0.9 ** (step + 1)) / (Math.sqrt(v / (1 - 0.95 ** (step + 1))) + 1e-10) + 0.01 * x);
    }
    const values = readF64(p.value);
    expect(values[0]).toBeCloseTo(x, 6);
    expect(values[1]).toBeCloseTo(-1.05, 6);
    expect(cosineRate(2, 2, 1)).toBeCloseTo(1 / 20, 12);
    optimizer.dispose();
  });
});

it('a backend without gradient ops is refused', () => {
  const { gradients: _, ...bare } = { ...backend, info: backend.info, gradients: undefined };
  expect(() => new Tape(bare as typeof backend)).toThrow(/no gradient ops/);
});
