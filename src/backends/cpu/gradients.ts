// The gradient ops of the CPU backend: our WebAssembly kernels; products are the matmul of the quantization ops.
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
import {
  adamW,
  attentionGradient,
  elementLoss,
  freeGrid,
  logitLoss,
  rmsNormGradient,
  RopeTable,
  rotateGradient,
  RowTransform,
  scaleGroups,
  siluMulGradient,
  splitHeadsGradient,
  sumGroups,
  type KernelPool,
} from './kernels.js';
import { own, type TensorPool } from './tensor.js';

/** See {@link GradientOps}. */
export class CpuGradients implements GradientOps {
  readonly #pool: KernelPool;
  readonly #tensors: TensorPool;

  constructor(pool: KernelPool, tensors: TensorPool) {
    this.#pool = pool;
    this.#tensors = tensors;
  }

  splitColumns(x: Tensor, widths: readonly number[]): Tensor[] {
    const { data, rows, cols } = own(x).matrix;
    const total = widths.reduce((a, b) => a + b, 0);
    ensure(total === cols, 'tensor-shape', () => `splitColumns: widths of ${total} for ${cols} columns`);
    let begin = 0;
    return widths.map((width) => {
      const out = this.#tensors.make([rows, width]);
      for (let r = 0; r < rows; r++) out.data.set(data.subarray(r * cols + begin, r * cols + begin + width), r * width);
      begin += width;
      return out;
    });
  }

  rmsNormGradient(x: Tensor, weight: Tensor, eps: number, dy: Tensor): { x: Tensor; weight: Tensor } {
    const out = { x: this.#tensors.make(x.shape), weight: this.#tensors.make(weight.shape) };
    rmsNormGradient(this.#pool, own(x).data, own(weight).data, eps, own(dy).data, out.x.data, out.weight.data);
    return out;
  }

  transformOf(
    layout: Pick<PairwiseTransform, 'channels' | 'groupSize' | 'krot' | 'pairs'>,
    theta: Tensor,
    channelScales: Tensor,
  ): TransformHandle {
    // Copies: tensors may change while the handle lives.
    return new RowTransform(this.#pool, layout, own(theta).data.slice(), own(channelScales).data.slice());
  }

  rotateGradient(
    x: Tensor,
    transform: TransformHandle,
    dy: Tensor,
  ): { x: Tensor; theta: Tensor; channelScales: Tensor } {
    if (!(transform instanceof RowTransform)) throw foreign();
    const { channels, krot } = transform.resident.spec;
    const { data, cols } = own(x).matrix;
    ensure(cols === channels, 'tensor-shape', () => `a transform of ${channels} channels on ${cols} columns`);
    const out = {
      x: this.#tensors.make(x.shape),
      theta: this.#tensors.make([krot, channels / 2]),
      channelScales: this.#tensors.make([channels]),
    };
    rotateGradient(this.#pool, transform, data, own(dy).data, out.x.data, out.theta.data, out.channelScales.data);
    return out;
  }

  splitHeadsGradient(
    qkv: Tensor,
    options: SplitHeadsGradientOptions,
    dy: { readonly q: Tensor; readonly k: Tensor; readonly v: Tensor },
  ): { qkv: Tensor; qNorm?: Tensor; kNorm?: Tensor } {
    const { rope, headDim } = options;
    if (!(rope instanceof RopeTable)) throw foreign();
    const out = this.#tensors.make(qkv.shape);
    const sums = splitHeadsGradient(this.#pool, {
      ...options,
      rope,
      qkv: own(qkv).data,
      dq: own(dy.q).data,
      dk: own(dy.k).data,
      dv: own(dy.v).data,
      out: out.data,
      qNorm: options.qNorm && own(options.qNorm).data,
      kNorm: options.kNorm && own(options.kNorm).data,
    });
    const norm = (values: Float64Array): Tensor => {
      const tensor = this.#tensors.make([headDim]);
      tensor.data.set(values);
      return tensor;
    };
    return {
      qkv: out,
      ...(options.qNorm && { qNorm: norm(sums.qNorm) }),
      ...(options.kNorm && { kNorm: norm(sums.kNorm) }),
    };
  }

  attentionGradient(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    options: AttentionGradientOptions,
    dy: Tensor,
  ): { q: Tensor; k: Tensor; v: Tensor } {
    const make = (like: Tensor) => this.#tensors.make(like.shape);
    const out = { q: make(q), k: make(k), v: make(v) };
    attentionGradient(this.#pool, {
      ...options,
      q: own(q).data,
      k: own(k).data,
      v: own(v).data,
      dy: own(dy).data,
      dq: out.q.data,
      dk: out.k.data,
      dv: out.v.data,
    });
    return out;
  }

  siluMulGradient(gateUp: Tensor, dy: Tensor): Tensor {
    const { data, rows } = own(gateUp).matrix;
    const out = this.#tensors.make(gateUp.shape);
    siluMulGradient(this.#pool, data, rows, own(dy).data, out.data);
    return out;
  }

  fakeQuantize(w: Tensor, scales: Tensor, zeros: Tensor, grid: GridSpec): Tensor {
    const { data, cols } = own(w).matrix;
    const out = this.#tensors.make(w.shape);
    freeGrid(this.#pool, data, { ...grid, columns: cols, scales: own(scales).data, zeros: own(zeros).data }, out.data);
    return out;
  }

  fakeQuantizeGradient(
    w: Tensor,
    scales: Tensor,
    zeros: Tensor,
    grid: GridSpec,
    dy: Tensor,
  ): { w: Tensor; scales: Tensor; zeros: Tensor } {
    const { data, cols } = own(w).matrix;
    const make = (like: Tensor) => this.#tensors.make(like.shape);
    const out = { w: make(w), scales: make(scales), zeros: make(zeros) };
    const free = { ...grid, columns: cols, scales: own(scales).data, zeros: own(zeros).data };
    freeGrid(this.#pool, data, free, out.w.data, {
      dy: own(dy).data,
      scales: out.scales.data,
      zeros: out.zeros.data,
    });
    return out;
  }

  scaleGroups(x: Tensor, scales: Tensor, groupSize: number): Tensor {
    const { data, cols } = own(x).matrix;
    const out = this.#tensors.make(x.shape);
    scaleGroups(this.#pool, data, cols, own(scales).data, groupSize, out.data);
    return out;
  }

  scaleGroupsGradient(x: Tensor, groupSize: number, dy: Tensor): Tensor {
    const { data, rows, cols } = own(x).matrix;
    const out = this.#tensors.make([rows / groupSize, cols]);
    sumGroups(this.#pool, data, cols, groupSize, own(dy).data, out.data);
    return out;
  }

  elementLoss(prediction: Tensor, target: Tensor, loss: ElementLoss): LossGradient {
    const gradient = this.#tensors.make(prediction.shape);
    return {
      loss: this.#scalar(elementLoss(this.#pool, own(prediction).data, own(target).data, loss, gradient.data)),
      gradient,
    };
  }

  crossEntropy(logits: Tensor, targets: Int32Array): LossGradient {
    const { data, rows } = own(logits).matrix;
    ensure(targets.length === rows, 'tensor-shape', () => `${targets.length} targets for ${rows} rows of logits`);
    const gradient = this.#tensors.make(logits.shape);
    return { loss: this.#scalar(logitLoss(this.#pool, data, rows, { targets }, gradient.data)), gradient };
  }

  klDivergence(logits: Tensor, reference: Tensor): LossGradient {
    const { data, rows } = own(logits).matrix;
    const gradient = this.#tensors.make(logits.shape);
    const loss = logitLoss(this.#pool, data, rows, { reference: own(reference).data }, gradient.data);
    return { loss: this.#scalar(loss), gradient };
  }

  adamW(parameter: Tensor, gradient: Tensor, first: Tensor, second: Tensor, step: AdamWStep): void {
    const { data } = own(parameter);
    adamW(this.#pool, data, own(gradient).data, own(first).data, own(second).data, step);
    const { range } = step;
    if (range)
      for (let i = 0; i < data.length; i++) data[i] = Math.min(Math.max(data[i], range.minimum), range.maximum);
  }

  #scalar(value: number): Tensor {
    const tensor = this.#tensors.make([1]);
    tensor.data[0] = value;
    return tensor;
  }
}

function foreign(): GyreError {
  return new GyreError('backend', 'a handle of another backend was given to the CPU backend');
}
