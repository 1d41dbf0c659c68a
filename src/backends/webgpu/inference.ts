// Ops of the forward pass on WebGPU.
import { ensure } from '../../core/errors.js';
import { floats, type HostTensor } from '../../core/tensor.js';
import type { Tensor } from '../../ops/backend.js';
import type { GpuDevice } from './device.js';
import { downloadTensor, freeTensor, GpuTensor, makeTensor, own } from './tensor.js';

/** Bindings start at multiples of this many bytes. */
const BINDING_ALIGNMENT = 256;

/** See InferenceOps. */
export class WebGpuInference {
  readonly #gpu: GpuDevice;

  constructor(gpu: GpuDevice) {
    this.#gpu = gpu;
  }

  upload(tensor: HostTensor): Tensor {
    const out = makeTensor(this.#gpu, tensor.shape);
    this.#gpu.upload(out.buffer, floats(tensor));
    return out;
  }

  download(tensor: Tensor): Promise<Float32Array> {
    return downloadTensor(this.#gpu, tensor);
  }

  free(...tensors: readonly (Tensor | undefined)[]): void {
    for (const tensor of tensors) freeTensor(this.#gpu, tensor);
  }

  /** A view where bindings may start there, else a copy. */
  sliceRows(tensor: Tensor, begin: number, end: number): Tensor {
    const x = own(tensor);
    const { rows, cols } = x.matrix;
    ensure(begin >= 0 && begin <= end && end <= rows, 'tensor-shape', () => `rows ${begin} to ${end} of ${rows}`);
    const offset = x.offset + begin * cols * 4;
    if (offset % BINDING_ALIGNMENT === 0) return new GpuTensor([end - begin, cols], x.buffer, { offset, owned: false });
    const out = makeTensor(this.#gpu, [end - begin, cols]);
    this.#gpu.copy(x.buffer, offset, out.buffer, 0, out.bytes);
    return out;
  }
}
