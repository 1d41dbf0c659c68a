// Statistics of rows of logits: what −log p, KL divergence and argmax agreement are made of.
import { exp4 } from './math';

/** Maximum of n floats. */
function maximum(x: usize, n: u32): f32 {
  let m = f32x4.splat(-Infinity);
  let i: u32 = 0;
  for (; i + 4 <= n; i += 4) m = f32x4.pmax(m, v128.load(x + (<usize>i << 2)));
  let top = max<f32>(max<f32>(f32x4.extract_lane(m, 0), f32x4.extract_lane(m, 1)), max<f32>(f32x4.extract_lane(m, 2), f32x4.extract_lane(m, 3)));
  for (; i < n; i++) top = max<f32>(top, load<f32>(x + (<usize>i << 2)));
  return top;
}

/** First index that holds `value`, or n. */
function find(x: usize, n: u32, value: f32): u32 {
  for (let i: u32 = 0; i < n; i++) if (load<f32>(x + (<usize>i << 2)) == value) return i;
  return n;
}

/** Adds the lanes of a vector to an f64. */
// @ts-ignore: decorator
@inline
function widen(x: v128): f64 {
  return <f64>f32x4.extract_lane(x, 0) + <f64>f32x4.extract_lane(x, 1) + (<f64>f32x4.extract_lane(x, 2) + <f64>f32x4.extract_lane(x, 3));
}

/** Elements summed in f32 lanes before they go into an f64. */
const CHUNK: u32 = 64;

/** Σ e^(x − top) of n floats. */
function sumExp(x: usize, n: u32, top: f32): f64 {
  const shift = f32x4.splat(top);
  let total: f64 = 0;
  let i: u32 = 0;
  while (i + 4 <= n) {
    const stop = min(n, i + CHUNK);
    let s = f32x4.splat(0);
    for (; i + 4 <= stop; i += 4) s = f32x4.add(s, exp4(f32x4.sub(v128.load(x + (<usize>i << 2)), shift)));
    total += widen(s);
  }
  for (; i < n; i++) total += <f64>f32x4.extract_lane(exp4(f32x4.sub(v128.load32_splat(x + (<usize>i << 2)), shift)), 0);
  return total;
}

/**
 * Per row of logits [rows, n], eight f64: max, Σ e^(x − max), argmax, and of the reference (may be null) max, Σ, argmax
 * and Σ e^(ref − max) · ((ref − max_ref) − (x − max)). Units are rows.
 */
export function scoreRows(begin: u32, end: u32, scratch: usize, logits: usize, reference: usize, n: u32, out: usize): void {
  for (let r = begin; r < end; r++) {
    const x = logits + ((<usize>r * n) << 2);
    const to = out + (<usize>r << 6);
    const top = maximum(x, n);
    store<f64>(to, top);
    store<f64>(to, sumExp(x, n, top), 8);
    store<f64>(to, find(x, n, top), 16);
    if (!reference) continue;
    const y = reference + ((<usize>r * n) << 2);
    const topY = maximum(y, n);
    const shift = f32x4.splat(top);
    const shiftY = f32x4.splat(topY);
    let sum: f64 = 0;
    let cross: f64 = 0;
    let i: u32 = 0;
    while (i + 4 <= n) {
      const stop = min(n, i + CHUNK);
      let s = f32x4.splat(0);
      let c = f32x4.splat(0);
      for (; i + 4 <= stop; i += 4) {
        const b = f32x4.sub(v128.load(y + (<usize>i << 2)), shiftY);
        const a = f32x4.sub(v128.load(x + (<usize>i << 2)), shift);
        const e = exp4(b);
        s = f32x4.add(s, e);
        c = f32x4.add(c, f32x4.mul(e, f32x4.sub(b, a)));
      }
      sum += widen(s);
      cross += widen(c);
    }
    for (; i < n; i++) {
      const b = load<f32>(y + (<usize>i << 2)) - topY;
      const a = load<f32>(x + (<usize>i << 2)) - top;
      const e = f32x4.extract_lane(exp4(f32x4.splat(b)), 0);
      sum += <f64>e;
      cross += <f64>e * <f64>(b - a);
    }
    store<f64>(to, topY, 24);
    store<f64>(to, sum, 32);
    store<f64>(to, find(y, n, topY), 40);
    store<f64>(to, cross, 48);
  }
}
