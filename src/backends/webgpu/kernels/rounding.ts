// The inner loops of GPTQ and of coordinate descent: a block of at most 128 channels walked in order, the effect of each
// rounding spread over the later rows of the block. Columns are independent: a workgroup holds the block × 16 columns in
// workgroup memory, 16 threads per column share a column's updates, two barriers a channel. Rows after the block follow
// in one product per block, so the matrix is swept once per block and not once per channel.
// Bytes moved: the block's rows in and out, its diagonal block of the factor (cached).
import { defineKernel, read, write } from '../kernel.js';
import { GRID_ARITHMETIC } from './grid.js';

/** Most channels in a block. */
export const BLOCK = 128;
const COLUMNS = 16;
/** Columns per workgroup. */
export const BLOCK_COLUMNS = COLUMNS;

/** WGSL: rows of the block between memory and workgroup memory, 16 threads to a row. */
const rows = (body: string): string => /* wgsl */ `
  for (var r = lane; r < params.rows; r += 16u) {
    let at = (params.begin + r) * params.cols + col;
    ${body}
  }`;

/**
 * GPTQ's block: w becomes the rounded values, `errors` [rows, cols] each row's error ÷ U_jj. Grids are set from the
 * updated weights at the first row of each group within the block (`ownGrids`), or read where a group spans blocks.
 */
export const gptqBlockKernel = defineKernel({
  name: 'gptqBlock',
  buffers: {
    w: write('f32'),
    factor: read('f32'),
    clip: read('f32'),
    scales: write('f32'),
    zeros: write('f32'),
    errors: write('f32'),
  },
  params: {
    channels: 'u32',
    cols: 'u32',
    begin: 'u32',
    rows: 'u32',
    groupSize: 'u32',
    levels: 'f32',
    symmetric: 'u32',
    clipped: 'u32',
    ownGrids: 'u32',
  },
  body: /* wgsl */ `${GRID_ARITHMETIC}
var<workgroup> tile: array<f32, ${BLOCK * COLUMNS}>;
var<workgroup> lows: array<f32, 256>;
var<workgroup> highs: array<f32, 256>;
@compute @workgroup_size(256)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) local: u32) {
  let c = local % ${COLUMNS}u;
  let lane = local / ${COLUMNS}u;
  let col = group.x * ${COLUMNS}u + c;
  let inside = col < params.cols;
${rows(`var x = 0.0;
    if (inside) { x = w[at]; }
    tile[r * ${COLUMNS}u + c] = x;`)}
  workgroupBarrier();
  var grid = vec2<f32>(1.0, 0.0);
  for (var j = 0u; j < params.rows; j++) {
    let slot = (params.begin + j) / params.groupSize * params.cols + col;
    if (params.ownGrids == 0u) {
      if (j == 0u && inside) { grid = vec2<f32>(scales[slot], zeros[slot]); }
    } else if (j % params.groupSize == 0u) {
      var lo = 3.4028234663852886e38;
      var hi = -lo;
      for (var r = j + lane; r < j + params.groupSize; r += 16u) {
        lo = min(lo, tile[r * ${COLUMNS}u + c]);
        hi = max(hi, tile[r * ${COLUMNS}u + c]);
      }
      lows[local] = lo;
      highs[local] = hi;
      workgroupBarrier();
      for (var n = 0u; n < 16u; n++) {
        lo = min(lo, lows[n * ${COLUMNS}u + c]);
        hi = max(hi, highs[n * ${COLUMNS}u + c]);
      }
      if (params.clipped != 0u && inside) { lo *= clip[slot]; hi *= clip[slot]; }
      grid = gridFor(lo, hi, params.levels, params.symmetric);
      if (lane == 0u && inside) { scales[slot] = grid.x; zeros[slot] = grid.y; }
    }
    let row = (params.begin + j) * params.channels + params.begin;
    let x = tile[j * ${COLUMNS}u + c];
    let value = snap(x, grid, params.levels) * grid.x;
    let error = quotient(x - value, factor[row + j]);
    for (var r = j + 1u + lane; r < params.rows; r += 16u) {
      tile[r * ${COLUMNS}u + c] = fma(-factor[row + r], error, tile[r * ${COLUMNS}u + c]);
    }
    if (lane == j % 16u && inside) {
      w[(params.begin + j) * params.cols + col] = value;
      errors[j * params.cols + col] = error;
    }
    workgroupBarrier();
  }
}`,
});

/**
 * Coordinate descent's block: `residual` is H·(W − Ŵ), `values` Ŵ is moved to the grid values nearest the optima, and
 * `changes` [rows, cols] gets new − old. A row without weight in H stays.
 */
export const descentBlockKernel = defineKernel({
  name: 'descentBlock',
  buffers: {
    residual: read('f32'),
    gram: read('f32'),
    scales: read('f32'),
    zeros: read('f32'),
    values: write('f32'),
    changes: write('f32'),
  },
  params: { channels: 'u32', cols: 'u32', begin: 'u32', rows: 'u32', groupSize: 'u32', levels: 'f32' },
  body: /* wgsl */ `${GRID_ARITHMETIC}
var<workgroup> tile: array<f32, ${BLOCK * COLUMNS}>;
@compute @workgroup_size(256)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) local: u32) {
  let c = local % ${COLUMNS}u;
  let lane = local / ${COLUMNS}u;
  let col = group.x * ${COLUMNS}u + c;
  let inside = col < params.cols;
${rows(`var x = 0.0;
    if (inside) { x = residual[at]; }
    tile[r * ${COLUMNS}u + c] = x;`)}
  workgroupBarrier();
  for (var j = 0u; j < params.rows; j++) {
    let row = (params.begin + j) * params.channels + params.begin;
    let weight = gram[row + j];
    let at = (params.begin + j) * params.cols + col;
    var value = 0.0;
    var change = 0.0;
    if (inside) {
      let slot = (params.begin + j) / params.groupSize * params.cols + col;
      let grid = vec2<f32>(scales[slot], zeros[slot]);
      let old = values[at];
      value = old;
      if (weight > 0.0) {
        value = snap(old + quotient(tile[j * ${COLUMNS}u + c], weight), grid, params.levels) * grid.x;
      }
      change = value - old;
    }
    for (var r = j + 1u + lane; r < params.rows; r += 16u) {
      tile[r * ${COLUMNS}u + c] = fma(-gram[row + r], change, tile[r * ${COLUMNS}u + c]);
    }
    workgroupBarrier();
    if (lane == j % 16u && inside) {
      values[at] = value;
      changes[j * params.cols + col] = change;
    }
  }
}`,
});
