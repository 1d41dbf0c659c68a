// Hadamard transforms on the host, in float64: choosing one for a number of channels, applying it fast and in place, its
// inverse, and the randomised transform x → H·(signs ⊙ x) / √n that is folded into weights.
import { ensure } from '../core/errors.js';
import type { Rng } from '../core/rng.js';
import type { HadamardTransform } from '../ops/backend.js';
import { findHadamardBase, hadamardBase } from './hadamard-matrix.js';

/** Arguments of {@link hadamardTransform}. */
export interface HadamardOptions {
  /** Channels between two neighbours of the transformed axis; default 1. */
  readonly inner?: number;
  /** Order of the matrix; default channels / inner. */
  readonly order?: number;
}

/** A Hadamard transform of rows of `channels` values. @throws GyreError `unsupported` when there is no matrix of the order. */
export function hadamardTransform(channels: number, options: HadamardOptions = {}): HadamardTransform {
  const { inner = 1, order = channels / inner } = options;
  ensure(
    channels % (order * inner) === 0,
    'tensor-shape',
    () => `${channels} channels are no multiple of order ${order} · inner ${inner}`,
  );
  return { kind: 'hadamard', channels, order, inner, base: hadamardBase(order).signs };
}

/** The largest order of a Hadamard matrix that tiles `channels`: the channels themselves, or a divisor. */
export function largestHadamardOrder(channels: number): number {
  for (let parts = 1; parts < channels; parts++)
    if (channels % parts === 0 && findHadamardBase(channels / parts)) return channels / parts;
  return 1;
}

/**
 * H·x / √n (or Hᵀ·x / √n) along the transformed axis of every row, in place. x [rows, channels]. O(log p + m) additions an
 * element, for a base of order m and p = n / m.
 */
export function applyHadamard<T extends Float64Array | Float32Array>(
  x: T,
  transform: Omit<HadamardTransform, 'kind'>,
  direction: 'forward' | 'inverse' = 'forward',
): T {
  const { channels, order, inner, base } = transform;
  ensure(x.length % channels === 0, 'tensor-shape', () => `${x.length} values are no rows of ${channels} channels`);
  const m = Math.sqrt(base.length);
  const run = order * inner;
  const width = run / m;
  const scale = 1 / Math.sqrt(order);
  const mixed = new Float64Array(m > 1 ? run : 0);
  for (let first = 0; first < x.length; first += run) {
    for (let d = inner; d < width; d *= 2) {
      for (let block = first; block < first + run; block += 2 * d) {
        for (let at = block; at < block + d; at++) {
          const [a, b] = [x[at], x[at + d]];
          x[at] = a + b;
          x[at + d] = a - b;
        }
      }
    }
    if (m === 1) {
      for (let at = first; at < first + run; at++) x[at] *= scale;
      continue;
    }
    mixed.fill(0);
    for (let a = 0; a < m; a++) {
      for (let c = 0; c < m; c++) {
        const sign = scale * (direction === 'forward' ? base[a * m + c] : base[c * m + a]);
        for (let i = 0; i < width; i++) mixed[a * width + i] += sign * x[first + c * width + i];
      }
    }
    x.set(mixed, first);
  }
  return x;
}

/** A randomised Hadamard transform x → H·(signs ⊙ x) / √n of vectors of n channels. */
export interface RandomHadamard {
  readonly transform: HadamardTransform;
  /** [channels], ±1. */
  readonly signs: Int8Array;
}

/** A randomised Hadamard transform of vectors of `channels`; block-diagonal where no matrix has that order. */
export function randomHadamard(channels: number, rng: Rng): RandomHadamard {
  return {
    transform: hadamardTransform(channels, { order: largestHadamardOrder(channels) }),
    signs: Int8Array.from({ length: channels }, () => (rng.uniform() < 0.5 ? -1 : 1)),
  };
}

/** The randomised transform (or its inverse) of every row of x [rows, channels], in place. */
export function rotateRows(
  x: Float64Array,
  { transform, signs }: RandomHadamard,
  direction: 'forward' | 'inverse' = 'forward',
): Float64Array {
  const flip = (): void => {
    for (let at = 0; at < x.length; at++) x[at] *= signs[at % signs.length];
  };
  if (direction === 'forward') flip();
  applyHadamard(x, transform, direction);
  if (direction === 'inverse') flip();
  return x;
}

/** The randomised transform of every column of x [channels, columns], in place: outputs of a linear [out, in]. */
export function rotateColumns(x: Float64Array, { transform, signs }: RandomHadamard): Float64Array {
  const columns = x.length / signs.length;
  for (let at = 0; at < x.length; at++) x[at] *= signs[Math.floor(at / columns)];
  return applyHadamard(x, { ...transform, channels: x.length, inner: columns * transform.inner });
}
