// Wrappers of the kernels on channel-major matrices: rotations, rounding, transposes and sums.
import { ensure } from '../../../core/errors.js';
import type { KernelPool } from '../pool.js';
import type { Pointer } from './arena.js';

/** Columns of a wide tile in the kernels, and of a narrow one. */
export const TILE = 32;
const NARROW_TILE = 16;
/** Matrices are staged in bands of about this many bytes: enough to share out, small enough for the L3 cache. */
const BAND_BYTES = 8 * 1024 * 1024;

/** Columns that gradient kernels sum together. */
export const CHUNK = 256;

/** Columns a kernel brings into scratch at a time: as many as keep a panel of the group in the L2 cache, up to 256. */
export function panelColumns(groupSize: number): number {
  return TILE * Math.max(1, Math.min(8, Math.floor(1024 / groupSize)));
}

/** Bytes of scratch for a panel of `columns` columns of a group: its tiles, and what lies between them. */
export function panelBytes(groupSize: number, columns: number): number {
  return groupSize * columns * 4 + Math.ceil(columns / NARROW_TILE) * 128;
}

/** Least cosine of an angle that is done by shears: tan(θ/2) ≤ 3. */
const SHEAR_COS = -0.8;

/** Where rotations act: `pairs` [krot, channels] read two by two, local to groups of `groupSize` channels. */
export interface RotationSpec {
  readonly channels: number;
  readonly groupSize: number;
  readonly krot: number;
  readonly pairs: Int16Array;
}

/** Bytes of a rotation table. */
export function rotationTableBytes(spec: RotationSpec): number {
  return Math.max(16, spec.krot * (spec.channels / 2) * 16);
}

/** Checks a rotation's shape. */
export function checkRotation(spec: RotationSpec): void {
  const { channels, groupSize, krot, pairs } = spec;
  ensure(
    krot === 0 || (groupSize >= 2 && groupSize % 2 === 0 && channels % groupSize === 0),
    'tensor-shape',
    () => `rotation groups of ${groupSize} do not tile ${channels} channels in pairs`,
  );
  ensure(
    pairs.length >= krot * channels,
    'tensor-shape',
    () => `${krot} rotations of ${channels} channels need ${krot * channels} pair indices, found ${pairs.length}`,
  );
}

/** Writes the pair offsets of a rotation table; angles follow with {@link writeAngles}. */
export function writePairs(pool: KernelPool, table: Pointer, spec: RotationSpec): void {
  const { channels, groupSize, krot, pairs } = spec;
  const words = pool.arena.u32;
  const half = groupSize >> 1;
  let at = table >>> 2;
  for (let group = 0; group < (krot && channels / groupSize); group++) {
    for (let k = 0; k < krot; k++) {
      let from = k * channels + group * groupSize;
      for (let p = 0; p < half; p++, at += 4, from += 2) {
        const i = pairs[from];
        const j = pairs[from + 1];
        // Kernels address memory with these: an index outside its group would corrupt another tensor.
        ensure(
          i >= 0 && i < groupSize && j >= 0 && j < groupSize && i !== j,
          'tensor-shape',
          () => `rotation ${k}: pair (${i}, ${j}) is not inside a group of ${groupSize} channels`,
        );
        words[at] = i * TILE * 4;
        words[at + 1] = j * TILE * 4;
      }
    }
  }
}

/** Writes theta [krot, channels / 2] (functions computed in f64) into a rotation table, see rotation.ts for its two forms. */
export function writeAngles(pool: KernelPool, table: Pointer, spec: RotationSpec, theta: Float32Array): void {
  const { channels, groupSize, krot } = spec;
  const floats = pool.arena.f32;
  const words = pool.arena.u32;
  const half = groupSize >> 1;
  let at = (table >>> 2) + 2;
  for (let group = 0; group < (krot && channels / groupSize); group++) {
    for (let k = 0; k < krot; k++) {
      let from = k * (channels >> 1) + group * half;
      for (let p = 0; p < half; p++, at += 4, from++) {
        const angle = theta[from];
        const cos = Math.cos(angle);
        const sin = Math.sin(angle);
        const plain = !(cos >= SHEAR_COS);
        // tan(θ/2)
        floats[at] = plain ? cos : sin / (1 + cos);
        floats[at + 1] = sin;
        words[at - 2] = (words[at - 2] & ~1) | (plain ? 1 : 0);
      }
    }
  }
}

/** Largest group whose rows a thin table can address. */
export const THIN_GROUP = 4096;

/** Bytes of a thin table (rotateThin in rotation.ts). */
export function thinTableBytes(spec: RotationSpec): number {
  return spec.krot * (spec.channels / 2) * 12;
}

/** Writes a thin table: offsets of 16-byte rows, cos and sin. Groups up to {@link THIN_GROUP}; {@link writePairs} checks the pairs. */
export function writeThin(pool: KernelPool, table: Pointer, spec: RotationSpec, theta: Float32Array): void {
  const { channels, groupSize, krot, pairs } = spec;
  const { f32, u32 } = pool.arena;
  let at = table >>> 2;
  for (let first = 0; first < (krot && channels); first += groupSize) {
    for (let k = 0; k < krot; k++) {
      for (let from = k * channels + first, end = from + groupSize; from < end; from += 2, at += 3) {
        u32[at] = pairs[from] * 16 + pairs[from + 1] * 16 * 65536;
        f32[at + 1] = Math.cos(theta[from >> 1]);
        f32[at + 2] = Math.sin(theta[from >> 1]);
      }
    }
  }
}

/** A rotation table in the arena; the caller frees it. */
export function rotationTable(pool: KernelPool, spec: RotationSpec, theta: Float32Array): Pointer {
  checkRotation(spec);
  const table = pool.arena.alloc(rotationTableBytes(spec));
  writePairs(pool, table, spec);
  writeAngles(pool, table, spec, theta);
  return table;
}

/**
 * The transform on the channels of src [channels, columns] into dst (may be src): rows × scales, then the rotations; or
 * the inverse: rotations backwards, then rows ÷ scales. Without `scales` only the rotations.
 */
export function transformChannels(
  pool: KernelPool,
  src: Float32Array,
  dst: Float32Array,
  columns: number,
  spec: RotationSpec,
  theta: Float32Array,
  scales: Float32Array | undefined,
  direction: 'forward' | 'inverse',
): void {
  const { channels, krot } = spec;
  checkRotation(spec);
  checkLength('matrix', src, channels * columns);
  checkLength('result', dst, channels * columns);
  // Without rotations any grouping does.
  const groupSize = krot ? spec.groupSize : smallDivisor(channels);
  const inverse = direction === 'inverse';
  const { arena } = pool;
  const panel = panelColumns(groupSize);
  pool.ensureScratch(panelBytes(groupSize, panel));
  arena.scoped(() => {
    const table = arena.scratch(rotationTableBytes(spec));
    writePairs(pool, table, spec);
    writeAngles(pool, table, spec, theta);
    const factors = scales ? arena.pushF32(inverse ? reciprocals(scales) : scales) : 0;
    const groups = channels / groupSize;
    const groupElements = groupSize * columns;
    const bandGroups = Math.max(1, Math.min(groups, Math.floor(BAND_BYTES / (groupElements * 4))));
    const band = arena.scratch(bandGroups * groupElements * 4);
    for (let g = 0; g < groups; g += bandGroups) {
      const count = Math.min(bandGroups, groups - g);
      const begin = g * groupElements;
      const end = begin + count * groupElements;
      arena.f32.set(src.subarray(begin, end), band >>> 2);
      pool.run(
        'transformChannels',
        count * Math.ceil(columns / panel),
        [
          band,
          band,
          columns,
          groupSize,
          krot,
          table + g * krot * (groupSize >> 1) * 16,
          factors ? factors + g * groupSize * 4 : 0,
          inverse ? 1 : 0,
          panel,
        ],
        Math.ceil(40_000 / (groupSize * Math.min(columns, panel) * (krot + 1))),
      );
      arena.readF32(band, dst.subarray(begin, end));
    }
  });
}

/** What {@link fakeQuantize} is asked to write. */
export interface FakeQuantizeOutputs {
  readonly codes?: boolean;
  readonly values?: boolean;
}

/** A matrix rounded onto a grid. */
export interface QuantizedMatrix {
  /** [channels, columns]; empty unless asked for. */
  readonly codes: Uint8Array;
  /** [channels / groupSize, columns]. */
  readonly zeros: Uint8Array;
  /** [channels / groupSize, columns], f16-representable. */
  readonly scales: Float32Array;
  /** [channels, columns], (code − zero) · scale; empty unless asked for. */
  readonly values: Float32Array;
}

/**
 * Rounds w [channels, columns] to nearest on min–max grids of `groupSize` channels (design §4.2). `clip`
 * [channels / groupSize, columns] multiplies each range. Scales are rounded to f16 before use; a range too small for a
 * normal f16 scale (constant groups) falls back to max|w| / (2^bits − 1), at least 2^-14. With `symmetric` the grids are
 * symmetric about 0.
 */
export function fakeQuantize(
  pool: KernelPool,
  w: Float32Array,
  columns: number,
  groupSize: number,
  bits: number,
  clip?: Float32Array,
  want: FakeQuantizeOutputs = { codes: true, values: true },
  symmetric = false,
): QuantizedMatrix {
  const channels = w.length / columns;
  checkGrid(channels, groupSize);
  const groups = channels / groupSize;
  if (clip) checkLength('clip', clip, groups * columns);
  const { codes: wantCodes = false, values: wantValues = false } = want;
  const result: QuantizedMatrix = {
    codes: new Uint8Array(wantCodes ? w.length : 0),
    zeros: new Uint8Array(groups * columns),
    scales: new Float32Array(groups * columns),
    values: new Float32Array(wantValues ? w.length : 0),
  };
  const { arena } = pool;
  pool.ensureScratch(1024 + Math.min(groupSize, 512) * TILE * 4);
  arena.scoped(() => {
    const groupElements = groupSize * columns;
    const bandGroups = Math.max(1, Math.min(groups, Math.floor(BAND_BYTES / (groupElements * 4))));
    const band = arena.scratch(bandGroups * groupElements * 4);
    const bandCodes = wantCodes ? arena.scratch(bandGroups * groupElements) : 0;
    const bandScales = arena.scratch(bandGroups * columns * 4);
    const bandZeros = arena.scratch(bandGroups * columns);
    const bandClip = clip ? arena.scratch(bandGroups * columns * 4) : 0;
    for (let g = 0; g < groups; g += bandGroups) {
      const count = Math.min(bandGroups, groups - g);
      const begin = g * groupElements;
      const end = begin + count * groupElements;
      const first = g * columns;
      const last = first + count * columns;
      arena.f32.set(w.subarray(begin, end), band >>> 2);
      if (clip) arena.f32.set(clip.subarray(first, last), bandClip >>> 2);
      pool.run(
        'fakeQuantize',
        count * Math.ceil(columns / TILE),
        [
          band,
          columns,
          groupSize,
          2 ** bits - 1,
          bandClip,
          bandCodes,
          bandZeros,
          bandScales,
          wantValues ? band : 0,
          symmetric ? 1 : 0,
        ],
        Math.ceil(20_000 / (groupSize * TILE)),
      );
      if (wantValues) arena.readF32(band, result.values.subarray(begin, end));
      if (wantCodes) result.codes.set(arena.u8.subarray(bandCodes, bandCodes + end - begin), begin);
      arena.readF32(bandScales, result.scales.subarray(first, last));
      result.zeros.set(arena.u8.subarray(bandZeros, bandZeros + last - first), first);
    }
  });
  return result;
}

/** src [rows, columns] → dst [columns, rows]. */
export function transpose(pool: KernelPool, src: Float32Array, dst: Float32Array, rows: number, columns: number): void {
  checkLength('matrix', src, rows * columns);
  checkLength('result', dst, rows * columns);
  const { arena } = pool;
  // Bands of source rows would scatter their results over dst; bands of source columns gather, and come out contiguous.
  const bandRows = Math.max(32, Math.floor(BAND_BYTES / (columns * 4) / 32) * 32);
  if (rows <= bandRows) {
    arena.scoped(() => {
      const from = arena.pushF32(src);
      const to = arena.scratch(src.length * 4);
      pool.run('transpose', Math.ceil(rows / 32), [from, to, rows, columns], Math.ceil(2048 / columns));
      arena.readF32(to, dst);
    });
    return;
  }
  arena.scoped(() => {
    const from = arena.scratch(bandRows * columns * 4);
    const to = arena.scratch(bandRows * columns * 4);
    for (let r = 0; r < rows; r += bandRows) {
      const count = Math.min(bandRows, rows - r);
      arena.f32.set(src.subarray(r * columns, (r + count) * columns), from >>> 2);
      pool.run('transpose', Math.ceil(count / 32), [from, to, count, columns], Math.ceil(2048 / columns));
      const view = arena.f32;
      for (let c = 0, at = to >>> 2; c < columns; c++, at += count) {
        dst.set(view.subarray(at, at + count), c * rows + r);
      }
    }
  });
}

/**
 * out = acc + scale · x (out may be acc). Plain JavaScript on purpose: it is bound by memory, and staging both operands
 * in the arena would move every byte twice more than the loop itself.
 */
export function addScaled(acc: Float32Array, x: Float32Array, scale: number, out: Float32Array): void {
  checkLength('operand', x, acc.length);
  checkLength('result', out, acc.length);
  for (let i = 0; i < acc.length; i++) out[i] = acc[i] + scale * x[i];
}

/** Σ a·b in f64, over fixed blocks so that rounding errors stay small on long arrays. */
export function dot(a: Float32Array, b: Float32Array): number {
  checkLength('operand', b, a.length);
  let total = 0;
  for (let start = 0; start < a.length; start += 8192) {
    const end = Math.min(a.length, start + 8192);
    let s0 = 0;
    let s1 = 0;
    let s2 = 0;
    let s3 = 0;
    let i = start;
    for (; i + 4 <= end; i += 4) {
      s0 += a[i] * b[i];
      s1 += a[i + 1] * b[i + 1];
      s2 += a[i + 2] * b[i + 2];
      s3 += a[i + 3] * b[i + 3];
    }
    for (; i < end; i++) s0 += a[i] * b[i];
    total += s0 + s1 + (s2 + s3);
  }
  return total;
}

/** 1 / x, in f64 before rounding. */
export function reciprocals(values: Float32Array): Float32Array {
  const out = new Float32Array(values.length);
  for (let i = 0; i < values.length; i++) out[i] = 1 / values[i];
  return out;
}

/** The largest divisor of n that is at most 128. */
export function smallDivisor(n: number): number {
  for (let d = Math.min(n, 128); d > 1; d--) if (n % d === 0) return d;
  return 1;
}

/** Throws unless groups of `groupSize` tile the channels. */
export function checkGrid(channels: number, groupSize: number): void {
  ensure(
    Number.isInteger(channels) && groupSize >= 1 && channels % groupSize === 0,
    'tensor-shape',
    () => `grid groups of ${groupSize} do not tile ${channels} channels`,
  );
}

/** Throws unless an array has `length` elements. */
export function checkLength(name: string, values: { readonly length: number }, length: number): void {
  ensure(values.length === length, 'tensor-shape', () => `${name} needs ${length} elements, found ${values.length}`);
}
