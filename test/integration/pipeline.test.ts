// The pipeline on tiny models of several families: what it writes loads, runs and stays close; resuming gives equal bytes.
import { readdir, readFile } from 'node:fs/promises';
import path from 'node:path';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { openBackend, type BackendName } from '../../src/backends/registry.js';
import type { Backend } from '../../src/ops/backend.js';
import { RECIPES } from '../../src/quant/recipes/index.js';
import {
  FIXTURES,
  logitsOf,
  quantizeFixture,
  randomTokens,
  relativeError,
  temporaryFolder,
} from '../support/pipeline.js';

async function folderBytes(folder: string): Promise<Record<string, string>> {
  const files: Record<string, string> = {};
  for (const name of (await readdir(folder)).sort())
    files[name] = (await readFile(path.join(folder, name))).toString('base64');
  return files;
}

describe.each(['reference', 'cpu'] satisfies BackendName[])('pipeline on %s', (name) => {
  let backend: Backend;
  let scratch: Awaited<ReturnType<typeof temporaryFolder>>;
  beforeAll(async () => {
    backend = await openBackend(name);
    scratch = await temporaryFolder();
  });
  afterAll(async () => {
    await backend.dispose();
    await scratch.remove();
  });

  const cases = RECIPES.flatMap((recipe) =>
    ['qwen3', 'llama', 'qwen2'].map((fixture) => [recipe.name, fixture] as const),
  );
  it.each(cases)('%s on %s: 8 bits keep the logits, 4 bits stay near', async (method, fixture) => {
    for (const [bits, limit] of [
      [8, 0.03],
      [4, 0.45],
    ] as const) {
      const out = path.join(scratch.folder, `${method}-${fixture}-${bits}`);
      const source = await quantizeFixture(backend, fixture, out, { method, bits });
      const ids = randomTokens(source, 2, 24, 7);
      const error = relativeError(
        await logitsOf(backend, out, ids, 2),
        await logitsOf(backend, path.join(FIXTURES, fixture), ids, 2),
      );
      expect(error, `${bits} bits`).toBeLessThan(limit);
    }
  });

  it('paroquant with sensitivities keeps the logits near', async () => {
    const out = path.join(scratch.folder, 'sensitive');
    const source = await quantizeFixture(backend, 'qwen3', out, { sensitivity: true }, { sequences: 4 });
    const ids = randomTokens(source, 2, 24, 7);
    const original = await logitsOf(backend, path.join(FIXTURES, 'qwen3'), ids, 2);
    expect(relativeError(await logitsOf(backend, out, ids, 2), original)).toBeLessThan(0.45);
  });

  it.each([...RECIPES.map((r) => [r.name, {}] as const), ['paroquant', { sensitivity: true }] as const])(
    '%s resumes to the same bytes: %o',
    async (method, options) => {
      const settings = { method, ...options };
      const name = Object.keys(options).join('');
      // A pass back takes the float64 oracle long.
      const shape = name === '' ? {} : { sequences: 4, length: 16 };
      const whole = path.join(scratch.folder, `${method}${name}-whole`);
      const resumed = path.join(scratch.folder, `${method}${name}-resumed`);
      await quantizeFixture(backend, 'qwen3', whole, settings, shape);
      await expect(
        quantizeFixture(backend, 'qwen3', resumed, settings, { ...shape, stopAfter: 1 }),
      ).rejects.toMatchObject({
        code: 'interrupted',
      });
      await expect(quantizeFixture(backend, 'qwen3', resumed, settings, shape)).rejects.toMatchObject({
        code: 'output-exists',
      });
      await quantizeFixture(backend, 'qwen3', resumed, settings, { ...shape, resume: true });
      expect(await folderBytes(resumed)).toEqual(await folderBytes(whole));
    },
  );
});
