// Gradient of causal attention on the GPU, as batched matrix products over a few heads at a time.
//
// Scores are computed anew, [tokens, tokens] per head, for as many heads as fit a bounded scratch; with P = softmax(s·QKᵀ):
// ∂V = Pᵀ·∂Y, ∂P = ∂Y·Vᵀ, ∂S = P ⊙ (∂P − Σ P·∂P)·s, ∂Q = ∂S·K, ∂K = ∂Sᵀ·Q. Products skip tiles above the diagonal. They
// run at the speed of the dense products, which a kernel that keeps scores in workgroup memory would not reach
// without matrix units: 5·tokens²·headDim multiply-adds per head instead of 9 (it must recompute scores three times).
import { ensure, GyreError } from '../../core/errors.js';
import type { Tensor } from '../../ops/backend.js';
import type { AttentionGradientOptions } from '../../ops/gradients.js';
import type { GpuDevice } from './device.js';
import { gemm, type GemmBatch } from './gemm.js';
import { softmaxGradientKernel } from './kernels/attention-gradient.js';
import { makeTensor, own, spread, type GpuTensor } from './tensor.js';

/** Most bytes of scores at a time, and of their gradients. */
const SCRATCH_BYTES = 256 * 2 ** 20;

/** See GradientOps.attentionGradient. */
export function attentionGradient(
  gpu: GpuDevice,
  q: GpuTensor,
  k: Tensor,
  v: Tensor,
  { batch, heads, kvHeads, headDim, scale, window = 0x7fffffff }: AttentionGradientOptions,
  dy: Tensor,
): { q: GpuTensor; k: GpuTensor; v: GpuTensor } {
  const { rows, cols } = q.matrix;
  const [keys, values, slope] = [k, v, dy].map(own);
  const tokens = rows / batch;
  ensure(
    Number.isInteger(tokens) &&
      cols === heads * headDim &&
      heads % kvHeads === 0 &&
      keys.elements === rows * kvHeads * headDim &&
      values.elements === keys.elements &&
      slope.elements === q.elements,
    'tensor-shape',
    () =>
      `q [${q.shape.join(', ')}] and k [${keys.shape.join(', ')}] are not ${batch} × ${heads} and ${kvHeads} heads of ${headDim}`,
  );
  const [dq, dk, dv] = [q, keys, values].map((like) => makeTensor(gpu, like.shape));
  const share = heads / kvHeads;
  const square = tokens * tokens;
  const { maxBufferSize, maxStorageBufferBindingSize } = gpu.limits;
  const limit = Math.min(SCRATCH_BYTES, maxBufferSize, maxStorageBufferBindingSize);
  const perGroup = 4 * share * square;
  if (perGroup > Math.min(maxBufferSize, maxStorageBufferBindingSize))
    throw new GyreError('limit-exceeded', `${share} heads × ${tokens}² scores do not fit a GPU buffer`, {
      remedy: 'train on shorter sequences',
    });
  // Whole sequences at a time, or else key heads of one sequence.
  const fitting = Math.max(1, Math.floor(limit / perGroup));
  const sequences = Math.min(batch, Math.max(1, Math.floor(fitting / kvHeads)));
  const groups = Math.min(kvHeads, fitting);
  const scores = gpu.buffer(sequences * groups * perGroup, 'scores of attention');
  const slopes = gpu.buffer(sequences * groups * perGroup, 'gradients of scores');
  // One tile for all products, so that the zeros beside the diagonal reach as far as any of them reads.
  const tile = tokens > 64 && headDim > 64 ? 128 : 64;
  const wide = { lda: heads * headDim, ldb: kvHeads * headDim, tile } as const;
  for (let b0 = 0; b0 < batch; b0 += sequences) {
    const some = Math.min(sequences, batch - b0);
    for (let g0 = 0; g0 < kvHeads; g0 += groups) {
      const taken = Math.min(groups, kvHeads - g0);
      const queryAt = b0 * tokens * heads * headDim + g0 * share * headDim;
      const keyAt = b0 * tokens * kvHeads * headDim + g0 * headDim;
      const [perSequence, perKeys] = [tokens * heads * headDim, tokens * kvHeads * headDim];
      const inner = taken * share;
      // Every query head with the keys or values it shares.
      const byHead: GemmBatch = {
        count: some * inner,
        a: headDim,
        b: headDim,
        c: square,
        shareB: share,
        outer: { inner, a: perSequence, b: perKeys, c: inner * square },
      };
      const across = { m: tokens, n: tokens, k: headDim, transposeB: true, triangle: 'result' } as const;
      const from = { offsetA: queryAt, offsetB: keyAt };
      gemm(gpu, { ...across, ...wide, ...from, a: q, b: keys, c: scores, alpha: scale, batch: byHead });
      gemm(gpu, { ...across, ...wide, ...from, a: slope, b: values, c: slopes, batch: byHead });
      const count = some * inner * tokens;
      gpu.dispatch(
        softmaxGradientKernel,
        { s: scores, dp: slopes },
        { rows: count, tokens, window, tile, scale },
        spread(count),
      );
      gemm(gpu, {
        a: slopes,
        b: keys,
        c: dq,
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
          count: some * inner,
          a: square,
          b: headDim,
          c: headDim,
          shareB: share,
          outer: { inner, a: inner * square, b: perKeys, c: perSequence },
        },
      });
      // Query heads of one key head add up.
      for (let s = 0; s < share; s++) {
        for (const { from: squares, with: rowsOf, to } of [
          { from: slopes, with: q, to: dk },
          { from: scores, with: slope, to: dv },
        ])
          gemm(gpu, {
            a: squares,
            b: rowsOf,
            c: to,
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
              count: some * taken,
              a: share * square,
              b: share * headDim,
              c: headDim,
              outer: { inner: taken, a: inner * square, b: perSequence, c: perKeys },
            },
          });
      }
    }
  }
  gpu.release(scores);
  gpu.release(slopes);
  return { q: dq, k: dk, v: dv };
}
