// Ops of quantization on WebGPU.
import type { Tensor } from '../../ops/backend.js';
import type { GpuDevice } from './device.js';
import { addScaledKernel } from './kernels/elementwise.js';
import { makeTensor, own } from './tensor.js';

/** Workgroups that fill any GPU when a kernel strides over its elements. */
const GRID = 4096;

/** See QuantizationOps. */
export class WebGpuQuantization {
  readonly #gpu: GpuDevice;

  constructor(gpu: GpuDevice) {
    this.#gpu = gpu;
  }

  addScaled(acc: Tensor, x: Tensor, scale: number, _inPlace = false): Tensor {
    const a = own(acc);
    const out = makeTensor(this.#gpu, a.shape);
    const count = a.elements;
    this.#gpu.dispatch(addScaledKernel, { acc: a, x: own(x), out }, { count, scale }, [
      Math.min(GRID, Math.ceil(count / 256)),
    ]);
    return out;
  }
}
