// Where bytes come from: one file read by ranges, and the set of files that makes a model. Runs in browsers too.
import { GyreError, ensure } from '../core/errors.js';

/** Largest JSON or text file read whole (config, tokenizer, index), bytes. */
export const MAX_TEXT_BYTES = 256 * 1024 * 1024;

/** Largest single read, bytes: what one typed array of a JavaScript engine can hold. */
export const MAX_READ_BYTES = 4 * 1024 * 1024 * 1024;

/** A file that can be read by ranges. */
export interface FileSource {
  /** Path or URL, for messages. */
  readonly name: string;
  /** Bytes in the file. */
  size(): Promise<number>;
  /**
   * Exactly `length` bytes from `offset`, in a buffer of their own (byteOffset 0).
   * @throws `file-corrupt` when the file ends earlier, `limit-exceeded` above {@link MAX_READ_BYTES}.
   */
  read(offset: number, length: number): Promise<Uint8Array>;
  /** Like read, into memory the caller owns: fills all of `target`. */
  readInto?(offset: number, target: Uint8Array): Promise<void>;
  close(): Promise<void>;
}

/** The files of one model: a folder, a hub repository, or files picked in a browser. Names are flat, without folders. */
export interface ModelFiles {
  /** Folder or URL, for messages. */
  readonly name: string;
  /** File names, sorted. */
  list(): Promise<readonly string[]>;
  /** @throws `file-missing` when there is no such file. */
  open(name: string): Promise<FileSource>;
  /**
   * A whole text file as UTF-8.
   * @param limit bytes at most, by default {@link MAX_TEXT_BYTES}.
   * @throws `file-missing`, `limit-exceeded`, `file-corrupt` when it is not UTF-8.
   */
  readText(name: string, limit?: number): Promise<string>;
}

/** Throws unless `name` is a plain file name: no folders, nothing that leaves the model's folder. */
export function checkFileName(name: string): void {
  ensure(
    name !== '' && name !== '.' && name !== '..' && !/[/\\\0]/.test(name) && name.length <= 255,
    'file-corrupt',
    () => `expected a plain file name inside the model, found ${JSON.stringify(name.slice(0, 300))}`,
    'The file that names it (an index?) is damaged or not meant well: fetch the model again from a source you trust.',
  );
}

/** Throws unless a range lies inside a file and can be held in memory. */
export function checkRange(name: string, size: number, offset: number, length: number): void {
  ensure(
    Number.isSafeInteger(offset) && Number.isSafeInteger(length) && offset >= 0 && length >= 0,
    'usage',
    () => `${name}: a byte range needs whole non-negative numbers, found offset ${offset}, length ${length}`,
  );
  ensure(
    length <= MAX_READ_BYTES,
    'limit-exceeded',
    () => `${name}: one read of ${length} bytes is over the limit of ${MAX_READ_BYTES}`,
    'Read the tensor by rows instead of whole.',
  );
  if (offset + length > size) throw truncated(name, size, offset, length);
}

/** The error of a file that ends too early. */
export function truncated(name: string, size: number, offset: number, length: number): GyreError {
  return new GyreError(
    'file-corrupt',
    `${name} is truncated: expected bytes ${offset} to ${offset + length}, the file has ${size}`,
    { remedy: 'The download or copy was probably cut short: fetch the file again.' },
  );
}

/** The error of a file that a model lacks. */
export function missingFile(model: string, name: string, present: readonly string[]): GyreError {
  const shown = present.slice(0, 20).join(', ') + (present.length > 20 ? ', …' : '');
  return new GyreError('file-missing', `${model} has no ${name}; found: ${shown || 'nothing'}`, {
    remedy: 'Check that the folder or repository is a complete Hugging Face model, and fetch what is missing.',
  });
}

/** A file in memory. */
export function memorySource(name: string, bytes: Uint8Array): FileSource {
  return {
    name,
    size: () => Promise.resolve(bytes.byteLength),
    read: async (offset, length) => {
      checkRange(name, bytes.byteLength, offset, length);
      return bytes.slice(offset, offset + length);
    },
    readInto: async (offset, target) => {
      checkRange(name, bytes.byteLength, offset, target.byteLength);
      target.set(bytes.subarray(offset, offset + target.byteLength));
    },
    close: () => Promise.resolve(),
  };
}

/** Reads a text file through its source, with a limit checked before anything is allocated. */
export async function readTextFrom(source: FileSource, limit = MAX_TEXT_BYTES): Promise<string> {
  const size = await source.size();
  ensure(
    size <= limit,
    'limit-exceeded',
    () => `${source.name} has ${size} bytes, the limit for this file is ${limit}`,
    'A file of this kind is never that large: check that it is what its name says.',
  );
  const bytes = await source.read(0, size);
  try {
    return new TextDecoder('utf-8', { fatal: true }).decode(bytes);
  } catch (cause) {
    throw new GyreError('file-corrupt', `${source.name} is not UTF-8 text`, {
      remedy: 'Fetch the file again.',
      cause,
    });
  }
}

/** ModelFiles over named sources that open themselves: the common part of every implementation. */
export function modelFiles(
  name: string,
  list: () => Promise<readonly string[]>,
  openFile: (file: string) => Promise<FileSource>,
): ModelFiles {
  const open = async (file: string): Promise<FileSource> => {
    checkFileName(file);
    const present = await list();
    if (!present.includes(file)) throw missingFile(name, file, present);
    return openFile(file);
  };
  return {
    name,
    list,
    open,
    readText: async (file, limit) => {
      const source = await open(file);
      try {
        return await readTextFrom(source, limit);
      } finally {
        await source.close();
      }
    },
  };
}

/** A model in memory: text or bytes by file name. */
export function memoryFiles(name: string, files: Readonly<Record<string, Uint8Array | string>>): ModelFiles {
  const entries = new Map(Object.entries(files));
  return modelFiles(
    name,
    () => Promise.resolve([...entries.keys()].sort()),
    (file) => {
      const data = entries.get(file) ?? '';
      return Promise.resolve(memorySource(file, typeof data === 'string' ? new TextEncoder().encode(data) : data));
    },
  );
}
