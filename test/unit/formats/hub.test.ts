// Models by folder and by hub id, against a hub of our own on this machine.
import { existsSync, mkdirSync, readFileSync, readdirSync, writeFileSync } from 'node:fs';
import path from 'node:path';
import { beforeEach, describe, expect, it, onTestFinished, vi } from 'vitest';
import { lockFolder } from '../../../src/formats/atomic.node.js';
import { datasetFile } from '../../../src/formats/hub-dataset.node.js';
import { hubCacheDir } from '../../../src/formats/hub-request.node.js';
import { isNeeded, resolveModel, type ResolveOptions } from '../../../src/formats/hub.node.js';
import { Checkpoint } from '../../../src/formats/safetensors.js';
import { encodeIndex, encodeSafetensors } from '../../../src/formats/safetensors-writer.js';
import { httpSource } from '../../../src/formats/source.web.js';
import { digest, fakeHub, MEMBER_TOKEN, type FakeFiles, type FakeHub } from '../../support/fake-hub.js';
import { expectError, temporaryFolder } from './helpers.js';

const COMMIT = 'c0ffee'.padEnd(40, '0');
const ID = 'owner/tiny';

const text = (value: string): Uint8Array => new TextEncoder().encode(value);

async function modelFiles(): Promise<FakeFiles> {
  const shard = (name: string): Promise<Uint8Array> =>
    encodeSafetensors([{ name, dtype: 'f32', shape: [5000], data: () => new Float32Array(5000).fill(name.length) }]);
  return {
    'config.json': text('{"model_type":"llama"}'),
    'tokenizer.json': text('{}'),
    'README.md': text('# no need'),
    'model-00001-of-00002.safetensors': await shard('a'),
    'model-00002-of-00002.safetensors': await shard('bb'),
    'extra.safetensors': await shard('ccc'),
    'model.safetensors.index.json': text(
      encodeIndex(
        new Map([
          ['a', 'model-00001-of-00002.safetensors'],
          ['bb', 'model-00002-of-00002.safetensors'],
        ]),
        40000,
      ),
    ),
  };
}

/** A hub with one model, its files by name, and options that keep to it and to a cache of the test's own. */
async function setUp(
  access: 'public' | 'gated' | 'private' = 'public',
): Promise<{ hub: FakeHub; files: FakeFiles; options: ResolveOptions; storage: string }> {
  const files = await modelFiles();
  const hub = await fakeHub([
    { kind: 'model', name: ID, commits: { [COMMIT]: files }, refs: { main: COMMIT }, access },
  ]);
  const cacheDir = temporaryFolder();
  return {
    hub,
    files,
    options: { hubUrl: hub.url, cacheDir, retryDelay: 1 },
    storage: path.join(cacheDir, 'models--owner--tiny'),
  };
}

beforeEach(() => {
  for (const name of [
    'HF_TOKEN',
    'HUGGING_FACE_HUB_TOKEN',
    'HF_ENDPOINT',
    'HF_HUB_OFFLINE',
    'HF_HUB_CACHE',
    'HUGGINGFACE_HUB_CACHE',
  ])
    vi.stubEnv(name, undefined);
  vi.stubEnv('HF_HOME', path.join(temporaryFolder(), 'home'));
  onTestFinished(() => void vi.unstubAllEnvs());
});

describe('folders', () => {
  it('win over hub ids', async () => {
    const folder = temporaryFolder();
    writeFileSync(path.join(folder, 'config.json'), '{}');
    const found = await resolveModel(folder);
    expect(found).toMatchObject({ folder, source: 'folder' });
    expect(await found.files.list()).toEqual(['config.json']);
    expect(await found.files.readText('config.json')).toBe('{}');
    await expectError(
      () => found.files.readText('config.json', 1),
      'limit-exceeded',
      /2 bytes, the limit for this file is 1/,
    );
    await expectError(() => found.files.open('x.json'), 'file-missing', /no x\.json; found: config\.json/);
    await expectError(() => found.files.open('../x'), 'file-corrupt', /plain file name/);
    await expectError(
      () => resolveModel(path.join(folder, 'config.json')),
      'not-found',
      /expected a model folder, found a file/,
    );
  });

  it('that are not there and can be no hub id', async () => {
    await expectError(
      () => resolveModel('./no/such/folder'),
      'not-found',
      /no folder .*no\/such\/folder, and .* can't be a hub id/,
      /Qwen/,
    );
    await expectError(() => resolveModel(''), 'usage', /no model/);
    await expectError(() => resolveModel('owner/tiny', { revision: '../x', offline: true }), 'usage', /revision/);
  });
});

describe('hub', () => {
  it('fetches what is needed, once, into the usual cache', async () => {
    const { hub, files, options, storage } = await setUp();
    hub.pageSize = 2;
    const events: number[] = [];
    const found = await resolveModel(ID, { ...options, onProgress: ({ done, total }) => events.push(done / total) });
    expect(found).toMatchObject({ source: 'hub', commit: COMMIT, folder: path.join(storage, 'snapshots', COMMIT) });
    const names = [
      'config.json',
      'model-00001-of-00002.safetensors',
      'model-00002-of-00002.safetensors',
      'model.safetensors.index.json',
      'tokenizer.json',
    ];
    expect(await found.files.list()).toEqual(names);
    for (const name of names) expect(new Uint8Array(readFileSync(path.join(found.folder, name)))).toEqual(files[name]);
    expect(readFileSync(path.join(storage, 'refs/main'), 'utf8')).toBe(COMMIT);
    expect(readdirSync(path.join(storage, 'blobs'))).toContain(
      digest('sha256', files['model-00001-of-00002.safetensors']),
    );
    expect(existsSync(path.join(storage, '.gyre-lock'))).toBe(false);
    expect(events.at(-1)).toBe(1);
    expect([...events].sort((a, b) => a - b)).toEqual(events);
    const checkpoint = await Checkpoint.open(found.files);
    expect((await checkpoint.read('bb')).data[0]).toBe(2);
    await checkpoint.close();

    hub.log.length = 0;
    await resolveModel(ID, options);
    expect(hub.log.filter((line) => line.includes('/resolve/'))).toEqual([]);
  });

  it('takes the address and the token from the environment', async () => {
    const { hub, options } = await setUp();
    vi.stubEnv('HF_ENDPOINT', `${hub.url}/`);
    vi.stubEnv('HF_TOKEN', 'hf_secret');
    const seen = new Set<string | undefined>();
    hub.intercept = (request) => {
      seen.add(request.headers.authorization);
      return false;
    };
    await resolveModel(ID, { ...options, hubUrl: undefined });
    expect([...seen]).toEqual(['Bearer hf_secret']);
    expect(hubCacheDir({ HF_HOME: '/h' })).toBe(path.join('/h', 'hub'));
    expect(hubCacheDir({ HF_HOME: '/h', HF_HUB_CACHE: '/c' })).toBe('/c');
  });

  it('reads the token that the hub client stored', async () => {
    const { hub, options } = await setUp();
    const home = process.env.HF_HOME ?? '';
    mkdirSync(home, { recursive: true });
    writeFileSync(path.join(home, 'token'), 'hf_stored\n');
    let seen: string | undefined;
    hub.intercept = (request) => {
      seen = request.headers.authorization;
      return false;
    };
    await resolveModel(ID, options);
    expect(seen).toBe('Bearer hf_stored');
  });

  it('goes on where a transfer broke off', async () => {
    const { hub, files, options } = await setUp();
    const name = 'model-00002-of-00002.safetensors';
    const place = `/repos/${digest('sha256', files[name])}`;
    let broken = false;
    hub.interceptStorage = (request, response) => {
      if (broken || !request.url?.startsWith(place)) return false;
      broken = true;
      response.writeHead(200, { 'Content-Length': files[name].byteLength });
      response.write(files[name].subarray(0, 5000), () => setTimeout(() => response.destroy(), 20));
      return true;
    };
    const found = await resolveModel(ID, options);
    expect(new Uint8Array(readFileSync(path.join(found.folder, name)))).toEqual(files[name]);
    expect(hub.storageLog.filter((line) => line.startsWith(place))).toEqual([place, `${place} bytes=5000-`]);
    // Every attempt asks the hub for a new address: signatures are good for one use.
    expect(hub.log.filter((line) => line.endsWith(`/resolve/${COMMIT}/${name} bytes=5000-`))).toHaveLength(1);
  });

  it('asks for a new address when a signed one has expired', async () => {
    const { hub, options } = await setUp();
    let refused = 0;
    hub.interceptStorage = (_, response) => {
      if (refused++ > 1) return false;
      response.writeHead(403).end('<Error><Code>AccessDenied</Code></Error>');
      return true;
    };
    await resolveModel(ID, options);
    hub.signatureUses = 0;
    await expectError(
      () => resolveModel(ID, { ...options, cacheDir: temporaryFolder() }),
      'network',
      /storage behind .* refused model-0000/,
      /goes on where it stopped/,
    );
  });

  it('goes from the start where ranges are ignored, and refuses more bytes than promised', async () => {
    const { hub, files, options, storage } = await setUp();
    const name = 'model-00001-of-00002.safetensors';
    const incomplete = path.join(storage, 'blobs', `${digest('sha256', files[name])}.incomplete`);
    mkdirSync(path.dirname(incomplete), { recursive: true });
    writeFileSync(incomplete, files[name].subarray(0, 100));
    const whole: typeof hub.interceptStorage = (request, response) => {
      if (request.headers.range === undefined) return false;
      response.writeHead(200, { 'Content-Length': files[name].byteLength }).end(files[name]);
      return true;
    };
    hub.interceptStorage = whole;
    const found = await resolveModel(ID, options);
    expect(new Uint8Array(readFileSync(path.join(found.folder, name)))).toEqual(files[name]);
    hub.interceptStorage = (_, response) => {
      response.writeHead(200).end(Buffer.concat([files[name], files[name]]));
      return true;
    };
    const again = { ...options, cacheDir: temporaryFolder() };
    await expectError(() => resolveModel(ID, again), 'file-corrupt', /more than the \d+ bytes promised/);
  });

  it('takes branches, tags and commits, and the commit that is current', async () => {
    const { hub, files, options, storage } = await setUp();
    const other = 'beef'.padEnd(40, '0');
    const newer = { ...files, 'config.json': text('{"model_type":"qwen3"}') };
    const [repo] = hub.repos;
    repo.commits[other] = newer;
    repo.refs['pr/1'] = other;
    const config = (folder: string): string => readFileSync(path.join(folder, 'config.json'), 'utf8');
    const branch = await resolveModel(ID, { ...options, revision: 'pr/1' });
    expect([branch.commit, config(branch.folder)]).toEqual([other, '{"model_type":"qwen3"}']);
    expect(readFileSync(path.join(storage, 'refs/pr/1'), 'utf8')).toBe(other);
    expect((await resolveModel(ID, { ...options, revision: COMMIT })).commit).toBe(COMMIT);
    // Equal content is one blob: the second commit fetches its config alone.
    expect(hub.storageLog).toHaveLength(2);
    repo.refs['main'] = other;
    expect((await resolveModel(ID, options)).commit).toBe(other);
    expect(await resolveModel(ID, { ...options, offline: true })).toMatchObject({ commit: other });
  });

  it('goes on in a later run, and notices a start that was wrong', async () => {
    const { files, options, storage } = await setUp();
    const name = 'model-00001-of-00002.safetensors';
    const incomplete = path.join(storage, 'blobs', `${digest('sha256', files[name])}.incomplete`);
    mkdirSync(path.dirname(incomplete), { recursive: true });
    writeFileSync(incomplete, new Uint8Array(100).fill(7));
    await expectError(() => resolveModel(ID, options), 'file-corrupt', /expected SHA-256/, /run again/);
    expect(existsSync(incomplete)).toBe(false);
    writeFileSync(incomplete, files[name].subarray(0, 100));
    const found = await resolveModel(ID, options);
    expect(new Uint8Array(readFileSync(path.join(found.folder, name)))).toEqual(files[name]);
  });

  it('is not needed once the model is in the cache', async () => {
    const { hub, options } = await setUp();
    await expectError(() => resolveModel(ID, { ...options, offline: true }), 'not-found', /is not in the cache/);
    await resolveModel(ID, options);
    hub.log.length = 0;
    expect((await resolveModel(ID, { ...options, offline: true })).commit).toBe(COMMIT);
    expect(hub.log).toEqual([]);
    expect((await resolveModel(ID, { ...options, hubUrl: 'http://127.0.0.1:1' })).commit).toBe(COMMIT);
  });
});

describe('what goes wrong', () => {
  it('no such model: says what was looked for', async () => {
    const { options } = await setUp();
    await expectError(
      () => resolveModel('owner/typo', options),
      'not-found',
      /looked for a folder .*owner\/typo and for owner\/typo \(main\) on http/,
      /spelling/,
    );
    await expectError(() => resolveModel(ID, { ...options, revision: 'v9' }), 'not-found', /\(v9\)/);
  });

  it('no network', async () => {
    await expectError(
      () => resolveModel(ID, { hubUrl: 'http://127.0.0.1:1', cacheDir: temporaryFolder() }),
      'network',
      /can't reach owner\/tiny/,
      /connection/,
    );
  });

  it('gated models', async () => {
    const { hub, options } = await setUp('gated');
    await expectError(
      () => resolveModel(ID, options),
      'network',
      /gated or closed to you \(no token was sent\): Access to this repository is restricted/,
      /Ask for access at http.*owner\/tiny, then set HF_TOKEN/,
    );
    expect(hub.log.filter((line) => line.includes('/resolve/'))).toHaveLength(1); // no use in trying again
    await expectError(
      () => resolveModel(ID, { ...options, token: 'hf_stranger' }),
      'network',
      /\(a token was sent\): .*not in the authorized list/,
    );
    // The token goes to the hub, never to the storage behind it, which would refuse it.
    expect((await resolveModel(ID, { ...options, token: MEMBER_TOKEN })).commit).toBe(COMMIT);
    expect(hub.storageLog).toHaveLength(2);
  });

  it('private models', async () => {
    const { options } = await setUp('private');
    await expectError(() => resolveModel(ID, options), 'not-found', /private \(no token was sent\)/, /HF_TOKEN/);
    await expectError(() => resolveModel(ID, { ...options, token: 'hf_stranger' }), 'not-found', /neither exists/);
    expect((await resolveModel(ID, { ...options, token: MEMBER_TOKEN })).commit).toBe(COMMIT);
  });

  it('hubs in trouble', async () => {
    const { hub, options } = await setUp();
    let status = 401;
    hub.intercept = (_, response) => {
      response.writeHead(status).end('{}');
      return true;
    };
    await expectError(() => resolveModel(ID, options), 'not-found', /private \(no token was sent\)/, /HF_TOKEN/);
    status = 503;
    await expectError(() => resolveModel(ID, options), 'network', /answered 503/);
    await expectError(() => resolveModel(ID, { ...options, token: 'secret' }), 'usage', /hf_/);
  });

  it('repositories without safetensors', async () => {
    const { hub, options } = await setUp();
    hub.repos[0].commits[COMMIT] = { 'config.json': text('{}'), 'model.gguf': text('x') };
    await expectError(
      () => resolveModel(ID, options),
      'file-missing',
      /lacks .*model\.safetensors.*found: config\.json/,
      /GGUF/,
    );
  });

  it('two at once', async () => {
    const { options, storage } = await setUp();
    const lock = await lockFolder(storage);
    await expectError(() => resolveModel(ID, options), 'output-busy', new RegExp(`process ${process.pid}`));
    await lock.release();
  });

  it('names that would leave the cache are not fetched', () => {
    expect(
      ['config.json', 'model.safetensors', 'chat_template.jinja', 'model.safetensors.index.json'].every(isNeeded),
    ).toBe(true);
    expect(
      [
        '../model.safetensors',
        'a/model.safetensors',
        'README.md',
        'pytorch_model.bin',
        'consolidated.safetensors',
      ].some(isNeeded),
    ).toBe(false);
  });
});

describe('data sets', () => {
  const SET = 'owner/questions';
  const rows = text('{"q":1}\n{"q":2}\n');
  const parquet = new Uint8Array(20_000).fill(5);
  const first = '1'.repeat(40);
  const second = '2'.repeat(40);
  const setUpData = async (access: 'public' | 'gated' = 'public') => {
    const hub = await fakeHub([
      {
        kind: 'dataset',
        name: SET,
        commits: {
          [first]: { 'README.md': text('#'), 'data/test.jsonl': rows, 'data/deep/er.txt': text('x') },
          [second]: { 'default/test/0000.parquet': parquet },
        },
        refs: { main: first, 'refs/convert/parquet': second },
        access,
      },
    ]);
    hub.pageSize = 1;
    return { hub, options: { hubUrl: hub.url, cacheDir: temporaryFolder(), retryDelay: 1 } };
  };

  it('by commit: fetched once, into the usual cache', async () => {
    const { hub, options } = await setUpData();
    const found = await datasetFile(SET, first, 'data/test.jsonl', options);
    expect(found.commit).toBe(first);
    expect(found.file).toBe(
      path.join(options.cacheDir, 'datasets--owner--questions/snapshots', first, 'data/test.jsonl'),
    );
    expect(new Uint8Array(readFileSync(found.file))).toEqual(rows);
    hub.log.length = 0;
    expect(await datasetFile(SET, first, 'data/test.jsonl', options)).toEqual(found);
    expect(hub.log).toEqual([]);
    await expectError(() => datasetFile(SET, first, 'data/no.jsonl', options), 'file-missing', /no data\/no\.jsonl/);
    await expectError(() => datasetFile(SET, '3'.repeat(40), 'x', options), 'not-found', /3333/);
    await expectError(() => datasetFile(SET, 'main', 'x', options), 'usage', /refs|main/, /commit of 40 digits/);
    await expectError(() => datasetFile(SET, first, '../x', options), 'usage', /can't be a file/);
  });

  it('on the branch of the conversion to Parquet: by the commit it is at, and offline by the last one', async () => {
    const { hub, options } = await setUpData();
    const found = await datasetFile(SET, 'refs/convert/parquet', 'default/test/0000.parquet', options);
    expect(found.commit).toBe(second);
    expect(new Uint8Array(readFileSync(found.file))).toEqual(parquet);
    const storage = path.join(options.cacheDir, 'datasets--owner--questions');
    expect(readFileSync(path.join(storage, 'refs/refs/convert/parquet'), 'utf8')).toBe(second);
    hub.log.length = 0;
    const again = (more: object) =>
      datasetFile(SET, 'refs/convert/parquet', 'default/test/0000.parquet', { ...options, ...more });
    expect(await again({ offline: true })).toEqual(found);
    expect(hub.log).toEqual([]);
    expect(await again({ hubUrl: 'http://127.0.0.1:1' })).toEqual(found);
    // A conversion that has moved on is fetched anew.
    const third = '4'.repeat(40);
    hub.repos[0].commits[third] = { 'default/test/0000.parquet': parquet.slice(0, 15_000) };
    hub.repos[0].refs['refs/convert/parquet'] = third;
    const newer = await again({});
    expect([newer.commit, readFileSync(newer.file).length]).toEqual([third, 15_000]);
    await expectError(
      () => again({ offline: true, cacheDir: temporaryFolder() }),
      'not-found',
      /not in the cache/,
      /--data/,
    );
  });

  it('that are gated', async () => {
    const { options } = await setUpData('gated');
    await expectError(
      () => datasetFile(SET, first, 'data/test.jsonl', options),
      'network',
      /gated or closed to you/,
      /datasets\/owner\/questions, then set HF_TOKEN/,
    );
    const found = await datasetFile(SET, first, 'data/test.jsonl', { ...options, token: MEMBER_TOKEN });
    expect(new Uint8Array(readFileSync(found.file))).toEqual(rows);
  });
});

describe('ranges over HTTP', () => {
  it('reads parts of a file', async () => {
    const { hub, files } = await setUp();
    const name = 'model-00001-of-00002.safetensors';
    hub.signatureUses = 10;
    const source = await httpSource(`${hub.url}/${ID}/resolve/main/${name}`);
    expect(await source.size()).toBe(files[name].byteLength);
    expect(await source.read(2, 10)).toEqual(files[name].slice(2, 12));
    await expectError(() => source.read(files[name].byteLength - 2, 3), 'file-corrupt', /truncated/);
  });

  it('reads whole files where ranges are not served, and reports absence', async () => {
    const { hub } = await setUp();
    const source = await httpSource(`${hub.url}/${ID}/resolve/main/config.json`);
    expect(new TextDecoder().decode(await source.read(2, 10))).toBe('model_type');
    await expectError(() => httpSource(`${hub.url}/${ID}/resolve/main/nothing`), 'not-found', /answered 404/);
    await expectError(() => httpSource('http://127.0.0.1:1/x'), 'network', /can't reach/);
  });
});
