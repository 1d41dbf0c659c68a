// Pairwise rotations of channel-major matrices, and their gradients.
//
// A rotation table holds, per group and rotation, one 16-byte entry per pair: byte offsets of rows i and j in a wide
// tile (u32 each), and two f32. Most angles are done as three shears,
//   x ← x + t·y,  y ← y − s·x,  x ← x + t·y   with t = tan(θ/2), s = sin θ,
// three multiplications and three additions where the matrix takes four and two: processors have as many units for the one as
// for the other. The few angles near a half turn, where t grows without bound (and rounding errors by t²), have bit 0 of their
// first offset set and hold cos and sin.
// Rotating by −θ is rotating by θ with i and j exchanged, so the inverse reads the same table with the two offsets
// swapped (`first` = 4 instead of 0).
import { WIDE, WIDE_SHIFT, NARROW, NARROW_SHIFT, tileBytes, touchPanel, loadWide, storeWide, loadNarrow, storeNarrow } from './tile';

/** Bytes of one pair in a rotation table. */
export const ENTRY_SHIFT: u32 = 4;
/** The same in a thin table, see rotateThin. */
export const THIN_ENTRY: usize = 12;
/** Columns whose gradients are summed together, a fixed number so that sums do not depend on threads. */
export const CHUNK: u32 = 256;

/** Bit of the first offset that marks an entry with cos and sin. */
const PLAIN: u32 = 1;

/** Four columns of a pair, in place. */
// @ts-ignore: decorator
@inline
function shear(p: usize, q: usize, t: v128, s: v128): void {
  let x = v128.load(p);
  let y = v128.load(q);
  x = f32x4.add(x, f32x4.mul(y, t));
  y = f32x4.sub(y, f32x4.mul(x, s));
  v128.store(q, y);
  v128.store(p, f32x4.add(x, f32x4.mul(y, t)));
}

// @ts-ignore: decorator
@inline
function turn(p: usize, q: usize, c: v128, s: v128): void {
  const x = v128.load(p);
  const y = v128.load(q);
  v128.store(p, f32x4.add(f32x4.mul(x, c), f32x4.mul(y, s)));
  v128.store(q, f32x4.sub(f32x4.mul(y, c), f32x4.mul(x, s)));
}

/** One rotation of a wide tile. */
export function rotateWide(tile: usize, table: usize, pairs: u32, first: usize): void {
  const second: usize = 4 - first;
  const end = table + (<usize>pairs << ENTRY_SHIFT);
  for (let e = table; e < end; e += 16) {
    const i = load<u32>(e + first);
    const j = load<u32>(e + second);
    const t = v128.load32_splat(e, 8);
    const s = v128.load32_splat(e, 12);
    if ((i | j) & PLAIN) {
      const p = tile + (i & ~PLAIN);
      const q = tile + (j & ~PLAIN);
      for (let at: usize = 0; at < 128; at += 16) turn(p + at, q + at, t, s);
    } else {
      const p = tile + i;
      const q = tile + j;
      shear(p, q, t, s);
      shear(p + 16, q + 16, t, s);
      shear(p + 32, q + 32, t, s);
      shear(p + 48, q + 48, t, s);
      shear(p + 64, q + 64, t, s);
      shear(p + 80, q + 80, t, s);
      shear(p + 96, q + 96, t, s);
      shear(p + 112, q + 112, t, s);
    }
  }
}

/**
 * `pairs` rotations of a tile of 4 columns (rows of 16 bytes), from a thin table: per pair the byte offsets of rows i and j (u16
 * each), cos, sin. Instructions count here, the latency from one rotation to the next, and the bytes of the table, which
 * comes from memory for every token: no marks, no shears.
 */
export function rotateThin(tile: usize, table: usize, pairs: u32): void {
  const end = table + <usize>pairs * THIN_ENTRY;
  for (let e = table; e < end; e += THIN_ENTRY) {
    const offsets = load<u32>(e);
    turn(tile + (offsets & 0xffff), tile + (offsets >> 16), v128.load32_splat(e, 4), v128.load32_splat(e, 8));
  }
}

/** All rotations of one group on a wide tile. `table` starts at the group. */
export function rotateAllWide(tile: usize, table: usize, pairs: u32, rotations: u32, inverse: bool): void {
  const bytes = <usize>pairs << ENTRY_SHIFT;
  if (inverse) {
    for (let k = rotations; k > 0; k--) rotateWide(tile, table + (k - 1) * bytes, pairs, 4);
  } else {
    for (let k: u32 = 0; k < rotations; k++) rotateWide(tile, table + k * bytes, pairs, 0);
  }
}

/** The cross product g_i·y_j − g_j·y_i of four columns, which are then rotated. */
// @ts-ignore: decorator
@inline
function shearBoth(gp: usize, gq: usize, yp: usize, yq: usize, t: v128, s: v128): v128 {
  let a = v128.load(gp);
  let b = v128.load(gq);
  let u = v128.load(yp);
  let v = v128.load(yq);
  const cross = f32x4.sub(f32x4.mul(a, v), f32x4.mul(b, u));
  a = f32x4.add(a, f32x4.mul(b, t));
  u = f32x4.add(u, f32x4.mul(v, t));
  b = f32x4.sub(b, f32x4.mul(a, s));
  v = f32x4.sub(v, f32x4.mul(u, s));
  v128.store(gq, b);
  v128.store(yq, v);
  v128.store(gp, f32x4.add(a, f32x4.mul(b, t)));
  v128.store(yp, f32x4.add(u, f32x4.mul(v, t)));
  return cross;
}

// @ts-ignore: decorator
@inline
function turnBoth(gp: usize, gq: usize, yp: usize, yq: usize, c: v128, s: v128): v128 {
  const cross = f32x4.sub(f32x4.mul(v128.load(gp), v128.load(yq)), f32x4.mul(v128.load(gq), v128.load(yp)));
  turn(gp, gq, c, s);
  turn(yp, yq, c, s);
  return cross;
}

/**
 * One rotation of two narrow tiles, the gradient g and the value y it belongs to. Subtracts each pair's cross product
 * g_i·y_j − g_j·y_i from sums[pair], lane by lane (f32x4; folded by foldAngles after a chunk of columns). The cross
 * product is the same before and after rotating both.
 */
export function rotateGradient(g: usize, y: usize, table: usize, pairs: u32, first: usize, sums: usize): void {
  const second: usize = 4 - first;
  const end = table + (<usize>pairs << ENTRY_SHIFT);
  for (let e = table; e < end; e += 16) {
    const i = load<u32>(e + first);
    const j = load<u32>(e + second);
    const t = v128.load32_splat(e, 8);
    const s = v128.load32_splat(e, 12);
    // Rows of a narrow tile are half as long; the mark falls off.
    const gp = g + (i >> 1);
    const gq = g + (j >> 1);
    const yp = y + (i >> 1);
    const yq = y + (j >> 1);
    let cross = v128.load(sums);
    if ((i | j) & PLAIN) {
      for (let at: usize = 0; at < 64; at += 16) cross = f32x4.sub(cross, turnBoth(gp + at, gq + at, yp + at, yq + at, t, s));
    } else {
      const c0 = shearBoth(gp, gq, yp, yq, t, s);
      const c1 = shearBoth(gp + 16, gq + 16, yp + 16, yq + 16, t, s);
      const c2 = shearBoth(gp + 32, gq + 32, yp + 32, yq + 32, t, s);
      const c3 = shearBoth(gp + 48, gq + 48, yp + 48, yq + 48, t, s);
      cross = f32x4.sub(cross, f32x4.add(f32x4.add(c0, c1), f32x4.add(c2, c3)));
    }
    v128.store(sums, cross);
    sums += 16;
  }
}

/** Adds the lanes of `count` f32x4 sums to f64 sums and zeroes them. */
export function foldAngles(lanes: usize, count: u32, sums: usize): void {
  for (let i: u32 = 0; i < count; i++) {
    const x = v128.load(lanes);
    const high = i8x16.shuffle(x, x, 8, 9, 10, 11, 12, 13, 14, 15, 8, 9, 10, 11, 12, 13, 14, 15);
    const wide = f64x2.add(f64x2.promote_low_f32x4(x), f64x2.promote_low_f32x4(high));
    store<f64>(sums, load<f64>(sums) + (f64x2.extract_lane(wide, 0) + f64x2.extract_lane(wide, 1)));
    v128.store(lanes, f32x4.splat(0));
    lanes += 16;
    sums += 8;
  }
}

/** cos θ of an entry: stored, or 1 − sin θ · tan(θ/2). */
// @ts-ignore: decorator
@inline
function cosine(entry: usize): f32 {
  const w = load<f32>(entry, 8);
  return load<u32>(entry) & PLAIN ? w : 1 - load<f32>(entry, 12) * w;
}

/** 16 columns of a pair: p' ← a·p + b·q, q' ← c·p + d·q. */
// @ts-ignore: decorator
@inline
function combine16(p: usize, q: usize, toP: usize, toQ: usize, a: v128, b: v128, c: v128, d: v128): void {
  for (let at: usize = 0; at < 64; at += 16) {
    const x = v128.load(p + at);
    const y = v128.load(q + at);
    v128.store(toP + at, f32x4.add(f32x4.mul(x, a), f32x4.mul(y, b)));
    v128.store(toQ + at, f32x4.add(f32x4.mul(x, c), f32x4.mul(y, d)));
  }
}

/**
 * The first rotation of a panel straight from memory into its tiles (`load`), or the last one straight back: filling and
 * emptying tiles costs as many stores as a rotation. `rows` is the group's first row in memory; width a multiple of WIDE.
 */
function rotateMemory(
  rows: usize, stride: usize, width: u32, tiles: usize, apart: usize, table: usize, pairs: u32, first: usize, scales: usize, load_: bool,
): void {
  const second: usize = 4 - first;
  const end = table + (<usize>pairs << ENTRY_SHIFT);
  for (let e = table; e < end; e += 16) {
    const i = load<u32>(e + first) & ~PLAIN;
    const j = load<u32>(e + second) & ~PLAIN;
    const ri = i >> WIDE_SHIFT;
    const rj = j >> WIDE_SHIFT;
    const fi: f32 = scales ? load<f32>(scales + (<usize>ri << 2)) : 1;
    const fj: f32 = scales ? load<f32>(scales + (<usize>rj << 2)) : 1;
    const cos = cosine(e);
    const sin = load<f32>(e, 12);
    // Rows' scales multiply what goes in, or what comes out.
    const a = f32x4.splat(cos * fi), d = f32x4.splat(cos * fj);
    const b = f32x4.splat(sin * (load_ ? fj : fi)), c = f32x4.splat(-sin * (load_ ? fi : fj));
    let p = rows + ri * stride;
    let q = rows + rj * stride;
    let tp = tiles + i;
    let tq = tiles + j;
    for (const stop = p + (<usize>width << 2); p < stop; p += 128, q += 128, tp += apart, tq += apart) {
      if (load_) {
        combine16(p, q, tp, tq, a, b, c, d);
        combine16(p + 64, q + 64, tp + 64, tq + 64, a, b, c, d);
      } else {
        combine16(tp, tq, p, q, a, b, c, d);
        combine16(tp + 64, tq + 64, p + 64, q + 64, a, b, c, d);
      }
    }
  }
}

/**
 * T or T⁻¹ of a matrix [groups·size, columns]: units are (group, panel of `panel` columns, a multiple of 32), panel
 * fastest. `scales` multiply rows before the rotations, or after them when `inverse`.
 */
export function transformChannels(
  begin: u32, end: u32, scratch: usize,
  src: usize, dst: usize, columns: u32, size: u32, rotations: u32, table: usize, scales: usize, inverse: u32, panel: u32,
): void {
  const panels = (columns + panel - 1) / panel;
  const stride = <usize>columns << 2;
  const pairs = size >> 1;
  const rotationBytes = <usize>pairs << ENTRY_SHIFT;
  const tableBytes = rotationBytes * rotations;
  const apart = tileBytes(size, WIDE_SHIFT);
  const first: usize = inverse ? 4 : 0;
  let touched: u32 = 0;
  for (let unit = begin; unit < end; unit++) {
    const group = unit / panels;
    const column = (unit - group * panels) * panel;
    const width = min(columns - column, panel);
    const at = <usize>group * size * stride + (<usize>column << 2);
    const s = scales ? scales + (<usize>(group * size) << 2) : 0;
    const entries = table + group * tableBytes;
    touched += touchPanel(src + at, stride, size, width);
    if (rotations > 1 && width % WIDE == 0) {
      const last = entries + (rotations - 1) * rotationBytes;
      rotateMemory(src + at, stride, width, scratch, apart, inverse ? last : entries, pairs, first, inverse ? 0 : s, true);
      for (let tile = scratch; tile < scratch + (width >> 5) * apart; tile += apart) {
        rotateAllWide(tile, entries + rotationBytes, pairs, rotations - 2, inverse != 0);
      }
      rotateMemory(dst + at, stride, width, scratch, apart, inverse ? entries : last, pairs, first, inverse ? s : 0, false);
      continue;
    }
    loadWide(src + at, stride, size, width, scratch, apart, inverse ? 0 : s);
    let tile = scratch;
    for (let c: u32 = 0; c < width; c += WIDE) {
      rotateAllWide(tile, entries, pairs, rotations, inverse != 0);
      tile += apart;
    }
    storeWide(scratch, apart, size, width, dst + at, stride, inverse ? s : 0);
  }
  store<u32>(scratch, touched);
}

/**
 * As rotateMemory for the last rotation's gradient, read from memory (`load_`), or the first one's, of which only ∂L/∂x is
 * written: rows of g and y in memory, narrow tiles of both. A pair's sums stay in a register over the whole chunk.
 */
function rotateGradientMemory(
  gRows: usize, yRows: usize, stride: usize, width: u32, g: usize, y: usize, apart: usize, table: usize, pairs: u32, sums: usize, load_: bool,
): void {
  const end = table + (<usize>pairs << ENTRY_SHIFT);
  for (let e = table; e < end; e += 16, sums += 16) {
    // Backwards: rows j and i.
    const i = load<u32>(e, 4);
    const j = load<u32>(e) & ~PLAIN;
    const c = f32x4.splat(cosine(e)), t = v128.load32_splat(e, 12);
    let gp = g + (i >> 1), gq = g + (j >> 1), yp = y + (i >> 1), yq = y + (j >> 1);
    let gi = gRows + (i >> WIDE_SHIFT) * stride, gj = gRows + (j >> WIDE_SHIFT) * stride;
    let yi = yRows + (i >> WIDE_SHIFT) * stride, yj = yRows + (j >> WIDE_SHIFT) * stride;
    let sum = v128.load(sums);
    for (const stop = gi + (<usize>width << 2); gi < stop; gi += 64, gj += 64, yi += 64, yj += 64) {
      for (let at: usize = 0; at < 64; at += 16) {
        if (load_) {
          const a = v128.load(gi + at), b = v128.load(gj + at), u = v128.load(yi + at), v = v128.load(yj + at);
          sum = f32x4.sub(sum, f32x4.sub(f32x4.mul(a, v), f32x4.mul(b, u)));
          v128.store(gp + at, f32x4.add(f32x4.mul(a, c), f32x4.mul(b, t)));
          v128.store(gq + at, f32x4.sub(f32x4.mul(b, c), f32x4.mul(a, t)));
          v128.store(yp + at, f32x4.add(f32x4.mul(u, c), f32x4.mul(v, t)));
          v128.store(yq + at, f32x4.sub(f32x4.mul(v, c), f32x4.mul(u, t)));
        } else {
          const a = v128.load(gp + at), b = v128.load(gq + at), u = v128.load(yp + at), v = v128.load(yq + at);
          sum = f32x4.sub(sum, f32x4.sub(f32x4.mul(a, v), f32x4.mul(b, u)));
          v128.store(gi + at, f32x4.add(f32x4.mul(a, c), f32x4.mul(b, t)));
          v128.store(gj + at, f32x4.sub(f32x4.mul(b, c), f32x4.mul(a, t)));
        }
      }
      gp += apart; gq += apart; yp += apart; yq += apart;
    }
    v128.store(sums, sum);
  }
}

/**
 * Gradient of plain rotations: from values y after all rotations and ∂L/∂y, ∂L/∂x into `dst` (may be the gradient) and the
 * angle gradients into sums (f64, [chunk][group][rotation][pair], zeroed here). Units are (group, chunk of CHUNK columns).
 */
export function rotationGradient(
  begin: u32, end: u32, scratch: usize,
  y: usize, gradient: usize, dst: usize, columns: u32, size: u32, rotations: u32, table: usize, sums: usize, groups: u32,
): void {
  const chunks = (columns + CHUNK - 1) / CHUNK;
  const stride = <usize>columns << 2;
  const pairs = size >> 1;
  const rotationBytes = <usize>pairs << ENTRY_SHIFT;
  const tableBytes = rotationBytes * rotations;
  const apart = tileBytes(size, NARROW_SHIFT);
  const lanes = scratch;
  const g = lanes + tableBytes;
  const values = g + apart * (CHUNK / NARROW);
  memory.fill(lanes, 0, tableBytes);
  for (let unit = begin; unit < end; unit++) {
    const group = unit / chunks;
    const chunk = unit - group * chunks;
    const column = chunk * CHUNK;
    const width = min(columns - column, CHUNK);
    const at = <usize>group * size * stride + (<usize>column << 2);
    const entries = table + group * tableBytes;
    const fused = rotations > 1 && width % NARROW == 0;
    const last = rotationBytes * (rotations - 1);
    if (fused) {
      rotateGradientMemory(gradient + at, y + at, stride, width, g, values, apart, entries + last, pairs, lanes + last, true);
    } else {
      loadNarrow(gradient + at, stride, size, width, g, apart, 0);
      loadNarrow(y + at, stride, size, width, values, apart, 0);
    }
    const least = fused ? rotationBytes : 0;
    for (let c: usize = 0; c < <usize>((width + NARROW - 1) / NARROW) * apart; c += apart) {
      for (let here = fused ? last : tableBytes; here > least; ) {
        here -= rotationBytes;
        rotateGradient(g + c, values + c, entries + here, pairs, 4, lanes + here);
      }
    }
    if (fused) rotateGradientMemory(dst + at, 0, stride, width, g, values, apart, entries, pairs, lanes, false);
    else storeNarrow(g, apart, size, width, dst + at, stride);
    const out = sums + ((<usize>(chunk * groups + group) * (pairs * rotations)) << 3);
    memory.fill(out, 0, <usize>(pairs * rotations) << 3);
    foldAngles(lanes, pairs * rotations, out);
  }
}

/** Multiplies and adds in registers only: 12 independent chains, 24 vector operations per iteration, the yardstick of the benchmark. */
export function multiplyAddPeak(begin: u32, end: u32, scratch: usize): void {
  const c = f32x4.splat(0.999999);
  const d = f32x4.splat(0.000001);
  let a0 = f32x4.splat(1), a1 = f32x4.splat(2), a2 = f32x4.splat(3), a3 = f32x4.splat(4), a4 = f32x4.splat(5), a5 = f32x4.splat(6);
  let b0 = f32x4.splat(1), b1 = f32x4.splat(2), b2 = f32x4.splat(3), b3 = f32x4.splat(4), b4 = f32x4.splat(5), b5 = f32x4.splat(6);
  for (let i = begin; i < end; i++) {
    a0 = f32x4.mul(a0, c); b0 = f32x4.add(b0, d);
    a1 = f32x4.mul(a1, c); b1 = f32x4.add(b1, d);
    a2 = f32x4.mul(a2, c); b2 = f32x4.add(b2, d);
    a3 = f32x4.mul(a3, c); b3 = f32x4.add(b3, d);
    a4 = f32x4.mul(a4, c); b4 = f32x4.add(b4, d);
    a5 = f32x4.mul(a5, c); b5 = f32x4.add(b5, d);
    a0 = f32x4.mul(a0, c); b0 = f32x4.add(b0, d);
    a1 = f32x4.mul(a1, c); b1 = f32x4.add(b1, d);
    a2 = f32x4.mul(a2, c); b2 = f32x4.add(b2, d);
    a3 = f32x4.mul(a3, c); b3 = f32x4.add(b3, d);
    a4 = f32x4.mul(a4, c); b4 = f32x4.add(b4, d);
    a5 = f32x4.mul(a5, c); b5 = f32x4.add(b5, d);
  }
  const a = f32x4.add(f32x4.add(f32x4.add(a0, a1), f32x4.add(a2, a3)), f32x4.add(a4, a5));
  const b = f32x4.add(f32x4.add(f32x4.add(b0, b1), f32x4.add(b2, b3)), f32x4.add(b4, b5));
  v128.store(scratch, f32x4.add(a, b));
}
