// Bit packing of quantized weights: the AWQ GEMM layout (4 bits, eight output columns to an int32) and gyre's own.
//
// AWQ GEMM: word [i][o/8] holds columns o … o+7 of input channel i; nibble n (bits 4n … 4n+3) holds column o + ORDER[n].
// gyre: each output row's codes one after the other, lowest bit first, rows padded to whole bytes.
import { GyreError, ensure } from '../core/errors.js';

/** Column (of eight) that each nibble of a word holds, lowest nibble first. */
export const AWQ_ORDER = [0, 2, 4, 6, 1, 3, 5, 7] as const;

/** Side of the tiles in which transposing loops walk: both sides of a tile stay in the first-level cache. */
const TILE = 64;

function checkGemm(length: number, expected: number, cols: number, what: string): void {
  ensure(
    cols % 8 === 0,
    'tensor-shape',
    () => `${what}: the AWQ layout packs eight output columns to a word, found ${cols} outputs`,
    "Leave this linear in 16 bits, or write gyre's own layout (quant_method gyre), which takes any shape.",
  );
  ensure(length === expected, 'tensor-shape', () => `${what}: expected ${expected} elements, found ${length}`);
}

function checkCodes(seen: number, bits: number, what: string): void {
  ensure(
    seen < 2 ** bits,
    'tensor-shape',
    () => `${what}: a code does not fit ${bits} bits (bits set: 0b${seen.toString(2)})`,
  );
}

/**
 * Packs 4-bit values in the AWQ order.
 * @param codes [rows, cols] u8, 0 … 15 (rows = input channels or groups, cols = outputs).
 * @returns [rows, cols / 8].
 * @throws `tensor-shape` unless cols is a multiple of 8 and every code fits.
 */
export function packGemm(codes: Uint8Array, rows: number, cols: number): Int32Array {
  checkGemm(codes.length, rows * cols, cols, 'packing');
  const out = new Int32Array((rows * cols) / 8);
  let seen = 0;
  for (let w = 0, i = 0; w < out.length; w++, i += 8) {
    const a = codes[i];
    const b = codes[i + 1];
    const c = codes[i + 2];
    const d = codes[i + 3];
    const e = codes[i + 4];
    const f = codes[i + 5];
    const g = codes[i + 6];
    const h = codes[i + 7];
    seen |= a | b | c | d | e | f | g | h;
    out[w] = a | (c << 4) | (e << 8) | (g << 12) | (b << 16) | (d << 20) | (f << 24) | (h << 28);
  }
  checkCodes(seen, 4, 'packing');
  return out;
}

/** Inverse of {@link packGemm}: [rows, cols / 8] → [rows, cols]. */
export function unpackGemm(packed: Int32Array, rows: number, cols: number): Uint8Array {
  checkGemm(packed.length, (rows * cols) / 8, cols, 'unpacking');
  const out = new Uint8Array(rows * cols);
  for (let w = 0, i = 0; w < packed.length; w++, i += 8) {
    const word = packed[w];
    out[i] = word & 15;
    out[i + 2] = (word >>> 4) & 15;
    out[i + 4] = (word >>> 8) & 15;
    out[i + 6] = (word >>> 12) & 15;
    out[i + 1] = (word >>> 16) & 15;
    out[i + 3] = (word >>> 20) & 15;
    out[i + 5] = (word >>> 24) & 15;
    out[i + 7] = word >>> 28;
  }
  return out;
}

/**
 * Packs codes that lie output by output: [cols, rows] → [rows, cols / 8], as packGemm of the transpose.
 * @throws like {@link packGemm}.
 */
export function packGemmTransposed(codes: Uint8Array, rows: number, cols: number): Int32Array {
  checkGemm(codes.length, rows * cols, cols, 'packing');
  const words = cols / 8;
  const out = new Int32Array(rows * words);
  let seen = 0;
  for (let r0 = 0; r0 < rows; r0 += TILE) {
    const rEnd = Math.min(rows, r0 + TILE);
    for (let w = 0; w < words; w++) {
      let p = 8 * w * rows + r0;
      for (let r = r0; r < rEnd; r++, p++) {
        const a = codes[p];
        const b = codes[p + rows];
        const c = codes[p + 2 * rows];
        const d = codes[p + 3 * rows];
        const e = codes[p + 4 * rows];
        const f = codes[p + 5 * rows];
        const g = codes[p + 6 * rows];
        const h = codes[p + 7 * rows];
        seen |= a | b | c | d | e | f | g | h;
        out[r * words + w] = a | (c << 4) | (e << 8) | (g << 12) | (b << 16) | (d << 20) | (f << 24) | (h << 28);
      }
    }
  }
  checkCodes(seen, 4, 'packing');
  return out;
}

/** Inverse of {@link packGemmTransposed}: [rows, cols / 8] → [cols, rows]. */
export function unpackGemmTransposed(packed: Int32Array, rows: number, cols: number): Uint8Array {
  checkGemm(packed.length, (rows * cols) / 8, cols, 'unpacking');
  const words = cols / 8;
  const out = new Uint8Array(rows * cols);
  for (let r0 = 0; r0 < rows; r0 += TILE) {
    const rEnd = Math.min(rows, r0 + TILE);
    for (let w = 0; w < words; w++) {
      let p = 8 * w * rows + r0;
      for (let r = r0; r < rEnd; r++, p++) {
        const word = packed[r * words + w];
        out[p] = word & 15;
        out[p + 2 * rows] = (word >>> 4) & 15;
        out[p + 4 * rows] = (word >>> 8) & 15;
        out[p + 6 * rows] = (word >>> 12) & 15;
        out[p + rows] = (word >>> 16) & 15;
        out[p + 3 * rows] = (word >>> 20) & 15;
        out[p + 5 * rows] = (word >>> 24) & 15;
        out[p + 7 * rows] = word >>> 28;
      }
    }
  }
  return out;
}

/** Bytes of a packed row of `n` codes. */
export function packedRowBytes(n: number, bits: number): number {
  return Math.ceil((n * bits) / 8);
}

/**
 * Packs codes of `bits` bits, lowest bit first, each row padded to whole bytes with zeros.
 * @param codes [rows, n] u8. @param bits 1 … 8.
 * @returns [rows, ceil(n · bits / 8)].
 * @throws `tensor-shape` when a code doesn't fit.
 */
export function packBits(codes: Uint8Array, rows: number, n: number, bits: number): Uint8Array {
  ensure(codes.length === rows * n, 'tensor-shape', () => `packing: expected ${rows * n} codes, found ${codes.length}`);
  if (bits === 8) return codes.slice();
  const rowBytes = packedRowBytes(n, bits);
  const out = new Uint8Array(rows * rowBytes);
  let seen = 0;
  // Eight codes fill exactly `bits` bytes: whole runs of eight go through two 32-bit words at most.
  const runs = Math.floor(n / 8);
  for (let r = 0; r < rows; r++) {
    let i = r * n;
    let o = r * rowBytes;
    for (let run = 0; run < runs; run++, i += 8) {
      const low = codes[i] | (codes[i + 1] << bits) | (codes[i + 2] << (2 * bits)) | (codes[i + 3] << (3 * bits));
      const high = codes[i + 4] | (codes[i + 5] << bits) | (codes[i + 6] << (2 * bits)) | (codes[i + 7] << (3 * bits));
      seen |=
        codes[i] |
        codes[i + 1] |
        codes[i + 2] |
        codes[i + 3] |
        codes[i + 4] |
        codes[i + 5] |
        codes[i + 6] |
        codes[i + 7];
      switch (bits) {
        case 2:
          out[o] = low;
          out[o + 1] = high;
          break;
        case 4:
          out[o] = low;
          out[o + 1] = low >>> 8;
          out[o + 2] = high;
          out[o + 3] = high >>> 8;
          break;
        case 3: {
          const word = low | (high << 12);
          out[o] = word;
          out[o + 1] = word >>> 8;
          out[o + 2] = word >>> 16;
          break;
        }
        default: {
          for (let k = 0; k < 8; k++) putBits(out, o, k * bits, codes[i + k], bits);
        }
      }
      o += bits;
    }
    for (let k = 8 * runs; k < n; k++) {
      const code = codes[r * n + k];
      seen |= code;
      putBits(out, r * rowBytes, k * bits, code & (2 ** bits - 1), bits);
    }
  }
  checkCodes(seen, bits, 'packing');
  return out;
}

function putBits(out: Uint8Array, base: number, at: number, code: number, bits: number): void {
  const word = code << (at & 7);
  out[base + (at >>> 3)] |= word;
  if ((at & 7) + bits > 8) out[base + (at >>> 3) + 1] |= word >>> 8;
}

/** Inverse of {@link packBits}: [rows, ceil(n · bits / 8)] → [rows, n]. */
export function unpackBits(packed: Uint8Array, rows: number, n: number, bits: number): Uint8Array {
  const rowBytes = packedRowBytes(n, bits);
  ensure(
    packed.length === rows * rowBytes,
    'tensor-shape',
    () => `unpacking: expected ${rows * rowBytes} bytes, found ${packed.length}`,
  );
  if (bits === 8) return packed.slice();
  const out = new Uint8Array(rows * n);
  const mask = 2 ** bits - 1;
  const runs = Math.floor(n / 8);
  for (let r = 0; r < rows; r++) {
    let i = r * n;
    let o = r * rowBytes;
    for (let run = 0; run < runs; run++, i += 8, o += bits) {
      let low: number;
      let high: number;
      switch (bits) {
        case 2:
          low = packed[o];
          high = packed[o + 1];
          break;
        case 4:
          low = packed[o] | (packed[o + 1] << 8);
          high = packed[o + 2] | (packed[o + 3] << 8);
          break;
        case 3:
          low = packed[o] | ((packed[o + 1] & 15) << 8);
          high = (packed[o + 1] >>> 4) | (packed[o + 2] << 4);
          break;
        default:
          for (let k = 0; k < 8; k++) out[i + k] = getBits(packed, o, k * bits, mask);
          continue;
      }
      out[i] = low & mask;
      out[i + 1] = (low >>> bits) & mask;
      out[i + 2] = (low >>> (2 * bits)) & mask;
      out[i + 3] = (low >>> (3 * bits)) & mask;
      out[i + 4] = high & mask;
      out[i + 5] = (high >>> bits) & mask;
      out[i + 6] = (high >>> (2 * bits)) & mask;
      out[i + 7] = (high >>> (3 * bits)) & mask;
    }
    for (let k = 8 * runs; k < n; k++) out[r * n + k] = getBits(packed, r * rowBytes, k * bits, mask);
  }
  return out;
}

function getBits(packed: Uint8Array, base: number, at: number, mask: number): number {
  const byte = base + (at >>> 3);
  const next = byte + 1 < packed.length ? packed[byte + 1] : 0;
  return ((packed[byte] | (next << 8)) >>> (at & 7)) & mask;
}

/** An array that {@link transpose2d} takes. */
type Transposable = Uint8Array | Uint16Array | Int32Array | Float32Array;

/** [rows, cols] → [cols, rows]. */
export function transpose2d<T extends Transposable>(data: T, rows: number, cols: number): T {
  if (data.length !== rows * cols) {
    throw new GyreError('tensor-shape', `transposing: expected ${rows * cols} elements, found ${data.length}`);
  }
  const out = new (data.constructor as new (length: number) => T)(data.length);
  for (let r0 = 0; r0 < rows; r0 += TILE) {
    const rEnd = Math.min(rows, r0 + TILE);
    for (let c = 0; c < cols; c++) {
      for (let r = r0; r < rEnd; r++) out[c * rows + r] = data[r * cols + c];
    }
  }
  return out;
}
