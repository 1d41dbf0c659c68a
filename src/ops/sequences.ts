// Sequences of a batch that stand at different positions: the checks every backend shares.
import { ensure } from '../core/errors.js';
import type { KvCacheHandle, PerSequence, SequenceCopy } from './backend.js';

/** The start of each of `batch` sequences. @throws GyreError `tensor-shape` for a list of another length. */
export function startsOf(start: PerSequence, batch: number): Int32Array {
  if (typeof start === 'number') return new Int32Array(batch).fill(start);
  ensure(start.length === batch, 'tensor-shape', () => `${start.length} starts were given for ${batch} sequences`);
  return start;
}

/** Checks the arguments of `copySequences`. @throws GyreError `tensor-shape`. */
export function checkCopies(from: KvCacheHandle, to: KvCacheHandle, copies: readonly SequenceCopy[]): void {
  const read = new Set(copies.map((copy) => copy.from));
  for (const copy of copies) {
    const fits = copy.from >= 0 && copy.from < from.batch && copy.to >= 0 && copy.to < to.batch && copy.tokens >= 0;
    ensure(fits, 'tensor-shape', () => `there is no sequence ${copy.from} or ${copy.to} to copy`);
    ensure(
      copy.tokens <= Math.min(from.capacity, to.capacity),
      'context-length',
      () => `${copy.tokens} tokens do not fit caches of ${from.capacity} and ${to.capacity}`,
    );
    ensure(from !== to || !read.has(copy.to), 'tensor-shape', () => `sequence ${copy.to} is both read and written`);
  }
}

/**
 * The first row of each row's tree in a forest of packed tokens; see `AttentionOptions.ends`.
 * @throws GyreError `tensor-shape` where ends are not nested or positions are not the tokens' depths.
 */
export function forestRoots(ends: Int32Array, positions: PerSequence): Int32Array {
  const rows = ends.length;
  const depths = startsOf(positions, rows);
  const roots = new Int32Array(rows);
  /** Rows that the present one continues, outermost first. */
  const path: number[] = [];
  for (let row = 0; row < rows; row++) {
    while (path.length > 0 && ends[path[path.length - 1]] <= row) path.pop();
    const limit = path.length > 0 ? ends[path[path.length - 1]] : rows;
    ensure(
      ends[row] > row && ends[row] <= limit,
      'tensor-shape',
      () => `row ${row} of a packed forest ends at ${ends[row]}, not between ${row + 1} and ${limit}`,
    );
    ensure(
      depths[row] === path.length,
      'tensor-shape',
      () => `row ${row} of a packed forest is at position ${depths[row]}, not ${path.length}`,
    );
    path.push(row);
    roots[row] = path[0];
  }
  return roots;
}
