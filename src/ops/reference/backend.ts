// The reference backend: every op of the contract in plain float64 TypeScript, slow and obviously right. It is the
// oracle of the conformance suite; other backends may only differ from it by the rounding of their dtype.
import type {
  ActivationGrid,
  AttentionOptions,
  Backend,
  BackendInfo,
  GridSpec,
  InputTransform,
  KvCacheHandle,
  KvCacheShape,
  LinearHandle,
  LinearSource,
  PairwiseTransform,
  RopeHandle,
  RoundedWeight,
  RowScores,
  SequenceCopy,
  SplitHeadsOptions,
  Tensor,
  TransformGradient,
  TransformHandle,
  TransformObjective,
} from '../backend.js';
import { checkCopies, forestRoots, startsOf } from '../sequences.js';
import { ensure } from '../../core/errors.js';
import type { HostTensor } from '../../core/tensor.js';
import { kvActivationGrid, quantizeRows } from './activations.js';
import {
  appendToCache,
  attend,
  attendForest,
  ownKvCache,
  ownRope,
  ReferenceKvCache,
  ReferenceRope,
  splitHeads,
} from './attention.js';
import { ReferenceGradients } from './gradients.js';
import { hadamardRows, ReferenceHadamard } from './hadamard.js';
import { gptqFactor, solveSymmetric } from './linalg.js';
import { embed, linear, matmul, ownLinear, ReferenceLinear, transpose } from './linear.js';
import { rmsNorm, score, siluMul } from './norms.js';
import {
  descend,
  gptq,
  ReferenceObjective,
  refitScales,
  roundToNearest,
  searchClip,
  transformChannels,
  type Rounding,
} from './quantize.js';
import { checkRotations, ownTransform, ReferenceTransform, transformVector, weightScales } from './rotation.js';
import { expectSize, hostValues, matrixShape, own, ReferenceTensor } from './tensor.js';

export { readF64 } from './tensor.js';

/** The float64 oracle of every op. */
export function createReferenceBackend(): Backend {
  return new ReferenceBackend();
}

class ReferenceBackend implements Backend {
  readonly info: BackendInfo = { name: 'reference', description: 'plain TypeScript, float64', threads: 1 };
  readonly gradients = new ReferenceGradients();

  upload(tensor: HostTensor): Tensor {
    return new ReferenceTensor([...tensor.shape], hostValues(tensor));
  }

  async download(tensor: Tensor): Promise<Float32Array> {
    return Float32Array.from(own(tensor).values);
  }

  free(...tensors: readonly (Tensor | undefined)[]): void {
    for (const tensor of tensors) if (tensor) own(tensor).free();
  }

  sliceRows(tensor: Tensor, begin: number, end: number): Tensor {
    const parent = own(tensor);
    const [rows, columns] = matrixShape(tensor, 'sliceRows');
    ensure(
      0 <= begin && begin <= end && end <= rows,
      'tensor-shape',
      () => `sliceRows: [${begin}, ${end}) of ${rows} rows`,
    );
    const values = parent.values.subarray(begin * columns, end * columns);
    return new ReferenceTensor([end - begin, columns], values, parent);
  }

  gatherRows(x: Tensor, rows: Int32Array): Tensor {
    const { values } = own(x);
    const [count, columns] = matrixShape(x, 'gatherRows');
    const y = new Float64Array(rows.length * columns);
    for (const [to, from] of rows.entries()) {
      ensure(from >= 0 && from < count, 'tensor-shape', () => `gatherRows: row ${from} of ${count}`);
      y.set(values.subarray(from * columns, (from + 1) * columns), to * columns);
    }
    return new ReferenceTensor([rows.length, columns], y);
  }

  concatColumns(parts: readonly Tensor[]): Tensor {
    ensure(parts.length > 0, 'tensor-shape', 'concatColumns needs at least one tensor');
    const [rows] = matrixShape(parts[0], 'concatColumns');
    const width = parts.reduce((sum, part) => sum + matrixShape(part, 'concatColumns')[1], 0);
    const y = new Float64Array(rows * width);
    let offset = 0;
    for (const part of parts) {
      const { values } = own(part);
      const [partRows, columns] = matrixShape(part, 'concatColumns');
      expectSize(partRows, rows, 'rows of concatColumns');
      for (let r = 0; r < rows; r++) y.set(values.subarray(r * columns, (r + 1) * columns), r * width + offset);
      offset += columns;
    }
    return new ReferenceTensor([rows, width], y);
  }

  async loadLinear(source: LinearSource): Promise<LinearHandle> {
    return new ReferenceLinear(source);
  }

  loadTransform(transform: InputTransform): TransformHandle {
    return transform.kind === 'hadamard' ? new ReferenceHadamard(transform) : new ReferenceTransform(transform);
  }

  loadRope(cos: Float32Array, sin: Float32Array, rotaryDim: number): RopeHandle {
    return new ReferenceRope(cos, sin, rotaryDim);
  }

  createKvCache(shape: KvCacheShape): KvCacheHandle {
    return new ReferenceKvCache(shape);
  }

  copySequences(from: KvCacheHandle, to: KvCacheHandle, copies: readonly SequenceCopy[]): void {
    const [source, target] = [ownKvCache(from), ownKvCache(to)];
    const width = source.kvHeads * source.headDim;
    expectSize(target.kvHeads, source.kvHeads, 'heads of the target cache');
    expectSize(target.headDim, source.headDim, 'head dimension of the target cache');
    checkCopies(source, target, copies);
    for (const { from: i, to: j, tokens } of copies) {
      for (const part of ['keys', 'values'] as const) {
        const rows = source[part].subarray(i * source.capacity * width, (i * source.capacity + tokens) * width);
        target[part].set(rows, j * target.capacity * width);
      }
    }
  }

  /** Nothing to do: handles are garbage-collected host memory. */
  release(..._handles: readonly (LinearHandle | TransformHandle | RopeHandle | KvCacheHandle | undefined)[]): void {}

  embed(table: LinearHandle, ids: Int32Array): Tensor {
    return new ReferenceTensor([ids.length, table.inFeatures], embed(ownLinear(table), ids));
  }

  rmsNorm(x: Tensor, weight: Tensor, eps: number): Tensor {
    expectSize(own(weight).values.length, matrixShape(x, 'rmsNorm')[1], 'rmsNorm weight length');
    return new ReferenceTensor(x.shape, rmsNorm(own(x).values, own(weight).values, eps));
  }

  rotate(x: Tensor, handle: TransformHandle): Tensor {
    const [rows, channels] = matrixShape(x, 'rotate');
    expectSize(channels, handle.channels, 'channels of rotate');
    if (handle instanceof ReferenceHadamard)
      return new ReferenceTensor(x.shape, hadamardRows(own(x).values, handle.transform));
    const transform = ownTransform(handle);
    const y = own(x).values.slice();
    for (let r = 0; r < rows; r++) {
      transformVector(y, r * channels, 1, transform, transform.channelScales, 'forward');
    }
    return new ReferenceTensor(x.shape, y);
  }

  quantizeRows(x: Tensor, grid: ActivationGrid): Tensor {
    const [, channels] = matrixShape(x, 'quantizeRows');
    return new ReferenceTensor(x.shape, quantizeRows(own(x).values, channels, grid));
  }

  linear(x: Tensor, weight: LinearHandle, residual?: Tensor): Tensor {
    const [rows, inFeatures] = matrixShape(x, 'linear');
    expectSize(inFeatures, weight.inFeatures, 'input features of linear');
    if (residual) expectSize(own(residual).values.length, rows * weight.outFeatures, 'residual of linear');
    const layer = ownLinear(weight);
    const { activations } = layer;
    const input = activations ? quantizeRows(own(x).values, inFeatures, activations) : own(x).values;
    const y = linear(input, rows, layer, residual && own(residual).values);
    return new ReferenceTensor([rows, weight.outFeatures], y);
  }

  splitHeads(qkv: Tensor, options: SplitHeadsOptions): { q: Tensor; k: Tensor; v: Tensor } {
    const { heads, kvHeads, headDim, batch, start, rope, qNorm, kNorm, eps, headTransform } = options;
    const [rows, columns] = matrixShape(qkv, 'splitHeads');
    expectSize(columns, (heads + 2 * kvHeads) * headDim, 'columns of splitHeads');
    const tokens = tokensOf(rows, batch);
    for (const norm of [qNorm, kNorm]) if (norm) expectSize(own(norm).values.length, headDim, 'per-head norm length');
    const norms = { q: qNorm && own(qNorm).values, k: kNorm && own(kNorm).values, eps };
    const { q, k, v } = splitHeads(own(qkv).values, tokens, options, startsOf(start, batch), ownRope(rope), norms);
    // A head is a row of headDim channels.
    const turn = (part: Float64Array): Float64Array =>
      headTransform
        ? own(this.rotate(new ReferenceTensor([part.length / headDim, headDim], part), headTransform)).values
        : part;
    return {
      q: new ReferenceTensor([rows, heads * headDim], turn(q)),
      k: new ReferenceTensor([rows, kvHeads * headDim], turn(k)),
      v: new ReferenceTensor([rows, kvHeads * headDim], v),
    };
  }

  attention(q: Tensor, k: Tensor, v: Tensor, options: AttentionOptions): Tensor {
    const { heads, kvHeads, headDim, batch, start, scale, window } = options;
    const [rows, columns] = matrixShape(q, 'attention');
    expectSize(columns, heads * headDim, 'columns of q in attention');
    ensure(heads % kvHeads === 0, 'tensor-shape', () => `${heads} heads are no multiple of ${kvHeads} key heads`);
    const tokens = tokensOf(rows, batch);
    const width = kvHeads * headDim;
    for (const part of [k, v]) expectSize(own(part).values.length, rows * width, 'elements of k or v in attention');
    const starts = startsOf(start, batch);
    const end = Math.max(...starts) + tokens;
    let keys = own(k).values;
    let values = own(v).values;
    if (options.ends) {
      const { ends } = options;
      ensure(
        !options.cache && batch === rows,
        'tensor-shape',
        'packed rows are sequences of one token without a cache',
      );
      expectSize(ends.length, rows, 'ends of packed rows');
      forestRoots(ends, start);
      const y = attendForest(own(q).values, keys, values, options, { ends, scale, window });
      return new ReferenceTensor(q.shape, y);
    }
    let stride = tokens;
    if (options.cache) {
      const cache = ownKvCache(options.cache);
      expectSize(cache.batch, batch, 'batch of the key/value cache');
      expectSize(cache.kvHeads * cache.headDim, width, 'width of the key/value cache');
      ensure(
        end <= cache.capacity,
        'context-length',
        () => `${end} tokens do not fit a key/value cache of ${cache.capacity}`,
      );
      const grid = cache.grid && kvActivationGrid(cache.grid, headDim);
      const stored = (part: Float64Array): Float64Array => (grid ? quantizeRows(part, width, grid) : part);
      appendToCache(cache.keys, cache.capacity, stored(keys), batch, width, starts);
      appendToCache(cache.values, cache.capacity, stored(values), batch, width, starts);
      ({ keys, values, capacity: stride } = cache);
    } else {
      expectSize(end, tokens, 'end of attention without a cache');
    }
    const context = { batch, tokens, starts, scale, window };
    return new ReferenceTensor(q.shape, attend(own(q).values, keys, values, stride, options, context));
  }

  siluMul(gateUp: Tensor): Tensor {
    const [rows, columns] = matrixShape(gateUp, 'siluMul');
    ensure(columns % 2 === 0, 'tensor-shape', () => `siluMul needs an even number of columns, found ${columns}`);
    return new ReferenceTensor([rows, columns / 2], siluMul(own(gateUp).values, rows, columns / 2));
  }

  score(logits: Tensor, targets: Int32Array, reference?: Tensor): RowScores {
    const [rows, vocab] = matrixShape(logits, 'score');
    expectSize(targets.length, rows, 'targets of score');
    if (reference) expectSize(own(reference).values.length, rows * vocab, 'reference of score');
    return score(own(logits).values, vocab, targets, reference && own(reference).values);
  }

  matmul(a: Tensor, b: Tensor, options: { transposeA?: boolean; transposeB?: boolean } = {}): Tensor {
    const left = orient(a, options.transposeA ?? false);
    const right = orient(b, options.transposeB ?? false);
    expectSize(right.rows, left.columns, 'inner size of matmul');
    const y = matmul(left.values, right.values, left.rows, left.columns, right.columns);
    return new ReferenceTensor([left.rows, right.columns], y);
  }

  addScaled(acc: Tensor, x: Tensor, scale: number, inPlace = false): Tensor {
    const target = own(acc).values;
    const { values } = own(x);
    expectSize(values.length, target.length, 'elements of addScaled');
    const sum = target.map((value, i) => value + scale * values[i]);
    if (!inPlace) return new ReferenceTensor(acc.shape, sum);
    target.set(sum);
    return acc;
  }

  transpose(x: Tensor): Tensor {
    const [rows, columns] = matrixShape(x, 'transpose');
    return new ReferenceTensor([columns, rows], transpose(own(x).values, rows, columns));
  }

  dot(a: Tensor, b: Tensor): number {
    const { values } = own(b);
    expectSize(values.length, own(a).values.length, 'elements of dot');
    return own(a).values.reduce((sum, value, i) => sum + value * values[i], 0);
  }

  diagonal(x: Tensor): Float32Array {
    const [n, columns] = matrixShape(x, 'diagonal');
    expectSize(columns, n, 'columns of a square matrix');
    const { values } = own(x);
    return Float32Array.from({ length: n }, (_, i) => values[i * n + i]);
  }

  gatherColumns(x: Tensor, columns: Int32Array): Tensor {
    const [rows, cols] = matrixShape(x, 'gatherColumns');
    const { values } = own(x);
    const out = new Float64Array(rows * columns.length);
    for (let r = 0, i = 0; r < rows; r++) for (const c of columns) out[i++] = values[r * cols + c];
    return new ReferenceTensor([rows, columns.length], out);
  }

  scaleRows(x: Tensor, factors: Float32Array): Tensor {
    const [rows, cols] = matrixShape(x, 'scaleRows');
    expectSize(factors.length, rows, 'factors of scaleRows');
    return new ReferenceTensor(
      [rows, cols],
      own(x).values.map((value, i) => value * factors[Math.floor(i / cols)]),
    );
  }

  rowSquares(x: Tensor): Float32Array {
    const [rows, cols] = matrixShape(x, 'rowSquares');
    const { values } = own(x);
    return Float32Array.from({ length: rows }, (_, r) =>
      values.subarray(r * cols, (r + 1) * cols).reduce((sum, value) => sum + value * value, 0),
    );
  }

  transformChannels(
    w: Tensor,
    source: PairwiseTransform | TransformHandle,
    direction: 'forward' | 'inverse',
    side: 'weight' | 'activation' = 'weight',
  ): Tensor {
    const transform = 'theta' in source ? source : ownTransform(source);
    const [channels, cols] = matrixShape(w, 'transformChannels');
    checkRotations(transform);
    expectSize(channels, transform.channels, 'channels of transformChannels');
    const scales = side === 'weight' ? weightScales(transform) : transform.channelScales;
    return new ReferenceTensor(w.shape, transformChannels(own(w).values, cols, transform, scales, direction));
  }

  createObjective(
    w: Tensor,
    transform: Pick<PairwiseTransform, 'channels' | 'groupSize' | 'krot' | 'pairs'>,
    grid: GridSpec,
  ): TransformObjective {
    const [channels, cols] = matrixShape(w, 'createObjective');
    expectSize(channels, transform.channels, 'channels of createObjective');
    const objective = new ReferenceObjective(own(w).values.slice(), cols, transform, grid);
    return {
      forward: (theta, scales) =>
        new ReferenceTensor(w.shape, objective.forward(hostParameters(theta), hostParameters(scales))),
      backward: (gradient: Tensor): TransformGradient => objective.backward(own(gradient).values),
      backwardOn: (gradient) => {
        const { theta, scales } = objective.backward(own(gradient).values);
        return {
          theta: new ReferenceTensor([transform.krot, transform.channels / 2], theta),
          scales: new ReferenceTensor([transform.channels], scales),
        };
      },
      dispose: () => undefined,
    };
  }

  roundToNearest(w: Tensor, grid: GridSpec, clip?: Float32Array): RoundedWeight {
    const [channels, cols] = matrixShape(w, 'roundToNearest');
    return rounded(w.shape, roundToNearest(own(w).values, channels, cols, grid, clip));
  }

  searchClip(w: Tensor, gram: Tensor, grid: GridSpec, ratios: readonly number[]): Float32Array {
    const [channels, cols] = matrixShape(w, 'searchClip');
    expectSize(own(gram).values.length, channels * channels, 'elements of the Gram matrix');
    return searchClip(own(w).values, own(gram).values, channels, cols, grid, ratios);
  }

  gptq(w: Tensor, factor: Tensor, grid: GridSpec, clip?: Float32Array): RoundedWeight {
    const [channels, cols] = matrixShape(w, 'gptq');
    expectSize(own(factor).values.length, channels * channels, 'elements of the GPTQ factor');
    return rounded(w.shape, gptq(own(w).values, own(factor).values, channels, cols, grid, clip));
  }

  descend(w: Tensor, start: RoundedWeight, gram: Tensor, grid: GridSpec, sweeps: number): RoundedWeight {
    const [channels, cols] = matrixShape(w, 'descend');
    expectSize(own(gram).values.length, channels * channels, 'elements of the Gram matrix');
    return rounded(w.shape, descend(own(w).values, start, own(gram).values, channels, cols, grid, sweeps));
  }

  refitScales(w: Tensor, start: RoundedWeight, gram: Tensor, grid: GridSpec, passes: number): RoundedWeight {
    const [channels, cols] = matrixShape(w, 'refitScales');
    expectSize(own(gram).values.length, channels * channels, 'elements of the Gram matrix');
    return rounded(w.shape, refitScales(own(w).values, start, own(gram).values, channels, cols, grid, passes));
  }

  async gptqFactor(h: Tensor, damp: number): Promise<Tensor> {
    const n = squareSize(h, 'gptqFactor');
    return new ReferenceTensor([n, n], gptqFactor(own(h).values, n, damp));
  }

  async solveSymmetric(h: Tensor, b: Tensor, damp: number): Promise<Tensor> {
    const n = squareSize(h, 'solveSymmetric');
    const [m, columns] = matrixShape(b, 'solveSymmetric');
    expectSize(columns, n, 'columns of B in solveSymmetric');
    return new ReferenceTensor([m, n], solveSymmetric(own(h).values, own(b).values, m, n, damp));
  }

  async dispose(): Promise<void> {}
}

/** Parameters of a transform as the formats hold them. */
function hostParameters(values: Float32Array | Tensor): Float32Array {
  return values instanceof Float32Array ? values : Float32Array.from(own(values).values);
}

/** Tokens per sequence of `rows` = batch × tokens. */
function tokensOf(rows: number, batch: number): number {
  ensure(rows % batch === 0, 'tensor-shape', () => `${rows} rows are no multiple of batch ${batch}`);
  return rows / batch;
}

/** Size of a square matrix. */
function squareSize(tensor: Tensor, what: string): number {
  const [rows, columns] = matrixShape(tensor, what);
  expectSize(columns, rows, `columns of the square matrix of ${what}`);
  return rows;
}

/** A matrix as it enters a product. */
function orient(tensor: Tensor, transposed: boolean): { values: Float64Array; rows: number; columns: number } {
  const [rows, columns] = matrixShape(tensor, 'matmul');
  const { values } = own(tensor);
  return transposed
    ? { values: transpose(values, rows, columns), rows: columns, columns: rows }
    : { values, rows, columns };
}

function rounded(shape: readonly number[], { codes, zeros, scales, values }: Rounding): RoundedWeight {
  return { codes, zeros, scales, values: new ReferenceTensor(shape, values) };
}
