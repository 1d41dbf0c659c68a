// Dynamic grids of activations (the op contract's ActivationGrid), and keys and values stored as integers on such grids.
import { addWeighted, BLOCK, dot1, dot4, softmaxParts } from './attention';

// @ts-ignore: decorator
@inline
function maxLane(x: v128): f32 {
  return max<f32>(
    max<f32>(f32x4.extract_lane(x, 0), f32x4.extract_lane(x, 1)), max<f32>(f32x4.extract_lane(x, 2), f32x4.extract_lane(x, 3)),
  );
}

// @ts-ignore: decorator
@inline
function minLane(x: v128): f32 {
  return min<f32>(
    min<f32>(f32x4.extract_lane(x, 0), f32x4.extract_lane(x, 1)), min<f32>(f32x4.extract_lane(x, 2), f32x4.extract_lane(x, 3)),
  );
}

/** Largest of n floats. */
function largest(x: usize, n: u32): f32 {
  let top = f32x4.splat(-Infinity);
  let i: u32 = 0;
  for (; i + 4 <= n; i += 4) top = f32x4.pmax(top, v128.load(x + (<usize>i << 2)));
  let result = maxLane(top);
  for (; i < n; i++) result = max<f32>(result, load<f32>(x + (<usize>i << 2)));
  return result;
}

/** Smallest of n floats. */
function smallest(x: usize, n: u32): f32 {
  let low = f32x4.splat(Infinity);
  let i: u32 = 0;
  for (; i + 4 <= n; i += 4) low = f32x4.pmin(low, v128.load(x + (<usize>i << 2)));
  let result = minLane(low);
  for (; i < n; i++) result = min<f32>(result, load<f32>(x + (<usize>i << 2)));
  return result;
}

/** Values on the grid: low + clamp(round((x − low) / scale), least, most) · scale; symmetric grids have low = 0. */
function snapGroup(x: usize, out: usize, n: u32, low: f32, scale: f32, least: f32, most: f32): void {
  let i: u32 = 0;
  const l = f32x4.splat(low), s = f32x4.splat(scale), a = f32x4.splat(least), b = f32x4.splat(most);
  for (; i + 4 <= n; i += 4) {
    const at = <usize>i << 2;
    const q = f32x4.pmin(f32x4.pmax(f32x4.nearest(f32x4.div(f32x4.sub(v128.load(x + at), l), s)), a), b);
    v128.store(out + at, f32x4.add(l, f32x4.mul(q, s)));
  }
  for (; i < n; i++) {
    const at = <usize>i << 2;
    const q = min<f32>(max<f32>(nearest<f32>((load<f32>(x + at) - low) / scale), least), most);
    store<f32>(out + at, low + q * scale);
  }
}

/** Every element the same. */
function fillGroup(out: usize, n: u32, value: f32): void {
  for (let i: u32 = 0; i < n; i++) store<f32>(out + (<usize>i << 2), value);
}

/** Units are groups of `size` floats; `levels` = 2ᵇ − 1. out may be x. */
export function quantizeRows(
  begin: u32, end: u32, scratch: usize, x: usize, out: usize, size: u32, levels: f32, clip: f32, symmetric: u32,
): void {
  const step = <usize>size << 2;
  for (let unit = begin; unit < end; unit++) {
    const from = x + unit * step;
    const to = out + unit * step;
    const hi = largest(from, size);
    const lo = smallest(from, size);
    if (symmetric) {
      const top: f32 = (levels - 1) / 2;
      const scale: f32 = clip * max<f32>(hi, -lo) / top;
      if (scale > 0) snapGroup(from, to, size, 0, scale, -top - 1, top);
      else fillGroup(to, size, 0);
    } else {
      const half: f32 = (hi - lo) * clip * 0.5;
      const low: f32 = (hi + lo) * 0.5 - half;
      const scale: f32 = 2 * half / levels;
      if (scale > 0) snapGroup(from, to, size, low, scale, 0, levels);
      else fillGroup(to, size, low);
    }
  }
}

/**
 * Symmetric codes of groups of `size` floats as unsigned bytes, code + 128, and their scales; units are groups. `levels` as in
 * quantizeRows.
 */
export function encodeRows(
  begin: u32, end: u32, scratch: usize, x: usize, codes: usize, scales: usize, size: u32, levels: f32, clip: f32,
): void {
  const top: f32 = (levels - 1) / 2;
  for (let unit = begin; unit < end; unit++) {
    const from = x + ((<usize>unit * size) << 2);
    const to = codes + <usize>unit * size;
    const scale: f32 = clip * max<f32>(largest(from, size), -smallest(from, size)) / top;
    store<f32>(scales + (<usize>unit << 2), scale);
    if (!(scale > 0)) {
      memory.fill(to, 128, size);
      continue;
    }
    const s = f32x4.splat(scale), least = f32x4.splat(-top - 1), most = f32x4.splat(top), zero = i32x4.splat(128);
    let i: u32 = 0;
    for (; i + 4 <= size; i += 4) {
      const q = f32x4.pmin(f32x4.pmax(f32x4.nearest(f32x4.div(v128.load(from + (<usize>i << 2)), s)), least), most);
      const n = i32x4.add(i32x4.trunc_sat_f32x4_s(q), zero);
      const h = i16x8.narrow_i32x4_s(n, n);
      v128.store32_lane(to + i, i8x16.narrow_i16x8_u(h, h), 0);
    }
    for (; i < size; i++) {
      const q = min<f32>(max<f32>(nearest<f32>(load<f32>(from + (<usize>i << 2)) / scale), -top - 1), top);
      store<u8>(to + i, <u8>(<i32>q + 128));
    }
  }
}

/** Bytes of one head's codes of one token. */
// @ts-ignore: decorator
@inline
function codeBytes(d: u32, nibbles: u32): usize {
  return nibbles ? (d + 1) >> 1 : d;
}

/**
 * Appends rows [batch · tokens, kvHeads · d] to a cache of codes [batch, kvHeads, capacity, bytes] with grids
 * [batch, kvHeads, capacity, 2] (low, scale) at `start`; units are sequences. Nibbles: channel i in the low half of byte i,
 * channel i + ⌈d/2⌉ in its high half.
 */
export function appendQuantized(
  begin: u32, end: u32, scratch: usize,
  rows: usize, codes: usize, grids: usize, tokens: u32, kvHeads: u32, d: u32, capacity: u32, start: u32, nibbles: u32, clip: f32,
): void {
  const width = codeBytes(d, nibbles);
  const levels: f32 = nibbles ? 15 : 255;
  const half = (d + 1) >> 1;
  for (let b = begin; b < end; b++) {
    for (let t: u32 = 0; t < tokens; t++) {
      for (let h: u32 = 0; h < kvHeads; h++) {
        const from = rows + (((<usize>b * tokens + t) * kvHeads + h) * d << 2);
        const slot = (<usize>(b * kvHeads + h)) * capacity + start + t;
        const hi = largest(from, d);
        const lo = smallest(from, d);
        const reach: f32 = (hi - lo) * clip * 0.5;
        const low: f32 = (hi + lo) * 0.5 - reach;
        const scale: f32 = 2 * reach / levels;
        store<f32>(grids + (slot << 3), low);
        store<f32>(grids + (slot << 3), scale, 4);
        const to = codes + slot * width;
        memory.fill(to, 0, width);
        if (!(scale > 0)) continue;
        for (let i: u32 = 0; i < d; i++) {
          const q = <u32>min<f32>(max<f32>(nearest<f32>((load<f32>(from + (<usize>i << 2)) - low) / scale), 0), levels);
          if (!nibbles) store<u8>(to + i, <u8>q);
          else if (i < half) store<u8>(to + i, <u8>q);
          else store<u8>(to + (i - half), <u8>(load<u8>(to + (i - half)) | (q << 4)));
        }
      }
    }
  }
}

/** 16 codes as floats on their grid. */
// @ts-ignore: decorator
@inline
function storeCodes16(c: v128, low: v128, scale: v128, to: usize): void {
  const a = i16x8.extend_low_i8x16_u(c), b = i16x8.extend_high_i8x16_u(c);
  v128.store(to, f32x4.add(low, f32x4.mul(f32x4.convert_i32x4_s(i32x4.extend_low_i16x8_u(a)), scale)));
  v128.store(to, f32x4.add(low, f32x4.mul(f32x4.convert_i32x4_s(i32x4.extend_high_i16x8_u(a)), scale)), 16);
  v128.store(to, f32x4.add(low, f32x4.mul(f32x4.convert_i32x4_s(i32x4.extend_low_i16x8_u(b)), scale)), 32);
  v128.store(to, f32x4.add(low, f32x4.mul(f32x4.convert_i32x4_s(i32x4.extend_high_i16x8_u(b)), scale)), 48);
}

/** One token's head as floats [d]. */
function decodeHead(codes: usize, grid: usize, to: usize, d: u32, nibbles: u32): void {
  const low = load<f32>(grid);
  const scale = load<f32>(grid, 4);
  const l = f32x4.splat(low), s = f32x4.splat(scale);
  let i: u32 = 0;
  if (nibbles) {
    const half = (d + 1) >> 1;
    const mask = i8x16.splat(15);
    for (; i + 16 <= d - half; i += 16) {
      const c = v128.load(codes + i);
      storeCodes16(v128.and(c, mask), l, s, to + (<usize>i << 2));
      storeCodes16(i8x16.shr_u(c, 4), l, s, to + (<usize>(i + half) << 2));
    }
    for (; i < half; i++) {
      const c = <u32>load<u8>(codes + i);
      store<f32>(to + (<usize>i << 2), low + <f32>(c & 15) * scale);
      if (i + half < d) store<f32>(to + (<usize>(i + half) << 2), low + <f32>(c >> 4) * scale);
    }
    return;
  }
  for (; i + 16 <= d; i += 16) storeCodes16(v128.load(codes + i), l, s, to + (<usize>i << 2));
  for (; i < d; i++) store<f32>(to + (<usize>i << 2), low + <f32>load<u8>(codes + i) * scale);
}

/** Slots [first + begin, first + end) of a cache as floats: out [units, d]. */
export function decodeCache(
  begin: u32, end: u32, scratch: usize, codes: usize, grids: usize, first: u32, out: usize, d: u32, nibbles: u32,
): void {
  const width = codeBytes(d, nibbles);
  for (let unit = begin; unit < end; unit++) {
    const slot = <usize>(first + unit);
    decodeHead(codes + slot * width, grids + (slot << 3), out + ((<usize>unit * d) << 2), d, nibbles);
  }
}

/**
 * attention() over a cache of codes: keys and values are decoded 64 positions at a time into scratch, where all queries
 * that share them read them. Units are (sequence, kv head). Scratch: queries · (start + tokens, padded) + 64 · d floats.
 */
export function attentionQuantized(
  begin: u32, end: u32, scratch: usize,
  q: usize, keys: usize, keyGrids: usize, values: usize, valueGrids: usize, out: usize, tokens: u32, heads: u32, kvHeads: u32,
  d: u32, capacity: u32, start: u32, window: u32, scale: f32, nibbles: u32,
): void {
  const share = heads / kvHeads;
  const bytes = <usize>d << 2;
  const width = codeBytes(d, nibbles);
  const total = start + tokens;
  const padded = <usize>((total + 7) & ~3) << 2;
  const block = scratch + tokens * share * padded;
  for (let unit = begin; unit < end; unit++) {
    const b = unit / kvHeads;
    const h = unit - b * kvHeads;
    const slots = <usize>unit * capacity;
    const first = q + (b * tokens * heads + h * share) * bytes;
    const result = out + (b * tokens * heads + h * share) * bytes;
    const oldest = window && start + 1 > window ? start + 1 - window : 0;
    for (let from = oldest; from < total; from += BLOCK) {
      const count = min(BLOCK, total - from);
      for (let i: u32 = 0; i < count; i++) {
        const slot = slots + from + i;
        decodeHead(keys + slot * width, keyGrids + (slot << 3), block + i * bytes, d, nibbles);
      }
      for (let i: u32 = 0; i < count; i += 4) {
        const p = from + i;
        const key = block + i * bytes;
        for (let t: u32 = 0; t < tokens; t++) {
          if (p > start + t) continue;
          for (let s: u32 = 0; s < share; s++) {
            const query = first + (t * heads + s) * bytes;
            const to = scratch + (t * share + s) * padded + (<usize>p << 2);
            if (i + 4 <= count && !(d & 3)) {
              dot4(query, key, bytes, d, to, scale);
            } else {
              for (let c: u32 = 0; c < min<u32>(4, count - i); c++) store<f32>(to + (<usize>c << 2), dot1(query, key + c * bytes, d) * scale);
            }
          }
        }
      }
    }
    for (let t: u32 = 0; t < tokens; t++) {
      const last = start + t + 1;
      const from = window && last > window ? last - window : 0;
      for (let s: u32 = 0; s < share; s++) {
        const row = scratch + (t * share + s) * padded;
        const sum = softmaxParts(row + (<usize>from << 2), last - from);
        store<f32>(row + (<usize>total << 2), 1 / sum);
        memory.fill(result + (t * heads + s) * bytes, 0, bytes);
      }
    }
    for (let p = oldest; p < total; p += BLOCK) {
      const count = min(BLOCK, total - p);
      for (let i: u32 = 0; i < count; i++) {
        const slot = slots + p + i;
        decodeHead(values + slot * width, valueGrids + (slot << 3), block + i * bytes, d, nibbles);
      }
      for (let t: u32 = 0; t < tokens; t++) {
        const last = start + t + 1;
        const from = max(p, window && last > window ? last - window : 0);
        const to = min(p + BLOCK, last);
        if (from >= to) continue;
        for (let s: u32 = 0; s < share; s++) {
          const row = scratch + (t * share + s) * padded;
          addWeighted(row + (<usize>from << 2), block + (from - p) * bytes, bytes, to - from, d, result + (t * heads + s) * bytes);
        }
      }
    }
    for (let t: u32 = 0; t < tokens; t++) {
      for (let s: u32 = 0; s < share; s++) {
        const factor = load<f32>(scratch + (t * share + s) * padded + (<usize>total << 2));
        const row = result + (t * heads + s) * bytes;
        for (let c: usize = 0; c < bytes; c += 4) store<f32>(row + c, load<f32>(row + c) * factor);
      }
    }
  }
}
