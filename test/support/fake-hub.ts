// A Hugging Face hub on this machine, as far as gyre asks it: repositories with commits and branches, paged listings, small
// files through a redirect of its own, large ones through a redirect to a storage of another origin with signed addresses
// that expire and with byte ranges, gated and private repositories, and the hub's error headers and bodies.
//
// The real one can't be reached by tests; what it answers is taken from its documentation and from huggingface_hub's code.
import { createHash } from 'node:crypto';
import { createServer, type IncomingMessage, type ServerResponse } from 'node:http';
import type { AddressInfo } from 'node:net';
import { onTestFinished } from 'vitest';

/** Files of a commit by path. */
export type FakeFiles = Record<string, Uint8Array>;

/** A repository. */
export interface FakeRepo {
  readonly kind: 'model' | 'dataset';
  /** owner/name */
  readonly name: string;
  readonly commits: Record<string, FakeFiles>;
  /** Branches and tags to commits. */
  readonly refs: Record<string, string>;
  /** `gated`: files need a token that was let in; `private`: nobody else is told that there is such a repository. */
  readonly access?: 'public' | 'gated' | 'private';
}

/** Answers instead of the hub or its storage where it returns true. */
export type Intercept = (request: IncomingMessage, response: ServerResponse) => boolean;

/** A hub that runs. */
export interface FakeHub {
  readonly url: string;
  /** Origin of the storage that large files are sent from. */
  readonly storageUrl: string;
  readonly repos: FakeRepo[];
  /** "path range" of every request to the hub, and to its storage. */
  readonly log: string[];
  readonly storageLog: string[];
  intercept: Intercept;
  interceptStorage: Intercept;
  /** Requests that a signed address is good for; default 1. */
  signatureUses: number;
  /** Entries of one page of a listing; default 1000. */
  pageSize: number;
}

/** The token that gated and private repositories let in. */
export const MEMBER_TOKEN = 'hf_member';

export const digest = (algorithm: string, data: Uint8Array): string => createHash(algorithm).update(data).digest('hex');

/** Files from this size on are in the storage, as Git LFS has it; .safetensors and .parquet always. */
const LARGE = 10_000;
const isLarge = (name: string, data: Uint8Array): boolean =>
  data.byteLength >= LARGE || /\.(safetensors|parquet|gz)$/.test(name);

/** Starts a hub; it ends with the test. */
export async function fakeHub(repos: FakeRepo[]): Promise<FakeHub> {
  const signatures = new Map<string, number>();
  const storage = await listen((request, response) => serveStorage(hub, signatures, request, response));
  const server = await listen((request, response) => serveHub(hub, signatures, request, response));
  const hub: FakeHub = {
    url: server,
    storageUrl: storage,
    repos,
    log: [],
    storageLog: [],
    intercept: () => false,
    interceptStorage: () => false,
    signatureUses: 1,
    pageSize: 1000,
  };
  return hub;
}

async function listen(answer: (request: IncomingMessage, response: ServerResponse) => void): Promise<string> {
  const server = createServer(answer);
  await new Promise<void>((resolve) => server.listen(0, '127.0.0.1', resolve));
  onTestFinished(
    () =>
      new Promise<void>((resolve) => {
        server.closeAllConnections();
        server.close(() => resolve());
      }),
  );
  return `http://127.0.0.1:${(server.address() as AddressInfo).port}`;
}

/** Refusals as the hub words them: status, X-Error-Code, message. */
const REFUSALS = {
  repository: [401, 'RepoNotFound', 'Invalid username or password.'],
  repositoryWithToken: [404, 'RepoNotFound', 'Repository not found'],
  revision: [404, 'RevisionNotFound', 'Invalid rev id'],
  entry: [404, 'EntryNotFound', 'Entry not found'],
  gatedStranger: [403, 'GatedRepo', 'Access to this repository is restricted and you are not in the authorized list.'],
  gatedNobody: [
    401,
    'GatedRepo',
    'Access to this repository is restricted. You must have access to it and be authenticated to access it. Please log in.',
  ],
} as const;

function refuse(response: ServerResponse, why: keyof typeof REFUSALS): void {
  const [status, code, message] = REFUSALS[why];
  response
    .writeHead(status, { 'Content-Type': 'application/json', 'X-Error-Code': code, 'X-Error-Message': message })
    .end(JSON.stringify({ error: message }));
}

function serveHub(
  hub: FakeHub,
  signatures: Map<string, number>,
  request: IncomingMessage,
  response: ServerResponse,
): void {
  const url = new URL(request.url ?? '', hub.url);
  hub.log.push(`${url.pathname} ${request.headers.range ?? ''}`.trim());
  if (hub.intercept(request, response)) return;
  const token = request.headers.authorization?.replace(/^Bearer /, '');
  const parts = url.pathname.split('/').slice(1).map(decodeURIComponent);
  const api = parts[0] === 'api';
  const cached = api && parts[1] === 'resolve-cache';
  // /api/models/o/n/…, /api/resolve-cache/models/o/n/commit/file, /o/n/resolve/rev/file, /datasets/o/n/resolve/rev/file
  if (cached) parts.splice(0, 2);
  else if (api) parts.shift();
  const kind = parts[0] === 'datasets' ? 'dataset' : 'model';
  if (api || kind === 'dataset') parts.shift();
  const name = `${parts[0]}/${parts[1]}`;
  const repo = hub.repos.find((other) => other.kind === kind && other.name === name);
  if (!repo || (repo.access === 'private' && token !== MEMBER_TOKEN))
    return refuse(response, token === undefined ? 'repository' : 'repositoryWithToken');
  const [verb, revision, ...rest] = cached ? ['cache', ...parts.slice(2)] : parts.slice(2);
  const commit = repo.refs[revision] ?? revision;
  const files = repo.commits[commit];
  if (!files) return refuse(response, 'revision');
  const file = rest.join('/');
  switch (verb) {
    case 'revision':
      response
        .writeHead(200, { 'Content-Type': 'application/json' })
        .end(JSON.stringify({ _id: '1', id: name, sha: commit, private: repo.access === 'private' }));
      return;
    case 'tree':
      return list(hub, url, files, file, response);
    case 'resolve':
    case 'cache': {
      if (repo.access === 'gated' && token !== MEMBER_TOKEN)
        return refuse(response, token === undefined ? 'gatedNobody' : 'gatedStranger');
      if (!Object.hasOwn(files, file)) return refuse(response, 'entry');
      const data = files[file];
      const headers = { 'X-Repo-Commit': commit, 'X-Linked-Size': String(data.byteLength) };
      if (verb === 'cache') {
        response.writeHead(200, { ...headers, ETag: `"${gitOid(data)}"`, 'Content-Length': data.byteLength }).end(data);
      } else if (isLarge(file, data)) {
        const oid = digest('sha256', data);
        const signature = digest('sha256', Buffer.from(`${oid} ${signatures.size}`));
        signatures.set(signature, hub.signatureUses);
        const location = `${hub.storageUrl}/repos/${oid}?response-content-disposition=inline&Expires=1&Signature=${signature}`;
        response.writeHead(302, { ...headers, 'X-Linked-ETag': `"${oid}"`, Location: location }).end();
      } else {
        const location = `/api/resolve-cache/${kind}s/${name}/${commit}/${rest.map(encodeURIComponent).join('/')}`;
        response.writeHead(307, { ...headers, 'X-Linked-ETag': `"${gitOid(data)}"`, Location: location }).end();
      }
      return;
    }
    default:
      refuse(response, 'entry');
  }
}

/** Name of a file's content in Git. */
function gitOid(data: Uint8Array): string {
  return createHash('sha1').update(`blob ${data.byteLength}\0`).update(data).digest('hex');
}

/** Entries of a folder, folders among them, in pages. */
function list(hub: FakeHub, url: URL, files: FakeFiles, folder: string, response: ServerResponse): void {
  const begin = folder === '' ? '' : `${folder}/`;
  const own = Object.entries(files).filter(([name]) => name.startsWith(begin));
  if (own.length === 0) return refuse(response, 'entry');
  const folders = new Set(
    own.flatMap(([name]) => {
      const [first, ...more] = name.slice(begin.length).split('/');
      return more.length > 0 ? [begin + first] : [];
    }),
  );
  const entries = [
    ...[...folders].map((name) => ({ type: 'directory', path: name, oid: digest('sha1', Buffer.from(name)), size: 0 })),
    ...own
      .filter(([name]) => !name.slice(begin.length).includes('/'))
      .map(([name, data]) => ({
        type: 'file',
        path: name,
        size: data.byteLength,
        oid: gitOid(data),
        ...(isLarge(name, data) && {
          lfs: { oid: digest('sha256', data), size: data.byteLength, pointerSize: 130 },
          xetHash: digest('sha256', Buffer.from(name)),
        }),
      })),
  ];
  const from = Number(url.searchParams.get('cursor') ?? 0);
  const next = new URL(url);
  next.searchParams.set('cursor', String(from + hub.pageSize));
  response
    .writeHead(200, {
      'Content-Type': 'application/json',
      ...(from + hub.pageSize < entries.length && { Link: `<${next.href}>; rel="next"` }),
    })
    .end(JSON.stringify(entries.slice(from, from + hub.pageSize)));
}

/** The storage: content by SHA-256, with ranges; takes signed addresses and no other authorization. */
function serveStorage(
  hub: FakeHub,
  signatures: Map<string, number>,
  request: IncomingMessage,
  response: ServerResponse,
): void {
  const url = new URL(request.url ?? '', hub.storageUrl);
  hub.storageLog.push(`${url.pathname} ${request.headers.range ?? ''}`.trim());
  if (hub.interceptStorage(request, response)) return;
  if (request.headers.authorization !== undefined) {
    response.writeHead(400).end('<Error><Code>InvalidArgument</Code>Only one auth mechanism allowed</Error>');
    return;
  }
  const signature = url.searchParams.get('Signature') ?? '';
  const uses = signatures.get(signature) ?? 0;
  if (uses === 0) {
    response.writeHead(403, { 'Content-Type': 'application/xml' }).end('<Error><Code>AccessDenied</Code></Error>');
    return;
  }
  signatures.set(signature, uses - 1);
  const oid = url.pathname.split('/').at(-1);
  const all = hub.repos.flatMap(({ commits }) => Object.values(commits).flatMap((files) => Object.values(files)));
  const data = all.find((content) => digest('sha256', content) === oid);
  if (!data) {
    response.writeHead(404).end();
    return;
  }
  const headers = { ETag: `"${oid}"`, 'Accept-Ranges': 'bytes' };
  const range = /^bytes=(\d+)-(\d+)?$/.exec(request.headers.range ?? '');
  if (!range) {
    response.writeHead(200, { ...headers, 'Content-Length': data.byteLength }).end(data);
    return;
  }
  const [begin, end] = [Number(range[1]), range[2] === undefined ? data.byteLength - 1 : Number(range[2])];
  if (begin >= data.byteLength) {
    response.writeHead(416, { 'Content-Range': `bytes */${data.byteLength}` }).end();
    return;
  }
  response
    .writeHead(206, {
      ...headers,
      'Content-Range': `bytes ${begin}-${end}/${data.byteLength}`,
      'Content-Length': end - begin + 1,
    })
    .end(data.subarray(begin, end + 1));
}
