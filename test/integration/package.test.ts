// What package.json promises is in the build (`npm test` makes it first): subpath exports, command, browser map, files.
import { existsSync, readFileSync } from 'node:fs';
import { createRequire } from 'node:module';
import path from 'node:path';
import { pathToFileURL } from 'node:url';
import { describe, expect, it } from 'vitest';

const root = path.join(import.meta.dirname, '../..');
const require = createRequire(import.meta.url);

interface Manifest {
  readonly exports: Readonly<Record<string, string | Readonly<Record<'types' | 'default', string>>>>;
  readonly bin: Readonly<Record<string, string>>;
  readonly browser: Readonly<Record<string, false>>;
  readonly files: readonly string[];
}
const manifest = JSON.parse(readFileSync(path.join(root, 'package.json'), 'utf8')) as Manifest;
const modules = Object.entries(manifest.exports).flatMap(([subpath, target]) =>
  typeof target === 'string' ? [] : [{ name: path.posix.join('gyre', subpath), target }],
);

describe('package exports', () => {
  it.each(modules)('$name can be imported and has types', async ({ name, target }) => {
    expect(existsSync(path.join(root, target.types)), target.types).toBe(true);
    const file = require.resolve(name);
    expect(file).toBe(path.join(root, target.default));
    const exported = (await import(pathToFileURL(file).href)) as object;
    expect(Object.keys(exported).length).toBeGreaterThan(0);
  });

  it.each([
    ...Object.values(manifest.exports).filter((target) => typeof target === 'string'),
    ...Object.values(manifest.bin),
    ...Object.keys(manifest.browser),
    ...manifest.files,
  ])('%s exists', (name) => {
    expect(existsSync(path.join(root, name))).toBe(true);
  });
});
