// Rows of a data set from the bytes of a file: JSON lines, JSON, CSV, Parquet, plain lines; the first three also gzipped.
import { parquetMetadataAsync, parquetReadObjects } from 'hyparquet';
import { compressors } from 'hyparquet-compressors';
import { GyreError, ensure } from '../core/errors.js';
import { TASK_LIMITS } from './definition.js';

/** A row: values by column. Integers of 64 bits become numbers. */
export type Row = Readonly<Record<string, unknown>>;

/** Options of {@link readRows}. */
export interface ReadRowsOptions {
  /** Rows at most; default all. */
  readonly limit?: number;
  /** Column that plain lines of text become; default `text`. */
  readonly textColumn?: string;
}

type Reader = (bytes: Uint8Array, name: string, options: Required<ReadRowsOptions>) => Row[] | Promise<Row[]>;

/** Formats by file name ending. */
const READERS: readonly (readonly [endings: RegExp, read: Reader])[] = [
  [/\.(jsonl|ndjson)$/i, (bytes, name, { limit }) => parseLines(decode(bytes, name), name, limit)],
  [/\.json$/i, (bytes, name, { limit }) => parseJsonRows(decode(bytes, name), name, limit)],
  [/\.csv$/i, (bytes, name, { limit }) => parseCsv(decode(bytes, name), name, limit)],
  [/\.parquet$/i, readParquet],
  [/\.(txt|raw|tokens)$/i, (bytes, name, options) => textLines(decode(bytes, name), options)],
];

/** Endings that {@link readRows} knows, for messages and for looking in folders. */
export const DATA_ENDINGS = [
  '.parquet',
  '.jsonl',
  '.json',
  '.csv',
  '.jsonl.gz',
  '.json.gz',
  '.txt',
  '.raw',
  '.tokens',
] as const;

/**
 * Rows of a data file; its name decides the format.
 * @throws GyreError `unsupported` for an unknown ending, `file-corrupt` naming file and line, `limit-exceeded`.
 */
export async function readRows(bytes: Uint8Array, name: string, options: ReadRowsOptions = {}): Promise<Row[]> {
  const { limit = Infinity, textColumn = 'text' } = options;
  checkBytes(bytes.byteLength, name);
  const zipped = /\.gz$/i.test(name);
  const plain = zipped ? name.slice(0, -3) : name;
  const reader = READERS.find(([endings]) => endings.test(plain))?.[1];
  if (!reader || (zipped && /\.parquet$/i.test(plain))) {
    throw new GyreError('unsupported', `${name} is in no format that gyre reads`, {
      remedy: `Give a file that ends in ${DATA_ENDINGS.join(', ')}.`,
    });
  }
  const rows = await reader(zipped ? await gunzip(bytes, name) : bytes, name, { limit, textColumn });
  ensure(rows.length <= TASK_LIMITS.rows, 'limit-exceeded', () => `${name} has more than ${TASK_LIMITS.rows} rows`);
  return rows;
}

function checkBytes(bytes: number, name: string): void {
  ensure(
    bytes <= TASK_LIMITS.dataBytes,
    'limit-exceeded',
    () => `${name} has ${bytes} bytes or more, over the limit of ${TASK_LIMITS.dataBytes}`,
    'Cut the rows you need out of it.',
  );
}

function corrupt(name: string, what: string, cause?: unknown): GyreError {
  return new GyreError('file-corrupt', `${name}: ${what}`, {
    remedy: 'Fetch the file again; if you made it, mend it.',
    cause,
  });
}

function decode(bytes: Uint8Array, name: string): string {
  try {
    return new TextDecoder('utf-8', { fatal: true }).decode(bytes);
  } catch (cause) {
    throw corrupt(name, 'not UTF-8 text', cause);
  }
}

/** Unpacks gzip, stopping at the limit: a small file may hold a very large one. */
async function gunzip(bytes: Uint8Array, name: string): Promise<Uint8Array> {
  const chunks: Uint8Array[] = [];
  let size = 0;
  try {
    const stream = new Blob([new Uint8Array(bytes)]).stream().pipeThrough(new DecompressionStream('gzip'));
    const reader = stream.getReader();
    for (;;) {
      const { done, value } = await reader.read();
      if (done) break;
      size += value.byteLength;
      checkBytes(size, name);
      chunks.push(value);
    }
  } catch (cause) {
    if (cause instanceof GyreError) throw cause;
    throw corrupt(name, 'the gzip stream is damaged or cut short', cause);
  }
  const out = new Uint8Array(size);
  let at = 0;
  for (const chunk of chunks) {
    out.set(chunk, at);
    at += chunk.byteLength;
  }
  return out;
}

function parseLines(text: string, name: string, limit: number): Row[] {
  const rows: Row[] = [];
  let number = 0;
  for (const line of text.split('\n')) {
    number++;
    if (rows.length >= limit) break;
    if (line.trim() === '') continue;
    let value: unknown;
    try {
      value = JSON.parse(line);
    } catch (cause) {
      throw corrupt(name, `line ${number} is not JSON`, cause);
    }
    rows.push(asRow(value, `${name}, line ${number}`));
  }
  return rows;
}

function parseJsonRows(text: string, name: string, limit: number): Row[] {
  // The hub has JSON lines under the ending .json too.
  if (!/^\s*\[/.test(text)) return parseLines(text, name, limit);
  let value: unknown;
  try {
    value = JSON.parse(text);
  } catch (cause) {
    throw corrupt(name, `not JSON (${cause instanceof Error ? cause.message : ''})`, cause);
  }
  return (value as unknown[]).slice(0, limit).map((row, i) => asRow(row, `${name}, entry ${i + 1}`));
}

function asRow(value: unknown, where: string): Row {
  if (typeof value === 'object' && value !== null && !Array.isArray(value)) return value as Row;
  throw corrupt(where, 'expected an object with a field per column');
}

/** RFC 4180: quoted fields may hold commas, line ends and doubled quotes. The first record names the columns. */
function parseCsv(text: string, name: string, limit: number): Row[] {
  const records: string[][] = [];
  let record: string[] = [];
  let field = '';
  let quoted = false;
  let at = 0;
  const endRecord = (): void => {
    record.push(field);
    field = '';
    if (record.length > 1 || record[0] !== '') records.push(record);
    record = [];
  };
  for (; at < text.length && records.length <= limit; at++) {
    const c = text[at];
    if (quoted) {
      if (c !== '"') field += c;
      else if (text[at + 1] === '"') field += text[at++];
      else quoted = false;
    } else if (c === '"' && field === '') quoted = true;
    else if (c === ',') {
      record.push(field);
      field = '';
    } else if (c === '\n' || c === '\r') {
      if (c === '\r' && text[at + 1] === '\n') at++;
      endRecord();
    } else field += c;
  }
  if (quoted) throw corrupt(name, 'a quoted field is never closed: the file is cut short');
  if (field !== '' || record.length > 0) endRecord();
  const [header = [], ...body] = records;
  return body.slice(0, limit).map((values, i) => {
    if (values.length !== header.length)
      throw corrupt(name, `record ${i + 2} has ${values.length} fields, the header ${header.length}`);
    return Object.fromEntries(header.map((column, c) => [column, values[c]]));
  });
}

/**
 * Lines of plain text as rows of one column, the way the hub holds WikiText: every line with its line end, lines of
 * nothing but spaces as the empty text.
 */
function textLines(text: string, { limit, textColumn }: Required<ReadRowsOptions>): Row[] {
  const lines = text.split(/(?<=\n)/);
  return lines.slice(0, limit).map((line) => ({ [textColumn]: line.trim() === '' ? '' : line }));
}

async function readParquet(bytes: Uint8Array, name: string, { limit }: Required<ReadRowsOptions>): Promise<Row[]> {
  const file = {
    byteLength: bytes.byteLength,
    // A copy of the range alone: a Buffer's own slice would be a view, and its `buffer` all there is around it.
    slice: (begin: number, end?: number): ArrayBuffer => Uint8Array.prototype.slice.call(bytes, begin, end).buffer,
  };
  try {
    const metadata = await parquetMetadataAsync(file);
    const count = Number(metadata.num_rows);
    ensure(count <= TASK_LIMITS.rows, 'limit-exceeded', () => `${name} has more than ${TASK_LIMITS.rows} rows`);
    const unpacked = metadata.row_groups.reduce((sum, group) => sum + Number(group.total_byte_size), 0);
    checkBytes(unpacked, name);
    const rows = await parquetReadObjects({ file, metadata, compressors, rowEnd: Math.min(count, limit) });
    return rows.map((row) => plainValue(row) as Row);
  } catch (cause) {
    if (cause instanceof GyreError) throw cause;
    throw corrupt(name, `not a whole Parquet file (${cause instanceof Error ? cause.message : ''})`, cause);
  }
}

/** Numbers for 64-bit integers, recursively. */
function plainValue(value: unknown): unknown {
  if (typeof value === 'bigint') return Number(value);
  if (Array.isArray(value)) return value.map(plainValue);
  if (ArrayBuffer.isView(value) && !(value instanceof DataView)) return Array.from(value as Int32Array, plainValue);
  if (typeof value === 'object' && value !== null && !(value instanceof Date)) {
    return Object.fromEntries(Object.entries(value).map(([key, entry]) => [key, plainValue(entry)]));
  }
  return value;
}
