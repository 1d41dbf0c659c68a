// Tensors of the WebGPU backend: row-major, in a pooled GPU buffer or in a view of another's. f32, or f16 for activations on the fast
// path, which every other op sees widened.
import { ensure, GyreError } from '../../core/errors.js';
import { elementCount } from '../../core/tensor.js';
import type { Tensor } from '../../ops/backend.js';
import type { BufferSlice, GpuDevice } from './device.js';
import { narrowKernel, widenKernel } from './kernels/convert.js';

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

/** A matrix of f16, [rows, cols] with cols a multiple of 8; see {@link Precision}. */
export class HalfTensor implements Tensor, BufferSlice {
  readonly shape: readonly [number, number];
  readonly buffer: GPUBuffer;
  readonly offset: number;
  readonly owned: boolean;
  freed = false;
  readonly #gpu: GpuDevice;
  #wide: GpuTensor | undefined;

  constructor(
    gpu: GpuDevice,
    shape: readonly [number, number],
    buffer: GPUBuffer,
    options: { offset?: number; owned?: boolean } = {},
  ) {
    ensure(
      isHalfWidth(shape[1]),
      'backend',
      () => `a tensor of f16 has whole rows of 16 bytes, found ${shape[1]} columns`,
    );
    this.#gpu = gpu;
    this.shape = shape;
    this.buffer = buffer;
    this.offset = options.offset ?? 0;
    this.owned = options.owned ?? true;
  }

  get elements(): number {
    return elementCount(this.shape);
  }

  get bytes(): number {
    return this.elements * 2;
  }

  get matrix(): { rows: number; cols: number } {
    return { rows: this.shape[0], cols: this.shape[1] };
  }

  /** The same values in f32: made once, freed with this. */
  widened(): GpuTensor {
    this.#wide ??= widen(this.#gpu, this);
    return this.#wide;
  }

  /** Ends its life. */
  free(): void {
    this.freed = true;
    freeTensor(this.#gpu, this.#wide);
    if (this.owned) this.#gpu.release(this.buffer);
  }
}

/** Whether rows of so many columns can be f16. */
export const isHalfWidth = (cols: number): boolean => cols % 8 === 0;

/** The backend's own tensor behind a handle, in f32. */
export function own(tensor: Tensor): GpuTensor {
  const held = ownAny(tensor);
  return held instanceof HalfTensor ? held.widened() : held;
}

/** The backend's own tensor behind a handle, as it is stored. */
export function ownAny(tensor: Tensor): GpuTensor | HalfTensor {
  if (!(tensor instanceof GpuTensor || tensor instanceof HalfTensor))
    throw new GyreError('backend', 'a tensor of another backend was given to the WebGPU backend');
  if (tensor.freed) throw new GyreError('backend', 'a tensor was used after it was freed');
  return tensor;
}

/** A tensor of f16 with undefined contents. */
export function makeHalf(gpu: GpuDevice, rows: number, cols: number): HalfTensor {
  return new HalfTensor(gpu, [rows, cols], gpu.buffer(rows * cols * 2, `a tensor of shape [${rows}, ${cols}]`));
}

/** A copy in f32. */
function widen(gpu: GpuDevice, x: HalfTensor): GpuTensor {
  const out = makeTensor(gpu, x.shape);
  const count = x.elements / 4;
  gpu.dispatch(widenKernel, { x, out }, { count }, elementGroups(count));
  return out;
}

/** A copy in f16. */
export function narrow(gpu: GpuDevice, x: GpuTensor): HalfTensor {
  const { rows, cols } = x.matrix;
  const out = makeHalf(gpu, rows, cols);
  const count = x.elements / 4;
  gpu.dispatch(narrowKernel(gpu.capabilities.f16), { x, out }, { count }, elementGroups(count));
  return out;
}

/** A tensor with undefined contents: the op that asks for it writes all of it. */
export function makeTensor(gpu: GpuDevice, shape: readonly number[]): GpuTensor {
  return new GpuTensor(shape, gpu.buffer(elementCount(shape) * 4, `a tensor of shape [${shape.join(', ')}]`));
}

/** Ends a tensor's life. Freeing one twice does nothing. */
export function freeTensor(gpu: GpuDevice, tensor: Tensor | undefined): void {
  if (tensor instanceof HalfTensor && !tensor.freed) tensor.free();
  if (!(tensor instanceof GpuTensor) || tensor.freed) return;
  tensor.freed = true;
  if (tensor.owned) gpu.release(tensor.buffer);
}

/**
 * How the forward pass computes with more than {@link MAX_GEMV_ROWS} rows. `f32`: as f32 throughout. `f16`: what lies between the
 * linears of a block (normed, rotated, attended, activated rows) is rounded to f16, and so are weights that are multiplied with it;
 * sums, the residual stream and logits stay f32.
 */
export type Precision = 'f32' | 'f16';

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
