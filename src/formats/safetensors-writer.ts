// Writes safetensors, tensor by tensor: the header is made from shapes alone, data is asked for when its turn comes.
import { bytesPerElement, typedArray, type DType, type TypedArray } from '../core/dtype.js';
import { ensure } from '../core/errors.js';
import { byteLength, bytesOf, elementCount } from '../core/tensor.js';
import { MAX_HEADER_BYTES, MAX_NAME_LENGTH, MAX_RANK } from './safetensors.js';

/** A tensor to write. */
export interface TensorEntry {
  readonly name: string;
  readonly dtype: DType;
  readonly shape: readonly number[];
  /** The elements; called once, when they are due, and free to be collected right after. */
  readonly data: () => TypedArray | Promise<TypedArray>;
}

/** Where bytes go, in order. */
export interface ByteSink {
  write(bytes: Uint8Array): Promise<void>;
}

/** Options of the writers. */
export interface SafetensorsOptions {
  /** Texts under `__metadata__`. Default: `{format: "pt"}`, which Transformers asks for. */
  metadata?: Readonly<Record<string, string>>;
  /**
   * `sorted` (default): wide elements first, then by name, so that every tensor is aligned to its element and equal
   * tensors give equal files; `given`: as listed.
   */
  order?: 'sorted' | 'given';
}

const STORED: Readonly<Record<DType, string>> = {
  f64: 'F64',
  f32: 'F32',
  f16: 'F16',
  bf16: 'BF16',
  i64: 'I64',
  i32: 'I32',
  i16: 'I16',
  i8: 'I8',
  u8: 'U8',
};

/** The order in which a file holds its tensors. */
export function fileOrder(
  entries: readonly TensorEntry[],
  order: 'sorted' | 'given' = 'sorted',
): readonly TensorEntry[] {
  if (order === 'given') return entries;
  return [...entries].sort(
    (a, b) => bytesPerElement(b.dtype) - bytesPerElement(a.dtype) || (a.name < b.name ? -1 : a.name > b.name ? 1 : 0),
  );
}

/** Bytes of the whole file: header and data. */
export function safetensorsBytes(entries: readonly TensorEntry[], options: SafetensorsOptions = {}): number {
  return (
    encodeHeader(fileOrder(entries, options.order), options.metadata).byteLength +
    entries.reduce((sum, entry) => sum + byteLength(entry.dtype, entry.shape), 0)
  );
}

/** The length word and the JSON header, padded with spaces to a multiple of 8. */
export function encodeHeader(
  entries: readonly TensorEntry[],
  metadata: Readonly<Record<string, string>> = { format: 'pt' },
): Uint8Array {
  const header: [string, unknown][] = Object.keys(metadata).length > 0 ? [['__metadata__', metadata]] : [];
  const seen = new Set(['__metadata__']);
  let at = 0;
  for (const { name, dtype, shape } of entries) {
    ensure(!seen.has(name), 'usage', () => `two tensors are to be written under the name ${name}`);
    seen.add(name);
    ensure(
      name.length > 0 && name.length <= MAX_NAME_LENGTH && shape.length <= MAX_RANK,
      'usage',
      () =>
        `tensor ${name}: a name of 1 to ${MAX_NAME_LENGTH} characters and at most ${MAX_RANK} dimensions are needed`,
    );
    ensure(
      shape.every((n) => Number.isSafeInteger(n) && n >= 0),
      'usage',
      () => `tensor ${name}: shape [${shape.join(', ')}] is not one`,
    );
    const end = at + byteLength(dtype, shape);
    header.push([name, { dtype: STORED[dtype], shape, data_offsets: [at, end] }]);
    at = end;
  }
  // Object.fromEntries would move names that look like numbers to the front; the text is put together in order instead.
  const text = `{${header.map(([key, value]) => `${JSON.stringify(key)}:${JSON.stringify(value)}`).join(',')}}`;
  const json = new TextEncoder().encode(text);
  const length = Math.ceil(json.byteLength / 8) * 8;
  ensure(
    length <= MAX_HEADER_BYTES,
    'limit-exceeded',
    () => `a header of ${length} bytes is over the limit of ${MAX_HEADER_BYTES}`,
    'Write the tensors to several shards.',
  );
  const bytes = new Uint8Array(8 + length).fill(0x20);
  new DataView(bytes.buffer).setBigUint64(0, BigInt(length), true);
  bytes.set(json, 8);
  return bytes;
}

/**
 * Writes a safetensors file into a sink. At most one tensor is asked for at a time.
 * @returns bytes written.
 * @throws `usage` when data doesn't match its entry; whatever the sink and the data functions throw.
 */
export async function streamSafetensors(
  sink: ByteSink,
  entries: readonly TensorEntry[],
  options: SafetensorsOptions = {},
): Promise<number> {
  const ordered = fileOrder(entries, options.order);
  const header = encodeHeader(ordered, options.metadata);
  await sink.write(header);
  let total = header.byteLength;
  for (const entry of ordered) {
    const data = await entry.data();
    const elements = elementCount(entry.shape);
    ensure(
      data.length === elements && data.constructor === typedArray(entry.dtype, 0).constructor,
      'usage',
      () =>
        `tensor ${entry.name}: expected ${elements} elements of ${entry.dtype}, found ${data.length} in a ${data.constructor.name}`,
    );
    const bytes = bytesOf(data);
    if (bytes.byteLength > 0) await sink.write(bytes);
    total += bytes.byteLength;
  }
  return total;
}

/** A whole safetensors file in memory; for small ones. */
export async function encodeSafetensors(
  entries: readonly TensorEntry[],
  options: SafetensorsOptions = {},
): Promise<Uint8Array> {
  const bytes = new Uint8Array(safetensorsBytes(entries, options));
  let at = 0;
  const sink: ByteSink = {
    write: (part) => {
      bytes.set(part, at);
      at += part.byteLength;
      return Promise.resolve();
    },
  };
  await streamSafetensors(sink, entries, options);
  return bytes;
}

/** A shard's file name: `model-00001-of-00003.safetensors` for index 0 of 3. */
export function shardName(index: number, count: number): string {
  const five = (n: number): string => String(n).padStart(5, '0');
  return `model-${five(index + 1)}-of-${five(count)}.safetensors`;
}

/**
 * The text of `model.safetensors.index.json`.
 * @param weightMap tensor name → shard file name. @param totalSize bytes of all tensors' data.
 */
export function encodeIndex(weightMap: ReadonlyMap<string, string>, totalSize: number): string {
  const sorted = [...weightMap].sort(([a], [b]) => (a < b ? -1 : a > b ? 1 : 0));
  return `${JSON.stringify({ metadata: { total_size: totalSize }, weight_map: Object.fromEntries(sorted) }, null, 2)}\n`;
}
