// safetensors: round trips, and files that lie.
import { readFileSync, readdirSync, writeFileSync } from 'node:fs';
import path from 'node:path';
import { describe, expect, it, vi } from 'vitest';
import { bytesPerElement, typedArray, type DType } from '../../../src/core/dtype.js';
import { Checkpoint, MAX_HEADER_BYTES, SafetensorsFile } from '../../../src/formats/safetensors.js';
import {
  encodeIndex,
  encodeSafetensors,
  shardName,
  type TensorEntry,
} from '../../../src/formats/safetensors-writer.js';
import { writeIndex, writeSafetensors } from '../../../src/formats/safetensors-writer.node.js';
import { memoryFiles, memorySource } from '../../../src/formats/source.js';
import { folderFiles, openFile } from '../../../src/formats/source.node.js';
import { expectError, rawSafetensors, temporaryFolder } from './helpers.js';

const DTYPES: DType[] = ['f64', 'f32', 'f16', 'bf16', 'i64', 'i32', 'i16', 'i8', 'u8'];

function entry(name: string, dtype: DType, shape: number[], start = 0): TensorEntry {
  const length = shape.reduce((a, b) => a * b, 1);
  const data = typedArray(dtype, length);
  for (let i = 0; i < length; i++) {
    if (data instanceof BigInt64Array) data[i] = BigInt(start + i);
    else data[i] = start + i;
  }
  return { name, dtype, shape, data: () => data };
}

const open = (bytes: Uint8Array): Promise<SafetensorsFile> =>
  SafetensorsFile.open(memorySource('enemy.safetensors', bytes));
const u8 = (begin: number, end: number, shape = [end - begin]): object => ({
  dtype: 'U8',
  shape,
  data_offsets: [begin, end],
});

describe('round trip', () => {
  it('keeps every element type, rank and order of names', async () => {
    const entries = [
      ...DTYPES.map((dtype, i) => entry(`t.${dtype}`, dtype, [2, 3], i)),
      entry('scalar', 'f32', [], 7),
      entry('empty', 'f16', [0, 4]),
      entry('10', 'i8', [3]),
      entry('ünïcode "quoted"', 'u8', [1]),
      entry('__proto__', 'u8', [2]),
    ];
    const file = await open(await encodeSafetensors(entries, { metadata: { made: 'by test' } }));
    expect(file.metadata).toEqual({ made: 'by test' });
    expect([...file.tensors.keys()].sort()).toEqual(entries.map((e) => e.name).sort());
    for (const { name, dtype, shape, data } of entries)
      expect(await file.read(name)).toEqual({ dtype, shape, data: await data() });
  });

  it('aligns every tensor to its elements and pads the header to 8', async () => {
    const bytes = await encodeSafetensors([entry('a', 'u8', [3]), entry('b', 'f64', [1]), entry('c', 'f16', [5])]);
    const header = Number(new DataView(bytes.buffer).getBigUint64(0, true));
    expect(header % 8).toBe(0);
    for (const tensor of (await open(bytes)).tensors.values())
      expect(tensor.begin % bytesPerElement(tensor.dtype ?? 'u8')).toBe(0);
  });

  it('gives the same bytes whatever the order of entries', async () => {
    const entries = [entry('b', 'f32', [2]), entry('a', 'f32', [2], 5), entry('c', 'i16', [1])];
    expect(await encodeSafetensors([...entries].reverse())).toEqual(await encodeSafetensors(entries));
  });

  it('reads rows of a table alone', async () => {
    const bytes = await encodeSafetensors([entry('x', 'u8', [5]), entry('table', 'f16', [100, 8])]);
    const source = memorySource('table', bytes);
    const read = vi.spyOn(source, 'read');
    const file = await SafetensorsFile.open(source);
    read.mockClear();
    const rows = await file.readRows('table', 10, 12);
    expect(rows.shape).toEqual([2, 8]);
    expect([...(rows.data as Uint16Array)]).toEqual(Array.from({ length: 16 }, (_, i) => 80 + i));
    expect(read.mock.calls.map(([, length]) => length)).toEqual([32]);
    expect((await file.readRows('table', 100, 100)).data.length).toBe(0);
    await expectError(() => file.readRows('table', 90, 101), 'tensor-shape', /rows 90 to 101 asked for, found 100/);
    await expectError(() => file.readRows('x', 0, 1), 'tensor-shape', /needs? a 2-D|need a 2-D/);
  });

  it('writes and reads from disk', async () => {
    const folder = temporaryFolder();
    const file = path.join(folder, 'model.safetensors');
    const entries = [entry('a', 'bf16', [300, 70]), entry('b', 'i32', [4])];
    const written = await writeSafetensors(file, entries);
    expect(written).toBe(readFileSync(file).byteLength);
    expect(new Uint8Array(readFileSync(file))).toEqual(await encodeSafetensors(entries));
    expect(readdirSync(folder)).toEqual(['model.safetensors']);
    const checkpoint = await Checkpoint.open(await folderFiles(folder));
    expect((await checkpoint.read('a')).data).toEqual(await entries[0].data());
    await checkpoint.close();
  });

  it('refuses data that does not match its entry', async () => {
    await expectError(
      () => encodeSafetensors([{ name: 'w', dtype: 'f32', shape: [2], data: () => new Float32Array(3) }]),
      'usage',
      /w: expected 2 elements of f32, found 3/,
    );
    await expectError(
      () => encodeSafetensors([{ name: 'w', dtype: 'f16', shape: [2], data: () => new Float32Array(2) }]),
      'usage',
      /Float32Array/,
    );
    await expectError(
      () => encodeSafetensors([entry('w', 'u8', [1]), entry('w', 'u8', [1])]),
      'usage',
      /under the name w/,
    );
  });
});

describe('files that lie', () => {
  it.each([
    ['empty file', new Uint8Array(0), /truncated: 0 bytes/],
    ['no room for the length', new Uint8Array(7), /truncated: 7 bytes/],
    ['header longer than the file', rawSafetensors({}, undefined, 1000n), /header claims 1000 bytes, the file has 10/],
    ['header that is no JSON', rawSafetensors('{"a": oops}'), /not valid JSON/],
    ['header that is a list', rawSafetensors('[]'), /not a JSON object/],
    ['header that is not UTF-8', new Uint8Array([2, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xfe]), /not UTF-8/],
    [
      'the same name twice',
      rawSafetensors(
        '{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}, "\\u0061":{"dtype":"U8","shape":[1],"data_offsets":[1,2]}}',
        new Uint8Array(2),
      ),
      /names "a" twice/,
    ],
    ['data cut off', rawSafetensors({ a: u8(0, 10) }, new Uint8Array(9)), /a claims bytes 0 to 10, the file has 9/],
    ['data left over', rawSafetensors({ a: u8(0, 10) }, new Uint8Array(11)), /1 bytes after the last tensor/],
    ['overlap', rawSafetensors({ a: u8(0, 6), b: u8(5, 10) }, new Uint8Array(10)), /tensor b overlaps/],
    ['the same bytes for two tensors', rawSafetensors({ a: u8(0, 6), b: u8(0, 6) }, new Uint8Array(6)), /overlaps/],
    ['hole', rawSafetensors({ a: u8(0, 4), b: u8(5, 10) }, new Uint8Array(10)), /hole of 1 bytes before tensor b/],
    [
      'end before begin',
      rawSafetensors({ a: { dtype: 'U8', shape: [0], data_offsets: [4, 2] } }, new Uint8Array(4)),
      /claims bytes 4 to 2/,
    ],
    [
      'negative offset',
      rawSafetensors({ a: { dtype: 'U8', shape: [1], data_offsets: [-1, 0] } }),
      /tensor a: data_offsets/,
    ],
    [
      'fractional shape',
      rawSafetensors({ a: { dtype: 'U8', shape: [1.5], data_offsets: [0, 1] } }, new Uint8Array(1)),
      /tensor a: shape/,
    ],
    [
      'size that is not shape times type',
      rawSafetensors({ a: { dtype: 'F32', shape: [2], data_offsets: [0, 4] } }, new Uint8Array(4)),
      /needs 8 bytes, its offsets give 4/,
    ],
    ['metadata that is no text', rawSafetensors({ __metadata__: { a: 1 } }), /__metadata__/],
    [
      'too many dimensions',
      rawSafetensors({ a: { dtype: 'U8', shape: new Array(17).fill(1), data_offsets: [0, 1] } }, new Uint8Array(1)),
      /tensor a: shape/,
    ],
    ['field missing', rawSafetensors({ a: { dtype: 'U8', shape: [1] } }, new Uint8Array(1)), /tensor a: data_offsets/],
  ])('%s', async (_, bytes, message) => {
    await expectError(() => open(bytes), 'file-corrupt', message, /fetch it again/);
  });

  it.each([
    ['huge header', rawSafetensors({}, undefined, BigInt(MAX_HEADER_BYTES) + 1n), /header claims 100000001 bytes/],
    ['absurd header', rawSafetensors({}, undefined, 2n ** 63n), /header claims 9223372036854775808 bytes/],
    [
      'huge shape',
      rawSafetensors({ a: { dtype: 'U8', shape: [2 ** 30, 2 ** 30], data_offsets: [0, 0] } }),
      /more than/,
    ],
  ])('%s, before anything is allocated', async (_, bytes, message) => {
    await expectError(() => open(bytes), 'limit-exceeded', message);
  });

  it('every truncation of a good file', async () => {
    const bytes = await encodeSafetensors([entry('a', 'f32', [3]), entry('b', 'u8', [2])]);
    for (let length = 0; length < bytes.length; length++)
      await expectError(() => open(bytes.slice(0, length)), 'file-corrupt', /./);
  });

  it('a file that shrinks after it was opened', async () => {
    const file = path.join(temporaryFolder(), 'model.safetensors');
    const bytes = await encodeSafetensors([entry('a', 'f32', [300])]);
    writeFileSync(file, bytes);
    const opened = await SafetensorsFile.open(await openFile(file));
    writeFileSync(file, bytes.slice(0, 100));
    await expectError(() => opened.read('a'), 'file-corrupt', /truncated/);
    await opened.close();
  });

  it('element types gyre lacks are named when they are read, not before', async () => {
    const file = await open(
      rawSafetensors(
        {
          ok: u8(0, 1),
          mask: { dtype: 'BOOL', shape: [2], data_offsets: [1, 3] },
          w: { dtype: 'F8_E4M3', shape: [1], data_offsets: [3, 4] },
        },
        new Uint8Array(4),
      ),
    );
    expect((await file.read('ok')).data.length).toBe(1);
    await expectError(() => file.read('mask'), 'unsupported', /tensor mask is BOOL/, /BF16/);
    await expectError(() => file.read('w'), 'unsupported', /tensor w is F8_E4M3/);
    await expectError(() => file.read('toString'), 'tensor-missing', /no tensor toString/);
  });

  it('closes the source when the header is wrong', async () => {
    const source = memorySource('x', new Uint8Array(3));
    const close = vi.spyOn(source, 'close');
    await expectError(() => SafetensorsFile.open(source), 'file-corrupt', /truncated/);
    expect(close).toHaveBeenCalledOnce();
  });
});

describe('checkpoint', () => {
  const shards = async (): Promise<Record<string, Uint8Array | string>> => ({
    [shardName(0, 2)]: await encodeSafetensors([entry('model.a.weight', 'f32', [2, 2])]),
    [shardName(1, 2)]: await encodeSafetensors([entry('model.b.weight', 'f32', [2], 9)]),
    'model.safetensors.index.json': encodeIndex(
      new Map([
        ['model.b.weight', shardName(1, 2)],
        ['model.a.weight', shardName(0, 2)],
      ]),
      24,
    ),
  });

  it('reads shards by their index', async () => {
    const checkpoint = await Checkpoint.open(memoryFiles('m', await shards()));
    expect([...checkpoint.names()].sort()).toEqual(['model.a.weight', 'model.b.weight']);
    expect(checkpoint.has('model.b.weight')).toBe(true);
    expect(checkpoint.info('model.a.weight').shape).toEqual([2, 2]);
    expect((await checkpoint.readRows('model.a.weight', 1, 2)).data).toEqual(Float32Array.of(2, 3));
    await expectError(() => checkpoint.read('other.a.weight'), 'tensor-missing', /alike: model\.a\.weight/);
  });

  it('writes the index that other libraries expect', async () => {
    const folder = temporaryFolder();
    await writeIndex(
      folder,
      new Map([
        ['b', 'y'],
        ['a', 'x'],
      ]),
      12,
    );
    const text = readFileSync(path.join(folder, 'model.safetensors.index.json'), 'utf8');
    expect(JSON.parse(text)).toEqual({ metadata: { total_size: 12 }, weight_map: { a: 'x', b: 'y' } });
    expect(shardName(0, 3)).toBe('model-00001-of-00003.safetensors');
  });

  it('names the shards that are not there', async () => {
    const files = await shards();
    delete files[shardName(1, 2)];
    await expectError(
      () => Checkpoint.open(memoryFiles('m', files)),
      'file-missing',
      /lacks 1 of 2 shards .* model-00002-of-00002/,
      /Fetch the missing/,
    );
  });

  it('notices an index that belongs to other shards', async () => {
    const files = await shards();
    files['model.safetensors.index.json'] = encodeIndex(new Map([['model.c.weight', shardName(0, 2)]]), 1);
    await expectError(
      () => Checkpoint.open(memoryFiles('m', files)),
      'file-corrupt',
      /places model\.c\.weight in model-00001/,
    );
  });

  it.each(['../secret.safetensors', '/etc/passwd', 'a/b.safetensors', '..', ''])(
    'keeps to its folder: %j',
    async (name) => {
      const files = { 'model.safetensors.index.json': JSON.stringify({ weight_map: { a: name } }) };
      await expectError(() => Checkpoint.open(memoryFiles('m', files)), 'file-corrupt', /plain file name/);
    },
  );

  it('says what is wrong with an index', async () => {
    await expectError(
      () => Checkpoint.open(memoryFiles('m', { 'model.safetensors.index.json': '{"weight_map": {"a": 1}}' })),
      'config-invalid',
      /weight_map\.a/,
    );
    await expectError(
      () => Checkpoint.open(memoryFiles('m', { 'model.safetensors.index.json': '{' })),
      'file-corrupt',
      /not valid JSON/,
    );
  });

  it('explains folders without safetensors', async () => {
    await expectError(
      () => Checkpoint.open(memoryFiles('m', { 'config.json': '{}' })),
      'file-missing',
      /found: config\.json/,
    );
    await expectError(
      () => Checkpoint.open(memoryFiles('m', { 'pytorch_model.bin': '' })),
      'file-missing',
      /pytorch_model/,
      /safetensors only/,
    );
  });
});
