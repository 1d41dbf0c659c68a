// Pairwise transforms of channel-major weights on the GPU, and the objective through which they are learned.
import { ensure, GyreError } from '../../core/errors.js';
import type {
  GridSpec,
  PairwiseTransform,
  Tensor,
  TransformGradient,
  TransformHandle,
  TransformObjective,
} from '../../ops/backend.js';
import type { GpuDevice } from './device.js';
import { GRADIENT_PARTS, gradientKernel, rotateKernel, tileColumns } from './kernels/channels.js';
import { scaleRowsKernel, strided } from './kernels/elementwise.js';
import { fakeQuantizeKernel, GRID_COLUMNS, quantizerGradientKernel } from './kernels/grid.js';
import { sumPartsKernel } from './kernels/sums.js';
import { GpuTransform, turnAngles } from './rotation.js';
import { checkGrid, gridShape, setGrids } from './rounding.js';
import { freeTensor, makeTensor, own, type GpuTensor } from './tensor.js';

type Layout = Pick<PairwiseTransform, 'channels' | 'groupSize' | 'krot' | 'pairs'>;

/** Workgroup memory that kernels count on: WebGPU's guaranteed minimum, so that several workgroups share a core. */
const TILE_BYTES = 16384;

/** Channels a workgroup holds: the rotation group, or anything handy when nothing is rotated. */
function tileGroup({ channels, groupSize, krot }: Omit<Layout, 'pairs'>): number {
  if (krot > 0) return groupSize;
  for (const size of [128, 64, 32, 16, 8, 4, 2]) if (channels % size === 0) return size;
  return 1;
}

function columnsPerTile(layout: Omit<Layout, 'pairs'>, copies: number): number {
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

  set(theta: Float32Array | Tensor, scales: Float32Array | Tensor): void {
    const { channels, krot } = this.layout;
    const [angles, factors] = [theta, scales].map((v) => (v instanceof Float32Array ? v : own(v)));
    const [found, wanted] = [angles, factors].map((v) => (v instanceof Float32Array ? v.length : v.elements));
    ensure(
      found >= (krot * channels) / 2 && wanted === channels,
      'tensor-shape',
      () => `${found} angles and ${wanted} scales for ${krot} rotations of ${channels} channels`,
    );
    if (krot > 0) {
      if (angles instanceof Float32Array) this.gpu.upload(this.angles, anglesOf(angles));
      else turnAngles(this.gpu, angles, this.angles);
    }
    if (factors instanceof Float32Array) this.gpu.upload(this.scales, factors);
    else this.gpu.copy(factors.buffer, factors.offset, this.scales, 0, channels * 4);
  }

  apply(x: GpuTensor, out: GpuTensor, direction: 'forward' | 'inverse'): void {
    rotateChannels(this.gpu, this.layout, this, x, out, direction);
  }

  dispose(): void {
    for (const buffer of [this.pairs, this.angles, this.scales]) this.gpu.release(buffer);
  }
}

/** A transform's tables; `scales` are what forward multiplies by. */
interface Tables {
  readonly pairs: GPUBuffer;
  readonly angles: GPUBuffer;
  readonly scales: GPUBuffer;
}

/** forward: x ⊙ scales, then the rotations; inverse: the rotations backwards, then ÷ scales. */
function rotateChannels(
  gpu: GpuDevice,
  layout: Omit<Layout, 'pairs'>,
  { pairs, angles, scales }: Tables,
  x: GpuTensor,
  out: GpuTensor,
  direction: 'forward' | 'inverse',
): void {
  const { channels, krot } = layout;
  const { cols } = x.matrix;
  if (krot === 0) {
    const count = x.elements;
    const divide = Number(direction === 'inverse');
    gpu.dispatch(scaleRowsKernel, { x, s: scales, out }, { count, cols, divide }, strided(count));
    return;
  }
  const groupSize = tileGroup(layout);
  const columns = columnsPerTile(layout, 1);
  gpu.dispatch(
    rotateKernel(groupSize, columns, direction),
    { x, pairs, angles, scales, out },
    { channels, cols, krot },
    [Math.ceil(cols / columns), channels / groupSize],
  );
}

/** See QuantizationOps.transformChannels. */
export function transformChannels(
  gpu: GpuDevice,
  w: GpuTensor,
  transform: PairwiseTransform | TransformHandle,
  direction: 'forward' | 'inverse',
  side: 'weight' | 'activation',
): GpuTensor {
  ensure(
    w.matrix.rows === transform.channels,
    'tensor-shape',
    () => `a transform of ${transform.channels} channels on ${w.matrix.rows} rows`,
  );
  const out = makeTensor(gpu, w.shape);
  if (transform instanceof GpuTransform) {
    const scales = side === 'weight' ? transform.weightScales(gpu) : transform.scales;
    const tables = { pairs: transform.pairs, angles: transform.turns, scales };
    rotateChannels(gpu, transform, tables, w, out, direction);
    return out;
  }
  if (!('theta' in transform)) throw new GyreError('backend', 'no pairwise transform of the WebGPU backend');
  const a = transform.channelScales;
  const rotations = new Rotations(gpu, transform);
  rotations.set(transform.theta, side === 'weight' ? a.map((v) => 1 / v) : a);
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

  forward(theta: Float32Array | Tensor, scales: Float32Array | Tensor): GpuTensor {
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
    const { channels, krot } = this.#layout;
    const count = (krot * channels) / 2 + channels;
    const sums = this.#backward(gradient);
    const values = Float64Array.from(new Float32Array(await this.#gpu.read(sums, 0, count * 4)));
    this.#gpu.release(sums);
    return { theta: values.subarray(0, (krot * channels) / 2), scales: values.subarray((krot * channels) / 2) };
  }

  backwardOn(gradient: Tensor): { theta: GpuTensor; scales: GpuTensor } {
    const { channels, krot } = this.#layout;
    const sums = this.#backward(gradient);
    const made = { theta: makeTensor(this.#gpu, [krot, channels / 2]), scales: makeTensor(this.#gpu, [channels]) };
    if (krot > 0) this.#gpu.copy(sums, 0, made.theta.buffer, 0, made.theta.bytes);
    this.#gpu.copy(sums, made.theta.bytes, made.scales.buffer, 0, made.scales.bytes);
    this.#gpu.release(sums);
    return made;
  }

  /** Gradients of the angles, then of the scales, in a buffer that is the caller's to release. */
  #backward(gradient: Tensor): GPUBuffer {
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
    for (const buffer of [outer, inner, unused]) gpu.release(buffer);
    freeTensor(gpu, inside);
    return sums;
  }

  dispose(): void {
    this.#rotations.dispose();
    for (const tensor of [this.#y, this.#rounded, this.#estimate]) freeTensor(this.#gpu, tensor);
    this.#gpu.release(this.#scales);
    this.#gpu.release(this.#zeros);
    this.#ready = false;
  }
}
