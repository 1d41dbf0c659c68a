// Element types of tensors in memory and in files, and exact conversions between the floating-point ones.
import { GyreError, unreachable } from './errors.js';

/** Element types gyre reads and writes. f16 and bf16 are held as raw bits in a Uint16Array. */
export type DType = 'f64' | 'f32' | 'f16' | 'bf16' | 'i64' | 'i32' | 'i16' | 'i8' | 'u8';

/** The floating-point element types. */
export type FloatDType = 'f64' | 'f32' | 'f16' | 'bf16';

/** The typed array that holds elements of each {@link DType}. */
export type TypedArray =
  Float64Array | Float32Array | Uint16Array | BigInt64Array | Int32Array | Int16Array | Int8Array | Uint8Array;

const BYTES: Readonly<Record<DType, number>> = {
  f64: 8,
  f32: 4,
  f16: 2,
  bf16: 2,
  i64: 8,
  i32: 4,
  i16: 2,
  i8: 1,
  u8: 1,
};

/** Bytes per element. */
export function bytesPerElement(dtype: DType): number {
  return BYTES[dtype];
}

/** A typed array of `length` zeros, or a view of `buffer` when given (must be aligned to the element size). */
export function typedArray(dtype: DType, length: number, buffer?: ArrayBufferLike, byteOffset = 0): TypedArray {
  switch (dtype) {
    case 'f64':
      return buffer ? new Float64Array(buffer, byteOffset, length) : new Float64Array(length);
    case 'f32':
      return buffer ? new Float32Array(buffer, byteOffset, length) : new Float32Array(length);
    case 'f16':
    case 'bf16':
      return buffer ? new Uint16Array(buffer, byteOffset, length) : new Uint16Array(length);
    case 'i64':
      return buffer ? new BigInt64Array(buffer, byteOffset, length) : new BigInt64Array(length);
    case 'i32':
      return buffer ? new Int32Array(buffer, byteOffset, length) : new Int32Array(length);
    case 'i16':
      return buffer ? new Int16Array(buffer, byteOffset, length) : new Int16Array(length);
    case 'i8':
      return buffer ? new Int8Array(buffer, byteOffset, length) : new Int8Array(length);
    case 'u8':
      return buffer ? new Uint8Array(buffer, byteOffset, length) : new Uint8Array(length);
    default:
      return unreachable(dtype);
  }
}

const scratchF32 = new Float32Array(1);
const scratchU32 = new Uint32Array(scratchF32.buffer);

/** f32 value → f16 bits, round to nearest even, overflow to infinity. */
export function f32ToF16Bits(value: number): number {
  scratchF32[0] = value;
  const x = scratchU32[0];
  const sign = (x >>> 16) & 0x8000;
  const exponent = (x >>> 23) & 0xff;
  let mantissa = x & 0x7fffff;
  if (exponent === 0xff) return sign | 0x7c00 | (mantissa ? 0x200 : 0);
  const e = exponent - 112; // f16 exponent field before rounding
  if (e >= 31) return sign | 0x7c00;
  if (e <= 0) {
    if (e < -10) return sign;
    mantissa |= 0x800000;
    const shift = 14 - e;
    const half = 1 << (shift - 1);
    const rest = mantissa & ((1 << shift) - 1);
    let m = mantissa >>> shift;
    if (rest > half || (rest === half && m & 1)) m++;
    return sign | m; // a carry into the exponent is the right number
  }
  let bits = (e << 10) | (mantissa >>> 13);
  const rest = mantissa & 0x1fff;
  if (rest > 0x1000 || (rest === 0x1000 && bits & 1)) bits++;
  return sign | bits;
}

/** f16 bits → value. */
export function f16BitsToF32(bits: number): number {
  const sign = bits & 0x8000 ? -1 : 1;
  const exponent = (bits >>> 10) & 31;
  const mantissa = bits & 0x3ff;
  if (exponent === 0) return sign * mantissa * 2 ** -24;
  if (exponent === 31) return mantissa ? NaN : sign * Infinity;
  return sign * (1 + mantissa / 1024) * 2 ** (exponent - 15);
}

/** f32 value → bf16 bits, round to nearest even. */
export function f32ToBf16Bits(value: number): number {
  scratchF32[0] = value;
  const x = scratchU32[0];
  if ((x & 0x7fffffff) > 0x7f800000) return (x >>> 16) | 0x40; // keep NaN a NaN
  return ((x + 0x7fff + ((x >>> 16) & 1)) >>> 16) & 0xffff;
}

/** The nearest f16 of a value, as a number. */
export function roundToF16(value: number): number {
  return f16BitsToF32(f32ToF16Bits(value));
}

let f16Table: Float32Array | undefined;

/** Decodes floats of any float type into f32 (f64 is narrowed). Returns the input itself when it is f32 already. */
export function toFloat32(data: TypedArray, dtype: DType): Float32Array {
  switch (dtype) {
    case 'f32':
      return data as Float32Array;
    case 'f64':
      return Float32Array.from(data as Float64Array);
    case 'bf16': {
      const out = new Float32Array(data.length);
      const bits = new Uint32Array(out.buffer);
      const source = data as Uint16Array;
      for (let i = 0; i < source.length; i++) bits[i] = source[i] << 16;
      return out;
    }
    case 'f16': {
      f16Table ??= Float32Array.from({ length: 65536 }, (_, i) => f16BitsToF32(i));
      const table = f16Table;
      const source = data as Uint16Array;
      const out = new Float32Array(source.length);
      for (let i = 0; i < source.length; i++) out[i] = table[source[i]];
      return out;
    }
    case 'i64':
    case 'i32':
    case 'i16':
    case 'i8':
    case 'u8':
      throw new GyreError('tensor-shape', `expected a floating-point tensor, found ${dtype}`);
    default:
      return unreachable(dtype);
  }
}

/** Encodes f32 values as `dtype` (round to nearest even). Returns the input itself for f32. */
export function fromFloat32(data: Float32Array, dtype: FloatDType): Float64Array | Float32Array | Uint16Array {
  switch (dtype) {
    case 'f32':
      return data;
    case 'f64':
      return Float64Array.from(data);
    case 'f16':
    case 'bf16': {
      const encode = dtype === 'f16' ? f32ToF16Bits : f32ToBf16Bits;
      const out = new Uint16Array(data.length);
      for (let i = 0; i < data.length; i++) out[i] = encode(data[i]);
      return out;
    }
    default:
      return unreachable(dtype);
  }
}
