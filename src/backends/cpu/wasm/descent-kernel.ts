// Coordinate descent's inner block, staged in the arena.
import { ensure } from '../../../core/errors.js';
import type { KernelPool } from '../pool.js';
import { checkLength, TILE } from './transform-kernels.js';

/** Arguments of {@link descentBlock}: rows [begin, end) of matrices [channels, columns]. */
export interface DescentBlockArguments {
  readonly columns: number;
  readonly begin: number;
  readonly end: number;
  readonly groupSize: number;
  readonly bits: number;
  /** H·(W − Ŵ) of the block's rows [end − begin, columns]. */
  readonly residual: Float32Array;
  /** Ŵ [channels, columns]; the block's rows are moved. */
  readonly values: Float32Array;
  /** [channels, columns]; the block's rows are written. */
  readonly codes: Uint8Array;
  /** H[begin:end, begin:end]. */
  readonly gram: Float32Array;
  /** [channels / groupSize, columns]. */
  readonly scales: Float32Array;
  readonly zeros: Uint8Array;
  /** Written: new − old values [end − begin, columns]. */
  readonly changes: Float32Array;
}

/** Moves one block of rows to their optima on the grid, one row after the other. */
export function descentBlock(pool: KernelPool, args: DescentBlockArguments): void {
  const { columns, begin, end, groupSize, bits } = args;
  const block = end - begin;
  const whole = begin % groupSize === 0 && end % groupSize === 0;
  const group = Math.floor(begin / groupSize);
  ensure(
    block > 0 && (whole || end <= (group + 1) * groupSize),
    'backend',
    () => `descent block [${begin}, ${end}) does not fit groups of ${groupSize}`,
  );
  checkLength('residual', args.residual, block * columns);
  checkLength('gram', args.gram, block * block);
  checkLength('changes', args.changes, block * columns);
  const groups = whole ? block / groupSize : 1;
  const { arena } = pool;
  pool.ensureScratch(1024 + 3 * block * TILE * 4);
  arena.scoped(() => {
    const rows = args.values.subarray(begin * columns, end * columns);
    const residual = arena.pushF32(args.residual);
    const values = arena.pushF32(rows);
    const codes = arena.scratch(rows.length);
    const changes = arena.scratch(rows.length * 4);
    const scales = arena.pushF32(args.scales.subarray(group * columns, (group + groups) * columns));
    const zeros = arena.scratch(groups * columns);
    arena.u8.set(args.zeros.subarray(group * columns, (group + groups) * columns), zeros);
    const gram = arena.pushF32(args.gram);
    const shape = [block, columns, whole ? groupSize : block, 2 ** bits - 1];
    pool.run('descentBlock', Math.ceil(columns / TILE), [
      residual,
      values,
      codes,
      changes,
      scales,
      zeros,
      gram,
      ...shape,
    ]);
    arena.readF32(values, rows);
    arena.readF32(changes, args.changes);
    args.codes.set(arena.u8.subarray(codes, codes + rows.length), begin * columns);
  });
}
