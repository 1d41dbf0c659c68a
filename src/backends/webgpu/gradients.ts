// The gradient ops on WebGPU: training through a decoder block without reading anything back; losses are tensors, and the
// optimizer's step happens where the parameters are.
import { ensure, GyreError } from '../../core/errors.js';
import type { GridSpec, PairwiseTransform, Tensor, TransformHandle } from '../../ops/backend.js';
import type {
  AdamWStep,
  AttentionGradientOptions,
  ElementLoss,
  GradientOps,
  LossGradient,
  SplitHeadsGradientOptions,
} from '../../ops/gradients.js';
import { attentionGradient } from './attention-products.js';
import { GpuRope } from './kv-cache.js';
import type { GpuDevice } from './device.js';
import {
  PARTS,
  rmsNormGradientKernel,
  siluMulGradientKernel,
  splitHeadsGradientKernel,
  sumColumnsKernel,
  takeColumnsKernel,
} from './kernels/backward.js';
import {
  freeGridGradientKernel,
  freeGridKernel,
  scaleGroupsGradientKernel,
  scaleGroupsKernel,
} from './kernels/free-grid.js';
import { GRID_COLUMNS } from './kernels/grid.js';
import { adamWKernel, elementLossKernel, finishLossKernel, LOSS_GROUPS, logitLossKernel } from './kernels/loss.js';
import { rotationGradientKernel, rotationGradientMemory } from './kernels/rotation-gradient.js';
import { GpuTransform } from './rotation.js';
import { elementGroups, makeTensor, own, spread, type GpuTensor } from './tensor.js';

/** Workgroup memory that kernels count on, so that several workgroups share a core. */
const TILE_BYTES = 16384;
/** The largest f32. */
const GREATEST = 3.4028234663852886e38;

/** See {@link GradientOps}. */
export class WebGpuGradients implements GradientOps {
  readonly #gpu: GpuDevice;

  constructor(gpu: GpuDevice) {
    this.#gpu = gpu;
  }

  splitColumns(x: Tensor, widths: readonly number[]): Tensor[] {
    const source = own(x);
    const { rows, cols: width } = source.matrix;
    const total = widths.reduce((a, b) => a + b, 0);
    ensure(total === width, 'tensor-shape', () => `splitColumns: widths of ${total} for ${width} columns`);
    let begin = 0;
    return widths.map((cols) => {
      const out = makeTensor(this.#gpu, [rows, cols]);
      const count = rows * cols;
      this.#gpu.dispatch(takeColumnsKernel, { x: source, out }, { count, cols, begin, width }, elementGroups(count));
      begin += cols;
      return out;
    });
  }

  rmsNormGradient(x: Tensor, weight: Tensor, eps: number, dy: Tensor): { x: Tensor; weight: Tensor } {
    const gpu = this.#gpu;
    const [input, factors, slope] = [x, weight, dy].map(own);
    const { rows, cols } = input.matrix;
    ensure(
      factors.elements === cols && slope.elements === input.elements,
      'tensor-shape',
      () => `a norm of ${factors.elements} channels with a gradient of [${dy.shape.join(', ')}] was given ${cols}`,
    );
    const out = { x: makeTensor(gpu, x.shape), weight: makeTensor(gpu, weight.shape) };
    const workgroups = Math.min(rows, PARTS);
    const parts = gpu.buffer(4 * workgroups * cols, 'partial sums');
    gpu.dispatch(
      rmsNormGradientKernel,
      { x: input, weight: factors, dy: slope, dx: out.x, parts },
      { rows, cols, eps },
      [workgroups],
    );
    this.#sumColumns(parts, workgroups, cols, out.weight);
    gpu.release(parts);
    return out;
  }

  transformOf(
    layout: Pick<PairwiseTransform, 'channels' | 'groupSize' | 'krot' | 'pairs'>,
    theta: Tensor,
    channelScales: Tensor,
  ): TransformHandle {
    return new GpuTransform(this.#gpu, layout, { theta: own(theta), channelScales: own(channelScales) });
  }

  rotateGradient(x: Tensor, handle: TransformHandle, dy: Tensor): { x: Tensor; theta: Tensor; channelScales: Tensor } {
    const gpu = this.#gpu;
    if (!(handle instanceof GpuTransform)) throw foreign();
    const { channels, krot, scales, pairs, turns } = handle;
    const [input, slope] = [own(x), own(dy)];
    const { rows, cols } = input.matrix;
    ensure(
      cols === channels && slope.elements === input.elements,
      'tensor-shape',
      () => `a transform of ${channels} channels was given ${cols}`,
    );
    const groupSize = krot > 0 ? handle.groupSize : handyGroup(channels);
    let together = 16;
    while (together > 1 && rotationGradientMemory(groupSize, together) > TILE_BYTES) together /= 2;
    if (rotationGradientMemory(groupSize, together) > gpu.limits.maxComputeWorkgroupStorageSize)
      throw new GyreError(
        'limit-exceeded',
        `rotation groups of ${groupSize} channels do not fit the GPU's gradient kernel`,
        {
          remedy: 'use a smaller group size',
        },
      );
    const lanes = Math.min(together, 4);
    const stretches = Math.min(64, Math.ceil(rows / together));
    const angles = (krot * channels) / 2;
    const out = {
      x: makeTensor(gpu, x.shape),
      theta: makeTensor(gpu, [krot, channels / 2]),
      channelScales: makeTensor(gpu, [channels]),
    };
    const count = angles + channels;
    const parts = gpu.buffer(4 * stretches * lanes * count, 'partial gradients');
    gpu.dispatch(
      rotationGradientKernel(groupSize, together, lanes),
      { x: input, dy: slope, scales, pairs, turns, dx: out.x, parts },
      { rows, channels, krot },
      [stretches, channels / groupSize],
    );
    const sums = makeTensor(gpu, [count]);
    this.#sumColumns(parts, stretches * lanes, count, sums);
    if (angles > 0) gpu.copy(sums.buffer, 0, out.theta.buffer, 0, 4 * angles);
    gpu.copy(sums.buffer, 4 * angles, out.channelScales.buffer, 0, 4 * channels);
    gpu.release(sums.buffer);
    gpu.release(parts);
    return out;
  }

  splitHeadsGradient(
    qkv: Tensor,
    options: SplitHeadsGradientOptions,
    dy: { readonly q: Tensor; readonly k: Tensor; readonly v: Tensor },
  ): { qkv: Tensor; qNorm?: Tensor; kNorm?: Tensor } {
    const gpu = this.#gpu;
    const { heads, kvHeads, headDim, batch, start, rope, qNorm, kNorm, eps } = options;
    if (!(rope instanceof GpuRope)) throw foreign();
    ensure(!options.headTransform, 'unsupported', 'heads are not turned in training');
    const input = own(qkv);
    const { rows, cols } = input.matrix;
    const [dq, dk, dv] = [dy.q, dy.k, dy.v].map(own);
    const tokens = rows / batch;
    ensure(
      cols === (heads + 2 * kvHeads) * headDim &&
        Number.isInteger(tokens) &&
        dq.elements === rows * heads * headDim &&
        dk.elements === rows * kvHeads * headDim &&
        dv.elements === dk.elements,
      'tensor-shape',
      () => `[${rows}, ${cols}] and its gradients are not ${heads} + 2 · ${kvHeads} heads of ${headDim}`,
    );
    ensure(
      start + tokens <= rope.positions,
      'context-length',
      () => `positions up to ${start + tokens} asked of RoPE tables for ${rope.positions}`,
    );
    const out = makeTensor(gpu, qkv.shape);
    const gradient = (
      dy: GpuTensor,
      first: number,
      count: number,
      turned: boolean,
      norm?: Tensor,
    ): Tensor | undefined => {
      const items = rows * count;
      // Eight heads to a workgroup at least: its sums are worth as much as a head.
      const workgroups = Math.min(4096, Math.max(1, Math.ceil(items / 8)));
      const parts = norm && gpu.buffer(4 * workgroups * headDim, 'partial sums');
      gpu.dispatch(
        splitHeadsGradientKernel({ headDim, rotaryDim: turned ? rope.rotaryDim : 0, norm: norm !== undefined }),
        // What a variant does without is not bound.
        { qkv: input, turns: rope.turns, weight: norm ? own(norm) : input, dy, out, parts: parts ?? out },
        { items, heads: count, first, width: heads + 2 * kvHeads, tokens, start, eps },
        [workgroups],
      );
      if (!parts) return undefined;
      const weight = makeTensor(gpu, [headDim]);
      this.#sumColumns(parts, workgroups, headDim, weight);
      gpu.release(parts);
      return weight;
    };
    const dqNorm = gradient(dq, 0, heads, true, qNorm);
    const dkNorm = gradient(dk, heads, kvHeads, true, kNorm);
    gradient(dv, heads + kvHeads, kvHeads, false);
    return { qkv: out, ...(dqNorm && { qNorm: dqNorm }), ...(dkNorm && { kNorm: dkNorm }) };
  }

  attentionGradient(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    options: AttentionGradientOptions,
    dy: Tensor,
  ): { q: Tensor; k: Tensor; v: Tensor } {
    return attentionGradient(this.#gpu, own(q), k, v, options, dy);
  }

  siluMulGradient(gateUp: Tensor, dy: Tensor): Tensor {
    const [x, slope] = [own(gateUp), own(dy)];
    const { rows, cols: both } = x.matrix;
    const cols = both / 2;
    const count = rows * cols;
    ensure(
      slope.elements === count,
      'tensor-shape',
      () => `a gradient of [${dy.shape.join(', ')}] for ${cols} columns`,
    );
    const out = makeTensor(this.#gpu, gateUp.shape);
    this.#gpu.dispatch(siluMulGradientKernel, { gateUp: x, dy: slope, out }, { count, cols }, elementGroups(count));
    return out;
  }

  fakeQuantize(w: Tensor, scales: Tensor, zeros: Tensor, grid: GridSpec): Tensor {
    const source = own(w);
    const { cols, groupSize, levels } = gridOf(source, grid, [scales, zeros]);
    const out = makeTensor(this.#gpu, w.shape);
    const count = source.elements;
    this.#gpu.dispatch(
      freeGridKernel,
      { w: source, scales: own(scales), zeros: own(zeros), values: out },
      { count, cols, groupSize, levels },
      elementGroups(count),
    );
    return out;
  }

  fakeQuantizeGradient(
    w: Tensor,
    scales: Tensor,
    zeros: Tensor,
    grid: GridSpec,
    dy: Tensor,
  ): { w: Tensor; scales: Tensor; zeros: Tensor } {
    const [source, slope] = [own(w), own(dy)];
    const { rows, cols, groupSize, levels } = gridOf(source, grid, [scales, zeros]);
    ensure(slope.elements === source.elements, 'tensor-shape', () => `a gradient of [${dy.shape.join(', ')}]`);
    const make = (like: Tensor): GpuTensor => makeTensor(this.#gpu, like.shape);
    const out = { w: make(w), scales: make(scales), zeros: make(zeros) };
    this.#gpu.dispatch(
      freeGridGradientKernel,
      {
        w: source,
        scales: own(scales),
        zeros: own(zeros),
        dy: slope,
        dw: out.w,
        dScales: out.scales,
        dZeros: out.zeros,
      },
      { cols, groupSize, levels },
      [Math.ceil(cols / GRID_COLUMNS), rows / groupSize],
    );
    return out;
  }

  scaleGroups(x: Tensor, scales: Tensor, groupSize: number): Tensor {
    const source = own(x);
    const { cols } = gridOf(source, { bits: 4, groupSize }, [scales]);
    const out = makeTensor(this.#gpu, x.shape);
    const count = source.elements;
    this.#gpu.dispatch(
      scaleGroupsKernel,
      { x: source, scales: own(scales), out },
      { count, cols, groupSize },
      elementGroups(count),
    );
    return out;
  }

  scaleGroupsGradient(x: Tensor, groupSize: number, dy: Tensor): Tensor {
    const [source, slope] = [own(x), own(dy)];
    const { rows, cols } = gridOf(source, { bits: 4, groupSize }, []);
    ensure(slope.elements === source.elements, 'tensor-shape', () => `a gradient of [${dy.shape.join(', ')}]`);
    const out = makeTensor(this.#gpu, [rows / groupSize, cols]);
    this.#gpu.dispatch(scaleGroupsGradientKernel, { x: source, dy: slope, out }, { cols, groupSize }, [
      Math.ceil(cols / GRID_COLUMNS),
      rows / groupSize,
    ]);
    return out;
  }

  elementLoss(prediction: Tensor, target: Tensor, loss: ElementLoss): LossGradient {
    const gpu = this.#gpu;
    const [values, goal] = [own(prediction), own(target)];
    const count = values.elements;
    ensure(
      goal.elements === count,
      'tensor-shape',
      () => `a target of [${target.shape.join(', ')}] for ${count} values`,
    );
    const gradient = makeTensor(gpu, prediction.shape);
    const groups = Math.min(LOSS_GROUPS, Math.ceil(count / 1024));
    const parts = gpu.buffer(8 * groups, 'partial sums');
    gpu.dispatch(
      elementLossKernel(loss.kind),
      { prediction: values, goal, gradient, parts },
      { count, share: 1 / count, beta: loss.kind === 'mse' ? 1 : loss.beta, one: 1 },
      [groups],
    );
    return { loss: this.#finishLoss(parts, groups, 1 / count), gradient };
  }

  crossEntropy(logits: Tensor, targets: Int32Array): LossGradient {
    const { rows, cols } = own(logits).matrix;
    ensure(targets.length === rows, 'tensor-shape', () => `${targets.length} targets for ${rows} rows of logits`);
    for (const target of targets)
      ensure(target >= 0 && target < cols, 'usage', () => `target ${target} is outside ${cols} classes`);
    const ids = this.#gpu.buffer(targets.byteLength);
    this.#gpu.upload(ids, targets);
    const found = this.#logitLoss(own(logits), 'class', ids);
    this.#gpu.release(ids);
    return found;
  }

  klDivergence(logits: Tensor, reference: Tensor): LossGradient {
    const [values, goal] = [own(logits), own(reference)];
    ensure(
      goal.elements === values.elements,
      'tensor-shape',
      () => `reference logits [${goal.shape.join(', ')}] for [${values.shape.join(', ')}]`,
    );
    return this.#logitLoss(values, 'reference', goal);
  }

  adamW(parameter: Tensor, gradient: Tensor, first: Tensor, second: Tensor, step: AdamWStep): void {
    const [p, g, m, v] = [parameter, gradient, first, second].map(own);
    const count = p.elements;
    ensure(
      [g, m, v].every((tensor) => tensor.elements === count),
      'tensor-shape',
      () => `a gradient or moment of another size than the parameter's [${p.shape.join(', ')}]`,
    );
    const { beta1, beta2, range } = step;
    this.#gpu.dispatch(
      adamWKernel,
      { parameter: p, gradient: g, first: m, second: v },
      {
        count,
        rate: step.learningRate,
        decay: step.weightDecay,
        eps: step.eps,
        keep1: beta1,
        take1: 1 - beta1,
        correct1: 1 / (1 - beta1 ** step.step),
        keep2: beta2,
        take2: 1 - beta2,
        correct2: 1 / (1 - beta2 ** step.step),
        minimum: range?.minimum ?? -GREATEST,
        maximum: range?.maximum ?? GREATEST,
      },
      elementGroups(count),
    );
  }

  #logitLoss(logits: GpuTensor, kind: 'class' | 'reference', goal: GPUBuffer | GpuTensor): LossGradient {
    const gpu = this.#gpu;
    const { rows, cols: classes } = logits.matrix;
    const gradient = makeTensor(gpu, logits.shape);
    const parts = gpu.buffer(8 * rows, 'losses of rows');
    const params = { rows, classes, share: 1 / rows };
    gpu.dispatch(logitLossKernel(kind), { logits, goal, gradient, parts }, params, spread(rows));
    return { loss: this.#finishLoss(parts, rows, 1 / rows), gradient };
  }

  /** factor · Σ parts, as a tensor [1]; takes the parts over. */
  #finishLoss(parts: GPUBuffer, count: number, factor: number): GpuTensor {
    const loss = makeTensor(this.#gpu, [1]);
    this.#gpu.dispatch(finishLossKernel, { parts, loss }, { count, factor, one: 1 }, [1]);
    this.#gpu.release(parts);
    return loss;
  }

  /** out [count] = Σ over parts [parts, count], from element `first` on. */
  #sumColumns(x: GPUBuffer, parts: number, count: number, out: GpuTensor, first = 0): void {
    this.#gpu.dispatch(sumColumnsKernel, { x, out }, { count, parts, first }, [Math.ceil(count / 16)]);
  }
}

/** Channels worked on together where nothing is rotated. */
function handyGroup(channels: number): number {
  for (const size of [128, 64, 32, 16, 8, 4, 2]) if (channels % size === 0) return size;
  return 1;
}

/** Checks a grid and its tensors against w [rows, cols]. */
function gridOf(
  w: GpuTensor,
  { bits, groupSize }: GridSpec,
  grids: readonly Tensor[],
): { rows: number; cols: number; groupSize: number; levels: number } {
  const { rows, cols } = w.matrix;
  ensure(rows % groupSize === 0, 'tensor-shape', () => `group size ${groupSize} does not divide ${rows} channels`);
  for (const part of grids)
    ensure(
      own(part).elements === (rows / groupSize) * cols,
      'tensor-shape',
      () => `scales or zero points [${part.shape.join(', ')}] for ${rows / groupSize} groups of ${cols} columns`,
    );
  return { rows, cols, groupSize, levels: 2 ** bits - 1 };
}

function foreign(): GyreError {
  return new GyreError('backend', 'a handle of another backend was given to the WebGPU backend');
}
