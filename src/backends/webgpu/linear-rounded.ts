// Linears whose input is rounded: where the grids allow, products of integer codes, else of the rounded values.
import type { ActivationGrid, QuantizedWeight } from '../../ops/backend.js';
import { encodeRows } from './activation-grid.js';
import type { GpuDevice } from './device.js';
import { hasIntegerMatrices, integerMatrixKernel, integerMatrixTakes, integerMatrixTile } from './fast/gemm-integer.js';
import { tileGroups } from './fast/matrix-tiles.js';
import { INTEGER_TILE, integerGemmKernel, integerWords, type IntegerBits } from './kernels/linear-integer.js';
import type { ProductBuffers } from './kernels/linear.js';
import type { GpuTensor, HalfTensor } from './tensor.js';

/** The zero point of bytes that become signed ones. */
const MIDDLE = 128;

/**
 * Whether products with a weight can run in integers: one symmetric grid per token on one side; on the other whole words of codes
 * in each group, and code − zero in a signed byte. The sums of a group stay below 2^31: 2^14 · groupSize.
 */
export function fitsIntegers(weight: QuantizedWeight, activations: ActivationGrid): boolean {
  const { inFeatures, bits, groupSize, zeros } = weight;
  const perToken = activations.groupSize === -1 || activations.groupSize === inFeatures;
  const narrow = bits === 4 || (bits === 8 && zeros.every((zero) => zero === MIDDLE));
  return activations.symmetric && perToken && narrow && groupSize % 32 === 0 && groupSize <= 2 ** 16;
}

/** Whether matrix units for bytes take a product. */
export function onIntegerUnits(
  gpu: GpuDevice,
  { outFeatures, inFeatures, groupSize }: Omit<IntegerOperand, 'bits'>,
): boolean {
  return hasIntegerMatrices(gpu.capabilities) && integerMatrixTakes(outFeatures, inFeatures, groupSize);
}

/** What a product in integers needs of a weight. */
export interface IntegerOperand {
  readonly inFeatures: number;
  readonly outFeatures: number;
  readonly bits: IntegerBits;
  readonly groupSize: number;
}

/**
 * out = Q(x) · Wᵀ + bias + residual in integers, on matrix units where the GPU has them for bytes. `buffers` as for products of
 * floats; its `x` is ignored.
 */
export function integerLinear(
  gpu: GpuDevice,
  x: GpuTensor | HalfTensor,
  weight: IntegerOperand,
  grid: ActivationGrid,
  buffers: Omit<ProductBuffers, 'x'>,
  options: { readonly hasBias: number; readonly hasResidual: number },
): void {
  const { rows } = x.matrix;
  const { inFeatures, outFeatures, bits, groupSize } = weight;
  const words = integerWords(inFeatures);
  const { codes, scales } = encodeRows(gpu, x, grid, { words, paired: bits === 4 });
  const operands = { ...buffers, codes, scales };
  if (onIntegerUnits(gpu, weight)) {
    const tile = integerMatrixTile(rows, outFeatures);
    const { hasBias, hasResidual } = options;
    gpu.dispatch(
      integerMatrixKernel({ ...tile, bits, bias: hasBias !== 0, residual: hasResidual !== 0 }),
      operands,
      { m: rows, n: outFeatures, k: inFeatures },
      tileGroups(tile, rows, outFeatures),
    );
  } else {
    gpu.dispatch(
      integerGemmKernel(bits),
      operands,
      { rows, outFeatures, words, groupWords: groupSize / 4, groupsPerRow: inFeatures / groupSize, ...options },
      [Math.ceil(outFeatures / INTEGER_TILE), Math.ceil(rows / INTEGER_TILE)],
    );
  }
  gpu.release(codes);
  gpu.release(scales);
}
