// Transforms of activations on the GPU: pairwise ones here, Hadamard's in hadamard.ts.
import { ensure, GyreError } from '../../core/errors.js';
import type { PairwiseTransform, TransformHandle } from '../../ops/backend.js';
import { f32ToF16Bits } from '../../core/dtype.js';
import { hasMatrixUnits } from './capabilities.js';
import type { GpuDevice } from './device.js';
import { chooseRotateDense, ROTATE_BLOCK, rotateDenseKernel, rotateDenseTakes } from './fast/rotate-dense.js';
import { pairTable, ROTATE_ROWS, rotateRowsKernel, rotateRowsTakes } from './fast/rotate-rows.js';
import { applyHadamard, GpuHadamard } from './hadamard.js';
import { reciprocalKernel, turnAnglesKernel } from './kernels/angles.js';
import { unitRowsKernel } from './kernels/convert.js';
import {
  MAX_PER_LANE,
  rotateInPlaceKernel,
  rotateInSubgroupKernel,
  rotateInWorkgroupKernel,
  rotationMemory,
  scaleChannelsKernel,
} from './kernels/rotation-rows.js';
import {
  elementGroups,
  freeTensor,
  makeHalf,
  makeTensor,
  narrow,
  spread,
  type GpuTensor,
  type HalfTensor,
} from './tensor.js';

/** Rows from which the workgroup kernel is given several at a time, rather than a subgroup one. */
const MANY_ROWS = 32;

/** Where rotations act. */
export type RotationLayout = Pick<PairwiseTransform, 'channels' | 'groupSize' | 'krot' | 'pairs'>;

/** Angles [krot, channels / 2] and activation-side scales [channels] on the GPU. */
export interface TransformTensors {
  readonly theta: GpuTensor;
  readonly channelScales: GpuTensor;
}

/** A transform's scales and tables, made for the kernels that this GPU and group size call for. */
export class GpuTransform implements TransformHandle {
  readonly channels: number;
  readonly groupSize: number;
  readonly krot: number;
  /** What was loaded, for plans that make tables of their own; undefined where angles and scales came as tensors. */
  readonly source: PairwiseTransform | undefined;
  /** a, [channels]. */
  readonly scales: GPUBuffer;
  /** [krot, channels / 2]: i | j << 16, and (cos, sin). */
  readonly pairs: GPUBuffer;
  readonly turns: GPUBuffer;
  /** Per element, for the subgroup kernel: [krot, channels]. */
  readonly elements: { readonly lanes: number; readonly partners: GPUBuffer; readonly turns: GPUBuffer } | undefined;

  /** Tables of the kernels for rows of f16, made when they are first needed. */
  #matrices: HalfTensor | undefined;
  #rows: { readonly scale: GPUBuffer; readonly table: GPUBuffer } | undefined;
  /** 1 / a, for weights: made when first asked for. */
  #weightScales: GPUBuffer | undefined;

  /** `tensors` are read in place of the transform's own angles and scales. */
  constructor(gpu: GpuDevice, transform: PairwiseTransform | RotationLayout, tensors?: TransformTensors) {
    const { channels, groupSize, krot, pairs } = transform;
    this.channels = channels;
    this.groupSize = groupSize;
    this.krot = krot;
    ensure(
      groupSize % 2 === 0 && channels % groupSize === 0 && groupSize <= 32768,
      'tensor-shape',
      () => `a transform needs an even group size that divides ${channels} channels, found ${groupSize}`,
    );
    const { theta, channelScales } = (tensors ?? transform) as PairwiseTransform | TransformTensors;
    const lengthOf = (values: Float32Array | GpuTensor): number =>
      values instanceof Float32Array ? values.length : values.elements;
    ensure(
      pairs.length === krot * channels && lengthOf(theta) === pairs.length / 2 && lengthOf(channelScales) === channels,
      'tensor-shape',
      () => `pairs, angles or scales do not fit a transform of ${channels} channels and ${krot} rotations`,
    );
    const load = (data: Float32Array | Uint32Array): GPUBuffer => {
      const buffer = gpu.buffer(Math.max(4, data.byteLength), 'a transform');
      gpu.upload(buffer, data);
      return buffer;
    };
    this.pairs = load(
      Uint32Array.from({ length: pairs.length / 2 }, (_, p) => pairs[2 * p] | (pairs[2 * p + 1] << 16)),
    );
    if (!(theta instanceof Float32Array) || !(channelScales instanceof Float32Array)) {
      this.scales = gpu.buffer(channels * 4, 'channel scales');
      this.turns = gpu.buffer(Math.max(8, 4 * pairs.length), 'rotation angles');
      const from = tensors as TransformTensors;
      gpu.copy(from.channelScales.buffer, from.channelScales.offset, this.scales, 0, channels * 4);
      turnAngles(gpu, from.theta, this.turns);
      return;
    }
    this.source = transform as PairwiseTransform;
    this.scales = load(channelScales);
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

  /** What weights are multiplied by: 1 / a. */
  weightScales(gpu: GpuDevice): GPUBuffer {
    if (!this.#weightScales) {
      this.#weightScales = gpu.buffer(this.channels * 4, 'channel scales');
      const buffers = { x: this.scales, out: this.#weightScales };
      gpu.dispatch(reciprocalKernel, buffers, { count: this.channels }, elementGroups(this.channels));
    }
    return this.#weightScales;
  }

  /** The transform of unit rows, [128, channels]: block beside block, row c the image of the block's channel c. */
  matrices(gpu: GpuDevice): HalfTensor {
    if (this.#matrices) return this.#matrices;
    const units = makeTensor(gpu, [ROTATE_BLOCK, this.channels]);
    const { elements: count } = units;
    gpu.dispatch(unitRowsKernel, { out: units }, { count, channels: this.channels }, elementGroups(count));
    const images = rotate(gpu, units, this);
    this.#matrices = narrow(gpu, images);
    freeTensor(gpu, units);
    freeTensor(gpu, images);
    return this.#matrices;
  }

  /** Scales and tables of {@link rotateRowsKernel}. */
  rowTables(gpu: GpuDevice, source: PairwiseTransform): { readonly scale: GPUBuffer; readonly table: GPUBuffer } {
    if (this.#rows) return this.#rows;
    const scales = Uint16Array.from(source.channelScales, f32ToF16Bits);
    const pairs = pairTable(source);
    const [scale, table] = [gpu.buffer(scales.byteLength, 'a transform'), gpu.buffer(pairs.byteLength, 'a transform')];
    gpu.upload(scale, scales);
    gpu.upload(table, pairs);
    this.#rows = { scale, table };
    return this.#rows;
  }

  free(gpu: GpuDevice): void {
    freeTensor(gpu, this.#matrices);
    const { scales, pairs, turns, elements } = this;
    const made = [this.#weightScales, this.#rows?.scale, this.#rows?.table];
    for (const buffer of [scales, pairs, turns, ...made, elements?.partners, elements?.turns])
      if (buffer) gpu.release(buffer);
  }
}

/** Writes (cos θ, sin θ) of angles that are on the GPU. */
export function turnAngles(gpu: GpuDevice, theta: GpuTensor, turns: GPUBuffer): void {
  const count = theta.elements;
  gpu.dispatch(turnAnglesKernel, { theta, turns }, { count }, elementGroups(count));
}

/** Lanes of every subgroup, where that is one number. */
function fixedSubgroup({ capabilities: { subgroups } }: GpuDevice): number | undefined {
  return subgroups && subgroups.min === subgroups.max ? subgroups.min : undefined;
}

/** The transform on rows of f16, or undefined where no kernel for them takes it. */
export function rotateHalf(gpu: GpuDevice, x: HalfTensor, handle: GpuTransform): HalfTensor | undefined {
  const { channels, groupSize, krot, source } = handle;
  const { rows, cols } = x.matrix;
  ensure(cols === channels, 'tensor-shape', () => `a transform of ${channels} channels was given ${cols}`);
  if (hasMatrixUnits(gpu.capabilities) && rotateDenseTakes(channels, groupSize)) {
    const y = makeHalf(gpu, rows, channels);
    const variant = chooseRotateDense(rows, channels);
    const groups = [channels / ROTATE_BLOCK, Math.ceil(rows / variant.rows)] as const;
    gpu.dispatch(rotateDenseKernel(variant), { x, r: handle.matrices(gpu), y }, { rows, channels }, groups);
    return y;
  }
  if (!source || !rotateRowsTakes(groupSize, krot)) return undefined;
  const y = makeHalf(gpu, rows, channels);
  const kernel = rotateRowsKernel({ f16: gpu.capabilities.f16, krot, groupSize });
  const groups = [channels / groupSize, Math.ceil(rows / ROTATE_ROWS)] as const;
  gpu.dispatch(kernel, { x, y, ...handle.rowTables(gpu, source) }, { rows, channels }, groups);
  return y;
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
