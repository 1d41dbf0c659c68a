// Tensors of the CPU backend: a Float32Array in ordinary memory, which ONNX Runtime reads and writes without copying.
import { GyreError } from '../../core/errors.js';
import { elementCount } from '../../core/tensor.js';
import type { Tensor } from '../../ops/backend.js';

/** See {@link Tensor}. */
export class CpuTensor implements Tensor {
  readonly shape: readonly number[];
  readonly data: Float32Array;

  constructor(shape: readonly number[], data: Float32Array = new Float32Array(elementCount(shape))) {
    if (data.length !== elementCount(shape))
      throw new GyreError('tensor-shape', `shape [${shape.join(', ')}] does not fit ${data.length} elements`);
    this.shape = shape;
    this.data = data;
  }

  /** Rows and columns of a matrix. */
  get matrix(): { data: Float32Array; rows: number; cols: number } {
    const [rows, cols] = this.shape;
    if (this.shape.length !== 2)
      throw new GyreError('tensor-shape', `expected a matrix, found shape [${this.shape.join(', ')}]`);
    return { data: this.data, rows, cols };
  }
}

/** The backend's own tensor behind a handle. */
export function own(tensor: Tensor): CpuTensor {
  if (tensor instanceof CpuTensor) return tensor;
  throw new GyreError('backend', 'a tensor of another backend was given to the CPU backend');
}
