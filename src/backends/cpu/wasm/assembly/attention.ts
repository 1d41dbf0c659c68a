// Grouped-query attention of a few query rows over many keys: decoding, and short chunks.
import { exp4, sumLanes } from './math';

/** Positions whose values are summed at a time, for every query: they fit in an L1 cache. */
export const BLOCK: u32 = 16;

/** Σ a·b of n floats. */
export function dot1(a: usize, b: usize, n: u32): f32 {
  let s = f32x4.splat(0);
  let i: u32 = 0;
  for (; i + 4 <= n; i += 4) s = f32x4.add(s, f32x4.mul(v128.load(a + (<usize>i << 2)), v128.load(b + (<usize>i << 2))));
  let sum = sumLanes(s);
  for (; i < n; i++) sum += load<f32>(a + (<usize>i << 2)) * load<f32>(b + (<usize>i << 2));
  return sum;
}

/**
 * The same with more sums at once. One key after another is a single stream; four at once are four in one page, which hardware
 * prefetchers follow badly, so dot4 is for keys in a cache.
 */
// @ts-ignore: decorator
@inline
function dotRow(a: usize, b: usize, n: u32): f32 {
  let s0 = f32x4.splat(0), s1 = f32x4.splat(0), s2 = f32x4.splat(0), s3 = f32x4.splat(0);
  const end = a + (<usize>(n & ~15) << 2);
  for (; a < end; a += 64, b += 64) {
    s0 = f32x4.add(s0, f32x4.mul(v128.load(a), v128.load(b)));
    s1 = f32x4.add(s1, f32x4.mul(v128.load(a, 16), v128.load(b, 16)));
    s2 = f32x4.add(s2, f32x4.mul(v128.load(a, 32), v128.load(b, 32)));
    s3 = f32x4.add(s3, f32x4.mul(v128.load(a, 48), v128.load(b, 48)));
  }
  let sum = sumLanes(f32x4.add(f32x4.add(s0, s1), f32x4.add(s2, s3)));
  for (const stop = a + (<usize>(n & 15) << 2); a < stop; a += 4, b += 4) sum += load<f32>(a) * load<f32>(b);
  return sum;
}

/** Four keys at once (`step` bytes apart), n a multiple of 4. */
export function dot4(q: usize, key: usize, step: usize, n: u32, to: usize, scale: f32): void {
  let s0 = f32x4.splat(0), s1 = f32x4.splat(0), s2 = f32x4.splat(0), s3 = f32x4.splat(0);
  const k1 = key + step, k2 = k1 + step, k3 = k2 + step;
  for (let at: usize = 0; at < <usize>n << 2; at += 16) {
    const x = v128.load(q + at);
    s0 = f32x4.add(s0, f32x4.mul(x, v128.load(key + at)));
    s1 = f32x4.add(s1, f32x4.mul(x, v128.load(k1 + at)));
    s2 = f32x4.add(s2, f32x4.mul(x, v128.load(k2 + at)));
    s3 = f32x4.add(s3, f32x4.mul(x, v128.load(k3 + at)));
  }
  const a = f32x4.add(
    i8x16.shuffle(s0, s1, 0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23),
    i8x16.shuffle(s0, s1, 8, 9, 10, 11, 24, 25, 26, 27, 12, 13, 14, 15, 28, 29, 30, 31),
  );
  const b = f32x4.add(
    i8x16.shuffle(s2, s3, 0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23),
    i8x16.shuffle(s2, s3, 8, 9, 10, 11, 24, 25, 26, 27, 12, 13, 14, 15, 28, 29, 30, 31),
  );
  const low = i8x16.shuffle(a, b, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23);
  const high = i8x16.shuffle(a, b, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
  v128.store(to, f32x4.mul(f32x4.add(low, high), f32x4.splat(scale)));
}

/** x ← e^(x − max x) over n floats (4 may be written past the end); returns the sum. */
export function softmaxParts(x: usize, n: u32): f32 {
  let top: f32 = -Infinity;
  for (let i: u32 = 0; i < n; i++) top = max<f32>(top, load<f32>(x + (<usize>i << 2)));
  const shift = f32x4.splat(top);
  let sum: f64 = 0;
  let i: u32 = 0;
  for (; i + 4 <= n; i += 4) {
    const e = exp4(f32x4.sub(v128.load(x + (<usize>i << 2)), shift));
    v128.store(x + (<usize>i << 2), e);
    sum += <f64>sumLanes(e);
  }
  for (; i < n; i++) {
    const e = f32x4.extract_lane(exp4(f32x4.sub(v128.load32_splat(x + (<usize>i << 2)), shift)), 0);
    store<f32>(x + (<usize>i << 2), e);
    sum += <f64>e;
  }
  return <f32>sum;
}

/** to += weight · values, over n floats. */
// @ts-ignore: decorator
@inline
function addRow(weight: f32, values: usize, n: u32, to: usize): void {
  const w = f32x4.splat(weight);
  const end = values + (<usize>(n & ~3) << 2);
  for (; values < end; values += 16, to += 16) v128.store(to, f32x4.add(v128.load(to), f32x4.mul(v128.load(values), w)));
  for (const stop = values + (<usize>(n & 3) << 2); values < stop; values += 4, to += 4) store<f32>(to, load<f32>(to) + load<f32>(values) * weight);
}

/** to += Σ_p weights[p] · values[p], over n floats. */
export function addWeighted(weights: usize, values: usize, step: usize, count: u32, n: u32, to: usize): void {
  let at: usize = 0;
  const bytes = <usize>n << 2;
  for (; at + 64 <= bytes; at += 64) {
    let a0 = v128.load(to + at), a1 = v128.load(to + at, 16), a2 = v128.load(to + at, 32), a3 = v128.load(to + at, 48);
    let p = values + at;
    for (let i: u32 = 0; i < count; i++) {
      const w = v128.load32_splat(weights + (<usize>i << 2));
      a0 = f32x4.add(a0, f32x4.mul(v128.load(p), w));
      a1 = f32x4.add(a1, f32x4.mul(v128.load(p, 16), w));
      a2 = f32x4.add(a2, f32x4.mul(v128.load(p, 32), w));
      a3 = f32x4.add(a3, f32x4.mul(v128.load(p, 48), w));
      p += step;
    }
    v128.store(to + at, a0);
    v128.store(to + at, a1, 16);
    v128.store(to + at, a2, 32);
    v128.store(to + at, a3, 48);
  }
  for (; at < bytes; at += 4) {
    let a = load<f32>(to + at);
    for (let i: u32 = 0; i < count; i++) a += load<f32>(weights + (<usize>i << 2)) * load<f32>(values + i * step + at);
    store<f32>(to + at, a);
  }
}

/**
 * Causal attention. q, out: [batch · tokens, heads · d]. Keys and values: position p of head h of sequence b at
 * b·batchStep + h·headStep + p·step bytes (a cache, or a chunk as projected). Token t of sequence b sits at position
 * starts[b] + t and sees the last `window` positions up to its own (0: all). Units are (sequence, kv head): the heads
 * that share keys run together, so that keys and values are read once. Scratch: queries · (start + tokens, padded) floats.
 */
export function attention(
  begin: u32, end: u32, scratch: usize,
  q: usize, keys: usize, values: usize, out: usize, tokens: u32, heads: u32, kvHeads: u32, d: u32,
  batchStep: usize, headStep: usize, step: usize, starts: usize, window: u32, scale: f32,
): void {
  const share = heads / kvHeads;
  const bytes = <usize>d << 2;
  for (let unit = begin; unit < end; unit++) {
    const b = unit / kvHeads;
    const start = load<u32>(starts + (<usize>b << 2));
    const total = start + tokens;
    const padded = <usize>((total + 7) & ~3) << 2;
    const h = unit - b * kvHeads;
    const keyAt = keys + b * batchStep + h * headStep;
    const valueAt = values + b * batchStep + h * headStep;
    const first = q + (b * tokens * heads + h * share) * bytes;
    const result = out + (b * tokens * heads + h * share) * bytes;
    const oldest = window && start + 1 > window ? start + 1 - window : 0;
    for (let p = oldest; p < total; p++) {
      const key = keyAt + p * step;
      for (let t = p > start ? p - start : 0; t < tokens; t++) {
        for (let i: u32 = 0; i < share; i++) {
          store<f32>(scratch + (t * share + i) * padded + (<usize>p << 2), dotRow(first + (t * heads + i) * bytes, key, d) * scale);
        }
      }
    }
    for (let t: u32 = 0; t < tokens; t++) {
      const last = start + t + 1;
      const from = window && last > window ? last - window : 0;
      for (let i: u32 = 0; i < share; i++) {
        const row = scratch + (t * share + i) * padded;
        const sum = softmaxParts(row + (<usize>from << 2), last - from);
        store<f32>(row + (<usize>total << 2), 1 / sum);
        memory.fill(result + (t * heads + i) * bytes, 0, bytes);
      }
    }
    for (let p = oldest; p < total; p += BLOCK) {
      for (let t: u32 = 0; t < tokens; t++) {
        const last = start + t + 1;
        const from = max(p, window && last > window ? last - window : 0);
        const to = min(p + BLOCK, last);
        if (from >= to) continue;
        for (let i: u32 = 0; i < share; i++) {
          const row = scratch + (t * share + i) * padded;
          for (let r = from; r < to; r++) addRow(load<f32>(row + (<usize>r << 2)), valueAt + r * step, d, result + (t * heads + i) * bytes);
        }
      }
    }
    for (let t: u32 = 0; t < tokens; t++) {
      for (let i: u32 = 0; i < share; i++) {
        const factor = load<f32>(scratch + (t * share + i) * padded + (<usize>total << 2));
        const row = result + (t * heads + i) * bytes;
        for (let c: usize = 0; c < bytes; c += 4) store<f32>(row + c, load<f32>(row + c) * factor);
      }
    }
  }
}

/**
 * Attention within a forest of packed tokens: q, out [rows, heads · d], keys and values [rows, kvHeads · d]. Row r sees rows
 * j ≤ r with r < ends[j] of its tree, which begins at roots[r], the last `window` of them (0: all); positions[r] + 1 is how many there are.
 * Units are (row, kv head). Scratch: heads / kvHeads · (most positions + 4) floats.
 */
export function attentionForest(
  begin: u32, end: u32, scratch: usize,
  q: usize, keys: usize, values: usize, out: usize, heads: u32, kvHeads: u32, d: u32,
  ends: usize, positions: usize, roots: usize, window: u32, scale: f32,
): void {
  const share = heads / kvHeads;
  const bytes = <usize>d << 2;
  const step = kvHeads * bytes;
  for (let unit = begin; unit < end; unit++) {
    const row = unit / kvHeads;
    const h = unit - row * kvHeads;
    const query = q + (row * heads + h * share) * bytes;
    const result = out + (row * heads + h * share) * bytes;
    const all = load<u32>(positions + (<usize>row << 2)) + 1;
    const hidden = window && all > window ? all - window : 0;
    const count = all - hidden;
    const padded = <usize>((count + 7) & ~3) << 2;
    // Twice along the path from the root: scores, then weighted values. Runs of visible rows, subtrees that ended before are skipped.
    for (let phase = 0; phase < 2; phase++) {
      if (phase == 1) {
        for (let i: u32 = 0; i < share; i++) {
          const weights = scratch + i * padded;
          const factor = f32x4.splat(1 / softmaxParts(weights, count));
          for (let at: usize = 0; at < <usize>count << 2; at += 16) v128.store(weights + at, f32x4.mul(v128.load(weights + at), factor));
        }
        memory.fill(result, 0, share * bytes);
      }
      let seen: u32 = 0;
      let j = load<u32>(roots + (<usize>row << 2));
      while (j <= row) {
        const stop = load<u32>(ends + (<usize>j << 2));
        if (stop <= row) {
          j = stop;
          continue;
        }
        let first = j;
        while (j <= row && load<u32>(ends + (<usize>j << 2)) > row) j++;
        const run = j - first;
        seen += run;
        if (seen <= hidden) continue;
        const visible = min(run, seen - hidden);
        first = j - visible;
        const place = seen - hidden - visible;
        for (let i: u32 = 0; i < share; i++) {
          const weights = scratch + i * padded + (<usize>place << 2);
          const own = query + i * bytes;
          if (phase == 1) {
            addWeighted(weights, values + first * step + h * bytes, step, visible, d, result + i * bytes);
            continue;
          }
          const key = keys + first * step + h * bytes;
          let c: u32 = 0;
          if (!(d & 3)) for (; c + 4 <= visible; c += 4) dot4(own, key + c * step, step, d, weights + (<usize>c << 2), scale);
          for (; c < visible; c++) store<f32>(weights + (<usize>c << 2), dot1(own, key + c * step, d) * scale);
        }
      }
    }
  }
}

/** Appends rows [batch · tokens, kvHeads · d] to a cache [batch, kvHeads, capacity, d] at starts[sequence]; units are sequences. */
export function appendCache(
  begin: u32, end: u32, scratch: usize, rows: usize, cache: usize, tokens: u32, kvHeads: u32, d: u32, capacity: u32, starts: usize,
): void {
  const bytes = <usize>d << 2;
  for (let b = begin; b < end; b++) {
    const start = load<u32>(starts + (<usize>b << 2));
    for (let t: u32 = 0; t < tokens; t++) {
      for (let h: u32 = 0; h < kvHeads; h++) {
        memory.copy(
          cache + ((<usize>(b * kvHeads + h)) * capacity + start + t) * bytes,
          rows + ((<usize>b * tokens + t) * kvHeads + h) * bytes,
          bytes,
        );
      }
    }
  }
}
