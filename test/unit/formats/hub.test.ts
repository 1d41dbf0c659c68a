// Models by folder and by hub id, against a hub of our own on this machine.
import { createHash } from 'node:crypto';
import { existsSync, mkdirSync, readFileSync, readdirSync, writeFileSync } from 'node:fs';
import { createServer, type IncomingMessage, type ServerResponse } from 'node:http';
import type { AddressInfo } from 'node:net';
import path from 'node:path';
import { beforeEach, describe, expect, it, onTestFinished, vi } from 'vitest';
import { lockFolder } from '../../../src/formats/atomic.node.js';
import { hubCacheDir, isNeeded, resolveModel, type ResolveOptions } from '../../../src/formats/hub.node.js';
import { Checkpoint } from '../../../src/formats/safetensors.js';
import { encodeIndex, encodeSafetensors } from '../../../src/formats/safetensors-writer.js';
import { httpSource } from '../../../src/formats/source.web.js';
import { expectError, temporaryFolder } from './helpers.js';

const COMMIT = 'c0ffee'.padEnd(40, '0');
const ID = 'owner/tiny';

interface FakeHub {
  url: string;
  /** "METHOD path range" of each request. */
  log: string[];
  files: Record<string, Uint8Array>;
  /** Answers instead of the hub where it returns true. */
  intercept: (request: IncomingMessage, response: ServerResponse) => boolean;
}

const digest = (algorithm: string, data: Uint8Array): string => createHash(algorithm).update(data).digest('hex');
const text = (value: string): Uint8Array => new TextEncoder().encode(value);

async function modelFiles(): Promise<Record<string, Uint8Array>> {
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

/** A server that answers as much of the hub's API as is used. */
async function fakeHub(): Promise<FakeHub> {
  const hub: FakeHub = { url: '', log: [], files: await modelFiles(), intercept: () => false };
  const json = (response: ServerResponse, status: number, body: unknown): void => {
    response.writeHead(status, { 'Content-Type': 'application/json' }).end(JSON.stringify(body));
  };
  const server = createServer((request, response) => {
    const url = new URL(request.url ?? '', 'http://hub');
    hub.log.push(`${url.pathname} ${request.headers.range ?? ''}`.trim());
    if (hub.intercept(request, response)) return;
    const parts = url.pathname.split('/').slice(1).map(decodeURIComponent);
    if (
      parts[0] === 'api' &&
      `${parts[2]}/${parts[3]}` === ID &&
      parts[4] === 'revision' &&
      ['main', COMMIT].includes(parts[5])
    ) {
      json(response, 200, { _id: '1', id: ID, sha: COMMIT });
    } else if (parts[0] === 'api' && `${parts[2]}/${parts[3]}` === ID && parts[4] === 'tree') {
      const entries = Object.entries(hub.files).map(([name, data]) => ({
        type: 'file',
        path: name,
        size: data.byteLength,
        oid: digest('sha1', data),
        ...(name.endsWith('.safetensors')
          ? { lfs: { oid: digest('sha256', data), size: data.byteLength, pointerSize: 100 } }
          : {}),
      }));
      json(response, 200, entries);
    } else if (parts[2] === 'resolve' && `${parts[0]}/${parts[1]}` === ID && Object.hasOwn(hub.files, parts[4])) {
      const data = hub.files[parts[4]];
      const start = Number(/^bytes=(\d+)-$/.exec(request.headers.range ?? '')?.[1] ?? NaN);
      if (Number.isNaN(start)) response.writeHead(200, { 'Content-Length': data.byteLength }).end(data);
      else
        response
          .writeHead(206, { 'Content-Range': `bytes ${start}-${data.byteLength - 1}/${data.byteLength}` })
          .end(data.subarray(start));
    } else json(response, 404, { error: 'Repository not found' });
  });
  await new Promise<void>((resolve) => server.listen(0, '127.0.0.1', resolve));
  hub.url = `http://127.0.0.1:${(server.address() as AddressInfo).port}`;
  onTestFinished(
    () =>
      new Promise<void>((resolve) => {
        server.closeAllConnections();
        server.close(() => resolve());
      }),
  );
  return hub;
}

/** A hub, and options that keep to it and to a cache of the test's own. */
async function setUp(): Promise<{ hub: FakeHub; options: ResolveOptions; storage: string }> {
  const hub = await fakeHub();
  const cacheDir = temporaryFolder();
  return {
    hub,
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
    const { hub, options, storage } = await setUp();
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
    for (const name of names)
      expect(new Uint8Array(readFileSync(path.join(found.folder, name)))).toEqual(hub.files[name]);
    expect(readFileSync(path.join(storage, 'refs/main'), 'utf8')).toBe(COMMIT);
    expect(readdirSync(path.join(storage, 'blobs'))).toContain(
      digest('sha256', hub.files['model-00001-of-00002.safetensors']),
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
    const { hub, options } = await setUp();
    const name = 'model-00002-of-00002.safetensors';
    let broken = false;
    hub.intercept = (request, response) => {
      if (broken || !request.url?.endsWith(name)) return false;
      broken = true;
      response.writeHead(200, { 'Content-Length': hub.files[name].byteLength });
      response.write(hub.files[name].subarray(0, 5000), () => setTimeout(() => response.destroy(), 20));
      return true;
    };
    const found = await resolveModel(ID, options);
    expect(new Uint8Array(readFileSync(path.join(found.folder, name)))).toEqual(hub.files[name]);
    expect(hub.log.filter((line) => line.includes(name)).map((line) => line.split(' ')[1])).toEqual([
      undefined,
      'bytes=5000-',
    ]);
  });

  it('goes on in a later run, and notices a start that was wrong', async () => {
    const { hub, options, storage } = await setUp();
    const name = 'model-00001-of-00002.safetensors';
    const incomplete = path.join(storage, 'blobs', `${digest('sha256', hub.files[name])}.incomplete`);
    mkdirSync(path.dirname(incomplete), { recursive: true });
    writeFileSync(incomplete, new Uint8Array(100).fill(7));
    await expectError(() => resolveModel(ID, options), 'file-corrupt', /expected SHA-256/, /run again/);
    expect(existsSync(incomplete)).toBe(false);
    writeFileSync(incomplete, hub.files[name].subarray(0, 100));
    const found = await resolveModel(ID, options);
    expect(new Uint8Array(readFileSync(path.join(found.folder, name)))).toEqual(hub.files[name]);
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
    const { hub, options } = await setUp();
    hub.intercept = (request, response) => {
      if (!request.url?.includes('/resolve/')) return false;
      response
        .writeHead(403, { 'X-Error-Code': 'GatedRepo', 'X-Error-Message': 'Access to model owner/tiny is restricted' })
        .end();
      return true;
    };
    await expectError(
      () => resolveModel(ID, options),
      'network',
      /gated or closed to you \(no token was sent\): Access to model/,
      /Ask for access .*HF_TOKEN/,
    );
    expect(hub.log.filter((line) => line.includes('/resolve/'))).toHaveLength(1); // no use in trying again
  });

  it('private models and hubs in trouble', async () => {
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
    hub.files = { 'config.json': text('{}'), 'model.gguf': text('x') };
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

describe('ranges over HTTP', () => {
  it('reads parts of a file', async () => {
    const { hub } = await setUp();
    hub.intercept = (request, response) => {
      const range = /^bytes=(\d+)-(\d+)$/.exec(request.headers.range ?? '');
      if (!range) return false;
      const data = hub.files['config.json'];
      const [start, end] = [Number(range[1]), Number(range[2])];
      response
        .writeHead(206, { 'Content-Range': `bytes ${start}-${end}/${data.byteLength}` })
        .end(data.subarray(start, end + 1));
      return true;
    };
    const source = await httpSource(`${hub.url}/${ID}/resolve/main/config.json`);
    expect(await source.size()).toBe(22);
    expect(new TextDecoder().decode(await source.read(2, 10))).toBe('model_type');
    await expectError(() => source.read(20, 3), 'file-corrupt', /truncated/);
  });

  it('reads whole files where ranges are not served, and reports absence', async () => {
    const { hub } = await setUp();
    const source = await httpSource(`${hub.url}/${ID}/resolve/main/config.json`);
    expect(new TextDecoder().decode(await source.read(2, 10))).toBe('model_type');
    await expectError(() => httpSource(`${hub.url}/nothing`), 'not-found', /answered 404/);
    await expectError(() => httpSource('http://127.0.0.1:1/x'), 'network', /can't reach/);
  });
});
