// Raw reading of a model's JSON files, with size limits and errors that name the file. Their meaning is models/' business.
import type { z } from 'zod';
import { GyreError } from '../core/errors.js';
import type { ModelFiles } from './source.js';

/** Largest config.json, generation_config.json and the like, bytes. */
export const MAX_CONFIG_BYTES = 4 * 1024 * 1024;

/**
 * A JSON file of a model.
 * @param limit bytes at most, by default {@link MAX_CONFIG_BYTES}.
 * @throws `file-missing`, `limit-exceeded`, `file-corrupt` when it is not JSON.
 */
export async function readJson(files: ModelFiles, name: string, limit = MAX_CONFIG_BYTES): Promise<unknown> {
  return parseJson(await files.readText(name, limit), `${name} of ${files.name}`);
}

/** Like {@link readJson}, undefined when the file is not there. */
export async function readOptionalJson(files: ModelFiles, name: string, limit = MAX_CONFIG_BYTES): Promise<unknown> {
  return (await files.list()).includes(name) ? readJson(files, name, limit) : undefined;
}

/** JSON.parse with an error that names the file. */
export function parseJson(text: string, name: string): unknown {
  try {
    return JSON.parse(text) as unknown;
  } catch (cause) {
    throw new GyreError('file-corrupt', `${name} is not valid JSON: ${cause instanceof Error ? cause.message : ''}`, {
      remedy: 'Fetch the file again, or mend it if you edited it.',
      cause,
    });
  }
}

/**
 * Checks JSON against a schema.
 * @throws `config-invalid` that lists each wrong field: what was expected and what was found.
 */
export function validate<T extends z.ZodType>(schema: T, value: unknown, name: string): z.output<T> {
  const result = schema.safeParse(value);
  if (result.success) return result.data;
  const shown = result.error.issues.slice(0, 5).map((issue) => {
    const where = issue.path.map(String).join('.') || '(whole file)';
    return `${where}: ${issue.message}`;
  });
  const more = result.error.issues.length > 5 ? `; and ${result.error.issues.length - 5} more` : '';
  throw new GyreError('config-invalid', `${name} is not what it should be: ${shown.join('; ')}${more}`, {
    remedy: 'Compare the file with the original on the hub.',
    cause: result.error,
  });
}
