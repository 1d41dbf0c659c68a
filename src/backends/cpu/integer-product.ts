// Products in integers by ONNX Runtime: activations rounded per token to 8 bits (or 4), weights on one grid per output.
// Σ code·code is exact in 32 bits; two factors per output bring it back to floats. For many rows; a few rows go through the
// int4 kernels on rounded values, which is the same sum.
import { buildOnnxModel } from './onnx.js';
import { encodeRows, type KernelPool, type PackedLinear } from './kernels.js';
import type { OrtKernels } from './ort.js';
import type { ActivationGrid, QuantizedWeight } from '../../ops/backend.js';

/** The zero point of both operands: codes travel as unsigned bytes, which every CPU multiplies without saturating. */
const ZERO = 128;

/** Whether a linear's product can run in integers: one symmetric grid per token on one side, one grid per output on the other. */
export function fitsIntegers(weight: QuantizedWeight, activations: ActivationGrid): boolean {
  const perToken = activations.groupSize === -1 || activations.groupSize === weight.inFeatures;
  // code − zero must fit a signed byte.
  const narrow = weight.bits <= 4 || weight.zeros.every((zero) => zero === ZERO);
  return perToken && activations.symmetric && weight.groupSize === weight.inFeatures && narrow;
}

/** A weight as bytes inside ONNX Runtime, made when it is first used with many rows. */
export class IntegerProduct {
  readonly #ort: OrtKernels;
  readonly #pool: KernelPool;
  readonly #inFeatures: number;
  readonly #outFeatures: number;
  readonly #scales: Float32Array;
  readonly #session: ReturnType<OrtKernels['session']>;

  /** `packed` holds the weight whose per-output scales are `scales`. */
  constructor(ort: OrtKernels, pool: KernelPool, packed: PackedLinear, scales: Float32Array) {
    const { inFeatures, outFeatures } = packed;
    this.#ort = ort;
    this.#pool = pool;
    this.#inFeatures = inFeatures;
    this.#outFeatures = outFeatures;
    this.#scales = scales;
    this.#session = ort.session(() =>
      buildOnnxModel({
        nodes: [{ op: 'MatMulInteger', inputs: ['x', 'w', 'zero', 'zero'], outputs: ['y'] }],
        inputs: [{ name: 'x', type: 'u8', dims: ['m', inFeatures] }],
        outputs: [{ name: 'y', type: 'i32', dims: ['m', outFeatures] }],
        initializers: [
          { name: 'w', type: 'u8', dims: [inFeatures, outFeatures], bytes: unsigned(packed, scales) },
          { name: 'zero', type: 'u8', dims: [], bytes: Uint8Array.of(ZERO) },
        ],
      }),
    );
  }

  /** y [rows, out] = Q(x) · Wᵀ, x [rows, in]. */
  async run(x: Float32Array, rows: number, grid: ActivationGrid, y: Float32Array): Promise<void> {
    const { codes, scales } = encodeRows(this.#pool, x, this.#inFeatures, grid);
    const sums = new Int32Array(rows * this.#outFeatures);
    await this.#ort.runIntegers(await this.#session, codes, [rows, this.#inFeatures], sums, [rows, this.#outFeatures]);
    for (let r = 0, at = 0; r < rows; r++)
      for (let o = 0; o < this.#outFeatures; o++, at++) y[at] = sums[at] * scales[r] * this.#scales[o];
  }

  async release(): Promise<void> {
    await (await this.#session).release();
  }
}

/** code − zero + 128 of every weight, [in, out]: values over their output's scale are whole numbers. */
function unsigned(packed: PackedLinear, scales: Float32Array): Uint8Array {
  const { inFeatures, outFeatures } = packed;
  const bytes = new Uint8Array(inFeatures * outFeatures);
  const band = Math.max(1, Math.floor((1 << 22) / inFeatures));
  for (let begin = 0; begin < outFeatures; begin += band) {
    const end = Math.min(begin + band, outFeatures);
    const rows = new Float32Array((end - begin) * inFeatures);
    packed.dequantize(rows, begin, end);
    for (let o = begin, at = 0; o < end; o++)
      for (let i = 0; i < inFeatures; i++, at++) bytes[i * outFeatures + o] = Math.round(rows[at] / scales[o]) + ZERO;
  }
  return bytes;
}
