// Coordinate descent's inner block: visits rows in order and moves each to the grid value nearest its optimum given all
// other rows, spreading the change over the residuals of the later rows of the block.
import { WIDE, WIDE_SHIFT, loadWide, storeWide, move16 } from './tile';
import { GRID_BYTES, roundStrip, rowCodes, storeCodes, loadGrid } from './grid';
import { applyErrors } from './gptq';

/**
 * One block of rows [block, columns]; units are tiles of 32 columns. `residual` holds H·(W − Ŵ) of the rows; `values` (Ŵ)
 * and `codes` are moved, `changes` gets new − old values. `gram` is H's diagonal block [block, block]. Groups of `size`
 * rows tile the block, their grids in scales and zeros [block / size, columns]. A row without weight in H stays.
 */
export function descentBlock(
  begin: u32, end: u32, scratch: usize,
  residual: usize, values: usize, codes: usize, changes: usize, scales: usize, zeros: usize, gram: usize,
  block: u32, columns: u32, size: u32, levels: f32,
): void {
  const stride = <usize>columns << 2;
  const grids = scratch;
  const spare = scratch + 2 * GRID_BYTES;
  const tile = scratch + 1024;
  const now = tile + (<usize>block << WIDE_SHIFT);
  const moved = now + (<usize>block << WIDE_SHIFT);
  for (let unit = begin; unit < end; unit++) {
    const column = unit * WIDE;
    const width = min(columns - column, WIDE);
    const at = <usize>column << 2;
    loadWide(residual + at, stride, block, width, tile, 0, 0);
    loadWide(values + at, stride, block, width, now, 0, 0);
    for (let g: u32 = 0; g < block; g += size) {
      const rows = min(size, block - g);
      if (g) applyErrors(tile, moved, gram, block, g, g + rows, 0, g);
      for (let half: u32 = 0; half < 2; half++) {
        const first = column + half * 16;
        if (first >= columns) break;
        const slot = <usize>(g / size) * columns + first;
        loadGrid(grids + half * GRID_BYTES, min<u32>(columns - first, 16), scales + (slot << 2), zeros + slot);
      }
      for (let j = g; j < g + rows; j++) {
        if (j > g) applyErrors(tile, moved, gram, block, j, j + 1, g, j);
        const rest = tile + (<usize>j << WIDE_SHIFT);
        const row = now + (<usize>j << WIDE_SHIFT);
        const change = moved + (<usize>j << WIDE_SHIFT);
        move16(row, change);
        move16(row + 64, change + 64);
        const weight = load<f32>(gram + ((<usize>j * block + j) << 2));
        const step = f32x4.splat(weight > 0 ? 1 / weight : 0);
        for (let c: usize = 0; c < 128; c += 16) {
          v128.store(row + c, f32x4.add(v128.load(row + c), f32x4.mul(v128.load(rest + c), step)));
        }
        for (let half: u32 = 0; half < 2; half++) {
          const first = column + half * 16;
          if (first >= columns) break;
          const grid = grids + half * GRID_BYTES;
          storeCodes(rowCodes(row + half * 64, grid, levels), codes + <usize>j * columns + first, min<u32>(columns - first, 16), spare);
          roundStrip(row + half * 64, 128, 1, grid, levels);
        }
        for (let c: usize = 0; c < 128; c += 16) {
          v128.store(change + c, f32x4.sub(v128.load(row + c), v128.load(change + c)));
        }
      }
    }
    storeWide(now, 0, block, width, values + at, stride, 0);
    storeWide(moved, 0, block, width, changes + at, stride, 0);
  }
}
