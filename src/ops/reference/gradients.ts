// The gradient ops in float64: one loop per formula, nothing shared with the forward ops but the inputs.
import type { GridSpec, PairwiseTransform, RopeHandle, Tensor, TransformHandle } from '../backend.js';
import type {
  AdamWStep,
  AttentionGradientOptions,
  ElementLoss,
  GradientOps,
  LossGradient,
  SplitHeadsGradientOptions,
} from '../gradients.js';
import { ensure } from '../../core/errors.js';
import { ownRope, takeColumns } from './attention.js';
import { roundHalfEven } from './quantize.js';
import { ownTransform, pairAt, ReferenceTransform, rotateOnce } from './rotation.js';
import { expectSize, matrixShape, own, ReferenceTensor } from './tensor.js';

/** See {@link GradientOps}. */
export class ReferenceGradients implements GradientOps {
  splitColumns(x: Tensor, widths: readonly number[]): Tensor[] {
    const [rows, columns] = matrixShape(x, 'splitColumns');
    expectSize(
      widths.reduce((a, b) => a + b, 0),
      columns,
      'sum of the widths of splitColumns',
    );
    let begin = 0;
    return widths.map((width) => {
      begin += width;
      return new ReferenceTensor([rows, width], takeColumns(own(x).values, columns, begin - width, width));
    });
  }

  rmsNormGradient(x: Tensor, weight: Tensor, eps: number, dy: Tensor): { x: Tensor; weight: Tensor } {
    const n = own(weight).values.length;
    expectSize(n, matrixShape(x, 'rmsNormGradient')[1], 'rmsNorm weight length');
    expectSize(own(dy).values.length, own(x).values.length, 'elements of dy in rmsNormGradient');
    const { dx, dWeight } = normGradient(own(x).values, own(weight).values, eps, own(dy).values);
    return { x: new ReferenceTensor(x.shape, dx), weight: new ReferenceTensor([n], dWeight) };
  }

  transformOf(
    layout: Pick<PairwiseTransform, 'channels' | 'groupSize' | 'krot' | 'pairs'>,
    theta: Tensor,
    channelScales: Tensor,
  ): TransformHandle {
    const [angles, scales] = [theta, channelScales].map((tensor) => Float32Array.from(own(tensor).values));
    return new ReferenceTransform({ ...layout, theta: angles, channelScales: scales });
  }

  rotateGradient(x: Tensor, handle: TransformHandle, dy: Tensor): { x: Tensor; theta: Tensor; channelScales: Tensor } {
    const t = ownTransform(handle);
    const [rows, channels] = matrixShape(x, 'rotateGradient');
    expectSize(channels, t.channels, 'channels of rotateGradient');
    expectSize(own(dy).values.length, rows * channels, 'elements of dy in rotateGradient');
    const theta = new Float64Array((t.krot * channels) / 2);
    const scales = new Float64Array(channels);
    const values = own(x).values;
    const dx = own(dy).values.slice();
    for (let r = 0; r < rows; r++) {
      const base = r * channels;
      const row = values.slice(base, base + channels).map((value, c) => value * t.channelScales[c]);
      // after[k]: the row after rotation k.
      const after: Float64Array[] = [];
      for (let k = 0; k < t.krot; k++) {
        rotateOnce(row, 0, 1, t, k, 1);
        after.push(row.slice());
      }
      for (let k = t.krot - 1; k >= 0; k--) {
        for (let p = 0; p < channels / 2; p++) {
          const [i, j] = pairAt(t, k, p);
          theta[(k * channels) / 2 + p] += dx[base + i] * after[k][j] - dx[base + j] * after[k][i];
        }
        rotateOnce(dx, base, 1, t, k, -1);
      }
      for (let c = 0; c < channels; c++) {
        scales[c] += dx[base + c] * values[base + c];
        dx[base + c] *= t.channelScales[c];
      }
    }
    return {
      x: new ReferenceTensor(x.shape, dx),
      theta: new ReferenceTensor([t.krot, channels / 2], theta),
      channelScales: new ReferenceTensor([channels], scales),
    };
  }

  splitHeadsGradient(
    qkv: Tensor,
    options: SplitHeadsGradientOptions,
    dy: { readonly q: Tensor; readonly k: Tensor; readonly v: Tensor },
  ): { qkv: Tensor; qNorm?: Tensor; kNorm?: Tensor } {
    const { heads, kvHeads, headDim, batch, start, rope, eps } = options;
    const [rows, columns] = matrixShape(qkv, 'splitHeadsGradient');
    expectSize(columns, (heads + 2 * kvHeads) * headDim, 'columns of splitHeadsGradient');
    const out = new Float64Array(rows * columns);
    const put = (values: Float64Array, begin: number, width: number): void => {
      for (let r = 0; r < rows; r++) out.set(values.subarray(r * width, (r + 1) * width), r * columns + begin);
    };
    const norms: { qNorm?: Tensor; kNorm?: Tensor } = {};
    const parts = [
      { name: 'qNorm', count: heads, begin: 0, gradient: dy.q, weight: options.qNorm },
      { name: 'kNorm', count: kvHeads, begin: heads * headDim, gradient: dy.k, weight: options.kNorm },
    ] as const;
    for (const { name, count, begin, gradient, weight } of parts) {
      const width = count * headDim;
      expectSize(own(gradient).values.length, rows * width, `elements of the gradient of ${name[0]}`);
      let d: Float64Array = unrotate(own(gradient).values, rows / batch, count, headDim, start, rope);
      if (weight) {
        const x = takeColumns(own(qkv).values, columns, begin, width);
        const { dx, dWeight } = normGradient(x, own(weight).values, eps, d);
        d = dx;
        norms[name] = new ReferenceTensor([headDim], dWeight);
      }
      put(d, begin, width);
    }
    expectSize(own(dy.v).values.length, rows * kvHeads * headDim, 'elements of the gradient of v');
    put(own(dy.v).values, (heads + kvHeads) * headDim, kvHeads * headDim);
    return { qkv: new ReferenceTensor(qkv.shape, out), ...norms };
  }

  attentionGradient(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    { batch, heads, kvHeads, headDim, scale, window = Infinity }: AttentionGradientOptions,
    dy: Tensor,
  ): { q: Tensor; k: Tensor; v: Tensor } {
    const [rows, columns] = matrixShape(q, 'attentionGradient');
    expectSize(columns, heads * headDim, 'columns of q in attentionGradient');
    expectSize(own(dy).values.length, rows * columns, 'elements of dy in attentionGradient');
    for (const part of [k, v]) expectSize(own(part).values.length, rows * kvHeads * headDim, 'elements of k or v');
    const tokens = rows / batch;
    ensure(Number.isInteger(tokens), 'tensor-shape', () => `${rows} rows are no multiple of batch ${batch}`);
    const [Q, K, V, G] = [own(q).values, own(k).values, own(v).values, own(dy).values];
    const [dQ, dK, dV] = [new Float64Array(Q.length), new Float64Array(K.length), new Float64Array(V.length)];
    for (let b = 0; b < batch; b++) {
      for (let head = 0; head < heads; head++) {
        const kvHead = Math.floor(head / (heads / kvHeads));
        const queryAt = (t: number): number => ((b * tokens + t) * heads + head) * headDim;
        const keyAt = (p: number): number => ((b * tokens + p) * kvHeads + kvHead) * headDim;
        for (let t = 0; t < tokens; t++) {
          const first = Math.max(0, t - window + 1);
          const count = t - first + 1;
          const logits = Array.from(
            { length: count },
            (_, n) => scale * dot(Q, queryAt(t), K, keyAt(first + n), headDim),
          );
          const max = logits.reduce((a, z) => Math.max(a, z), -Infinity);
          const weights = logits.map((z) => Math.exp(z - max));
          const total = weights.reduce((a, w) => a + w, 0);
          const p = weights.map((w) => w / total);
          // ∂L/∂p, and through the softmax: ∂L/∂logit = p·(∂L/∂p − Σ p·∂L/∂p).
          const dp = p.map((_, n) => dot(G, queryAt(t), V, keyAt(first + n), headDim));
          const mean = p.reduce((sum, w, n) => sum + w * dp[n], 0);
          for (let n = 0; n < count; n++) {
            const ds = p[n] * (dp[n] - mean) * scale;
            for (let d = 0; d < headDim; d++) {
              dV[keyAt(first + n) + d] += p[n] * G[queryAt(t) + d];
              dQ[queryAt(t) + d] += ds * K[keyAt(first + n) + d];
              dK[keyAt(first + n) + d] += ds * Q[queryAt(t) + d];
            }
          }
        }
      }
    }
    return {
      q: new ReferenceTensor(q.shape, dQ),
      k: new ReferenceTensor(k.shape, dK),
      v: new ReferenceTensor(v.shape, dV),
    };
  }

  siluMulGradient(gateUp: Tensor, dy: Tensor): Tensor {
    const [rows, columns] = matrixShape(gateUp, 'siluMulGradient');
    const n = columns / 2;
    expectSize(own(dy).values.length, rows * n, 'elements of dy in siluMulGradient');
    const x = own(gateUp).values;
    const g = own(dy).values;
    const out = new Float64Array(rows * columns);
    for (let r = 0; r < rows; r++) {
      for (let i = 0; i < n; i++) {
        const gate = x[r * columns + i];
        const up = x[r * columns + n + i];
        const sigmoid = 1 / (1 + Math.exp(-gate));
        out[r * columns + i] = g[r * n + i] * up * sigmoid * (1 + gate * (1 - sigmoid));
        out[r * columns + n + i] = g[r * n + i] * gate * sigmoid;
      }
    }
    return new ReferenceTensor(gateUp.shape, out);
  }

  fakeQuantize(w: Tensor, scales: Tensor, zeros: Tensor, grid: GridSpec): Tensor {
    const y = new Float64Array(own(w).values.length);
    eachCode(w, scales, zeros, grid, ({ at, offset, scale }) => {
      y[at] = offset * scale;
    });
    return new ReferenceTensor(w.shape, y);
  }

  fakeQuantizeGradient(
    w: Tensor,
    scales: Tensor,
    zeros: Tensor,
    grid: GridSpec,
    dy: Tensor,
  ): { w: Tensor; scales: Tensor; zeros: Tensor } {
    const values = own(w).values;
    const g = own(dy).values;
    expectSize(g.length, values.length, 'elements of dy in fakeQuantizeGradient');
    const dw = new Float64Array(values.length);
    const dScales = new Float64Array(own(scales).values.length);
    const dZeros = new Float64Array(dScales.length);
    eachCode(w, scales, zeros, grid, ({ at, slot, offset, scale, cut }) => {
      if (cut) {
        dScales[slot] += g[at] * offset;
        dZeros[slot] -= g[at] * scale;
      } else {
        dw[at] = g[at];
        dScales[slot] += g[at] * (offset - values[at] / scale);
      }
    });
    return {
      w: new ReferenceTensor(w.shape, dw),
      scales: new ReferenceTensor(scales.shape, dScales),
      zeros: new ReferenceTensor(zeros.shape, dZeros),
    };
  }

  scaleGroups(x: Tensor, scales: Tensor, groupSize: number): Tensor {
    const [channels, cols] = matrixShape(x, 'scaleGroups');
    expectSize(own(scales).values.length, (channels / groupSize) * cols, 'scales of scaleGroups');
    const y = own(x).values.map((value, at) => value * own(scales).values[slotOf(at, cols, groupSize)]);
    return new ReferenceTensor(x.shape, y);
  }

  scaleGroupsGradient(x: Tensor, groupSize: number, dy: Tensor): Tensor {
    const [channels, cols] = matrixShape(x, 'scaleGroupsGradient');
    ensure(channels % groupSize === 0, 'tensor-shape', () => `group size ${groupSize} for ${channels} channels`);
    const values = own(x).values;
    expectSize(own(dy).values.length, values.length, 'elements of dy in scaleGroupsGradient');
    const sums = new Float64Array((channels / groupSize) * cols);
    for (const [at, g] of own(dy).values.entries()) sums[slotOf(at, cols, groupSize)] += g * values[at];
    return new ReferenceTensor([channels / groupSize, cols], sums);
  }

  elementLoss(prediction: Tensor, target: Tensor, loss: ElementLoss): LossGradient {
    const p = own(prediction).values;
    const t = own(target).values;
    expectSize(t.length, p.length, 'elements of the target');
    const gradient = new Float64Array(p.length);
    let sum = 0;
    for (let i = 0; i < p.length; i++) {
      const [value, slope] = elementTerm(p[i] - t[i], loss);
      sum += value;
      gradient[i] = slope / p.length;
    }
    return { loss: scalar(sum / p.length), gradient: new ReferenceTensor(prediction.shape, gradient) };
  }

  crossEntropy(logits: Tensor, targets: Int32Array): LossGradient {
    const [rows, classes] = matrixShape(logits, 'crossEntropy');
    expectSize(targets.length, rows, 'targets of crossEntropy');
    const gradient = new Float64Array(rows * classes);
    let sum = 0;
    for (let r = 0; r < rows; r++) {
      const target = targets[r];
      ensure(target >= 0 && target < classes, 'usage', () => `target ${target} is outside ${classes} classes`);
      const logQ = logSoftmax(own(logits).values.subarray(r * classes, (r + 1) * classes));
      sum -= logQ[target];
      for (let c = 0; c < classes; c++) gradient[r * classes + c] = (Math.exp(logQ[c]) - (c === target ? 1 : 0)) / rows;
    }
    return { loss: scalar(sum / rows), gradient: new ReferenceTensor(logits.shape, gradient) };
  }

  klDivergence(logits: Tensor, reference: Tensor): LossGradient {
    const [rows, classes] = matrixShape(logits, 'klDivergence');
    expectSize(own(reference).values.length, rows * classes, 'elements of the reference logits');
    const gradient = new Float64Array(rows * classes);
    let sum = 0;
    for (let r = 0; r < rows; r++) {
      const logQ = logSoftmax(own(logits).values.subarray(r * classes, (r + 1) * classes));
      const logP = logSoftmax(own(reference).values.subarray(r * classes, (r + 1) * classes));
      for (let c = 0; c < classes; c++) {
        const p = Math.exp(logP[c]);
        if (p > 0) sum += p * (logP[c] - logQ[c]);
        gradient[r * classes + c] = (Math.exp(logQ[c]) - p) / rows;
      }
    }
    return { loss: scalar(sum / rows), gradient: new ReferenceTensor(logits.shape, gradient) };
  }

  adamW(parameter: Tensor, gradient: Tensor, first: Tensor, second: Tensor, options: AdamWStep): void {
    const { learningRate, beta1, beta2, eps, weightDecay, step, range } = options;
    const p = own(parameter).values;
    const [g, m, v] = [gradient, first, second].map((tensor) => {
      expectSize(own(tensor).values.length, p.length, 'elements of a gradient or moment');
      return own(tensor).values;
    });
    for (let i = 0; i < p.length; i++) {
      m[i] = beta1 * m[i] + (1 - beta1) * g[i];
      v[i] = beta2 * v[i] + (1 - beta2) * g[i] ** 2;
      const mean = m[i] / (1 - beta1 ** step);
      const square = v[i] / (1 - beta2 ** step);
      p[i] -= learningRate * (mean / (Math.sqrt(square) + eps) + weightDecay * p[i]);
      if (range) p[i] = Math.min(Math.max(p[i], range.minimum), range.maximum);
    }
  }
}

function scalar(value: number): Tensor {
  return new ReferenceTensor([1], Float64Array.of(value));
}

function dot(a: Float64Array, at: number, b: Float64Array, bt: number, n: number): number {
  let sum = 0;
  for (let i = 0; i < n; i++) sum += a[at + i] * b[bt + i];
  return sum;
}

/** Gradients of rows of y = w·x / sqrt(mean x² + eps): ∂x = (w∂y − x·Σ(w∂y·x)/(n·norm²)) / norm, ∂w = Σ ∂y·x/norm. */
function normGradient(
  x: Float64Array,
  weight: Float64Array,
  eps: number,
  dy: Float64Array,
): { dx: Float64Array; dWeight: Float64Array } {
  const n = weight.length;
  const dx = new Float64Array(x.length);
  const dWeight = new Float64Array(n);
  for (let base = 0; base < x.length; base += n) {
    let squares = 0;
    let projection = 0;
    for (let i = 0; i < n; i++) {
      squares += x[base + i] ** 2;
      projection += weight[i] * dy[base + i] * x[base + i];
    }
    const norm = Math.sqrt(squares / n + eps);
    for (let i = 0; i < n; i++) {
      dx[base + i] = (weight[i] * dy[base + i] - (x[base + i] * projection) / (n * norm ** 2)) / norm;
      dWeight[i] += (dy[base + i] * x[base + i]) / norm;
    }
  }
  return { dx, dWeight };
}

/** RoPE's transpose on gradients [rows, heads·headDim]: the rotation by minus the angle. */
function unrotate(
  dy: Float64Array,
  tokens: number,
  heads: number,
  headDim: number,
  start: number,
  rope: RopeHandle,
): Float64Array {
  const { cos, sin, rotaryDim } = ownRope(rope);
  const half = rotaryDim / 2;
  const out = dy.slice();
  const rows = dy.length / (heads * headDim);
  for (let r = 0; r < rows; r++) {
    const position = start + (r % tokens);
    for (let head = 0; head < heads; head++) {
      const base = (r * heads + head) * headDim;
      for (let i = 0; i < half; i++) {
        const c = cos[position * half + i];
        const s = sin[position * half + i];
        const a = dy[base + i];
        const b = dy[base + i + half];
        out[base + i] = a * c + b * s;
        out[base + i + half] = b * c - a * s;
      }
    }
  }
  return out;
}

/** Index of the group that element `at` of [in, cols] belongs to. */
function slotOf(at: number, cols: number, groupSize: number): number {
  return Math.floor(at / cols / groupSize) * cols + (at % cols);
}

/** One weight on its grid. */
interface Code {
  /** Index of the weight, and of its group. */
  readonly at: number;
  readonly slot: number;
  /** code − zero. */
  readonly offset: number;
  readonly scale: number;
  /** Whether the code was cut off at an end of the range. */
  readonly cut: boolean;
}

function eachCode(
  w: Tensor,
  scales: Tensor,
  zeros: Tensor,
  { bits, groupSize }: GridSpec,
  visit: (code: Code) => void,
): void {
  const [channels, cols] = matrixShape(w, 'fakeQuantize');
  ensure(
    channels % groupSize === 0,
    'tensor-shape',
    () => `group size ${groupSize} does not divide ${channels} channels`,
  );
  for (const part of [scales, zeros])
    expectSize(own(part).values.length, (channels / groupSize) * cols, 'scales or zero points of fakeQuantize');
  const top = 2 ** bits - 1;
  for (let i = 0; i < channels; i++) {
    for (let c = 0; c < cols; c++) {
      const at = i * cols + c;
      const slot = slotOf(at, cols, groupSize);
      const scale = own(scales).values[slot];
      const zero = Math.min(Math.max(roundHalfEven(own(zeros).values[slot]), 0), top);
      const code = roundHalfEven(own(w).values[at] / scale) + zero;
      const clamped = Math.min(Math.max(code, 0), top);
      visit({ at, slot, offset: clamped - zero, scale, cut: clamped !== code });
    }
  }
}

/** Value and slope of a loss at the difference d. */
function elementTerm(d: number, loss: ElementLoss): readonly [value: number, slope: number] {
  switch (loss.kind) {
    case 'mse':
      return [d * d, 2 * d];
    case 'smooth-l1':
      return Math.abs(d) < loss.beta
        ? [(d * d) / (2 * loss.beta), d / loss.beta]
        : [Math.abs(d) - loss.beta / 2, Math.sign(d)];
  }
}

function logSoftmax(row: Float64Array): Float64Array {
  const max = row.reduce((a, b) => Math.max(a, b), -Infinity);
  const logSum = Math.log(row.reduce((sum, z) => sum + Math.exp(z - max), 0));
  return row.map((z) => z - max - logSum);
}
