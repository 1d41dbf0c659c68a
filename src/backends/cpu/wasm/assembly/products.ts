// Products of a few activation rows with weights that stay in the arena, and the way back from packed weights to f32.
//
// Quantized weights are cut into segments: pieces of one group, at most 256 channels, padded to whole vectors with code 0.
// Activations are rounded to 16 bits per segment (1.5e-5 of the segment's maximum), so that codes are multiplied as
// integers (dot_i16x8) and only one conversion per segment is left. With x ≈ xscale · xq:
//   y += Σ_segments scale · xscale · Σ code·xq − (scale · zero) · (xscale · Σ xq).
//
// 4-bit codes (2 and 3 bits use the same layout): 16 bytes hold 32 codes as 8 lanes of 16 bits; nibble n of lane l is
// code 8n + l. Nibbles 1 and 3 are used in place, 16 times too large, and their sum is shifted right exactly by 4.
// Bounds: per i32 lane a segment of 256 adds 16 pairs of at most 2 · 240 · 32767 = 15.7e6, 252e6 < 2^31. 8-bit codes:
// 32 pairs of 2 · 255 · 32767 = 16.7e6, 535e6 < 2^31.
import { sumLanes } from './math';

/**
 * Rounds rows of activations to 16 bits per segment. xq [rows, segments, padded] i16, then per row and segment the scale
 * and scale · Σ xq (both [rows, stride] f32, zero beyond the segments). Segment s covers `length` channels from
 * (s / perGroup) · group + (s mod perGroup) · length, cut at its group's end. Units are rows.
 */
export function quantizeActivations(
  begin: u32, end: u32, scratch: usize,
  x: usize, n: u32, xq: usize, xscale: usize, xsum: usize, segments: u32, length: u32, padded: u32, group: u32, perGroup: u32, stride: u32,
): void {
  for (let r = begin; r < end; r++) {
    const row = x + ((<usize>r * n) << 2);
    let to = xq + ((<usize>r * segments * padded) << 1);
    const scales = xscale + ((<usize>r * stride) << 2);
    const sums = xsum + ((<usize>r * stride) << 2);
    for (let s = segments; s < stride; s++) {
      store<f32>(scales + (<usize>s << 2), 0);
      store<f32>(sums + (<usize>s << 2), 0);
    }
    for (let s: u32 = 0; s < segments; s++) {
      const inside = (s % perGroup) * length;
      const p = row + (<usize>((s / perGroup) * group + inside) << 2);
      const count = min(length, group - inside);
      let m = f32x4.splat(0);
      let i: u32 = 0;
      for (; i + 4 <= count; i += 4) m = f32x4.pmax(m, f32x4.abs(v128.load(p + (<usize>i << 2))));
      let top = max<f32>(max<f32>(f32x4.extract_lane(m, 0), f32x4.extract_lane(m, 1)), max<f32>(f32x4.extract_lane(m, 2), f32x4.extract_lane(m, 3)));
      for (; i < count; i++) top = max<f32>(top, abs<f32>(load<f32>(p + (<usize>i << 2))));
      const inverse: f32 = top > 1e-30 ? 32767 / top : 0;
      const f = f32x4.splat(inverse);
      let sum = i32x4.splat(0);
      i = 0;
      for (; i + 8 <= count; i += 8) {
        const a = i32x4.trunc_sat_f32x4_s(f32x4.nearest(f32x4.mul(v128.load(p + (<usize>i << 2)), f)));
        const b = i32x4.trunc_sat_f32x4_s(f32x4.nearest(f32x4.mul(v128.load(p + (<usize>i << 2), 16), f)));
        sum = i32x4.add(sum, i32x4.add(a, b));
        v128.store(to + (<usize>i << 1), i16x8.narrow_i32x4_s(a, b));
      }
      let total = i32x4.extract_lane(sum, 0) + i32x4.extract_lane(sum, 1) + i32x4.extract_lane(sum, 2) + i32x4.extract_lane(sum, 3);
      for (; i < count; i++) {
        const v = <i32>nearest<f32>(load<f32>(p + (<usize>i << 2)) * inverse);
        total += v;
        store<i16>(to + (<usize>i << 1), <i16>v);
      }
      for (; i < padded; i++) store<i16>(to + (<usize>i << 1), 0);
      const scale: f32 = inverse > 0 ? top / 32767 : 0;
      store<f32>(scales + (<usize>s << 2), scale);
      store<f32>(sums + (<usize>s << 2), scale * <f32>total);
      to += <usize>padded << 1;
    }
  }
}

/** Σ a·b over `stride` floats (a multiple of 4). */
// @ts-ignore: decorator
@inline
function dotPadded(a: usize, b: usize, stride: u32): f32 {
  let s = f32x4.splat(0);
  for (let at: usize = 0; at < <usize>stride << 2; at += 16) s = f32x4.add(s, f32x4.mul(v128.load(a + at), v128.load(b + at)));
  return sumLanes(s);
}

/** Bytes of weights asked for at a time. */
const BURST: usize = 2048;

/** Pairs of rows that make a burst. */
// @ts-ignore: decorator
@inline
function pairsAhead(rowBytes: usize): u32 {
  return max<u32>(1, <u32>(BURST / (2 * rowBytes)));
}

/** Loads one word of every line of [from, from + bytes) below `last`: spread over the arithmetic, too few misses would be in flight at once. */
// @ts-ignore: decorator
@inline
function touch(from: usize, bytes: usize, last: usize): u32 {
  let sum: u32 = 0;
  for (let p = from, stop = min(from + bytes, last); p < stop; p += 64) sum += load<u32>(p);
  return sum;
}

/**
 * y [rows, out] = x · Wᵀ (+ residual, may be null) for 4-bit codes; units are pairs of outputs. scales and offsets
 * (scale · zero) are [out, stride] f32. `vectors` are 16-byte vectors per segment.
 */
export function gemvNibbles(
  begin: u32, end: u32, scratch: usize,
  codes: usize, scales: usize, offsets: usize, xq: usize, xscale: usize, xsum: usize, y: usize, residual: usize,
  rows: u32, out: u32, segments: u32, vectors: u32, stride: u32,
): void {
  const rowBytes = <usize>(segments * vectors) << 4;
  const low = i16x8.splat(0x000f);
  const high = i16x8.splat(0x00f0);
  const last = codes + out * rowBytes;
  const burst = pairsAhead(rowBytes);
  let touched: u32 = 0;
  for (let unit = begin; unit < end; unit++) {
    const o0 = unit << 1;
    if ((unit - begin) % burst == 0) touched += touch(codes + (o0 + 2 * burst) * rowBytes, 2 * burst * rowBytes, last);
    // An odd last row runs twice; the second result is dropped.
    const o1 = min(o0 + 1, out - 1);
    const w0 = codes + o0 * rowBytes;
    const w1 = codes + o1 * rowBytes;
    const s0 = scales + ((<usize>o0 * stride) << 2);
    const s1 = scales + ((<usize>o1 * stride) << 2);
    for (let r: u32 = 0; r < rows; r++) {
      let x = xq + ((<usize>r * segments * vectors) << 6);
      const xs = xscale + ((<usize>r * stride) << 2);
      let p = w0;
      let q = w1;
      let f0 = f32x4.splat(0), f1 = f32x4.splat(0);
      for (let s: usize = 0; s < <usize>segments << 2; s += 4) {
        let a0 = i32x4.splat(0), b0 = i32x4.splat(0), a1 = i32x4.splat(0), b1 = i32x4.splat(0);
        for (const stop = p + (<usize>vectors << 4); p < stop; p += 16, q += 16, x += 64) {
          const v = v128.load(p);
          const u = v128.load(q);
          const x0 = v128.load(x), x1 = v128.load(x, 16);
          a0 = i32x4.add(a0, i32x4.dot_i16x8_s(v128.and(v, low), x0));
          b0 = i32x4.add(b0, i32x4.dot_i16x8_s(v128.and(v, high), x1));
          a1 = i32x4.add(a1, i32x4.dot_i16x8_s(v128.and(u, low), x0));
          b1 = i32x4.add(b1, i32x4.dot_i16x8_s(v128.and(u, high), x1));
          const v8 = i16x8.shr_u(v, 8);
          const u8_ = i16x8.shr_u(u, 8);
          const x2 = v128.load(x, 32), x3 = v128.load(x, 48);
          a0 = i32x4.add(a0, i32x4.dot_i16x8_s(v128.and(v8, low), x2));
          b0 = i32x4.add(b0, i32x4.dot_i16x8_s(v128.and(v8, high), x3));
          a1 = i32x4.add(a1, i32x4.dot_i16x8_s(v128.and(u8_, low), x2));
          b1 = i32x4.add(b1, i32x4.dot_i16x8_s(v128.and(u8_, high), x3));
        }
        const xf = v128.load32_splat(xs + s);
        const d0 = f32x4.convert_i32x4_s(i32x4.add(a0, i32x4.shr_s(b0, 4)));
        const d1 = f32x4.convert_i32x4_s(i32x4.add(a1, i32x4.shr_s(b1, 4)));
        f0 = f32x4.add(f0, f32x4.mul(d0, f32x4.mul(xf, v128.load32_splat(s0 + s))));
        f1 = f32x4.add(f1, f32x4.mul(d1, f32x4.mul(xf, v128.load32_splat(s1 + s))));
      }
      finishPair(f0, f1, offsets, xsum + ((<usize>r * stride) << 2), stride, o0, o1, y, residual, <usize>r * out);
    }
  }
  store<u32>(scratch, touched);
}

/** As gemvNibbles for 8-bit codes, 16 to a vector. */
export function gemvBytes(
  begin: u32, end: u32, scratch: usize,
  codes: usize, scales: usize, offsets: usize, xq: usize, xscale: usize, xsum: usize, y: usize, residual: usize,
  rows: u32, out: u32, segments: u32, vectors: u32, stride: u32,
): void {
  const rowBytes = <usize>(segments * vectors) << 4;
  const last = codes + out * rowBytes;
  const burst = pairsAhead(rowBytes);
  let touched: u32 = 0;
  for (let unit = begin; unit < end; unit++) {
    const o0 = unit << 1;
    if ((unit - begin) % burst == 0) touched += touch(codes + (o0 + 2 * burst) * rowBytes, 2 * burst * rowBytes, last);
    const o1 = min(o0 + 1, out - 1);
    const w0 = codes + o0 * rowBytes;
    const w1 = codes + o1 * rowBytes;
    const s0 = scales + ((<usize>o0 * stride) << 2);
    const s1 = scales + ((<usize>o1 * stride) << 2);
    for (let r: u32 = 0; r < rows; r++) {
      let x = xq + ((<usize>r * segments * vectors) << 5);
      const xs = xscale + ((<usize>r * stride) << 2);
      let p = w0;
      let q = w1;
      let f0 = f32x4.splat(0), f1 = f32x4.splat(0);
      for (let s: usize = 0; s < <usize>segments << 2; s += 4) {
        let a0 = i32x4.splat(0), b0 = i32x4.splat(0), a1 = i32x4.splat(0), b1 = i32x4.splat(0);
        for (const stop = p + (<usize>vectors << 4); p < stop; p += 16, q += 16, x += 32) {
          const v = v128.load(p);
          const u = v128.load(q);
          const x0 = v128.load(x), x1 = v128.load(x, 16);
          a0 = i32x4.add(a0, i32x4.dot_i16x8_s(i16x8.extend_low_i8x16_u(v), x0));
          b0 = i32x4.add(b0, i32x4.dot_i16x8_s(i16x8.extend_high_i8x16_u(v), x1));
          a1 = i32x4.add(a1, i32x4.dot_i16x8_s(i16x8.extend_low_i8x16_u(u), x0));
          b1 = i32x4.add(b1, i32x4.dot_i16x8_s(i16x8.extend_high_i8x16_u(u), x1));
        }
        const xf = v128.load32_splat(xs + s);
        f0 = f32x4.add(f0, f32x4.mul(f32x4.convert_i32x4_s(i32x4.add(a0, b0)), f32x4.mul(xf, v128.load32_splat(s0 + s))));
        f1 = f32x4.add(f1, f32x4.mul(f32x4.convert_i32x4_s(i32x4.add(a1, b1)), f32x4.mul(xf, v128.load32_splat(s1 + s))));
      }
      finishPair(f0, f1, offsets, xsum + ((<usize>r * stride) << 2), stride, o0, o1, y, residual, <usize>r * out);
    }
  }
  store<u32>(scratch, touched);
}

// @ts-ignore: decorator
@inline
function finishPair(f0: v128, f1: v128, offsets: usize, xsum: usize, stride: u32, o0: u32, o1: u32, y: usize, residual: usize, row: usize): void {
  let y0 = sumLanes(f0) - dotPadded(offsets + ((<usize>o0 * stride) << 2), xsum, stride);
  let y1 = sumLanes(f1) - dotPadded(offsets + ((<usize>o1 * stride) << 2), xsum, stride);
  const at0 = (row + o0) << 2;
  const at1 = (row + o1) << 2;
  if (residual) {
    y0 += load<f32>(residual + at0);
    y1 += load<f32>(residual + at1);
  }
  store<f32>(y + at0, y0);
  store<f32>(y + at1, y1);
}

/** Packs codes [rows, n] (one per byte) into the segment layout; units are rows. `nibbles`: 4-bit, else 8-bit. */
export function packCodes(
  begin: u32, end: u32, scratch: usize,
  codes: usize, n: u32, to: usize, segments: u32, length: u32, padded: u32, group: u32, perGroup: u32, nibbles: u32,
): void {
  const rowBytes = <usize>(segments * padded) >> (nibbles ? 1 : 0);
  for (let r = begin; r < end; r++) {
    let p = to + r * rowBytes;
    for (let s: u32 = 0; s < segments; s++) {
      const inside = (s % perGroup) * length;
      const count = min(length, group - inside);
      memory.copy(scratch, codes + <usize>r * n + (s / perGroup) * group + inside, count);
      memory.fill(scratch + count, 0, padded - count);
      if (nibbles) {
        for (let c: usize = 0; c < <usize>padded; c += 32) {
          const a = v128.load8x8_u(scratch + c);
          const b = i16x8.shl(v128.load8x8_u(scratch + c, 8), 4);
          const d = i16x8.shl(v128.load8x8_u(scratch + c, 16), 8);
          const e = i16x8.shl(v128.load8x8_u(scratch + c, 24), 12);
          v128.store(p, v128.or(v128.or(a, b), v128.or(d, e)));
          p += 16;
        }
      } else {
        memory.copy(p, scratch, padded);
        p += padded;
      }
    }
  }
}

// @ts-ignore: decorator
@inline
function decode8(codes: v128, scale: v128, offset: v128, to: usize): void {
  v128.store(to, f32x4.sub(f32x4.mul(f32x4.convert_i32x4_u(i32x4.extend_low_i16x8_u(codes)), scale), offset));
  v128.store(to, f32x4.sub(f32x4.mul(f32x4.convert_i32x4_u(i32x4.extend_high_i16x8_u(codes)), scale), offset), 16);
}

/**
 * Packed rows [first + begin, first + end) → f32 [.., n] at `out` (row `first` first). (code − zero) · scale comes out
 * exactly: code · scale and zero · scale are exact in f32, as scales are f16 numbers.
 */
export function dequantizeRows(
  begin: u32, end: u32, scratch: usize,
  first: u32, codes: usize, scales: usize, offsets: usize, out: usize, n: u32,
  segments: u32, length: u32, padded: u32, group: u32, perGroup: u32, stride: u32, nibbles: u32,
): void {
  const rowBytes = <usize>(segments * padded) >> (nibbles ? 1 : 0);
  const low = i16x8.splat(0xf);
  for (let unit = begin; unit < end; unit++) {
    const r = first + unit;
    let p = codes + r * rowBytes;
    const to = out + ((<usize>unit * n) << 2);
    for (let s: u32 = 0; s < segments; s++) {
      const inside = (s % perGroup) * length;
      const count = min(length, group - inside);
      const at = to + (<usize>((s / perGroup) * group + inside) << 2);
      const target = count == padded ? at : scratch;
      const slot = (<usize>r * stride + s) << 2;
      const scale = v128.load32_splat(scales + slot);
      const offset = v128.load32_splat(offsets + slot);
      let t = target;
      for (let c: u32 = 0; c < padded; c += nibbles ? 32 : 16) {
        const v = v128.load(p);
        p += 16;
        if (nibbles) {
          decode8(v128.and(v, low), scale, offset, t);
          decode8(v128.and(i16x8.shr_u(v, 4), low), scale, offset, t + 32);
          decode8(v128.and(i16x8.shr_u(v, 8), low), scale, offset, t + 64);
          decode8(i16x8.shr_u(v, 12), scale, offset, t + 96);
          t += 128;
        } else {
          decode8(i16x8.extend_low_i8x16_u(v), scale, offset, t);
          decode8(i16x8.extend_high_i8x16_u(v), scale, offset, t + 32);
          t += 64;
        }
      }
      if (target != at) memory.copy(at, scratch, <usize>count << 2);
    }
  }
}

/** Element types of dense weights. */
const F32: u32 = 0;
const F16: u32 = 1;

/**
 * Activations for a dense product: rows [rows, n] → [rows, padded], padded to 8. For 16-bit weights each 8 are reordered
 * to 4 even, 4 odd ones, the order in which words of two halves come apart; for f16 they are also multiplied by 2^96,
 * part of the 2^112 that turns shifted f16 bits into their value (all of it would overflow from 65536 on).
 */
export function prepareActivations(begin: u32, end: u32, scratch: usize, x: usize, n: u32, to: usize, padded: u32, kind: u32): void {
  const factor: f32 = kind == F16 ? reinterpret<f32>(223 << 23) : 1;
  for (let r = begin; r < end; r++) {
    const row = x + ((<usize>r * n) << 2);
    const out = to + ((<usize>r * padded) << 2);
    for (let i: u32 = 0; i < padded; i++) {
      const v: f32 = i < n ? load<f32>(row + (<usize>i << 2)) * factor : 0;
      const at = kind == F32 ? i : (i & ~7) + ((i & 7) >> 1) + ((i & 1) << 2);
      store<f32>(out + (<usize>at << 2), v);
    }
  }
}

/** Low halves of 4 words as f32 (f16: times 2^-112). */
// @ts-ignore: decorator
@inline
function even(v: v128, kind: u32): v128 {
  const top = i32x4.shl(v, 16);
  return kind == F16 ? v128.and(i32x4.shr_s(top, 3), i32x4.splat(<i32>0x8fffe000)) : top;
}
/** High halves. */
// @ts-ignore: decorator
@inline
function odd(v: v128, kind: u32): v128 {
  return kind == F16 ? v128.and(i32x4.shr_s(v, 3), i32x4.splat(<i32>0x8fffe000)) : v128.and(v, i32x4.splat(<i32>0xffff0000));
}

/** y [rows, out] = x · Wᵀ (+ residual) for 16-bit floats; units are pairs of outputs, weight rows padded to 8. */
function gemvHalf(
  begin: u32, end: u32, w: usize, x: usize, y: usize, residual: usize, rows: u32, out: u32, padded: u32, kind: u32,
): void {
  const rowBytes = <usize>padded << 1;
  const factor: f32 = kind == F16 ? 65536 : 1;
  for (let unit = begin; unit < end; unit++) {
    const o0 = unit << 1;
    const o1 = min(o0 + 1, out - 1);
    for (let r: u32 = 0; r < rows; r++) {
      let p = w + o0 * rowBytes;
      let q = w + o1 * rowBytes;
      let t = x + ((<usize>r * padded) << 2);
      let a0 = f32x4.splat(0), b0 = f32x4.splat(0), a1 = f32x4.splat(0), b1 = f32x4.splat(0);
      for (const stop = p + rowBytes; p < stop; p += 16, q += 16, t += 32) {
        const v = v128.load(p);
        const u = v128.load(q);
        const x0 = v128.load(t), x1 = v128.load(t, 16);
        a0 = f32x4.add(a0, f32x4.mul(even(v, kind), x0));
        b0 = f32x4.add(b0, f32x4.mul(odd(v, kind), x1));
        a1 = f32x4.add(a1, f32x4.mul(even(u, kind), x0));
        b1 = f32x4.add(b1, f32x4.mul(odd(u, kind), x1));
      }
      storePair(sumLanes(f32x4.add(a0, b0)) * factor, sumLanes(f32x4.add(a1, b1)) * factor, o0, o1, y, residual, <usize>r * out);
    }
  }
}

// @ts-ignore: decorator
@inline
function storePair(y0: f32, y1: f32, o0: u32, o1: u32, y: usize, residual: usize, row: usize): void {
  const at0 = (row + o0) << 2;
  const at1 = (row + o1) << 2;
  store<f32>(y + at0, residual ? y0 + load<f32>(residual + at0) : y0);
  store<f32>(y + at1, residual ? y1 + load<f32>(residual + at1) : y1);
}

export function gemvF16(begin: u32, end: u32, scratch: usize, w: usize, x: usize, y: usize, residual: usize, rows: u32, out: u32, padded: u32): void {
  gemvHalf(begin, end, w, x, y, residual, rows, out, padded, F16);
}

export function gemvBf16(begin: u32, end: u32, scratch: usize, w: usize, x: usize, y: usize, residual: usize, rows: u32, out: u32, padded: u32): void {
  gemvHalf(begin, end, w, x, y, residual, rows, out, padded, 2);
}

export function gemvF32(begin: u32, end: u32, scratch: usize, w: usize, x: usize, y: usize, residual: usize, rows: u32, out: u32, padded: u32): void {
  const rowBytes = <usize>padded << 2;
  for (let unit = begin; unit < end; unit++) {
    const o0 = unit << 1;
    const o1 = min(o0 + 1, out - 1);
    for (let r: u32 = 0; r < rows; r++) {
      let p = w + o0 * rowBytes;
      let q = w + o1 * rowBytes;
      let t = x + r * rowBytes;
      let a0 = f32x4.splat(0), b0 = f32x4.splat(0), a1 = f32x4.splat(0), b1 = f32x4.splat(0);
      for (const stop = p + rowBytes; p < stop; p += 32, q += 32, t += 32) {
        const x0 = v128.load(t), x1 = v128.load(t, 16);
        a0 = f32x4.add(a0, f32x4.mul(v128.load(p), x0));
        b0 = f32x4.add(b0, f32x4.mul(v128.load(p, 16), x1));
        a1 = f32x4.add(a1, f32x4.mul(v128.load(q), x0));
        b1 = f32x4.add(b1, f32x4.mul(v128.load(q, 16), x1));
      }
      storePair(sumLanes(f32x4.add(a0, b0)), sumLanes(f32x4.add(a1, b1)), o0, o1, y, residual, <usize>r * out);
    }
  }
}

/** Dense rows [first + begin, first + end) → f32 [.., n] at `out`; handles every f16 but infinities and NaN. */
export function decodeRows(begin: u32, end: u32, scratch: usize, first: u32, w: usize, out: usize, n: u32, padded: u32, kind: u32): void {
  const factor = f32x4.splat(kind == F16 ? reinterpret<f32>(239 << 23) : 1);
  for (let unit = begin; unit < end; unit++) {
    const to = out + ((<usize>unit * n) << 2);
    const from = w + (((<usize>first + unit) * padded) << (kind == F32 ? 2 : 1));
    if (kind == F32) {
      memory.copy(to, from, <usize>n << 2);
      continue;
    }
    for (let i: u32 = 0; i < n; i += 8) {
      const v = v128.load(from + (<usize>i << 1));
      const a = f32x4.mul(even(v, kind), factor);
      const b = f32x4.mul(odd(v, kind), factor);
      const x0 = i8x16.shuffle(a, b, 0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
      const x1 = i8x16.shuffle(a, b, 8, 9, 10, 11, 24, 25, 26, 27, 12, 13, 14, 15, 28, 29, 30, 31);
      const at = to + (<usize>i << 2);
      if (i + 8 <= n) {
        v128.store(at, x0);
        v128.store(at, x1, 16);
      } else {
        v128.store(scratch, x0);
        v128.store(scratch, x1, 16);
        memory.copy(at, scratch, <usize>(n - i) << 2);
      }
    }
  }
}
