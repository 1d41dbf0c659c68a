// Tensors of the CPU backend: a Float32Array in ordinary memory, which ONNX Runtime reads and writes without copying.
// Large buffers are used again once freed: fresh ones would cost a page fault per 4 KB, more than many ops themselves.
import { GyreError } from '../../core/errors.js';
import { elementCount } from '../../core/tensor.js';
import type { Tensor } from '../../ops/backend.js';

/** Buffers below this many elements are left to the garbage collector. */
const POOLED_ELEMENTS = 16_384;
/** Most bytes of free buffers kept. */
const POOL_BYTES = 512 * 1024 * 1024;

/** See {@link Tensor}. */
export class CpuTensor implements Tensor {
  readonly shape: readonly number[];
  readonly data: Float32Array;
  /** Whether `data` is this tensor's alone, to be used again when freed; views and constants share theirs. */
  readonly owned: boolean;
  freed = false;

  constructor(shape: readonly number[], data: Float32Array, owned = false) {
    if (data.length !== elementCount(shape)) {
      throw new GyreError('tensor-shape', `shape [${shape.join(', ')}] does not fit ${data.length} elements`);
    }
    this.shape = shape;
    this.data = data;
    this.owned = owned;
  }

  /** Rows and columns of a matrix. */
  get matrix(): { data: Float32Array; rows: number; cols: number } {
    const [rows, cols] = this.shape;
    if (this.shape.length !== 2) {
      throw new GyreError('tensor-shape', `expected a matrix, found shape [${this.shape.join(', ')}]`);
    }
    return { data: this.data, rows, cols };
  }
}

/** The backend's own tensor behind a handle. */
export function own(tensor: Tensor): CpuTensor {
  if (!(tensor instanceof CpuTensor))
    throw new GyreError('backend', 'a tensor of another backend was given to the CPU backend');
  if (tensor.freed) throw new GyreError('backend', 'a tensor was used after it was freed');
  return tensor;
}

/** Makes tensors and takes their buffers back. */
export class TensorPool {
  readonly #free = new Map<number, Float32Array[]>();
  #bytes = 0;

  /** A tensor with undefined contents: the op that asks for it writes all of it. */
  make(shape: readonly number[]): CpuTensor {
    const length = elementCount(shape);
    const buffer = this.#free.get(length)?.pop();
    if (buffer) this.#bytes -= buffer.byteLength;
    return new CpuTensor(shape, buffer ?? new Float32Array(length), true);
  }

  /** Ends a tensor's life. Freeing one twice does nothing. */
  free(tensor: Tensor | undefined): void {
    if (!(tensor instanceof CpuTensor) || tensor.freed) return;
    tensor.freed = true;
    const { data, owned } = tensor;
    if (!owned || data.length < POOLED_ELEMENTS || this.#bytes + data.byteLength > POOL_BYTES) return;
    const list = this.#free.get(data.length);
    if (list) list.push(data);
    else this.#free.set(data.length, [data]);
    this.#bytes += data.byteLength;
  }

  /** Lets go of all free buffers. */
  clear(): void {
    this.#free.clear();
    this.#bytes = 0;
  }
}
