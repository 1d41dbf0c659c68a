// Linear layers on the GPU: loading weights into the kernels' layout, and products with them.
import { unreachable, ensure, GyreError } from '../../core/errors.js';
import { floats, type HostTensor } from '../../core/tensor.js';
import type { ActivationGrid, LinearHandle, LinearSource, QuantizedWeight, Tensor } from '../../ops/backend.js';
import { gridRun, quantizeRows } from './activation-grid.js';
import { hasMatrixUnits } from './capabilities.js';
import type { GpuDevice } from './device.js';
import { chooseGemmTile, gemmKernel as gemmMatrixKernel, gemmTakes, type GemmVariant } from './fast/gemm.js';
import { tileGroups, type MatrixTile } from './fast/matrix-tiles.js';
import { embedKernel } from './kernels/embed.js';
import type { IntegerBits } from './kernels/linear-integer.js';
import { GEMM_TILE, gemmKernel, GEMV_OUTPUTS, gemvKernel, isGemvAligned, MAX_GEMV_ROWS } from './kernels/linear.js';
import { packGridKernel, packKernel, perWord, type WeightFormat } from './kernels/weights.js';
import { fitsIntegers, integerLinear, onIntegerUnits } from './linear-rounded.js';
import {
  elementGroups,
  freeTensor,
  HalfTensor,
  makeTensor,
  narrow,
  own,
  ownAny,
  spread,
  type GpuTensor,
} from './tensor.js';

/** Bytes of host data in flight to the GPU at a time, so that the driver's copies of them stay small. */
const SLICE_BYTES = 64 * 2 ** 20;

type MatrixKernel = ReturnType<typeof gemmMatrixKernel>;

/** A weight in GPU memory; see kernels/weights.ts. */
export class GpuLinear implements LinearHandle {
  readonly inFeatures: number;
  readonly outFeatures: number;
  readonly format: WeightFormat;
  readonly weights: GPUBuffer;
  /** A word per row and group; undefined for floats. */
  readonly grids: GPUBuffer | undefined;
  readonly bias: GPUBuffer | undefined;
  /** Channels that share a word of `grids`; all of them for floats. */
  readonly groupSize: number;
  /** Words in a row of `weights`. */
  readonly wordsPerRow: number;
  /** Words in a row of `grids`. */
  readonly groupsPerRow: number;
  /** Grid of the input, when it is rounded first. */
  activations: ActivationGrid | undefined;
  /** Bits of codes whose products with codes of the input run in integers. */
  integers: IntegerBits | undefined;
  /** Kernels for matrix units, by tile: without a residual and with one. */
  readonly #matrixKernels = [new Map<MatrixTile, MatrixKernel>(), new Map<MatrixTile, MatrixKernel>()] as const;

  constructor(
    gpu: GpuDevice,
    shape: { readonly inFeatures: number; readonly outFeatures: number; readonly groupSize?: number },
    format: WeightFormat,
    bias: Float32Array | undefined,
  ) {
    this.inFeatures = shape.inFeatures;
    this.outFeatures = shape.outFeatures;
    this.format = format;
    this.wordsPerRow = Math.ceil(shape.inFeatures / perWord(format));
    this.groupSize = shape.groupSize ?? shape.inFeatures;
    this.groupsPerRow = format.kind === 'int' ? shape.inFeatures / this.groupSize : 0;
    const what = `a weight of ${shape.outFeatures} × ${shape.inFeatures}`;
    this.weights = gpu.buffer(4 * this.outFeatures * this.wordsPerRow, what);
    this.grids =
      this.groupsPerRow > 0 ? gpu.buffer(4 * this.outFeatures * this.groupsPerRow, `the grid of ${what}`) : undefined;
    if (bias) {
      ensure(bias.length === this.outFeatures, 'tensor-shape', () => `${bias.length} biases for ${what}`);
      this.bias = gpu.buffer(bias.byteLength);
      gpu.upload(this.bias, bias);
    }
  }

  get bytes(): number {
    return 4 * this.outFeatures * (this.wordsPerRow + this.groupsPerRow);
  }

  /** The kernel for matrix units, and its tile. */
  matrixKernel(
    weights: GemmVariant['weights'],
    rows: number,
    residual: boolean,
  ): { readonly kernel: MatrixKernel; readonly tile: MatrixTile } {
    const groupSize = weights === 'int4' ? this.groupSize : 0;
    const tile = chooseGemmTile(rows, this.outFeatures, this.inFeatures, groupSize);
    const known = this.#matrixKernels[residual ? 1 : 0];
    let kernel = known.get(tile);
    if (!kernel) {
      kernel = gemmMatrixKernel({ ...tile, weights, groupSize, bias: this.bias !== undefined, residual });
      known.set(tile, kernel);
    }
    return { kernel, tile };
  }

  free(gpu: GpuDevice): void {
    for (const buffer of [this.weights, this.grids, this.bias]) if (buffer) gpu.release(buffer);
  }
}

/** The backend's own linear behind a handle. */
export function ownLinear(handle: LinearHandle): GpuLinear {
  if (handle instanceof GpuLinear) return handle;
  throw new GyreError('backend', 'a linear of another backend was given to the WebGPU backend');
}

/** Copies a linear's weight to the GPU, repacking it there. */
export async function loadLinear(gpu: GpuDevice, source: LinearSource): Promise<GpuLinear> {
  const linear = await loadWeight(gpu, source);
  const { activations, weight } = source;
  if (!activations) return linear;
  gridRun(activations, linear.inFeatures);
  linear.activations = activations;
  if (gpu.capabilities.integerDot && 'codes' in weight && fitsIntegers(weight, activations))
    linear.integers = weight.bits === 4 ? 4 : 8;
  return linear;
}

async function loadWeight(gpu: GpuDevice, source: LinearSource): Promise<GpuLinear> {
  switch (source.kind) {
    case 'dense':
      return loadDense(gpu, source.weight, source.bias);
    case 'quantized':
      return loadQuantized(gpu, source.weight, source.bias);
    default:
      return unreachable(source);
  }
}

async function loadDense(gpu: GpuDevice, weight: HostTensor, bias: Float32Array | undefined): Promise<GpuLinear> {
  ensure(weight.shape.length === 2, 'tensor-shape', () => `a linear weight has shape [${weight.shape.join(', ')}]`);
  const [outFeatures, inFeatures] = weight.shape;
  const kind = weight.dtype === 'f16' || weight.dtype === 'bf16' ? weight.dtype : 'f32';
  const linear = new GpuLinear(gpu, { inFeatures, outFeatures }, { kind }, bias);
  if (kind === 'f32') {
    const values = floats(weight);
    await inSlices(gpu, outFeatures, inFeatures * 4, (begin, end) =>
      gpu.upload(linear.weights, values.subarray(begin * inFeatures, end * inFeatures), begin * inFeatures * 4),
    );
  } else {
    await packRows(gpu, linear, weight.data as Uint16Array, 16);
  }
  return linear;
}

async function loadQuantized(
  gpu: GpuDevice,
  weight: QuantizedWeight,
  bias: Float32Array | undefined,
): Promise<GpuLinear> {
  const { inFeatures, outFeatures, bits, groupSize, codes, scales, zeros } = weight;
  const groups = inFeatures / groupSize;
  ensure(
    Number.isInteger(groups),
    'tensor-shape',
    () => `group size ${groupSize} does not divide ${inFeatures} input channels`,
  );
  ensure(
    codes.length === outFeatures * inFeatures &&
      scales.length === outFeatures * groups &&
      zeros.length === outFeatures * groups,
    'tensor-shape',
    () => `codes, scales or zero points do not fit a weight of ${outFeatures} × ${inFeatures}`,
  );
  const linear = new GpuLinear(gpu, { inFeatures, outFeatures, groupSize }, { kind: 'int', bits }, bias);
  await packRows(gpu, linear, codes, bits);
  const { grids } = linear;
  if (!grids) return linear;
  await inSlices(gpu, outFeatures, groups * 5, (begin, end) => {
    const count = (end - begin) * groups;
    const [scalesBuffer, zerosBuffer] = [gpu.buffer(4 * count), gpu.buffer(count)];
    gpu.upload(scalesBuffer, scales.subarray(begin * groups, end * groups));
    gpu.upload(zerosBuffer, zeros.subarray(begin * groups, end * groups));
    gpu.dispatch(
      packGridKernel,
      { scales: scalesBuffer, zeros: zerosBuffer, out: grids },
      { count, first: begin * groups },
      elementGroups(count),
    );
    gpu.release(scalesBuffer);
    gpu.release(zerosBuffer);
  });
  return linear;
}

/** Uploads rows of codes or halves as they are, slice by slice, and packs them on the GPU. */
async function packRows(
  gpu: GpuDevice,
  linear: GpuLinear,
  source: Uint8Array | Uint16Array,
  bits: number,
): Promise<void> {
  const { inFeatures, outFeatures, wordsPerRow, weights } = linear;
  const { BYTES_PER_ELEMENT } = source;
  const kernel = packKernel(BYTES_PER_ELEMENT === 1 ? 8 : 16, bits);
  // Where the layouts agree there is nothing to pack.
  const same = bits === 8 * BYTES_PER_ELEMENT && wordsPerRow * 4 === inFeatures * BYTES_PER_ELEMENT;
  await inSlices(gpu, outFeatures, inFeatures * BYTES_PER_ELEMENT, (begin, end) => {
    const part = source.subarray(begin * inFeatures, end * inFeatures);
    if (same) {
      gpu.upload(weights, part, begin * wordsPerRow * 4);
      return;
    }
    const staging = gpu.buffer(part.byteLength);
    gpu.upload(staging, part);
    const words = (end - begin) * wordsPerRow;
    gpu.dispatch(
      kernel,
      { source: staging, out: weights },
      { words, first: begin * wordsPerRow, wordsPerRow, cols: inFeatures },
      elementGroups(words),
    );
    gpu.release(staging);
  });
}

/** Hands out rows in slices of bounded size, waiting between them. */
async function inSlices(
  gpu: GpuDevice,
  rows: number,
  bytesPerRow: number,
  load: (begin: number, end: number) => void,
): Promise<void> {
  const step = Math.max(1, Math.floor(SLICE_BYTES / bytesPerRow));
  for (let begin = 0; begin < rows; begin += step) {
    if (begin > 0) await gpu.sync();
    load(begin, Math.min(rows, begin + step));
  }
}

/**
 * x [rows, in] · Wᵀ + bias + residual, x rounded first where the linear has a grid for it. With `half`, other products of many rows
 * take their operands as f16 (see Precision).
 */
export function applyLinear(
  gpu: GpuDevice,
  x: Tensor,
  linear: GpuLinear,
  residual: Tensor | undefined,
  half: boolean,
): GpuTensor {
  const { activations, integers } = linear;
  if (!activations) return product(gpu, ownAny(x), linear, residual, half);
  const any = ownAny(x);
  // A few rows are bound by reading the weight: the same sum on rounded values costs the same. With f16 allowed its matrix units
  // on rounded values are faster than integers without any.
  if (integers && any.matrix.rows > MAX_GEMV_ROWS && (!half || onIntegerUnits(gpu, linear)))
    return product(gpu, any, linear, residual, false);
  const rounded = quantizeRows(gpu, own(x), activations);
  const out = product(gpu, rounded, linear, residual, half);
  freeTensor(gpu, rounded);
  return out;
}

function product(
  gpu: GpuDevice,
  given: GpuTensor | HalfTensor,
  linear: GpuLinear,
  residual: Tensor | undefined,
  half: boolean,
): GpuTensor {
  const { rows, cols } = given.matrix;
  const { inFeatures, outFeatures, wordsPerRow, groupsPerRow, groupSize, format, weights } = linear;
  ensure(cols === inFeatures, 'tensor-shape', () => `a linear of ${inFeatures} inputs was given ${cols}`);
  const add = residual && own(residual);
  ensure(
    !add || add.elements === rows * outFeatures,
    'tensor-shape',
    () => `a residual of shape [${add?.shape.join(', ')}] for ${rows} × ${outFeatures} outputs`,
  );
  const out = makeTensor(gpu, [rows, outFeatures]);
  const many = rows > MAX_GEMV_ROWS;
  const onUnits = half && many ? matrixWeights(gpu, linear) : undefined;
  if (onUnits) {
    const x = given instanceof HalfTensor ? given : narrow(gpu, given);
    const { kernel, tile } = linear.matrixKernel(onUnits, rows, add !== undefined);
    // Kernels have no binding for what is absent.
    const buffers = {
      x,
      weights,
      grids: linear.grids ?? weights,
      bias: linear.bias ?? weights,
      residual: add ?? out,
      out,
    };
    gpu.dispatch(kernel, buffers, { m: rows, n: outFeatures, k: inFeatures }, tileGroups(tile, rows, outFeatures));
    if (x !== given) freeTensor(gpu, x);
    return out;
  }
  const tiledHalf = many && given instanceof HalfTensor;
  const inIntegers = many && linear.activations !== undefined && linear.integers !== undefined && !half;
  const buffers = {
    x: inIntegers || tiledHalf ? given : own(given),
    weights,
    // Kernels do not read what is absent; something must be bound.
    grids: linear.grids ?? weights,
    bias: linear.bias ?? weights,
    residual: add ?? weights,
    out,
  };
  const [hasBias, hasResidual] = [Number(linear.bias !== undefined), Number(add !== undefined)];
  if (inIntegers && linear.activations && linear.integers) {
    const operand = { inFeatures, outFeatures, groupSize, bits: linear.integers };
    integerLinear(gpu, given, operand, linear.activations, buffers, { hasBias, hasResidual });
    return out;
  }
  const params = { rows, inFeatures, outFeatures, wordsPerRow, groupsPerRow, groupSize, hasBias, hasResidual };
  if (many) {
    const groups = [Math.ceil(outFeatures / GEMM_TILE), Math.ceil(rows / GEMM_TILE)] as const;
    gpu.dispatch(gemmKernel(format, tiledHalf), buffers, params, groups);
  } else {
    const kernel = gemvKernel({
      format,
      rows: 2 ** Math.ceil(Math.log2(rows)),
      aligned: isGemvAligned(format, inFeatures),
      oneGroup: groupSize % perWord(format) === 0,
      subgroups: gpu.capabilities.subgroups !== undefined,
    });
    gpu.dispatch(kernel, buffers, params, spread(Math.ceil(outFeatures / GEMV_OUTPUTS)));
  }
  return out;
}

/** The weights' type for matrix units; undefined where the GPU has none or they don't take this product. */
function matrixWeights(gpu: GpuDevice, linear: GpuLinear): GemmVariant['weights'] | undefined {
  const { format, inFeatures, outFeatures, groupSize } = linear;
  if (!hasMatrixUnits(gpu.capabilities) || !gemmTakes(outFeatures, inFeatures, groupSize)) return undefined;
  switch (format.kind) {
    case 'f16':
    case 'bf16':
      return format.kind;
    case 'int':
      return format.bits === 4 ? 'int4' : undefined;
    case 'f32':
      return undefined;
    default:
      return unreachable(format);
  }
}

/** Rows of a weight: ids → [ids.length, in]. */
export function embedRows(gpu: GpuDevice, table: GpuLinear, ids: Int32Array): GpuTensor {
  const { inFeatures, outFeatures, wordsPerRow, groupsPerRow, groupSize, format, weights, grids } = table;
  for (const id of ids)
    ensure(id >= 0 && id < outFeatures, 'usage', () => `token id ${id} is outside the vocabulary of ${outFeatures}`);
  const out = makeTensor(gpu, [ids.length, inFeatures]);
  const index = gpu.buffer(ids.byteLength);
  gpu.upload(index, ids);
  const count = ids.length * inFeatures;
  gpu.dispatch(
    embedKernel(format),
    { weights, grids: grids ?? weights, ids: index, out },
    { count, cols: inFeatures, wordsPerRow, groupsPerRow, groupSize },
    elementGroups(count),
  );
  gpu.release(index);
  return out;
}
