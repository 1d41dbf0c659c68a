// Pairwise transforms of channel-major weights on the GPU, and the objective through which they are learned.
import { ensure, GyreError } from '../../core/errors.js';
import type { GridSpec, PairwiseTransform, Tensor, TransformGradient, TransformObjective } from '../../ops/backend.js';
import type { GpuDevice } from './device.js';
import { GRADIENT_PARTS, gradientKernel, rotateKernel, tileColumns } from './kernels/channels.js';
import { scaleRowsKernel, strided } from './kernels/elementwise.js';
import { fakeQuantizeKernel, GRID_COLUMNS, quantizerGradientKernel } from './kernels/grid.js';
import { sumPartsKernel } from './kernels/sums.js';
import { checkGrid, gridShape, setGrids } from './rounding.js';
import { freeTensor, makeTensor, own, type GpuTensor } from './tensor.js';

type Layout = Pick<PairwiseTransform, 'channels' | 'groupSize' | 'krot' | 'pairs'>;

/** Workgroup memory that kernels count on: WebGPU's guaranteed minimum, so that several workgroups share a core. */
const TILE_BYTES = 16384;

/** Channels a workgroup holds: the rotation group, or anything handy when nothing is rotated. */
function tileGroup({ channels, groupSize, krot }: Layout): number {
  if (krot > 0) return groupSize;
  for (const size of [128, 64, 32, 16, 8, 4, 2]) if (channels % size === 0) return size;
  return 1;
}

function columnsPerTile(layout: Layout, copies: number): number {
  const columns = tileColumns(tileGroup(layout), copies, TILE_BYTES, copies === 1 ? 32 : 16);
  if (columns === 0)
    throw new GyreError(
      'limit-exceeded',
      `rotation groups of ${layout.groupSize} channels do not fit the GPU kernels`,
      {
        remedy: 'use a smaller group size',
      },
    );
  return columns;
}

/** @throws GyreError for pairs that would leave their group, which kernels address memory with. */
function checkLayout({ channels, groupSize, krot, pairs }: Layout): void {
  if (krot === 0) return;
  ensure(
    groupSize >= 2 && groupSize % 2 === 0 && channels % groupSize === 0,
    'tensor-shape',
    () => `rotation groups of ${groupSize} do not tile ${channels} channels in pairs`,
  );
  ensure(
    pairs.length >= krot * channels,
    'tensor-shape',
    () => `${krot} rotations of ${channels} channels need ${krot * channels} pair indices, found ${pairs.length}`,
  );
  for (let i = 0; i < krot * channels; i += 2)
    ensure(
      pairs[i] >= 0 &&
        pairs[i] < groupSize &&
        pairs[i + 1] >= 0 &&
        pairs[i + 1] < groupSize &&
        pairs[i] !== pairs[i + 1],
      'tensor-shape',
      () => `pair (${pairs[i]}, ${pairs[i + 1]}) is not inside a group of ${groupSize} channels`,
    );
}

/** (cos θ, sin θ), computed in f64: WGSL's own functions are only good to 2^-11. */
function anglesOf(theta: Float32Array): Float32Array {
  const out = new Float32Array(Math.max(2, 2 * theta.length));
  for (let i = 0; i < theta.length; i++) {
    out[2 * i] = Math.cos(theta[i]);
    out[2 * i + 1] = Math.sin(theta[i]);
  }
  return out;
}

/** A transform's pairs, angles and scales in GPU memory. */
class Rotations {
  readonly pairs: GPUBuffer;
  readonly angles: GPUBuffer;
  readonly scales: GPUBuffer;

  constructor(
    readonly gpu: GpuDevice,
    readonly layout: Layout,
  ) {
    checkLayout(layout);
    const { channels, krot, pairs } = layout;
    this.pairs = gpu.buffer(Math.max(4, krot * channels * 2), 'rotation pairs');
    this.angles = gpu.buffer(Math.max(8, krot * channels * 4), 'rotation angles');
    this.scales = gpu.buffer(channels * 4, 'channel scales');
    // Two int16 indices are one little-endian word: i | j << 16.
    if (krot > 0) gpu.upload(this.pairs, pairs.subarray(0, krot * channels));
  }

  set(theta: Float32Array, scales: Float32Array): void {
    const { channels, krot } = this.layout;
    ensure(
      theta.length >= (krot * channels) / 2 && scales.length === channels,
      'tensor-shape',
      () => `${theta.length} angles and ${scales.length} scales for ${krot} rotations of ${channels} channels`,
    );
    if (krot > 0) this.gpu.upload(this.angles, anglesOf(theta));
    this.gpu.upload(this.scales, scales);
  }

  apply(x: GpuTensor, out: GpuTensor, direction: 'forward' | 'inverse'): void {
    const { channels, krot } = this.layout;
    const { cols } = x.matrix;
    const { pairs, angles, scales } = this;
    if (krot === 0) {
      const count = x.elements;
      const divide = Number(direction === 'inverse');
      this.gpu.dispatch(scaleRowsKernel, { x, s: scales, out }, { count, cols, divide }, strided(count));
      return;
    }
    const groupSize = tileGroup(this.layout);
    const columns = columnsPerTile(this.layout, 1);
    const kernel = rotateKernel(groupSize, columns, direction);
    this.gpu.dispatch(kernel, { x, pairs, angles, scales, out }, { channels, cols, krot }, [
      Math.ceil(cols / columns),
      channels / groupSize,
    ]);
  }

  dispose(): void {
    for (const buffer of [this.pairs, this.angles, this.scales]) this.gpu.release(buffer);
  }
}

/** See QuantizationOps.transformChannels. */
export function transformChannels(
  gpu: GpuDevice,
  w: GpuTensor,
  transform: PairwiseTransform,
  direction: 'forward' | 'inverse',
  side: 'weight' | 'activation',
): GpuTensor {
  ensure(
    w.matrix.rows === transform.channels,
    'tensor-shape',
    () => `a transform of ${transform.channels} channels on ${w.matrix.rows} rows`,
  );
  ensure(side === 'weight' || direction === 'forward', 'usage', 'the activation side has no inverse here');
  const a = transform.channelScales;
  const rotations = new Rotations(gpu, transform);
  rotations.set(transform.theta, side === 'weight' ? a.map((v) => 1 / v) : a);
  const out = makeTensor(gpu, w.shape);
  rotations.apply(w, out, direction);
  rotations.dispose();
  return out;
}

/** See TransformObjective. Y = T(W), its grids and Ŵ stay on the GPU between forward and backward; gradients are read back as one block. */
export class GpuObjective implements TransformObjective {
  readonly #gpu: GpuDevice;
  readonly #layout: Layout;
  readonly #grid: GridSpec;
  readonly #rotations: Rotations;
  readonly #w: GpuTensor;
  readonly #y: GpuTensor;
  readonly #rounded: GpuTensor;
  readonly #estimate: GpuTensor;
  readonly #scales: GPUBuffer;
  readonly #zeros: GPUBuffer;
  #ready = false;

  constructor(gpu: GpuDevice, w: GpuTensor, layout: Layout, grid: GridSpec) {
    ensure(
      w.matrix.rows === layout.channels,
      'tensor-shape',
      () => `a transform of ${layout.channels} channels on ${w.matrix.rows} rows`,
    );
    checkGrid(layout.channels, grid);
    ensure(!grid.symmetric, 'unsupported', 'a transform objective has an asymmetric grid');
    this.#gpu = gpu;
    this.#layout = layout;
    this.#grid = grid;
    this.#w = w;
    this.#rotations = new Rotations(gpu, layout);
    [this.#y, this.#rounded, this.#estimate] = [0, 1, 2].map(() => makeTensor(gpu, w.shape));
    const slots = gridShape(w, grid).slots;
    this.#scales = gpu.buffer(slots * 4, 'grids');
    this.#zeros = gpu.buffer(slots * 4, 'grids');
  }

  forward(theta: Float32Array, scales: Float32Array): GpuTensor {
    const y = this.#y;
    this.#rotations.set(theta, scales);
    this.#rotations.apply(this.#w, y, 'forward');
    setGrids(this.#gpu, y, this.#grid, this.#scales, this.#zeros);
    const { cols } = y.matrix;
    this.#gpu.dispatch(
      fakeQuantizeKernel,
      { w: y, scales: this.#scales, zeros: this.#zeros, values: this.#rounded },
      {
        count: y.elements,
        first: 0,
        cols,
        groupSize: this.#grid.groupSize,
        levels: 2 ** this.#grid.bits - 1,
        difference: 0,
      },
      strided(y.elements),
    );
    this.#rotations.apply(this.#rounded, this.#estimate, 'inverse');
    this.#ready = true;
    return this.#estimate;
  }

  async backward(gradient: Tensor): Promise<TransformGradient> {
    ensure(this.#ready, 'usage', 'backward() of a transform objective needs a forward() before it');
    const gpu = this.#gpu;
    const g = own(gradient);
    const { channels, krot } = this.#layout;
    const { cols } = this.#w.matrix;
    ensure(g.elements === this.#w.elements, 'tensor-shape', () => `a gradient of shape [${g.shape.join(', ')}]`);
    const groupSize = tileGroup(this.#layout);
    const columns = columnsPerTile(this.#layout, 2);
    const tiles = Math.ceil(cols / columns);
    const lanes = tiles * GRADIENT_PARTS;
    const count = (krot * channels) / 2 + channels;
    const [outer, inner] = [0, 1].map(() => gpu.buffer(lanes * count * 4, 'partial gradients'));
    const sums = gpu.buffer(count * 4, 'gradients');
    const inside = makeTensor(gpu, this.#w.shape);
    const unused = gpu.buffer(16);
    const { pairs, angles, scales } = this.#rotations;
    const params = { channels, cols, krot };
    gpu.dispatch(
      gradientKernel(groupSize, columns, 'outer'),
      { g, y: this.#estimate, w: this.#w, pairs, angles, scales, out: inside, parts: outer },
      params,
      [tiles, channels / groupSize],
    );
    const grid = { scales: this.#scales, zeros: this.#zeros };
    gpu.dispatch(
      quantizerGradientKernel,
      { y: this.#y, ...grid, g: inside },
      { cols, groupSize: this.#grid.groupSize, levels: 2 ** this.#grid.bits - 1 },
      [Math.ceil(cols / GRID_COLUMNS), channels / this.#grid.groupSize],
    );
    gpu.dispatch(
      gradientKernel(groupSize, columns, 'inner'),
      { g: inside, y: this.#y, w: this.#w, pairs, angles, scales, out: unused, parts: inner },
      params,
      [tiles, channels / groupSize],
    );
    gpu.dispatch(sumPartsKernel, { x: outer, y: inner, out: sums }, { count, parts: lanes }, [Math.ceil(count / 64)]);
    const values = Float64Array.from(new Float32Array(await gpu.read(sums, 0, count * 4)));
    for (const buffer of [outer, inner, sums, unused]) gpu.release(buffer);
    freeTensor(gpu, inside);
    return { theta: values.subarray(0, (krot * channels) / 2), scales: values.subarray((krot * channels) / 2) };
  }

  dispose(): void {
    this.#rotations.dispose();
    for (const tensor of [this.#y, this.#rounded, this.#estimate]) freeTensor(this.#gpu, tensor);
    this.#gpu.release(this.#scales);
    this.#gpu.release(this.#zeros);
    this.#ready = false;
  }
}
