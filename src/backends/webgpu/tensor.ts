// Tensors of the WebGPU backend: f32, row-major, in a pooled GPU buffer or in a view of another's.
import { GyreError } from '../../core/errors.js';
import { elementCount } from '../../core/tensor.js';
import type { Tensor } from '../../ops/backend.js';
import type { BufferSlice, GpuDevice } from './device.js';

/** See {@link Tensor}. */
export class GpuTensor implements Tensor, BufferSlice {
  readonly shape: readonly number[];
  readonly buffer: GPUBuffer;
  readonly offset: number;
  /** Whether freeing gives the buffer back; views do not. */
  readonly owned: boolean;
  freed = false;

  constructor(shape: readonly number[], buffer: GPUBuffer, options: { offset?: number; owned?: boolean } = {}) {
    this.shape = shape;
    this.buffer = buffer;
    this.offset = options.offset ?? 0;
    this.owned = options.owned ?? true;
  }

  get elements(): number {
    return elementCount(this.shape);
  }

  get bytes(): number {
    return this.elements * 4;
  }

  /** Rows and columns of a matrix. */
  get matrix(): { rows: number; cols: number } {
    const [rows, cols] = this.shape;
    if (this.shape.length !== 2)
      throw new GyreError('tensor-shape', `expected a matrix, found shape [${this.shape.join(', ')}]`);
    return { rows, cols };
  }
}

/** The backend's own tensor behind a handle. */
export function own(tensor: Tensor): GpuTensor {
  if (!(tensor instanceof GpuTensor))
    throw new GyreError('backend', 'a tensor of another backend was given to the WebGPU backend');
  if (tensor.freed) throw new GyreError('backend', 'a tensor was used after it was freed');
  return tensor;
}

/** A tensor with undefined contents: the op that asks for it writes all of it. */
export function makeTensor(gpu: GpuDevice, shape: readonly number[]): GpuTensor {
  return new GpuTensor(shape, gpu.buffer(elementCount(shape) * 4, `a tensor of shape [${shape.join(', ')}]`));
}

/** Ends a tensor's life. Freeing one twice does nothing. */
export function freeTensor(gpu: GpuDevice, tensor: Tensor | undefined): void {
  if (!(tensor instanceof GpuTensor) || tensor.freed) return;
  tensor.freed = true;
  if (tensor.owned) gpu.release(tensor.buffer);
}

/** Copies values out, row-major. */
export async function downloadTensor(gpu: GpuDevice, tensor: Tensor): Promise<Float32Array> {
  const { buffer, offset, bytes } = own(tensor);
  return bytes === 0 ? new Float32Array(0) : new Float32Array(await gpu.read(buffer, offset, bytes));
}

/** Spreads `count` workgroups over x and y, since x holds 65535 at most; kernels undo it with `linearGroup`. */
export function spread(count: number): readonly [number, number] {
  const y = Math.ceil(count / 65535);
  return [Math.ceil(count / y), y];
}

/** Workgroups of 256 threads for kernels that stride over `count` elements: enough to fill any GPU. */
export function elementGroups(count: number): readonly [number] {
  return [Math.min(4096, Math.ceil(count / 256))];
}

/** WGSL: the index of this workgroup under {@link spread} (may exceed the count: check it). */
export const LINEAR_GROUP = `fn linearGroup(id: vec3<u32>, count: vec3<u32>) -> u32 { return id.y * count.x + id.x; }`;
