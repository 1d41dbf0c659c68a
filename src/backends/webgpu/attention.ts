// Heads and attention on the GPU.
import { ensure, GyreError } from '../../core/errors.js';
import type { AttentionOptions, PerSequence, SplitHeadsOptions, Tensor } from '../../ops/backend.js';
import { forestRoots, startsOf } from '../../ops/sequences.js';
import { hasMatrixUnits } from './capabilities.js';
import { attentionByProducts } from './attention-products.js';
import type { GpuDevice } from './device.js';
import { flashKernel, flashRows, flashTakes, flashWarps } from './fast/flash.js';
import { applyHadamard, GpuHadamard, hadamardHalf } from './hadamard.js';
import {
  attentionKernel,
  attentionMemory,
  combineKernel,
  splitAttentionKernel,
  type AttentionVariant,
} from './kernels/attention.js';
import { splitHeadsKernel } from './kernels/rope.js';
import type { GpuKvCache } from './kv-cache.js';
import { append, foreign, GpuRope, sourceOf, startsOn, tableOn, unpackGrid } from './kv-cache.js';
import {
  spread,
  freeTensor,
  HalfTensor,
  isHalfWidth,
  makeHalf,
  makeTensor,
  narrow,
  own,
  ownAny,
  type GpuTensor,
} from './tensor.js';

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
