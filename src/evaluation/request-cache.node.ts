// Request caches on disk: one file of JSON lines per model, settings and task, appended to as results come (Node.js).
import { mkdir, open, readFile, type FileHandle } from 'node:fs/promises';
import { homedir } from 'node:os';
import path from 'node:path';
import { asDiskError } from '../formats/atomic.node.js';
import type { RequestCache } from './request-cache.js';

/** Default folder: `gyre/eval` in XDG_CACHE_HOME or ~/.cache. */
export function evaluationCacheDir(env: NodeJS.ProcessEnv = process.env): string {
  return path.join(env.XDG_CACHE_HOME ?? path.join(homedir(), '.cache'), 'gyre', 'eval');
}

/** A cache file that is open; close it when done. */
export interface OpenRequestCache extends RequestCache {
  /** Results it held when opened. */
  readonly known: number;
  close(): Promise<void>;
}

/**
 * Opens a cache file, made if it is not there. Lines that can't be read are passed over: the last one when a run was
 * killed while writing. Two processes may append at once, as each write is one whole block of lines.
 */
export async function openRequestCache(file: string): Promise<OpenRequestCache> {
  await mkdir(path.dirname(file), { recursive: true });
  const known = new Map<string, unknown>();
  const text = await readFile(file, 'utf8').catch(() => '');
  for (const line of text.split('\n')) {
    const entry = parseEntry(line);
    if (entry) known.set(...entry);
  }
  let handle: FileHandle;
  try {
    handle = await open(file, 'a');
    // What a killed run left of a line would swallow the next one.
    if (text !== '' && !text.endsWith('\n')) await handle.appendFile('\n');
  } catch (error) {
    throw asDiskError(error, file);
  }
  return {
    known: known.size,
    get: (key) => known.get(key),
    add: async (entries) => {
      for (const [key, value] of entries) known.set(key, value);
      const lines = entries.map(([key, value]) => `${JSON.stringify([key, value])}\n`).join('');
      try {
        await handle.appendFile(lines);
      } catch (error) {
        throw asDiskError(error, file);
      }
    },
    close: () => handle.close(),
  };
}

function parseEntry(line: string): [string, unknown] | undefined {
  try {
    const value: unknown = JSON.parse(line);
    if (Array.isArray(value) && value.length === 2 && typeof value[0] === 'string') return [value[0], value[1]];
  } catch {
    // Cut short; asked again.
  }
  return undefined;
}
