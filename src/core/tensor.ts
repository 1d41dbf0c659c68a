// Tensors in host memory: what formats read and write, and what goes into and comes out of a backend.
import { bytesPerElement, toFloat32, typedArray, type DType, type TypedArray } from './dtype.js';
import { ensure } from './errors.js';

/** A dense row-major tensor in host memory. */
export interface HostTensor {
  readonly dtype: DType;
  readonly shape: readonly number[];
  readonly data: TypedArray;
}

/** Number of elements of a shape. */
export function elementCount(shape: readonly number[]): number {
  return shape.reduce((a, b) => a * b, 1);
}

/** Bytes a dense tensor takes. */
export function byteLength(dtype: DType, shape: readonly number[]): number {
  return elementCount(shape) * bytesPerElement(dtype);
}

/** A host tensor over `data`, or over new zeros. */
export function hostTensor(dtype: DType, shape: readonly number[], data?: TypedArray): HostTensor {
  const n = elementCount(shape);
  ensure(
    data === undefined || data.length === n,
    'tensor-shape',
    () => `tensor of shape [${shape.join(', ')}] needs ${n} elements, found ${data?.length}`,
  );
  return { dtype, shape, data: data ?? typedArray(dtype, n) };
}

/** The elements as f32; no copy when they are f32 already. */
export function floats(tensor: HostTensor): Float32Array {
  return toFloat32(tensor.data, tensor.dtype);
}

/** Raw little-endian bytes of a tensor (a view, not a copy). */
export function bytesOf(data: TypedArray): Uint8Array {
  return new Uint8Array(data.buffer as ArrayBuffer, data.byteOffset, data.byteLength);
}

/** Index of the first NaN or infinity, or -1. */
export function firstNonFinite(data: Float32Array | Float64Array): number {
  // A sum is finite only if (almost always) every term is: one pass without a branch per element, then a search.
  let sum = 0;
  for (let i = 0; i < data.length; i++) sum += data[i] * 0;
  if (sum === 0) return -1;
  return data.findIndex((v) => !Number.isFinite(v));
}
