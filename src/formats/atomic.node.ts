// Files that are whole or absent, locks that outlive no process, and the room left on a disk (Node.js).
import { randomBytes } from 'node:crypto';
import { constants } from 'node:fs';
import {
  copyFile,
  link,
  mkdir,
  open,
  readFile,
  readdir,
  rename,
  statfs,
  unlink,
  type FileHandle,
} from 'node:fs/promises';
import { hostname } from 'node:os';
import path from 'node:path';
import { z } from 'zod';
import { GyreError } from '../core/errors.js';

/** Name of the lock file in an output folder. */
export const LOCK_FILE = '.gyre-lock';

const TEMP_PATTERN = /^\..+\.tmp-(\d+)-[0-9a-f]{12}$/;
/** Bytes handed to the system at once. */
const CHUNK = 64 * 1024 * 1024;

/** The system's error code, e.g. `ENOSPC`. */
function codeOf(error: unknown): string | undefined {
  return error instanceof Error && 'code' in error && typeof error.code === 'string' ? error.code : undefined;
}

/** Turns "no space" errors of the system into `disk-full`; others are passed on. */
export function asDiskError(error: unknown, file: string): unknown {
  const code = codeOf(error);
  if (code !== 'ENOSPC' && code !== 'EDQUOT') return error;
  const what = code === 'ENOSPC' ? 'the disk is full' : 'your disk quota is used up';
  return new GyreError('disk-full', `can't write ${file}: ${what}`, {
    remedy: 'Free some space or choose another output folder; what was finished is kept.',
    cause: error,
  });
}

/** A file written under a temporary name in the same folder and renamed when whole. */
export class AtomicFile {
  readonly #file: string;
  readonly #temp: string;
  readonly #handle: FileHandle;

  private constructor(file: string, temp: string, handle: FileHandle) {
    this.#file = file;
    this.#temp = temp;
    this.#handle = handle;
  }

  /** Makes the folder if needed and opens the temporary file. @throws `disk-full`. */
  static async create(file: string): Promise<AtomicFile> {
    const folder = path.dirname(file);
    const temp = path.join(folder, `.${path.basename(file)}.tmp-${process.pid}-${randomBytes(6).toString('hex')}`);
    try {
      await mkdir(folder, { recursive: true });
      return new AtomicFile(file, temp, await open(temp, 'wx'));
    } catch (error) {
      throw asDiskError(error, file);
    }
  }

  /** Appends bytes. */
  async write(bytes: Uint8Array): Promise<void> {
    let done = 0;
    while (done < bytes.byteLength) {
      const { bytesWritten } = await this.#handle.write(bytes, done, Math.min(CHUNK, bytes.byteLength - done));
      done += bytesWritten;
    }
  }

  /**
   * Runs `fill`, which writes the content, then makes the file appear under its name. When anything fails, the
   * temporary file is removed and whatever had the name before stays.
   * @throws `disk-full`; whatever `fill` throws.
   */
  async finish<T>(fill: () => Promise<T>): Promise<T> {
    try {
      const result = await fill();
      await this.#handle.sync();
      await this.#handle.close();
      await rename(this.#temp, this.#file);
      await syncFolder(path.dirname(this.#file));
      return result;
    } catch (error) {
      await this.#handle.close().catch(() => undefined);
      await unlink(this.#temp).catch(() => undefined);
      throw asDiskError(error, this.#file);
    }
  }
}

/** Makes a rename last through a power cut, where the system can. */
async function syncFolder(folder: string): Promise<void> {
  let handle: FileHandle | undefined;
  try {
    handle = await open(folder, constants.O_RDONLY);
    await handle.sync();
  } catch {
    // Windows can't open folders, and some network file systems refuse: the file itself is on the disk already.
  } finally {
    await handle?.close();
  }
}

/** Writes a file whole or not at all: temporary name, fsync, rename. @throws `disk-full`. */
export async function writeFileAtomic(file: string, content: string | Uint8Array): Promise<void> {
  const out = await AtomicFile.create(file);
  await out.finish(() => out.write(typeof content === 'string' ? new TextEncoder().encode(content) : content));
}

/** Whether a file's name is one of {@link AtomicFile}'s temporary ones. */
export function isTemporary(name: string): boolean {
  return TEMP_PATTERN.test(name);
}

/** Removes temporary files that killed processes left in a folder. @returns their number. */
export async function removeStaleTemporaries(folder: string): Promise<number> {
  let removed = 0;
  for (const name of await readdir(folder).catch(() => [])) {
    const pid = TEMP_PATTERN.exec(name)?.[1];
    if (pid === undefined || isAlive(Number(pid))) continue;
    await unlink(path.join(folder, name)).catch(() => undefined);
    removed++;
  }
  return removed;
}

const lockSchema = z.object({
  pid: z.number().int().positive(),
  host: z.string(),
  startedAt: z.string(),
  /** The process's start in clock ticks since boot (Linux): tells a reused pid. */
  processStart: z.string().optional(),
});

/** A lock that is held. */
export interface Lock {
  /** Gives it back; does nothing the second time. */
  release(): Promise<void>;
}

/**
 * Takes a folder for this process alone, by a lock file (`.gyre-lock`: pid, host, start time). The folder is made if
 * needed. A lock left by a dead process of this machine is taken over, and its temporary files are removed.
 * @throws `output-busy` naming the process that holds it.
 */
export async function lockFolder(folder: string): Promise<Lock> {
  await mkdir(folder, { recursive: true });
  const file = path.join(folder, LOCK_FILE);
  const own = `${JSON.stringify({
    pid: process.pid,
    host: hostname(),
    startedAt: new Date().toISOString(),
    processStart: await processStart(process.pid),
  })}\n`;
  for (let attempt = 0; attempt < 10; attempt++) {
    try {
      // Written aside and linked into place, so that nobody ever reads half a lock.
      const temp = path.join(folder, `.${path.basename(file)}.tmp-${process.pid}-${randomBytes(6).toString('hex')}`);
      const handle = await open(temp, 'wx');
      try {
        await handle.writeFile(own);
        await handle.close();
        await linkNew(temp, file);
      } finally {
        await handle.close().catch(() => undefined);
        await unlink(temp).catch(() => undefined);
      }
      await removeStaleTemporaries(folder);
      let held = true;
      return {
        release: async () => {
          if (!held) return;
          held = false;
          if ((await readFile(file, 'utf8').catch(() => '')) === own) await unlink(file).catch(() => undefined);
        },
      };
    } catch (error) {
      if (codeOf(error) !== 'EEXIST') throw asDiskError(error, file);
    }
    const text = await readFile(file, 'utf8').catch(() => undefined);
    if (text === undefined) continue; // released just now
    await refuseIfHeld(folder, file, text);
    // Stale. Whoever renames it away first may go on; a fresh lock caught by mistake is put back.
    const aside = `${file}.stale-${process.pid}-${randomBytes(6).toString('hex')}`;
    try {
      await rename(file, aside);
      if ((await readFile(aside, 'utf8')) !== text) await linkNew(aside, file).catch(() => undefined);
    } catch {
      // Another process was faster.
    } finally {
      await unlink(aside).catch(() => undefined);
    }
  }
  throw new GyreError('output-busy', `${folder} is being taken by several processes at once`, { remedy: 'Try again.' });
}

/** Gives a file a second name that must be new (EEXIST otherwise); copies it where the disk has no hard links. */
async function linkNew(from: string, to: string): Promise<void> {
  try {
    await link(from, to);
  } catch (error) {
    if (!['EPERM', 'ENOTSUP', 'EOPNOTSUPP', 'ENOSYS'].includes(codeOf(error) ?? '')) throw error;
    await copyFile(from, to, constants.COPYFILE_EXCL);
  }
}

/** Throws `output-busy` unless the lock's process is known to be gone. */
async function refuseIfHeld(folder: string, file: string, text: string): Promise<void> {
  let json: unknown;
  try {
    json = JSON.parse(text) as unknown;
  } catch {
    json = undefined;
  }
  const lock = lockSchema.safeParse(json);
  if (!lock.success) {
    throw new GyreError('output-busy', `${folder} has a lock file that is not gyre's: ${file}`, {
      remedy: `If no other gyre works there, delete ${file} and try again.`,
    });
  }
  const { pid, host, startedAt, processStart: started } = lock.data;
  if (host !== hostname()) {
    throw new GyreError('output-busy', `${folder} is in use by process ${pid} on ${host} since ${startedAt}`, {
      remedy: `Wait for it, or choose another folder. If that machine no longer runs it, delete ${file}.`,
    });
  }
  if (!isAlive(pid)) return;
  const actual = await processStart(pid);
  if (started !== undefined && actual !== undefined && actual !== started) return; // the pid was given to another process
  throw new GyreError('output-busy', `${folder} is in use by process ${pid} since ${startedAt}`, {
    remedy: `Wait for it, stop it (kill ${pid}), or choose another folder.`,
  });
}

/** Whether a process of this machine lives. */
function isAlive(pid: number): boolean {
  try {
    process.kill(pid, 0);
    return true;
  } catch (error) {
    return codeOf(error) === 'EPERM'; // alive, but someone else's
  }
}

/** When a process started, in clock ticks since boot; undefined where the system doesn't tell. */
async function processStart(pid: number): Promise<string | undefined> {
  const text = await readFile(`/proc/${pid}/stat`, 'utf8').catch(() => undefined);
  // The second field is the command in parentheses and may hold spaces; the start time is the 22nd.
  return text?.slice(text.lastIndexOf(')') + 2).split(' ')[19];
}

/** Bytes free for this user on the disk of a folder (or of its nearest existing ancestor). */
export async function freeBytes(folder: string): Promise<number> {
  let at = path.resolve(folder);
  for (;;) {
    try {
      const { bavail, bsize } = await statfs(at);
      return bavail * bsize;
    } catch (error) {
      const parent = path.dirname(at);
      if (!['ENOENT', 'ENOTDIR'].includes(codeOf(error) ?? '') || parent === at) throw error;
      at = parent;
    }
  }
}
