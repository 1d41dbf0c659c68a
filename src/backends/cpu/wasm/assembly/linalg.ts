// Float64 pieces of blocked Cholesky factorisation on row-major lower triangles, and the blocked transpose.

/** Σ_k a[k]·b[k] in f64. */
function dotDouble(a: usize, b: usize, n: u32): f64 {
  let s0 = f64x2.splat(0), s1 = f64x2.splat(0);
  let k: u32 = 0;
  for (; k + 4 <= n; k += 4) {
    const at = <usize>k << 3;
    s0 = f64x2.add(s0, f64x2.mul(v128.load(a + at), v128.load(b + at)));
    s1 = f64x2.add(s1, f64x2.mul(v128.load(a + at, 16), v128.load(b + at, 16)));
  }
  s0 = f64x2.add(s0, s1);
  let sum = f64x2.extract_lane(s0, 0) + f64x2.extract_lane(s0, 1);
  for (; k < n; k++) sum += load<f64>(a + (<usize>k << 3)) * load<f64>(b + (<usize>k << 3));
  return sum;
}

/**
 * Lower Cholesky factor of a symmetric matrix [n, n] in place (only the lower triangle is read; the upper is zeroed).
 * Returns −1, or the row whose pivot is not positive.
 */
export function cholesky(a: usize, n: u32): i32 {
  const step = <usize>n << 3;
  for (let i: u32 = 0; i < n; i++) {
    const row = a + i * step;
    for (let j: u32 = 0; j < i; j++) {
      const other = a + j * step;
      const at = <usize>j << 3;
      store<f64>(row + at, (load<f64>(row + at) - dotDouble(row, other, j)) / load<f64>(other + at));
    }
    const at = <usize>i << 3;
    const pivot = load<f64>(row + at) - dotDouble(row, row, i);
    if (!(pivot > 0) || pivot == Infinity) return i;
    store<f64>(row + at, sqrt(pivot));
    memory.fill(row + at + 8, 0, step - at - 8);
  }
  return -1;
}

/** Inverse of a lower triangle [n, n] into `out` (zero above the diagonal). */
export function invertLower(l: usize, out: usize, n: u32): void {
  const step = <usize>n << 3;
  memory.fill(out, 0, n * step);
  for (let i: u32 = 0; i < n; i++) {
    const pivot = 1 / load<f64>(l + i * step + (<usize>i << 3));
    const row = out + i * step;
    for (let k: u32 = 0; k < i; k++) {
      const factor = load<f64>(l + i * step + (<usize>k << 3));
      const other = out + k * step;
      for (let j: u32 = 0; j <= k; j++) {
        const at = <usize>j << 3;
        store<f64>(row + at, load<f64>(row + at) - factor * load<f64>(other + at));
      }
    }
    for (let j: u32 = 0; j < i; j++) {
      const at = <usize>j << 3;
      store<f64>(row + at, load<f64>(row + at) * pivot);
    }
    store<f64>(row + (<usize>i << 3), pivot);
  }
}

/** [rows, columns] → [columns, rows]; units are bands of 32 rows. */
export function transpose(begin: u32, end: u32, scratch: usize, src: usize, dst: usize, rows: u32, columns: u32): void {
  const wide = <usize>columns << 2;
  const tall = <usize>rows << 2;
  for (let unit = begin; unit < end; unit++) {
    const r0 = unit << 5;
    const r1 = min(rows, r0 + 32);
    for (let c0: u32 = 0; c0 < columns; c0 += 32) {
      const c1 = min(columns, c0 + 32);
      let r = r0;
      for (; r + 4 <= r1; r += 4) {
        let c = c0;
        for (; c + 4 <= c1; c += 4) {
          const p = src + r * wide + (<usize>c << 2);
          const x0 = v128.load(p), x1 = v128.load(p + wide), x2 = v128.load(p + 2 * wide), x3 = v128.load(p + 3 * wide);
          const a = i8x16.shuffle(x0, x1, 0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
          const b = i8x16.shuffle(x0, x1, 8, 9, 10, 11, 24, 25, 26, 27, 12, 13, 14, 15, 28, 29, 30, 31);
          const d = i8x16.shuffle(x2, x3, 0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
          const e = i8x16.shuffle(x2, x3, 8, 9, 10, 11, 24, 25, 26, 27, 12, 13, 14, 15, 28, 29, 30, 31);
          const q = dst + c * tall + (<usize>r << 2);
          v128.store(q, i8x16.shuffle(a, d, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23));
          v128.store(q + tall, i8x16.shuffle(a, d, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31));
          v128.store(q + 2 * tall, i8x16.shuffle(b, e, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23));
          v128.store(q + 3 * tall, i8x16.shuffle(b, e, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31));
        }
        for (; c < c1; c++) {
          for (let i: u32 = 0; i < 4; i++) store<f32>(dst + c * tall + (<usize>(r + i) << 2), load<f32>(src + (r + i) * wide + (<usize>c << 2)));
        }
      }
      for (; r < r1; r++) {
        for (let c = c0; c < c1; c++) store<f32>(dst + c * tall + (<usize>r << 2), load<f32>(src + r * wide + (<usize>c << 2)));
      }
    }
  }
}
