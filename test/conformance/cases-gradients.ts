// Conformance cases of the gradient ops: every backend that offers them against the float64 oracle. Tolerances: u = unit
// roundoff, λ as in duo.ts; each formula stands by its case.
import { afterAll, beforeAll, describe, it } from 'vitest';
import type { AttentionShape, Backend, GridSpec, Tensor, WeightBits } from '../../src/ops/backend.js';
import { requireGradients, type GradientOps } from '../../src/ops/gradients.js';
import { createReferenceBackend, readF64 } from '../../src/ops/reference/backend.js';
import { Duo, LAMBDA, maxAbs, norm, randomTransform } from './duo.js';
import { STRICT, type ConformanceOptions } from './suite.js';

/** Name of a gradient op. */
export type GradientOpName = keyof GradientOps;

/** One check of one gradient op. */
export interface GradientCase {
  readonly op: GradientOpName;
  /** Unique within the op. */
  readonly name: string;
  /** Throws when the subject deviates from the oracle. */
  run(duo: Duo, subject: GradientOps, oracle: GradientOps): Promise<void>;
}

/** Every gradient op; the compiler refuses this table when one is missing. */
export const GRADIENT_OPS = Object.keys({
  splitColumns: true,
  rmsNormGradient: true,
  transformOf: true,
  rotateGradient: true,
  splitHeadsGradient: true,
  attentionGradient: true,
  siluMulGradient: true,
  fakeQuantize: true,
  fakeQuantizeGradient: true,
  scaleGroups: true,
  scaleGroupsGradient: true,
  elementLoss: true,
  crossEntropy: true,
  klDivergence: true,
  adamW: true,
} satisfies Record<GradientOpName, true>) as readonly GradientOpName[];

const SIZES = [
  [1, 4],
  [3, 172],
  [5, 352],
  [17, 43],
  [130, 384],
] as const;

/** The largest magnitude of an oracle result: what absolute tolerances are relative to. */
const sizeOf = (tensor: Tensor): number => maxAbs(readF64(tensor));

const splitColumns: GradientCase[] = [[7], [3, 1, 5], [172, 40]].map((widths) => ({
  op: 'splitColumns',
  name: `widths ${widths.join(', ')}`,
  run: async (duo, subject, oracle) => {
    const x = await duo.input([5, widths.reduce((a, b) => a + b, 0)]);
    const expected = await oracle.splitColumns(x.oracle, widths);
    const actual = await subject.splitColumns(x.subject, widths);
    for (const [i, part] of actual.entries()) await duo.close(part, expected[i], 0, `part ${i}`);
  },
}));

/** Tolerance: sums of n products (dx) and of rows (dw) of values of this size: λ·√(n + 8)·u and λ·√(rows + 8)·u. */
const rmsNorm: GradientCase[] = SIZES.map(([rows, n]) => ({
  op: 'rmsNormGradient',
  name: `${rows} × ${n}`,
  run: async (duo, subject, oracle) => {
    const [x, dy] = [await duo.input([rows, n]), await duo.input([rows, n])];
    const weight = await duo.input([n]);
    const expected = await oracle.rmsNormGradient(x.oracle, weight.oracle, 1e-5, dy.oracle);
    const actual = await subject.rmsNormGradient(x.subject, weight.subject, 1e-5, dy.subject);
    const u = LAMBDA * duo.allowance.roundoff;
    await duo.close(actual.x, expected.x, u * Math.sqrt(n + 8) * sizeOf(expected.x), 'x');
    await duo.close(actual.weight, expected.weight, u * Math.sqrt(rows + 8) * Math.sqrt(rows) * 4, 'weight');
  },
}));

/** Tolerance: exp within 2e-7 and a handful of operations: 16·u relative to |dy|·(|gate| + 1)·(|up| + 1). */
const siluMul: GradientCase[] = SIZES.map(([rows, n]) => ({
  op: 'siluMulGradient',
  name: `${rows} × ${n}`,
  run: async (duo, subject, oracle) => {
    const gateUp = await duo.input(
      [rows, 2 * n],
      duo.normals(2 * rows * n).map((v) => 4 * v),
    );
    const dy = await duo.input([rows, n]);
    const expected = await oracle.siluMulGradient(gateUp.oracle, dy.oracle);
    const tolerance = (at: number): number => {
      const [r, i] = [Math.floor(at / (2 * n)), at % n];
      const [gate, up] = [gateUp.host[r * 2 * n + i], gateUp.host[r * 2 * n + n + i]];
      return 16 * duo.allowance.roundoff * Math.abs(dy.host[r * n + i]) * (Math.abs(gate) + 1) * (Math.abs(up) + 1);
    };
    await duo.close(await subject.siluMulGradient(gateUp.subject, dy.subject), expected, tolerance);
  },
}));

/**
 * Tolerance: K rotations of values of this size for dx: λ·√(2K + 4)·u·max|dx|; angles and scales sum rows of products of
 * such values: times the norms of what is multiplied.
 */
const rotate: GradientCase[] = (
  [
    [1, 128, 128, 8],
    [5, 352, 32, 3],
    [40, 384, 128, 8],
    [300, 256, 64, 2],
    [9, 172, 172, 0],
  ] as const
).map(([rows, channels, groupSize, krot]) => ({
  op: 'rotateGradient',
  name: `${rows} × ${channels}, groups of ${groupSize}, K = ${krot}`,
  run: async (duo, subject, oracle) => {
    const transform = randomTransform(channels, groupSize, krot, duo.rng);
    const [x, dy] = [await duo.input([rows, channels]), await duo.input([rows, channels])];
    const handle = await duo.subject.loadTransform(transform);
    const expected = await oracle.rotateGradient(x.oracle, await duo.oracle.loadTransform(transform), dy.oracle);
    const actual = await subject.rotateGradient(x.subject, handle, dy.subject);
    const u = LAMBDA * Math.sqrt(2 * krot + rows + 8) * duo.allowance.roundoff;
    const reach = maxAbs(transform.channelScales) * norm(x.host, 0, x.host.length);
    await duo.close(actual.x, expected.x, u * sizeOf(expected.x), 'x');
    const angle = (2 * u * reach * norm(dy.host, 0, dy.host.length)) / Math.sqrt(channels);
    await duo.close(actual.theta, expected.theta, angle, 'theta');
    await duo.close(actual.channelScales, expected.channelScales, angle, 'channelScales');
    duo.subject.release(handle);
  },
}));

/**
 * Tolerance as for `rotate`: K rotations of values of this size, and angles whose sine and cosine are within 2·u:
 * λ·√(4K + 4)·u·max|a·x|·√2.
 */
const transformOf: GradientCase[] = (
  [
    [1, 128, 128, 8],
    [40, 384, 128, 8],
    [33, 352, 32, 3],
  ] as const
).map(([rows, channels, groupSize, krot]) => ({
  op: 'transformOf',
  name: `${rows} × ${channels}, groups of ${groupSize}, K = ${krot}, angles up to 3π`,
  run: async (duo, subject, oracle) => {
    const random = randomTransform(channels, groupSize, krot, duo.rng);
    const layout = { channels, groupSize, krot, pairs: random.pairs };
    const x = await duo.input([rows, channels]);
    const theta = await duo.input(
      [krot, channels / 2],
      random.theta.map((angle) => 3 * angle),
    );
    const scales = await duo.input([channels], random.channelScales);
    const turned = async (backend: Backend, ops: GradientOps, side: 'subject' | 'oracle') => {
      const handle = await ops.transformOf(layout, theta[side], scales[side]);
      const y = await backend.rotate(x[side], handle);
      const w = await backend.transformChannels(await backend.transpose(x[side]), handle, 'inverse', 'activation');
      backend.release(handle);
      return { y, w };
    };
    const expected = await turned(duo.oracle, oracle, 'oracle');
    const actual = await turned(duo.subject, subject, 'subject');
    const u = LAMBDA * Math.sqrt(4 * krot + 4) * duo.allowance.roundoff;
    await duo.close(actual.y, expected.y, 2 * u * sizeOf(expected.y), 'rotate');
    await duo.close(actual.w, expected.w, 2 * u * sizeOf(expected.w), 'transformChannels, back on the activation side');
  },
}));

/** [batch, tokens, heads, kvHeads, headDim, rotary dimension, norms]. */
const HEADS = [
  [1, 1, 1, 1, 8, 8, false],
  [2, 9, 4, 2, 24, 24, true],
  [1, 70, 6, 2, 64, 64, true],
  [3, 5, 3, 3, 20, 8, false],
] as const;

/** Tolerance as for rmsNormGradient, with a rotation's two operations more. */
const splitHeads: GradientCase[] = HEADS.map(([batch, tokens, heads, kvHeads, headDim, rotaryDim, norms]) => ({
  op: 'splitHeadsGradient',
  name: `${batch} × ${tokens}, ${heads}/${kvHeads} heads of ${headDim}, rotary ${rotaryDim}${norms ? ', norms' : ''}`,
  run: async (duo, subject, oracle) => {
    const rows = batch * tokens;
    const qkv = await duo.input([rows, (heads + 2 * kvHeads) * headDim]);
    const q = await duo.input([rows, heads * headDim]);
    const [k, v] = [await duo.input([rows, kvHeads * headDim]), await duo.input([rows, kvHeads * headDim])];
    const qNorm = norms ? await duo.input([headDim]) : undefined;
    const kNorm = norms ? await duo.input([headDim]) : undefined;
    const positions = tokens + 3;
    const angles = Float32Array.from({ length: (positions * rotaryDim) / 2 }, () => duo.rng.uniform() * 6);
    const [cos, sin] = [angles.map(Math.cos), angles.map(Math.sin)];
    const gradient = async (ops: GradientOps, backend: Backend, side: 'subject' | 'oracle') => {
      const rope = await backend.loadRope(cos, sin, rotaryDim);
      const shape: AttentionShape = { heads, kvHeads, headDim };
      return ops.splitHeadsGradient(
        qkv[side],
        { ...shape, batch, start: 2, rope, qNorm: qNorm?.[side], kNorm: kNorm?.[side], eps: 1e-6 },
        { q: q[side], k: k[side], v: v[side] },
      );
    };
    const expected = await gradient(oracle, duo.oracle, 'oracle');
    const actual = await gradient(subject, duo.subject, 'subject');
    const u = LAMBDA * duo.allowance.roundoff;
    await duo.close(actual.qkv, expected.qkv, u * Math.sqrt(headDim + 10) * sizeOf(expected.qkv), 'qkv');
    for (const name of ['qNorm', 'kNorm'] as const) {
      const [a, e] = [actual[name], expected[name]];
      if (!a !== !e) throw new Error(`${name} is ${a ? 'there' : 'missing'}`);
      const terms = rows * (name === 'qNorm' ? heads : kvHeads);
      if (a && e) await duo.close(a, e, u * Math.sqrt(headDim + terms + 10) * Math.sqrt(terms) * 4, name);
    }
  },
}));

/**
 * Tolerance: weights are within (d + 10)·u of theirs (a dot product, an exponential), each result a sum of up to `tokens`
 * terms of three factors: λ·√(d + tokens + 10)·u times √tokens·max|q|·max|k|·max|v|·max|dy| bounds it from far above; of
 * that bound 1/8 is asked.
 */
const attention: GradientCase[] = (
  [
    [1, 1, 1, 1, 8, undefined],
    [2, 9, 4, 2, 24, undefined],
    [1, 70, 6, 2, 64, undefined],
    [2, 37, 3, 3, 20, 8],
    [1, 130, 2, 1, 18, 33],
  ] as const
).map(([batch, tokens, heads, kvHeads, headDim, window]) => ({
  op: 'attentionGradient',
  name: `${batch} × ${tokens}, ${heads}/${kvHeads} heads of ${headDim}, window ${window ?? 'none'}`,
  run: async (duo, subject, oracle) => {
    const rows = batch * tokens;
    const [q, dy] = [await duo.input([rows, heads * headDim]), await duo.input([rows, heads * headDim])];
    const [k, v] = [await duo.input([rows, kvHeads * headDim]), await duo.input([rows, kvHeads * headDim])];
    const options = { batch, heads, kvHeads, headDim, window, scale: headDim ** -0.5 };
    const expected = await oracle.attentionGradient(q.oracle, k.oracle, v.oracle, options, dy.oracle);
    const actual = await subject.attentionGradient(q.subject, k.subject, v.subject, options, dy.subject);
    const u = LAMBDA * Math.sqrt(headDim + tokens + 10) * duo.allowance.roundoff;
    for (const name of ['q', 'k', 'v'] as const)
      await duo.close(actual[name], expected[name], (u * Math.sqrt(tokens) * 27) / 8, name);
  },
}));

/** [channels, cols, bits, group size]. */
const GRIDS: readonly (readonly [number, number, WeightBits, number])[] = [
  [172, 7, 4, 43],
  [172, 5, 3, 4],
  [384, 100, 2, 128],
  [352, 64, 4, 352],
];

/** Weights well inside the cells of a grid, some beyond its ends: rounding is not what is tested here. */
function gridInputs(duo: Duo, channels: number, cols: number, grid: GridSpec) {
  const groups = channels / grid.groupSize;
  const top = 2 ** grid.bits - 1;
  const scales = Float32Array.from({ length: groups * cols }, () => 0.01 + 0.05 * duo.rng.uniform());
  const zeros = Float32Array.from(
    { length: groups * cols },
    () => duo.rng.uniform() * 0.8 - 0.4 + duo.rng.int(0, top + 1),
  );
  const w = Float32Array.from({ length: channels * cols }, (_, at) => {
    const slot = Math.floor(at / cols / grid.groupSize) * cols + (at % cols);
    const code = duo.rng.int(-2, top + 3) - Math.round(zeros[slot]);
    return (code + 0.9 * (duo.rng.uniform() - 0.5)) * scales[slot];
  });
  return { scales, zeros, w, groups };
}

/** Tolerance: value = code·scale, two roundings: 2·u relative. */
const fakeQuantize: GradientCase[] = GRIDS.map(([channels, cols, bits, groupSize]) => ({
  op: 'fakeQuantize',
  name: `${channels} × ${cols}, ${bits} bits in groups of ${groupSize}`,
  run: async (duo, subject, oracle) => {
    const grid: GridSpec = { bits, groupSize };
    const host = gridInputs(duo, channels, cols, grid);
    const w = await duo.input([channels, cols], host.w);
    const scales = await duo.input([host.groups, cols], host.scales);
    const zeros = await duo.input([host.groups, cols], host.zeros);
    const expected = await oracle.fakeQuantize(w.oracle, scales.oracle, zeros.oracle, grid);
    const values = readF64(expected);
    const tolerance = (at: number): number => 2 * duo.allowance.roundoff * Math.abs(values[at]);
    await duo.close(await subject.fakeQuantize(w.subject, scales.subject, zeros.subject, grid), expected, tolerance);
  },
}));

/** Tolerance: dw exact; sums over a group of dy·(codes up to 2ᵇ): λ·√(g + 4)·u·√g·max|dy|·2ᵇ. */
const fakeQuantizeGradient: GradientCase[] = GRIDS.map(([channels, cols, bits, groupSize]) => ({
  op: 'fakeQuantizeGradient',
  name: `${channels} × ${cols}, ${bits} bits in groups of ${groupSize}`,
  run: async (duo, subject, oracle) => {
    const grid: GridSpec = { bits, groupSize };
    const host = gridInputs(duo, channels, cols, grid);
    const w = await duo.input([channels, cols], host.w);
    const dy = await duo.input([channels, cols]);
    const scales = await duo.input([host.groups, cols], host.scales);
    const zeros = await duo.input([host.groups, cols], host.zeros);
    const expected = await oracle.fakeQuantizeGradient(w.oracle, scales.oracle, zeros.oracle, grid, dy.oracle);
    const actual = await subject.fakeQuantizeGradient(w.subject, scales.subject, zeros.subject, grid, dy.subject);
    const u = LAMBDA * Math.sqrt(groupSize * (groupSize + 4)) * duo.allowance.roundoff;
    await duo.close(actual.w, expected.w, 0, 'w');
    await duo.close(actual.scales, expected.scales, u * 2 ** bits * 4, 'scales');
    await duo.close(actual.zeros, expected.zeros, u * maxAbs(host.scales) * 4, 'zeros');
  },
}));

/** Tolerance: one product; sums over a group: λ·√(g + 2)·u·√g·max|x·dy|, of normal values. */
const scaleGroups: GradientCase[] = GRIDS.flatMap(([channels, cols, , groupSize]): GradientCase[] => [
  {
    op: 'scaleGroups',
    name: `${channels} × ${cols}, groups of ${groupSize}`,
    run: async (duo, subject, oracle) => {
      const x = await duo.input([channels, cols]);
      const scales = await duo.input([channels / groupSize, cols]);
      const expected = await oracle.scaleGroups(x.oracle, scales.oracle, groupSize);
      const values = readF64(expected);
      const tolerance = (at: number): number => 2 * duo.allowance.roundoff * Math.abs(values[at]);
      await duo.close(await subject.scaleGroups(x.subject, scales.subject, groupSize), expected, tolerance);
    },
  },
  {
    op: 'scaleGroupsGradient',
    name: `${channels} × ${cols}, groups of ${groupSize}`,
    run: async (duo, subject, oracle) => {
      const [x, dy] = [await duo.input([channels, cols]), await duo.input([channels, cols])];
      const expected = await oracle.scaleGroupsGradient(x.oracle, groupSize, dy.oracle);
      const u = LAMBDA * Math.sqrt(groupSize * (groupSize + 2)) * duo.allowance.roundoff;
      await duo.close(await subject.scaleGroupsGradient(x.subject, groupSize, dy.subject), expected, u * 4);
    },
  },
]);

/** Tolerance: 4·u relative on a slope, the same on the mean. Differences stay away from the kink at |d| = β. */
const elementLoss: GradientCase[] = (['mse', 'smooth-l1'] as const).flatMap((kind) =>
  [7, 4096, 10_000].map((count): GradientCase => ({
    op: 'elementLoss',
    name: `${kind}, ${count} elements`,
    run: async (duo, subject, oracle) => {
      const loss = kind === 'mse' ? { kind } : { kind, beta: 0.5 };
      const target = await duo.input([1, count]);
      const prediction = await duo.input(
        [1, count],
        target.host.map((t) => {
          const d = duo.rng.normal();
          return t + (Math.abs(Math.abs(d) - 0.5) < 1e-3 ? 0.2 : d);
        }),
      );
      const expected = await oracle.elementLoss(prediction.oracle, target.oracle, loss);
      const actual = await subject.elementLoss(prediction.subject, target.subject, loss);
      await duo.close(actual.loss, expected.loss, 8 * duo.allowance.roundoff * readF64(expected.loss)[0], 'loss');
      await duo.close(actual.gradient, expected.gradient, (16 * duo.allowance.roundoff) / count);
    },
  })),
);

const LOGITS = [
  [1, 5],
  [3, 43],
  [17, 1003],
] as const;

/** Tolerance: probabilities within λ·√n·u (exp within 2e-7 of its value, arguments within u of theirs). */
const crossEntropy: GradientCase[] = LOGITS.map(([rows, n]) => ({
  op: 'crossEntropy',
  name: `${rows} × ${n}`,
  run: async (duo, subject, oracle) => {
    const logits = await duo.input(
      [rows, n],
      duo.normals(rows * n).map((v) => 3 * v),
    );
    const targets = Int32Array.from({ length: rows }, () => duo.rng.int(0, n));
    const expected = await oracle.crossEntropy(logits.oracle, targets);
    const actual = await subject.crossEntropy(logits.subject, targets);
    const u = LAMBDA * Math.sqrt(n + 8) * duo.allowance.roundoff;
    await duo.close(actual.loss, expected.loss, 4 * u, 'loss');
    await duo.close(actual.gradient, expected.gradient, (4 * u) / rows);
  },
}));

const klDivergence: GradientCase[] = LOGITS.map(([rows, n]) => ({
  op: 'klDivergence',
  name: `${rows} × ${n}`,
  run: async (duo, subject, oracle) => {
    const reference = await duo.input(
      [rows, n],
      duo.normals(rows * n).map((v) => 3 * v),
    );
    const logits = await duo.input(
      [rows, n],
      reference.host.map((v) => v + 0.3 * duo.rng.normal()),
    );
    const expected = await oracle.klDivergence(logits.oracle, reference.oracle);
    const actual = await subject.klDivergence(logits.subject, reference.subject);
    const u = LAMBDA * Math.sqrt(n + 8) * duo.allowance.roundoff;
    await duo.close(actual.loss, expected.loss, 4 * u, 'loss');
    await duo.close(actual.gradient, expected.gradient, (4 * u) / rows);
  },
}));

/** Tolerance: moments carry 3 roundings, the parameter its own and those of a step of about the learning rate. */
const adamW: GradientCase[] = [1, 5, 20_000].map((count) => ({
  op: 'adamW',
  name: `${count} elements, three steps`,
  run: async (duo, subject, oracle) => {
    // Updated in place, so these are no inputs that must stay as they are.
    const make = async (values: Float32Array) => ({
      subject: await duo.subject.upload({ dtype: 'f32', shape: [count], data: values.slice() }),
      oracle: await duo.oracle.upload({ dtype: 'f32', shape: [count], data: values.slice() }),
    });
    const p = await make(duo.normals(count));
    const [m, v] = [await make(new Float32Array(count)), await make(new Float32Array(count))];
    const range = count === 5 ? { minimum: -0.5, maximum: 0.5 } : undefined;
    const settings = { learningRate: 0.05, beta1: 0.9, beta2: 0.95, eps: 1e-10, weightDecay: 0.01, range };
    for (let step = 1; step <= 3; step++) {
      const g = await duo.input([count]);
      await oracle.adamW(p.oracle, g.oracle, m.oracle, v.oracle, { ...settings, step });
      await subject.adamW(p.subject, g.subject, m.subject, v.subject, { ...settings, step });
    }
    const u = duo.allowance.roundoff;
    const size = maxAbs(readF64(p.oracle));
    await duo.close(m.subject, m.oracle, 8 * u * 4, 'first moment');
    await duo.close(v.subject, v.oracle, 8 * u * 16, 'second moment');
    await duo.close(p.subject, p.oracle, u * (4 * size + 3), 'parameter');
  },
}));

/** All cases. */
export const gradientCases: readonly GradientCase[] = [
  splitColumns,
  rmsNorm,
  transformOf,
  rotate,
  splitHeads,
  attention,
  siluMul,
  fakeQuantize,
  fakeQuantizeGradient,
  scaleGroups,
  elementLoss,
  crossEntropy,
  klDivergence,
  adamW,
].flat();

/** Declares a vitest suite that runs every gradient case on one backend. */
export function runGradientConformance(
  name: string,
  openBackend: () => Promise<Backend>,
  { skip = {}, ...allowance }: ConformanceOptions = {},
): void {
  describe(`gradient conformance of ${name}`, () => {
    const oracle = createReferenceBackend();
    let subject: Backend;
    beforeAll(async () => {
      subject = await openBackend();
    });
    afterAll(async () => {
      await subject?.dispose();
    });
    for (const op of GRADIENT_OPS) {
      describe(op, () => {
        for (const test of gradientCases.filter((c) => c.op === op)) {
          const reason = skip[op] ?? skip[`${op}: ${test.name}`];
          if (reason !== undefined) it.skip(`${test.name} (${reason})`, () => undefined);
          else
            it(test.name, async () => {
              const duo = new Duo(subject, oracle, { ...STRICT, ...allowance }, `${test.op} ${test.name}`);
              await test.run(duo, requireGradients(subject), requireGradients(oracle));
              await duo.finish();
            });
        }
      });
    }
  });
}
