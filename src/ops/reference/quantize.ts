// Grids, rounding to nearest, GPTQ and the transform objective in float64, on channel-major weights [in, cols].
import type { GridSpec, PairwiseTransform, TransformGradient } from '../backend.js';
import { roundToF16 } from '../../core/dtype.js';
import { ensure } from '../../core/errors.js';
import { checkRotations, pairAt, rotateOnce, transformVector, type Rotations } from './rotation.js';
import { expectSize } from './tensor.js';

/** The smallest scale of a grid: the smallest normal f16, below which f16 loses precision and 0 would divide by zero. */
export const MIN_SCALE = 2 ** -14;
/** The largest finite f16. */
const MAX_SCALE = 65504;

/** Nearest integer, ties to even: what f32 rounding instructions and PyTorch do. */
export function roundHalfEven(x: number): number {
  const floor = Math.floor(x);
  const rest = x - floor;
  if (rest !== 0.5) return rest < 0.5 ? floor : floor + 1;
  return floor % 2 === 0 ? floor : floor + 1;
}

const clamp = (x: number, lo: number, hi: number): number => Math.min(Math.max(x, lo), hi);

/** One group's grid. */
export interface Grid {
  readonly scale: number;
  readonly zero: number;
}

/** (max − min) / (2ᵇ − 1) as an f16: the scale of a group, unless it is below {@link MIN_SCALE}. */
function rangeScale(min: number, max: number, bits: number): number {
  return Math.min(roundToF16((max - min) / (2 ** bits - 1)), MAX_SCALE);
}

/**
 * The grid that covers [min, max] (design §4.2), with the scale rounded to f16 before anything uses it. A (nearly)
 * constant group has no usable range: its scale becomes max|w| / (2ᵇ − 1), so that the clamped zero point still
 * reproduces the constant, and never less than {@link MIN_SCALE}.
 */
export function gridOf(min: number, max: number, bits: number): Grid {
  const top = 2 ** bits - 1;
  const peak = Math.max(Math.abs(min), Math.abs(max));
  let scale = rangeScale(min, max, bits);
  if (scale < MIN_SCALE) scale = Math.max(rangeScale(0, peak, bits), MIN_SCALE);
  return { scale, zero: clamp(roundHalfEven(-min / scale), 0, top) };
}

/** The grid symmetric about 0 that covers ±peak: levels −(2ᵇ⁻¹ − 1) … 2ᵇ⁻¹ − 1, and one below. */
export function symmetricGridOf(peak: number, bits: number): Grid {
  const scale = Math.min(roundToF16(peak / (2 ** (bits - 1) - 1)), MAX_SCALE);
  return { scale: Math.max(scale, MIN_SCALE), zero: 2 ** (bits - 1) };
}

/** The code of a value. */
export function encode(value: number, { scale, zero }: Grid, bits: number): number {
  return clamp(roundHalfEven(value / scale) + zero, 0, 2 ** bits - 1);
}

/** Rounding of a whole weight; `codes` [in, cols], `zeros` and `scales` [in / groupSize, cols], `values` [in, cols]. */
export interface Rounding {
  readonly codes: Uint8Array;
  readonly zeros: Uint8Array;
  readonly scales: Float32Array;
  readonly values: Float64Array;
}

function emptyRounding(channels: number, cols: number, grid: GridSpec): Rounding {
  ensure(
    channels % grid.groupSize === 0,
    'tensor-shape',
    () => `group size ${grid.groupSize} does not divide ${channels} channels`,
  );
  const groups = channels / grid.groupSize;
  return {
    codes: new Uint8Array(channels * cols),
    zeros: new Uint8Array(groups * cols),
    scales: new Float32Array(groups * cols),
    values: new Float64Array(channels * cols),
  };
}

/** Grid of group `group` of column `c` from the present values of w; `clip` multiplies both ends of the range. */
function groupGrid(
  w: Float64Array,
  cols: number,
  group: number,
  c: number,
  { bits, groupSize, symmetric }: GridSpec,
  clip: Float32Array | undefined,
): Grid {
  let min = Infinity;
  let max = -Infinity;
  for (let i = group * groupSize; i < (group + 1) * groupSize; i++) {
    min = Math.min(min, w[i * cols + c]);
    max = Math.max(max, w[i * cols + c]);
  }
  const factor = clip ? clip[group * cols + c] : 1;
  if (symmetric) return symmetricGridOf(Math.max(Math.abs(min), Math.abs(max)) * factor, bits);
  return gridOf(min * factor, max * factor, bits);
}

/** Rounds element (i, c) of value `value` and stores code and value. */
function store(
  out: Rounding,
  i: number,
  c: number,
  cols: number,
  { bits, groupSize }: GridSpec,
  value: number,
): number {
  const group = Math.floor(i / groupSize) * cols + c;
  const grid = { scale: out.scales[group], zero: out.zeros[group] };
  const code = encode(value, grid, bits);
  out.codes[i * cols + c] = code;
  out.values[i * cols + c] = (code - grid.zero) * grid.scale;
  return out.values[i * cols + c];
}

/** Rounding to nearest on min–max grids. w [in, cols], clip [in / groupSize, cols]. */
export function roundToNearest(
  w: Float64Array,
  channels: number,
  cols: number,
  grid: GridSpec,
  clip: Float32Array | undefined,
): Rounding {
  const out = emptyRounding(channels, cols, grid);
  if (clip) expectSize(clip.length, out.scales.length, 'clip factors');
  for (let c = 0; c < cols; c++) {
    for (let group = 0; group < channels / grid.groupSize; group++) {
      const { scale, zero } = groupGrid(w, cols, group, c, grid, clip);
      out.scales[group * cols + c] = scale;
      out.zeros[group * cols + c] = zero;
    }
    for (let i = 0; i < channels; i++) store(out, i, c, cols, grid, w[i * cols + c]);
  }
  return out;
}

/** Errors (w − ŵ)ᵀ·H_gg·(w − ŵ) of each group and column, [channels / groupSize, cols], on ranges shrunk by `clip`. */
export function groupErrors(
  w: Float64Array,
  h: Float64Array,
  channels: number,
  cols: number,
  grid: GridSpec,
  clip: Float32Array,
): Float64Array {
  const { values } = roundToNearest(w, channels, cols, grid, clip);
  const d = values.map((value, at) => value - w[at]);
  return Float64Array.from(clip, (_, slot) => {
    const c = slot % cols;
    const first = Math.floor(slot / cols) * grid.groupSize;
    let sum = 0;
    for (let i = first; i < first + grid.groupSize; i++)
      for (let j = first; j < first + grid.groupSize; j++)
        sum += d[i * cols + c] * h[i * channels + j] * d[j * cols + c];
    return sum;
  });
}

/** The ratio of least error for each group and column; see QuantizationOps.searchClip. */
export function searchClip(
  w: Float64Array,
  h: Float64Array,
  channels: number,
  cols: number,
  grid: GridSpec,
  ratios: readonly number[],
): Float32Array {
  const slots = (channels / grid.groupSize) * cols;
  const best = new Float32Array(slots).fill(1);
  const least = new Float64Array(slots).fill(Infinity);
  for (const ratio of ratios) {
    const errors = groupErrors(w, h, channels, cols, grid, new Float32Array(slots).fill(ratio));
    for (let slot = 0; slot < slots; slot++) {
      if (!(errors[slot] < least[slot])) continue;
      least[slot] = errors[slot];
      best[slot] = ratio;
    }
  }
  return best;
}

/**
 * GPTQ (Frantar et al. 2022), one channel after the other: round channel i, then move its error
 * `e = (w_i − q_i) / U_ii` into the channels after it, `w_j ← w_j − U_ij · e`. w [in, cols], u [in, in] upper.
 */
export function gptq(
  w: Float64Array,
  u: Float64Array,
  channels: number,
  cols: number,
  grid: GridSpec,
  clip: Float32Array | undefined,
): Rounding {
  const out = emptyRounding(channels, cols, grid);
  if (clip) expectSize(clip.length, out.scales.length, 'clip factors');
  const rest = w.slice();
  for (let i = 0; i < channels; i++) {
    for (let c = 0; c < cols; c++) {
      if (i % grid.groupSize === 0) {
        const group = i / grid.groupSize;
        const { scale, zero } = groupGrid(rest, cols, group, c, grid, clip);
        out.scales[group * cols + c] = scale;
        out.zeros[group * cols + c] = zero;
      }
      const value = rest[i * cols + c];
      const error = (value - store(out, i, c, cols, grid, value)) / u[i * channels + i];
      for (let j = i + 1; j < channels; j++) rest[j * cols + c] -= u[i * channels + j] * error;
    }
  }
  return out;
}

/**
 * Coordinate descent on the layer error, one channel after the other: with R = H·(W − Ŵ), channel i's optimum given the
 * others is ŵ_i + R_i / H_ii; it moves to the grid value nearest to that. w [in, cols], h [in, in].
 */
export function descend(
  w: Float64Array,
  start: { codes: Uint8Array; zeros: Uint8Array; scales: Float32Array },
  h: Float64Array,
  channels: number,
  cols: number,
  grid: GridSpec,
  sweeps: number,
): Rounding {
  const { zeros, scales } = start;
  const out: Rounding = { codes: start.codes.slice(), zeros, scales, values: new Float64Array(channels * cols) };
  for (let c = 0; c < cols; c++) {
    const gridOfChannel = (i: number): Grid => {
      const slot = Math.floor(i / grid.groupSize) * cols + c;
      return { scale: scales[slot], zero: zeros[slot] };
    };
    for (let i = 0; i < channels; i++) {
      const { scale, zero } = gridOfChannel(i);
      out.values[i * cols + c] = (out.codes[i * cols + c] - zero) * scale;
    }
    for (let sweep = 0; sweep < sweeps; sweep++) {
      for (let i = 0; i < channels; i++) {
        if (!(h[i * channels + i] > 0)) continue;
        let residual = 0;
        for (let j = 0; j < channels; j++)
          residual += h[i * channels + j] * (w[j * cols + c] - out.values[j * cols + c]);
        const { scale, zero } = gridOfChannel(i);
        const optimum = out.values[i * cols + c] + residual / h[i * channels + i];
        const code = encode(optimum, { scale, zero }, grid.bits);
        out.codes[i * cols + c] = code;
        out.values[i * cols + c] = (code - zero) * scale;
      }
    }
  }
  return out;
}

/** What forward keeps for backward, one matrix [in, cols] per stage. */
interface ForwardState {
  readonly t: Rotations;
  readonly scales: Float64Array;
  /** stages[k] enters rotation k: stages[0] = s ⊙ W, stages[krot] = Y = T(W). */
  readonly stages: readonly Float64Array[];
  /** back[k] is Q after the inverses of rotations krot−1 … k: back[krot] = Q, back[0] = s ⊙ Ŵ. */
  readonly back: readonly Float64Array[];
  readonly rounding: Rounding;
}

/** One rotation of every column of a matrix [channels, cols], into a new one. */
function rotateColumns(x: Float64Array, cols: number, t: Rotations, k: number, sign: 1 | -1): Float64Array {
  const y = x.slice();
  for (let c = 0; c < cols; c++) rotateOnce(y, c, cols, t, k, sign);
  return y;
}

/** Σ over columns of g_i·y_j − g_j·y_i for every pair of rotation k: the gradient of its angles (design §4.1). */
function angleGradient(g: Float64Array, y: Float64Array, cols: number, t: Rotations, k: number): Float64Array {
  return Float64Array.from({ length: t.channels / 2 }, (_, p) => {
    const [i, j] = pairAt(t, k, p);
    let sum = 0;
    for (let c = 0; c < cols; c++) sum += g[i * cols + c] * y[j * cols + c] - g[j * cols + c] * y[i * cols + c];
    return sum;
  });
}

/** Ŵ = T⁻¹(Q(T(W))) and its straight-through gradient. W [channels, cols]. */
export class ReferenceObjective {
  #state: ForwardState | undefined;

  constructor(
    private readonly w: Float64Array,
    private readonly cols: number,
    private readonly shape: Pick<PairwiseTransform, 'channels' | 'groupSize' | 'krot' | 'pairs'>,
    private readonly grid: GridSpec,
  ) {
    expectSize(w.length, shape.channels * cols, 'weight of a transform objective');
    ensure(!grid.symmetric, 'unsupported', 'a transform objective has an asymmetric grid');
  }

  /** Ŵ [channels, cols]. theta [krot, channels / 2], scales [channels] (s). */
  forward(theta: Float32Array, scales: Float32Array): Float64Array {
    const { channels, krot } = this.shape;
    const { cols } = this;
    const t: Rotations = { ...this.shape, theta: theta.slice() };
    checkRotations(t);
    expectSize(scales.length, channels, 'scales of a transform objective');
    const stages: Float64Array[] = [this.w.map((value, at) => value * scales[Math.floor(at / cols)])];
    for (let k = 0; k < krot; k++) stages.push(rotateColumns(stages[k], cols, t, k, 1));
    const rounding = roundToNearest(stages[krot], channels, cols, this.grid, undefined);
    const back: Float64Array[] = [];
    back[krot] = rounding.values;
    for (let k = krot - 1; k >= 0; k--) back[k] = rotateColumns(back[k + 1], cols, t, k, -1);
    this.#state = { t, scales: Float64Array.from(scales), stages, back, rounding };
    return back[0].map((value, at) => value / scales[Math.floor(at / cols)]);
  }

  /** Gradients at the last forward point, given ∂L/∂Ŵ [channels, cols]. */
  backward(gradient: Float64Array): TransformGradient {
    const state = this.#state;
    ensure(state, 'usage', 'backward() of a transform objective needs a forward() before it');
    const { t, scales, stages, back, rounding } = state;
    const { channels, krot } = t;
    const { cols } = this;
    expectSize(gradient.length, channels * cols, 'gradient of a transform objective');
    const theta = new Float64Array((krot * channels) / 2);
    const scaleGradient = new Float64Array(channels);

    // Ŵ = back[0] / s.
    let g: Float64Array = gradient.map((value, at) => value / scales[Math.floor(at / cols)]);
    for (let at = 0; at < g.length; at++) {
      const channel = Math.floor(at / cols);
      scaleGradient[channel] -= (g[at] * back[0][at]) / scales[channel];
    }
    // back[k] is back[k+1] rotated by −θ_k: the angle enters with a minus, and its own inverse is +θ_k.
    for (let k = 0; k < krot; k++) {
      const angles = angleGradient(g, back[k], cols, t, k);
      for (let p = 0; p < channels / 2; p++) theta[(k * channels) / 2 + p] -= angles[p];
      g = rotateColumns(g, cols, t, k, 1);
    }
    g = quantizerGradient(g, stages[krot], channels, cols, this.grid, rounding);
    for (let k = krot - 1; k >= 0; k--) {
      const angles = angleGradient(g, stages[k + 1], cols, t, k);
      for (let p = 0; p < channels / 2; p++) theta[(k * channels) / 2 + p] += angles[p];
      g = rotateColumns(g, cols, t, k, -1);
    }
    // stages[0] = s ⊙ W.
    for (let at = 0; at < g.length; at++) scaleGradient[Math.floor(at / cols)] += g[at] * this.w[at];
    return { theta, scales: scaleGradient };
  }
}

/**
 * ∂L/∂Y from ∂L/∂Q, straight through round, clamp and the f16 rounding of the scale. With value = (code − zero)·scale
 * and code − zero = y/scale + (something that counts as constant): ∂value/∂y = 1 at fixed scale, ∂value/∂scale =
 * (code − zero) − y/scale, and the scale (max − min)/(2ᵇ − 1) hands its gradient to the first largest and the first
 * smallest element of the group. A group without a usable range has no scale to learn.
 */
export function quantizerGradient(
  g: Float64Array,
  y: Float64Array,
  channels: number,
  cols: number,
  { bits, groupSize }: GridSpec,
  rounding: Pick<Rounding, 'codes' | 'zeros' | 'scales'>,
): Float64Array {
  const out = g.slice();
  for (let group = 0; group < channels / groupSize; group++) {
    for (let c = 0; c < cols; c++) {
      const scale = rounding.scales[group * cols + c];
      const zero = rounding.zeros[group * cols + c];
      const first = group * groupSize;
      let argmin = first;
      let argmax = first;
      let scaleGradient = 0;
      for (let i = first; i < first + groupSize; i++) {
        const at = i * cols + c;
        if (y[at] < y[argmin * cols + c]) argmin = i;
        if (y[at] > y[argmax * cols + c]) argmax = i;
        scaleGradient += g[at] * (rounding.codes[at] - zero - y[at] / scale);
      }
      if (rangeScale(y[argmin * cols + c], y[argmax * cols + c], bits) < MIN_SCALE) continue;
      out[argmax * cols + c] += scaleGradient / (2 ** bits - 1);
      out[argmin * cols + c] -= scaleGradient / (2 ** bits - 1);
    }
  }
  return out;
}

/** The transform, or its inverse, on the channels of w [channels, cols], into a new matrix. */
export function transformChannels(
  w: Float64Array,
  cols: number,
  t: Rotations,
  scales: ArrayLike<number>,
  direction: 'forward' | 'inverse',
): Float64Array {
  const y = w.slice();
  for (let c = 0; c < cols; c++) transformVector(y, c, cols, t, scales, direction);
  return y;
}
