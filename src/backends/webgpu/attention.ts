// Heads, key/value caches and attention on the GPU.
import { ensure, GyreError } from '../../core/errors.js';
import type {
  AttentionOptions,
  KvCacheHandle,
  KvCacheShape,
  KvGrid,
  PerSequence,
  RopeHandle,
  SequenceCopy,
  SplitHeadsOptions,
  Tensor,
} from '../../ops/backend.js';
import { checkCopies, forestRoots, startsOf } from '../../ops/sequences.js';
import { gridRun } from './activation-grid.js';
import { hasMatrixUnits } from './capabilities.js';
import { attentionByProducts } from './attention-products.js';
import type { GpuDevice } from './device.js';
import { flashKernel, flashRows, flashTakes, flashWarps } from './fast/flash.js';
import { applyHadamard, GpuHadamard, hadamardHalf } from './hadamard.js';
import { appendGridKernel, gridCacheWords, unpackGridKernel } from './kernels/activation-grid.js';
import {
  appendKernel,
  attentionKernel,
  attentionMemory,
  cacheWords,
  combineKernel,
  splitAttentionKernel,
  type AttentionSource,
  type AttentionVariant,
} from './kernels/attention.js';
import { splitHeadsKernel } from './kernels/rope.js';
import { copySequencesKernel } from './kernels/sequences.js';
import {
  elementGroups,
  freeTensor,
  HalfTensor,
  isHalfWidth,
  makeHalf,
  makeTensor,
  narrow,
  own,
  ownAny,
  spread,
  type GpuTensor,
} from './tensor.js';

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
interface Starts {
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

/** A small table on the GPU, valid for commands recorded now. */
function tableOn(gpu: GpuDevice, table: Uint32Array): GPUBuffer {
  const known = uploaded.get(gpu) ?? [];
  uploaded.set(gpu, known);
  const same = known.find((one) => one.table === table || equal(one.table, table));
  if (same) return same.buffer;
  const buffer = gpu.buffer(table.byteLength, 'positions of sequences');
  gpu.upload(buffer, table);
  known.unshift({ table, buffer });
  for (const old of known.splice(TABLES_KEPT)) gpu.release(old.buffer);
  return buffer;
}

function startsOn(gpu: GpuDevice, start: PerSequence, batch: number): Starts {
  if (typeof start === 'number') return { start, ragged: 0, buffer: undefined, longest: start };
  const starts = startsOf(start, batch);
  let [longest, alike] = [0, true];
  for (const own of starts) {
    longest = Math.max(longest, own);
    alike &&= own === starts[0];
  }
  if (alike) return { start: longest, ragged: 0, buffer: undefined, longest };
  return { start: 0, ragged: 1, buffer: tableOn(gpu, new Uint32Array(starts)), longest };
}

/** Words of a section: rows, and those that a tile of keys may read after them. */
const forestStride = (rows: number): number => 4 * Math.ceil((rows + 36) / 4);

/** Tables of forests by their ends, which all layers of a pass share. */
const forests = new WeakMap<Int32Array, { readonly positions: PerSequence; readonly table: Uint32Array }>();

/** Ends, positions and roots of packed rows, in sections of {@link forestStride} words: rows after the last end at 0. */
function forestTable(ends: Int32Array, positions: PerSequence): Uint32Array {
  const known = forests.get(ends);
  if (known?.positions === positions) return known.table;
  const stride = forestStride(ends.length);
  const table = new Uint32Array(3 * stride);
  table.set(ends);
  table.set(startsOf(positions, ends.length), stride);
  table.set(forestRoots(ends, positions), 2 * stride);
  forests.set(ends, { positions, table });
  return table;
}

/** Attention within a forest of packed tokens; see AttentionOptions.ends. */
function attentionForest(
  gpu: GpuDevice,
  query: GpuTensor | HalfTensor,
  k: GpuTensor | HalfTensor,
  v: GpuTensor | HalfTensor,
  ends: Int32Array,
  options: AttentionOptions,
): Tensor {
  const { heads, kvHeads, headDim, scale, cache, batch } = options;
  const { rows, cols } = query.matrix;
  ensure(
    !cache && batch === rows && ends.length === rows,
    'tensor-shape',
    () => `${rows} packed rows are sequences of one token without a cache, found ${batch} sequences`,
  );
  const starts = tableOn(gpu, forestTable(ends, options.start));
  const stride = forestStride(rows);
  const window = Math.min(options.window ?? 0x7fffffff, 0x7fffffff);
  const rowCount = rows * (heads / kvHeads);
  const params = { tokens: rows, heads, kvHeads, start: 0, ragged: 0, window, stride, scale };
  if (
    [query, k, v].every((one) => one instanceof HalfTensor) &&
    hasMatrixUnits(gpu.capabilities) &&
    flashTakes(headDim)
  ) {
    const out = makeHalf(gpu, rows, cols);
    const warps = 4;
    gpu.dispatch(flashKernel({ headDim, source: 'forest', warps }), { q: query, k, v, starts, out }, params, [
      Math.ceil(rowCount / flashRows({ warps })),
      1,
      kvHeads,
    ]);
    return out;
  }
  const out = makeTensor(gpu, query.shape);
  const tile = chooseTile(gpu, headDim, rowCount);
  gpu.dispatch(
    attentionKernel({ headDim, ...tile, source: 'forest' }),
    { q: own(query), k: own(k), v: own(v), starts, out },
    { ...params, splitKeys: rows },
    [Math.ceil(rowCount / tile.rows), 1, kvHeads],
  );
  if (!(query instanceof HalfTensor)) return out;
  const narrowed = narrow(gpu, out);
  freeTensor(gpu, out);
  return narrowed;
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

/** See InferenceOps.splitHeads. The heads are f16 with `half`, where they are whole rows of 16 bytes. */
export function splitHeads(
  gpu: GpuDevice,
  qkv: GpuTensor,
  options: SplitHeadsOptions,
  half: boolean,
): { q: Tensor; k: Tensor; v: Tensor } {
  const { heads, kvHeads, headDim, batch, rope, qNorm, kNorm, eps } = options;
  if (!(rope instanceof GpuRope)) throw foreign();
  const { rows, cols } = qkv.matrix;
  ensure(
    cols === (heads + 2 * kvHeads) * headDim,
    'tensor-shape',
    () => `${cols} columns are not ${heads} + 2 · ${kvHeads} heads of ${headDim}`,
  );
  const tokens = tokensOf(rows, batch);
  const { start, ragged, buffer, longest } = startsOn(gpu, options.start, batch);
  ensure(
    longest + tokens <= rope.positions,
    'context-length',
    () => `positions up to ${longest + tokens} asked of RoPE tables for ${rope.positions}`,
  );
  ensure(
    rope.rotaryDim <= headDim,
    'tensor-shape',
    () => `rotary dimension ${rope.rotaryDim} exceeds head dimension ${headDim}`,
  );
  const narrowed = half && isHalfWidth(headDim);
  const make = (cols: number): GpuTensor | HalfTensor =>
    narrowed ? makeHalf(gpu, rows, cols) : makeTensor(gpu, [rows, cols]);
  let [q, k] = [make(heads * headDim), make(kvHeads * headDim)];
  const v = make(kvHeads * headDim);
  const norms = { qNorm: qNorm !== undefined, kNorm: kNorm !== undefined };
  const items = rows * (heads + 2 * kvHeads);
  gpu.dispatch(
    splitHeadsKernel({
      headDim,
      rotaryDim: rope.rotaryDim,
      ...norms,
      ...(narrowed && { half: { f16: gpu.capabilities.f16 } }),
    }),
    {
      qkv,
      turns: rope.turns,
      // Kernels do not read what is absent; something must be bound.
      qWeight: qNorm ? own(qNorm) : rope.turns,
      kWeight: kNorm ? own(kNorm) : rope.turns,
      starts: buffer ?? rope.turns,
      q,
      k,
      v,
    },
    { items, heads, kvHeads, tokens, start, ragged, eps },
    spread(items),
  );
  const { headTransform } = options;
  if (headTransform) {
    ensure(
      headTransform instanceof GpuHadamard && headTransform.channels === headDim,
      'tensor-shape',
      () => `splitHeads takes a Hadamard transform of ${headDim} channels, found ${headTransform.channels}`,
    );
    [q, k] = [turnHeads(gpu, q, headTransform), turnHeads(gpu, k, headTransform)];
  }
  return { q, k, v };
}

/** Heads transformed; `x` is theirs to free. */
function turnHeads(gpu: GpuDevice, x: GpuTensor | HalfTensor, transform: GpuHadamard): GpuTensor | HalfTensor {
  if (!(x instanceof HalfTensor)) return applyHadamard(gpu, x, transform, { inPlace: true });
  const y = hadamardHalf(gpu, x, transform) ?? narrow(gpu, applyHadamard(gpu, own(x), transform, { inPlace: true }));
  freeTensor(gpu, x);
  return y;
}

/** Workgroups that fill a large GPU; fewer rows than that and the keys are split. */
const FILL = 512;
/** Rows from which matrix units are worth their tiles; below, keys are split over workgroups. */
const FLASH_ROWS = 64;
/** Tokens of a sequence without a cache from which its attention is computed as dense products. */
const PRODUCT_TOKENS = 512;
/** Keys of a split at least. */
const SPLIT_KEYS = 128;

/** See InferenceOps.attention. The result is f16 when q is. */
export function attention(gpu: GpuDevice, query: Tensor, k: Tensor, v: Tensor, options: AttentionOptions): Tensor {
  const { heads, kvHeads, headDim, batch, scale, cache } = options;
  const given = ownAny(query);
  const { rows, cols } = given.matrix;
  const tokens = tokensOf(rows, batch);
  const [keys, values] = [ownAny(k), ownAny(v)];
  const width = kvHeads * headDim;
  ensure(
    cols === heads * headDim &&
      heads % kvHeads === 0 &&
      keys.elements === rows * width &&
      values.elements === keys.elements,
    'tensor-shape',
    () =>
      `q [${given.shape.join(', ')}] and k [${keys.shape.join(', ')}] are not ${heads} and ${kvHeads} heads of ${headDim}`,
  );
  if (options.ends) return attentionForest(gpu, given, keys, values, options.ends, options);
  const starts = startsOn(gpu, options.start, batch);
  const { start, ragged, longest } = starts;
  if (cache) append(gpu, cache, keys, values, options, tokens, starts);
  else ensure(longest === 0, 'tensor-shape', 'attention without a cache starts at 0');
  const rowCount = tokens * (heads / kvHeads);
  // Without a window every earlier token is seen.
  const window = Math.min(options.window ?? 0x7fffffff, 0x7fffffff);
  if (
    given instanceof HalfTensor &&
    (cache || (keys instanceof HalfTensor && values instanceof HalfTensor)) &&
    hasMatrixUnits(gpu.capabilities) &&
    flashTakes(headDim) &&
    rowCount >= FLASH_ROWS
  ) {
    const out = makeHalf(gpu, rows, cols);
    const warps = flashWarps(rowCount, batch * kvHeads, headDim, gpu.limits);
    const unpacked = cache && unpackGrid(gpu, cache as GpuKvCache, longest + tokens);
    const source =
      unpacked ??
      (cache
        ? { k: (cache as GpuKvCache).keys, v: (cache as GpuKvCache).values, stride: cache.capacity }
        : { k: keys, v: values, stride: tokens });
    gpu.dispatch(
      flashKernel({ headDim, source: cache ? 'cache' : 'rows', warps }),
      { q: given, k: source.k, v: source.v, starts: starts.buffer ?? given, out },
      { tokens, heads, kvHeads, start, ragged, window, stride: source.stride, scale },
      [Math.ceil(rowCount / flashRows({ warps })), 1, batch * kvHeads],
    );
    if (unpacked) for (const buffer of [unpacked.k, unpacked.v]) gpu.release(buffer);
    return out;
  }
  if (!cache && !(given instanceof HalfTensor) && tokens >= PRODUCT_TOKENS)
    return attentionByProducts(gpu, given, own(keys), own(values), options);
  const q = own(given);
  const source = cache
    ? { k: (cache as GpuKvCache).keys, v: (cache as GpuKvCache).values, stride: cache.capacity }
    : { k: own(keys), v: own(values), stride: tokens };
  const finish = (out: GpuTensor): Tensor => {
    if (!(given instanceof HalfTensor)) return out;
    const narrowed = narrow(gpu, out);
    freeTensor(gpu, out);
    return narrowed;
  };
  const tile = chooseTile(gpu, headDim, rowCount);
  const tiles = Math.ceil(rowCount / tile.rows);
  const reach = Math.min(longest + tokens, window + tokens - 1);
  const wanted = Math.floor(FILL / (tiles * batch * kvHeads));
  const splits = Math.max(1, Math.min(wanted, Math.ceil(reach / SPLIT_KEYS)));
  const splitKeys = splits === 1 ? reach : Math.ceil(reach / splits);
  const out = makeTensor(gpu, q.shape);
  const params = { tokens, heads, kvHeads, start, ragged, window, stride: source.stride, splitKeys, scale };
  const variant: AttentionVariant = { headDim, ...tile, source: sourceOf(cache) };
  const groups = [tiles, splits, batch * kvHeads] as const;
  const bound = starts.buffer ?? q;
  if (splits === 1) {
    gpu.dispatch(attentionKernel(variant), { q, k: source.k, v: source.v, starts: bound, out }, params, groups);
    return finish(out);
  }
  const slots = batch * kvHeads * splits * rowCount;
  const sums = gpu.buffer(4 * slots * headDim, 'partial sums of attention');
  const softmax = gpu.buffer(8 * slots, 'partial sums of attention');
  gpu.dispatch(
    splitAttentionKernel(variant),
    { q, k: source.k, v: source.v, starts: bound, out: sums, softmax },
    params,
    groups,
  );
  const items = rows * heads;
  gpu.dispatch(
    combineKernel(headDim),
    { sums, softmax, out },
    { items, tokens, heads, kvHeads, splits },
    spread(items),
  );
  gpu.release(sums);
  gpu.release(softmax);
  return finish(out);
}

/** The first `reach` tokens of a cache of integers as f16; undefined for a cache of f16. */
function unpackGrid(
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

function sourceOf(cache: KvCacheHandle | undefined): AttentionSource {
  if (!cache) return 'rows';
  const { grid } = cache as GpuKvCache;
  return grid ? `int${grid.bits}` : 'cache';
}

/** Appends new keys and values. */
function append(
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

/** The largest tile that workgroup memory holds, no more rows than there are. */
function chooseTile(
  gpu: GpuDevice,
  headDim: number,
  rowCount: number,
): Pick<AttentionVariant, 'rows' | 'keys' | 'lanes'> {
  const memory = gpu.limits.maxComputeWorkgroupStorageSize;
  for (const rows of [16, 4, 1]) {
    // A tile of 16 for 5 rows is faster than two of 4.
    if (rows > 1 && rowCount <= rows / 4) continue;
    for (const keys of [32, 16, 8, 4]) {
      if (attentionMemory({ headDim, rows, keys }) <= memory) return { rows, keys, lanes: rows === 16 ? 16 : 32 };
    }
  }
  throw new GyreError(
    'limit-exceeded',
    `heads of ${headDim} do not fit this GPU's workgroup memory of ${memory} bytes`,
  );
}

/** Tokens per sequence. */
function tokensOf(rows: number, batch: number): number {
  ensure(rows % batch === 0, 'tensor-shape', () => `${rows} rows are no multiple of batch ${batch}`);
  return rows / batch;
}

function foreign(): GyreError {
  return new GyreError('backend', 'a handle of another backend was given to the WebGPU backend');
}
