// Tiles: a few columns of one group of channels packed in scratch, where rotations and grids run from the L1 cache.
// Packing avoids the 4 KiB aliasing that rows of a big matrix suffer (a power-of-two stride maps to one cache set).
//
// Tiles are filled a panel (several tiles side by side) at a time: reading 128 bytes of each of 128 far-apart rows defeats
// the hardware prefetchers, reading 1 KiB of each does not. A panel stays in the L2 cache; its tiles follow each other
// `apart` bytes from one another.

/** Columns and bytes per row of a wide tile (forward transforms): 128 channels take 16 KiB, half of an L1 cache. */
export const WIDE: u32 = 32;
export const WIDE_SHIFT: u32 = 7;
/** Columns and bytes per row of a narrow tile (gradients hold two tiles at a time). */
export const NARROW: u32 = 16;
export const NARROW_SHIFT: u32 = 6;

/** Bytes between tiles of a panel: two cache lines more than a tile, or the same row of all of them would fall into one cache set. */
// @ts-ignore: decorator
@inline
export function tileBytes(rows: u32, shift: u32): usize {
  return (<usize>rows << shift) + 128;
}

/**
 * Loads one word of every line of a panel in memory, so that as many misses as possible are in flight together: between the
 * stores of a tile that is being filled there is room for few. The sum must be stored, or the loads are left out.
 */
export function touchPanel(from: usize, stride: usize, rows: u32, columns: u32): u32 {
  let sum: u32 = 0;
  const bytes = <usize>columns << 2;
  for (let r: u32 = 0; r < rows; r++, from += stride) {
    for (let at: usize = 0; at < bytes; at += 64) sum += load<u32>(from + at);
  }
  return sum;
}

/** Copies `columns` floats to `to`, each times s, then zeros up to `width`. */
function copyPadded(from: usize, to: usize, columns: u32, width: u32, s: v128): void {
  let c: u32 = 0;
  for (; c + 4 <= columns; c += 4) v128.store(to + (c << 2), f32x4.mul(v128.load(from + (c << 2)), s));
  const factor = f32x4.extract_lane(s, 0);
  for (; c < columns; c++) store<f32>(to + (c << 2), load<f32>(from + (c << 2)) * factor);
  for (; c < width; c++) store<f32>(to + (c << 2), 0);
}

/** Copies 16 floats times s. */
// @ts-ignore: decorator
@inline
function copy16(from: usize, to: usize, s: v128): void {
  v128.store(to, f32x4.mul(v128.load(from), s));
  v128.store(to, f32x4.mul(v128.load(from, 16), s), 16);
  v128.store(to, f32x4.mul(v128.load(from, 32), s), 32);
  v128.store(to, f32x4.mul(v128.load(from, 48), s), 48);
}

/** Copies 16 floats; a call of memory.copy costs more than such a copy. */
// @ts-ignore: decorator
@inline
export function move16(from: usize, to: usize): void {
  v128.store(to, v128.load(from));
  v128.store(to, v128.load(from, 16), 16);
  v128.store(to, v128.load(from, 32), 32);
  v128.store(to, v128.load(from, 48), 48);
}

/** Loads rows of `columns` floats (stride in bytes) into a panel of wide tiles, each row times its scale (null: 1). */
export function loadWide(from: usize, stride: usize, rows: u32, columns: u32, tile: usize, apart: usize, scales: usize): void {
  for (let r: u32 = 0; r < rows; r++) {
    const s = scales ? v128.load32_splat(scales + (r << 2)) : f32x4.splat(1);
    let to = tile + (<usize>r << WIDE_SHIFT);
    let p = from;
    let left = columns;
    for (; left >= WIDE; left -= WIDE) {
      copy16(p, to, s);
      copy16(p + 64, to + 64, s);
      p += 128;
      to += apart;
    }
    if (left) copyPadded(p, to, left, WIDE, s);
    from += stride;
  }
}

/** Stores the first `columns` of a panel of wide tiles, each row times its scale (null: 1). */
export function storeWide(tile: usize, apart: usize, rows: u32, columns: u32, to: usize, stride: usize, scales: usize): void {
  for (let r: u32 = 0; r < rows; r++) {
    const s = scales ? v128.load32_splat(scales + (r << 2)) : f32x4.splat(1);
    let from = tile + (<usize>r << WIDE_SHIFT);
    let p = to;
    let left = columns;
    for (; left >= WIDE; left -= WIDE) {
      copy16(from, p, s);
      copy16(from + 64, p + 64, s);
      p += 128;
      from += apart;
    }
    if (left) copyPadded(from, p, left, left, s);
    to += stride;
  }
}

/** As loadWide, into narrow tiles. */
export function loadNarrow(from: usize, stride: usize, rows: u32, columns: u32, tile: usize, apart: usize, scales: usize): void {
  for (let r: u32 = 0; r < rows; r++) {
    const s = scales ? v128.load32_splat(scales + (r << 2)) : f32x4.splat(1);
    let to = tile + (<usize>r << NARROW_SHIFT);
    let p = from;
    let left = columns;
    for (; left >= NARROW; left -= NARROW) {
      copy16(p, to, s);
      p += 64;
      to += apart;
    }
    if (left) copyPadded(p, to, left, NARROW, s);
    from += stride;
  }
}

/** Stores the first `columns` of a panel of narrow tiles. */
export function storeNarrow(tile: usize, apart: usize, rows: u32, columns: u32, to: usize, stride: usize): void {
  const one = f32x4.splat(1);
  for (let r: u32 = 0; r < rows; r++) {
    let from = tile + (<usize>r << NARROW_SHIFT);
    let p = to;
    let left = columns;
    for (; left >= NARROW; left -= NARROW) {
      copy16(from, p, one);
      p += 64;
      from += apart;
    }
    if (left) copyPadded(from, p, left, left, one);
    to += stride;
  }
}
