// Products of a few activation rows with weights that stay in the arena, and the way back from packed weights to f32.
//
// Quantized weights are cut into segments: pieces of one group, padded with code 0 to whole vectors. Activations are rounded
// to integers xq per segment, so that codes are multiplied as integers (dot_i16x8) and only one conversion per segment is
// left. With x ≈ xscale · xq: y = Σ_segments scale · xscale · (Σ code·xq − zero · Σ xq).
//
// Codes lie in panels of 8 outputs, so that a thread reads one stream (hardware prefetchers follow it to within a tenth of what
// the arithmetic takes from a cache; two rows side by side lose half of that) and lanes end as outputs, with no sums across
// lanes: [panels, segments, padded / 8, …, 2 halves] vectors, a half being 4 outputs, a pair of activations broadcast to all.
//
// 4 bits (2 and 3 use the same layout): a vector has 8 channels; nibble n of 16-bit lane 2r + j is channel 2n + j of output
// r. Odd nibbles are used in place, 16 times too large, and their sum is shifted right exactly. Bounds: a segment has at most
// 128 channels; a lane adds 32 pairs of at most 2 · 240 · 32767 = 15.7e6, 503e6 < 2^31.
//
// 8 bits: a vector has 4 channels, byte b of lane 2r + j is channel 2b + j of output r. A segment has at most 256 channels:
// 128 pairs of 2 · 255 · 32767 = 16.7e6, 2.14e9 < 2^31 = 2.147e9. Σ code·xq − zero · Σ xq = Σ (code − zero)·xq has the same
// bound, and is right whether or not its second half wraps.
import { sumLanes, transpose4 } from './math';

/**
 * Rounds rows of activations to integers of at most `limit` (32767 or less) per segment. xq [rows, segments, padded] i16,
 * then per row and segment the scale [rows, stride] f32 and the sum Σ xq [rows, stride] i32 (both zero beyond the
 * segments). Segment s covers `length` channels from
 * (s / perGroup) · group + (s mod perGroup) · length, cut at its group's end. Units are rows.
 */
export function quantizeActivations(
  begin: u32, end: u32, scratch: usize,
  x: usize, n: u32, xq: usize, xscale: usize, xsum: usize, segments: u32, length: u32, padded: u32, group: u32, perGroup: u32, stride: u32,
  limit: f32,
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
      const inverse: f32 = top > 1e-30 ? limit / top : 0;
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
      const scale: f32 = inverse > 0 ? top / limit : 0;
      store<f32>(scales + (<usize>s << 2), scale);
      store<i32>(sums + (<usize>s << 2), total);
      to += <usize>padded << 1;
    }
  }
}

/**
 * y [rows, out] = x · Wᵀ (+ residual, may be null) for codes in panels of 8 outputs, which are the units. scales f32 and zeros
 * u8 are [panels, segments, 8]; xscale f32 and xsum i32 are [rows, stride]. `vectors` are groups of 8 channels per segment.
 */
// @ts-ignore: decorator
@inline
function gemvPanels(
  begin: u32, end: u32, scratch: usize,
  codes: usize, scales: usize, zeros: usize, xq: usize, xscale: usize, xsum: usize, y: usize, residual: usize,
  rows: u32, out: u32, segments: u32, vectors: u32, stride: u32, nibbles: bool,
): void {
  const segmentBytes = <usize>vectors << (nibbles ? 5 : 6);
  // Masks come from memory: V8 would make a constant anew in every round of the loop.
  v128.store(scratch, i16x8.splat(nibbles ? 0x000f : 0x00ff));
  v128.store(scratch, i16x8.splat(0x00f0), 16);
  const m0 = v128.load(scratch), m1 = v128.load(scratch, 16);
  for (let unit = begin; unit < end; unit++) {
    const o = unit << 3;
    for (let r: u32 = 0; r < rows; r++) {
      let p = codes + unit * segments * segmentBytes;
      let scale = scales + (<usize>(unit * segments) << 5);
      let zero = zeros + (<usize>(unit * segments) << 3);
      let x = xq + ((<usize>r * segments * vectors) << 4);
      const xscales = xscale + ((<usize>r * stride) << 2);
      const xsums = xsum + ((<usize>r * stride) << 2);
      let f = f32x4.splat(0), g = f32x4.splat(0);
      for (let s: usize = 0; s < <usize>segments << 2; s += 4) {
        let a = i32x4.splat(0), b = i32x4.splat(0);
        const stop = p + segmentBytes;
        if (nibbles) {
          let a16 = i32x4.splat(0), b16 = i32x4.splat(0);
          for (; p < stop; p += 32, x += 16) {
            const v = v128.load(p);
            const u = v128.load(p, 16);
            const x0 = v128.load32_splat(x);
            a = i32x4.add(a, i32x4.dot_i16x8_s(v128.and(v, m0), x0));
            b = i32x4.add(b, i32x4.dot_i16x8_s(v128.and(u, m0), x0));
            const x1 = v128.load32_splat(x, 4);
            a16 = i32x4.add(a16, i32x4.dot_i16x8_s(v128.and(v, m1), x1));
            b16 = i32x4.add(b16, i32x4.dot_i16x8_s(v128.and(u, m1), x1));
            const x2 = v128.load32_splat(x, 8);
            a16 = i32x4.add(a16, i32x4.dot_i16x8_s(v128.and(i16x8.shr_u(v, 4), m1), x2));
            b16 = i32x4.add(b16, i32x4.dot_i16x8_s(v128.and(i16x8.shr_u(u, 4), m1), x2));
            const x3 = v128.load32_splat(x, 12);
            a = i32x4.add(a, i32x4.dot_i16x8_s(i16x8.shr_u(v, 12), x3));
            b = i32x4.add(b, i32x4.dot_i16x8_s(i16x8.shr_u(u, 12), x3));
          }
          a = i32x4.add(a, i32x4.shr_s(a16, 4));
          b = i32x4.add(b, i32x4.shr_s(b16, 4));
        } else {
          for (; p < stop; p += 32, x += 8) {
            const v = v128.load(p);
            const u = v128.load(p, 16);
            const x0 = v128.load32_splat(x);
            a = i32x4.add(a, i32x4.dot_i16x8_s(v128.and(v, m0), x0));
            b = i32x4.add(b, i32x4.dot_i16x8_s(v128.and(u, m0), x0));
            const x1 = v128.load32_splat(x, 4);
            a = i32x4.add(a, i32x4.dot_i16x8_s(i16x8.shr_u(v, 8), x1));
            b = i32x4.add(b, i32x4.dot_i16x8_s(i16x8.shr_u(u, 8), x1));
          }
        }
        const xf = v128.load32_splat(xscales + s);
        const sum = v128.load32_splat(xsums + s);
        const z = i16x8.extend_low_i8x16_u(v128.load64_zero(zero));
        const da = f32x4.convert_i32x4_s(i32x4.sub(a, i32x4.mul(i32x4.extend_low_i16x8_u(z), sum)));
        const db = f32x4.convert_i32x4_s(i32x4.sub(b, i32x4.mul(i32x4.extend_high_i16x8_u(z), sum)));
        f = f32x4.add(f, f32x4.mul(da, f32x4.mul(xf, v128.load(scale))));
        g = f32x4.add(g, f32x4.mul(db, f32x4.mul(xf, v128.load(scale, 16))));
        scale += 32;
        zero += 8;
      }
      const at = (<usize>r * out + o) << 2;
      if (o + 8 <= out) {
        if (residual) {
          f = f32x4.add(f, v128.load(residual + at));
          g = f32x4.add(g, v128.load(residual + at, 16));
        }
        v128.store(y + at, f);
        v128.store(y + at, g, 16);
      } else {
        v128.store(scratch, f, 32);
        v128.store(scratch, g, 48);
        for (let i: usize = 0; i < <usize>(out - o) << 2; i += 4) {
          store<f32>(y + at + i, load<f32>(scratch + i, 32) + (residual ? load<f32>(residual + at + i) : 0));
        }
      }
    }
  }
}

export function gemvNibbles(
  begin: u32, end: u32, scratch: usize,
  codes: usize, scales: usize, zeros: usize, xq: usize, xscale: usize, xsum: usize, y: usize, residual: usize,
  rows: u32, out: u32, segments: u32, vectors: u32, stride: u32,
): void {
  gemvPanels(begin, end, scratch, codes, scales, zeros, xq, xscale, xsum, y, residual, rows, out, segments, vectors, stride, true);
}

export function gemvBytes(
  begin: u32, end: u32, scratch: usize,
  codes: usize, scales: usize, zeros: usize, xq: usize, xscale: usize, xsum: usize, y: usize, residual: usize,
  rows: u32, out: u32, segments: u32, vectors: u32, stride: u32,
): void {
  gemvPanels(begin, end, scratch, codes, scales, zeros, xq, xscale, xsum, y, residual, rows, out, segments, vectors, stride, false);
}

/** Copies segment `s` of a row of codes to `to`, padded with 0. */
// @ts-ignore: decorator
@inline
function copySegment(row: usize, s: u32, length: u32, padded: u32, group: u32, perGroup: u32, to: usize): void {
  const inside = (s % perGroup) * length;
  const count = min(length, group - inside);
  memory.copy(to, row + (s / perGroup) * group + inside, count);
  memory.fill(to + count, 0, padded - count);
}

/** Packs codes [rows, n] (one per byte; `bits` 4 or 8) into panels of 8 rows, missing rows as 0; units are panels. */
export function packPanels(
  begin: u32, end: u32, scratch: usize,
  codes: usize, rows: u32, n: u32, bits: u32, to: usize, segments: u32, length: u32, padded: u32, group: u32, perGroup: u32,
): void {
  const panelBytes = <usize>(segments * padded) * bits;
  const even: u64 = 0x00ff00ff00ff00ff;
  for (let unit = begin; unit < end; unit++) {
    const panel = to + unit * panelBytes;
    const first = unit << 3;
    if (first + 8 > rows) memory.fill(panel, 0, panelBytes);
    for (let r: u32 = 0; r < min<u32>(8, rows - first); r++) {
      // Rows 4 to 7 are the second vector of each pair.
      let p = panel + (<usize>r << 2);
      for (let s: u32 = 0; s < segments; s++) {
        copySegment(codes + <usize>(first + r) * n, s, length, padded, group, perGroup, scratch);
        for (let c: usize = 0; c < <usize>padded; c += 8) {
          const w = load<u64>(scratch + c);
          if (bits == 4) {
            const a = w & even;
            const b = (w >> 8) & even;
            store<u16>(p, <u16>(a | (a >> 12) | (a >> 24) | (a >> 36)));
            store<u16>(p, <u16>(b | (b >> 12) | (b >> 24) | (b >> 36)), 2);
            p += 32;
          } else {
            // Channels 0, 2, 1, 3 of each four.
            const t = (w & 0xff0000ffff0000ff) | ((w & 0x0000ff000000ff00) << 8) | ((w & 0x00ff000000ff0000) >> 8);
            store<u32>(p, <u32>t);
            store<u32>(p, <u32>(t >> 32), 32);
            p += 64;
          }
        }
      }
    }
  }
}

/** 8 integers of 16 bits, times scale, minus offset, as f32. */
// @ts-ignore: decorator
@inline
function decode8(codes: v128, scale: v128, offset: v128, to: usize): void {
  v128.store(to, f32x4.sub(f32x4.mul(f32x4.convert_i32x4_s(i32x4.extend_low_i16x8_s(codes)), scale), offset));
  v128.store(to, f32x4.sub(f32x4.mul(f32x4.convert_i32x4_s(i32x4.extend_high_i16x8_s(codes)), scale), offset), 16);
}

/**
 * Rows [first, last) of codes in panels → f32 [last − first, n] at `out`; units are panels from that of `first` on.
 * (code − zero) · scale comes out exactly: code · scale and the offset zero · scale are exact in f32, as scales are f16 numbers.
 */
export function dequantizePanels(
  begin: u32, end: u32, scratch: usize,
  first: u32, last: u32, bits: u32, codes: usize, scales: usize, zeros: usize, out: usize, n: u32,
  segments: u32, length: u32, padded: u32, group: u32, perGroup: u32,
): void {
  const low = i16x8.splat(0xf);
  const byte = i16x8.splat(0xff);
  for (let unit = (first >> 3) + begin; unit < (first >> 3) + end; unit++) {
    for (let half: u32 = 0; half < 2; half++) {
      const row = (unit << 3) + (half << 2);
      if (row + 4 <= first || row >= last) continue;
      let p = codes + <usize>unit * segments * padded * bits + (<usize>half << 4);
      for (let s: u32 = 0; s < segments; s++) {
        const inside = (s % perGroup) * length;
        const count = min(length, group - inside);
        const column = (s / perGroup) * group + inside;
        const slot = ((unit * segments + s) << 3) + (half << 2);
        // Codes of each row first, 16 bits each: the 4 vectors of 8 channels are a 4 × 4 matrix of pairs, rows down.
        const rowBytes = <usize>padded << 1;
        let t = scratch;
        for (let c: u32 = 0; c < padded; c += 8, p += <usize>bits << 3, t += 16) {
          const v = v128.load(p);
          if (bits == 4) {
            const a = v128.and(v, low), b = v128.and(i16x8.shr_u(v, 4), low);
            const d = v128.and(i16x8.shr_u(v, 8), low), e = i16x8.shr_u(v, 12);
            transpose4(a, b, d, e, t, rowBytes);
          } else {
            const u = v128.load(p, 32);
            transpose4(v128.and(v, byte), i16x8.shr_u(v, 8), v128.and(u, byte), i16x8.shr_u(u, 8), t, rowBytes);
          }
        }
        for (let r: u32 = 0; r < 4; r++) {
          if (row + r < first || row + r >= last) continue;
          const scale = v128.load32_splat(scales + (<usize>(slot + r) << 2));
          const offset = f32x4.mul(scale, f32x4.splat(<f32>load<u8>(zeros + slot + r)));
          const to = out + ((<usize>(row + r - first) * n + column) << 2);
          const from = scratch + r * rowBytes;
          let c: u32 = 0;
          for (; c + 8 <= count; c += 8) decode8(v128.load(from + (<usize>c << 1)), scale, offset, to + (<usize>c << 2));
          if (c < count) {
            const rest = scratch + 4 * rowBytes;
            decode8(v128.load(from + (<usize>c << 1)), scale, offset, rest);
            memory.copy(to + (<usize>c << 2), rest, <usize>(count - c) << 2);
          }
        }
      }
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

/**
 * y [rows, out] = x · Wᵀ (+ residual) for 16-bit floats; units are outputs, weight rows padded to 8. One row at a time: two
 * would be two streams, which hardware prefetchers follow badly when they are less than a page apart.
 */
// @ts-ignore: decorator
@inline
function gemvHalf(
  begin: u32, end: u32, w: usize, x: usize, y: usize, residual: usize, rows: u32, out: u32, padded: u32, kind: u32,
): void {
  const rowBytes = <usize>padded << 1;
  const factor: f32 = kind == F16 ? 65536 : 1;
  for (let o = begin; o < end; o++) {
    for (let r: u32 = 0; r < rows; r++) {
      let p = w + o * rowBytes;
      let t = x + ((<usize>r * padded) << 2);
      let a = f32x4.splat(0), b = f32x4.splat(0), c = f32x4.splat(0), d = f32x4.splat(0);
      const stop = p + rowBytes;
      for (const even32 = stop - 16; p < even32; p += 32, t += 64) {
        const v = v128.load(p), u = v128.load(p, 16);
        a = f32x4.add(a, f32x4.mul(even(v, kind), v128.load(t)));
        b = f32x4.add(b, f32x4.mul(odd(v, kind), v128.load(t, 16)));
        c = f32x4.add(c, f32x4.mul(even(u, kind), v128.load(t, 32)));
        d = f32x4.add(d, f32x4.mul(odd(u, kind), v128.load(t, 48)));
      }
      if (p < stop) {
        const v = v128.load(p);
        a = f32x4.add(a, f32x4.mul(even(v, kind), v128.load(t)));
        b = f32x4.add(b, f32x4.mul(odd(v, kind), v128.load(t, 16)));
      }
      storeSum(sumLanes(f32x4.add(f32x4.add(a, b), f32x4.add(c, d))) * factor, o, y, residual, <usize>r * out);
    }
  }
}

// @ts-ignore: decorator
@inline
function storeSum(sum: f32, o: u32, y: usize, residual: usize, row: usize): void {
  const at = (row + o) << 2;
  store<f32>(y + at, residual ? sum + load<f32>(residual + at) : sum);
}

export function gemvF16(begin: u32, end: u32, scratch: usize, w: usize, x: usize, y: usize, residual: usize, rows: u32, out: u32, padded: u32): void {
  gemvHalf(begin, end, w, x, y, residual, rows, out, padded, F16);
}

export function gemvBf16(begin: u32, end: u32, scratch: usize, w: usize, x: usize, y: usize, residual: usize, rows: u32, out: u32, padded: u32): void {
  gemvHalf(begin, end, w, x, y, residual, rows, out, padded, 2);
}

export function gemvF32(begin: u32, end: u32, scratch: usize, w: usize, x: usize, y: usize, residual: usize, rows: u32, out: u32, padded: u32): void {
  const rowBytes = <usize>padded << 2;
  for (let o = begin; o < end; o++) {
    for (let r: u32 = 0; r < rows; r++) {
      let p = w + o * rowBytes;
      let t = x + r * rowBytes;
      let a = f32x4.splat(0), b = f32x4.splat(0);
      for (const stop = p + rowBytes; p < stop; p += 32, t += 32) {
        a = f32x4.add(a, f32x4.mul(v128.load(p), v128.load(t)));
        b = f32x4.add(b, f32x4.mul(v128.load(p, 16), v128.load(t, 16)));
      }
      storeSum(sumLanes(f32x4.add(a, b)), o, y, residual, <usize>r * out);
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
