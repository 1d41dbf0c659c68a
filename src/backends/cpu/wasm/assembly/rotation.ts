// Pairwise rotations of channel-major matrices, and their gradients.
//
// A rotation table holds, per group and rotation, one 16-byte entry per pair: byte offsets of rows i and j in a wide
// tile (u32 each), cos and sin (f32). Rotating by −θ is rotating by θ with i and j exchanged, so the inverse reads the
// same table with the two offsets swapped (`first` = 4 instead of 0).
import { WIDE, WIDE_SHIFT, NARROW, NARROW_SHIFT, loadWide, storeWide, loadNarrow, storeNarrow } from './tile';

/** Bytes of one pair in a rotation table. */
export const ENTRY_SHIFT: u32 = 4;
/** Columns whose gradients are summed together, a fixed number so that sums do not depend on threads. */
export const CHUNK: u32 = 128;

/** One rotation of a wide tile. */
export function rotateWide(tile: usize, table: usize, pairs: u32, first: usize): void {
  const second: usize = 4 - first;
  const end = table + (<usize>pairs << ENTRY_SHIFT);
  for (let e = table; e < end; e += 16) {
    const p = tile + load<u32>(e + first);
    const q = tile + load<u32>(e + second);
    const c = v128.load32_splat(e, 8);
    const s = v128.load32_splat(e, 12);
    let x0 = v128.load(p);
    let y0 = v128.load(q);
    let x1 = v128.load(p, 16);
    let y1 = v128.load(q, 16);
    v128.store(p, f32x4.add(f32x4.mul(x0, c), f32x4.mul(y0, s)));
    v128.store(q, f32x4.sub(f32x4.mul(y0, c), f32x4.mul(x0, s)));
    v128.store(p, f32x4.add(f32x4.mul(x1, c), f32x4.mul(y1, s)), 16);
    v128.store(q, f32x4.sub(f32x4.mul(y1, c), f32x4.mul(x1, s)), 16);
    x0 = v128.load(p, 32);
    y0 = v128.load(q, 32);
    x1 = v128.load(p, 48);
    y1 = v128.load(q, 48);
    v128.store(p, f32x4.add(f32x4.mul(x0, c), f32x4.mul(y0, s)), 32);
    v128.store(q, f32x4.sub(f32x4.mul(y0, c), f32x4.mul(x0, s)), 32);
    v128.store(p, f32x4.add(f32x4.mul(x1, c), f32x4.mul(y1, s)), 48);
    v128.store(q, f32x4.sub(f32x4.mul(y1, c), f32x4.mul(x1, s)), 48);
    x0 = v128.load(p, 64);
    y0 = v128.load(q, 64);
    x1 = v128.load(p, 80);
    y1 = v128.load(q, 80);
    v128.store(p, f32x4.add(f32x4.mul(x0, c), f32x4.mul(y0, s)), 64);
    v128.store(q, f32x4.sub(f32x4.mul(y0, c), f32x4.mul(x0, s)), 64);
    v128.store(p, f32x4.add(f32x4.mul(x1, c), f32x4.mul(y1, s)), 80);
    v128.store(q, f32x4.sub(f32x4.mul(y1, c), f32x4.mul(x1, s)), 80);
    x0 = v128.load(p, 96);
    y0 = v128.load(q, 96);
    x1 = v128.load(p, 112);
    y1 = v128.load(q, 112);
    v128.store(p, f32x4.add(f32x4.mul(x0, c), f32x4.mul(y0, s)), 96);
    v128.store(q, f32x4.sub(f32x4.mul(y0, c), f32x4.mul(x0, s)), 96);
    v128.store(p, f32x4.add(f32x4.mul(x1, c), f32x4.mul(y1, s)), 112);
    v128.store(q, f32x4.sub(f32x4.mul(y1, c), f32x4.mul(x1, s)), 112);
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

/**
 * One rotation of two narrow tiles, the gradient g and the value y it belongs to. Subtracts each pair's cross product
 * g_i·y_j − g_j·y_i from sums[pair], lane by lane (f32x4; folded by foldAngles after a chunk of columns). The cross
 * product is the same before and after rotating both.
 */
export function rotateGradient(g: usize, y: usize, table: usize, pairs: u32, first: usize, sums: usize): void {
  const second: usize = 4 - first;
  const end = table + (<usize>pairs << ENTRY_SHIFT);
  for (let e = table; e < end; e += 16) {
    const i = load<u32>(e + first) >> 1;
    const j = load<u32>(e + second) >> 1;
    const c = v128.load32_splat(e, 8);
    const s = v128.load32_splat(e, 12);
    const gp = g + i;
    const gq = g + j;
    const yp = y + i;
    const yq = y + j;
    let a = v128.load(gp);
    let b = v128.load(gq);
    let u = v128.load(yp);
    let v = v128.load(yq);
    let cross = f32x4.sub(f32x4.mul(a, v), f32x4.mul(b, u));
    v128.store(gp, f32x4.add(f32x4.mul(a, c), f32x4.mul(b, s)));
    v128.store(gq, f32x4.sub(f32x4.mul(b, c), f32x4.mul(a, s)));
    v128.store(yp, f32x4.add(f32x4.mul(u, c), f32x4.mul(v, s)));
    v128.store(yq, f32x4.sub(f32x4.mul(v, c), f32x4.mul(u, s)));
    a = v128.load(gp, 16);
    b = v128.load(gq, 16);
    u = v128.load(yp, 16);
    v = v128.load(yq, 16);
    cross = f32x4.add(cross, f32x4.sub(f32x4.mul(a, v), f32x4.mul(b, u)));
    v128.store(gp, f32x4.add(f32x4.mul(a, c), f32x4.mul(b, s)), 16);
    v128.store(gq, f32x4.sub(f32x4.mul(b, c), f32x4.mul(a, s)), 16);
    v128.store(yp, f32x4.add(f32x4.mul(u, c), f32x4.mul(v, s)), 16);
    v128.store(yq, f32x4.sub(f32x4.mul(v, c), f32x4.mul(u, s)), 16);
    a = v128.load(gp, 32);
    b = v128.load(gq, 32);
    u = v128.load(yp, 32);
    v = v128.load(yq, 32);
    let cross2 = f32x4.sub(f32x4.mul(a, v), f32x4.mul(b, u));
    v128.store(gp, f32x4.add(f32x4.mul(a, c), f32x4.mul(b, s)), 32);
    v128.store(gq, f32x4.sub(f32x4.mul(b, c), f32x4.mul(a, s)), 32);
    v128.store(yp, f32x4.add(f32x4.mul(u, c), f32x4.mul(v, s)), 32);
    v128.store(yq, f32x4.sub(f32x4.mul(v, c), f32x4.mul(u, s)), 32);
    a = v128.load(gp, 48);
    b = v128.load(gq, 48);
    u = v128.load(yp, 48);
    v = v128.load(yq, 48);
    cross2 = f32x4.add(cross2, f32x4.sub(f32x4.mul(a, v), f32x4.mul(b, u)));
    v128.store(gp, f32x4.add(f32x4.mul(a, c), f32x4.mul(b, s)), 48);
    v128.store(gq, f32x4.sub(f32x4.mul(b, c), f32x4.mul(a, s)), 48);
    v128.store(yp, f32x4.add(f32x4.mul(u, c), f32x4.mul(v, s)), 48);
    v128.store(yq, f32x4.sub(f32x4.mul(v, c), f32x4.mul(u, s)), 48);
    v128.store(sums, f32x4.sub(v128.load(sums), f32x4.add(cross, cross2)));
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
  const tableBytes = (<usize>(pairs * rotations)) << ENTRY_SHIFT;
  const apart = <usize>size << WIDE_SHIFT;
  for (let unit = begin; unit < end; unit++) {
    const group = unit / panels;
    const column = (unit - group * panels) * panel;
    const width = min(columns - column, panel);
    const at = <usize>group * size * stride + (<usize>column << 2);
    const s = scales ? scales + (<usize>(group * size) << 2) : 0;
    loadWide(src + at, stride, size, width, scratch, apart, inverse ? 0 : s);
    let tile = scratch;
    for (let c: u32 = 0; c < width; c += WIDE) {
      rotateAllWide(tile, table + group * tableBytes, pairs, rotations, inverse != 0);
      tile += apart;
    }
    storeWide(scratch, apart, size, width, dst + at, stride, inverse ? s : 0);
  }
}

/**
 * Gradient of plain rotations, for the benchmark: from values y after all rotations and ∂L/∂y, ∂L/∂x into `dst` and the
 * angle gradients into sums (f64, [chunk][group][rotation][pair], zeroed here). Units are (group, chunk of CHUNK columns).
 */
export function rotationGradient(
  begin: u32, end: u32, scratch: usize,
  y: usize, gradient: usize, dst: usize, columns: u32, size: u32, rotations: u32, table: usize, sums: usize, groups: u32,
): void {
  const chunks = (columns + CHUNK - 1) / CHUNK;
  const stride = <usize>columns << 2;
  const pairs = size >> 1;
  const tableBytes = (<usize>(pairs * rotations)) << ENTRY_SHIFT;
  const apart = <usize>size << NARROW_SHIFT;
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
    loadNarrow(gradient + at, stride, size, width, g, apart, 0);
    loadNarrow(y + at, stride, size, width, values, apart, 0);
    for (let c: usize = 0; c < <usize>((width + NARROW - 1) / NARROW) * apart; c += apart) {
      for (let k = rotations; k > 0; k--) {
        const here = <usize>((k - 1) * pairs) << ENTRY_SHIFT;
        rotateGradient(g + c, values + c, table + group * tableBytes + here, pairs, 4, lanes + here);
      }
    }
    storeNarrow(g, apart, size, width, dst + at, stride);
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
