// Linear weights resident in the arena: products with a few activation rows, rows for embeddings, and f32 copies for GEMM.
import { ensure } from '../../../core/errors.js';
import type { HostTensor } from '../../../core/tensor.js';
import type { QuantizedWeight } from '../../../ops/backend.js';
import type { KernelPool } from '../pool.js';
import type { Pointer } from './arena.js';
import { checkGrid, checkLength } from './transform-kernels.js';

/** Rows up to which {@link PackedLinear.gemv} pays; more belong in a GEMM over dequantized weights. */
export const MAX_GEMV_ROWS = 8;
/** Groups up to this long are one segment, longer ones are cut in pieces of SEGMENT channels. */
const LONGEST_SEGMENT = 256;
const SEGMENT = 128;
/** Bytes of weights below which a second thread does not pay. */
const THREAD_BYTES = 48 * 1024;
/** Weights are packed and unpacked in bands of about this many bytes. */
const BAND_BYTES = 8 * 1024 * 1024;

/** How a weight lies in the arena. */
type Layout =
  | { readonly kind: 'dense'; readonly type: 'f32' | 'f16' | 'bf16'; readonly padded: number }
  | {
      readonly kind: 'quantized';
      readonly nibbles: boolean;
      /** Segments per row, channels and padded channels of each. */
      readonly segments: number;
      readonly length: number;
      readonly padded: number;
      readonly group: number;
      readonly perGroup: number;
      /** Floats per row of scales and offsets: segments rounded up to 4. */
      readonly stride: number;
      readonly scales: Pointer;
      readonly offsets: Pointer;
    };

const DENSE_KIND = { f32: 0, f16: 1, bf16: 2 } as const;
const DENSE_GEMV = { f32: 'gemvF32', f16: 'gemvF16', bf16: 'gemvBf16' } as const;

/** A weight [outFeatures, inFeatures] in the arena. */
export class PackedLinear {
  readonly inFeatures: number;
  readonly outFeatures: number;
  /** Bytes one product with one row reads. */
  readonly bytes: number;
  readonly #pool: KernelPool;
  readonly #weights: Pointer;
  readonly #layout: Layout;

  private constructor(
    pool: KernelPool,
    inFeatures: number,
    outFeatures: number,
    bytes: number,
    weights: Pointer,
    layout: Layout,
  ) {
    this.#pool = pool;
    this.inFeatures = inFeatures;
    this.outFeatures = outFeatures;
    this.bytes = bytes;
    this.#weights = weights;
    this.#layout = layout;
  }

  /** A floating-point weight [out, in]; f64 is narrowed to f32, the others keep their type. */
  static dense(pool: KernelPool, weight: HostTensor): PackedLinear {
    const [out, inside] = weight.shape;
    ensure(
      weight.shape.length === 2 && weight.data.length === out * inside,
      'tensor-shape',
      () => `a linear weight needs shape [out, in], found [${weight.shape.join(', ')}]`,
    );
    const type = weight.dtype === 'f64' ? 'f32' : weight.dtype;
    ensure(
      type === 'f32' || type === 'f16' || type === 'bf16',
      'unsupported',
      () => `a dense linear weight must be floating-point, found ${weight.dtype}`,
    );
    const padded = Math.ceil(inside / 8) * 8;
    const size = type === 'f32' ? 4 : 2;
    const bytes = out * padded * size;
    const { arena } = pool;
    const pointer = arena.alloc(bytes);
    const view: Float32Array | Uint16Array = type === 'f32' ? arena.f32 : arena.u16;
    const source = weight.data as Float32Array | Uint16Array | Float64Array;
    const first = pointer / size;
    if (padded === inside) view.set(source, first);
    else {
      for (let r = 0; r < out; r++) {
        view.set(source.subarray(r * inside, (r + 1) * inside), first + r * padded);
        view.fill(0, first + r * padded + inside, first + (r + 1) * padded);
      }
    }
    return new PackedLinear(pool, inside, out, bytes, pointer, { kind: 'dense', type, padded });
  }

  /** A quantized weight; 2- and 3-bit codes are stored in 4 bits. */
  static quantized(pool: KernelPool, weight: QuantizedWeight): PackedLinear {
    const { inFeatures, outFeatures, groupSize: group } = weight;
    checkGrid(inFeatures, group);
    const groups = inFeatures / group;
    checkLength('codes', weight.codes, inFeatures * outFeatures);
    checkLength('scales', weight.scales, groups * outFeatures);
    checkLength('zeros', weight.zeros, groups * outFeatures);
    const nibbles = weight.bits <= 4;
    const length = group <= LONGEST_SEGMENT ? group : SEGMENT;
    const perGroup = Math.ceil(group / length);
    const segments = groups * perGroup;
    const perVector = nibbles ? 32 : 16;
    const padded = Math.ceil(length / perVector) * perVector;
    const stride = Math.ceil(segments / 4) * 4;
    const rowBytes = (segments * padded) / (nibbles ? 2 : 1);
    const { arena } = pool;
    const taken: Pointer[] = [];
    const take = (bytes: number): Pointer => {
      const pointer = arena.alloc(bytes);
      taken.push(pointer);
      return pointer;
    };
    try {
      const codes = take(rowBytes * outFeatures);
      const scales = take(stride * 4 * outFeatures);
      const offsets = take(stride * 4 * outFeatures);
      const band = Math.max(1, Math.min(outFeatures, Math.floor(BAND_BYTES / inFeatures)));
      arena.scoped(() => {
        const staged = arena.scratch(band * inFeatures);
        for (let r = 0; r < outFeatures; r += band) {
          const count = Math.min(band, outFeatures - r);
          arena.u8.set(weight.codes.subarray(r * inFeatures, (r + count) * inFeatures), staged);
          pool.run(
            'packCodes',
            count,
            [staged, inFeatures, codes + r * rowBytes, segments, length, padded, group, perGroup, nibbles ? 1 : 0],
            Math.ceil(65_536 / inFeatures),
          );
        }
      });
      const floats = arena.f32;
      for (let r = 0; r < outFeatures; r++) {
        const at = r * stride;
        for (let s = 0; s < stride; s++) {
          const from = r * groups + Math.floor(s / perGroup);
          const scale = s < segments ? weight.scales[from] : 0;
          floats[(scales >>> 2) + at + s] = scale;
          floats[(offsets >>> 2) + at + s] = s < segments ? scale * weight.zeros[from] : 0;
        }
      }
      // What a product has to read, not what alignment adds: codes, a scale and an offset per group.
      const bytes = (rowBytes + stride * 8) * outFeatures;
      return new PackedLinear(pool, inFeatures, outFeatures, bytes, codes, {
        kind: 'quantized',
        nibbles,
        segments,
        length,
        padded,
        group,
        perGroup,
        stride,
        scales,
        offsets,
      });
    } catch (error) {
      for (const pointer of taken) arena.free(pointer);
      throw error;
    }
  }

  /** y [rows, out] = x [rows, in] · Wᵀ, plus residual [rows, out] when given (may be y). */
  gemv(x: Float32Array, rows: number, y: Float32Array, residual?: Float32Array): void {
    const { inFeatures, outFeatures } = this;
    checkLength('activations', x, rows * inFeatures);
    checkLength('result', y, rows * outFeatures);
    if (residual) checkLength('residual', residual, y.length);
    const pool = this.#pool;
    const { arena } = pool;
    const layout = this.#layout;
    const units = Math.ceil(outFeatures / 2);
    const minUnits = Math.ceil(THREAD_BYTES / ((this.bytes / units) * Math.max(1, rows / 2)));
    arena.scoped(() => {
      const from = arena.pushF32(x);
      const to = arena.scratch(y.length * 4);
      const plus = residual ? arena.pushF32(residual) : 0;
      if (layout.kind === 'dense') {
        const ready = arena.scratch(rows * layout.padded * 4);
        pool.call('prepareActivations', 0, rows, 0, from, inFeatures, ready, layout.padded, DENSE_KIND[layout.type]);
        pool.run(
          DENSE_GEMV[layout.type],
          units,
          [this.#weights, ready, to, plus, rows, outFeatures, layout.padded],
          minUnits,
        );
      } else {
        const { segments, length, padded, group, perGroup, stride, nibbles, scales, offsets } = layout;
        const xq = arena.scratch(rows * segments * padded * 2);
        const xscale = arena.scratch(rows * stride * 4);
        const xsum = arena.scratch(rows * stride * 4);
        pool.call(
          'quantizeActivations',
          0,
          rows,
          0,
          from,
          inFeatures,
          xq,
          xscale,
          xsum,
          segments,
          length,
          padded,
          group,
          perGroup,
          stride,
        );
        pool.run(
          nibbles ? 'gemvNibbles' : 'gemvBytes',
          units,
          [
            this.#weights,
            scales,
            offsets,
            xq,
            xscale,
            xsum,
            to,
            plus,
            rows,
            outFeatures,
            segments,
            padded / (nibbles ? 32 : 16),
            stride,
          ],
          minUnits,
        );
      }
      arena.readF32(to, y);
    });
  }

  /** Rows [begin, end) as f32 into out [end − begin, in]. */
  dequantize(out: Float32Array, begin = 0, end = this.outFeatures): void {
    const { inFeatures } = this;
    checkLength('result', out, (end - begin) * inFeatures);
    const { arena } = this.#pool;
    const band = Math.max(1, Math.min(end - begin, Math.floor(BAND_BYTES / (inFeatures * 4))));
    arena.scoped(() => {
      const staged = arena.scratch(band * inFeatures * 4);
      for (let r = begin; r < end; r += band) {
        const count = Math.min(band, end - r);
        this.#decode(r, count, staged);
        arena.readF32(staged, out.subarray((r - begin) * inFeatures, (r - begin + count) * inFeatures));
      }
    });
  }

  /** Rows by index (an embedding): out [ids.length, in]. */
  gatherRows(ids: Int32Array, out: Float32Array): void {
    const { inFeatures } = this;
    checkLength('result', out, ids.length * inFeatures);
    const { arena } = this.#pool;
    arena.scoped(() => {
      const staged = arena.scratch(inFeatures * 4);
      ids.forEach((id, i) => {
        ensure(
          id >= 0 && id < this.outFeatures,
          'tensor-shape',
          () => `token id ${id} is outside the embedding's ${this.outFeatures} rows`,
        );
        this.#decode(id, 1, staged);
        arena.readF32(staged, out.subarray(i * inFeatures, (i + 1) * inFeatures));
      });
    });
  }

  /** Frees the weight. */
  free(): void {
    const { arena } = this.#pool;
    arena.free(this.#weights);
    if (this.#layout.kind === 'quantized') {
      arena.free(this.#layout.scales);
      arena.free(this.#layout.offsets);
    }
  }

  #decode(first: number, count: number, to: Pointer): void {
    const layout = this.#layout;
    const minUnits = Math.ceil(32_768 / this.inFeatures);
    if (layout.kind === 'dense') {
      const { padded, type } = layout;
      this.#pool.run(
        'decodeRows',
        count,
        [first, this.#weights, to, this.inFeatures, padded, DENSE_KIND[type]],
        minUnits,
      );
      return;
    }
    const { segments, length, padded, group, perGroup, stride, nibbles, scales, offsets } = layout;
    this.#pool.run(
      'dequantizeRows',
      count,
      [
        first,
        this.#weights,
        scales,
        offsets,
        to,
        this.inFeatures,
        segments,
        length,
        padded,
        group,
        perGroup,
        stride,
        nibbles ? 1 : 0,
      ],
      minUnits,
    );
  }
}
