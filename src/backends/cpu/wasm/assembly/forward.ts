// The forward pass's small kernels on row-major activations: norms, rotations of rows, SiLU·up, heads with RoPE.
import { exp4, sumLanes, transpose4 } from './math';
import { ENTRY_SHIFT, THIN_ENTRY, rotateAllWide, rotateThin } from './rotation';

/** Σ x² of n floats. */
function sumSquares(x: usize, n: u32): f32 {
  let s0 = f32x4.splat(0), s1 = f32x4.splat(0), s2 = f32x4.splat(0), s3 = f32x4.splat(0);
  let i: u32 = 0;
  for (; i + 16 <= n; i += 16) {
    const p = x + (<usize>i << 2);
    const a = v128.load(p), b = v128.load(p, 16), c = v128.load(p, 32), d = v128.load(p, 48);
    s0 = f32x4.add(s0, f32x4.mul(a, a));
    s1 = f32x4.add(s1, f32x4.mul(b, b));
    s2 = f32x4.add(s2, f32x4.mul(c, c));
    s3 = f32x4.add(s3, f32x4.mul(d, d));
  }
  let sum = sumLanes(f32x4.add(f32x4.add(s0, s1), f32x4.add(s2, s3)));
  for (; i < n; i++) {
    const v = load<f32>(x + (<usize>i << 2));
    sum += v * v;
  }
  return sum;
}

/** to = x · factor · weight. */
// @ts-ignore: decorator
@inline
function scaleBy(x: usize, to: usize, n: u32, factor: f32, weight: usize): void {
  const f = f32x4.splat(factor);
  let i: u32 = 0;
  for (; i + 4 <= n; i += 4) {
    const at = <usize>i << 2;
    v128.store(to + at, f32x4.mul(f32x4.mul(v128.load(x + at), f), v128.load(weight + at)));
  }
  for (; i < n; i++) {
    const at = <usize>i << 2;
    store<f32>(to + at, load<f32>(x + at) * factor * load<f32>(weight + at));
  }
}

/** x · weight / sqrt(mean(x²) + eps) per row; units are rows. */
export function rmsNorm(begin: u32, end: u32, scratch: usize, x: usize, out: usize, n: u32, weight: usize, eps: f32): void {
  const step = <usize>n << 2;
  for (let r = begin; r < end; r++) {
    const row = x + r * step;
    scaleBy(row, out + r * step, n, 1 / sqrt<f32>(sumSquares(row, n) / <f32>n + eps), weight);
  }
}

/** silu(gate) · up: gateUp [rows, 2n] → out [rows, n]; units are rows. */
export function siluMul(begin: u32, end: u32, scratch: usize, gateUp: usize, out: usize, n: u32): void {
  const one = f32x4.splat(1);
  for (let r = begin; r < end; r++) {
    const gate = gateUp + ((<usize>r * n) << 3);
    const up = gate + (<usize>n << 2);
    const to = out + ((<usize>r * n) << 2);
    let i: u32 = 0;
    for (; i + 4 <= n; i += 4) {
      const at = <usize>i << 2;
      const g = v128.load(gate + at);
      v128.store(to + at, f32x4.mul(f32x4.div(g, f32x4.add(one, exp4(f32x4.neg(g)))), v128.load(up + at)));
    }
    for (; i < n; i++) {
      const at = <usize>i << 2;
      const g = v128.load32_splat(gate + at);
      store<f32>(to + at, f32x4.extract_lane(f32x4.div(g, f32x4.add(one, exp4(f32x4.neg(g)))), 0) * load<f32>(up + at));
    }
  }
}

/** Rows [rows ≤ 4·strips, size] of activations into channel-major strips of 4, times scales. Missing rows are zero. */
function gatherRows(x: usize, stride: usize, rows: u32, size: u32, tile: usize, step: usize, strips: u32, scales: usize): void {
  const none = f32x4.splat(0);
  for (let s: u32 = 0; s < strips; s++) {
    const r = s << 2;
    const p = x + r * stride;
    const to = tile + (<usize>s << 4);
    const n = rows > r ? rows - r : 0;
    let c: u32 = 0;
    if (n >= 4) {
      for (; c + 4 <= size; c += 4) {
        const at = <usize>c << 2;
        const a = v128.load(scales + at);
        const q = p + at;
        transpose4(
          f32x4.mul(v128.load(q), a), f32x4.mul(v128.load(q + stride), a),
          f32x4.mul(v128.load(q + 2 * stride), a), f32x4.mul(v128.load(q + 3 * stride), a), to + c * step, step,
        );
      }
    }
    for (; c + 4 <= size; c += 4) {
      const at = <usize>c << 2;
      const a = v128.load(scales + at);
      transpose4(
        n > 0 ? f32x4.mul(v128.load(p + at), a) : none,
        n > 1 ? f32x4.mul(v128.load(p + stride + at), a) : none,
        n > 2 ? f32x4.mul(v128.load(p + 2 * stride + at), a) : none,
        n > 3 ? f32x4.mul(v128.load(p + 3 * stride + at), a) : none,
        to + c * step, step,
      );
    }
    for (; c < size; c++) {
      const at = <usize>c << 2;
      for (let i: u32 = 0; i < 4; i++) {
        store<f32>(to + c * step + (<usize>i << 2), i < n ? load<f32>(p + i * stride + at) * load<f32>(scales + at) : 0);
      }
    }
  }
}

/** The way back from strips of 4. */
function scatterRows(tile: usize, step: usize, strips: u32, rows: u32, size: u32, out: usize, stride: usize): void {
  for (let s: u32 = 0; s < strips; s++) {
    const r = s << 2;
    if (r >= rows) return;
    const n = min<u32>(rows - r, 4);
    const from = tile + (<usize>s << 4);
    const q = out + r * stride;
    let c: u32 = 0;
    if (n == 4) {
      for (; c + 4 <= size; c += 4) {
        const p = from + c * step;
        transpose4(v128.load(p), v128.load(p + step), v128.load(p + 2 * step), v128.load(p + 3 * step), q + (<usize>c << 2), stride);
      }
    }
    for (; c < size; c++) {
      for (let i: u32 = 0; i < n; i++) store<f32>(q + i * stride + (<usize>c << 2), load<f32>(from + c * step + (<usize>i << 2)));
    }
  }
}

/**
 * x ⊙ scales, then the rotations, on rows of x [rows, channels]; units are (group, tile of `width` rows), width 32 (many
 * rows) or 4; `thin` is the table of the latter, see rotateThin. One to three rows run as four: a scalar takes as many
 * instructions per pair.
 */
export function rotateRows(
  begin: u32, end: u32, scratch: usize,
  x: usize, out: usize, rows: u32, channels: u32, size: u32, rotations: u32, table: usize, thin: usize, scales: usize, width: u32,
): void {
  const tiles = (rows + width - 1) / width;
  const stride = <usize>channels << 2;
  const pairs = size >> 1;
  const thinBytes = <usize>pairs * THIN_ENTRY;
  const step = <usize>width << 2;
  for (let unit = begin; unit < end; unit++) {
    const group = unit / tiles;
    const row = (unit - group * tiles) * width;
    const count = min(rows - row, width);
    const at = row * stride + (<usize>(group * size) << 2);
    const first = <usize>(group * rotations);
    const s = scales + (<usize>(group * size) << 2);
    if (count == 1 && width == 4) {
      for (let c: usize = 0; c < <usize>size << 2; c += 4) {
        v128.store(scratch + (c << 2), f32x4.mul(v128.load32_splat(x + at + c), v128.load32_splat(s + c)));
      }
      for (let k: u32 = 0; k < rotations; k++) rotateThin(scratch, thin + (first + k) * thinBytes, pairs);
      for (let c: usize = 0; c < <usize>size << 2; c += 4) store<f32>(out + at + c, load<f32>(scratch + (c << 2)));
      continue;
    }
    gatherRows(x + at, stride, count, size, scratch, step, width >> 2, s);
    if (width == 32) rotateAllWide(scratch, table + ((first * pairs) << ENTRY_SHIFT), pairs, rotations, false);
    else for (let k: u32 = 0; k < rotations; k++) rotateThin(scratch, thin + (first + k) * thinBytes, pairs);
    scatterRows(scratch, step, width >> 2, count, size, out + at, stride);
  }
}

/**
 * Merged projections qkv [rows, (heads + 2·kvHeads)·d] → q, k, v, with RMSNorm per head of q and k (norm weights may be
 * null) and half-split RoPE on the first `rotary` of d dimensions. Units are rows. cos, sin: [positions, rotary/2]; the
 * position of row r is starts[r / tokens] + r mod tokens.
 */
export function splitHeads(
  begin: u32, end: u32, scratch: usize,
  qkv: usize, q: usize, k: usize, v: usize, heads: u32, kvHeads: u32, d: u32, qNorm: usize, kNorm: usize, eps: f32,
  cos: usize, sin: usize, rotary: u32, starts: usize, tokens: u32,
): void {
  const bytes = <usize>d << 2;
  const all = heads + 2 * kvHeads;
  const half = rotary >> 1;
  for (let row = begin; row < end; row++) {
    const from = qkv + row * all * bytes;
    const start = load<u32>(starts + (<usize>(row / tokens) << 2));
    const table = <usize>((start + row % tokens) * half) << 2;
    for (let h: u32 = 0; h < heads + kvHeads; h++) {
      const isQ = h < heads;
      const x = from + h * bytes;
      const to = isQ ? q + (row * heads + h) * bytes : k + (row * kvHeads + h - heads) * bytes;
      const norm = isQ ? qNorm : kNorm;
      if (norm) scaleBy(x, to, d, 1 / sqrt<f32>(sumSquares(x, d) / <f32>d + eps), norm);
      else memory.copy(to, x, bytes);
      const upper = to + (<usize>half << 2);
      let i: u32 = 0;
      for (; i + 4 <= half; i += 4) {
        const at = <usize>i << 2;
        const c = v128.load(cos + table + at);
        const s = v128.load(sin + table + at);
        const a = v128.load(to + at);
        const b = v128.load(upper + at);
        v128.store(to + at, f32x4.sub(f32x4.mul(a, c), f32x4.mul(b, s)));
        v128.store(upper + at, f32x4.add(f32x4.mul(b, c), f32x4.mul(a, s)));
      }
      for (; i < half; i++) {
        const at = <usize>i << 2;
        const c = load<f32>(cos + table + at);
        const s = load<f32>(sin + table + at);
        const a = load<f32>(to + at);
        const b = load<f32>(upper + at);
        store<f32>(to + at, a * c - b * s);
        store<f32>(upper + at, b * c + a * s);
      }
    }
    memory.copy(v + row * kvHeads * bytes, from + (heads + kvHeads) * bytes, kvHeads * bytes);
  }
}
