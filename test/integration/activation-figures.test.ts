// `gyre inspect --activations`: figures and numbers of the bundled model's last down projection, as a person asks for them.
import { execFile } from 'node:child_process';
import { existsSync } from 'node:fs';
import { mkdtemp, readdir, readFile, rm } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import path from 'node:path';
import { promisify } from 'node:util';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';

const root = path.join(import.meta.dirname, '../..');
const browser = process.env['CHROMIUM_PATH'] ?? '/usr/bin/chromium';
let folder: string;

beforeAll(async () => {
  folder = await mkdtemp(path.join(tmpdir(), 'gyre-figures-'));
});
afterAll(() => rm(folder, { recursive: true, force: true }));

async function inspect(...args: string[]): Promise<{ stdout: string; stderr: string }> {
  const all = [path.join(root, 'bin/gyre.js'), 'inspect', path.join(root, 'models/gyre-14m'), ...args];
  return promisify(execFile)(process.execPath, all, { maxBuffer: 2 ** 24 }).catch(
    (error: { stdout: string; stderr: string }) => error,
  );
}

describe('gyre inspect --activations', () => {
  it('refuses --png without figures to draw', async () => {
    expect((await inspect('--no-statistics', '--png')).stderr).toMatch(/figures of --activations[\s\S]*Add/);
  });

  it.skipIf(!existsSync(browser) && !process.env['CI'])(
    'writes SVG, PNG and numbers of every variant',
    async () => {
      const out = path.join(folder, 'figures');
      const { stdout, stderr } = await inspect(
        '--no-statistics',
        '--layers',
        'layers.7.mlp.down',
        '--activations',
        out,
        '--png',
      );
      expect(stdout, stderr).toMatch(/7 down +smooth-rotated/);
      const names = ['block-7-down-channels', 'block-7-down-surface'];
      expect((await readdir(out)).sort()).toEqual(
        ['activations.json', ...names.flatMap((name) => [`${name}.png`, `${name}.svg`])].sort(),
      );
      for (const name of names) {
        const picture = await readFile(path.join(out, `${name}.png`));
        const drawing = await readFile(path.join(out, `${name}.svg`), 'utf8');
        expect(picture.subarray(1, 4).toString()).toBe('PNG');
        expect([picture.readUInt32BE(16), picture.readUInt32BE(20)]).toEqual(
          (/width="(\d+)" height="(\d+)"/.exec(drawing) ?? []).slice(1).map((size) => 2 * Number(size)),
        );
      }
      const { profiles } = JSON.parse(await readFile(path.join(out, 'activations.json'), 'utf8')) as {
        profiles: { variant: string; absMax: number }[];
      };
      const peaks = Object.fromEntries(profiles.map(({ variant, absMax }) => [variant, absMax]));
      // What the method is for: each transform alone lowers the massive activation, both together most.
      expect(peaks['smooth-rotated']).toBeLessThan(Math.min(peaks['rotated'], peaks['smoothed']));
      expect(Math.max(peaks['rotated'], peaks['smoothed'])).toBeLessThan(peaks['original']);
    },
    240_000,
  );
});
