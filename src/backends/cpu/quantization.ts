// The quantization ops of the CPU backend: our WebAssembly kernels for what is per channel and per group, ONNX Runtime for
// the matrix products between them.
import { ensure, GyreError } from '../../core/errors.js';
import type {
  GridSpec,
  PairwiseTransform,
  QuantizationOps,
  RoundedWeight,
  Tensor,
  TransformHandle,
  TransformObjective,
} from '../../ops/backend.js';
import {
  addScaled,
  descentBlock,
  dot,
  fakeQuantize,
  gptqBlock,
  gptqBlocks,
  ObjectiveKernel,
  RowTransform,
  transformChannels,
  transpose,
  type KernelPool,
} from './kernels.js';
import { gptqFactor, solveSymmetric } from './linalg.js';
import type { OrtKernels } from './ort.js';
import { refitScales } from './refit.js';
import { CpuTensor, own, type TensorPool } from './tensor.js';

/** Columns of the blocks that a Gram matrix is computed in. */
const GRAM_BLOCK = 512;

/** See {@link QuantizationOps}. */
export class CpuQuantization implements QuantizationOps {
  readonly #pool: KernelPool;
  readonly #ort: OrtKernels;
  readonly #tensors: TensorPool;

  constructor(pool: KernelPool, ort: OrtKernels, tensors: TensorPool) {
    this.#pool = pool;
    this.#ort = ort;
    this.#tensors = tensors;
  }

  async matmul(a: Tensor, b: Tensor, options: { transposeA?: boolean; transposeB?: boolean } = {}): Promise<Tensor> {
    const { transposeA = false, transposeB = false } = options;
    const [left, right] = [own(a).matrix, own(b).matrix];
    const out = this.#tensors.make([transposeA ? left.cols : left.rows, transposeB ? right.rows : right.cols]);
    if (left.data === right.data && transposeA && !transposeB && left.cols >= 2 * GRAM_BLOCK)
      await gramProduct(this.#ort, this.#tensors, left, out.data);
    else await this.#ort.gemm(left, transposeA, right, transposeB, out.data);
    return out;
  }

  addScaled(acc: Tensor, x: Tensor, scale: number, inPlace = false): Tensor {
    const a = own(acc);
    const out = inPlace ? a : this.#tensors.make(a.shape);
    addScaled(a.data, own(x).data, scale, out.data);
    return out;
  }

  transpose(x: Tensor): Tensor {
    const { data, rows, cols } = own(x).matrix;
    const out = this.#tensors.make([cols, rows]);
    transpose(this.#pool, data, out.data, rows, cols);
    return out;
  }

  dot(a: Tensor, b: Tensor): number {
    return dot(own(a).data, own(b).data);
  }

  diagonal(x: Tensor): Float32Array {
    const { data, rows, cols } = own(x).matrix;
    ensure(rows === cols, 'tensor-shape', () => `the diagonal of a matrix [${rows}, ${cols}]`);
    return Float32Array.from({ length: rows }, (_, i) => data[i * rows + i]);
  }

  gatherColumns(x: Tensor, columns: Int32Array): Tensor {
    const { data, rows, cols } = own(x).matrix;
    const out = this.#tensors.make([rows, columns.length]);
    for (let r = 0, i = 0; r < rows; r++) for (const c of columns) out.data[i++] = data[r * cols + c];
    return out;
  }

  scaleRows(x: Tensor, factors: Float32Array): Tensor {
    const { data, rows, cols } = own(x).matrix;
    ensure(factors.length === rows, 'tensor-shape', () => `${factors.length} factors for ${rows} rows`);
    const out = this.#tensors.make([rows, cols]);
    for (let r = 0, i = 0; r < rows; r++) {
      const factor = factors[r];
      for (const end = i + cols; i < end; i++) out.data[i] = data[i] * factor;
    }
    return out;
  }

  rowSquares(x: Tensor): Float32Array {
    const { data, rows, cols } = own(x).matrix;
    const sums = new Float32Array(rows);
    for (let r = 0, i = 0; r < rows; r++) {
      let sum = 0;
      for (const end = i + cols; i < end; i++) sum += data[i] * data[i];
      sums[r] = sum;
    }
    return sums;
  }

  transformChannels(
    w: Tensor,
    source: PairwiseTransform | TransformHandle,
    direction: 'forward' | 'inverse',
    side: 'weight' | 'activation' = 'weight',
  ): Tensor {
    const transform = 'theta' in source ? source : ownPairwise(source);
    const { data, rows, cols } = own(w).matrix;
    ensure(
      rows === transform.channels,
      'tensor-shape',
      () => `a transform of ${transform.channels} channels on ${rows} rows`,
    );
    const a = transform.channelScales;
    const out = this.#tensors.make([rows, cols]);
    // The weight side multiplies by s = 1/a; both directions of the kernel take what forward multiplies by.
    transformChannels(
      this.#pool,
      data,
      out.data,
      cols,
      transform,
      transform.theta,
      side === 'weight' ? a.map((v) => 1 / v) : a,
      direction,
    );
    return out;
  }

  createObjective(
    w: Tensor,
    transform: Pick<PairwiseTransform, 'channels' | 'groupSize' | 'krot' | 'pairs'>,
    grid: GridSpec,
  ): TransformObjective {
    ensure(!grid.symmetric, 'unsupported', 'a transform objective has an asymmetric grid');
    const { data, rows, cols } = own(w).matrix;
    const kernel = new ObjectiveKernel(this.#pool, {
      ...transform,
      weight: data,
      columns: cols,
      bits: grid.bits,
      gridGroupSize: grid.groupSize,
    });
    const out = this.#tensors.make([rows, cols]);
    return {
      forward(theta, scales) {
        kernel.forward(hostParameters(theta), hostParameters(scales), out.data);
        return out;
      },
      backward: (gradient) => kernel.backward(own(gradient).data),
      backwardOn: (gradient) => {
        const found = kernel.backward(own(gradient).data);
        const made = {
          theta: this.#tensors.make([transform.krot, transform.channels / 2]),
          scales: this.#tensors.make([transform.channels]),
        };
        made.theta.data.set(found.theta);
        made.scales.data.set(found.scales);
        return made;
      },
      dispose: () => {
        kernel.dispose();
        this.#tensors.free(out);
      },
    };
  }

  roundToNearest(w: Tensor, grid: GridSpec, clip?: Float32Array): RoundedWeight {
    const { data, rows, cols } = own(w).matrix;
    const rounded = fakeQuantize(
      this.#pool,
      data,
      cols,
      grid.groupSize,
      grid.bits,
      clip,
      { codes: true, values: true },
      grid.symmetric,
    );
    return {
      codes: rounded.codes,
      zeros: rounded.zeros,
      scales: rounded.scales,
      values: new CpuTensor([rows, cols], rounded.values),
    };
  }

  async searchClip(w: Tensor, gram: Tensor, grid: GridSpec, ratios: readonly number[]): Promise<Float32Array> {
    const { data, rows: channels, cols } = own(w).matrix;
    const h = own(gram).matrix;
    ensure(
      h.rows === channels && h.cols === channels,
      'tensor-shape',
      () => `Gram matrix [${h.rows}, ${h.cols}] for ${channels} channels`,
    );
    const size = grid.groupSize;
    const groups = channels / size;
    const least = new Float64Array(groups * cols).fill(Infinity);
    const best = new Float32Array(groups * cols).fill(1);
    const difference = new Float32Array(size * cols);
    const product = new Float32Array(size * cols);
    const errors = new Float64Array(cols);
    // A group at a time through all ratios: it stays in the cache.
    for (let g = 0; g < groups; g++) {
      const own = data.subarray(g * size * cols, (g + 1) * size * cols);
      const block = { data: diagonalBlock(h.data, channels, g * size, (g + 1) * size), rows: size, cols: size };
      for (const ratio of ratios) {
        const clip = new Float32Array(cols).fill(ratio);
        const { values } = fakeQuantize(this.#pool, own, cols, size, grid.bits, clip, { values: true }, grid.symmetric);
        addScaled(values, own, -1, difference);
        await this.#ort.gemm(block, false, { data: difference, rows: size, cols }, false, product);
        errors.fill(0);
        for (let i = 0; i < product.length;)
          for (let c = 0; c < cols; c++, i++) errors[c] += difference[i] * product[i];
        for (let c = 0, slot = g * cols; c < cols; c++, slot++) {
          if (!(errors[c] < least[slot])) continue;
          least[slot] = errors[c];
          best[slot] = ratio;
        }
      }
    }
    return best;
  }

  async gptq(w: Tensor, factor: Tensor, grid: GridSpec, clip?: Float32Array): Promise<RoundedWeight> {
    const { data, rows: channels, cols: columns } = own(w).matrix;
    const u = own(factor).matrix;
    ensure(
      u.rows === channels && u.cols === channels,
      'tensor-shape',
      () => `GPTQ factor [${u.rows}, ${u.cols}] for ${channels} channels`,
    );
    const groups = channels / grid.groupSize;
    const work = data.slice();
    const codes = new Uint8Array(channels * columns);
    const zeros = new Uint8Array(groups * columns);
    const scales = new Float32Array(groups * columns);
    let update = new Float32Array(0);
    for (const [begin, end] of gptqBlocks(channels, grid.groupSize)) {
      const size = end - begin;
      const diagonal = new Float32Array(size * size);
      for (let r = 0; r < size; r++)
        diagonal.set(u.data.subarray((begin + r) * channels + begin, (begin + r) * channels + end), r * size);
      const errors = new Float32Array(size * columns);
      gptqBlock(this.#pool, {
        w: work,
        columns,
        begin,
        end,
        factor: diagonal,
        groupSize: grid.groupSize,
        bits: grid.bits,
        symmetric: grid.symmetric,
        clip,
        codes,
        zeros,
        scales,
        errors,
      });
      const after = channels - end;
      if (after === 0) break;
      // The lazy update: rows past the block see all of the block's errors in one product.
      const spread = new Float32Array(size * after);
      for (let r = 0; r < size; r++)
        spread.set(u.data.subarray((begin + r) * channels + end, (begin + r + 1) * channels), r * after);
      if (update.length < after * columns) update = new Float32Array(after * columns);
      await this.#ort.gemm(
        { data: spread, rows: size, cols: after },
        true,
        { data: errors, rows: size, cols: columns },
        false,
        update,
      );
      addScaled(work.subarray(end * columns), update.subarray(0, after * columns), -1, work.subarray(end * columns));
    }
    return { codes, zeros, scales, values: new CpuTensor([channels, columns], work) };
  }

  async descend(
    w: Tensor,
    rounded: RoundedWeight,
    gram: Tensor,
    grid: GridSpec,
    sweeps: number,
  ): Promise<RoundedWeight> {
    const { data: target, rows: channels, cols: columns } = own(w).matrix;
    const h = own(gram).matrix;
    ensure(
      h.rows === channels && h.cols === channels,
      'tensor-shape',
      () => `Gram matrix [${h.rows}, ${h.cols}] for ${channels} channels`,
    );
    const values = own(rounded.values).data.slice();
    const codes = rounded.codes.slice();
    // A block's residual H·(W − Ŵ) is computed when the block is visited, from what the others are by then: fewer operations
    // than spreading every change over all later blocks and starting each sweep anew, and rows of H as they lie.
    const rest = new Float32Array(channels * columns);
    addScaled(target, values, -1, rest);
    const difference = { data: rest, rows: channels, cols: columns };
    const blocks = gptqBlocks(channels, grid.groupSize);
    const most = Math.max(...blocks.map(([begin, end]) => end - begin)) * columns;
    const [residuals, moved] = [new Float32Array(most), new Float32Array(most)];
    for (let sweep = 0; sweep < sweeps; sweep++) {
      for (const [begin, end] of blocks) {
        const rows = end - begin;
        const residual = residuals.subarray(0, rows * columns);
        const changes = moved.subarray(0, rows * columns);
        const left = { data: h.data.subarray(begin * channels, end * channels), rows, cols: channels };
        await this.#ort.gemm(left, false, difference, false, residual);
        descentBlock(this.#pool, {
          columns,
          begin,
          end,
          groupSize: grid.groupSize,
          bits: grid.bits,
          residual,
          values,
          codes,
          gram: diagonalBlock(h.data, channels, begin, end),
          scales: rounded.scales,
          zeros: rounded.zeros,
          changes,
        });
        const own = rest.subarray(begin * columns, end * columns);
        addScaled(own, changes, -1, own);
      }
    }
    return { codes, zeros: rounded.zeros, scales: rounded.scales, values: new CpuTensor([channels, columns], values) };
  }

  async refitScales(
    w: Tensor,
    rounded: RoundedWeight,
    gram: Tensor,
    grid: GridSpec,
    passes: number,
  ): Promise<RoundedWeight> {
    const { data: target, rows: channels, cols: columns } = own(w).matrix;
    const h = own(gram).matrix;
    ensure(
      h.rows === channels && h.cols === channels && channels % grid.groupSize === 0,
      'tensor-shape',
      () => `Gram matrix [${h.rows}, ${h.cols}] and groups of ${grid.groupSize} for ${channels} channels`,
    );
    const fitted = await refitScales(
      this.#ort,
      { channels, columns, groupSize: grid.groupSize, target, gram: h.data },
      { ...rounded, values: own(rounded.values).data },
      passes,
    );
    return { ...fitted, values: new CpuTensor([channels, columns], fitted.values) };
  }

  async gptqFactor(h: Tensor, damp: number): Promise<Tensor> {
    const { data, rows } = own(h).matrix;
    return new CpuTensor([rows, rows], await gptqFactor({ pool: this.#pool, ort: this.#ort }, data, rows, damp));
  }

  async solveSymmetric(h: Tensor, b: Tensor, damp: number): Promise<Tensor> {
    const right = own(b).matrix;
    const out = await solveSymmetric(
      { pool: this.#pool, ort: this.#ort },
      own(h).data,
      right.data,
      right.rows,
      right.cols,
      damp,
    );
    return new CpuTensor([right.rows, right.cols], out);
  }
}

/** XᵀX of X [rows, cols]: symmetric, so that the blocks below the diagonal are copies. */
async function gramProduct(
  ort: OrtKernels,
  tensors: TensorPool,
  x: { readonly data: Float32Array; readonly rows: number; readonly cols: number },
  out: Float32Array,
): Promise<void> {
  const { rows, cols } = x;
  const blocks: { tensor: CpuTensor; begin: number; data: Float32Array; rows: number; cols: number }[] = [];
  for (let begin = 0; begin < cols; begin += GRAM_BLOCK) {
    const width = Math.min(GRAM_BLOCK, cols - begin);
    const tensor = tensors.make([rows, width]);
    const { data } = tensor;
    for (let r = 0; r < rows; r++) data.set(x.data.subarray(r * cols + begin, r * cols + begin + width), r * width);
    blocks.push({ tensor, begin, data, rows, cols: width });
  }
  const product = new Float32Array(GRAM_BLOCK * GRAM_BLOCK);
  for (const [i, left] of blocks.entries()) {
    for (const right of blocks.slice(i)) {
      const result = product.subarray(0, left.cols * right.cols);
      await ort.gemm(left, true, right, false, result);
      for (let r = 0; r < left.cols; r++)
        out.set(result.subarray(r * right.cols, (r + 1) * right.cols), (left.begin + r) * cols + right.begin);
      if (right !== left) mirror(result, left, right, cols, out);
    }
  }
  for (const { tensor } of blocks) tensors.free(tensor);
}

/** Rows and columns of a square tile that is transposed at a time: both sides stay in the L1 cache. */
const MIRROR_TILE = 32;

/** Writes the transpose of a block (rows of `left`, columns of `right`) below the diagonal of `out` [n, n]. */
function mirror(
  block: Float32Array,
  left: { readonly begin: number; readonly cols: number },
  right: { readonly begin: number; readonly cols: number },
  n: number,
  out: Float32Array,
): void {
  for (let c0 = 0; c0 < right.cols; c0 += MIRROR_TILE) {
    const c1 = Math.min(right.cols, c0 + MIRROR_TILE);
    for (let r0 = 0; r0 < left.cols; r0 += MIRROR_TILE) {
      const r1 = Math.min(left.cols, r0 + MIRROR_TILE);
      for (let c = c0; c < c1; c++) {
        const to = (right.begin + c) * n + left.begin;
        for (let r = r0; r < r1; r++) out[to + r] = block[r * right.cols + c];
      }
    }
  }
}

/** [begin:end, begin:end] of a square matrix. */
function diagonalBlock(matrix: Float32Array, n: number, begin: number, end: number): Float32Array {
  const size = end - begin;
  const block = new Float32Array(size * size);
  for (let r = 0; r < size; r++) block.set(matrix.subarray((begin + r) * n + begin, (begin + r) * n + end), r * size);
  return block;
}

/** Parameters of a transform, wherever they are. */
function hostParameters(values: Float32Array | Tensor): Float32Array {
  return values instanceof Float32Array ? values : own(values).data;
}

function ownPairwise(handle: TransformHandle): PairwiseTransform {
  if (handle instanceof RowTransform) return handle.source;
  throw new GyreError('backend', 'no pairwise transform of the CPU backend');
}
