// The Hadamard transform in float64: the dense matrix, entry by entry, times each vector along the transformed axis.
import type { HadamardTransform, TransformHandle } from '../backend.js';
import { ensure } from '../../core/errors.js';
import { expectSize } from './tensor.js';

/** A Hadamard transform of a backend that reads it as it is. */
export class ReferenceHadamard implements TransformHandle {
  readonly channels: number;

  constructor(readonly transform: HadamardTransform) {
    this.channels = transform.channels;
    checkHadamard(transform);
  }
}

/** Shapes and entries; that B·Bᵀ = m·I is the business of transforms/hadamard.ts. */
export function checkHadamard({ channels, order, inner, base }: HadamardTransform): void {
  const m = Math.sqrt(base.length);
  const power = order / m;
  ensure(
    Number.isInteger(m) && m >= 1 && Number.isInteger(power) && Number.isInteger(Math.log2(power)),
    'tensor-shape',
    () =>
      `a Hadamard transform of order ${order} needs a base matrix [m, m] with m · 2ᵏ = ${order}, found ${base.length} entries`,
  );
  ensure(
    inner >= 1 && channels >= 1 && channels % (order * inner) === 0,
    'tensor-shape',
    () => `${channels} channels are no multiple of order ${order} · inner ${inner} of a Hadamard transform`,
  );
  ensure(
    base.every((sign) => sign === 1 || sign === -1),
    'tensor-shape',
    'the base matrix of a Hadamard transform has entries other than 1 and −1',
  );
}

/** Entry of H = B ⊗ S. */
export function hadamardEntry({ order, base }: HadamardTransform, row: number, column: number): number {
  const m = Math.sqrt(base.length);
  const p = order / m;
  let common = (row % p) & (column % p);
  let sign: number = base[Math.floor(row / p) * m + Math.floor(column / p)];
  for (; common > 0; common >>>= 1) if (common & 1) sign = -sign;
  return sign;
}

/** H·x / √n, or with 'inverse' Hᵀ·x / √n, along the transformed axis of every row of x [rows, channels]. */
export function hadamardRows(
  x: Float64Array,
  transform: HadamardTransform,
  direction: 'forward' | 'inverse' = 'forward',
): Float64Array {
  const { channels, order, inner } = transform;
  expectSize(x.length % channels, 0, 'rest of rows of a Hadamard transform');
  const y = new Float64Array(x.length);
  const root = Math.sqrt(order);
  const matrix = Float64Array.from({ length: order * order }, (_, at) =>
    direction === 'forward'
      ? hadamardEntry(transform, Math.floor(at / order), at % order)
      : hadamardEntry(transform, at % order, Math.floor(at / order)),
  );
  for (let first = 0; first < x.length; first += order * inner) {
    for (let c = 0; c < inner; c++) {
      for (let i = 0; i < order; i++) {
        let sum = 0;
        for (let j = 0; j < order; j++) sum += matrix[i * order + j] * x[first + j * inner + c];
        y[first + i * inner + c] = sum / root;
      }
    }
  }
  return y;
}
