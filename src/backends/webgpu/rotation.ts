// Transforms of activations on the GPU: pairwise ones here, Hadamard's in hadamard.ts.
import { ensure, GyreError } from '../../core/errors.js';
import type { PairwiseTransform, TransformHandle } from '../../ops/backend.js';
import type { GpuDevice } from './device.js';
import { applyHadamard, GpuHadamard } from './hadamard.js';
import {
  MAX_PER_LANE,
  rotateInPlaceKernel,
  rotateInSubgroupKernel,
  rotateInWorkgroupKernel,
  rotationMemory,
  scaleChannelsKernel,
} from './kernels/rotation-rows.js';
import { elementGroups, makeTensor, spread, type GpuTensor } from './tensor.js';

/** Rows from which the workgroup kernel is given several at a time, rather than a subgroup one. */
const MANY_ROWS = 32;

/** A transform's scales and tables, made for the kernels that this GPU and group size call for. */
export class GpuTransform implements TransformHandle {
  readonly channels: number;
  readonly groupSize: number;
  readonly krot: number;
  /** What was loaded, for plans that make tables of their own. */
  readonly source: PairwiseTransform;
  /** a, [channels]. */
  readonly scales: GPUBuffer;
  /** [krot, channels / 2]: i | j << 16, and (cos, sin). */
  readonly pairs: GPUBuffer;
  readonly turns: GPUBuffer;
  /** Per element, for the subgroup kernel: [krot, channels]. */
  readonly elements: { readonly lanes: number; readonly partners: GPUBuffer; readonly turns: GPUBuffer } | undefined;

  constructor(gpu: GpuDevice, transform: PairwiseTransform) {
    const { channels, groupSize, krot, pairs, theta, channelScales } = transform;
    this.source = transform;
    this.channels = channels;
    this.groupSize = groupSize;
    this.krot = krot;
    ensure(
      groupSize % 2 === 0 && channels % groupSize === 0 && groupSize <= 32768,
      'tensor-shape',
      () => `a transform needs an even group size that divides ${channels} channels, found ${groupSize}`,
    );
    ensure(
      pairs.length === krot * channels && theta.length === pairs.length / 2 && channelScales.length === channels,
      'tensor-shape',
      () => `pairs, angles or scales do not fit a transform of ${channels} channels and ${krot} rotations`,
    );
    const load = (data: Float32Array | Uint32Array): GPUBuffer => {
      const buffer = gpu.buffer(data.byteLength, 'a transform');
      gpu.upload(buffer, data);
      return buffer;
    };
    this.scales = load(channelScales);
    this.pairs = load(Uint32Array.from({ length: theta.length }, (_, p) => pairs[2 * p] | (pairs[2 * p + 1] << 16)));
    this.turns = load(
      Float32Array.from({ length: 2 * theta.length }, (_, i) =>
        i % 2 === 0 ? Math.cos(theta[i >> 1]) : Math.sin(theta[i >> 1]),
      ),
    );
    const lanes = fixedSubgroup(gpu);
    if (lanes === undefined || groupSize % lanes !== 0 || groupSize / lanes > MAX_PER_LANE) return;
    const partners = new Uint32Array(krot * channels);
    const turns = new Float32Array(2 * krot * channels);
    for (let p = 0; p < theta.length; p++) {
      const begin = Math.floor((2 * p) / groupSize) * groupSize;
      const [i, j] = [pairs[2 * p], pairs[2 * p + 1]];
      partners[begin + i] = j;
      partners[begin + j] = i;
      turns.set([Math.cos(theta[p]), Math.sin(theta[p])], 2 * (begin + i));
      turns.set([Math.cos(theta[p]), -Math.sin(theta[p])], 2 * (begin + j));
    }
    this.elements = { lanes, partners: load(partners), turns: load(turns) };
  }

  free(gpu: GpuDevice): void {
    for (const buffer of [this.scales, this.pairs, this.turns, this.elements?.partners, this.elements?.turns])
      if (buffer) gpu.release(buffer);
  }
}

/** Lanes of every subgroup, where that is one number. */
function fixedSubgroup({ capabilities: { subgroups } }: GpuDevice): number | undefined {
  return subgroups && subgroups.min === subgroups.max ? subgroups.min : undefined;
}

/** See InferenceOps.rotate. */
export function rotate(gpu: GpuDevice, x: GpuTensor, handle: TransformHandle): GpuTensor {
  const { rows, cols } = x.matrix;
  ensure(
    cols === handle.channels,
    'tensor-shape',
    () => `a transform of ${handle.channels} channels was given ${cols}`,
  );
  if (handle instanceof GpuHadamard) return applyHadamard(gpu, x, handle);
  if (!(handle instanceof GpuTransform))
    throw new GyreError('backend', 'a transform of another backend was given to the WebGPU backend');
  const { channels, groupSize, krot, scales, pairs, turns, elements } = handle;
  const out = makeTensor(gpu, x.shape);
  const groups = channels / groupSize;
  if (elements && rows < MANY_ROWS) {
    const { lanes, partners } = elements;
    const items = rows * groups;
    gpu.dispatch(
      rotateInSubgroupKernel(groupSize, lanes, krot),
      { x, scales, partners, turns: elements.turns, out },
      { items, channels },
      spread(Math.ceil(items / (Math.max(64, lanes) / lanes))),
    );
    return out;
  }
  const memory = gpu.limits.maxComputeWorkgroupStorageSize;
  let together = Math.min(32, 2 ** Math.floor(Math.log2(rows)));
  while (together > 1 && rotationMemory(groupSize, together) > memory) together /= 2;
  if (rotationMemory(groupSize, together) <= memory) {
    const items = Math.ceil(rows / together) * groups;
    gpu.dispatch(
      rotateInWorkgroupKernel(groupSize, together, krot),
      { x, scales, pairs, turns, out },
      { items, rows, channels },
      spread(items),
    );
    return out;
  }
  const count = rows * channels;
  gpu.dispatch(scaleChannelsKernel, { x, scales, out }, { count, channels }, elementGroups(count));
  for (let k = 0; k < krot; k++) {
    const params = { count: count / 2, channels, groupSize, k };
    gpu.dispatch(rotateInPlaceKernel, { pairs, turns, out }, params, elementGroups(count / 2));
  }
  return out;
}
