// Wrappers of the forward pass's kernels: norms, rotations of rows, SiLU·up, heads, caches, attention and scores.
import { ensure } from '../../../core/errors.js';
import type { PairwiseTransform } from '../../../ops/backend.js';
import type { KernelPool } from '../pool.js';
import type { Floats, Pointer } from './arena.js';
import {
  checkLength,
  checkRotation,
  rotationTableBytes,
  THIN_GROUP,
  thinTableBytes,
  writeAngles,
  writePairs,
  writeThin,
  type RotationSpec,
} from './transform-kernels.js';

/** Elements of light elementwise work below which a second thread does not pay. */
const LIGHT_WORK = 16_384;
/** Multiplications of rotations below which a second thread does not pay: about 5 µs. */
const ROTATE_WORK = 18_000;
/** Logits are staged in bands of about this many bytes. */
const SCORE_BAND_BYTES = 32 * 1024 * 1024;

/** out = x · weight / sqrt(mean(x²) + eps), per row of x [rows, weight.length]. */
export function rmsNorm(pool: KernelPool, x: Floats, weight: Floats, eps: number, out: Floats): void {
  const n = weight.length;
  const rows = x.length / n;
  checkLength('result', out, x.length);
  ensure(Number.isInteger(rows), 'tensor-shape', () => `rmsNorm: ${x.length} elements are not rows of ${n}`);
  const { arena } = pool;
  arena.scoped(() => {
    const from = arena.input(x);
    const to = arena.output(out);
    pool.run('rmsNorm', rows, [from, to, n, arena.input(weight), eps], Math.ceil(LIGHT_WORK / n));
    arena.finish(to, out);
  });
}

/** gateUp [rows, 2n] → out [rows, n], silu(gate) · up. */
export function siluMul(pool: KernelPool, gateUp: Floats, rows: number, out: Floats): void {
  checkLength('gate and up', gateUp, out.length * 2);
  const n = out.length / rows;
  const { arena } = pool;
  arena.scoped(() => {
    const from = arena.input(gateUp);
    const to = arena.output(out);
    pool.run('siluMul', rows, [from, to, n], Math.ceil(LIGHT_WORK / 2 / n));
    arena.finish(to, out);
  });
}

/** A transform of activation rows, resident in the arena. */
export class RowTransform {
  readonly channels: number;
  readonly #pool: KernelPool;
  readonly #spec: RotationSpec;
  readonly #table: Pointer;
  /** For a few rows; 0 if groups are too large for it. */
  readonly #thin: Pointer;
  readonly #scales: Pointer;
  /** What it was made of. */
  readonly source: PairwiseTransform;

  /** theta [krot, channels / 2], activation-side scales [channels]. */
  constructor(pool: KernelPool, spec: RotationSpec, theta: Float32Array, scales: Float32Array) {
    checkRotation(spec);
    checkLength('theta', theta, spec.krot * (spec.channels / 2));
    checkLength('scales', scales, spec.channels);
    this.#pool = pool;
    this.#spec = spec;
    this.channels = spec.channels;
    this.source = { ...spec, theta, channelScales: scales };
    const { arena } = pool;
    this.#table = arena.alloc(rotationTableBytes(spec));
    writePairs(pool, this.#table, spec);
    writeAngles(pool, this.#table, spec, theta);
    this.#thin = spec.groupSize <= THIN_GROUP ? arena.alloc(thinTableBytes(spec)) : 0;
    if (this.#thin) writeThin(pool, this.#thin, spec, theta);
    this.#scales = arena.alloc(spec.channels * 4);
    arena.f32.set(scales, this.#scales >>> 2);
  }

  /** What of it is in the arena, for the gradient. */
  get resident(): { readonly spec: RotationSpec; readonly table: Pointer; readonly scales: Pointer } {
    return { spec: this.#spec, table: this.#table, scales: this.#scales };
  }

  /** Scales and rotates each row of x [rows, channels] into out (may be x). */
  apply(x: Floats, rows: number, out: Floats): void {
    const { channels, krot } = this.#spec;
    const groupSize = krot ? this.#spec.groupSize : channels;
    checkLength('activations', x, rows * channels);
    checkLength('result', out, x.length);
    const pool = this.#pool;
    const { arena } = pool;
    // Wide tiles waste lanes on few rows.
    const width = rows >= 24 || !this.#thin ? 32 : 4;
    pool.ensureScratch(groupSize * width * 4);
    arena.scoped(() => {
      const from = arena.input(x);
      const to = arena.output(out);
      pool.run(
        'rotateRows',
        (channels / groupSize) * Math.ceil(rows / width),
        [from, to, rows, channels, groupSize, krot, this.#table, this.#thin, this.#scales, width],
        Math.ceil(ROTATE_WORK / (groupSize * width * (krot + 1))),
      );
      arena.finish(to, out);
    });
  }

  /** Frees it. */
  free(): void {
    for (const pointer of [this.#table, this.#thin, this.#scales]) this.#pool.arena.free(pointer);
  }
}

/** Rotary tables resident in the arena: cos, sin [positions, rotaryDim / 2]. */
export class RopeTable {
  readonly positions: number;
  readonly rotaryDim: number;
  readonly cos: Pointer;
  readonly sin: Pointer;
  readonly #pool: KernelPool;

  constructor(pool: KernelPool, cos: Float32Array, sin: Float32Array, rotaryDim: number) {
    checkLength('sin', sin, cos.length);
    this.#pool = pool;
    this.rotaryDim = rotaryDim;
    this.positions = cos.length / (rotaryDim / 2);
    this.cos = pool.arena.alloc(cos.length * 4);
    this.sin = pool.arena.alloc(sin.length * 4);
    pool.arena.f32.set(cos, this.cos >>> 2);
    pool.arena.f32.set(sin, this.sin >>> 2);
  }

  /** Frees it. */
  free(): void {
    this.#pool.arena.free(this.cos);
    this.#pool.arena.free(this.sin);
  }
}

/** Arguments of {@link splitHeads}. */
export interface SplitHeadsArguments {
  /** [batch · tokens, (heads + 2·kvHeads)·headDim]. */
  readonly qkv: Floats;
  readonly q: Floats;
  readonly k: Floats;
  readonly v: Floats;
  readonly batch: number;
  readonly heads: number;
  readonly kvHeads: number;
  readonly headDim: number;
  /** Position of each sequence's first token, [batch]. */
  readonly starts: Int32Array;
  readonly rope: RopeTable;
  readonly qNorm?: Floats;
  readonly kNorm?: Floats;
  readonly eps: number;
}

/** Splits merged projections into q, k, v, with the optional per-head norms and RoPE. */
export function splitHeads(pool: KernelPool, args: SplitHeadsArguments): void {
  const { qkv, q, k, v, batch, heads, kvHeads, headDim, starts, rope } = args;
  const start = Math.max(...starts);
  const width = (heads + 2 * kvHeads) * headDim;
  const rows = qkv.length / width;
  const tokens = rows / batch;
  ensure(
    Number.isInteger(tokens),
    'tensor-shape',
    () => `splitHeads: ${qkv.length} elements, ${batch} sequences, rows of ${width}`,
  );
  checkLength('q', q, rows * heads * headDim);
  checkLength('k', k, rows * kvHeads * headDim);
  checkLength('v', v, rows * kvHeads * headDim);
  ensure(
    start + tokens <= rope.positions && rope.rotaryDim <= headDim,
    'context-length',
    () => `positions up to ${start + tokens - 1} exceed the ${rope.positions} of the rotary tables`,
    'load the model with a longer context',
  );
  const { arena } = pool;
  arena.scoped(() => {
    const from = arena.input(qkv);
    const [toQ, toK, toV] = [arena.output(q), arena.output(k), arena.output(v)];
    pool.run(
      'splitHeads',
      rows,
      [
        from,
        toQ,
        toK,
        toV,
        heads,
        kvHeads,
        headDim,
        args.qNorm ? arena.input(args.qNorm) : 0,
        args.kNorm ? arena.input(args.kNorm) : 0,
        args.eps,
        rope.cos,
        rope.sin,
        rope.rotaryDim,
        arena.pushI32(starts),
        tokens,
      ],
      Math.ceil(LIGHT_WORK / width),
    );
    arena.finish(toQ, q);
    arena.finish(toK, k);
    arena.finish(toV, v);
  });
}

/** One block's keys and values in the arena: [batch, kvHeads, capacity, headDim] each. */
export class KvCache {
  readonly batch: number;
  readonly kvHeads: number;
  readonly capacity: number;
  readonly headDim: number;
  readonly keys: Pointer;
  readonly values: Pointer;
  readonly #pool: KernelPool;

  constructor(pool: KernelPool, shape: { batch: number; kvHeads: number; headDim: number; capacity: number }) {
    this.#pool = pool;
    this.batch = shape.batch;
    this.kvHeads = shape.kvHeads;
    this.capacity = shape.capacity;
    this.headDim = shape.headDim;
    const bytes = shape.batch * shape.kvHeads * shape.capacity * shape.headDim * 4;
    this.keys = pool.arena.alloc(bytes);
    try {
      this.values = pool.arena.alloc(bytes);
    } catch (error) {
      pool.arena.free(this.keys);
      throw error;
    }
  }

  /** Writes k and v [batch · tokens, kvHeads · headDim] at positions starts[sequence] … + tokens − 1. */
  append(k: Floats, v: Floats, starts: Int32Array): void {
    const { batch, kvHeads, headDim, capacity } = this;
    const tokens = k.length / (batch * kvHeads * headDim);
    checkLength('values', v, k.length);
    ensure(Number.isInteger(tokens), 'tensor-shape', () => `cache: ${k.length} elements for ${batch} sequences`);
    const end = Math.max(...starts) + tokens;
    ensure(
      end <= capacity,
      'context-length',
      () => `the key/value cache holds ${capacity} tokens, ${end} are needed`,
      'create the cache with a larger capacity',
    );
    const { arena } = this.#pool;
    arena.scoped(() => {
      const shape = [tokens, kvHeads, headDim, capacity, arena.pushI32(starts)];
      this.#pool.run('appendCache', batch, [arena.input(k), this.keys, ...shape], batch);
      this.#pool.run('appendCache', batch, [arena.input(v), this.values, ...shape], batch);
    });
  }

  /** Copies the first `length` positions of a head's keys or values out: [length, headDim]. */
  read(which: 'keys' | 'values', sequence: number, head: number, length: number, out: Float32Array): void {
    const at = this[which] / 4 + (sequence * this.kvHeads + head) * this.capacity * this.headDim;
    out.set(this.#pool.arena.f32.subarray(at, at + length * this.headDim));
  }

  /** Copies the first `tokens` positions of sequence `from` to sequence `to` of another cache, or of this one. */
  copyTo(target: KvCache, from: number, to: number, tokens: number): void {
    const { f32 } = this.#pool.arena;
    const length = tokens * this.headDim;
    for (let head = 0; head < this.kvHeads; head++) {
      const source = (from * this.kvHeads + head) * this.capacity * this.headDim;
      const result = (to * target.kvHeads + head) * target.capacity * target.headDim;
      for (const part of ['keys', 'values'] as const) {
        const begin = this[part] / 4 + source;
        f32.copyWithin(target[part] / 4 + result, begin, begin + length);
      }
    }
  }

  /** Frees it. */
  free(): void {
    this.#pool.arena.free(this.keys);
    this.#pool.arena.free(this.values);
  }
}

/** Arguments of {@link attention}. */
export interface AttentionArguments {
  /** [batch · tokens, heads · headDim]. */
  readonly q: Floats;
  readonly out: Floats;
  readonly batch: number;
  readonly heads: number;
  readonly kvHeads: number;
  readonly headDim: number;
  readonly scale: number;
  /** Positions a token sees, its own included; all when undefined. */
  readonly window?: number;
  /** Tokens before this call's, [batch]; their keys and values, and this call's, are in the cache. */
  readonly starts: Int32Array;
  /** A cache that already holds this call's tokens, or the chunk's own k and v [batch · tokens, kvHeads · headDim]. */
  readonly source: KvCache | { readonly k: Floats; readonly v: Floats };
}

/** Causal grouped-query attention; made for few query rows per sequence (its cost is tokens · context · heads). */
export function attention(pool: KernelPool, args: AttentionArguments): void {
  const { q, out, batch, heads, kvHeads, headDim, source, starts } = args;
  const start = Math.max(...starts);
  const tokens = q.length / (batch * heads * headDim);
  checkLength('result', out, q.length);
  ensure(
    Number.isInteger(tokens) && heads % kvHeads === 0,
    'tensor-shape',
    () => `attention: ${q.length} elements, ${batch} sequences, ${heads} heads of ${headDim} over ${kvHeads}`,
  );
  const cached = source instanceof KvCache;
  ensure(cached ? start + tokens <= source.capacity : start === 0, 'context-length', 'attention beyond its keys');
  const total = start + tokens;
  pool.ensureScratch(tokens * (heads / kvHeads) * (total + 8) * 4);
  const { arena } = pool;
  arena.scoped(() => {
    const from = arena.input(q);
    const to = arena.output(out);
    const row = headDim * 4;
    const place = cached
      ? {
          keys: source.keys,
          values: source.values,
          batchStep: kvHeads * source.capacity * row,
          headStep: source.capacity * row,
          step: row,
        }
      : {
          keys: arena.input(source.k),
          values: arena.input(source.v),
          batchStep: tokens * kvHeads * row,
          headStep: row,
          step: kvHeads * row,
        };
    const work = tokens * (heads / kvHeads) * total * headDim;
    pool.run(
      'attention',
      batch * kvHeads,
      [
        from,
        place.keys,
        place.values,
        to,
        tokens,
        heads,
        kvHeads,
        headDim,
        place.batchStep,
        place.headStep,
        place.step,
        arena.pushI32(starts),
        args.window ?? 0,
        args.scale,
      ],
      Math.ceil(20_000 / work),
    );
    arena.finish(to, out);
  });
}

/** Arguments of {@link attentionForest}. */
export interface ForestArguments {
  /** [rows, heads · headDim]. */
  readonly q: Floats;
  readonly out: Floats;
  /** [rows, kvHeads · headDim]. */
  readonly k: Floats;
  readonly v: Floats;
  readonly heads: number;
  readonly kvHeads: number;
  readonly headDim: number;
  readonly scale: number;
  readonly window?: number;
  /** [rows] each; see AttentionOptions.ends and forestRoots. */
  readonly ends: Int32Array;
  readonly positions: Int32Array;
  readonly roots: Int32Array;
}

/** Attention within a forest of packed tokens. */
export function attentionForest(pool: KernelPool, args: ForestArguments): void {
  const { q, k, v, out, heads, kvHeads, headDim, ends, positions, roots } = args;
  const rows = ends.length;
  checkLength('queries', q, rows * heads * headDim);
  checkLength('keys', k, rows * kvHeads * headDim);
  checkLength('values', v, k.length);
  checkLength('result', out, q.length);
  const share = heads / kvHeads;
  ensure(Number.isInteger(share), 'tensor-shape', () => `attention of ${heads} heads over ${kvHeads}`);
  const longest = positions.reduce((most, position) => Math.max(most, position), 0) + 1;
  pool.ensureScratch(share * (longest + 8) * 4);
  const { arena } = pool;
  arena.scoped(() => {
    const sources = [arena.input(q), arena.input(k), arena.input(v)];
    const to = arena.output(out);
    const tables = [ends, positions, roots].map((table) => arena.pushI32(table));
    const shape = [heads, kvHeads, headDim, ...tables, args.window ?? 0, args.scale];
    const work = share * longest * headDim;
    pool.run('attentionForest', rows * kvHeads, [...sources, to, ...shape], Math.ceil(20_000 / work));
    arena.finish(to, out);
  });
}

/** Scores of rows of logits; see RowScores in the op contract. */
export interface LogitScores {
  nll: Float64Array;
  hit: Uint8Array;
  kl?: Float64Array;
  agree?: Uint8Array;
}

/** −log p(target) per row of logits [rows, vocab]; with reference logits also KL(reference ‖ logits) and argmax agreement. */
export function score(
  pool: KernelPool,
  logits: Float32Array,
  targets: Int32Array,
  reference?: Float32Array,
): LogitScores {
  const rows = targets.length;
  const vocab = logits.length / rows;
  ensure(
    rows === 0 || Number.isInteger(vocab),
    'tensor-shape',
    () => `score: ${logits.length} logits for ${rows} rows`,
  );
  if (reference) checkLength('reference logits', reference, logits.length);
  const result: LogitScores = { nll: new Float64Array(rows), hit: new Uint8Array(rows) };
  if (reference) {
    result.kl = new Float64Array(rows);
    result.agree = new Uint8Array(rows);
  }
  const { arena } = pool;
  const band = Math.max(pool.threads, Math.floor(SCORE_BAND_BYTES / (vocab * 4)));
  for (let r = 0; r < rows; r += band) {
    const count = Math.min(band, rows - r);
    arena.scoped(() => {
      const part = (source: Float32Array): Pointer => arena.pushF32(source.subarray(r * vocab, (r + count) * vocab));
      const x = part(logits);
      const y = reference ? part(reference) : 0;
      const to = arena.scratch(count * 64);
      pool.run('scoreRows', count, [x, y, vocab, to], Math.ceil(LIGHT_WORK / vocab));
      for (let i = 0; i < count; i++) {
        const at = (to >>> 3) + i * 8;
        const [top, sum, best, , sumRef, bestRef, cross] = arena.f64.subarray(at, at + 7);
        const target = targets[r + i];
        ensure(
          target >= 0 && target < vocab,
          'tensor-shape',
          () => `target ${target} is outside the vocabulary of ${vocab}`,
        );
        result.nll[r + i] = top + Math.log(sum) - logits[(r + i) * vocab + target];
        result.hit[r + i] = best === target ? 1 : 0;
        if (result.kl && result.agree) {
          // Rounding may leave a divergence of equal rows at −1e-9.
          result.kl[r + i] = Math.max(0, cross / sumRef + Math.log(sum) - Math.log(sumRef));
          result.agree[r + i] = best === bestRef ? 1 : 0;
        }
      }
    });
  }
  return result;
}
