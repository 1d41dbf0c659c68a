// The layer objective (design §4.3): Ŵ = T⁻¹(Q(T(W))) and its gradient with respect to angles and channel scales, fused
// per tile so that a tile stays in the L1 cache through all rotations.
//
// A block is what has to be seen before anything in it can be rounded: one rotation group with the grid groups in it, or
// one grid group with the rotation groups in it (one of the two sizes divides the other; "split" is the latter).
import { WIDE, WIDE_SHIFT, NARROW, NARROW_SHIFT, tileBytes, loadWide, storeWide, loadNarrow, storeNarrow, move16 } from './tile';
import { CHUNK, ENTRY_SHIFT, foldAngles, rotateAllWide, rotateGradient } from './rotation';
import {
  GRID_BYTES, MINIMUM, MAXIMUM, startRange, widenRange, finishGrid, roundStrip, scaleGradient, spreadScaleGradient,
} from './grid';

/** Scratch before the tiles: up to 16 strips' grids with their sums (64 bytes) and marks (128 bytes). */
const HEAD: usize = 8192;
const STRIP_BYTES: usize = GRID_BYTES + 192;

/** Saves the ranges of 16 columns, and reads them back. `ranges` holds minima then maxima, `apart` bytes from each other. */
function saveRange(grid: usize, to: usize, apart: usize): void {
  move16(grid + MINIMUM, to);
  move16(grid + MAXIMUM, to + apart);
}
function readRange(grid: usize, from: usize, apart: usize): void {
  move16(from, grid + MINIMUM);
  move16(from + apart, grid + MAXIMUM);
}

/**
 * Forward: units are (block, panel of `panel` ≤ 256 columns, a multiple of 32). Writes Y = T(W), Ŵ and the ranges
 * ([grids, padded] minima, then maxima; padded = columns rounded up to 32).
 */
export function objectiveForward(
  begin: u32, end: u32, scratch: usize,
  w: usize, y: usize, out: usize, ranges: usize, channels: u32, columns: u32, size: u32, gridSize: u32, rotations: u32,
  table: usize, scales: usize, inverse: usize, levels: f32, panel: u32,
): void {
  const panels = (columns + panel - 1) / panel;
  const stride = <usize>columns << 2;
  const padded = <usize>((columns + WIDE - 1) / WIDE) << 7;
  const between = <usize>(channels / gridSize) * padded;
  const pairs = size >> 1;
  const tableBytes = (<usize>(pairs * rotations)) << ENTRY_SHIFT;
  const block = max(size, gridSize);
  const split = gridSize > size;
  const span = min(size, gridSize);
  const apart = tileBytes(size, WIDE_SHIFT);
  const tiles = scratch + HEAD;
  for (let unit = begin; unit < end; unit++) {
    const b = unit / panels;
    const column = (unit - b * panels) * panel;
    const width = min(columns - column, panel);
    const strips = ((width + WIDE - 1) / WIDE) << 1;
    const at = <usize>column << 2;
    const start = b * block;
    if (split) for (let t: u32 = 0; t < strips; t++) startRange(scratch + t * STRIP_BYTES);
    for (let r: u32 = start; r < start + block; r += size) {
      loadWide(w + r * stride + at, stride, size, width, tiles, apart, scales + (<usize>r << 2));
      for (let t: u32 = 0; t < strips; t += 2) {
        const tile = tiles + (t >> 1) * apart;
        rotateAllWide(tile, table + (r / size) * tableBytes, pairs, rotations, false);
        if (split) {
          widenRange(tile, 128, size, scratch + t * STRIP_BYTES);
          widenRange(tile + 64, 128, size, scratch + (t + 1) * STRIP_BYTES);
        }
      }
      storeWide(tiles, apart, size, width, y + r * stride + at, stride, 0);
    }
    if (split) {
      for (let t: u32 = 0; t < strips; t++) {
        finishGrid(scratch + t * STRIP_BYTES, levels);
        saveRange(scratch + t * STRIP_BYTES, ranges + b * padded + at + (<usize>t << 6), between);
      }
    }
    for (let r: u32 = start; r < start + block; r += size) {
      if (split) loadWide(y + r * stride + at, stride, size, width, tiles, apart, 0);
      for (let t: u32 = 0; t < strips; t += 2) {
        const tile = tiles + (t >> 1) * apart;
        for (let q: u32 = 0; q < size; q += span) {
          for (let half: u32 = 0; half < 2; half++) {
            const grid = scratch + (t + half) * STRIP_BYTES;
            const strip = tile + (<usize>q << WIDE_SHIFT) + (half << 6);
            if (!split) {
              startRange(grid);
              widenRange(strip, 128, span, grid);
              finishGrid(grid, levels);
              saveRange(grid, ranges + ((r + q) / gridSize) * padded + at + (<usize>(t + half) << 6), between);
            }
            roundStrip(strip, 128, span, grid, levels);
          }
        }
        rotateAllWide(tile, table + (r / size) * tableBytes, pairs, rotations, true);
      }
      storeWide(tiles, apart, size, width, out + r * stride + at, stride, inverse + (<usize>r << 2));
    }
  }
}

/** sums += sign · Σ_columns a·b per row of two panels of narrow tiles (f64). */
function addRowDots(a: usize, b: usize, rows: u32, tiles: u32, apart: usize, sign: f64, sums: usize): void {
  for (let r: u32 = 0; r < rows; r++) {
    let t = f32x4.splat(0);
    for (let c: usize = 0; c < tiles * apart; c += apart) {
      const p = a + c;
      const q = b + c;
      t = f32x4.add(t, f32x4.add(
        f32x4.add(f32x4.mul(v128.load(p), v128.load(q)), f32x4.mul(v128.load(p, 16), v128.load(q, 16))),
        f32x4.add(f32x4.mul(v128.load(p, 32), v128.load(q, 32)), f32x4.mul(v128.load(p, 48), v128.load(q, 48))),
      ));
    }
    const sum = <f64>f32x4.extract_lane(t, 0) + <f64>f32x4.extract_lane(t, 1) + (<f64>f32x4.extract_lane(t, 2) + <f64>f32x4.extract_lane(t, 3));
    store<f64>(sums, load<f64>(sums) + sign * sum);
    a += 64;
    b += 64;
    sums += 8;
  }
}

/** Multiplies rows of a narrow tile by factors. */
function scaleRows(tile: usize, rows: u32, factors: usize): void {
  for (let r: u32 = 0; r < rows; r++) {
    const s = v128.load32_splat(factors + (r << 2));
    v128.store(tile, f32x4.mul(v128.load(tile), s));
    v128.store(tile, f32x4.mul(v128.load(tile, 16), s), 16);
    v128.store(tile, f32x4.mul(v128.load(tile, 32), s), 32);
    v128.store(tile, f32x4.mul(v128.load(tile, 48), s), 48);
    tile += 64;
  }
}

/**
 * Backward: units are (block, chunk of CHUNK columns); chunks have a fixed size and their own partial sums, so results do
 * not depend on the number of threads. Partial sums per chunk, f64: [rotations, channels/2] for angles, then [channels]
 * for scales. `gradient` (∂L/∂Ŵ) is overwritten where a grid spans several rotation groups.
 */
export function objectiveBackward(
  begin: u32, end: u32, scratch: usize,
  w: usize, y: usize, out: usize, gradient: usize, ranges: usize, channels: u32, columns: u32, size: u32, gridSize: u32,
  rotations: u32, table: usize, scales: usize, inverse: usize, levels: f32, partial: usize,
): void {
  const chunks = (columns + CHUNK - 1) / CHUNK;
  const stride = <usize>columns << 2;
  const padded = <usize>((columns + WIDE - 1) / WIDE) << 7;
  const between = <usize>(channels / gridSize) * padded;
  const pairs = size >> 1;
  const rotationBytes = <usize>pairs << ENTRY_SHIFT;
  const tableBytes = rotationBytes * rotations;
  const block = max(size, gridSize);
  const split = gridSize > size;
  const span = min(size, gridSize);
  const half = channels >> 1;
  const apart = tileBytes(size, NARROW_SHIFT);
  const lanes = scratch + HEAD;
  const h = lanes + tableBytes;
  const z = h + apart * (CHUNK / NARROW);
  memory.fill(lanes, 0, tableBytes);
  for (let unit = begin; unit < end; unit++) {
    const b = unit / chunks;
    const chunk = unit - b * chunks;
    const start = b * block;
    const column = chunk * CHUNK;
    const width = min(columns - column, CHUNK);
    const tiles = (width + NARROW - 1) / NARROW;
    const at = <usize>column << 2;
    const angles = partial + ((<usize>chunk * (rotations * half + channels)) << 3);
    const rows = angles + (<usize>(rotations * half) << 3);
    for (let k: u32 = 0; k < rotations; k++) memory.fill(angles + (<usize>(k * half + (start >> 1)) << 3), 0, <usize>(block >> 1) << 3);
    memory.fill(rows + (<usize>start << 3), 0, <usize>block << 3);
    if (split) {
      for (let t: u32 = 0; t < tiles; t++) {
        const grid = scratch + t * STRIP_BYTES;
        readRange(grid, ranges + b * padded + at + (<usize>t << 6), between);
        finishGrid(grid, levels);
        memory.fill(grid + GRID_BYTES, 0, 192);
      }
    }
    // Through the inverse transform: h = ∂L/∂z with z = R⁻¹(Q), carried forward until h = ∂L/∂Q.
    for (let r: u32 = start; r < start + block; r += size) {
      const pairsAt = table + (r / size) * tableBytes;
      loadNarrow(gradient + r * stride + at, stride, size, width, h, apart, inverse + (<usize>r << 2));
      loadNarrow(out + r * stride + at, stride, size, width, z, apart, 0);
      // ∂L/∂s through Ŵ = z / s: −Σ G·Ŵ / s, and h = G / s.
      addRowDots(h, z, size, tiles, apart, -1, rows + (<usize>r << 3));
      for (let c: usize = 0; c < tiles * apart; c += apart) {
        scaleRows(z + c, size, scales + (<usize>r << 2));
        for (let k: u32 = 0; k < rotations; k++) {
          rotateGradient(h + c, z + c, pairsAt + k * rotationBytes, pairs, 0, lanes + k * rotationBytes);
        }
      }
      if (split) {
        loadNarrow(y + r * stride + at, stride, size, width, z, apart, 0);
        for (let t: u32 = 0; t < tiles; t++) {
          const grid = scratch + t * STRIP_BYTES;
          scaleGradient(h + t * apart, z + t * apart, size, grid, levels, grid + GRID_BYTES);
        }
        storeNarrow(h, apart, size, width, gradient + r * stride + at, stride);
        foldGroup(lanes, pairs, rotations, angles + (<usize>(r >> 1) << 3), half);
      }
    }
    // Through the grid, then back through the forward transform.
    for (let r: u32 = start; r < start + block; r += size) {
      const pairsAt = table + (r / size) * tableBytes;
      if (split) loadNarrow(gradient + r * stride + at, stride, size, width, h, apart, 0);
      loadNarrow(y + r * stride + at, stride, size, width, z, apart, 0);
      for (let t: u32 = 0; t < tiles; t++) {
        const ht = h + t * apart;
        const zt = z + t * apart;
        const grid = scratch + t * STRIP_BYTES;
        const sums = grid + GRID_BYTES;
        for (let q: u32 = 0; q < size; q += span) {
          const hq = ht + (<usize>q << NARROW_SHIFT);
          const zq = zt + (<usize>q << NARROW_SHIFT);
          if (!split) {
            readRange(grid, ranges + ((r + q) / gridSize) * padded + at + (<usize>t << 6), between);
            finishGrid(grid, levels);
            memory.fill(sums, 0, 192);
            scaleGradient(hq, zq, span, grid, levels, sums);
          }
          spreadScaleGradient(hq, zq, span, grid, levels, sums, sums + 64);
        }
        for (let k = rotations; k > 0; k--) {
          rotateGradient(ht, zt, pairsAt + (k - 1) * rotationBytes, pairs, 4, lanes + (k - 1) * rotationBytes);
        }
      }
      foldGroup(lanes, pairs, rotations, angles + (<usize>(r >> 1) << 3), half);
      loadNarrow(w + r * stride + at, stride, size, width, z, apart, 0);
      addRowDots(h, z, size, tiles, apart, 1, rows + (<usize>r << 3));
    }
  }
}

/** Folds one group's angle sums: rotation k's to sums + k·half. */
function foldGroup(lanes: usize, pairs: u32, rotations: u32, sums: usize, half: u32): void {
  for (let k: u32 = 0; k < rotations; k++) {
    foldAngles(lanes + ((<usize>k * pairs) << ENTRY_SHIFT), pairs, sums + ((<usize>k * half) << 3));
  }
}

/** out[i] = Σ over chunks of partial[chunk][i], in chunk order. */
export function reduceChunks(begin: u32, end: u32, scratch: usize, partial: usize, chunks: u32, count: u32, out: usize): void {
  for (let i = begin; i < end; i++) {
    let sum: f64 = 0;
    for (let c: u32 = 0; c < chunks; c++) sum += load<f64>(partial + ((<usize>c * count + i) << 3));
    store<f64>(out + (<usize>i << 3), sum);
  }
}
