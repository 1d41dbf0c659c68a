// Files of a data set on the Hugging Face hub, at a commit or on the hub's own Parquet branch (Node.js).
import { datasetInfo, listFiles } from '@huggingface/hub';
import { mkdir, readFile, stat } from 'node:fs/promises';
import path from 'node:path';
import { GyreError } from '../core/errors.js';
import { lockFolder, writeFileAtomic } from './atomic.node.js';
import {
  asHubError,
  clientOptions,
  COMMIT,
  HUB_ID,
  hubOf,
  hubStorage,
  isOffline,
  isRefusal,
  type Hub,
  type HubOptions,
} from './hub-request.node.js';
import { fetchFile, hubFile, type HubFile } from './hub-transfer.node.js';

/**
 * The branch on which the hub keeps its Parquet conversion of a data set: the only files of sets that are published as a
 * script. It moves when the set does, so what was read is named by its commit.
 */
export const PARQUET_BRANCH = 'refs/convert/parquet';

/** A file of a data set on this machine. */
export interface DatasetFile {
  readonly file: string;
  readonly commit: string;
}

/**
 * One file of a data set, from the hub's cache or fetched into it; interrupted transfers go on.
 * @param revision a commit, or {@link PARQUET_BRANCH}.
 * @throws GyreError as `resolveModel`; `file-missing` when the commit has no such file.
 */
export async function datasetFile(
  dataset: string,
  revision: string,
  file: string,
  options: HubOptions = {},
): Promise<DatasetFile> {
  ensureDatasetName(dataset, revision, file);
  const storage = hubStorage('dataset', dataset, options);
  const placeAt = (commit: string): string => path.join(storage, 'snapshots', commit, ...file.split('/'));
  const cached = async (commit: string): Promise<DatasetFile | undefined> =>
    (await stat(placeAt(commit)).catch(() => undefined)) && { file: placeAt(commit), commit };
  if (COMMIT.test(revision)) {
    const found = await cached(revision);
    if (found) return found;
  }
  const known = async (): Promise<DatasetFile | undefined> => {
    const commit = await readFile(refFile(storage, revision), 'utf8').catch(() => '');
    return COMMIT.test(commit) ? cached(commit) : undefined;
  };
  if (isOffline(options)) {
    const found = await known();
    if (found) return found;
    throw new GyreError('not-found', `${file} of ${dataset} is not in the cache ${storage}, and the hub is off`, {
      remedy: 'Run once with the hub on (HF_HUB_OFFLINE unset), or give the folder of the data with --data.',
    });
  }
  const hub = await hubOf({ kind: 'dataset', name: dataset, revision, folder: placeAt(revision) }, options);
  let commit: string;
  let entry: HubFile | undefined;
  try {
    commit = COMMIT.test(revision) ? revision : await commitOf(hub);
    const found = await cached(commit);
    if (found) return found;
    entry = await findFile(hub, commit, file);
  } catch (error) {
    const explained = asHubError(error, hub);
    const unreachable = explained instanceof GyreError && explained.code === 'network' && !isRefusal(explained.cause);
    const found = unreachable ? await known() : undefined;
    if (found) return found; // no connection, but nothing to fetch either
    throw explained;
  }
  if (!entry) {
    throw new GyreError('file-missing', `${dataset} has no ${file} at ${commit.slice(0, 12)}`, {
      remedy: 'Check the path in the task file.',
    });
  }
  const { size } = entry;
  const target = placeAt(commit);
  await mkdir(path.join(storage, 'blobs'), { recursive: true });
  await mkdir(path.dirname(target), { recursive: true });
  const lock = await lockFolder(storage);
  try {
    await fetchFile(hub, commit, entry, path.join(storage, 'snapshots', commit), (bytes) =>
      hub.onProgress({ stage: 'download', done: bytes, total: size, unit: 'bytes', message: `${dataset}/${file}` }),
    );
    if (commit !== revision) await writeFileAtomic(refFile(storage, revision), commit);
  } finally {
    await lock.release();
  }
  return { file: target, commit };
}

function refFile(storage: string, revision: string): string {
  return path.join(storage, 'refs', ...revision.split('/'));
}

/** The commit that a branch is at. */
async function commitOf(hub: Hub): Promise<string> {
  const { name, revision, hubUrl } = hub;
  const { sha } = await datasetInfo({ ...clientOptions(hub), name, revision, additionalFields: ['sha'] });
  if (COMMIT.test(sha)) return sha;
  throw new GyreError('network', `${hubUrl} answered with something that is no commit`, {
    remedy: 'Check that HF_ENDPOINT names a Hugging Face hub.',
  });
}

/** A file as the hub lists it at a commit. */
async function findFile(hub: Hub, commit: string, file: string): Promise<HubFile | undefined> {
  const folder = path.posix.dirname(file);
  for await (const found of listFiles({
    ...clientOptions(hub),
    repo: { type: 'dataset', name: hub.name },
    revision: commit,
    ...(folder === '.' ? {} : { path: folder }),
  })) {
    if (found.path === file) return hubFile(found);
  }
  return undefined;
}

function ensureDatasetName(dataset: string, revision: string, file: string): void {
  const parts = file.split('/');
  const safe = !parts.some((part) => part === '' || part === '.' || part === '..') && !file.includes('\\');
  const pinned = COMMIT.test(revision) || revision === PARQUET_BRANCH;
  if (HUB_ID.test(dataset) && !/\.\.|--/.test(dataset) && pinned && safe) return;
  throw new GyreError('usage', `${JSON.stringify(`${dataset}@${revision}/${file}`)} can't be a file of a data set`, {
    remedy: `Name owner/name, a commit of 40 digits or ${PARQUET_BRANCH}, and a relative path.`,
  });
}
