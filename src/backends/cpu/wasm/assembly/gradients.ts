// Gradients of the forward pass's small kernels, losses, fake quantization with free grids, and AdamW. Sums over rows
// (norm weights, losses) are f64 per chunk of a fixed number of rows, reduced in chunk order, so that results do not
// depend on the number of threads.
import { exp4, sumLanes } from './math';

/** Rows whose contributions to a weight's gradient are summed together. */
export const ROW_CHUNK: u32 = 64;

/** Σ x² and Σ w·g·x of n floats, in f64 pairs at `out`. */
function normSums(x: usize, g: usize, weight: usize, n: u32, out: usize): void {
  let s = f32x4.splat(0), t = f32x4.splat(0);
  let i: u32 = 0;
  for (; i + 4 <= n; i += 4) {
    const at = <usize>i << 2;
    const v = v128.load(x + at);
    s = f32x4.add(s, f32x4.mul(v, v));
    t = f32x4.add(t, f32x4.mul(f32x4.mul(v128.load(weight + at), v128.load(g + at)), v));
  }
  let squares = <f64>sumLanes(s), projection = <f64>sumLanes(t);
  for (; i < n; i++) {
    const at = <usize>i << 2;
    const v = load<f32>(x + at);
    squares += <f64>(v * v);
    projection += <f64>(load<f32>(weight + at) * load<f32>(g + at) * v);
  }
  store<f64>(out, squares);
  store<f64>(out, projection, 8);
}

/** One row of RMSNorm's gradient: dx (may be g), and g·x/norm added to `sums` (f64 per channel). */
function normRow(x: usize, g: usize, dx: usize, weight: usize, n: u32, eps: f32, sums: usize, scratch: usize): void {
  normSums(x, g, weight, n, scratch);
  const inverse = 1 / sqrt<f64>(load<f64>(scratch) / <f64>n + <f64>eps);
  const r = <f32>inverse;
  const pull = <f32>(load<f64>(scratch, 8) * inverse * inverse * inverse / <f64>n);
  const r4 = f32x4.splat(r), pull4 = f32x4.splat(pull);
  let i: u32 = 0;
  for (; i + 4 <= n; i += 4) {
    const at = <usize>i << 2;
    const v = v128.load(x + at), d = v128.load(g + at);
    const t = f32x4.mul(f32x4.mul(d, v), r4);
    const to = sums + (<usize>i << 3);
    v128.store(to, f64x2.add(v128.load(to), f64x2.promote_low_f32x4(t)));
    const high = i8x16.shuffle(t, t, 8, 9, 10, 11, 12, 13, 14, 15, 8, 9, 10, 11, 12, 13, 14, 15);
    v128.store(to, f64x2.add(v128.load(to, 16), f64x2.promote_low_f32x4(high)), 16);
    v128.store(dx + at, f32x4.sub(f32x4.mul(f32x4.mul(v128.load(weight + at), d), r4), f32x4.mul(v, pull4)));
  }
  for (; i < n; i++) {
    const at = <usize>i << 2;
    const v = load<f32>(x + at), d = load<f32>(g + at);
    const to = sums + (<usize>i << 3);
    store<f64>(to, load<f64>(to) + <f64>(d * v * r));
    store<f32>(dx + at, load<f32>(weight + at) * d * r - v * pull);
  }
}

/** x, g, dx [rows, n]; units are chunks of ROW_CHUNK rows; partial: f64 [chunks, n]. */
export function rmsNormGradient(
  begin: u32, end: u32, scratch: usize, x: usize, g: usize, dx: usize, rows: u32, n: u32, weight: usize, eps: f32, partial: usize,
): void {
  const step = <usize>n << 2;
  for (let chunk = begin; chunk < end; chunk++) {
    const sums = partial + (<usize>chunk * n << 3);
    memory.fill(sums, 0, <usize>n << 3);
    const stop = min(rows, (chunk + 1) * ROW_CHUNK);
    for (let r = chunk * ROW_CHUNK; r < stop; r++) normRow(x + r * step, g + r * step, dx + r * step, weight, n, eps, sums, scratch);
  }
}

/** gateUp, out [rows, 2n], g [rows, n]; units are rows. */
export function siluMulGradient(begin: u32, end: u32, scratch: usize, gateUp: usize, g: usize, out: usize, n: u32): void {
  const one = f32x4.splat(1);
  const bytes = <usize>n << 2;
  for (let r = begin; r < end; r++) {
    const gate = gateUp + ((<usize>r * n) << 3);
    const to = out + ((<usize>r * n) << 3);
    const dy = g + ((<usize>r * n) << 2);
    let i: u32 = 0;
    for (; i < n; i += 4) {
      const at = <usize>i << 2;
      if (i + 4 <= n) {
        const z = v128.load(gate + at), up = v128.load(gate + bytes + at), d = v128.load(dy + at);
        const s = f32x4.div(one, f32x4.add(one, exp4(f32x4.neg(z))));
        const slope = f32x4.mul(s, f32x4.add(one, f32x4.mul(z, f32x4.sub(one, s))));
        v128.store(to + at, f32x4.mul(f32x4.mul(d, up), slope));
        v128.store(to + bytes + at, f32x4.mul(d, f32x4.mul(z, s)));
      } else {
        for (let c = i; c < n; c++) {
          const a = <usize>c << 2;
          const z = load<f32>(gate + a), up = load<f32>(gate + bytes + a), d = load<f32>(dy + a);
          const s: f32 = <f32>1 / (<f32>1 + f32x4.extract_lane(exp4(f32x4.splat(-z)), 0));
          store<f32>(to + a, d * up * s * (<f32>1 + z * (<f32>1 - s)));
          store<f32>(to + bytes + a, d * z * s);
        }
      }
    }
  }
}

/** Half-split RoPE by minus the angle, out of place. */
function unrotateHead(from: usize, to: usize, d: u32, half: u32, cos: usize, sin: usize): void {
  memory.copy(to, from, <usize>d << 2);
  const upper = to + (<usize>half << 2);
  for (let i: u32 = 0; i < half; i++) {
    const at = <usize>i << 2;
    const c = load<f32>(cos + at), s = load<f32>(sin + at);
    const a = load<f32>(to + at), b = load<f32>(upper + at);
    store<f32>(to + at, a * c + b * s);
    store<f32>(upper + at, b * c - a * s);
  }
}

/**
 * Gradient of splitHeads: dq, dk, dv → dqkv [rows, (heads + 2·kvHeads)·d]; units are chunks of ROW_CHUNK rows; partial:
 * f64 [chunks, 2·d], the per-head norms of q then k. Norm weights may be null.
 */
export function splitHeadsGradient(
  begin: u32, end: u32, scratch: usize,
  qkv: usize, dq: usize, dk: usize, dv: usize, out: usize, rows: u32, heads: u32, kvHeads: u32, d: u32, qNorm: usize, kNorm: usize,
  eps: f32, cos: usize, sin: usize, rotary: u32, start: u32, tokens: u32, partial: usize,
): void {
  const bytes = <usize>d << 2;
  const all = heads + 2 * kvHeads;
  const half = rotary >> 1;
  for (let chunk = begin; chunk < end; chunk++) {
    const sums = partial + (<usize>chunk * d << 4);
    memory.fill(sums, 0, <usize>d << 4);
    const stop = min(rows, (chunk + 1) * ROW_CHUNK);
    for (let row = chunk * ROW_CHUNK; row < stop; row++) {
      const from = qkv + row * all * bytes;
      const to = out + row * all * bytes;
      const table = <usize>((start + row % tokens) * half) << 2;
      for (let h: u32 = 0; h < heads + kvHeads; h++) {
        const isQ = h < heads;
        const g = isQ ? dq + (row * heads + h) * bytes : dk + (row * kvHeads + h - heads) * bytes;
        const at = to + h * bytes;
        unrotateHead(g, at, d, half, cos + table, sin + table);
        const norm = isQ ? qNorm : kNorm;
        if (norm) normRow(from + h * bytes, at, at, norm, d, eps, isQ ? sums : sums + (<usize>d << 3), scratch);
      }
      memory.copy(to + (heads + kvHeads) * bytes, dv + row * kvHeads * bytes, kvHeads * bytes);
    }
  }
}

/** Per channel of h, x [channels, columns]: sums[channel] = Σ h·x (f64), then h × scale; units are channels. */
export function scaleAndDot(begin: u32, end: u32, scratch: usize, h: usize, x: usize, columns: u32, scales: usize, sums: usize): void {
  for (let i = begin; i < end; i++) {
    const row = h + ((<usize>i * columns) << 2);
    const other = x + ((<usize>i * columns) << 2);
    const scale = load<f32>(scales + (<usize>i << 2));
    let sum: f64 = 0;
    for (let c: u32 = 0; c < columns; c++) {
      const at = <usize>c << 2;
      const v = load<f32>(row + at);
      sum += <f64>v * <f64>load<f32>(other + at);
      store<f32>(row + at, v * scale);
    }
    store<f64>(sums + (<usize>i << 3), sum);
  }
}

/** Columns of a fake-quantization unit. */
export const GRID_COLUMNS: u32 = 64;

// @ts-ignore: decorator
@inline
function clamp4(x: v128, low: v128, high: v128): v128 {
  return f32x4.pmin(f32x4.pmax(x, low), high);
}

/**
 * Fake quantization on free grids: w, out [channels, columns], scales and zeros [channels / size, columns], all padded to
 * a stride of a multiple of 4 columns; units are (group, GRID_COLUMNS columns). With a gradient g: dw to `out`, and the
 * gradients of scales and zeros.
 */
export function gridForward(
  begin: u32, end: u32, scratch: usize, w: usize, scales: usize, zeros: usize, out: usize, columns: u32, size: u32, levels: f32,
): void {
  const tiles = (columns + GRID_COLUMNS - 1) / GRID_COLUMNS;
  const top = f32x4.splat(levels), none = f32x4.splat(0);
  for (let unit = begin; unit < end; unit++) {
    const group = unit / tiles;
    const first = (unit - group * tiles) * GRID_COLUMNS;
    const stop = min(columns, first + GRID_COLUMNS);
    for (let c = first; c < stop; c += 4) {
      const slot = <usize>(group * columns + c) << 2;
      const s = v128.load(scales + slot);
      const z = clamp4(f32x4.nearest(v128.load(zeros + slot)), none, top);
      const low = f32x4.neg(z), high = f32x4.sub(top, z);
      let at = <usize>(group * size * columns + c) << 2;
      for (let r: u32 = 0; r < size; r++, at += <usize>columns << 2) {
        v128.store(out + at, f32x4.mul(clamp4(f32x4.nearest(f32x4.div(v128.load(w + at), s)), low, high), s));
      }
    }
  }
}

export function gridGradient(
  begin: u32, end: u32, scratch: usize,
  w: usize, scales: usize, zeros: usize, g: usize, out: usize, dScales: usize, dZeros: usize, columns: u32, size: u32, levels: f32,
): void {
  const tiles = (columns + GRID_COLUMNS - 1) / GRID_COLUMNS;
  const top = f32x4.splat(levels), none = f32x4.splat(0);
  for (let unit = begin; unit < end; unit++) {
    const group = unit / tiles;
    const first = (unit - group * tiles) * GRID_COLUMNS;
    const stop = min(columns, first + GRID_COLUMNS);
    for (let c = first; c < stop; c += 4) {
      const slot = <usize>(group * columns + c) << 2;
      const s = v128.load(scales + slot);
      const z = clamp4(f32x4.nearest(v128.load(zeros + slot)), none, top);
      const low = f32x4.neg(z), high = f32x4.sub(top, z);
      let sumScale = none, sumZero = none;
      let at = <usize>(group * size * columns + c) << 2;
      for (let r: u32 = 0; r < size; r++, at += <usize>columns << 2) {
        const x = f32x4.div(v128.load(w + at), s);
        const n = f32x4.nearest(x);
        const q = clamp4(n, low, high);
        const inside = f32x4.eq(n, q);
        const d = v128.load(g + at);
        v128.store(out + at, v128.and(d, inside));
        sumScale = f32x4.add(sumScale, f32x4.mul(d, f32x4.sub(q, v128.and(x, inside))));
        sumZero = f32x4.sub(sumZero, v128.andnot(f32x4.mul(d, s), inside));
      }
      v128.store(dScales + slot, sumScale);
      v128.store(dZeros + slot, sumZero);
    }
  }
}

/**
 * Rows of x [channels, columns] times their group's scales (columns padded to 4); with `g` instead: sums[group] = Σ g·x.
 * Units are (group, GRID_COLUMNS columns).
 */
export function scaleGroups(
  begin: u32, end: u32, scratch: usize, x: usize, scales: usize, out: usize, columns: u32, size: u32,
): void {
  const tiles = (columns + GRID_COLUMNS - 1) / GRID_COLUMNS;
  for (let unit = begin; unit < end; unit++) {
    const group = unit / tiles;
    const first = (unit - group * tiles) * GRID_COLUMNS;
    const stop = min(columns, first + GRID_COLUMNS);
    for (let c = first; c < stop; c += 4) {
      const s = v128.load(scales + (<usize>(group * columns + c) << 2));
      let at = <usize>(group * size * columns + c) << 2;
      for (let r: u32 = 0; r < size; r++, at += <usize>columns << 2) v128.store(out + at, f32x4.mul(v128.load(x + at), s));
    }
  }
}

export function sumGroups(
  begin: u32, end: u32, scratch: usize, x: usize, g: usize, sums: usize, columns: u32, size: u32,
): void {
  const tiles = (columns + GRID_COLUMNS - 1) / GRID_COLUMNS;
  for (let unit = begin; unit < end; unit++) {
    const group = unit / tiles;
    const first = (unit - group * tiles) * GRID_COLUMNS;
    const stop = min(columns, first + GRID_COLUMNS);
    for (let c = first; c < stop; c += 4) {
      let sum = f32x4.splat(0);
      let at = <usize>(group * size * columns + c) << 2;
      for (let r: u32 = 0; r < size; r++, at += <usize>columns << 2) {
        sum = f32x4.add(sum, f32x4.mul(v128.load(x + at), v128.load(g + at)));
      }
      v128.store(sums + (<usize>(group * columns + c) << 2), sum);
    }
  }
}

/** Elements per partial sum of a loss. */
export const LOSS_CHUNK: u32 = 4096;

/**
 * Losses over elements: gradient = slope·factor, partial[chunk] = Σ values (f64). beta 0 means squares. Units are chunks.
 */
export function elementLoss(
  begin: u32, end: u32, scratch: usize, p: usize, t: usize, gradient: usize, count: u32, beta: f32, factor: f32, partial: usize,
): void {
  for (let chunk = begin; chunk < end; chunk++) {
    const stop = min(count, (chunk + 1) * LOSS_CHUNK);
    let sum: f64 = 0;
    for (let i = chunk * LOSS_CHUNK; i < stop; i++) {
      const at = <usize>i << 2;
      const d = load<f32>(p + at) - load<f32>(t + at);
      let value: f32 = 0, slope: f32 = 0;
      const size = abs<f32>(d);
      if (beta == 0) {
        value = d * d;
        slope = 2 * d;
      } else if (size < beta) {
        value = d * d / (2 * beta);
        slope = d / beta;
      } else {
        value = size - beta / 2;
        slope = d > 0 ? 1 : -1;
      }
      sum += <f64>value;
      store<f32>(gradient + at, slope * factor);
    }
    store<f64>(partial + (<usize>chunk << 3), sum);
  }
}

/**
 * (softmax(logits) − softmax(reference))·factor per row, from the sums of scoreRows (eight f64 a row); without a reference
 * softmax(logits)·factor. Units are rows.
 */
export function logitGradient(
  begin: u32, end: u32, scratch: usize, logits: usize, reference: usize, sums: usize, out: usize, n: u32, factor: f32,
): void {
  for (let r = begin; r < end; r++) {
    const row = (<usize>r * n) << 2;
    const row8 = sums + (<usize>r << 6);
    const top = f32x4.splat(<f32>load<f64>(row8));
    const share = f32x4.splat(<f32>(<f64>factor / load<f64>(row8, 8)));
    const topR = f32x4.splat(reference ? <f32>load<f64>(row8, 24) : 0);
    const shareR = f32x4.splat(reference ? <f32>(<f64>factor / load<f64>(row8, 32)) : 0);
    let i: u32 = 0;
    for (; i + 4 <= n; i += 4) {
      const at = row + (<usize>i << 2);
      let d = f32x4.mul(exp4(f32x4.sub(v128.load(logits + at), top)), share);
      if (reference) d = f32x4.sub(d, f32x4.mul(exp4(f32x4.sub(v128.load(reference + at), topR)), shareR));
      v128.store(out + at, d);
    }
    for (; i < n; i++) {
      const at = row + (<usize>i << 2);
      let d = f32x4.mul(exp4(f32x4.sub(v128.load32_splat(logits + at), top)), share);
      if (reference) d = f32x4.sub(d, f32x4.mul(exp4(f32x4.sub(v128.load32_splat(reference + at), topR)), shareR));
      store<f32>(out + at, f32x4.extract_lane(d, 0));
    }
  }
}

/** AdamW on elements [begin, end) of four arrays; correction1, correction2 = 1 − βᵗ. */
export function adamW(
  begin: u32, end: u32, scratch: usize, p: usize, g: usize, m: usize, v: usize,
  rate: f64, beta1: f64, beta2: f64, eps: f64, decay: f64, correction1: f64, correction2: f64,
): void {
  for (let i = begin; i < end; i++) {
    const at = <usize>i << 2;
    const d = <f64>load<f32>(g + at);
    const first = beta1 * <f64>load<f32>(m + at) + (1 - beta1) * d;
    const second = beta2 * <f64>load<f32>(v + at) + (1 - beta2) * d * d;
    store<f32>(m + at, <f32>first);
    store<f32>(v + at, <f32>second);
    const x = <f64>load<f32>(p + at);
    store<f32>(p + at, <f32>(x - rate * (first / correction1 / (sqrt<f64>(second / correction2) + eps) + decay * x)));
  }
}
