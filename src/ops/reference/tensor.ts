// Tensors of the reference backend: float64 values on the host, checked at every use.
import type { Tensor } from '../backend.js';
import { ensure, GyreError } from '../../core/errors.js';
import { elementCount, floats, type HostTensor } from '../../core/tensor.js';

/** Values shared by a tensor and its views; freed once for all of them. */
interface Storage {
  freed: boolean;
}

/** A dense row-major float64 tensor. */
export class ReferenceTensor implements Tensor {
  readonly shape: readonly number[];
  readonly #values: Float64Array;
  readonly #storage: Storage;
  readonly #isView: boolean;

  constructor(shape: readonly number[], values: Float64Array, parent?: ReferenceTensor) {
    ensure(
      values.length === elementCount(shape),
      'tensor-shape',
      () => `tensor of shape [${shape.join(', ')}] needs ${elementCount(shape)} elements, found ${values.length}`,
    );
    this.shape = shape;
    this.#values = values;
    this.#storage = parent ? parent.#storage : { freed: false };
    this.#isView = parent !== undefined;
  }

  /** The values; a use after free is a bug of the caller and throws. */
  get values(): Float64Array {
    ensure(!this.#storage.freed, 'backend', () => `tensor [${this.shape.join(', ')}] was used after it was freed`);
    return this.#values;
  }

  /** Freeing a view leaves its parent alone. */
  free(): void {
    if (!this.#isView) this.#storage.freed = true;
  }
}

/** The reference tensor behind an opaque one. */
export function own(tensor: Tensor): ReferenceTensor {
  if (tensor instanceof ReferenceTensor) return tensor;
  throw new GyreError('backend', 'this tensor belongs to another backend: download it and upload it here');
}

/** The float64 values of a reference tensor, for tests that need more than download()'s f32. */
export function readF64(tensor: Tensor): Float64Array {
  return own(tensor).values.slice();
}

/** [rows, columns] of a two-dimensional tensor. */
export function matrixShape(tensor: Tensor, what: string): readonly [rows: number, columns: number] {
  ensure(
    tensor.shape.length === 2,
    'tensor-shape',
    () => `${what}: expected a matrix, found [${tensor.shape.join(', ')}]`,
  );
  return [tensor.shape[0], tensor.shape[1]];
}

/** Throws unless `found` is `expected`. */
export function expectSize(found: number, expected: number, what: string): void {
  ensure(found === expected, 'tensor-shape', () => `${what}: expected ${expected}, found ${found}`);
}

/** Host floats as float64; f64 data keeps all its bits (the other backends narrow it to f32). */
export function hostValues(tensor: HostTensor): Float64Array {
  return tensor.dtype === 'f64' ? (tensor.data as Float64Array).slice() : Float64Array.from(floats(tensor));
}
