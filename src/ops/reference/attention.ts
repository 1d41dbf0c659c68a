// Heads and attention in float64: per-head norms, RoPE, key/value cache, causal grouped-query attention.
import type { AttentionShape, KvCacheHandle, KvCacheShape, KvGrid, RopeHandle } from '../backend.js';
import { ensure, GyreError } from '../../core/errors.js';
import { rmsNorm } from './norms.js';
import { expectSize } from './tensor.js';

/** cos and sin [positions, rotaryDim / 2]. */
export class ReferenceRope implements RopeHandle {
  readonly positions: number;

  constructor(
    readonly cos: Float32Array,
    readonly sin: Float32Array,
    readonly rotaryDim: number,
  ) {
    ensure(
      rotaryDim > 0 && rotaryDim % 2 === 0,
      'tensor-shape',
      () => `rotary dimension ${rotaryDim} is not positive and even`,
    );
    expectSize(sin.length, cos.length, 'RoPE sin length');
    this.positions = cos.length / (rotaryDim / 2);
    ensure(Number.isInteger(this.positions), 'tensor-shape', 'RoPE table is not [positions, rotaryDim / 2]');
  }
}

/** Keys and values [batch, capacity, kvHeads · headDim]. */
export class ReferenceKvCache implements KvCacheHandle {
  readonly batch: number;
  readonly capacity: number;
  readonly kvHeads: number;
  readonly headDim: number;
  readonly keys: Float64Array;
  readonly values: Float64Array;
  /** Keys and values are rounded onto it when they are appended. */
  readonly grid: KvGrid | undefined;

  constructor(shape: KvCacheShape) {
    this.grid = shape.grid;
    this.batch = shape.batch;
    this.capacity = shape.capacity;
    this.kvHeads = shape.kvHeads;
    this.headDim = shape.headDim;
    const size = shape.batch * shape.capacity * shape.kvHeads * shape.headDim;
    this.keys = new Float64Array(size);
    this.values = new Float64Array(size);
  }
}

/** The reference tables behind an opaque handle. */
export function ownRope(handle: RopeHandle): ReferenceRope {
  if (handle instanceof ReferenceRope) return handle;
  throw new GyreError('backend', 'these RoPE tables belong to another backend');
}

/** The reference cache behind an opaque handle. */
export function ownKvCache(handle: KvCacheHandle): ReferenceKvCache {
  if (handle instanceof ReferenceKvCache) return handle;
  throw new GyreError('backend', 'this key/value cache belongs to another backend');
}

/** Columns [begin, begin + width) of x [rows, columns]: [rows, width]. */
export function takeColumns(x: Float64Array, columns: number, begin: number, width: number): Float64Array {
  const rows = x.length / columns;
  const y = new Float64Array(rows * width);
  for (let r = 0; r < rows; r++) y.set(x.subarray(r * columns + begin, r * columns + begin + width), r * width);
  return y;
}

/**
 * RoPE in Hugging Face's half-split layout, in place, on the first rotaryDim channels of every head:
 * `(x_i, x_{i+h}) ← (x_i cos − x_{i+h} sin, x_{i+h} cos + x_i sin)`, h = rotaryDim / 2. x [batch·tokens, heads·headDim].
 */
export function applyRope(
  x: Float64Array,
  tokens: number,
  heads: number,
  headDim: number,
  starts: Int32Array,
  { cos, sin, rotaryDim, positions }: ReferenceRope,
): void {
  ensure(rotaryDim <= headDim, 'tensor-shape', () => `rotary dimension ${rotaryDim} exceeds head dimension ${headDim}`);
  const end = Math.max(...starts) + tokens;
  ensure(end <= positions, 'context-length', () => `positions up to ${end} asked of RoPE tables for ${positions}`);
  const half = rotaryDim / 2;
  const rows = x.length / (heads * headDim);
  for (let r = 0; r < rows; r++) {
    const position = starts[Math.floor(r / tokens)] + (r % tokens);
    for (let head = 0; head < heads; head++) {
      const base = (r * heads + head) * headDim;
      for (let i = 0; i < half; i++) {
        const c = cos[position * half + i];
        const s = sin[position * half + i];
        const a = x[base + i];
        const b = x[base + i + half];
        x[base + i] = a * c - b * s;
        x[base + i + half] = b * c + a * s;
      }
    }
  }
}

/** Splits merged projections into q, k, v, with per-head norms and RoPE on q and k. */
export function splitHeads(
  qkv: Float64Array,
  tokens: number,
  { heads, kvHeads, headDim }: AttentionShape,
  starts: Int32Array,
  rope: ReferenceRope,
  norms: { q: Float64Array | undefined; k: Float64Array | undefined; eps: number },
): { q: Float64Array; k: Float64Array; v: Float64Array } {
  const columns = (heads + 2 * kvHeads) * headDim;
  let q = takeColumns(qkv, columns, 0, heads * headDim);
  let k = takeColumns(qkv, columns, heads * headDim, kvHeads * headDim);
  const v = takeColumns(qkv, columns, (heads + kvHeads) * headDim, kvHeads * headDim);
  // A head is a contiguous run of headDim values, which is what rmsNorm normalizes for a weight of that length.
  if (norms.q) q = rmsNorm(q, norms.q, norms.eps);
  if (norms.k) k = rmsNorm(k, norms.k, norms.eps);
  applyRope(q, tokens, heads, headDim, starts, rope);
  applyRope(k, tokens, kvHeads, headDim, starts, rope);
  return { q, k, v };
}

/** What each query of a row attends to. */
interface Visible {
  /** Rows of keys and values, oldest first. */
  readonly rows: readonly number[];
  readonly scale: number;
}

/** One row of queries [heads·headDim] over rows of keys and values; query head h reads key head ⌊h / (heads / kvHeads)⌋. */
function attendRow(
  row: number,
  q: Float64Array,
  keys: Float64Array,
  values: Float64Array,
  { heads, kvHeads, headDim }: AttentionShape,
  { rows, scale }: Visible,
  y: Float64Array,
): void {
  for (let head = 0; head < heads; head++) {
    const kvHead = Math.floor(head / (heads / kvHeads));
    const query = (row * heads + head) * headDim;
    const at = rows.map((r) => (r * kvHeads + kvHead) * headDim);
    const logits = at.map((key) => {
      let dot = 0;
      for (let d = 0; d < headDim; d++) dot += q[query + d] * keys[key + d];
      return dot * scale;
    });
    const max = logits.reduce((a, z) => Math.max(a, z), -Infinity);
    const weights = logits.map((z) => Math.exp(z - max));
    const total = weights.reduce((a, w) => a + w, 0);
    for (const [i, value] of at.entries())
      for (let d = 0; d < headDim; d++) y[query + d] += (weights[i] / total) * values[value + d];
  }
}

/** Whole numbers from `first` to `last`. */
const upTo = (first: number, last: number): number[] => Array.from({ length: last - first + 1 }, (_, i) => first + i);

/**
 * Causal attention of `tokens` new tokens per sequence over keys and values [batch, stride, kvHeads·headDim], of which
 * the first starts[sequence] + tokens are filled. q [batch·tokens, heads·headDim] → the same shape. The token at position p
 * sees positions max(0, p − window + 1) … p.
 */
export function attend(
  q: Float64Array,
  keys: Float64Array,
  values: Float64Array,
  stride: number,
  shape: AttentionShape,
  options: { batch: number; tokens: number; starts: Int32Array; scale: number; window: number | undefined },
): Float64Array {
  const { batch, tokens, starts, scale, window = Infinity } = options;
  const y = new Float64Array(q.length);
  for (let b = 0; b < batch; b++) {
    for (let t = 0; t < tokens; t++) {
      const position = starts[b] + t;
      const rows = upTo(Math.max(0, position - window + 1), position).map((p) => b * stride + p);
      attendRow(b * tokens + t, q, keys, values, shape, { rows, scale }, y);
    }
  }
  return y;
}

/** Attention within a forest of packed tokens; see `AttentionOptions.ends`. */
export function attendForest(
  q: Float64Array,
  keys: Float64Array,
  values: Float64Array,
  shape: AttentionShape,
  options: { ends: Int32Array; scale: number; window: number | undefined },
): Float64Array {
  const { ends, scale, window = Infinity } = options;
  const y = new Float64Array(q.length);
  for (let row = 0; row < ends.length; row++) {
    const seen = upTo(0, row).filter((j) => row < ends[j]);
    attendRow(row, q, keys, values, shape, { rows: seen.slice(-window), scale }, y);
  }
  return y;
}

/** Writes rows [batch·tokens, width] of new keys or values into a cache [batch, capacity, width] at each start. */
export function appendToCache(
  cache: Float64Array,
  capacity: number,
  rows: Float64Array,
  batch: number,
  width: number,
  starts: Int32Array,
): void {
  const tokens = rows.length / (batch * width);
  for (let b = 0; b < batch; b++) {
    const sequence = rows.subarray(b * tokens * width, (b + 1) * tokens * width);
    cache.set(sequence, (b * capacity + starts[b]) * width);
  }
}
