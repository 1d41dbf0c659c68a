// The examples run as they stand.
import { execFile } from 'node:child_process';
import { fileURLToPath } from 'node:url';
import { promisify } from 'node:util';
import { describe, expect, it } from 'vitest';

const root = fileURLToPath(new URL('../..', import.meta.url));
const run = async (name: string): Promise<string> => {
  const { stdout } = await promisify(execFile)(process.execPath, [`examples/${name}.mjs`], { cwd: root });
  return stdout;
};

describe('examples', () => {
  it('generate', async () => {
    expect(await run('generate')).toContain('</think>36,24,14');
  });

  it('inspect-layers', async () => {
    expect(await run('inspect-layers')).toMatch(/14\.2 M parameters[\s\S]*max\/median/);
  });

  it('quantize-and-evaluate', async () => {
    expect(await run('quantize-and-evaluate')).toMatch(/rtn: 4\.1\d+ bits per weight[\s\S]*KL 0\.\d+/);
  });
});
