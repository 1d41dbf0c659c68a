// The tape against PyTorch: gradients of a block, of a transformed weight, of a free grid, of logits, and AdamW's steps, in
// float64 on the oracle and in f32 on the CPU and WebGPU backends. The numbers are made by test/fixtures/autograd/make.py.
import path from 'node:path';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { Optimizer, parameter, Tape, type Variable } from '../../src/autograd/index.js';
import { openBackend } from '../../src/backends/registry.js';
import { hostTensor, type HostTensor } from '../../src/core/tensor.js';
import { SafetensorsFile } from '../../src/formats/safetensors.js';
import { openFile } from '../../src/formats/source.node.js';
import type { BlockFrame } from '../../src/models/block.js';
import type { Backend, PairwiseTransform, Tensor } from '../../src/ops/backend.js';
import { readF64 } from '../../src/ops/reference/backend.js';
import { blockForward, byWeights } from '../../src/quant/objectives/block.js';
import { openTestWebGpu, webgpuMissing } from '../support/webgpu.js';

const FIXTURE = path.join(import.meta.dirname, '../fixtures/autograd/expected.safetensors');
/** As in make.py. */
const SHAPE = { batch: 2, tokens: 9, hidden: 24, heads: 4, kvHeads: 2, headDim: 10, eps: 1e-6, theta: 100 };
const GRID = { bits: 4, groupSize: 16 } as const;
const LAYOUT = { channels: 32, groupSize: 16, krot: 3 };

const fixture = new Map<string, HostTensor>();
const values = (name: string): Float64Array => {
  const tensor = fixture.get(name);
  if (!tensor) throw new Error(`the fixture has no ${name}`);
  return Float64Array.from(tensor.data as ArrayLike<number>);
};
const shapeOf = (name: string): readonly number[] => fixture.get(name)?.shape ?? [];

beforeAll(async () => {
  const file = await SafetensorsFile.open(await openFile(FIXTURE));
  for (const name of file.tensors.keys()) fixture.set(name, await file.read(name));
  await file.close();
});

describe.each([
  // Relative to the largest element: rounding of f64, and of f32 through some hundred operations.
  ['reference', 1e-9],
  ['cpu', 2e-4],
  ...(webgpuMissing === undefined ? ([['webgpu', 2e-4]] as const) : []),
] as const)('%s against PyTorch', (name, tolerance) => {
  let backend: Backend;
  beforeAll(async () => {
    backend = name === 'webgpu' ? await openTestWebGpu() : await openBackend(name);
  });
  afterAll(async () => backend.dispose());

  const upload = (key: string, shape = shapeOf(key)): Promise<Tensor> =>
    Promise.resolve(backend.upload(hostTensor('f64', shape, values(key))));
  const leaf = async (key: string, shape?: readonly number[]): Promise<Variable> => parameter(await upload(key, shape));
  const read = async (tensor: Tensor): Promise<ArrayLike<number>> =>
    name === 'reference' ? readF64(tensor) : backend.download(tensor);
  const close = async (tensor: Tensor | undefined, key: string, factor = 1): Promise<void> => {
    if (!tensor) throw new Error(`${key}: nothing came back`);
    const [found, expected] = [await read(tensor), values(key)];
    expect(found.length).toBe(expected.length);
    const size = Math.max(...expected.map(Math.abs));
    for (const [i, value] of expected.entries())
      expect(Math.abs(found[i] - value), `${key}[${i}]: ${found[i]}, PyTorch ${value}`).toBeLessThan(
        factor * tolerance * size,
      );
  };

  const loadRope = async () => {
    const { tokens, headDim, theta } = SHAPE;
    const half = headDim / 2;
    const angle = (at: number): number => Math.floor(at / half) * theta ** (-((at % half) * 2) / headDim);
    const table = (of: (angle: number) => number): Float32Array =>
      Float32Array.from({ length: tokens * half }, (_, at) => of(angle(at)));
    return backend.loadRope(table(Math.cos), table(Math.sin), headDim);
  };

  it('a decoder block under smooth-L1', async () => {
    const { batch, tokens, hidden, heads, kvHeads, headDim, eps } = SHAPE;
    const rope = await loadRope();
    const x = await leaf('in.block.x', [batch * tokens, hidden]);
    const weights = {
      qkv: await leaf('in.block.qkv'),
      o: await leaf('in.block.o'),
      gateUp: await leaf('in.block.gateUp'),
      down: await leaf('in.block.down'),
    };
    const norms = {
      input: await upload('in.block.inputNorm'),
      postAttention: await upload('in.block.postNorm'),
      q: await upload('in.block.qNorm'),
      k: await upload('in.block.kNorm'),
    };
    const config = { heads, kvHeads, headDim, rmsNormEps: eps, windows: [undefined] };
    const frame = { backend, config, layer: 0, norms } as unknown as BlockFrame;
    const tape = new Tape(backend);
    const y = await blockForward(tape, x, { frame, biases: {} }, byWeights(tape, weights), { batch, rope });
    const target = await upload('in.block.target', [batch * tokens, hidden]);
    const loss = await tape.elementLoss(y, target, { kind: 'smooth-l1', beta: 0.5 });
    expect(await loss.read()).toBeCloseTo(values('out.block.loss')[0], name === 'reference' ? 6 : 5);
    await loss.backward();
    await close(x.gradient, 'out.block.x');
    for (const [group, weight] of Object.entries(weights)) await close(weight.gradient, `out.block.${group}`);
    tape.free();
  });

  it('the norms of a block: RMSNorm and those of heads', async () => {
    const { batch, tokens, hidden, heads, kvHeads, headDim, eps } = SHAPE;
    const rope = await loadRope();
    const norms = {
      inputNorm: await leaf('in.block.inputNorm'),
      postNorm: await leaf('in.block.postNorm'),
      qNorm: await leaf('in.block.qNorm'),
      kNorm: await leaf('in.block.kNorm'),
    };
    const x = await leaf('in.block.x', [batch * tokens, hidden]);
    const [qkv, o] = [await leaf('in.block.qkv'), await leaf('in.block.o')];
    const [gateUp, down] = [await leaf('in.block.gateUp'), await leaf('in.block.down')];
    const tape = new Tape(backend);
    const shape = { heads, kvHeads, headDim };
    const inputs = await tape.matmul(await tape.rmsNorm(x, norms.inputNorm, eps), qkv);
    const { qNorm, kNorm } = norms;
    const split = await tape.splitHeads(inputs, { ...shape, rope, batch, start: 0, eps }, { q: qNorm, k: kNorm });
    const attended = await tape.attention(split.q, split.k, split.v, { ...shape, batch, scale: headDim ** -0.5 });
    const middle = await tape.add(x, await tape.matmul(attended, o));
    const between = await tape.matmul(await tape.rmsNorm(middle, norms.postNorm, eps), gateUp);
    const y = await tape.add(middle, await tape.matmul(await tape.siluMul(between), down));
    const target = await upload('in.block.target', [batch * tokens, hidden]);
    const loss = await tape.elementLoss(y, target, { kind: 'smooth-l1', beta: 0.5 });
    await loss.backward();
    for (const [norm, weight] of Object.entries(norms)) await close(weight.gradient, `out.block.${norm}`);
    tape.free();
  });

  const transform = (): PairwiseTransform => ({
    ...LAYOUT,
    pairs: Int16Array.from(values('in.stage1.pairs')),
    theta: Float32Array.from(values('in.stage2.theta')),
    channelScales: Float32Array.from(values('in.stage2.channelScales')),
  });

  it('stage 1: angles and scales through T⁻¹(Q(T(W)))', async () => {
    const { pairs } = transform();
    const weight = await upload('in.stage1.weight');
    const objective = await backend.createObjective(weight, { ...LAYOUT, pairs }, GRID);
    const [theta, scales] = [await leaf('in.stage1.theta'), await leaf('in.stage1.scales')];
    const tape = new Tape(backend);
    const w = await tape.transformedWeight(objective, theta, scales);
    await close(w.value, 'out.stage1.weight');
    const y = await tape.matmul(parameter(await upload('in.stage1.x')), w);
    const loss = await tape.elementLoss(y, await upload('in.stage1.target'), { kind: 'mse' });
    await loss.backward();
    // Gradients of transforms come back to the tape in f32.
    const factor = name === 'reference' ? 1e3 : 1;
    await close(theta.gradient, 'out.stage1.theta', factor);
    await close(scales.gradient, 'out.stage1.scales', factor);
    objective.dispose();
  });

  it('stage 2: weights, scales and zero points, and three steps of AdamW on a cosine', async () => {
    const names = ['weight', 'gridScales', 'zeros'] as const;
    const [weight, scales, zeros] = await Promise.all(names.map((n) => leaf(`in.stage2.${n}`)));
    const x = parameter(await upload('in.stage1.x'));
    const target = await upload('in.stage1.target');
    const optimizer = new Optimizer(
      backend,
      [
        { parameters: [weight], learningRate: 1e-3 },
        { parameters: [scales, zeros], learningRate: 1e-4 },
      ],
      { steps: 3 },
    );
    for (let step = 0; step < 3; step++) {
      const tape = new Tape(backend);
      const turned = await tape.transformChannels(weight, transform(), 'forward');
      const w = await tape.transformChannels(
        await tape.fakeQuantize(turned, scales, zeros, GRID),
        transform(),
        'inverse',
      );
      const loss = await tape.elementLoss(await tape.matmul(x, w), target, { kind: 'smooth-l1', beta: 1 });
      if (step === 0) expect(await loss.read()).toBeCloseTo(values('out.stage2.loss')[0], name === 'reference' ? 6 : 5);
      await loss.backward();
      if (step === 0)
        for (const [i, variable] of [weight, scales, zeros].entries())
          await close(variable.gradient, `out.stage2.${names[i]}`, name === 'reference' ? 1e3 : 1);
      tape.free();
      await optimizer.step();
    }
    // The first steps of Adam are a sign: where a gradient is next to nothing, f32 may turn it around.
    const factor = name === 'reference' ? 1e3 : 20;
    for (const [i, variable] of [weight, scales, zeros].entries())
      await close(variable.value, `out.stage2.${names[i]}After`, factor);
    optimizer.dispose();
  });

  it('cross-entropy and KL of logits', async () => {
    const targets = Int32Array.from(values('in.head.targets'));
    const reference = await upload('in.head.reference');
    for (const [key, gradient] of [
      ['crossEntropy', 'crossEntropyGradient'],
      ['kl', 'klGradient'],
    ] as const) {
      const logits = await leaf('in.head.logits');
      const tape = new Tape(backend);
      const loss = await (key === 'kl' ? tape.klDivergence(logits, reference) : tape.crossEntropy(logits, targets));
      expect(await loss.read()).toBeCloseTo(values(`out.head.${key}`)[0], name === 'reference' ? 6 : 5);
      await loss.backward();
      await close(logits.gradient, `out.head.${gradient}`);
    }
  });
});
