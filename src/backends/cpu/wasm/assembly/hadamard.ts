// The Hadamard transform of activation rows: butterflies for the power of two, a dense ±1 matrix for what is left of the order.

/** Butterflies at distance d over `count` floats (a multiple of 2·d), in place. */
function butterflies(x: usize, count: u32, d: u32): void {
  if (d == 1 && !(count & 3)) {
    const sign = f32x4(1, -1, 1, -1);
    for (let p = x, end = x + (<usize>count << 2); p < end; p += 16) {
      const v = v128.load(p);
      v128.store(p, f32x4.add(f32x4.mul(v, sign), i8x16.shuffle(v, v, 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11)));
    }
    return;
  }
  if (d == 2 && !(count & 3)) {
    const sign = f32x4(1, 1, -1, -1);
    for (let p = x, end = x + (<usize>count << 2); p < end; p += 16) {
      const v = v128.load(p);
      v128.store(p, f32x4.add(f32x4.mul(v, sign), i8x16.shuffle(v, v, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7)));
    }
    return;
  }
  const step = <usize>d << 2;
  for (let run = x, end = x + (<usize>count << 2); run < end; run += 2 * step) {
    let at: usize = 0;
    for (; at + 16 <= step; at += 16) {
      const a = v128.load(run + at), b = v128.load(run + step + at);
      v128.store(run + at, f32x4.add(a, b));
      v128.store(run + step + at, f32x4.sub(a, b));
    }
    for (; at < step; at += 4) {
      const a = load<f32>(run + at), b = load<f32>(run + step + at);
      store<f32>(run + at, a + b);
      store<f32>(run + step + at, a - b);
    }
  }
}

/** to [m, width] = factor · base [m, m] · from [m, width]; both `width` floats per row. */
function mixBase(from: usize, to: usize, base: usize, m: u32, width: u32, factor: f32): void {
  const step = <usize>width << 2;
  const f = f32x4.splat(factor);
  for (let a: u32 = 0; a < m; a++) {
    const signs = base + ((<usize>a * m) << 2);
    const out = to + a * step;
    let at: usize = 0;
    for (; at + 16 <= step; at += 16) {
      let sum = f32x4.splat(0);
      let p = from + at;
      for (let c: usize = 0; c < <usize>m << 2; c += 4) {
        sum = f32x4.add(sum, f32x4.mul(v128.load(p), v128.load32_splat(signs + c)));
        p += step;
      }
      v128.store(out + at, f32x4.mul(sum, f));
    }
    for (; at < step; at += 4) {
      let sum: f32 = 0;
      let p = from + at;
      for (let c: usize = 0; c < <usize>m << 2; c += 4) {
        sum += load<f32>(p) * load<f32>(signs + c);
        p += step;
      }
      store<f32>(out + at, sum * factor);
    }
  }
}

/**
 * out = H·x / √n along an axis of `order` = m · power channels `inner` apart; units are runs of order · inner floats (the
 * axis with what lies between its neighbours). base [m, m] of ±1 as f32 (null for m = 1), factor 1 / √n. out may be x.
 * Scratch: order · inner floats.
 */
export function hadamardRows(
  begin: u32, end: u32, scratch: usize, x: usize, out: usize, order: u32, inner: u32, m: u32, base: usize, factor: f32,
): void {
  const count = order * inner;
  const bytes = <usize>count << 2;
  const power = order / m;
  for (let unit = begin; unit < end; unit++) {
    memory.copy(scratch, x + unit * bytes, bytes);
    for (let d: u32 = 1; d < power; d <<= 1) butterflies(scratch, count, d * inner);
    const to = out + unit * bytes;
    if (m > 1) {
      mixBase(scratch, to, base, m, power * inner, factor);
    } else {
      let at: usize = 0;
      const f = f32x4.splat(factor);
      for (; at + 16 <= bytes; at += 16) v128.store(to + at, f32x4.mul(v128.load(scratch + at), f));
      for (; at < bytes; at += 4) store<f32>(to + at, load<f32>(scratch + at) * factor);
    }
  }
}
