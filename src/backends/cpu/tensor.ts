// Tensors of the CPU backend. Those of many rows are a Float32Array in ordinary memory, which ONNX Runtime reads and writes
// without copying; those of a few rows (decoding) lie in the arena, where our kernels use them in place.
// Large buffers are used again once freed: fresh ones would cost a page fault per 4 KB, more than many ops themselves.
import { GyreError } from '../../core/errors.js';
import { elementCount } from '../../core/tensor.js';
import type { Tensor } from '../../ops/backend.js';
import type { Arena, ArenaFloats, Floats } from './kernels.js';

/** Buffers below this many elements are left to the garbage collector. */
const POOLED_ELEMENTS = 16_384;
/** Most bytes of free buffers kept. */
const POOL_BYTES = 512 * 1024 * 1024;

/** See {@link Tensor}. */
export class CpuTensor implements Tensor {
  readonly shape: readonly number[];
  /** Whether the floats are this tensor's alone, to be used again when freed; views and constants share theirs. */
  readonly owned: boolean;
  freed = false;
  #floats: Floats;
  readonly #arena: Arena | undefined;

  /** `arena` goes with floats that lie in it. */
  constructor(shape: readonly number[], floats: Floats, owned = false, arena?: Arena) {
    if (floats.length !== elementCount(shape)) {
      throw new GyreError('tensor-shape', `shape [${shape.join(', ')}] does not fit ${floats.length} elements`);
    }
    this.shape = shape;
    this.owned = owned;
    this.#floats = floats;
    this.#arena = arena;
  }

  /** What kernels read and write, wherever it lies. */
  get floats(): Floats {
    return this.#floats;
  }

  /** The floats as an ordinary array; a tensor in the arena moves out of it for good. */
  get data(): Float32Array {
    const floats = this.#floats;
    if (floats instanceof Float32Array) return floats;
    const arena = this.#arena as Arena;
    const data = arena.view(floats).slice();
    arena.free(floats.pointer);
    this.#floats = data;
    return data;
  }

  /** A copy of the floats; a tensor in the arena stays there. */
  copy(): Float32Array {
    const floats = this.#floats;
    return floats instanceof Float32Array ? floats.slice() : (this.#arena as Arena).view(floats).slice();
  }

  /** Rows and columns of a matrix. */
  get size(): { rows: number; cols: number } {
    const [rows, cols] = this.shape;
    if (this.shape.length !== 2) {
      throw new GyreError('tensor-shape', `expected a matrix, found shape [${this.shape.join(', ')}]`);
    }
    return { rows, cols };
  }

  /** A matrix as an ordinary array. */
  get matrix(): { data: Float32Array; rows: number; cols: number } {
    return { ...this.size, data: this.data };
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
  readonly #arena: Arena;
  readonly #free = new Map<number, Float32Array[]>();
  #bytes = 0;

  constructor(arena: Arena) {
    this.#arena = arena;
  }

  /** A tensor with undefined contents: the op that asks for it writes all of it. */
  make(shape: readonly number[]): CpuTensor {
    const length = elementCount(shape);
    const buffer = this.#free.get(length)?.pop();
    if (buffer) this.#bytes -= buffer.byteLength;
    return new CpuTensor(shape, buffer ?? new Float32Array(length), true);
  }

  /** The same in the arena, for ops of our own kernels. */
  makeResident(shape: readonly number[]): CpuTensor {
    const length = elementCount(shape);
    const floats: ArenaFloats = { pointer: this.#arena.alloc(length * 4), length };
    return new CpuTensor(shape, floats, true, this.#arena);
  }

  /** Ends a tensor's life. Freeing one twice does nothing. */
  free(tensor: Tensor | undefined): void {
    if (!(tensor instanceof CpuTensor) || tensor.freed) return;
    tensor.freed = true;
    const { floats, owned } = tensor;
    if (!owned) return;
    if (!(floats instanceof Float32Array)) return this.#arena.free(floats.pointer);
    if (floats.length < POOLED_ELEMENTS || this.#bytes + floats.byteLength > POOL_BYTES) return;
    const list = this.#free.get(floats.length);
    if (list) list.push(floats);
    else this.#free.set(floats.length, [floats]);
    this.#bytes += floats.byteLength;
  }

  /** Lets go of all free buffers. */
  clear(): void {
    this.#free.clear();
    this.#bytes = 0;
  }
}
