// Dynamic grids of activations, keys and values in float64.
import type { ActivationGrid, KvGrid } from '../backend.js';
import { ensure } from '../../core/errors.js';
import { roundHalfEven } from './quantize.js';

const clamp = (x: number, lo: number, hi: number): number => Math.min(Math.max(x, lo), hi);

/** Throws unless rows of n channels can be rounded onto the grid. Returns the channels of one grid. */
export function checkActivationGrid({ bits, groupSize, clip }: ActivationGrid, n: number): number {
  ensure(bits === 4 || bits === 8, 'usage', () => `activations have 4 or 8 bits, found ${String(bits)}`);
  ensure(
    clip > 0 && clip <= 1,
    'usage',
    () => `the clip ratio of activations must be above 0 and at most 1, found ${clip}`,
  );
  const size = groupSize === -1 ? n : groupSize;
  ensure(
    Number.isInteger(size) && size > 0 && n % size === 0,
    'tensor-shape',
    () => `activation groups of ${groupSize} do not tile ${n} channels`,
  );
  return size;
}

/** The grid of keys and values of heads of headDim channels. */
export function kvActivationGrid({ bits, clip }: KvGrid, headDim: number): ActivationGrid {
  return { bits, clip, symmetric: false, groupSize: headDim };
}

/** x [rows, n] rounded onto the grid; see {@link ActivationGrid} for the formulas. */
export function quantizeRows(x: Float64Array, n: number, grid: ActivationGrid): Float64Array {
  const size = checkActivationGrid(grid, n);
  const y = new Float64Array(x.length);
  for (let begin = 0; begin < x.length; begin += size) {
    const group = x.subarray(begin, begin + size);
    y.set(grid.symmetric ? symmetric(group, grid) : asymmetric(group, grid), begin);
  }
  return y;
}

function symmetric(x: Float64Array, { bits, clip }: ActivationGrid): Float64Array {
  const top = 2 ** (bits - 1) - 1;
  const scale = (clip * x.reduce((m, v) => Math.max(m, Math.abs(v)), 0)) / top;
  return x.map((v) => (scale === 0 ? 0 : clamp(roundHalfEven(v / scale), -top - 1, top) * scale));
}

function asymmetric(x: Float64Array, { bits, clip }: ActivationGrid): Float64Array {
  const top = 2 ** bits - 1;
  const min = x.reduce((m, v) => Math.min(m, v), Infinity);
  const max = x.reduce((m, v) => Math.max(m, v), -Infinity);
  const half = (clip * (max - min)) / 2;
  const low = (max + min) / 2 - half;
  const scale = (2 * half) / top;
  return x.map((v) => (scale === 0 ? low : low + clamp(roundHalfEven((v - low) / scale), 0, top) * scale));
}
