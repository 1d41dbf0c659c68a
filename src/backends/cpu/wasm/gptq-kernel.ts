// GPTQ block by block: which rows to take together, and the kernel that rounds them.
import { ensure } from '../../../core/errors.js';
import type { KernelPool } from '../pool.js';
import { checkGrid, checkLength, fakeQuantize, TILE } from './transform-kernels.js';

/** Most rows of a block: two tiles of 128 × 32 floats fit in a 32 KiB L1 cache with little else. */
const MAX_BLOCK = 128;

/** Arguments of {@link gptqBlock}. */
export interface GptqBlockArguments {
  /** [channels, columns]; rows [begin, end) are replaced by their rounded values. */
  readonly w: Float32Array;
  readonly columns: number;
  readonly begin: number;
  readonly end: number;
  /** U[begin:end, begin:end], the diagonal block of the upper Cholesky factor of H⁻¹. */
  readonly factor: Float32Array;
  readonly groupSize: number;
  readonly bits: number;
  readonly symmetric?: boolean;
  /** [channels / groupSize, columns]: multiplies ranges. */
  readonly clip?: Float32Array;
  /** Written: [channels, columns]. */
  readonly codes: Uint8Array;
  /** Written when a group is reached, read in its later blocks: [channels / groupSize, columns]. */
  readonly scales: Float32Array;
  readonly zeros: Uint8Array;
  /** Written: [end − begin, columns], (w − q) / U_jj. The caller subtracts U[begin:end, end:]ᵀ · errors from the rows after. */
  readonly errors: Float32Array;
}

/** Row ranges for {@link gptqBlock}: whole groups, or pieces of one group when groups are longer than a block. */
export function gptqBlocks(channels: number, groupSize: number): [begin: number, end: number][] {
  checkGrid(channels, groupSize);
  const blocks: [number, number][] = [];
  const step = groupSize <= MAX_BLOCK ? Math.floor(MAX_BLOCK / groupSize) * groupSize : groupSize;
  for (let start = 0; start < channels; start += step) {
    const stop = Math.min(channels, start + step);
    for (let begin = start; begin < stop; begin += MAX_BLOCK) blocks.push([begin, Math.min(stop, begin + MAX_BLOCK)]);
  }
  return blocks;
}

/** Rounds one block of rows in order, each row's error spread over the later rows of the block. */
export function gptqBlock(pool: KernelPool, args: GptqBlockArguments): void {
  const { w, columns, begin, end, groupSize, bits, symmetric = false } = args;
  const block = end - begin;
  const group = Math.floor(begin / groupSize);
  const whole = begin % groupSize === 0 && end % groupSize === 0;
  ensure(
    block > 0 && block <= MAX_BLOCK && (whole || end <= (group + 1) * groupSize),
    'backend',
    () => `GPTQ block [${begin}, ${end}) does not fit groups of ${groupSize}`,
  );
  checkLength('factor', args.factor, block * block);
  checkLength('errors', args.errors, block * columns);
  const { arena } = pool;
  const groups = whole ? block / groupSize : 1;
  const first = group * columns;
  const last = first + groups * columns;
  if (!whole && begin % groupSize === 0) {
    // The grid of a group longer than a block comes from all its rows as they are now, before any of them is rounded.
    const rows = w.subarray(begin * columns, (begin + groupSize) * columns);
    const grid = fakeQuantize(pool, rows, columns, groupSize, bits, args.clip?.subarray(first, last), {}, symmetric);
    args.scales.set(grid.scales, first);
    args.zeros.set(grid.zeros, first);
  }
  pool.ensureScratch(1024 + 2 * block * TILE * 4);
  arena.scoped(() => {
    const rows = w.subarray(begin * columns, end * columns);
    const matrix = arena.pushF32(rows);
    const errors = arena.scratch(rows.length * 4);
    const codes = arena.scratch(rows.length);
    const scales = arena.pushF32(args.scales.subarray(first, last));
    const zeros = arena.scratch(groups * columns);
    arena.u8.set(args.zeros.subarray(first, last), zeros);
    const clip = args.clip && whole ? arena.pushF32(args.clip.subarray(first, last)) : 0;
    const factor = arena.pushF32(args.factor);
    pool.run('gptqBlock', Math.ceil(columns / TILE), [
      matrix,
      errors,
      codes,
      scales,
      zeros,
      clip,
      factor,
      block,
      columns,
      whole ? groupSize : block,
      whole ? 0 : 1,
      2 ** bits - 1,
      symmetric ? 1 : 0,
    ]);
    arena.readF32(matrix, rows);
    arena.readF32(errors, args.errors);
    args.codes.set(arena.u8.subarray(codes, codes + rows.length), begin * columns);
    arena.readF32(scales, args.scales.subarray(first, last));
    args.zeros.set(arena.u8.subarray(zeros, zeros + groups * columns), first);
  });
}
