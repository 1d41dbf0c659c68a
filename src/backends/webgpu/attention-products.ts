// Causal attention of whole sequences in f32 and its gradient, as batched matrix products over a few heads at a time.
//
// Scores are computed, [tokens, tokens] per head, for as many heads as fit a bounded scratch; with P = softmax(s·QKᵀ):
// Y = P·V, and backwards ∂V = Pᵀ·∂Y, ∂P = ∂Y·Vᵀ, ∂S = P ⊙ (∂P − Σ P·∂P)·s, ∂Q = ∂S·K, ∂K = ∂Sᵀ·Q. Products skip tiles above
// the diagonal. They run at the speed of the dense products, which a kernel that keeps scores in workgroup memory does
// not reach without matrix units; backwards it would besides compute scores three times.
import { ensure, GyreError } from '../../core/errors.js';
import type { AttentionShape, Tensor } from '../../ops/backend.js';
import type { AttentionGradientOptions } from '../../ops/gradients.js';
import type { GpuDevice } from './device.js';
import { gemm } from './gemm.js';
import { softmaxGradientKernel, softmaxKernel } from './kernels/softmax.js';
import { makeTensor, own, spread, type GpuTensor } from './tensor.js';

/** Most bytes of scores at a time, and of their gradients. */
const SCRATCH_BYTES = 256 * 2 ** 20;
/** Without a window every earlier token is seen. */
const NO_WINDOW = 0x7fffffff;

/** Tuning of the functions below, for tests. */
export interface ScratchOptions {
  /** Most bytes of scores at a time; at least those of the query heads of one key head are taken. */
  readonly scratchBytes?: number;
}

/** Y [rows, heads·headDim]; see InferenceOps.attention, from position 0 and without a cache. */
export function attentionByProducts(
  gpu: GpuDevice,
  q: GpuTensor,
  k: GpuTensor,
  v: GpuTensor,
  options: AttentionGradientOptions,
  scratch: ScratchOptions = {},
): GpuTensor {
  const plan = planOf(gpu, q, [k, v], [], options, scratch);
  const { window = NO_WINDOW, scale } = options;
  const { tokens, tile } = plan;
  const out = makeTensor(gpu, q.shape);
  const scores = gpu.buffer(plan.bytes, 'scores of attention');
  for (const chunk of plan.chunks) {
    rowProducts(gpu, plan, chunk, { rows: q, others: k, squares: scores, alpha: scale });
    const rows = chunk.sequences * chunk.groups * plan.share * tokens;
    gpu.dispatch(softmaxKernel, { s: scores }, { rows, tokens, window, tile }, spread(rows));
    sumsOverKeys(gpu, plan, chunk, { squares: scores, others: v, out });
  }
  gpu.release(scores);
  return out;
}

/** See GradientOps.attentionGradient. */
export function attentionGradient(
  gpu: GpuDevice,
  q: GpuTensor,
  key: Tensor,
  value: Tensor,
  options: AttentionGradientOptions,
  gradient: Tensor,
  scratch: ScratchOptions = {},
): { q: GpuTensor; k: GpuTensor; v: GpuTensor } {
  const [k, v, dy] = [key, value, gradient].map(own);
  const plan = planOf(gpu, q, [k, v], [dy], options, scratch);
  const { window = NO_WINDOW, scale } = options;
  const { tokens, tile } = plan;
  const [dq, dk, dv] = [q, k, v].map((like) => makeTensor(gpu, like.shape));
  const scores = gpu.buffer(plan.bytes, 'scores of attention');
  const slopes = gpu.buffer(plan.bytes, 'gradients of scores');
  for (const chunk of plan.chunks) {
    rowProducts(gpu, plan, chunk, { rows: q, others: k, squares: scores, alpha: scale });
    rowProducts(gpu, plan, chunk, { rows: dy, others: v, squares: slopes, alpha: 1 });
    const rows = chunk.sequences * chunk.groups * plan.share * tokens;
    gpu.dispatch(softmaxGradientKernel, { s: scores, dp: slopes }, { rows, tokens, window, tile, scale }, spread(rows));
    sumsOverKeys(gpu, plan, chunk, { squares: slopes, others: k, out: dq });
    sumsOverQueries(gpu, plan, chunk, { squares: slopes, rows: q, out: dk });
    sumsOverQueries(gpu, plan, chunk, { squares: scores, rows: dy, out: dv });
  }
  gpu.release(scores);
  gpu.release(slopes);
  return { q: dq, k: dk, v: dv };
}

/** Whole sequences, or else some key heads of one sequence, with their query heads. */
interface Chunk {
  readonly sequences: number;
  /** Key heads. */
  readonly groups: number;
  /** Elements before its first query and key. */
  readonly queryAt: number;
  readonly keyAt: number;
}

interface Plan extends AttentionShape {
  readonly tokens: number;
  /** Query heads of a key head. */
  readonly share: number;
  /** One tile for all products, so that the zeros beside the diagonal reach as far as any of them reads. */
  readonly tile: 64 | 128;
  /** Scores of the largest chunk. */
  readonly bytes: number;
  readonly chunks: readonly Chunk[];
}

function planOf(
  gpu: GpuDevice,
  q: GpuTensor,
  likeKeys: readonly GpuTensor[],
  likeQueries: readonly GpuTensor[],
  { batch, heads, kvHeads, headDim }: AttentionGradientOptions,
  { scratchBytes = SCRATCH_BYTES }: ScratchOptions,
): Plan {
  const { rows, cols } = q.matrix;
  const tokens = rows / batch;
  ensure(
    Number.isInteger(tokens) &&
      cols === heads * headDim &&
      heads % kvHeads === 0 &&
      likeKeys.every((t) => t.elements === rows * kvHeads * headDim) &&
      likeQueries.every((t) => t.elements === q.elements),
    'tensor-shape',
    () =>
      `q [${q.shape.join(', ')}] and k [${likeKeys[0].shape.join(', ')}] are not ${batch} × ${heads} and ${kvHeads} heads of ${headDim}`,
  );
  const share = heads / kvHeads;
  const most = Math.min(gpu.limits.maxBufferSize, gpu.limits.maxStorageBufferBindingSize);
  const perGroup = 4 * share * tokens * tokens;
  if (perGroup > most)
    throw new GyreError(
      'limit-exceeded',
      `${share} heads × ${tokens}² scores do not fit a GPU buffer of ${most} bytes`,
      {
        remedy: 'train on shorter sequences',
      },
    );
  const fitting = Math.max(1, Math.floor(Math.min(scratchBytes, most) / perGroup));
  const sequences = Math.min(batch, Math.max(1, Math.floor(fitting / kvHeads)));
  const groups = Math.min(kvHeads, fitting);
  const chunks: Chunk[] = [];
  for (let b = 0; b < batch; b += sequences) {
    for (let g = 0; g < kvHeads; g += groups)
      chunks.push({
        sequences: Math.min(sequences, batch - b),
        groups: Math.min(groups, kvHeads - g),
        queryAt: (b * tokens * heads + g * share) * headDim,
        keyAt: (b * tokens * kvHeads + g) * headDim,
      });
  }
  const tile = tokens > 64 && headDim > 64 ? 128 : 64;
  return { heads, kvHeads, headDim, tokens, share, tile, bytes: sequences * groups * perGroup, chunks };
}

/** squares [heads, tokens, tokens] = α · rows · othersᵀ, per query head with the key head it shares, below the diagonal. */
function rowProducts(
  gpu: GpuDevice,
  { heads, kvHeads, headDim, tokens, share, tile }: Plan,
  { sequences, groups, queryAt, keyAt }: Chunk,
  call: { rows: GpuTensor; others: GpuTensor; squares: GPUBuffer; alpha: number },
): void {
  const inner = groups * share;
  const square = tokens * tokens;
  gemm(gpu, {
    a: call.rows,
    b: call.others,
    c: call.squares,
    m: tokens,
    n: tokens,
    k: headDim,
    transposeB: true,
    lda: heads * headDim,
    ldb: kvHeads * headDim,
    offsetA: queryAt,
    offsetB: keyAt,
    alpha: call.alpha,
    tile,
    triangle: 'result',
    batch: {
      count: sequences * inner,
      a: headDim,
      b: headDim,
      c: square,
      shareB: share,
      outer: { inner, a: tokens * heads * headDim, b: tokens * kvHeads * headDim, c: inner * square },
    },
  });
}

/** out [rows, heads·headDim] = squares · others, per query head with the key head it shares. */
function sumsOverKeys(
  gpu: GpuDevice,
  { heads, kvHeads, headDim, tokens, share, tile }: Plan,
  { sequences, groups, queryAt, keyAt }: Chunk,
  call: { squares: GPUBuffer; others: GpuTensor; out: GpuTensor },
): void {
  const inner = groups * share;
  const square = tokens * tokens;
  gemm(gpu, {
    a: call.squares,
    b: call.others,
    c: call.out,
    m: tokens,
    n: headDim,
    k: tokens,
    ldb: kvHeads * headDim,
    ldc: heads * headDim,
    offsetB: keyAt,
    offsetC: queryAt,
    tile,
    triangle: 'lower',
    batch: {
      count: sequences * inner,
      a: square,
      b: headDim,
      c: headDim,
      shareB: share,
      outer: { inner, a: inner * square, b: tokens * kvHeads * headDim, c: tokens * heads * headDim },
    },
  });
}

/** out [rows, kvHeads·headDim] = Σ over the query heads of a key head of squaresᵀ · rows. */
function sumsOverQueries(
  gpu: GpuDevice,
  { heads, kvHeads, headDim, tokens, share, tile }: Plan,
  { sequences, groups, queryAt, keyAt }: Chunk,
  call: { squares: GPUBuffer; rows: GpuTensor; out: GpuTensor },
): void {
  const square = tokens * tokens;
  for (let s = 0; s < share; s++)
    gemm(gpu, {
      a: call.squares,
      b: call.rows,
      c: call.out,
      m: tokens,
      n: headDim,
      k: tokens,
      transposeA: true,
      ldb: heads * headDim,
      ldc: kvHeads * headDim,
      offsetA: s * square,
      offsetB: queryAt + s * headDim,
      offsetC: keyAt,
      accumulate: s > 0,
      tile,
      triangle: 'upper',
      batch: {
        count: sequences * groups,
        a: share * square,
        b: share * headDim,
        c: headDim,
        outer: {
          inner: groups,
          a: groups * share * square,
          b: tokens * heads * headDim,
          c: tokens * kvHeads * headDim,
        },
      },
    });
}
