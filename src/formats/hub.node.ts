// A model by folder or by Hugging Face hub id: found, fetched into the hub's usual cache, resumable (Node.js).
import { listFiles, modelInfo } from '@huggingface/hub';
import { mkdir, readFile, stat } from 'node:fs/promises';
import { homedir } from 'node:os';
import path from 'node:path';
import { GyreError } from '../core/errors.js';
import { freeBytes, lockFolder, writeFileAtomic } from './atomic.node.js';
import {
  asHubError,
  clientOptions,
  COMMIT,
  HUB_ID,
  hubOf,
  hubStorage,
  isOffline,
  isRefusal,
  REVISION,
  type Hub,
  type HubOptions,
} from './hub-request.node.js';
import { fetchFile, hubFile, partialBytes, type HubFile } from './hub-transfer.node.js';
import { INDEX_FILE, SINGLE_FILE } from './safetensors.js';
import { folderFiles } from './source.node.js';
import type { ModelFiles } from './source.js';

/** Options of {@link resolveModel}. */
export interface ResolveOptions extends HubOptions {
  /** Branch, tag or commit on the hub. Default: `main`. */
  revision?: string;
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
  if (isOffline(options)) {
    const storage = hubStorage('model', model, options);
    const cached = await fromCache(storage, revision);
    if (cached) return cached;
    throw new GyreError('not-found', `${model} (${revision}) is not in the cache ${storage}, and the hub is off`, {
      remedy: 'Run once with the hub on (HF_HUB_OFFLINE unset), or name a folder.',
    });
  }
  const hub = await hubOf({ kind: 'model', name: model, revision, folder }, options);
  let found: { commit: string; files: HubFile[] };
  try {
    found = await look(hub);
  } catch (error) {
    if (!(error instanceof GyreError) || error.code !== 'network' || isRefusal(error.cause)) throw error;
    const cached = await fromCache(hub.storage, revision);
    if (!cached) throw error;
    return cached; // no connection, but nothing to fetch either
  }
  return fetchAll(hub, found.commit, found.files);
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
  const request = clientOptions(hub);
  const repo = { type: 'model' as const, name: hub.name };
  try {
    const { sha } = await modelInfo({ ...request, name: hub.name, revision: hub.revision, additionalFields: ['sha'] });
    if (!COMMIT.test(sha)) {
      throw new GyreError('network', `${hub.hubUrl} answered with something that is no commit`, {
        remedy: 'Check that HF_ENDPOINT names a Hugging Face hub.',
      });
    }
    const files: HubFile[] = [];
    for await (const entry of listFiles({ ...request, repo, revision: sha })) {
      const file = isNeeded(entry.path) ? hubFile(entry) : undefined;
      if (file) files.push(file);
    }
    const names = new Set(files.map((file) => file.path));
    if (!names.has('config.json') || !(names.has(SINGLE_FILE) || names.has(INDEX_FILE))) {
      throw new GyreError(
        'file-missing',
        `${hub.name} (${hub.revision}) on ${hub.hubUrl} lacks config.json or ${SINGLE_FILE}; found: ${[...names].join(', ') || 'nothing of use'}`,
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
          `${hub.name} needs ${missing} more bytes in ${hub.storage}, ${room} are free`,
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
