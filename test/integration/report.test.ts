// Reports from results that the commands' own code made: the record of quantizing, the page on disk, the command line.
import { execFile } from 'node:child_process';
import { existsSync } from 'node:fs';
import { mkdir, mkdtemp, readdir, readFile, rm, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import path from 'node:path';
import { promisify } from 'node:util';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { modelFingerprint } from '../../src/evaluation/index.js';
import { folderFiles } from '../../src/formats/source.node.js';
import { openModel } from '../../src/models/load.js';
import { recordSchema, type QuantizationRecord } from '../../src/quant/results.js';
import { quantizeCheckpoint } from '../../src/quantize.node.js';
import { randomTokens, FIXTURES } from '../support/pipeline.js';
import { writeDemoReport } from '../support/report.js';

const root = path.join(import.meta.dirname, '../..');
let folder: string;
let page: string;

beforeAll(async () => {
  folder = await mkdtemp(path.join(tmpdir(), 'gyre-report-'));
  page = await writeDemoReport(folder);
});
afterAll(() => rm(folder, { recursive: true, force: true }));

async function recordOf(out: string): Promise<QuantizationRecord> {
  return recordSchema.parse(JSON.parse(await readFile(path.join(out, 'gyre-report.json'), 'utf8')));
}

describe('gyre-report.json', () => {
  it('names the model it lies beside, and has every linear group with its ranges', async () => {
    const out = path.join(folder, 'paroquant');
    const record = await recordOf(out);
    const source = await openModel(await folderFiles(out));
    expect(record.model.fingerprint).toBe(await modelFingerprint(source));
    await source.checkpoint.close();
    expect(record.groups.map(({ layer, group }) => `${layer} ${group}`)).toEqual(
      [0, 1].flatMap((layer) => ['qkv', 'o', 'gateUp', 'down'].map((group) => `${layer} ${group}`)),
    );
    for (const { group, stats, curve, ranges } of record.groups) {
      expect(stats['error']).toBeGreaterThan(0);
      expect(curve).toHaveLength(11);
      for (const found of [ranges?.weights, ranges?.activations]) {
        for (const range of [found?.before, found?.after]) {
          const counts = range?.histogram.counts.reduce((a, b) => a + b, 0) ?? 0;
          expect(counts / (range?.rows ?? 1)).toBe(group === 'down' || group === 'o' ? 96 : 64);
          expect(range?.channelRatio).toBeGreaterThanOrEqual(1);
          // The plot's largest channel is the largest value.
          const largest = (range?.absMax ?? 0) / (range?.rms ?? 1);
          // Each of the three has four digits.
          expect(Math.abs(Math.max(...(range?.channels ?? [])) / largest - 1)).toBeLessThan(2e-3);
        }
      }
    }
  });

  it('has ranges without a transform as they are, and none of inputs without calibration', async () => {
    const { groups } = await recordOf(path.join(folder, 'rtn'));
    expect(groups).toHaveLength(8);
    for (const { ranges } of groups) {
      expect(ranges?.weights.after).toBeNull();
      expect(ranges?.activations).toBeNull();
    }
  });

  it('is the same after a run that was stopped and resumed', async () => {
    const model = path.join(FIXTURES, 'qwen3');
    const source = await openModel(await folderFiles(model));
    const calibrationTokens = { ids: randomTokens(source, 8, 32), sequences: 8, length: 32, description: 'random' };
    await source.checkpoint.close();
    const options = { model, method: 'gptq', groupSize: 32, calibrationTokens };
    const whole = path.join(folder, 'whole');
    const resumed = path.join(folder, 'resumed');
    await quantizeCheckpoint({ ...options, out: whole });
    const controller = new AbortController();
    const stopped = quantizeCheckpoint({
      ...options,
      out: resumed,
      signal: controller.signal,
      onProgress: ({ stage, done }) => {
        if (stage === 'quantize' && done >= 1) controller.abort();
      },
    });
    await expect(stopped).rejects.toMatchObject({ code: 'interrupted' });
    expect(await readdir(`${resumed}.partial`)).toContain('model-00001-of-00003.record.json');
    const report = await quantizeCheckpoint({ ...options, out: resumed, resume: true });
    expect(report.groups).toHaveLength(8);
    expect(await readFile(path.join(resumed, 'gyre-report.json'))).toEqual(
      await readFile(path.join(whole, 'gyre-report.json')),
    );
    expect((await readdir(resumed)).filter((name) => name.includes('.record.'))).toEqual([]);
  });
});

describe('the page on disk', () => {
  it('has every section that there is data for, and charts beside it', async () => {
    const html = await readFile(page, 'utf8');
    for (const id of ['quality', 'ranges', 'layers', 'optimisation', 'provenance'])
      expect(html).toContain(`<section id="${id}">`);
    expect(html).not.toContain('<section id="tasks">');
    expect((await readdir(path.join(folder, 'charts'))).sort()).toEqual(
      ['channels', 'curves-1', 'histogram', 'layer-errors', 'losses-1', 'outlier-channels', 'size-quality'].map(
        (name) => `${name}.svg`,
      ),
    );
    expect(html).toMatch(/<h1>qwen3 at 4 bits: size and quality<\/h1>/);
  });
});

describe('gyre report', () => {
  const run = async (...args: string[]) => {
    const cli = path.join(root, 'bin/gyre.js');
    return promisify(execFile)(process.execPath, [cli, 'report', ...args], { cwd: root }).then(
      ({ stdout, stderr }) => ({ code: 0, stdout, stderr }),
      (error: { code: number; stdout: string; stderr: string }) => error,
    );
  };

  it('takes folders and files, and says what it wrote', async () => {
    const out = path.join(folder, 'cli', 'all.html');
    const svg = path.join(folder, 'cli', 'svg');
    const { code, stdout } = await run(
      folder,
      'bench/results/cpu-gemv.json',
      '--out',
      out,
      '--svg',
      svg,
      '--title',
      'All',
      '--json',
    );
    expect(code).toBe(0);
    const said = JSON.parse(stdout) as {
      out: string;
      title: string;
      sections: string[];
      charts: { files: string[] }[];
    };
    expect(said).toMatchObject({ out, title: 'All' });
    expect(said.sections).toContain('speed');
    for (const file of said.charts.flatMap(({ files }) => files)) expect(existsSync(file), file).toBe(true);
    expect(await readFile(out, 'utf8')).toContain('<h1>All</h1>');
  });

  it('refuses what is no result, and what is broken, naming file and field', async () => {
    const broken = path.join(folder, 'broken');
    await mkdir(broken, { recursive: true });
    await writeFile(path.join(broken, 'config.json'), '{"model_type": "qwen3"}');
    expect((await run(broken)).stderr).toMatch(/broken holds no results/);
    expect((await run(path.join(broken, 'config.json'))).stderr).toMatch(/config\.json is not a result/);
    await writeFile(path.join(broken, 'eval.json'), '{"kind": "gyre.evaluation", "schemaVersion": 1}');
    const { code, stderr } = await run(broken, '--out', path.join(folder, 'never.html'));
    expect(code).toBe(1);
    expect(stderr).toMatch(/eval\.json, version: /);
    expect(existsSync(path.join(folder, 'never.html'))).toBe(false);
    expect((await run(path.join(folder, 'nothing'))).stderr).toMatch(/does not exist/);
  });

  it('says what --png needs', async () => {
    const cli = path.join(root, 'bin/gyre.js');
    const env = { ...process.env, CHROMIUM_PATH: path.join(folder, 'no-browser') };
    const args = [
      cli,
      'report',
      path.join(folder, 'results'),
      '--out',
      path.join(folder, 'x.html'),
      '--png',
      path.join(folder, 'png'),
    ];
    const failure = await promisify(execFile)(process.execPath, args, { env }).catch(
      (error: { stderr: string }) => error,
    );
    expect(failure.stderr).toMatch(/needs Chromium or Chrome[\s\S]*--svg needs nothing/);
  });
});
