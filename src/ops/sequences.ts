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
