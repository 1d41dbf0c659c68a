// The output folder of a quantization run: everything is written to `<out>.partial` beside it, shard by shard, under a
// fingerprint and a lock, and the folder is renamed when whole. A killed run leaves a partial folder that can be resumed.
import { mkdir, readdir, readFile, rename, rm, rmdir, stat } from 'node:fs/promises';
import path from 'node:path';
import { z } from 'zod';
import { GyreError } from '../core/errors.js';
import {
  asDiskError,
  isTemporary,
  lockFolder,
  LOCK_FILE,
  removeStaleTemporaries,
  writeFileAtomic,
  type Lock,
} from './atomic.node.js';
import { SafetensorsFile } from './safetensors.js';
import { shardName, type TensorEntry } from './safetensors-writer.js';
import { writeIndex, writeSafetensors } from './safetensors-writer.node.js';
import { folderFiles, openFile } from './source.node.js';
import { modelFiles, type FileSource, type ModelFiles } from './source.js';

/** What a run is, kept beside its shards: two runs with equal fingerprints make equal bytes. */
export const FINGERPRINT_FILE = 'gyre.json';
/** Calibration tokens of a run in progress. */
export const TOKENS_FILE = 'calibration.safetensors';

const fingerprintSchema = z.looseObject({ fingerprint: z.string() });

/** Ending of what is kept beside a shard until the run ends. */
const RECORD_ENDING = '.record.json';

/** Ending of what a shard that is not finished has come to. */
const STAGE_ENDING = '.stage.safetensors';

/** A finished file of a run, for the record. */
export interface RunFolderOptions {
  /** Continue a partial folder of the same fingerprint. */
  readonly resume: boolean;
}

/** Reads the fingerprint of a folder; undefined when it has none, or a file of that name which is not gyre's. */
export async function readFingerprint(folder: string): Promise<string | undefined> {
  try {
    const text = await readFile(path.join(folder, FINGERPRINT_FILE), 'utf8');
    return fingerprintSchema.parse(JSON.parse(text)).fingerprint;
  } catch {
    return undefined;
  }
}

/** The state of `<out>`: free, finished by an equal run, or taken by something else. */
export async function inspectOutput(out: string, fingerprint: string): Promise<'free' | 'finished'> {
  const there = await stat(out).catch(() => undefined);
  if (!there) return 'free';
  if (!there.isDirectory())
    throw new GyreError('output-exists', `${out} exists and is not a folder`, { remedy: 'choose another --out' });
  if ((await readdir(out)).length === 0) return 'free';
  const found = await readFingerprint(out);
  if (found === fingerprint) return 'finished';
  throw new GyreError(
    'output-exists',
    `${out} holds ${found ? 'the result of other settings or another model' : 'files that are not of this run'}`,
    {
      remedy: `choose another --out, or remove it: rm -r ${JSON.stringify(out)}`,
    },
  );
}

/** Where a run to `out` grows until it is whole. */
export function partialFolder(out: string): string {
  return `${path.resolve(out)}.partial`;
}

/** A run's partial folder, locked for this process. Implements the pipeline's sink. */
export class RunFolder {
  readonly #out: string;
  readonly #partial: string;
  readonly #lock: Lock;
  readonly #order: readonly string[];
  #finished = false;

  private constructor(out: string, partial: string, lock: Lock, order: readonly string[]) {
    this.#out = out;
    this.#partial = partial;
    this.#lock = lock;
    this.#order = order;
  }

  /**
   * Locks and prepares `<out>.partial`.
   * @param order every shard of the run, in the order of the final files.
   * @throws GyreError `output-busy` when another process holds it, `output-exists` when it holds shards of other settings,
   * of these but `resume` was not asked for, or files that are not gyre's.
   */
  static async open(
    out: string,
    fingerprint: string,
    order: readonly string[],
    options: RunFolderOptions,
  ): Promise<RunFolder> {
    const partial = partialFolder(out);
    await checkPlace(partial);
    const lock = await lockFolder(partial).catch((error: unknown) => {
      throw asDiskError(error, partial);
    });
    try {
      const found = await readFingerprint(partial);
      const finished = (await readdir(partial)).filter((name) => name.endsWith('.safetensors'));
      if (found === undefined) await refuseForeign(partial);
      // A run that stopped before it had anything to keep stands in nobody's way.
      if (found !== undefined && found !== fingerprint && finished.length > 0) {
        throw new GyreError(
          'output-exists',
          `${partial} holds an unfinished run with other settings or another model`,
          {
            remedy: `repeat that command with --resume, choose another --out, or remove it: rm -r ${JSON.stringify(partial)}`,
          },
        );
      }
      if (found !== undefined && finished.length > 0 && !options.resume) {
        throw new GyreError('output-exists', `${partial} holds an unfinished run of this command`, {
          remedy: `add --resume to go on, or remove it to start again: rm -r ${JSON.stringify(partial)}`,
        });
      }
      await removeStaleTemporaries(partial);
      await writeFileAtomic(path.join(partial, FINGERPRINT_FILE), `${JSON.stringify({ fingerprint }, null, 2)}\n`);
      return new RunFolder(out, partial, lock, order);
    } catch (error) {
      await lock.release();
      throw asDiskError(error, partial);
    }
  }

  #path(shard: string): string {
    return path.join(this.#partial, this.#fileName(shard));
  }

  #fileName(shard: string): string {
    const index = this.#order.indexOf(shard);
    if (index < 0) throw new Error(`unknown shard ${shard}`);
    return shardName(index, this.#order.length);
  }

  async has(shard: string): Promise<boolean> {
    return (await stat(this.#path(shard)).catch(() => undefined)) !== undefined;
  }

  async write(
    shard: string,
    entries: readonly TensorEntry[],
    metadata?: Readonly<Record<string, string>>,
  ): Promise<void> {
    await writeSafetensors(this.#path(shard), entries, metadata ? { metadata: { format: 'pt', ...metadata } } : {});
    await rm(this.#stagePath(shard), { force: true });
  }

  async keepStage(
    shard: string,
    entries: readonly TensorEntry[],
    metadata: Readonly<Record<string, string>>,
  ): Promise<void> {
    await writeSafetensors(this.#stagePath(shard), entries, { metadata });
  }

  async keptStage(shard: string): Promise<FileSource | undefined> {
    const file = this.#stagePath(shard);
    return (await stat(file).catch(() => undefined)) && openFile(file);
  }

  #stagePath(shard: string): string {
    return this.#path(shard).replace(/\.safetensors$/, STAGE_ENDING);
  }

  async keepRecord(shard: string, record: string): Promise<void> {
    await writeFileAtomic(this.#recordPath(shard), record);
  }

  async keptRecord(shard: string): Promise<string | undefined> {
    return (await this.has(shard)) ? readFile(this.#recordPath(shard), 'utf8').catch(() => undefined) : undefined;
  }

  #recordPath(shard: string): string {
    return this.#path(shard).replace(/\.safetensors$/, RECORD_ENDING);
  }

  /** One finished shard, looking like a model of a single file. */
  open(shard: string): ModelFiles {
    return modelFiles(
      this.#path(shard),
      () => Promise.resolve(['model.safetensors']),
      () => openFile(this.#path(shard)),
    );
  }

  /** Files kept for resuming and not part of the result. */
  temporary(name: string): string {
    return path.join(this.#partial, name);
  }

  /**
   * Writes the index and the given text files, then those that `last` makes of the model as it now is, and renames the
   * folder to its final name.
   */
  async finish(
    files: Readonly<Record<string, string | Uint8Array>>,
    last?: (model: ModelFiles) => Promise<Readonly<Record<string, string>>>,
  ): Promise<void> {
    const weightMap = new Map<string, string>();
    let total = 0;
    for (const shard of this.#order) {
      const file = await SafetensorsFile.open(await openFile(this.#path(shard)));
      for (const [name, tensor] of file.tensors) {
        weightMap.set(name, this.#fileName(shard));
        total += tensor.end - tensor.begin;
      }
      await file.close();
    }
    await writeIndex(this.#partial, weightMap, total);
    for (const [name, content] of Object.entries(files)) await writeFileAtomic(path.join(this.#partial, name), content);
    const made = last ? await last(await folderFiles(this.#partial)) : {};
    for (const [name, content] of Object.entries(made)) await writeFileAtomic(path.join(this.#partial, name), content);
    await rm(this.temporary(TOKENS_FILE), { force: true });
    await this.#remove(RECORD_ENDING);
    // Of a run that was killed between a shard and the end of what was kept of it.
    await this.#remove(STAGE_ENDING);
    await mkdir(path.dirname(path.resolve(this.#out)), { recursive: true });
    this.#finished = true;
    // An empty folder of that name may be there; rename replaces it.
    await this.#lock.release();
    await rm(path.join(this.#partial, LOCK_FILE), { force: true });
    await rename(this.#partial, path.resolve(this.#out));
  }

  async #remove(ending: string): Promise<void> {
    for (const name of await readdir(this.#partial))
      if (name.endsWith(ending)) await rm(path.join(this.#partial, name), { force: true });
  }

  /** Gives the folder up, keeping what is finished; without anything finished, nothing stays. */
  async close(): Promise<void> {
    if (this.#finished) return;
    const names = await readdir(this.#partial).catch(() => undefined);
    if (names?.every((name) => OWN_FILES.includes(name) || name.endsWith(RECORD_ENDING))) {
      await this.#remove(RECORD_ENDING);
      await rm(path.join(this.#partial, FINGERPRINT_FILE), { force: true });
      await this.#lock.release();
      // Another run may have come in meanwhile: then the folder is its own, and not empty.
      await rmdir(this.#partial).catch(() => undefined);
    }
    await this.#lock.release();
  }
}

/** What gyre itself puts into a partial folder before its first result. */
const OWN_FILES: readonly string[] = [FINGERPRINT_FILE, LOCK_FILE];

/** Throws when the folder can't be made because a file is in the way. */
async function checkPlace(partial: string): Promise<void> {
  for (let at = partial; ; at = path.dirname(at)) {
    const there = await stat(at).catch(() => undefined);
    if (there?.isDirectory()) return;
    if (there)
      throw new GyreError('output-exists', `${at} is not a folder, so ${partial} can't be made`, {
        remedy: 'choose another --out',
      });
    if (at === path.dirname(at)) return;
  }
}

/** Throws when a folder without a fingerprint holds anything but a lock and temporary files. */
async function refuseForeign(partial: string): Promise<void> {
  const foreign = (await readdir(partial)).filter((name) => name !== LOCK_FILE && !isTemporary(name));
  if (foreign.length === 0) return;
  throw new GyreError(
    'output-exists',
    `${partial} holds files that are not gyre's: ${foreign.slice(0, 3).join(', ')}`,
    {
      remedy: 'this is where the result would grow: move them away, or choose another --out',
    },
  );
}
