// A model by folder or by Hugging Face hub id: found, fetched into the hub's usual cache, resumable (Node.js).
//
// Listing and metadata go through @huggingface/hub. Its own downloads start over after an interruption, don't verify
// what they got and print to the standard output, so files are fetched here, into the same cache layout:
// models--owner--name/{refs/<revision>, blobs/<etag>, snapshots/<commit>/<file> → blob}.
import { HubApiError, listFiles, modelInfo } from '@huggingface/hub';
import { createHash } from 'node:crypto';
import { createReadStream } from 'node:fs';
import { copyFile, mkdir, open, readFile, realpath, rename, stat, symlink, unlink } from 'node:fs/promises';
import { homedir } from 'node:os';
import path from 'node:path';
import { GyreError } from '../core/errors.js';
import { silent, type ProgressListener } from '../core/progress.js';
import { asDiskError, freeBytes, lockFolder, writeFileAtomic } from './atomic.node.js';
import { INDEX_FILE, SINGLE_FILE } from './safetensors.js';
import { folderFiles } from './source.node.js';
import type { ModelFiles } from './source.js';

/** Default address of the hub. */
export const HUB_URL = 'https://huggingface.co';

/** How often a broken transfer is taken up again before giving up. */
const ATTEMPTS = 5;

/** Options of {@link resolveModel}. */
export interface ResolveOptions {
  /** Branch, tag or commit on the hub. Default: `main`. */
  revision?: string;
  /** Address of the hub. Default: HF_ENDPOINT, else {@link HUB_URL}. */
  hubUrl?: string;
  /** Cache folder. Default: HF_HUB_CACHE, HUGGINGFACE_HUB_CACHE, HF_HOME/hub, XDG_CACHE_HOME/huggingface/hub, ~/.cache/huggingface/hub. */
  cacheDir?: string;
  /** Access token. Default: HF_TOKEN, HUGGING_FACE_HUB_TOKEN, else the file `token` in HF_HOME (~/.cache/huggingface). */
  token?: string;
  /** Use what is in the cache, without any request. Default: whether HF_HUB_OFFLINE is set to 1. */
  offline?: boolean;
  /** Stage `download`, in bytes. */
  onProgress?: ProgressListener;
  /** Milliseconds before a broken transfer is taken up again, doubled each time. Default: 500. */
  retryDelay?: number;
}

/** A model that was found. */
export interface ResolvedModel {
  readonly files: ModelFiles;
  /** Where its files lie. */
  readonly folder: string;
  readonly source: 'folder' | 'hub';
  /** Hub models: the commit. */
  readonly commit?: string;
}

/** Cache folder of the hub by environment. */
export function hubCacheDir(env: NodeJS.ProcessEnv = process.env): string {
  return env.HF_HUB_CACHE ?? env.HUGGINGFACE_HUB_CACHE ?? path.join(hubHome(env), 'hub');
}

function hubHome(env: NodeJS.ProcessEnv): string {
  return env.HF_HOME ?? path.join(env.XDG_CACHE_HOME ?? path.join(homedir(), '.cache'), 'huggingface');
}

/** The user's access token, if any. */
async function hubToken(env: NodeJS.ProcessEnv = process.env): Promise<string | undefined> {
  const given = env.HF_TOKEN ?? env.HUGGING_FACE_HUB_TOKEN;
  if (given !== undefined) return given.trim() || undefined;
  const file = env.HF_TOKEN_PATH ?? path.join(hubHome(env), 'token');
  return (await readFile(file, 'utf8').catch(() => '')).trim() || undefined;
}

/** `name` or `owner/name` as the hub allows them. */
const HUB_ID = /^(?:[A-Za-z0-9][\w.-]{0,95}\/)?[A-Za-z0-9][\w.-]{0,95}$/;
const REVISION = /^[\w.-]+(?:\/[\w.-]+)*$/;
const COMMIT = /^[0-9a-f]{40}$/;

/**
 * Finds a model: an existing folder, or else a hub id, whose files are fetched into the cache if they aren't there.
 * Only what gyre reads is fetched: configs, tokenizer, safetensors.
 * @throws `not-found` saying what was looked for; `network` when the hub can't be reached, refuses or asks for a token;
 * `disk-full`; `output-busy` while another process fetches the same model; `file-corrupt` when what arrives is not what
 * the hub promised.
 */
export async function resolveModel(model: string, options: ResolveOptions = {}): Promise<ResolvedModel> {
  if (model === '') throw new GyreError('usage', 'no model was named', { remedy: 'Name a folder or a hub id.' });
  const folder = path.resolve(model.startsWith('~/') ? path.join(homedir(), model.slice(2)) : model);
  if (await stat(folder).catch(() => undefined)) {
    return { files: await folderFiles(folder), folder, source: 'folder' };
  }
  if (!HUB_ID.test(model) || /\.\.|--/.test(model)) {
    throw new GyreError('not-found', `there is no folder ${folder}, and ${JSON.stringify(model)} can't be a hub id`, {
      remedy: 'Check the path, or give a hub id such as Qwen/Qwen3-0.6B.',
    });
  }
  const revision = options.revision ?? 'main';
  if (!REVISION.test(revision) || revision.includes('..')) {
    throw new GyreError('usage', `${JSON.stringify(revision)} can't be a revision`, {
      remedy: 'Give a branch, a tag or a commit.',
    });
  }
  const storage = path.join(options.cacheDir ?? hubCacheDir(), `models--${model.replace('/', '--')}`);
  const offline = options.offline ?? process.env.HF_HUB_OFFLINE === '1';
  const hubUrl = (options.hubUrl ?? process.env.HF_ENDPOINT ?? HUB_URL).replace(/\/+$/, '');
  if (offline) {
    const cached = await fromCache(storage, revision);
    if (cached) return cached;
    throw new GyreError('not-found', `${model} (${revision}) is not in the cache ${storage}, and the hub is off`, {
      remedy: 'Run once with the hub on (HF_HUB_OFFLINE unset), or name a folder.',
    });
  }
  const hub: Hub = {
    kind: 'model',
    model,
    revision,
    folder,
    hubUrl,
    storage,
    token: options.token ?? (await hubToken()),
    onProgress: options.onProgress ?? silent,
    retryDelay: options.retryDelay ?? 500,
  };
  let found: { commit: string; files: HubFile[] };
  try {
    found = await look(hub);
  } catch (error) {
    if (!(error instanceof GyreError) || error.code !== 'network' || isRefusal(error.cause)) throw error;
    const cached = await fromCache(storage, revision);
    if (!cached) throw error;
    return cached; // no connection, but nothing to fetch either
  }
  return fetchAll(hub, found.commit, found.files);
}

interface Hub {
  readonly kind: 'model' | 'dataset';
  readonly model: string;
  readonly revision: string;
  /** The folder that was looked for first. */
  readonly folder: string;
  readonly hubUrl: string;
  readonly storage: string;
  readonly token: string | undefined;
  readonly onProgress: ProgressListener;
  readonly retryDelay: number;
}

/**
 * One file of a data set at a commit, from the hub's cache or fetched into it; interrupted transfers go on.
 * @returns where it lies.
 * @throws GyreError as {@link resolveModel}; `file-missing` when the commit has no such file.
 */
export async function datasetFile(
  dataset: string,
  commit: string,
  file: string,
  options: Omit<ResolveOptions, 'revision'> = {},
): Promise<string> {
  ensureDatasetName(dataset, commit, file);
  const storage = path.join(options.cacheDir ?? hubCacheDir(), `datasets--${dataset.replace('/', '--')}`);
  const folder = path.join(storage, 'snapshots', commit);
  const target = path.join(folder, ...file.split('/'));
  if (await stat(target).catch(() => undefined)) return target;
  if (options.offline ?? process.env.HF_HUB_OFFLINE === '1') {
    throw new GyreError('not-found', `${file} of ${dataset} is not in the cache ${storage}, and the hub is off`, {
      remedy: 'Run once with the hub on (HF_HUB_OFFLINE unset), or give the folder of the data with --data.',
    });
  }
  const hub: Hub = {
    kind: 'dataset',
    model: dataset,
    revision: commit,
    folder: target,
    hubUrl: (options.hubUrl ?? process.env.HF_ENDPOINT ?? HUB_URL).replace(/\/+$/, ''),
    storage,
    token: options.token ?? (await hubToken()),
    onProgress: options.onProgress ?? silent,
    retryDelay: options.retryDelay ?? 500,
  };
  let entry: HubFile | undefined;
  try {
    const repo = { type: 'dataset' as const, name: dataset };
    const token = hub.token === undefined ? {} : { accessToken: hub.token };
    const place = path.posix.dirname(file);
    for await (const found of listFiles({
      hubUrl: hub.hubUrl,
      ...token,
      repo,
      revision: commit,
      ...(place === '.' ? {} : { path: place }),
    })) {
      const etag = found.lfs?.oid ?? found.oid ?? '';
      if (found.path !== file || !/^[0-9a-f]{40,64}$/.test(etag)) continue;
      entry = { path: file, size: found.lfs?.size ?? found.size, etag, sha256: found.lfs?.oid };
    }
  } catch (error) {
    throw asHubError(error, hub);
  }
  if (!entry) {
    throw new GyreError('file-missing', `${dataset} has no ${file} at ${commit.slice(0, 12)}`, {
      remedy: 'Check the path in the task file.',
    });
  }
  const { size } = entry;
  await mkdir(path.join(storage, 'blobs'), { recursive: true });
  await mkdir(path.dirname(target), { recursive: true });
  const lock = await lockFolder(storage);
  try {
    await fetchFile(hub, commit, entry, folder, (bytes) =>
      hub.onProgress({ stage: 'download', done: bytes, total: size, unit: 'bytes', message: `${dataset}/${file}` }),
    );
  } finally {
    await lock.release();
  }
  return target;
}

function ensureDatasetName(dataset: string, commit: string, file: string): void {
  const parts = file.split('/');
  const safe = !parts.some((part) => part === '' || part === '.' || part === '..') && !file.includes('\\');
  if (HUB_ID.test(dataset) && !/\.\.|--/.test(dataset) && COMMIT.test(commit) && safe) return;
  throw new GyreError('usage', `${JSON.stringify(`${dataset}@${commit}/${file}`)} can't be a file of a data set`, {
    remedy: 'Name owner/name, a commit of 40 digits and a relative path.',
  });
}

interface HubFile {
  readonly path: string;
  readonly size: number;
  /** Name of the blob in the cache. */
  readonly etag: string;
  /** SHA-256 of the content; large files only. */
  readonly sha256: string | undefined;
}

/** Whether gyre may need a file of a repository. */
export function isNeeded(name: string): boolean {
  if (name.startsWith('consolidated')) return false; // Mistral's second copy of the weights
  return (
    /^(config|generation_config|tokenizer|tokenizer_config|special_tokens_map|chat_template)\.json$/.test(name) ||
    name === 'chat_template.jinja' ||
    name === INDEX_FILE ||
    /^[\w.-]+\.safetensors$/.test(name)
  );
}

/** The commit and the needed files of a hub model. */
async function look(hub: Hub): Promise<{ commit: string; files: HubFile[] }> {
  const request = {
    hubUrl: hub.hubUrl,
    ...(hub.token === undefined ? {} : { accessToken: hub.token }),
  };
  const repo = { type: 'model' as const, name: hub.model };
  try {
    const { sha } = await modelInfo({ ...request, name: hub.model, revision: hub.revision, additionalFields: ['sha'] });
    if (!COMMIT.test(sha)) {
      throw new GyreError('network', `${hub.hubUrl} answered with something that is no commit`, {
        remedy: 'Check that HF_ENDPOINT names a Hugging Face hub.',
      });
    }
    const files: HubFile[] = [];
    for await (const entry of listFiles({ ...request, repo, revision: sha })) {
      const etag = entry.lfs?.oid ?? entry.oid ?? '';
      if (entry.type !== 'file' || !isNeeded(entry.path) || !/^[0-9a-f]{40,64}$/.test(etag)) continue;
      files.push({ path: entry.path, size: entry.lfs?.size ?? entry.size, etag, sha256: entry.lfs?.oid });
    }
    const names = new Set(files.map((file) => file.path));
    if (!names.has('config.json') || !(names.has(SINGLE_FILE) || names.has(INDEX_FILE))) {
      throw new GyreError(
        'file-missing',
        `${hub.model} (${hub.revision}) on ${hub.hubUrl} lacks config.json or ${SINGLE_FILE}; found: ${[...names].join(', ') || 'nothing of use'}`,
        {
          remedy:
            'gyre reads safetensors: choose a model or revision that has them (adapters and GGUF files are not enough).',
        },
      );
    }
    // Some repositories hold the weights twice; the index wins, as it does when a checkpoint is opened.
    const twice = names.has(INDEX_FILE) && names.has(SINGLE_FILE);
    return { commit: sha, files: twice ? files.filter((file) => file.path !== SINGLE_FILE) : files };
  } catch (error) {
    throw asHubError(error, hub);
  }
}

/** Whether the hub itself said no, as opposed to not being reached. */
function isRefusal(cause: unknown): boolean {
  return cause instanceof HubApiError && cause.statusCode < 500 && ![408, 429].includes(cause.statusCode);
}

/** Explains an error of the hub or the network. */
function asHubError(error: unknown, hub: Hub): unknown {
  if (error instanceof GyreError) return error;
  const what = `${hub.model} (${hub.revision}) on ${hub.hubUrl}`;
  const withToken = hub.token === undefined ? 'no token was sent' : 'a token was sent';
  if (error instanceof HubApiError) {
    // The client appends the URL, whose query holds telling words of its own.
    const said = error.message.split(' URL: ')[0];
    if (error.statusCode === 404 || (error.statusCode === 401 && !/gated|restricted/i.test(said))) {
      return new GyreError(
        'not-found',
        `looked for a folder ${hub.folder} and for ${what}: neither exists${error.statusCode === 401 ? `, or the repository is private (${withToken})` : ''}`,
        {
          remedy: 'Check the spelling and the revision; for a private model set HF_TOKEN to a token that may read it.',
          cause: error,
        },
      );
    }
    if (error.statusCode === 401 || error.statusCode === 403) {
      return new GyreError('network', `${what} is gated or closed to you (${withToken}): ${said}`, {
        remedy: `Ask for access at ${hub.hubUrl}/${hub.model}, then set HF_TOKEN to your token.`,
        cause: error,
      });
    }
    return new GyreError('network', `the hub answered ${error.statusCode} for ${what}`, {
      remedy: error.statusCode === 429 ? 'Too many requests: wait a little.' : 'Try again later.',
      cause: error,
    });
  }
  if (error instanceof TypeError && error.message.includes("must start with 'hf_'")) {
    return new GyreError('usage', 'the access token does not start with hf_', {
      remedy: 'Check HF_TOKEN and the token file; unset them for public models.',
      cause: error,
    });
  }
  if (error instanceof TypeError || error instanceof SyntaxError) {
    return new GyreError('network', `can't reach ${what} (and there is no folder ${hub.folder}): ${causeOf(error)}`, {
      remedy: 'Check the connection and HF_ENDPOINT, or name a folder.',
      cause: error,
    });
  }
  return error;
}

function causeOf(error: Error): string {
  return error.cause instanceof Error ? error.cause.message || error.message : error.message;
}

/** A snapshot that is whole in the cache, or undefined. */
async function fromCache(storage: string, revision: string): Promise<ResolvedModel | undefined> {
  const commit = COMMIT.test(revision)
    ? revision
    : (await readFile(path.join(storage, 'refs', revision), 'utf8').catch(() => '')).trim();
  if (!COMMIT.test(commit)) return undefined;
  const folder = path.join(storage, 'snapshots', commit);
  const files = await folderFiles(folder).catch(() => undefined);
  if (!files) return undefined;
  const names = new Set(await files.list());
  if (!names.has('config.json')) return undefined;
  if (names.has(INDEX_FILE)) {
    const shards = [...new Set((await files.readText(INDEX_FILE)).match(/[\w.-]+\.safetensors(?=")/g) ?? [])];
    if (!shards.every((shard) => names.has(shard))) return undefined;
  } else if (!names.has(SINGLE_FILE)) return undefined;
  return { files, folder, source: 'hub', commit };
}

/** Fetches what the cache lacks. */
async function fetchAll(hub: Hub, commit: string, wanted: readonly HubFile[]): Promise<ResolvedModel> {
  const folder = path.join(hub.storage, 'snapshots', commit);
  let files = wanted;
  const isHere = async (file: HubFile): Promise<boolean> =>
    (await stat(path.join(folder, file.path)).catch(() => undefined))?.size === file.size;
  const here = new Map<string, boolean>();
  for (const file of files) here.set(file.path, await isHere(file));
  if (![...here.values()].every(Boolean)) {
    const lock = await lockFolder(hub.storage);
    try {
      await mkdir(path.join(hub.storage, 'blobs'), { recursive: true });
      await mkdir(folder, { recursive: true });
      // The index first: it says which shards belong to the model.
      const index = files.find((file) => file.path === INDEX_FILE);
      if (index) {
        if (!here.get(INDEX_FILE)) await fetchFile(hub, commit, index, folder, () => undefined);
        const text = await readFile(path.join(folder, INDEX_FILE), 'utf8');
        files = files.filter((file) => !file.path.endsWith('.safetensors') || text.includes(`"${file.path}"`));
      } else {
        files = files.filter((file) => !file.path.endsWith('.safetensors') || file.path === SINGLE_FILE);
      }
      const total = files.reduce((sum, file) => sum + file.size, 0);
      let missing = 0;
      for (const file of files) if (!(await isHere(file))) missing += file.size - (await partialBytes(hub, file));
      const room = await freeBytes(hub.storage);
      if (missing > room) {
        throw new GyreError(
          'disk-full',
          `${hub.model} needs ${missing} more bytes in ${hub.storage}, ${room} are free`,
          {
            remedy: 'Free some space, or set HF_HOME to a folder on a larger disk.',
          },
        );
      }
      let done = 0;
      for (const file of files) {
        if (!(await isHere(file))) {
          await fetchFile(hub, commit, file, folder, (bytes) =>
            hub.onProgress({
              stage: 'download',
              done: done + bytes,
              total,
              unit: 'bytes',
              message: file.path,
            }),
          );
        }
        done += file.size;
        hub.onProgress({ stage: 'download', done, total, unit: 'bytes', message: file.path });
      }
    } finally {
      await lock.release();
    }
  }
  if (hub.revision !== commit) {
    const ref = path.join(hub.storage, 'refs', ...hub.revision.split('/'));
    if ((await readFile(ref, 'utf8').catch(() => '')) !== commit) await writeFileAtomic(ref, commit);
  }
  return { files: await folderFiles(folder), folder, source: 'hub', commit };
}

function incompletePath(hub: Hub, file: HubFile): string {
  return path.join(hub.storage, 'blobs', `${file.etag}.incomplete`);
}

/** Bytes of a file that an interrupted run left. */
async function partialBytes(hub: Hub, file: HubFile): Promise<number> {
  return Math.min(file.size, (await stat(incompletePath(hub, file)).catch(() => undefined))?.size ?? 0);
}

/** Fetches one file into the blobs, going on where an earlier attempt stopped, and links it into the snapshot. */
async function fetchFile(
  hub: Hub,
  commit: string,
  file: HubFile,
  folder: string,
  onBytes: (bytes: number) => void,
): Promise<void> {
  const blob = path.join(hub.storage, 'blobs', file.etag);
  if ((await stat(blob).catch(() => undefined))?.size !== file.size) {
    const incomplete = incompletePath(hub, file);
    for (let attempt = 1; ; attempt++) {
      try {
        await transfer(hub, commit, file, incomplete, onBytes);
        break;
      } catch (error) {
        const known = asHubError(asDiskError(error, incomplete), hub);
        const passing = known instanceof GyreError && known.code === 'network' && !isRefusal(known.cause);
        if (!passing || attempt === ATTEMPTS) throw known;
        await new Promise((resolve) => setTimeout(resolve, hub.retryDelay * 2 ** (attempt - 1)));
      }
    }
    if (file.sha256 !== undefined) {
      const hash = createHash('sha256');
      for await (const chunk of createReadStream(incomplete, { highWaterMark: 1 << 20 })) hash.update(chunk as Buffer);
      const digest = hash.digest('hex');
      if (digest !== file.sha256) {
        await unlink(incomplete);
        throw new GyreError(
          'file-corrupt',
          `${file.path} of ${hub.model}: expected SHA-256 ${file.sha256}, found ${digest}`,
          {
            remedy: 'The transfer went wrong and was thrown away: run again.',
          },
        );
      }
    }
    await rename(incomplete, blob);
  }
  await linkInto(blob, path.join(folder, file.path));
}

/** Appends what is missing of a file to `target`. */
async function transfer(
  hub: Hub,
  commit: string,
  file: HubFile,
  target: string,
  onBytes: (bytes: number) => void,
): Promise<void> {
  const handle = await open(target, 'a');
  try {
    let have = (await handle.stat()).size;
    if (have > file.size) {
      await handle.truncate(0);
      have = 0;
    }
    if (have === file.size) return;
    const place = file.path.split('/').map(encodeURIComponent).join('/');
    const url = `${hub.hubUrl}/${hub.kind === 'dataset' ? 'datasets/' : ''}${hub.model}/resolve/${commit}/${place}`;
    const response = await fetch(url, {
      headers: {
        ...(hub.token === undefined ? {} : { Authorization: `Bearer ${hub.token}` }),
        ...(have > 0 ? { Range: `bytes=${have}-` } : {}),
      },
    });
    if (!response.ok) {
      const detail = response.headers.get('X-Error-Message') ?? response.headers.get('X-Error-Code') ?? '';
      await response.body?.cancel();
      throw new HubApiError(url, response.status, undefined, `${detail || 'refused'} (${file.path})`);
    }
    if (have > 0 && response.status !== 206) {
      // The server ignored the range and sends everything again.
      await handle.truncate(0);
      have = 0;
    }
    if (!response.body) throw new TypeError('an answer without content');
    for await (const chunk of response.body as unknown as AsyncIterable<Uint8Array>) {
      if (have + chunk.byteLength > file.size) {
        await handle.truncate(0);
        throw new GyreError('file-corrupt', `${file.path} of ${hub.model}: more than the ${file.size} bytes promised`, {
          remedy: 'Run again; if it stays, the hub or a proxy in between is at fault.',
        });
      }
      let written = 0;
      while (written < chunk.byteLength) written += (await handle.write(chunk, written)).bytesWritten;
      have += chunk.byteLength;
      onBytes(have);
    }
    if (have !== file.size) {
      throw new GyreError('network', `${file.path} of ${hub.model} stopped at ${have} of ${file.size} bytes`, {
        remedy: 'Run again: the download goes on where it stopped.',
      });
    }
    await handle.sync();
  } finally {
    await handle.close();
  }
}

/** Makes `link` stand for `blob`: a relative symbolic link, a copy where the system has none for us. */
async function linkInto(blob: string, link: string): Promise<void> {
  await unlink(link).catch(() => undefined);
  try {
    const from = await realpath(path.dirname(link));
    await symlink(path.relative(from, await realpath(blob)), link);
  } catch {
    await copyFile(blob, link).catch((error: unknown) => {
      throw asDiskError(error, link);
    });
  }
}
