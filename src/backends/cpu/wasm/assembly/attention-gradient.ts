// Gradient of causal grouped-query attention over a whole chunk. Four query rows at a time: their attention weights are
// computed again from q and k (nothing is kept from the forward pass), then each key's rows of K, V, dK, dV are read once
// for the four.
import { exp4, sumLanes } from './math';

/** Query rows worked on together. */
const QUERIES: u32 = 4;
/** Keys whose rows of K, dK and dV (24 KiB at 64 dimensions) stay in the L1 cache while all dimensions pass. */
const KEYS: u32 = 32;

/** Σ a·b of n floats. */
function dot(a: usize, b: usize, n: u32): f32 {
  let s = f32x4.splat(0);
  let i: u32 = 0;
  for (; i + 4 <= n; i += 4) s = f32x4.add(s, f32x4.mul(v128.load(a + (<usize>i << 2)), v128.load(b + (<usize>i << 2))));
  let sum = sumLanes(s);
  for (; i < n; i++) sum += load<f32>(a + (<usize>i << 2)) * load<f32>(b + (<usize>i << 2));
  return sum;
}

/** Σ of the lanes of four vectors, as a vector. */
// @ts-ignore: decorator
@inline
function fold4(s0: v128, s1: v128, s2: v128, s3: v128): v128 {
  const a = f32x4.add(
    i8x16.shuffle(s0, s1, 0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23),
    i8x16.shuffle(s0, s1, 8, 9, 10, 11, 24, 25, 26, 27, 12, 13, 14, 15, 28, 29, 30, 31),
  );
  const b = f32x4.add(
    i8x16.shuffle(s2, s3, 0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23),
    i8x16.shuffle(s2, s3, 8, 9, 10, 11, 24, 25, 26, 27, 12, 13, 14, 15, 28, 29, 30, 31),
  );
  return f32x4.add(
    i8x16.shuffle(a, b, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23),
    i8x16.shuffle(a, b, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31),
  );
}

/** Products of one row with rows [from, to) of a matrix, × scale, to out[from…to). */
function products(x: usize, rows: usize, step: usize, n: u32, from: u32, to: u32, scale: f32, out: usize): void {
  let p = from;
  if (!(n & 3)) {
    const factor = f32x4.splat(scale);
    for (; p + 4 <= to; p += 4) {
      const r0 = rows + p * step, r1 = r0 + step, r2 = r1 + step, r3 = r2 + step;
      let s0 = f32x4.splat(0), s1 = f32x4.splat(0), s2 = f32x4.splat(0), s3 = f32x4.splat(0);
      for (let at: usize = 0; at < <usize>n << 2; at += 16) {
        const v = v128.load(x + at);
        s0 = f32x4.add(s0, f32x4.mul(v, v128.load(r0 + at)));
        s1 = f32x4.add(s1, f32x4.mul(v, v128.load(r1 + at)));
        s2 = f32x4.add(s2, f32x4.mul(v, v128.load(r2 + at)));
        s3 = f32x4.add(s3, f32x4.mul(v, v128.load(r3 + at)));
      }
      v128.store(out + (<usize>p << 2), f32x4.mul(fold4(s0, s1, s2, s3), factor));
    }
  }
  for (; p < to; p++) store<f32>(out + (<usize>p << 2), dot(x, rows + p * step, n) * scale);
}

/** Softmax over x[from…to), in place. */
function softmax(x: usize, from: u32, to: u32): void {
  let top: f32 = -Infinity;
  for (let p = from; p < to; p++) top = max<f32>(top, load<f32>(x + (<usize>p << 2)));
  const shift = f32x4.splat(top);
  let sum: f64 = 0;
  let p = from;
  for (; p + 4 <= to; p += 4) {
    const e = exp4(f32x4.sub(v128.load(x + (<usize>p << 2)), shift));
    v128.store(x + (<usize>p << 2), e);
    sum += <f64>sumLanes(e);
  }
  for (; p < to; p++) {
    const e = f32x4.extract_lane(exp4(f32x4.sub(v128.load32_splat(x + (<usize>p << 2)), shift)), 0);
    store<f32>(x + (<usize>p << 2), e);
    sum += <f64>e;
  }
  const share = <f32>(1 / sum);
  for (p = from; p < to; p++) store<f32>(x + (<usize>p << 2), load<f32>(x + (<usize>p << 2)) * share);
}

/** ds = p·(dp − Σ p·dp)·scale over [from, to), in place of dp. */
function throughSoftmax(p: usize, dp: usize, from: u32, to: u32, scale: f32): void {
  let mean: f64 = 0;
  for (let i = from; i < to; i++) mean += <f64>(load<f32>(p + (<usize>i << 2)) * load<f32>(dp + (<usize>i << 2)));
  const shift = <f32>mean;
  for (let i = from; i < to; i++) {
    const at = <usize>i << 2;
    store<f32>(dp + at, load<f32>(p + at) * (load<f32>(dp + at) - shift) * scale);
  }
}

/**
 * q, g, dq [batch·tokens, heads·d]; k, v, dk, dv [batch·tokens, kvHeads·d]. Token t sees the last `window` positions up to
 * its own (0: all). Units are (sequence, kv head), which own their rows of dk and dv and the dq of the heads that share
 * them. Scratch: 2·QUERIES rows of tokens floats, padded to 4.
 */
export function attentionGradient(
  begin: u32, end: u32, scratch: usize,
  q: usize, k: usize, v: usize, g: usize, dq: usize, dk: usize, dv: usize,
  tokens: u32, heads: u32, kvHeads: u32, d: u32, window: u32, scale: f32,
): void {
  const share = heads / kvHeads;
  const bytes = <usize>d << 2;
  const queryStep = heads * bytes;
  const keyStep = kvHeads * bytes;
  const row = <usize>((tokens + 7) & ~3) << 2;
  const weights = scratch;
  const slopes = scratch + QUERIES * row;
  for (let unit = begin; unit < end; unit++) {
    const b = unit / kvHeads;
    const h = unit - b * kvHeads;
    const keyAt = (b * tokens * kvHeads + h) * bytes;
    const K = k + keyAt, V = v + keyAt, DK = dk + keyAt, DV = dv + keyAt;
    for (let p: u32 = 0; p < tokens; p++) {
      memory.fill(DK + p * keyStep, 0, bytes);
      memory.fill(DV + p * keyStep, 0, bytes);
    }
    for (let head: u32 = 0; head < share; head++) {
      const queryAt = (b * tokens * heads + h * share + head) * bytes;
      for (let t: u32 = 0; t < tokens; t += QUERIES) {
        const count = min(tokens - t, QUERIES);
        const last = t + count;
        const oldest = window && t + 1 > window ? t + 1 - window : 0;
        const at = queryAt + t * queryStep;
        memory.fill(scratch, 0, 2 * QUERIES * row);
        for (let i: u32 = 0; i < count; i++) {
          const to = t + i + 1;
          const from = window && to > window ? to - window : 0;
          products(q + at + i * queryStep, K, keyStep, d, from, to, scale, weights + i * row);
          softmax(weights + i * row, from, to);
          products(g + at + i * queryStep, V, keyStep, d, from, to, 1, slopes + i * row);
          throughSoftmax(weights + i * row, slopes + i * row, from, to, scale);
          memory.fill(dq + at + i * queryStep, 0, bytes);
        }
        // Positions a query does not see have weight and slope 0.
        for (let p = oldest; p < last; p += KEYS) {
          spread(q + at, g + at, dq + at, queryStep, count, K, DK, DV, keyStep, p, min(p + KEYS, last), d, weights, slopes, row);
        }
      }
    }
  }
}

/** dK_p += Σ ds·q, dV_p += Σ w·g, dq += Σ ds·K_p for p in [from, to) and up to four queries. */
function spread(
  q: usize, g: usize, dq: usize, queryStep: usize, count: u32, K: usize, DK: usize, DV: usize, keyStep: usize, from: u32, to: u32,
  d: u32, weights: usize, slopes: usize, row: usize,
): void {
  let c: u32 = 0;
  for (; c + 4 <= d; c += 4) {
    const at = <usize>c << 2;
    const none = f32x4.splat(0);
    const q0 = v128.load(q + at), g0 = v128.load(g + at);
    const q1 = count > 1 ? v128.load(q + queryStep + at) : none, g1 = count > 1 ? v128.load(g + queryStep + at) : none;
    const q2 = count > 2 ? v128.load(q + 2 * queryStep + at) : none, g2 = count > 2 ? v128.load(g + 2 * queryStep + at) : none;
    const q3 = count > 3 ? v128.load(q + 3 * queryStep + at) : none, g3 = count > 3 ? v128.load(g + 3 * queryStep + at) : none;
    let a0 = v128.load(dq + at);
    let a1 = count > 1 ? v128.load(dq + queryStep + at) : none;
    let a2 = count > 2 ? v128.load(dq + 2 * queryStep + at) : none;
    let a3 = count > 3 ? v128.load(dq + 3 * queryStep + at) : none;
    let key = <usize>from * keyStep + at;
    for (let p = from; p < to; p++, key += keyStep) {
      const w = weights + (<usize>p << 2), s = slopes + (<usize>p << 2);
      const s0 = v128.load32_splat(s), s1 = v128.load32_splat(s + row), s2 = v128.load32_splat(s + 2 * row), s3 = v128.load32_splat(s + 3 * row);
      v128.store(DK + key, f32x4.add(v128.load(DK + key), f32x4.add(
        f32x4.add(f32x4.mul(s0, q0), f32x4.mul(s1, q1)), f32x4.add(f32x4.mul(s2, q2), f32x4.mul(s3, q3)),
      )));
      v128.store(DV + key, f32x4.add(v128.load(DV + key), f32x4.add(
        f32x4.add(f32x4.mul(v128.load32_splat(w), g0), f32x4.mul(v128.load32_splat(w + row), g1)),
        f32x4.add(f32x4.mul(v128.load32_splat(w + 2 * row), g2), f32x4.mul(v128.load32_splat(w + 3 * row), g3)),
      )));
      const x = v128.load(K + key);
      a0 = f32x4.add(a0, f32x4.mul(s0, x));
      a1 = f32x4.add(a1, f32x4.mul(s1, x));
      a2 = f32x4.add(a2, f32x4.mul(s2, x));
      a3 = f32x4.add(a3, f32x4.mul(s3, x));
    }
    v128.store(dq + at, a0);
    if (count > 1) v128.store(dq + queryStep + at, a1);
    if (count > 2) v128.store(dq + 2 * queryStep + at, a2);
    if (count > 3) v128.store(dq + 3 * queryStep + at, a3);
  }
  for (; c < d; c++) {
    const at = <usize>c << 2;
    for (let i: u32 = 0; i < count; i++) {
      const x = load<f32>(q + i * queryStep + at), y = load<f32>(g + i * queryStep + at);
      let sum = load<f32>(dq + i * queryStep + at);
      for (let p = from; p < to; p++) {
        const key = p * keyStep + at;
        const s = load<f32>(slopes + i * row + (<usize>p << 2));
        store<f32>(DK + key, load<f32>(DK + key) + s * x);
        store<f32>(DV + key, load<f32>(DV + key) + load<f32>(weights + i * row + (<usize>p << 2)) * y);
        sum += s * load<f32>(K + key);
      }
      store<f32>(dq + i * queryStep + at, sum);
    }
  }
}
