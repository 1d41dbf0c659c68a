// Rounding weights onto grids on the GPU: to nearest, GPTQ, coordinate descent. Channel-major [channels, cols]; grids are
// f32 buffers [groups, cols]; codes, zero points and scales are read back once, as one block.
import { ensure } from '../../core/errors.js';
import type { GridSpec, RoundedWeight } from '../../ops/backend.js';
import type { GpuDevice } from './device.js';
import { gemm } from './gemm.js';
import { addScaledKernel, strided } from './kernels/elementwise.js';
import { fakeQuantizeKernel, GRID_COLUMNS, packBytesKernel, packCodesKernel, rangeKernel } from './kernels/grid.js';
import { BLOCK, BLOCK_COLUMNS, descentBlockKernel, gptqBlockKernel } from './kernels/rounding.js';
import { freeTensor, makeTensor, own, type GpuTensor } from './tensor.js';

/** @throws GyreError when groups do not tile the channels. */
export function checkGrid(channels: number, { groupSize }: GridSpec): void {
  ensure(
    groupSize > 0 && channels % groupSize === 0,
    'tensor-shape',
    () => `group size ${groupSize} does not divide ${channels} channels`,
  );
}

/** Sizes of a weight's grids. */
export function gridShape(w: GpuTensor, grid: GridSpec): { groups: number; slots: number; levels: number } {
  const { rows, cols } = w.matrix;
  checkGrid(rows, grid);
  const groups = rows / grid.groupSize;
  return { groups, slots: groups * cols, levels: 2 ** grid.bits - 1 };
}

/** 1 for grids symmetric around zero. */
function isSymmetric(grid: GridSpec): number {
  return Number(grid.symmetric ?? false);
}

/** Which grids to set, and how much of each range to keep. */
interface GridChoice {
  readonly clip?: GPUBuffer;
  /** The same factor for every group; default 1. */
  readonly ratio?: number;
  readonly firstGroup?: number;
  readonly groups?: number;
}

/** Sets grids from the ranges of w. */
export function setGrids(
  gpu: GpuDevice,
  w: GpuTensor,
  grid: GridSpec,
  scales: GPUBuffer,
  zeros: GPUBuffer,
  { clip, ratio = 1, firstGroup = 0, groups = gridShape(w, grid).groups }: GridChoice = {},
): void {
  const { cols } = w.matrix;
  const unused = clip ?? gpu.buffer(16);
  gpu.dispatch(
    rangeKernel,
    { w, clip: unused, scales, zeros },
    {
      cols,
      groupSize: grid.groupSize,
      group0: firstGroup,
      levels: gridShape(w, grid).levels,
      symmetric: isSymmetric(grid),
      clipped: Number(clip !== undefined),
      ratio,
    },
    [Math.ceil(cols / GRID_COLUMNS), groups],
  );
  if (!clip) gpu.release(unused);
}

/** A weight's grids while it is rounded, with the clip factors given for them. */
export class Grids {
  readonly scales: GPUBuffer;
  readonly zeros: GPUBuffer;
  readonly clip: GPUBuffer | undefined;

  constructor(
    readonly gpu: GpuDevice,
    w: GpuTensor,
    readonly grid: GridSpec,
    clip?: Float32Array,
  ) {
    const { slots } = gridShape(w, grid);
    this.scales = gpu.buffer(slots * 4, 'grids');
    this.zeros = gpu.buffer(slots * 4, 'grids');
    if (!clip) return;
    ensure(clip.length === slots, 'tensor-shape', () => `${clip.length} clip factors for ${slots} groups`);
    this.clip = gpu.buffer(slots * 4, 'clip factors');
    gpu.upload(this.clip, clip);
  }

  /** Codes of values on these grids, read back together with the grids; frees the grids. */
  async finish(values: GpuTensor): Promise<RoundedWeight> {
    const { gpu, scales, zeros } = this;
    const { slots } = gridShape(values, this.grid);
    const count = values.elements;
    const codeWords = Math.ceil(count / 4);
    const zeroWords = Math.ceil(slots / 4);
    const packed = gpu.buffer((codeWords + zeroWords) * 4, 'codes');
    const shape = { count, cols: values.matrix.cols, groupSize: this.grid.groupSize };
    gpu.dispatch(packCodesKernel, { values, scales, zeros, out: packed }, shape, strided(codeWords));
    gpu.dispatch(packBytesKernel, { x: zeros, out: packed }, { count: slots, out0: codeWords }, strided(zeroWords));
    const [bytes, scaleBytes] = await Promise.all([
      gpu.read(packed, 0, (codeWords + zeroWords) * 4),
      gpu.read(scales, 0, slots * 4),
    ]);
    gpu.release(packed);
    this.dispose();
    return {
      codes: new Uint8Array(bytes, 0, count),
      zeros: new Uint8Array(bytes, codeWords * 4, slots),
      scales: new Float32Array(scaleBytes),
      values,
    };
  }

  dispose(): void {
    for (const buffer of [this.scales, this.zeros, this.clip]) if (buffer) this.gpu.release(buffer);
  }
}

/** See QuantizationOps.roundToNearest. */
export async function roundToNearest(
  gpu: GpuDevice,
  w: GpuTensor,
  grid: GridSpec,
  clip: Float32Array | undefined,
): Promise<RoundedWeight> {
  const grids = new Grids(gpu, w, grid, clip);
  const { scales, zeros } = grids;
  setGrids(gpu, w, grid, scales, zeros, { clip: grids.clip });
  const values = makeTensor(gpu, w.shape);
  const count = w.elements;
  gpu.dispatch(
    fakeQuantizeKernel,
    { w, scales, zeros, values },
    {
      count,
      first: 0,
      cols: w.matrix.cols,
      groupSize: grid.groupSize,
      levels: gridShape(w, grid).levels,
      difference: 0,
    },
    strided(count),
  );
  return grids.finish(values);
}

/** Blocks of at most {@link BLOCK} channels: whole groups, or parts of one group. */
function blocksOf(channels: number, groupSize: number): { begin: number; rows: number }[] {
  const blocks: { begin: number; rows: number }[] = [];
  const step = groupSize <= BLOCK ? Math.floor(BLOCK / groupSize) * groupSize : groupSize;
  for (let start = 0; start < channels; start += step) {
    const stop = Math.min(channels, start + step);
    for (let begin = start; begin < stop; begin += BLOCK) blocks.push({ begin, rows: Math.min(BLOCK, stop - begin) });
  }
  return blocks;
}

/** See QuantizationOps.gptq. */
export async function gptq(
  gpu: GpuDevice,
  w: GpuTensor,
  factor: GpuTensor,
  grid: GridSpec,
  clip: Float32Array | undefined,
): Promise<RoundedWeight> {
  const { rows: channels, cols } = w.matrix;
  checkSquare(factor, channels, 'GPTQ factor');
  const { levels } = gridShape(w, grid);
  const { groupSize } = grid;
  const grids = new Grids(gpu, w, grid, clip);
  const { scales, zeros } = grids;
  const values = makeTensor(gpu, w.shape);
  gpu.copy(w.buffer, w.offset, values.buffer, 0, w.bytes);
  const errors = gpu.buffer(BLOCK * cols * 4, 'rounding errors');
  const unused = grids.clip ?? gpu.buffer(16);
  const ownGrids = groupSize <= BLOCK;
  for (const { begin, rows } of blocksOf(channels, groupSize)) {
    if (!ownGrids && begin % groupSize === 0)
      setGrids(gpu, values, grid, scales, zeros, { clip: grids.clip, firstGroup: begin / groupSize, groups: 1 });
    gpu.dispatch(
      gptqBlockKernel,
      { w: values, factor, clip: unused, scales, zeros, errors },
      {
        channels,
        cols,
        begin,
        rows,
        groupSize,
        levels,
        symmetric: isSymmetric(grid),
        clipped: Number(grids.clip !== undefined),
        ownGrids: Number(ownGrids),
      },
      [Math.ceil(cols / BLOCK_COLUMNS)],
    );
    spreadBlock(gpu, factor, errors, values, channels, cols, begin, rows);
  }
  gpu.release(errors);
  if (!grids.clip) gpu.release(unused);
  return grids.finish(values);
}

/** The lazy update: rows past the block lose matrix[block, after]ᵀ · changes, in one product. */
function spreadBlock(
  gpu: GpuDevice,
  matrix: GpuTensor,
  changes: GPUBuffer,
  target: GpuTensor,
  channels: number,
  cols: number,
  begin: number,
  rows: number,
): void {
  const end = begin + rows;
  gemm(gpu, {
    a: matrix,
    offsetA: begin * channels + end,
    lda: channels,
    transposeA: true,
    b: changes,
    c: target,
    offsetC: end * cols,
    m: channels - end,
    n: cols,
    k: rows,
    alpha: -1,
    accumulate: true,
  });
}

/** See QuantizationOps.descend. */
export async function descend(
  gpu: GpuDevice,
  w: GpuTensor,
  rounded: RoundedWeight,
  gram: GpuTensor,
  grid: GridSpec,
  sweeps: number,
): Promise<RoundedWeight> {
  const { rows: channels, cols } = w.matrix;
  checkSquare(gram, channels, 'Gram matrix');
  const { levels } = gridShape(w, grid);
  const grids = new Grids(gpu, w, grid);
  const { scales, zeros } = grids;
  gpu.upload(scales, rounded.scales);
  gpu.upload(zeros, Float32Array.from(rounded.zeros));
  const start = own(rounded.values);
  const values = makeTensor(gpu, w.shape);
  gpu.copy(start.buffer, start.offset, values.buffer, 0, values.bytes);
  const difference = makeTensor(gpu, w.shape);
  const residual = makeTensor(gpu, w.shape);
  const changes = gpu.buffer(BLOCK * cols * 4, 'changes of a block');
  const count = w.elements;
  for (let sweep = 0; sweep < sweeps; sweep++) {
    gpu.dispatch(
      addScaledKernel,
      { acc: w, x: values, out: difference },
      { count, scale: -1, rest: 0 },
      strided(count),
    );
    gemm(gpu, { a: gram, b: difference, c: residual, m: channels, n: cols, k: channels });
    for (const { begin, rows } of blocksOf(channels, grid.groupSize)) {
      gpu.dispatch(
        descentBlockKernel,
        { residual, gram, scales, zeros, values, changes },
        { channels, cols, begin, rows, groupSize: grid.groupSize, levels },
        [Math.ceil(cols / BLOCK_COLUMNS)],
      );
      spreadBlock(gpu, gram, changes, residual, channels, cols, begin, rows);
    }
  }
  freeTensor(gpu, difference);
  freeTensor(gpu, residual);
  gpu.release(changes);
  return grids.finish(values);
}

/** @throws GyreError unless the matrix is [channels, channels]. */
export function checkSquare(matrix: GpuTensor, channels: number, what: string): void {
  const { rows, cols } = matrix.matrix;
  ensure(
    rows === channels && cols === channels,
    'tensor-shape',
    () => `${what} [${rows}, ${cols}] for ${channels} channels`,
  );
}
