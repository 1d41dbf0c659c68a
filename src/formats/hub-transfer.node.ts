// Files from the Hugging Face hub into its usual cache: transfers that go on where they stopped, checked against the hub's
// own checksums (Node.js).
//
// @huggingface/hub's own downloads start over after an interruption, don't verify what they got and print to the standard
// output, so files are fetched here, into the same layout:
// models--owner--name/{refs/<revision>, blobs/<etag>, snapshots/<commit>/<file> → blob}; data sets as datasets--….
import { HubApiError, type ListFileEntry } from '@huggingface/hub';
import { createHash } from 'node:crypto';
import { createReadStream } from 'node:fs';
import { copyFile, open, realpath, rename, stat, symlink, unlink } from 'node:fs/promises';
import path from 'node:path';
import { GyreError } from '../core/errors.js';
import { asDiskError } from './atomic.node.js';
import { asHubError, isRefusal, type Hub } from './hub-request.node.js';

/** How often a broken transfer is taken up again before giving up. */
const ATTEMPTS = 5;

/** A file of a repository. */
export interface HubFile {
  readonly path: string;
  readonly size: number;
  /** Name of the blob in the cache. */
  readonly etag: string;
  /** SHA-256 of the content; large files only. */
  readonly sha256: string | undefined;
}

/** A file as the hub lists it, or undefined for folders and entries without a usable name for the cache. */
export function hubFile(entry: ListFileEntry): HubFile | undefined {
  const etag = entry.lfs?.oid ?? entry.oid ?? '';
  if (entry.type !== 'file' || !/^[0-9a-f]{40,64}$/.test(etag)) return undefined;
  return { path: entry.path, size: entry.lfs?.size ?? entry.size, etag, sha256: entry.lfs?.oid };
}

function incompletePath(hub: Hub, file: HubFile): string {
  return path.join(hub.storage, 'blobs', `${file.etag}.incomplete`);
}

/** Bytes of a file that an interrupted run left. */
export async function partialBytes(hub: Hub, file: HubFile): Promise<number> {
  return Math.min(file.size, (await stat(incompletePath(hub, file)).catch(() => undefined))?.size ?? 0);
}

/** Fetches one file into the blobs, going on where an earlier attempt stopped, and links it into the snapshot. */
export async function fetchFile(
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
          `${file.path} of ${hub.name}: expected SHA-256 ${file.sha256}, found ${digest}`,
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
    const url = `${hub.hubUrl}/${hub.kind === 'dataset' ? 'datasets/' : ''}${hub.name}/resolve/${commit}/${place}`;
    const response = await fetch(url, {
      headers: {
        ...(hub.token === undefined ? {} : { Authorization: `Bearer ${hub.token}` }),
        ...(have > 0 ? { Range: `bytes=${have}-` } : {}),
      },
    });
    // The hub sends large files through a storage with signed addresses that expire; the next attempt gets a new one.
    if (response.status === 403 && new URL(response.url).origin !== new URL(hub.hubUrl).origin) {
      await response.body?.cancel();
      throw new GyreError('network', `the storage behind ${hub.hubUrl} refused ${file.path} of ${hub.name}`, {
        remedy: 'Run again: the download goes on where it stopped.',
      });
    }
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
        throw new GyreError('file-corrupt', `${file.path} of ${hub.name}: more than the ${file.size} bytes promised`, {
          remedy: 'Run again; if it stays, the hub or a proxy in between is at fault.',
        });
      }
      let written = 0;
      while (written < chunk.byteLength) written += (await handle.write(chunk, written)).bytesWritten;
      have += chunk.byteLength;
      onBytes(have);
    }
    if (have !== file.size) {
      throw new GyreError('network', `${file.path} of ${hub.name} stopped at ${have} of ${file.size} bytes`, {
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
