// Task files and their data on disk: the folder `tasks` of the package, task files by path, data in a folder of the user's
// or in the hub's cache (Node.js).
import { createHash } from 'node:crypto';
import { readdir, readFile, stat } from 'node:fs/promises';
import path from 'node:path';
import { fileURLToPath } from 'node:url';
import { GyreError } from '../core/errors.js';
import type { ProgressListener } from '../core/progress.js';
import { datasetFile, type DatasetFile } from '../formats/hub-dataset.node.js';
import { parseTaskDefinition, TASK_LIMITS, type TaskDefinition } from './definition.js';
import { DATA_ENDINGS, readRows, type Row } from './rows.js';

/** Where gyre's own task files lie. */
const TASKS_FOLDER = fileURLToPath(new URL('../../tasks', import.meta.url));
/** Root of the package, for data that comes with it. */
const PACKAGE_ROOT = fileURLToPath(new URL('../..', import.meta.url));

/** Names of the tasks that come with gyre, sorted. */
export async function taskNames(): Promise<string[]> {
  const files = await readdir(TASKS_FOLDER);
  return files
    .filter((file) => file.endsWith('.json'))
    .map((file) => file.slice(0, -5))
    .sort();
}

/**
 * A task by its name, or by the path of a task file.
 * @throws GyreError `not-found` that lists the tasks there are; otherwise as `parseTaskDefinition`.
 */
export async function loadTask(nameOrFile: string): Promise<TaskDefinition> {
  const isFile = /[/\\]|\.json$/.test(nameOrFile);
  const file = isFile ? nameOrFile : path.join(TASKS_FOLDER, `${nameOrFile}.json`);
  let text: string;
  try {
    text = await readFile(file, 'utf8');
  } catch (cause) {
    throw new GyreError('not-found', isFile ? `there is no task file ${file}` : `there is no task '${nameOrFile}'`, {
      remedy: `Tasks are ${(await taskNames()).join(', ')}; or give the path of a task file (.json).`,
      cause,
    });
  }
  const task = parseTaskDefinition(text, file);
  if (!isFile && task.name !== nameOrFile) {
    throw new GyreError('config-invalid', `${file} calls itself '${task.name}'`, {
      remedy: 'Name the file as the task.',
    });
  }
  return task;
}

/** Rows of a split and where they came from. */
export interface LoadedRows {
  readonly rows: readonly Row[];
  readonly files: readonly { readonly name: string; readonly sha256: string }[];
  /** Commit on the hub; null when the rows were read from a folder of the user's, or came with gyre. */
  readonly revision: string | null;
}

/** Options of {@link loadRows}. */
export interface LoadRowsOptions {
  /**
   * Folder with data. For the split `test` of the task `x` it is searched for `x-test` and `x` with the endings that
   * gyre reads, for the file's path in the data set (with the data set's name before it or without), and for further
   * names that the task gives.
   */
  readonly data?: string;
  readonly token?: string;
  /** Address of the hub; see `resolveModel`. */
  readonly hubUrl?: string;
  readonly cacheDir?: string;
  readonly offline?: boolean;
  /** Rows at most per file; default all. */
  readonly limit?: number;
  /** Stage `download`, in bytes. */
  readonly onProgress?: ProgressListener;
}

/**
 * Rows of a task's split: from the folder of `data` where it has them, from the package for what comes with gyre, else
 * from the hub at the task's commit. Checksums of the task hold for its own files, wherever they lie.
 * @throws GyreError `file-missing` saying what was looked for, `file-corrupt` for a wrong checksum; as `readRows`; as
 * `datasetFile`.
 */
export async function loadRows(
  task: TaskDefinition,
  split: string,
  options: LoadRowsOptions = {},
): Promise<LoadedRows> {
  const { source } = task;
  const entries = source.splits[split] ?? [];
  const found = await localFile(task, split, options.data);
  const rows: Row[] = [];
  const files: { name: string; sha256: string }[] = [];
  if (found) {
    await append(found, path.basename(found), undefined);
    return { rows, files, revision: null };
  }
  const names = localNames(task, split);
  if (source.dataset === null || source.revision === null) {
    throw new GyreError(
      'file-missing',
      `the data of ${task.name} is not on the hub and was not found${options.data === undefined ? '' : ` in ${options.data}`}`,
      {
        remedy: `Give the folder that holds ${names.at(-1) ?? names[0]} with --data.`,
      },
    );
  }
  let revision: string | null = null;
  for (const entry of entries) {
    const own = await firstFile(options.data, [entry.path, path.join(source.dataset, entry.path)]);
    const fetched = own === undefined ? await fromHub(source.dataset, source.revision, entry.path) : undefined;
    if (fetched) revision = fetched.commit;
    await append(fetched?.file ?? own ?? entry.path, entry.path, entry.sha256);
  }
  return { rows, files, revision };

  async function fromHub(dataset: string, at: string, file: string): Promise<DatasetFile> {
    try {
      return await datasetFile(dataset, at, file, options);
    } catch (error) {
      throw explain(error, task, names, options.data);
    }
  }

  async function append(file: string, name: string, expected: string | undefined): Promise<void> {
    const { size } = await stat(file);
    if (size > TASK_LIMITS.dataBytes) {
      throw new GyreError('limit-exceeded', `${file} has ${size} bytes, over the limit of ${TASK_LIMITS.dataBytes}`, {
        remedy: 'Cut the rows you need out of it.',
      });
    }
    const bytes = await readFile(file);
    const sha256 = createHash('sha256').update(bytes).digest('hex');
    if (expected !== undefined && sha256 !== expected) {
      throw new GyreError('file-corrupt', `${file}: expected SHA-256 ${expected}, found ${sha256}`, {
        remedy: `It is not the file that ${task.name} is defined on: delete it and run again.`,
      });
    }
    for (const row of await readRows(bytes, name, { limit: options.limit, textColumn: task.columns[0] }))
      rows.push(row);
    files.push({ name, sha256 });
  }
}

/** Names under which a split is looked for in a folder of the user's. */
function localNames(task: TaskDefinition, split: string): string[] {
  const { dataset, localNames: further, splits } = task.source;
  const stems = [`${task.name}-${split}`, `${task.name}-test`, task.name];
  return [
    ...stems.flatMap((stem) => DATA_ENDINGS.map((ending) => stem + ending)),
    ...(further[split] ?? []),
    ...(dataset === null ? (splits[split] ?? []).map((file) => file.path) : []),
  ];
}

async function localFile(task: TaskDefinition, split: string, data: string | undefined): Promise<string | undefined> {
  // Files for another split must not stand in for examples.
  const names = localNames(task, split).filter(
    (name) => split === task.split || name.startsWith(`${task.name}-${split}.`) || !name.startsWith(task.name),
  );
  if (data !== undefined && !(await stat(data).catch(() => undefined))?.isDirectory()) {
    throw new GyreError('not-found', `there is no folder ${data}`, { remedy: 'Check --data.' });
  }
  const own = await firstFile(data, names);
  if (own !== undefined || task.source.dataset !== null) return own;
  return firstFile(PACKAGE_ROOT, task.source.localNames[split] ?? []);
}

async function firstFile(folder: string | undefined, names: readonly string[]): Promise<string | undefined> {
  if (folder === undefined) return undefined;
  for (const name of names) {
    const file = path.join(folder, name);
    if ((await stat(file).catch(() => undefined))?.isFile()) return file;
  }
  return undefined;
}

/** Says how to go on without the hub, and what gated sets ask for. */
function explain(error: unknown, task: TaskDefinition, names: readonly string[], data: string | undefined): unknown {
  if (!(error instanceof GyreError) || !['network', 'not-found'].includes(error.code)) return error;
  const where = data === undefined ? '' : ` (and ${data} has no ${names[0]} or the like)`;
  const gated = task.source.gated ? ` The set is gated: accept its terms on the hub and set HF_TOKEN.` : '';
  return new GyreError(error.code, `${error.message}${where}`, {
    remedy: `${error.remedy ?? ''}${gated} Or give a folder with ${names[0]} by --data.`.trim(),
    cause: error,
  });
}
