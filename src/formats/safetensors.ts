// safetensors files and sharded checkpoints: headers checked before anything is believed, tensors read one at a time.
//
// Layout of a file: 8 bytes N (little endian), N bytes of JSON {name: {dtype, shape, data_offsets: [begin, end]}}, then
// the data. Offsets count from the end of the header; tensors lie back to back, without holes. Everything is little endian.
import { z } from 'zod';
import { bytesPerElement, typedArray, type DType } from '../core/dtype.js';
import { GyreError, ensure } from '../core/errors.js';
import type { HostTensor } from '../core/tensor.js';
import { parseJson, validate } from './huggingface-config.js';
import { checkFileName, missingFile, type FileSource, type ModelFiles } from './source.js';

/** Largest header, bytes (the limit of the reference implementation). */
export const MAX_HEADER_BYTES = 100_000_000;
/** Most tensors in one file or checkpoint. */
export const MAX_TENSORS = 1_000_000;
/** Most dimensions of a tensor. */
export const MAX_RANK = 16;
/** Most elements of a tensor. */
export const MAX_ELEMENTS = 2 ** 40;
/** Most shards of a checkpoint. */
export const MAX_SHARDS = 4096;
/** Longest tensor name, characters. */
export const MAX_NAME_LENGTH = 1024;
/** Largest model.safetensors.index.json, bytes. */
export const MAX_INDEX_BYTES = 100_000_000;

/** File of a checkpoint in one piece. */
export const SINGLE_FILE = 'model.safetensors';
/** Index of a checkpoint in shards. */
export const INDEX_FILE = 'model.safetensors.index.json';

const DTYPES: Readonly<Record<string, DType>> = {
  F64: 'f64',
  F32: 'f32',
  F16: 'f16',
  BF16: 'bf16',
  I64: 'i64',
  I32: 'i32',
  I16: 'i16',
  I8: 'i8',
  U8: 'u8',
};
/** Element types of the format that gyre can't hold, with their bytes, so that sizes are checked all the same. */
const OTHER_DTYPES: Readonly<Record<string, number>> = {
  BOOL: 1,
  F8_E4M3: 1,
  F8_E5M2: 1,
  F8_E8M0: 1,
  U16: 2,
  U32: 4,
  U64: 8,
  C64: 8,
};

/** What a header says of a tensor. */
export interface StoredTensor {
  /** As spelled in the file, e.g. `BF16`. */
  readonly storedDtype: string;
  /** Undefined when gyre can't read this element type. */
  readonly dtype: DType | undefined;
  readonly shape: readonly number[];
  /** Bytes [begin, end) from the start of the data. */
  readonly begin: number;
  readonly end: number;
}

/** A tensor that gyre can read. */
export interface TensorInfo extends StoredTensor {
  readonly dtype: DType;
}

const entrySchema = z.object({
  dtype: z.string(),
  shape: z.array(z.number().int().nonnegative()).max(MAX_RANK),
  data_offsets: z.tuple([z.number().int().nonnegative(), z.number().int().nonnegative()]),
});
const metadataSchema = z.record(z.string(), z.string());

function corrupt(file: string, what: string): GyreError {
  return new GyreError('file-corrupt', `${file}: ${what}`, {
    remedy: 'The file is damaged or was not written by a safetensors library: fetch it again.',
  });
}

/**
 * Parses and checks the JSON header of a safetensors file.
 * @param dataBytes bytes after the header.
 * @throws `file-corrupt`, `limit-exceeded`.
 */
export function parseHeader(
  text: string,
  dataBytes: number,
  file: string,
): { tensors: Map<string, StoredTensor>; metadata: Record<string, string> } {
  let json: unknown;
  try {
    json = JSON.parse(text) as unknown;
  } catch (cause) {
    throw new GyreError('file-corrupt', `${file}: the header is not valid JSON`, {
      remedy: 'The file is damaged or no safetensors file at all: fetch it again.',
      cause,
    });
  }
  if (typeof json !== 'object' || json === null || Array.isArray(json)) {
    throw corrupt(file, 'the header is not a JSON object');
  }
  const duplicate = duplicateKey(text);
  if (duplicate !== undefined) throw corrupt(file, `the header names ${JSON.stringify(duplicate)} twice`);
  const entries = Object.entries(json);
  ensure(
    entries.length <= MAX_TENSORS + 1,
    'limit-exceeded',
    () => `${file} has ${entries.length} tensors, the limit is ${MAX_TENSORS}`,
    'A model has far fewer: check the file.',
  );
  let metadata: Record<string, string> = {};
  const tensors = new Map<string, StoredTensor>();
  for (const [name, value] of entries) {
    if (name === '__metadata__') {
      const parsed = metadataSchema.safeParse(value);
      if (!parsed.success) throw corrupt(file, '__metadata__ is not a map of texts');
      metadata = parsed.data;
      continue;
    }
    if (name.length > MAX_NAME_LENGTH) throw corrupt(file, `a tensor's name has ${name.length} characters`);
    const parsed = entrySchema.safeParse(value);
    if (!parsed.success) {
      const issue = parsed.error.issues[0];
      throw corrupt(file, `tensor ${name}: ${issue?.path.map(String).join('.') ?? ''}: ${issue?.message ?? ''}`);
    }
    const { dtype: storedDtype, shape, data_offsets } = parsed.data;
    const [begin, end] = data_offsets;
    let elements = 1;
    for (const n of shape) {
      elements *= n;
      ensure(
        elements <= MAX_ELEMENTS,
        'limit-exceeded',
        () => `${file}: tensor ${name} of shape [${shape.join(', ')}] has more than ${MAX_ELEMENTS} elements`,
        'No weight is that large: check the file.',
      );
    }
    if (begin > end || end > dataBytes) {
      throw corrupt(
        file,
        `tensor ${name} claims bytes ${begin} to ${end}, the file has ${dataBytes} bytes of data (truncated, or its header lies)`,
      );
    }
    const dtype = Object.hasOwn(DTYPES, storedDtype) ? DTYPES[storedDtype] : undefined;
    const bytes = dtype
      ? bytesPerElement(dtype)
      : Object.hasOwn(OTHER_DTYPES, storedDtype)
        ? OTHER_DTYPES[storedDtype]
        : undefined;
    if (bytes !== undefined && end - begin !== elements * bytes) {
      throw corrupt(
        file,
        `tensor ${name}: ${storedDtype} of shape [${shape.join(', ')}] needs ${elements * bytes} bytes, its offsets give ${end - begin}`,
      );
    }
    tensors.set(name, { storedDtype, dtype, shape, begin, end });
  }
  const byPlace = [...tensors].sort((a, b) => a[1].begin - b[1].begin || a[1].end - b[1].end);
  let at = 0;
  for (const [name, tensor] of byPlace) {
    if (tensor.begin < at)
      throw corrupt(file, `tensor ${name} overlaps the one before it (bytes ${tensor.begin} < ${at})`);
    if (tensor.begin > at) throw corrupt(file, `a hole of ${tensor.begin - at} bytes before tensor ${name}`);
    at = tensor.end;
  }
  if (at !== dataBytes) throw corrupt(file, `${dataBytes - at} bytes after the last tensor belong to none`);
  return { tensors, metadata };
}

/** The first key of the outermost object that occurs twice, which JSON.parse would hide. The text is known to be JSON. */
function duplicateKey(text: string): string | undefined {
  const seen = new Set<string>();
  let depth = 0;
  let i = 0;
  while (i < text.length) {
    const c = text.charCodeAt(i);
    if (c === 0x22) {
      let end = i + 1;
      while (text.charCodeAt(end) !== 0x22) end += text.charCodeAt(end) === 0x5c ? 2 : 1;
      if (depth === 1) {
        let next = end + 1;
        while (text.charCodeAt(next) <= 0x20) next++;
        if (text.charCodeAt(next) === 0x3a) {
          const key = JSON.parse(text.slice(i, end + 1)) as string;
          if (seen.has(key)) return key;
          seen.add(key);
        }
      }
      i = end;
    } else if (c === 0x7b || c === 0x5b) depth++;
    else if (c === 0x7d || c === 0x5d) depth--;
    i++;
  }
  return undefined;
}

/** One safetensors file, open for reading. Memory is bounded by the header and the tensor (or rows) being read. */
export class SafetensorsFile {
  readonly tensors: ReadonlyMap<string, StoredTensor>;
  readonly metadata: Readonly<Record<string, string>>;
  readonly #source: FileSource;
  readonly #dataStart: number;

  private constructor(
    source: FileSource,
    dataStart: number,
    tensors: ReadonlyMap<string, StoredTensor>,
    metadata: Readonly<Record<string, string>>,
  ) {
    this.#source = source;
    this.#dataStart = dataStart;
    this.tensors = tensors;
    this.metadata = metadata;
  }

  /**
   * Reads and checks the header; closes the source when it is wrong.
   * @throws `file-corrupt` (truncated, offsets that lie, overlaps, holes, duplicates), `limit-exceeded`.
   */
  static async open(source: FileSource): Promise<SafetensorsFile> {
    try {
      const size = await source.size();
      if (size < 8) throw corrupt(source.name, `truncated: ${size} bytes, a header needs at least 8`);
      const lengthBytes = await source.read(0, 8);
      const length = new DataView(lengthBytes.buffer, lengthBytes.byteOffset).getBigUint64(0, true);
      ensure(
        length <= MAX_HEADER_BYTES,
        'limit-exceeded',
        () => `${source.name}: the header claims ${length} bytes, the limit is ${MAX_HEADER_BYTES}`,
        'Either this is no safetensors file or it is damaged: fetch it again.',
      );
      const headerBytes = Number(length);
      if (8 + headerBytes > size) {
        throw corrupt(source.name, `truncated: the header claims ${headerBytes} bytes, the file has ${size}`);
      }
      let text: string;
      try {
        text = new TextDecoder('utf-8', { fatal: true }).decode(await source.read(8, headerBytes));
      } catch (cause) {
        if (cause instanceof GyreError) throw cause;
        throw corrupt(source.name, 'the header is not UTF-8');
      }
      const { tensors, metadata } = parseHeader(text, size - 8 - headerBytes, source.name);
      return new SafetensorsFile(source, 8 + headerBytes, tensors, metadata);
    } catch (error) {
      await source.close();
      throw error;
    }
  }

  get name(): string {
    return this.#source.name;
  }

  /**
   * What is known of a tensor that gyre can read.
   * @throws `tensor-missing`; `unsupported` for element types such as BOOL and F8.
   */
  info(name: string): TensorInfo {
    const tensor = this.tensors.get(name);
    if (!tensor) throw missingTensor(name, this.#source.name, this.tensors.keys());
    return readable(name, this.#source.name, tensor);
  }

  /**
   * A whole tensor.
   * @throws `tensor-missing`, `unsupported`, `file-corrupt` when the file changed and is now shorter, `limit-exceeded`
   * when it doesn't fit one typed array.
   */
  async read(name: string): Promise<HostTensor> {
    const info = this.info(name);
    return this.#slice(info, info.shape, info.begin, info.end);
  }

  /**
   * Rows [begin, end) of a 2-D tensor: [end − begin, columns].
   * @throws `tensor-shape` when it is not 2-D or has fewer rows; else like {@link read}.
   */
  async readRows(name: string, begin: number, end: number): Promise<HostTensor> {
    const info = this.info(name);
    const [rows, columns] = info.shape;
    ensure(
      info.shape.length === 2,
      'tensor-shape',
      () => `${name}: rows need a 2-D tensor, found shape [${info.shape.join(', ')}]`,
    );
    ensure(
      Number.isInteger(begin) && Number.isInteger(end) && begin >= 0 && begin <= end && end <= rows,
      'tensor-shape',
      () => `${name}: rows ${begin} to ${end} asked for, found ${rows}`,
    );
    const rowBytes = columns * bytesPerElement(info.dtype);
    return this.#slice(info, [end - begin, columns], info.begin + begin * rowBytes, info.begin + end * rowBytes);
  }

  close(): Promise<void> {
    return this.#source.close();
  }

  async #slice(info: TensorInfo, shape: readonly number[], begin: number, end: number): Promise<HostTensor> {
    const bytes = await this.#source.read(this.#dataStart + begin, end - begin);
    const size = bytesPerElement(info.dtype);
    const aligned = bytes.byteOffset % size === 0 ? bytes : bytes.slice();
    return {
      dtype: info.dtype,
      shape,
      data: typedArray(info.dtype, (end - begin) / size, aligned.buffer, aligned.byteOffset),
    };
  }
}

function readable(name: string, file: string, tensor: StoredTensor): TensorInfo {
  if (tensor.dtype) return tensor as TensorInfo;
  throw new GyreError('unsupported', `${file}: tensor ${name} is ${tensor.storedDtype}, which gyre can't read`, {
    remedy: `Use a checkpoint in ${Object.keys(DTYPES).join(', ')} (for a model: the bf16, f16 or f32 original).`,
  });
}

function missingTensor(name: string, where: string, names: Iterable<string>): GyreError {
  const tail = name.split('.').slice(-2).join('.');
  const alike: string[] = [];
  for (const other of names) {
    if (other.endsWith(tail)) alike.push(other);
    if (alike.length === 3) break;
  }
  return new GyreError(
    'tensor-missing',
    `${where} has no tensor ${name}${alike.length ? `; alike: ${alike.join(', ')}` : ''}`,
    {
      remedy: 'Check that the checkpoint is complete and that config.json belongs to it.',
    },
  );
}

const indexSchema = z.object({
  metadata: z.looseObject({}).optional(),
  weight_map: z.record(z.string(), z.string()),
});

/** What models are read from: a {@link Checkpoint}, or something that answers like one. */
export type TensorReader = Pick<Checkpoint, 'name' | 'has' | 'names' | 'info' | 'read' | 'readRows' | 'close'>;

/** A model's tensors, in one file or in shards, found by name in constant time. */
export class Checkpoint {
  readonly #name: string;
  readonly #where: ReadonlyMap<string, SafetensorsFile>;
  readonly #shards: readonly SafetensorsFile[];

  private constructor(name: string, where: ReadonlyMap<string, SafetensorsFile>, shards: readonly SafetensorsFile[]) {
    this.#name = name;
    this.#where = where;
    this.#shards = shards;
  }

  /**
   * Opens `model.safetensors.index.json` with its shards, or `model.safetensors`, and reads all headers (no data).
   * @throws `file-missing` when neither or a shard is there, `file-corrupt` when index and shards disagree.
   */
  static async open(files: ModelFiles): Promise<Checkpoint> {
    const present = await files.list();
    const shards: SafetensorsFile[] = [];
    try {
      if (present.includes(INDEX_FILE)) {
        const raw = parseJson(await files.readText(INDEX_FILE, MAX_INDEX_BYTES), `${INDEX_FILE} of ${files.name}`);
        const { weight_map: weightMap } = validate(indexSchema, raw, `${INDEX_FILE} of ${files.name}`);
        const shardNames = [...new Set(Object.values(weightMap))].sort();
        ensure(
          shardNames.length <= MAX_SHARDS,
          'limit-exceeded',
          () => `${INDEX_FILE} of ${files.name} names ${shardNames.length} shards, the limit is ${MAX_SHARDS}`,
        );
        shardNames.forEach(checkFileName);
        const missing = shardNames.filter((shard) => !present.includes(shard));
        if (missing.length > 0) {
          throw new GyreError(
            'file-missing',
            `${files.name} lacks ${missing.length} of ${shardNames.length} shards named by ${INDEX_FILE}: ${missing.slice(0, 5).join(', ')}${missing.length > 5 ? ', …' : ''}`,
            { remedy: 'Fetch the missing files into the same folder.' },
          );
        }
        const byName = new Map<string, SafetensorsFile>();
        for (const shard of shardNames) {
          const file = await SafetensorsFile.open(await files.open(shard));
          shards.push(file);
          byName.set(shard, file);
        }
        const where = new Map<string, SafetensorsFile>();
        for (const [tensor, shard] of Object.entries(weightMap)) {
          const file = byName.get(shard);
          if (!file?.tensors.has(tensor)) {
            throw new GyreError(
              'file-corrupt',
              `${INDEX_FILE} of ${files.name} places ${tensor} in ${shard}, which lacks it`,
              {
                remedy: 'The index and the shards belong to different versions: fetch all of them again.',
              },
            );
          }
          where.set(tensor, file);
        }
        return new Checkpoint(files.name, where, shards);
      }
      if (!present.includes(SINGLE_FILE)) {
        const error = missingFile(files.name, `${SINGLE_FILE} or ${INDEX_FILE}`, present);
        if (!present.some((name) => /\.(bin|pt|pth|gguf)$/.test(name))) throw error;
        throw new GyreError('file-missing', error.message, {
          remedy:
            'gyre reads safetensors only: use a revision of the model that has .safetensors files, or convert it.',
        });
      }
      const file = await SafetensorsFile.open(await files.open(SINGLE_FILE));
      shards.push(file);
      return new Checkpoint(files.name, new Map([...file.tensors.keys()].map((name) => [name, file])), shards);
    } catch (error) {
      await Promise.all(shards.map((shard) => shard.close()));
      throw error;
    }
  }

  /** Folder or URL, for messages. */
  get name(): string {
    return this.#name;
  }

  has(name: string): boolean {
    return this.#where.has(name);
  }

  /** Names of all tensors. */
  names(): IterableIterator<string> {
    return this.#where.keys();
  }

  /** @throws `tensor-missing`, `unsupported`. */
  info(name: string): TensorInfo {
    return this.#file(name).info(name);
  }

  /** The tensor, whole; see {@link SafetensorsFile.read}. */
  read(name: string): Promise<HostTensor> {
    return this.#file(name).read(name);
  }

  /** Rows [begin, end) of a 2-D tensor; see {@link SafetensorsFile.readRows}. */
  readRows(name: string, begin: number, end: number): Promise<HostTensor> {
    return this.#file(name).readRows(name, begin, end);
  }

  async close(): Promise<void> {
    await Promise.all(this.#shards.map((shard) => shard.close()));
  }

  #file(name: string): SafetensorsFile {
    const file = this.#where.get(name);
    if (!file) throw missingTensor(name, this.#name, this.#where.keys());
    return file;
  }
}
