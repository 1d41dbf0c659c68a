// Files are whole or absent, whatever happens to the disk or the process; locks name who holds them.
import { spawn, spawnSync } from 'node:child_process';
import { existsSync, readFileSync, readdirSync, writeFileSync } from 'node:fs';
import { open } from 'node:fs/promises';
import { hostname } from 'node:os';
import path from 'node:path';
import { pathToFileURL } from 'node:url';
import { describe, expect, it, onTestFinished, vi } from 'vitest';
import {
  freeBytes,
  lockFolder,
  LOCK_FILE,
  removeStaleTemporaries,
  writeFileAtomic,
} from '../../../src/formats/atomic.node.js';
import { writeSafetensors } from '../../../src/formats/safetensors-writer.node.js';
import { expectError, temporaryFolder } from './helpers.js';

/** Makes every write to a file fail with a system error after some bytes. */
async function breakDisk(code: string, after: number): Promise<void> {
  const probe = await open(import.meta.filename, 'r');
  const prototype = Object.getPrototypeOf(probe) as {
    write: (...args: unknown[]) => Promise<{ bytesWritten: number }>;
  };
  await probe.close();

  const original = prototype.write;
  let written = 0;
  const spy = vi.spyOn(prototype, 'write').mockImplementation(async function (this: unknown, ...args: unknown[]) {
    if (written >= after) throw Object.assign(new Error(`${code}: no space left`), { code });
    const result = await original.apply(this, args);
    written += result.bytesWritten;
    return result;
  });
  onTestFinished(() => spy.mockRestore());
}

const tensor = (n: number) => ({ name: 'w', dtype: 'f32' as const, shape: [n], data: () => new Float32Array(n) });
const root = path.resolve(import.meta.dirname, '../../..');

/** Runs TypeScript in a process of its own. */
function script(code: string): string[] {
  return ['--import', 'tsx', '--input-type=module', '-e', code];
}
const moduleUrl = (file: string): string => JSON.stringify(pathToFileURL(path.join(root, file)).href);

describe('atomic files', () => {
  it.each(['ENOSPC', 'EDQUOT'])('%s leaves nothing behind and keeps what was there', async (code) => {
    const folder = temporaryFolder();
    const file = path.join(folder, 'model.safetensors');
    writeFileSync(file, 'old');
    await breakDisk(code, 1);
    await expectError(
      () => writeSafetensors(file, [tensor(1000)]),
      'disk-full',
      /can't write .*model\.safetensors/,
      /Free some space/,
    );
    expect(readdirSync(folder)).toEqual(['model.safetensors']);
    expect(readFileSync(file, 'utf8')).toBe('old');
  });

  it('a data function that fails leaves nothing behind and its error alone', async () => {
    const folder = temporaryFolder();
    const failing = { ...tensor(3), data: () => Promise.reject(new Error('no data')) };
    await expect(writeSafetensors(path.join(folder, 'x.safetensors'), [failing])).rejects.toThrow('no data');
    expect(readdirSync(folder)).toEqual([]);
  });

  it('makes the folder', async () => {
    const file = path.join(temporaryFolder(), 'a/b/c.txt');
    await writeFileAtomic(file, 'hello');
    expect(readFileSync(file, 'utf8')).toBe('hello');
  });

  it('a process killed in the middle leaves no final file, and its temporary file is cleared later', async () => {
    const folder = temporaryFolder();
    const file = path.join(folder, 'model.safetensors');
    const code = `
      const { writeSafetensors } = await import(${moduleUrl('src/formats/safetensors-writer.node.ts')});
      const t = (name, data) => ({ name, dtype: 'f32', shape: [100000], data });
      await writeSafetensors(${JSON.stringify(file)}, [
        t('a', () => new Float32Array(100000)),
        t('b', () => { console.log('halfway'); return new Promise(() => setInterval(() => {}, 1000)); }),
      ]);`;
    const child = spawn(process.execPath, script(code), { cwd: root, stdio: ['ignore', 'pipe', 'inherit'] });
    const exited = new Promise((resolve) => child.on('exit', resolve));
    await new Promise((resolve) => child.stdout.once('data', resolve));
    expect(readdirSync(folder)).toHaveLength(1);
    expect(await removeStaleTemporaries(folder)).toBe(0); // its writer lives
    child.kill('SIGKILL');
    await exited;
    expect(existsSync(file)).toBe(false);
    expect(await removeStaleTemporaries(folder)).toBe(1);
    expect(readdirSync(folder)).toEqual([]);
  });
});

describe('locks', () => {
  it('are exclusive and given back', async () => {
    const folder = path.join(temporaryFolder(), 'out');
    const lock = await lockFolder(folder);
    await expectError(
      () => lockFolder(folder),
      'output-busy',
      new RegExp(`process ${process.pid} since 20`),
      /stop it \(kill/,
    );
    await lock.release();
    await lock.release();
    expect(readdirSync(folder)).toEqual([]);
    await (await lockFolder(folder)).release();
  });

  it('of several at once exactly one wins', async () => {
    const folder = temporaryFolder();
    const results = await Promise.allSettled(Array.from({ length: 8 }, () => lockFolder(folder)));
    expect(results.filter((r) => r.status === 'fulfilled')).toHaveLength(1);
  });

  it('of a dead process are taken over, by one', async () => {
    const folder = temporaryFolder();
    const code = `
      const { lockFolder } = await import(${moduleUrl('src/formats/atomic.node.ts')});
      await lockFolder(${JSON.stringify(folder)});
      process.kill(process.pid, 'SIGKILL');`;
    spawnSync(process.execPath, script(code), { cwd: root, stdio: 'inherit' });
    expect(existsSync(path.join(folder, LOCK_FILE))).toBe(true);
    const results = await Promise.allSettled(Array.from({ length: 8 }, () => lockFolder(folder)));
    expect(results.filter((r) => r.status === 'fulfilled')).toHaveLength(1);
    expect(readdirSync(folder)).toEqual([LOCK_FILE]);
  });

  it.skipIf(!existsSync('/proc/self/stat'))('of a dead process whose pid was given away are taken over', async () => {
    const folder = temporaryFolder();
    const lock = { pid: process.ppid, host: hostname(), startedAt: '2020-01-01T00:00:00.000Z', processStart: '1' };
    writeFileSync(path.join(folder, LOCK_FILE), JSON.stringify(lock));
    await (await lockFolder(folder)).release();
  });

  it('of another machine or another program are left alone', async () => {
    const folder = temporaryFolder();
    const file = path.join(folder, LOCK_FILE);
    writeFileSync(file, JSON.stringify({ pid: 1, host: 'elsewhere', startedAt: '2020-01-01T00:00:00.000Z' }));
    await expectError(() => lockFolder(folder), 'output-busy', /process 1 on elsewhere/, /delete/);
    writeFileSync(file, 'something else');
    await expectError(() => lockFolder(folder), 'output-busy', /not gyre's/, /delete/);
    expect(readFileSync(file, 'utf8')).toBe('something else');
  });
});

describe('free space', () => {
  it('is told for folders that do not exist yet', async () => {
    expect(await freeBytes(path.join(temporaryFolder(), 'not/yet'))).toBeGreaterThan(0);
  });
});
