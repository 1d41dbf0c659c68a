// Asymmetric integer grids per group and column (design §4.2), on strips of 16 columns held as rows of `stride` bytes.
//
// A strip's grid lives in scratch as five rows of 16 floats: scale, 1/scale, zero point, minimum, maximum.
import { WIDE, WIDE_SHIFT, loadWide, storeWide } from './tile';

export const GRID_BYTES: usize = 320;
const INVERSE: usize = 64;
const ZERO: usize = 128;
export const MINIMUM: usize = 192;
export const MAXIMUM: usize = 256;

/** Starts a strip's range: minimum +∞, maximum −∞. */
export function startRange(grid: usize): void {
  for (let c: usize = 0; c < 64; c += 16) {
    v128.store(grid + c, f32x4.splat(Infinity), MINIMUM);
    v128.store(grid + c, f32x4.splat(-Infinity), MAXIMUM);
  }
}

/** Widens a strip's range by rows. */
export function widenRange(strip: usize, stride: usize, rows: u32, grid: usize): void {
  let lo0 = v128.load(grid, MINIMUM), lo1 = v128.load(grid, MINIMUM + 16), lo2 = v128.load(grid, MINIMUM + 32), lo3 = v128.load(grid, MINIMUM + 48);
  let hi0 = v128.load(grid, MAXIMUM), hi1 = v128.load(grid, MAXIMUM + 16), hi2 = v128.load(grid, MAXIMUM + 32), hi3 = v128.load(grid, MAXIMUM + 48);
  for (let r: u32 = 0; r < rows; r++) {
    let x = v128.load(strip);
    lo0 = f32x4.pmin(lo0, x);
    hi0 = f32x4.pmax(hi0, x);
    x = v128.load(strip, 16);
    lo1 = f32x4.pmin(lo1, x);
    hi1 = f32x4.pmax(hi1, x);
    x = v128.load(strip, 32);
    lo2 = f32x4.pmin(lo2, x);
    hi2 = f32x4.pmax(hi2, x);
    x = v128.load(strip, 48);
    lo3 = f32x4.pmin(lo3, x);
    hi3 = f32x4.pmax(hi3, x);
    strip += stride;
  }
  v128.store(grid, lo0, MINIMUM); v128.store(grid, lo1, MINIMUM + 16); v128.store(grid, lo2, MINIMUM + 32); v128.store(grid, lo3, MINIMUM + 48);
  v128.store(grid, hi0, MAXIMUM); v128.store(grid, hi1, MAXIMUM + 16); v128.store(grid, hi2, MAXIMUM + 32); v128.store(grid, hi3, MAXIMUM + 48);
}

/** Nearest f16 of positive normal floats, as f32 (round to nearest even on the 13 dropped bits), at most 65504. */
// @ts-ignore: decorator
@inline
function roundF16(x: v128): v128 {
  const odd = v128.and(i32x4.shr_u(x, 13), i32x4.splat(1));
  const bits = v128.and(i32x4.add(i32x4.add(x, i32x4.splat(0xfff)), odd), i32x4.splat(~0x1fff));
  return f32x4.pmin(bits, f32x4.splat(65504));
}

/** Smallest normal f16: scales below it lose precision, and 0 would divide by zero. */
const TINY: f32 = 0.00006103515625;

/** Lanes (as a mask) whose range gives a usable scale; the others take the fallback of finishGrid. */
// @ts-ignore: decorator
@inline
export function regular(lo: v128, hi: v128, levels: v128): v128 {
  return f32x4.ge(roundF16(f32x4.div(f32x4.sub(hi, lo), levels)), f32x4.splat(TINY));
}

/**
 * Scale and zero point from the range. A (nearly) constant group has no usable range: its scale becomes
 * max|w| / levels, so that §4.2's clamped zero point still reproduces the constant, and never less than 2^-14.
 */
export function finishGrid(grid: usize, levels: f32): void {
  const top = f32x4.splat(levels);
  const none = f32x4.splat(0);
  for (let end = grid + 64; grid < end; grid += 16) {
    const lo = v128.load(grid, MINIMUM);
    const hi = v128.load(grid, MAXIMUM);
    const scale = roundF16(f32x4.div(f32x4.sub(hi, lo), top));
    const flat = f32x4.pmax(roundF16(f32x4.div(f32x4.pmax(f32x4.abs(hi), f32x4.abs(lo)), top)), f32x4.splat(TINY));
    const used = v128.bitselect(scale, flat, f32x4.ge(scale, f32x4.splat(TINY)));
    v128.store(grid, used);
    v128.store(grid, f32x4.div(f32x4.splat(1), used), INVERSE);
    v128.store(grid, f32x4.pmin(f32x4.pmax(f32x4.nearest(f32x4.div(f32x4.neg(lo), used)), none), top), ZERO);
  }
}

/** Scale and zero point of grids symmetric about 0: scale = max|w| / ((levels − 1) / 2), zero = (levels + 1) / 2. */
export function finishSymmetric(grid: usize, levels: f32): void {
  const top = f32x4.splat((levels - 1) / 2);
  const zero = f32x4.splat((levels + 1) / 2);
  for (let end = grid + 64; grid < end; grid += 16) {
    const peak = f32x4.pmax(f32x4.abs(v128.load(grid, MAXIMUM)), f32x4.abs(v128.load(grid, MINIMUM)));
    const used = f32x4.pmax(roundF16(f32x4.div(peak, top)), f32x4.splat(TINY));
    v128.store(grid, used);
    v128.store(grid, f32x4.div(f32x4.splat(1), used), INVERSE);
    v128.store(grid, zero, ZERO);
  }
}

/** The inner value of one vector on its grid: clamp(round(x / scale), −zero, levels − zero), i.e. code − zero. */
// @ts-ignore: decorator
@inline
function snap(x: v128, inverse: v128, low: v128, high: v128): v128 {
  return f32x4.pmin(f32x4.pmax(f32x4.nearest(f32x4.mul(x, inverse)), low), high);
}

/** Rounds rows onto the grid in place. */
export function roundStrip(strip: usize, stride: usize, rows: u32, grid: usize, levels: f32): void {
  const top = f32x4.splat(levels);
  for (let end = grid + 64; grid < end; grid += 32, strip += 32) {
    const s0 = v128.load(grid), s1 = v128.load(grid, 16);
    const i0 = v128.load(grid, INVERSE), i1 = v128.load(grid, INVERSE + 16);
    const z0 = v128.load(grid, ZERO), z1 = v128.load(grid, ZERO + 16);
    const l0 = f32x4.neg(z0), l1 = f32x4.neg(z1);
    const h0 = f32x4.sub(top, z0), h1 = f32x4.sub(top, z1);
    let p = strip;
    for (let r: u32 = 0; r < rows; r++) {
      v128.store(p, f32x4.mul(snap(v128.load(p), i0, l0, h0), s0));
      v128.store(p, f32x4.mul(snap(v128.load(p, 16), i1, l1, h1), s1), 16);
      p += stride;
    }
  }
}

/** The 16 codes of one row of a strip. */
// @ts-ignore: decorator
@inline
export function rowCodes(strip: usize, grid: usize, levels: f32): v128 {
  const top = f32x4.splat(levels);
  const c0 = code(strip, grid, top), c1 = code(strip + 16, grid + 16, top), c2 = code(strip + 32, grid + 32, top), c3 = code(strip + 48, grid + 48, top);
  return i8x16.narrow_i16x8_u(i16x8.narrow_i32x4_s(c0, c1), i16x8.narrow_i32x4_s(c2, c3));
}

// @ts-ignore: decorator
@inline
function code(p: usize, grid: usize, top: v128): v128 {
  const zero = v128.load(grid, ZERO);
  return i32x4.trunc_sat_f32x4_s(
    f32x4.add(snap(v128.load(p), v128.load(grid, INVERSE), f32x4.neg(zero), f32x4.sub(top, zero)), zero),
  );
}

/** Adds Σ h·((code − zero) − y/scale), the gradient of the grid's scale, to 16 sums. */
export function scaleGradient(h: usize, y: usize, rows: u32, grid: usize, levels: f32, sums: usize): void {
  const top = f32x4.splat(levels);
  for (let end = grid + 64; grid < end; grid += 16, h += 16, y += 16, sums += 16) {
    const inverse = v128.load(grid, INVERSE);
    const zero = v128.load(grid, ZERO);
    const low = f32x4.neg(zero);
    const high = f32x4.sub(top, zero);
    let sum = v128.load(sums);
    for (let r: usize = 0; r < <usize>rows << 6; r += 64) {
      const x = f32x4.mul(v128.load(y + r), inverse);
      const q = f32x4.pmin(f32x4.pmax(f32x4.nearest(x), low), high);
      sum = f32x4.add(sum, f32x4.mul(v128.load(h + r), f32x4.sub(q, x)));
    }
    v128.store(sums, sum);
  }
}

/**
 * Gives the scale's gradient to the elements that set it: + sums/levels to the first maximum of each column, − to the
 * first minimum. `seen` (128 bytes, zero at the group's start) marks columns whose extremes have been met. Groups on the
 * fallback scale pass nothing on.
 */
export function spreadScaleGradient(h: usize, y: usize, rows: u32, grid: usize, levels: f32, sums: usize, seen: usize): void {
  const share = f32x4.splat(1 / levels);
  for (let end = grid + 64; grid < end; grid += 16, h += 16, y += 16, sums += 16, seen += 16) {
    const lo = v128.load(grid, MINIMUM);
    const hi = v128.load(grid, MAXIMUM);
    const d = v128.and(f32x4.mul(v128.load(sums), share), regular(lo, hi, f32x4.splat(levels)));
    let seenHi = v128.load(seen);
    let seenLo = v128.load(seen, 64);
    for (let r: usize = 0; r < <usize>rows << 6; r += 64) {
      const x = v128.load(y + r);
      const isHi = f32x4.eq(x, hi);
      const isLo = f32x4.eq(x, lo);
      const up = v128.and(d, v128.andnot(isHi, seenHi));
      const down = v128.and(d, v128.andnot(isLo, seenLo));
      seenHi = v128.or(seenHi, isHi);
      seenLo = v128.or(seenLo, isLo);
      v128.store(h + r, f32x4.add(v128.load(h + r), f32x4.sub(up, down)));
    }
    v128.store(seen, seenHi);
    v128.store(seen, seenLo, 64);
  }
}

/** Multiplies a strip's range by its clip factors (`columns` of them at `clip`). */
function clipRange(grid: usize, clip: usize, columns: u32): void {
  for (let c: u32 = 0; c < columns; c++) {
    const factor = load<f32>(clip + (c << 2));
    const at = grid + (c << 2);
    store<f32>(at, load<f32>(at, MINIMUM) * factor, MINIMUM);
    store<f32>(at, load<f32>(at, MAXIMUM) * factor, MAXIMUM);
  }
}

/** Writes a strip's scales and zero points (either may be null). */
export function storeGrid(grid: usize, columns: u32, scales: usize, zeros: usize): void {
  for (let c: u32 = 0; c < columns; c++) {
    if (scales) store<f32>(scales + (c << 2), load<f32>(grid + (c << 2)));
    if (zeros) store<u8>(zeros + c, <u8>load<f32>(grid + (c << 2), ZERO));
  }
}

/** Reads scales and zero points back into a strip's grid. */
export function loadGrid(grid: usize, columns: u32, scales: usize, zeros: usize): void {
  for (let c: u32 = 0; c < 16; c++) {
    const scale: f32 = c < columns ? load<f32>(scales + (c << 2)) : 1;
    store<f32>(grid + (c << 2), scale);
    store<f32>(grid + (c << 2), 1 / scale, INVERSE);
    store<f32>(grid + (c << 2), c < columns ? <f32>load<u8>(zeros + c) : 0, ZERO);
  }
}

export function storeCodes(row: v128, to: usize, columns: u32, scratch: usize): void {
  if (columns >= 16) {
    v128.store(to, row);
  } else {
    v128.store(scratch, row);
    memory.copy(to, scratch, columns);
  }
}

/** Rows of a group brought into scratch at a time. */
const BAND: u32 = 512;

/**
 * Min–max rounding to nearest of [groups·size, columns]; units are (group, tile of 32 columns). Any of clip, codes,
 * zeros, scales, values may be null. Groups longer than a band are read twice.
 */
export function fakeQuantize(
  begin: u32, end: u32, scratch: usize,
  src: usize, columns: u32, size: u32, levels: f32, clip: usize, codes: usize, zeros: usize, scales: usize, values: usize,
  symmetric: u32,
): void {
  const tiles = (columns + WIDE - 1) / WIDE;
  const stride = <usize>columns << 2;
  const grids = scratch;
  const spare = scratch + 2 * GRID_BYTES;
  const tile = scratch + 1024;
  for (let unit = begin; unit < end; unit++) {
    const group = unit / tiles;
    const column = (unit - group * tiles) * WIDE;
    const width = min(columns - column, WIDE);
    const row = <usize>group * size;
    startRange(grids);
    startRange(grids + GRID_BYTES);
    for (let r: u32 = 0; r < size; r += BAND) {
      const rows = min(size - r, BAND);
      loadWide(src + (row + r) * stride + (<usize>column << 2), stride, rows, width, tile, 0, 0);
      widenRange(tile, 128, rows, grids);
      widenRange(tile + 64, 128, rows, grids + GRID_BYTES);
    }
    for (let half: u32 = 0; half < 2; half++) {
      const grid = grids + half * GRID_BYTES;
      const first = column + half * 16;
      if (first >= columns) break;
      const here = min<u32>(columns - first, 16);
      const at = <usize>group * columns + first;
      if (clip) clipRange(grid, clip + (at << 2), here);
      if (symmetric) finishSymmetric(grid, levels);
      else finishGrid(grid, levels);
      storeGrid(grid, here, scales ? scales + (at << 2) : 0, zeros ? zeros + at : 0);
    }
    if (!codes && !values) continue;
    for (let r: u32 = 0; r < size; r += BAND) {
      const rows = min(size - r, BAND);
      if (size > BAND) loadWide(src + (row + r) * stride + (<usize>column << 2), stride, rows, width, tile, 0, 0);
      for (let half: u32 = 0; half < 2; half++) {
        const grid = grids + half * GRID_BYTES;
        const first = column + half * 16;
        if (first >= columns) break;
        const here = min<u32>(columns - first, 16);
        const strip = tile + half * 64;
        if (codes) {
          for (let i: u32 = 0; i < rows; i++) {
            storeCodes(rowCodes(strip + (<usize>i << WIDE_SHIFT), grid, levels), codes + (row + r + i) * columns + first, here, spare);
          }
        }
        if (values) roundStrip(strip, 128, rows, grid, levels);
      }
      if (values) storeWide(tile, 0, rows, width, values + (row + r) * stride + (<usize>column << 2), stride, 0);
    }
  }
}
