// GPTQ's inner block: rounds rows in order, spreading each row's error over the later rows of the block.
//
// Left-looking: a row collects the errors of the rows before it just before it is rounded, in registers, instead of
// every row writing to all later ones (which is bound by stores).
import { WIDE, WIDE_SHIFT, loadWide, storeWide, move16 } from './tile';
import { GRID_BYTES, startRange, widenRange, finishGrid, finishSymmetric, roundStrip, rowCodes, storeCodes, storeGrid, loadGrid } from './grid';

/** rows [first, last) −= Σ_{k in [from, to)} factor[k][row] · errors[k], on wide tiles. */
export function applyErrors(tile: usize, errors: usize, factor: usize, block: u32, first: u32, last: u32, from: u32, to: u32): void {
  const step = <usize>block << 2;
  for (let r = first; r < last; r++) {
    for (let half: usize = 0; half < 128; half += 64) {
      const p = tile + (<usize>r << WIDE_SHIFT) + half;
      let a0 = v128.load(p), a1 = v128.load(p, 16), a2 = v128.load(p, 32), a3 = v128.load(p, 48);
      let u = factor + from * step + (<usize>r << 2);
      let e = errors + (<usize>from << WIDE_SHIFT) + half;
      for (let k = from; k < to; k++) {
        const s = v128.load32_splat(u);
        a0 = f32x4.sub(a0, f32x4.mul(v128.load(e), s));
        a1 = f32x4.sub(a1, f32x4.mul(v128.load(e, 16), s));
        a2 = f32x4.sub(a2, f32x4.mul(v128.load(e, 32), s));
        a3 = f32x4.sub(a3, f32x4.mul(v128.load(e, 48), s));
        u += step;
        e += 128;
      }
      v128.store(p, a0);
      v128.store(p, a1, 16);
      v128.store(p, a2, 32);
      v128.store(p, a3, 48);
    }
  }
}

/**
 * One block of rows [block, columns]; units are tiles of 32 columns. `w` becomes the rounded values, `errors` gets
 * (w − q) / U_jj per row, `codes` the codes. `factor` is U's diagonal block [block, block]. With `given` the whole block
 * lies in one group whose grid is in scales and zeros [columns]; otherwise groups of `size` rows tile the block and
 * their grids are set when reached and written to scales and zeros [block / size, columns]. `clip` may be null.
 */
export function gptqBlock(
  begin: u32, end: u32, scratch: usize,
  w: usize, errors: usize, codes: usize, scales: usize, zeros: usize, clip: usize, factor: usize,
  block: u32, columns: u32, size: u32, given: u32, levels: f32, symmetric: u32,
): void {
  const stride = <usize>columns << 2;
  const grids = scratch;
  const spare = scratch + 2 * GRID_BYTES;
  const tile = scratch + 1024;
  const lost = tile + (<usize>block << WIDE_SHIFT);
  for (let unit = begin; unit < end; unit++) {
    const column = unit * WIDE;
    const width = min(columns - column, WIDE);
    const at = <usize>column << 2;
    loadWide(w + at, stride, block, width, tile, 0, 0);
    for (let g: u32 = 0; g < block; g += size) {
      const rows = min(size, block - g);
      if (g) applyErrors(tile, lost, factor, block, g, g + rows, 0, g);
      for (let half: u32 = 0; half < 2; half++) {
        const first = column + half * 16;
        if (first >= columns) break;
        const here = min<u32>(columns - first, 16);
        const grid = grids + half * GRID_BYTES;
        const slot = <usize>(g / size) * columns + first;
        if (given) {
          loadGrid(grid, here, scales + (slot << 2), zeros + slot);
        } else {
          startRange(grid);
          widenRange(tile + (<usize>g << WIDE_SHIFT) + half * 64, 128, rows, grid);
          if (clip) clipStrip(grid, clip + (slot << 2), here);
          if (symmetric) finishSymmetric(grid, levels);
          else finishGrid(grid, levels);
          storeGrid(grid, here, scales + (slot << 2), zeros + slot);
        }
      }
      for (let j = g; j < g + rows; j++) {
        if (j > g) applyErrors(tile, lost, factor, block, j, j + 1, g, j);
        const row = tile + (<usize>j << WIDE_SHIFT);
        const error = lost + (<usize>j << WIDE_SHIFT);
        move16(row, error);
        move16(row + 64, error + 64);
        const scale = f32x4.splat(1 / load<f32>(factor + ((<usize>j * block + j) << 2)));
        for (let half: u32 = 0; half < 2; half++) {
          const first = column + half * 16;
          if (first >= columns) break;
          const grid = grids + half * GRID_BYTES;
          storeCodes(rowCodes(row + half * 64, grid, levels), codes + <usize>j * columns + first, min<u32>(columns - first, 16), spare);
          roundStrip(row + half * 64, 128, 1, grid, levels);
        }
        for (let c: usize = 0; c < 128; c += 16) {
          v128.store(error + c, f32x4.mul(f32x4.sub(v128.load(error + c), v128.load(row + c)), scale));
        }
      }
    }
    storeWide(tile, 0, block, width, w + at, stride, 0);
    storeWide(lost, 0, block, width, errors + at, stride, 0);
  }
}

function clipStrip(grid: usize, clip: usize, columns: u32): void {
  for (let c: u32 = 0; c < columns; c++) {
    const factor = load<f32>(clip + (c << 2));
    const at = grid + (c << 2);
    store<f32>(at, load<f32>(at, 192) * factor, 192);
    store<f32>(at, load<f32>(at, 256) * factor, 256);
  }
}
