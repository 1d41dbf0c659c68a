// Linear weights resident in the arena: products with a few activation rows, rows for embeddings, and f32 copies for GEMM.
import { ensure } from '../../../core/errors.js';
import type { HostTensor } from '../../../core/tensor.js';
import type { QuantizedWeight } from '../../../ops/backend.js';
import type { KernelPool } from '../pool.js';
import type { Floats, Pointer } from './arena.js';
import { checkGrid, checkLength } from './transform-kernels.js';

/** Rows up to which {@link PackedLinear.gemv} pays; more belong in a GEMM over dequantized weights. */
export const MAX_GEMV_ROWS = 8;
/** How codes are stored: groups up to `segment` channels are one segment, longer ones are cut. See products.ts for why. */
const STORED = { 4: { segment: 128, kernel: 'gemvNibbles' }, 8: { segment: 256, kernel: 'gemvBytes' } } as const;
/** The largest rounded activation. */
const LIMIT = 32767;
/** Outputs of a panel of codes, and what segments' channels are padded to a multiple of. */
const PANEL = 8;
const CHANNELS = 8;
/** Bytes of weights below which a second thread does not pay. */
const THREAD_BYTES = 48 * 1024;
/** Weights are packed and unpacked in bands of about this many bytes. */
const BAND_BYTES = 8 * 1024 * 1024;

/** How a weight's groups are cut into segments. */
interface Segments {
  /** Segments per row, channels and padded channels of each. */
  readonly segments: number;
  readonly length: number;
  readonly padded: number;
  readonly group: number;
  readonly perGroup: number;
  /** Values per row of what is kept per segment: segments rounded up to 4. */
  readonly stride: number;
}

/** How a weight lies in the arena. */
type Layout =
  | { readonly kind: 'dense'; readonly type: 'f32' | 'f16' | 'bf16'; readonly padded: number }
  /** Panels of 8 rows of codes in `bits`; scales f32 and zeros u8, [panels, segments, 8]. */
  | ({ readonly kind: 'panels'; readonly bits: 4 | 8; readonly scales: Pointer; readonly zeros: Pointer } & Segments);

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
    const bits = weight.bits <= 4 ? 4 : 8;
    const length = Math.min(group, STORED[bits].segment);
    const perGroup = Math.ceil(group / length);
    const segments = groups * perGroup;
    const padded = Math.ceil(length / CHANNELS) * CHANNELS;
    const stride = Math.ceil(segments / 4) * 4;
    const cut: Segments = { segments, length, padded, group, perGroup, stride };
    const rows = Math.ceil(outFeatures / PANEL) * PANEL;
    const codeBytes = (segments * padded * rows * bits) / 8;
    const slots = segments * rows;
    const { arena } = pool;
    const taken: Pointer[] = [];
    const take = (bytes: number): Pointer => {
      const pointer = arena.alloc(bytes);
      taken.push(pointer);
      return pointer;
    };
    try {
      const codes = take(codeBytes);
      packCodes(pool, weight, codes, bits, cut);
      const scales = take(slots * 4);
      const zeros = take(slots);
      const [floats, bytes] = [arena.f32, arena.u8];
      for (let r = 0; r < rows; r++) {
        const panel = r - (r % PANEL);
        for (let s = 0; s < segments; s++) {
          const at = panel * segments + s * PANEL + (r - panel);
          const from = r * groups + Math.floor(s / perGroup);
          floats[(scales >>> 2) + at] = r < outFeatures ? weight.scales[from] : 0;
          bytes[zeros + at] = r < outFeatures ? weight.zeros[from] : 0;
        }
      }
      const layout: Layout = { kind: 'panels', bits, scales, zeros, ...cut };
      return new PackedLinear(pool, inFeatures, outFeatures, codeBytes + slots * 5, codes, layout);
    } catch (error) {
      for (const pointer of taken) arena.free(pointer);
      throw error;
    }
  }

  /** y [rows, out] = x [rows, in] · Wᵀ, plus residual [rows, out] when given (may be y). */
  gemv(x: Floats, rows: number, y: Floats, residual?: Floats): void {
    const { inFeatures, outFeatures } = this;
    checkLength('activations', x, rows * inFeatures);
    checkLength('result', y, rows * outFeatures);
    if (residual) checkLength('residual', residual, y.length);
    const pool = this.#pool;
    const { arena } = pool;
    const layout = this.#layout;
    const units = layout.kind === 'panels' ? Math.ceil(outFeatures / PANEL) : outFeatures;
    const minUnits = Math.ceil(THREAD_BYTES / ((this.bytes / units) * Math.max(1, rows / 2)));
    arena.scoped(() => {
      const from = arena.input(x);
      const to = arena.output(y);
      const plus = residual ? arena.input(residual) : 0;
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
        const { segments, length, padded, group, perGroup, stride, bits, scales, zeros } = layout;
        const xq = arena.scratch(rows * segments * padded * 2);
        const xscale = arena.scratch(rows * stride * 4);
        const xsum = arena.scratch(rows * stride * 4);
        const cut = [segments, length, padded, group, perGroup, stride];
        pool.call('quantizeActivations', ...[0, rows, 0, from, inFeatures, xq, xscale, xsum, ...cut, LIMIT]);
        const vectors = padded / CHANNELS;
        pool.run(
          STORED[bits].kernel,
          units,
          [this.#weights, scales, zeros, xq, xscale, xsum, to, plus, rows, outFeatures, segments, vectors, stride],
          minUnits,
        );
      }
      arena.finish(to, y);
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
  gatherRows(ids: Int32Array, out: Floats): void {
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
        arena.view(out).set(arena.f32.subarray(staged >>> 2, (staged >>> 2) + inFeatures), i * inFeatures);
      });
    });
  }

  /** Frees the weight. */
  free(): void {
    const { arena } = this.#pool;
    arena.free(this.#weights);
    const layout = this.#layout;
    if (layout.kind === 'dense') return;
    arena.free(layout.scales);
    arena.free(layout.zeros);
  }

  #decode(first: number, count: number, to: Pointer): void {
    const layout = this.#layout;
    const pool = this.#pool;
    const { inFeatures } = this;
    const minUnits = Math.ceil(32_768 / inFeatures);
    if (layout.kind === 'dense') {
      const { padded, type } = layout;
      pool.run('decodeRows', count, [first, this.#weights, to, inFeatures, padded, DENSE_KIND[type]], minUnits);
      return;
    }
    const { segments, length, padded, group, perGroup, bits, scales, zeros } = layout;
    const cut = [segments, length, padded, group, perGroup];
    const panels = Math.ceil((first + count) / PANEL) - Math.floor(first / PANEL);
    const rest = [first, first + count, bits, this.#weights, scales, zeros, to, inFeatures, ...cut];
    pool.run('dequantizePanels', panels, rest, Math.ceil(minUnits / PANEL));
  }
}

/** Packs a weight's codes, staged in bands, to `codes`. */
function packCodes(pool: KernelPool, weight: QuantizedWeight, codes: Pointer, bits: 4 | 8, cut: Segments): void {
  const { inFeatures, outFeatures } = weight;
  const { segments, length, padded, group, perGroup } = cut;
  const rowBytes = (segments * padded * bits) / 8;
  const { arena } = pool;
  const band =
    Math.max(1, Math.min(Math.ceil(outFeatures / PANEL), Math.floor(BAND_BYTES / inFeatures / PANEL))) * PANEL;
  arena.scoped(() => {
    const staged = arena.scratch(band * inFeatures);
    for (let r = 0; r < outFeatures; r += band) {
      const count = Math.min(band, outFeatures - r);
      arena.u8.set(weight.codes.subarray(r * inFeatures, (r + count) * inFeatures), staged);
      const to = codes + r * rowBytes;
      const rest = [staged, count, inFeatures, bits, to, segments, length, padded, group, perGroup];
      pool.run('packPanels', Math.ceil(count / PANEL), rest, Math.ceil(65_536 / inFeatures / PANEL));
    }
  });
}
