// Wrappers of the kernels for low-precision activations: Hadamard transforms of rows, dynamic grids, caches of integers.
import { ensure } from '../../../core/errors.js';
import type { ActivationGrid, HadamardTransform, KvCacheShape, KvGrid } from '../../../ops/backend.js';
import type { KernelPool } from '../pool.js';
import type { Floats, Pointer } from './arena.js';
import { checkLength } from './transform-kernels.js';

/** Floats below which a second thread does not pay. */
const LIGHT_WORK = 16_384;
/** Positions that attentionQuantized decodes at a time. */
const ATTENTION_BLOCK = 64;

/** A Hadamard transform of activation rows, its base matrix resident in the arena. */
export class RowHadamard {
  readonly channels: number;
  readonly #pool: KernelPool;
  readonly #order: number;
  readonly #inner: number;
  readonly #m: number;
  readonly #base: Pointer;

  constructor(pool: KernelPool, { channels, order, inner, base }: HadamardTransform) {
    const m = Math.sqrt(base.length);
    ensure(
      Number.isInteger(m) && Number.isInteger(Math.log2(order / m)) && channels % (order * inner) === 0,
      'tensor-shape',
      () =>
        `a Hadamard transform of order ${order}, inner ${inner}, base of ${base.length} entries on ${channels} channels`,
    );
    ensure(
      base.every((sign) => sign === 1 || sign === -1),
      'tensor-shape',
      'the base matrix of a Hadamard transform has entries other than 1 and −1',
    );
    this.#pool = pool;
    this.channels = channels;
    this.#order = order;
    this.#inner = inner;
    this.#m = m;
    this.#base = m > 1 ? pool.arena.alloc(base.length * 4) : 0;
    if (m > 1) pool.arena.f32.set(base, this.#base >>> 2);
  }

  /** Transforms each row of x [rows, channels] into out (may be x). */
  apply(x: Floats, out: Floats): void {
    ensure(x.length % this.channels === 0, 'tensor-shape', () => `${x.length} values are no rows of ${this.channels}`);
    checkLength('result', out, x.length);
    const pool = this.#pool;
    const { arena } = pool;
    const run = this.#order * this.#inner;
    const steps = Math.log2(this.#order / this.#m) + this.#m;
    pool.ensureScratch(run * 4);
    arena.scoped(() => {
      const from = arena.input(x);
      const to = arena.output(out);
      pool.run(
        'hadamardRows',
        x.length / run,
        [from, to, this.#order, this.#inner, this.#m, this.#base, 1 / Math.sqrt(this.#order)],
        Math.ceil((4 * LIGHT_WORK) / (run * steps)),
      );
      arena.finish(to, out);
    });
  }

  /** Frees it. */
  free(): void {
    this.#pool.arena.free(this.#base);
  }
}

/** Rounds rows of `channels` values onto dynamic grids; see ActivationGrid in the op contract. out may be x. */
export function quantizeRows(pool: KernelPool, x: Floats, channels: number, grid: ActivationGrid, out: Floats): void {
  const { bits, symmetric, clip } = grid;
  checkActivationGrid(grid, channels);
  const size = grid.groupSize === -1 ? channels : grid.groupSize;
  checkLength('result', out, x.length);
  const { arena } = pool;
  arena.scoped(() => {
    const from = arena.input(x);
    const to = arena.output(out);
    pool.run(
      'quantizeRows',
      x.length / size,
      [from, to, size, 2 ** bits - 1, clip, symmetric ? 1 : 0],
      Math.ceil(LIGHT_WORK / size),
    );
    arena.finish(to, out);
  });
}

/** Codes of a symmetric per-token grid as unsigned bytes, code + 128 [rows, channels], and the scale of each row. */
export function encodeRows(
  pool: KernelPool,
  x: Float32Array,
  channels: number,
  { bits, clip }: ActivationGrid,
): { codes: Uint8Array; scales: Float32Array } {
  const rows = x.length / channels;
  const result = { codes: new Uint8Array(x.length), scales: new Float32Array(rows) };
  const { arena } = pool;
  arena.scoped(() => {
    const from = arena.pushF32(x);
    const codes = arena.scratch(x.length);
    const scales = arena.scratch(rows * 4);
    pool.run(
      'encodeRows',
      rows,
      [from, codes, scales, channels, 2 ** bits - 1, clip],
      Math.ceil(LIGHT_WORK / channels),
    );
    result.codes.set(arena.u8.subarray(codes, codes + x.length));
    arena.readF32(scales, result.scales);
  });
  return result;
}

/** Throws unless rows of n channels can be rounded onto the grid. */
export function checkActivationGrid({ bits, groupSize, clip }: ActivationGrid, n: number): void {
  ensure(bits === 4 || bits === 8, 'usage', () => `activations have 4 or 8 bits, found ${String(bits)}`);
  ensure(clip > 0 && clip <= 1, 'usage', () => `the clip ratio must be above 0 and at most 1, found ${clip}`);
  ensure(
    groupSize === -1 || (groupSize > 0 && n % groupSize === 0),
    'tensor-shape',
    () => `activation groups of ${groupSize} do not tile ${n} channels`,
  );
}

/** One block's keys and values as 4- or 8-bit codes in the arena, with a grid (low, scale) per token and head. */
export class QuantizedKvCache {
  readonly batch: number;
  readonly kvHeads: number;
  readonly capacity: number;
  readonly headDim: number;
  readonly grid: KvGrid;
  readonly keys: Pointer;
  readonly keyGrids: Pointer;
  readonly values: Pointer;
  readonly valueGrids: Pointer;
  /** Bytes of codes and grids. */
  readonly bytes: number;
  readonly #pool: KernelPool;

  constructor(pool: KernelPool, shape: KvCacheShape & { readonly grid: KvGrid }) {
    const { batch, kvHeads, capacity, headDim, grid } = shape;
    checkActivationGrid({ ...grid, symmetric: false, groupSize: -1 }, headDim);
    this.#pool = pool;
    this.batch = batch;
    this.kvHeads = kvHeads;
    this.capacity = capacity;
    this.headDim = headDim;
    this.grid = grid;
    const slots = batch * kvHeads * capacity;
    const codes = slots * (grid.bits === 4 ? Math.ceil(headDim / 2) : headDim);
    this.bytes = 2 * (codes + slots * 8);
    const taken: Pointer[] = [];
    const take = (bytes: number): Pointer => {
      taken.push(pool.arena.alloc(bytes));
      return taken[taken.length - 1];
    };
    try {
      this.keys = take(codes);
      this.keyGrids = take(slots * 8);
      this.values = take(codes);
      this.valueGrids = take(slots * 8);
    } catch (error) {
      for (const pointer of taken) pool.arena.free(pointer);
      throw error;
    }
  }

  /** Rounds and writes k and v [batch · tokens, kvHeads · headDim] at positions start … start + tokens − 1. */
  append(k: Floats, v: Floats, start: number): void {
    const { batch, kvHeads, headDim, capacity, grid } = this;
    const tokens = k.length / (batch * kvHeads * headDim);
    checkLength('values', v, k.length);
    ensure(Number.isInteger(tokens), 'tensor-shape', () => `cache: ${k.length} elements for ${batch} sequences`);
    ensure(
      start + tokens <= capacity,
      'context-length',
      () => `the key/value cache holds ${capacity} tokens, ${start + tokens} are needed`,
      'create the cache with a larger capacity',
    );
    const { arena } = this.#pool;
    const shape = [tokens, kvHeads, headDim, capacity, start, grid.bits === 4 ? 1 : 0, grid.clip];
    const work = Math.ceil(LIGHT_WORK / (tokens * kvHeads * headDim));
    arena.scoped(() => {
      this.#pool.run('appendQuantized', batch, [arena.input(k), this.keys, this.keyGrids, ...shape], work);
      this.#pool.run('appendQuantized', batch, [arena.input(v), this.values, this.valueGrids, ...shape], work);
    });
  }

  /** The first `length` positions of a head's keys or values, decoded: [length, headDim]. */
  read(which: 'keys' | 'values', sequence: number, head: number, length: number, out: Float32Array): void {
    if (length === 0) return;
    const { headDim, capacity, kvHeads } = this;
    const [codes, grids] = which === 'keys' ? [this.keys, this.keyGrids] : [this.values, this.valueGrids];
    const first = (sequence * kvHeads + head) * capacity;
    const { arena } = this.#pool;
    arena.scoped(() => {
      const to = arena.scratch(length * headDim * 4);
      const nibbles = this.grid.bits === 4 ? 1 : 0;
      this.#pool.run(
        'decodeCache',
        length,
        [codes, grids, first, to, headDim, nibbles],
        Math.ceil(LIGHT_WORK / headDim),
      );
      arena.readF32(to, out);
    });
  }

  /** Causal grouped-query attention of q [batch · tokens, heads · headDim] over what is stored, this call's tokens included. */
  attend(
    q: Floats,
    out: Floats,
    options: { readonly heads: number; readonly scale: number; readonly window?: number; readonly start: number },
  ): void {
    const { batch, kvHeads, headDim, capacity } = this;
    const { heads, scale, window = 0, start } = options;
    const tokens = q.length / (batch * heads * headDim);
    checkLength('result', out, q.length);
    ensure(
      Number.isInteger(tokens) && heads % kvHeads === 0 && start + tokens <= capacity,
      'tensor-shape',
      () => `attention: ${q.length} elements, ${batch} sequences, ${heads} heads of ${headDim} over ${kvHeads}`,
    );
    const pool = this.#pool;
    const { arena } = pool;
    const total = start + tokens;
    pool.ensureScratch((tokens * (heads / kvHeads) * (total + 8) + ATTENTION_BLOCK * headDim) * 4);
    const work = tokens * (heads / kvHeads) * total * headDim;
    arena.scoped(() => {
      const from = arena.input(q);
      const to = arena.output(out);
      const stored = [this.keys, this.keyGrids, this.values, this.valueGrids];
      const shape = [tokens, heads, kvHeads, headDim, capacity, start, window, scale, this.grid.bits === 4 ? 1 : 0];
      pool.run('attentionQuantized', batch * kvHeads, [from, ...stored, to, ...shape], Math.ceil(20_000 / work));
      arena.finish(to, out);
    });
  }

  /** Frees it. */
  free(): void {
    for (const pointer of [this.keys, this.keyGrids, this.values, this.valueGrids]) this.#pool.arena.free(pointer);
  }
}
