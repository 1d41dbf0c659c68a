// What attention reads besides its inputs: RoPE tables, key/value caches, and where their sequences start.
import { ensure, GyreError } from '../../core/errors.js';
import type {
  AttentionOptions,
  KvCacheHandle,
  KvCacheShape,
  KvGrid,
  PerSequence,
  RopeHandle,
  SequenceCopy,
} from '../../ops/backend.js';
import { checkCopies, startsOf } from '../../ops/sequences.js';
import { gridRun } from './activation-grid.js';
import type { GpuDevice } from './device.js';
import { appendGridKernel, gridCacheWords, unpackGridKernel } from './kernels/activation-grid.js';
import { appendKernel, cacheWords, type AttentionSource } from './kernels/attention.js';
import { copySequencesKernel } from './kernels/sequences.js';
import { elementGroups, HalfTensor, own, spread, type GpuTensor } from './tensor.js';

/** RoPE tables. */
export class GpuRope implements RopeHandle {
  readonly positions: number;
  readonly rotaryDim: number;
  /** [positions, rotaryDim / 2] (cos, sin). */
  readonly turns: GPUBuffer;

  constructor(gpu: GpuDevice, cos: Float32Array, sin: Float32Array, rotaryDim: number) {
    this.positions = cos.length / (rotaryDim / 2);
    this.rotaryDim = rotaryDim;
    ensure(
      rotaryDim % 2 === 0 && Number.isInteger(this.positions) && sin.length === cos.length,
      'tensor-shape',
      () => `RoPE tables of ${cos.length} and ${sin.length} values are not [positions, ${rotaryDim} / 2]`,
    );
    const turns = new Float32Array(2 * cos.length);
    for (let i = 0; i < cos.length; i++) [turns[2 * i], turns[2 * i + 1]] = [cos[i], sin[i]];
    this.turns = gpu.buffer(turns.byteLength, 'RoPE tables');
    gpu.upload(this.turns, turns);
  }

  free(gpu: GpuDevice): void {
    gpu.release(this.turns);
  }
}

/**
 * Keys and values [batch, kvHeads, capacity, headDim]: f16, two to a word, or codes on a grid, packed behind their low and
 * scale (kernels/activation-grid.ts).
 */
export class GpuKvCache implements KvCacheHandle {
  readonly batch: number;
  readonly kvHeads: number;
  readonly headDim: number;
  readonly capacity: number;
  readonly grid: KvGrid | undefined;
  /** Words of one token's head. */
  readonly words: number;
  readonly keys: GPUBuffer;
  readonly values: GPUBuffer;

  constructor(gpu: GpuDevice, shape: KvCacheShape) {
    const { headDim, grid } = shape;
    this.batch = shape.batch;
    this.kvHeads = shape.kvHeads;
    this.headDim = headDim;
    this.capacity = shape.capacity;
    this.grid = grid;
    if (grid) gridRun({ ...grid, symmetric: false, groupSize: headDim }, headDim);
    this.words = grid ? gridCacheWords(headDim, grid.bits) : cacheWords(headDim);
    const bytes = 4 * shape.batch * shape.kvHeads * shape.capacity * this.words;
    const what = `the keys of ${shape.batch} × ${shape.capacity} tokens`;
    this.keys = gpu.buffer(bytes, what);
    this.values = gpu.buffer(bytes, what);
  }

  free(gpu: GpuDevice): void {
    gpu.release(this.keys);
    gpu.release(this.values);
  }
}

/** Where sequences start: one number as a parameter, or one for each in a buffer. */
export interface Starts {
  readonly start: number;
  /** 1 when the buffer counts. */
  readonly ragged: number;
  /** Undefined where nothing is read; something must be bound all the same. */
  readonly buffer: GPUBuffer | undefined;
  readonly longest: number;
}

/** The tables uploaded last, starts of sequences and copies of them: all layers of a pass share them. */
const uploaded = new WeakMap<GpuDevice, { readonly table: Uint32Array; readonly buffer: GPUBuffer }[]>();
const TABLES_KEPT = 4;

function equal(a: Uint32Array, b: Uint32Array): boolean {
  if (a.length !== b.length) return false;
  for (let i = 0; i < a.length; i++) if (a[i] !== b[i]) return false;
  return true;
}

/** A small table on the GPU, valid for commands recorded now. `borrowed`: whoever owns the table may write over it later. */
export function tableOn(gpu: GpuDevice, table: Uint32Array, { borrowed = false } = {}): GPUBuffer {
  const known = uploaded.get(gpu) ?? [];
  uploaded.set(gpu, known);
  const same = known.find((one) => one.table === table || equal(one.table, table));
  if (same) return same.buffer;
  const buffer = gpu.buffer(table.byteLength, 'positions of sequences');
  gpu.upload(buffer, table);
  known.unshift({ table: borrowed ? table.slice() : table, buffer });
  for (const old of known.splice(TABLES_KEPT)) gpu.release(old.buffer);
  return buffer;
}

/** Where sequences start, as kernels take it. */
export function startsOn(gpu: GpuDevice, start: PerSequence, batch: number): Starts {
  if (typeof start === 'number') return { start, ragged: 0, buffer: undefined, longest: start };
  const starts = startsOf(start, batch);
  let [longest, alike] = [0, true];
  // By index: packed passes have thousands, and each of their layers asks.
  for (let i = 0; i < starts.length; i++) {
    if (starts[i] > longest) longest = starts[i];
    alike &&= starts[i] === starts[0];
  }
  if (alike) return { start: longest, ragged: 0, buffer: undefined, longest };
  const table = new Uint32Array(starts.buffer, starts.byteOffset, starts.length);
  return { start: 0, ragged: 1, buffer: tableOn(gpu, table, { borrowed: true }), longest };
}

/** See InferenceOps.copySequences. */
export function copySequences(
  gpu: GpuDevice,
  from: KvCacheHandle,
  to: KvCacheHandle,
  copies: readonly SequenceCopy[],
): void {
  if (!(from instanceof GpuKvCache) || !(to instanceof GpuKvCache)) throw foreign();
  ensure(
    from.kvHeads === to.kvHeads && from.headDim === to.headDim && from.words === to.words,
    'tensor-shape',
    'sequences can only be copied between caches of the same heads and grids',
  );
  checkCopies(from, to, copies);
  const longest = Math.max(0, ...copies.map(({ tokens }) => tokens));
  if (longest === 0) return;
  const { kvHeads, words } = from;
  // In workgroups of 256 threads that copy a few words each; z and y hold 65535 at most.
  const x = Math.min(64, Math.ceil((longest * words) / 1024));
  const most = Math.floor(65535 / kvHeads);
  for (let begin = 0; begin < copies.length; begin += most) {
    const part = copies.slice(begin, begin + most);
    const table = Uint32Array.from(part.flatMap((copy) => [copy.from, copy.to, copy.tokens]));
    gpu.dispatch(
      copySequencesKernel(from === to),
      { keys: from.keys, values: from.values, toKeys: to.keys, toValues: to.values, copies: tableOn(gpu, table) },
      { kvHeads, words, capacity: from.capacity, toCapacity: to.capacity },
      [x, part.length * kvHeads],
    );
  }
}

/** The first `reach` tokens of a cache of integers as f16; undefined for a cache of f16. */
export function unpackGrid(
  gpu: GpuDevice,
  { grid, batch, kvHeads, headDim, capacity, keys, values }: GpuKvCache,
  reach: number,
): { readonly k: GPUBuffer; readonly v: GPUBuffer; readonly stride: number } | undefined {
  if (!grid) return undefined;
  const runs = batch * kvHeads * reach;
  const count = (runs * headDim) / 8;
  const unpack = (cache: GPUBuffer): GPUBuffer => {
    const out = gpu.buffer(2 * runs * headDim, 'keys and values of a cache of integers');
    const kernel = unpackGridKernel(headDim, grid.bits, gpu.capabilities.f16);
    gpu.dispatch(kernel, { cache, out }, { count, reach, capacity }, elementGroups(count));
    return out;
  };
  return { k: unpack(keys), v: unpack(values), stride: reach };
}

/** How attention reads keys and values. */
export function sourceOf(cache: KvCacheHandle | undefined): AttentionSource {
  if (!cache) return 'rows';
  const { grid } = cache as GpuKvCache;
  return grid ? `int${grid.bits}` : 'cache';
}

/** Appends new keys and values. */
export function append(
  gpu: GpuDevice,
  cache: KvCacheHandle,
  keys: GpuTensor | HalfTensor,
  values: GpuTensor | HalfTensor,
  { batch, kvHeads, headDim }: AttentionOptions,
  tokens: number,
  { start, ragged, buffer, longest }: Starts,
): void {
  if (!(cache instanceof GpuKvCache)) throw foreign();
  ensure(
    cache.batch === batch && cache.kvHeads === kvHeads && cache.headDim === headDim,
    'tensor-shape',
    () => `a key/value cache of ${cache.batch} × ${cache.kvHeads} heads of ${cache.headDim}`,
  );
  const { capacity } = cache;
  ensure(
    longest + tokens <= capacity,
    'context-length',
    () => `${longest + tokens} tokens do not fit a key/value cache of ${capacity}`,
  );
  const starts = buffer ?? keys;
  if (cache.grid) {
    const { bits, clip } = cache.grid;
    const runs = batch * tokens * kvHeads;
    const params = { runs, size: headDim, clip, tokens, kvHeads, start, ragged, capacity };
    for (const [x, to] of [
      [keys, cache.keys],
      [values, cache.values],
    ] as const)
      gpu.dispatch(
        appendGridKernel(headDim, bits, x instanceof HalfTensor),
        { x, starts, cache: to },
        params,
        spread(runs),
      );
    return;
  }
  const count = batch * tokens * kvHeads * cacheWords(headDim);
  const params = { count, tokens, kvHeads, start, ragged, capacity };
  const half = keys instanceof HalfTensor && values instanceof HalfTensor;
  gpu.dispatch(
    appendKernel(headDim, half),
    {
      newKeys: half ? keys : own(keys),
      newValues: half ? values : own(values),
      starts,
      keys: cache.keys,
      values: cache.values,
    },
    params,
    elementGroups(count),
  );
}

/** A handle that this backend did not make. */
export function foreign(): GyreError {
  return new GyreError('backend', 'a handle of another backend was given to the WebGPU backend');
}
