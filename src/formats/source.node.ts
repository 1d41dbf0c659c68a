// Files and model folders on disk (Node.js).
import { open, readdir, stat, type FileHandle } from 'node:fs/promises';
import path from 'node:path';
import { GyreError } from '../core/errors.js';
import { checkRange, modelFiles, truncated, type FileSource, type ModelFiles } from './source.js';

/** Bytes asked of the system at once: one read call can't return 2 GiB or more. */
const CHUNK = 1 << 30;

/**
 * A file on disk, opened once and read by ranges.
 * @throws `file-missing` when it can't be opened.
 */
export async function openFile(file: string): Promise<FileSource> {
  let handle: FileHandle | undefined;
  let size: number;
  try {
    handle = await open(file, 'r');
    size = (await handle.stat()).size;
  } catch (cause) {
    await handle?.close();
    throw new GyreError('file-missing', `can't open ${file}: ${messageOf(cause)}`, {
      remedy: 'Check the path and that you may read it.',
      cause,
    });
  }
  const readInto = async (offset: number, target: Uint8Array): Promise<void> => {
    checkRange(file, size, offset, target.byteLength);
    let done = 0;
    while (done < target.byteLength) {
      const want = Math.min(CHUNK, target.byteLength - done);
      const { bytesRead } = await handle.read(target, done, want, offset + done);
      if (bytesRead === 0) throw truncated(file, offset + done, offset, target.byteLength);
      done += bytesRead;
    }
  };
  return {
    name: file,
    size: () => Promise.resolve(size),
    read: async (offset, length) => {
      checkRange(file, size, offset, length);
      const bytes = new Uint8Array(length);
      await readInto(offset, bytes);
      return bytes;
    },
    readInto,
    close: () => handle.close(),
  };
}

/**
 * The files of a model folder (its subfolders are not looked into).
 * @throws `not-found` when there is no such folder.
 */
export async function folderFiles(folder: string): Promise<ModelFiles> {
  let isFolder: boolean;
  try {
    isFolder = (await stat(folder)).isDirectory();
  } catch (cause) {
    throw new GyreError('not-found', `there is no folder ${folder}`, { remedy: 'Check the path.', cause });
  }
  if (!isFolder) {
    throw new GyreError('not-found', `expected a model folder, found a file: ${folder}`, {
      remedy: 'Name the folder that holds config.json and the .safetensors files.',
    });
  }
  return modelFiles(
    folder,
    async () => {
      const names: string[] = [];
      for (const entry of await readdir(folder, { withFileTypes: true })) {
        if (entry.isFile()) names.push(entry.name);
        else if (entry.isSymbolicLink()) {
          // The hub's cache is made of links to blobs; a link to nothing is a file that is not there.
          const target = await stat(path.join(folder, entry.name)).catch(() => undefined);
          if (target?.isFile()) names.push(entry.name);
        }
      }
      return names.sort();
    },
    (file) => openFile(path.join(folder, file)),
  );
}

/** The message of anything thrown. */
function messageOf(error: unknown): string {
  return error instanceof Error ? error.message : String(error);
}
