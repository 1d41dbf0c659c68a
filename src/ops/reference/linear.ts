// Linear layers and plain matrix products, in float64: one loop per index of the formula.
import type { ActivationGrid, LinearHandle, LinearSource, QuantizedWeight } from '../backend.js';
import { bytesPerElement } from '../../core/dtype.js';
import { ensure, GyreError } from '../../core/errors.js';
import { checkActivationGrid } from './activations.js';
import { expectSize, hostValues } from './tensor.js';

/** A linear layer with its weight expanded to float64 [out, in]. */
export class ReferenceLinear implements LinearHandle {
  readonly inFeatures: number;
  readonly outFeatures: number;
  readonly bytes: number;
  readonly weight: Float64Array;
  readonly bias: Float64Array | undefined;
  readonly activations: ActivationGrid | undefined;

  constructor(source: LinearSource) {
    this.activations = source.activations;
    if (source.kind === 'quantized') {
      const { inFeatures, outFeatures, bits, groupSize } = source.weight;
      this.inFeatures = inFeatures;
      this.outFeatures = outFeatures;
      this.weight = dequantize(source.weight);
      // Codes and zero points at `bits` each, scales at 16 bits.
      this.bytes = Math.ceil((outFeatures * (inFeatures * bits + (inFeatures / groupSize) * (bits + 16))) / 8);
    } else {
      const { shape, dtype } = source.weight;
      ensure(
        shape.length === 2,
        'tensor-shape',
        () => `linear weight: expected [out, in], found [${shape.join(', ')}]`,
      );
      [this.outFeatures, this.inFeatures] = shape as [number, number];
      this.weight = hostValues(source.weight);
      this.bytes = this.weight.length * bytesPerElement(dtype);
    }
    this.bias = source.bias && Float64Array.from(source.bias);
    if (this.bias) expectSize(this.bias.length, this.outFeatures, 'linear bias length');
    if (this.activations) checkActivationGrid(this.activations, this.inFeatures);
  }
}

/** The reference layer behind an opaque handle. */
export function ownLinear(handle: LinearHandle): ReferenceLinear {
  if (handle instanceof ReferenceLinear) return handle;
  throw new GyreError('backend', 'this linear layer belongs to another backend');
}

/** (code − zero) · scale: [out, in] (design §4.2). */
export function dequantize(weight: QuantizedWeight): Float64Array {
  const { inFeatures, outFeatures, groupSize, bits, codes, zeros, scales } = weight;
  const groups = inFeatures / groupSize;
  ensure(
    Number.isInteger(groups),
    'tensor-shape',
    () => `group size ${groupSize} does not divide ${inFeatures} input channels`,
  );
  expectSize(codes.length, outFeatures * inFeatures, 'codes of a quantized weight');
  expectSize(zeros.length, outFeatures * groups, 'zero points of a quantized weight');
  expectSize(scales.length, outFeatures * groups, 'scales of a quantized weight');
  const values = new Float64Array(outFeatures * inFeatures);
  for (let o = 0; o < outFeatures; o++) {
    for (let i = 0; i < inFeatures; i++) {
      const group = o * groups + Math.floor(i / groupSize);
      const code = codes[o * inFeatures + i];
      ensure(code < 2 ** bits, 'tensor-shape', () => `code ${code} does not fit ${bits} bits`);
      values[o * inFeatures + i] = (code - zeros[group]) * scales[group];
    }
  }
  return values;
}

/** x [rows, in] · Wᵀ + bias (+ residual [rows, out]): [rows, out]. */
export function linear(
  x: Float64Array,
  rows: number,
  { inFeatures, outFeatures, weight, bias }: ReferenceLinear,
  residual: Float64Array | undefined,
): Float64Array {
  const y = new Float64Array(rows * outFeatures);
  for (let r = 0; r < rows; r++) {
    for (let o = 0; o < outFeatures; o++) {
      let sum = 0;
      for (let i = 0; i < inFeatures; i++) sum += x[r * inFeatures + i] * weight[o * inFeatures + i];
      y[r * outFeatures + o] = sum + (bias ? bias[o] : 0) + (residual ? residual[r * outFeatures + o] : 0);
    }
  }
  return y;
}

/** Rows of a weight [vocab, hidden]: [ids.length, hidden]. */
export function embed(table: ReferenceLinear, ids: Int32Array): Float64Array {
  const { inFeatures: hidden, outFeatures: vocab, weight } = table;
  const y = new Float64Array(ids.length * hidden);
  ids.forEach((id, row) => {
    ensure(id >= 0 && id < vocab, 'usage', () => `token id ${id} is outside the vocabulary of ${vocab}`);
    y.set(weight.subarray(id * hidden, (id + 1) * hidden), row * hidden);
  });
  return y;
}

/** [rows, columns] → [columns, rows]. */
export function transpose(x: Float64Array, rows: number, columns: number): Float64Array {
  const y = new Float64Array(x.length);
  for (let r = 0; r < rows; r++) for (let c = 0; c < columns; c++) y[c * rows + r] = x[r * columns + c];
  return y;
}

/** a [m, k] · b [k, n]: [m, n]. */
export function matmul(a: Float64Array, b: Float64Array, m: number, k: number, n: number): Float64Array {
  const y = new Float64Array(m * n);
  for (let i = 0; i < m; i++) {
    for (let l = 0; l < k; l++) {
      const scale = a[i * k + l];
      for (let j = 0; j < n; j++) y[i * n + j] += scale * b[l * n + j];
    }
  }
  return y;
}
