// The command line as people run it: help, results, errors, exit codes, Ctrl-C.
import { spawn } from 'node:child_process';
import { mkdir, mkdtemp, readdir, readFile, rm, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import path from 'node:path';
import { fileURLToPath } from 'node:url';
import { gzipSync } from 'node:zlib';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { resultSchema } from '../../src/evaluation/results.js';
import { driftSchema } from '../../src/report/drift-schema.js';
import { readInput } from '../../src/report/inputs.js';
import { fakeHub } from '../support/fake-hub.js';

const root = fileURLToPath(new URL('../..', import.meta.url));
const bin = path.join(root, 'bin', 'gyre.js');
const model = path.join('models', 'gyre-14m');
const prose = path.join(model, 'eval', 'prose', '01-fiction-nineteenth-century.txt');

interface Run {
  readonly code: number | null;
  readonly stdout: string;
  readonly stderr: string;
}

/** Runs a command; `onOutput` sees stdout as it comes and may signal the process. */
function gyre(
  args: readonly string[],
  options: { env?: NodeJS.ProcessEnv; onOutput?: (text: string, kill: () => void) => void } = {},
) {
  return new Promise<Run>((resolve, reject) => {
    const env = { ...process.env, HF_HUB_OFFLINE: '1', ...options.env };
    const child = spawn(process.execPath, [bin, ...args], { cwd: root, env });
    let stdout = '';
    let stderr = '';
    child.stdout.on('data', (data: Buffer) => {
      stdout += data.toString();
      options.onOutput?.(stdout, () => child.kill('SIGINT'));
    });
    child.stderr.on('data', (data: Buffer) => (stderr += data.toString()));
    child.on('error', reject);
    child.on('close', (code) => resolve({ code, stdout, stderr }));
  });
}

const json = (run: Run): Record<string, unknown> => JSON.parse(run.stdout) as Record<string, unknown>;

let folder: string;
beforeAll(async () => {
  folder = await mkdtemp(path.join(tmpdir(), 'gyre-cli-'));
});
afterAll(async () => {
  await rm(folder, { recursive: true, force: true });
});

describe('help', () => {
  it.each(['quantize', 'eval', 'generate', 'inspect', 'stress', 'report', 'demo', 'doctor'])(
    'of %s has examples and --json',
    async (command) => {
      const { code, stdout, stderr } = await gyre([command, '--help']);
      expect(code).toBe(0);
      expect(stderr).toBe('');
      expect(stdout).toContain(`Usage: gyre ${command}`);
      expect(stdout).toContain(`$ gyre ${command}`);
      expect(stdout).toContain('--json');
    },
  );

  it('lists the commands, and the version', async () => {
    const help = await gyre(['--help']);
    expect(help.code).toBe(0);
    expect(help.stdout).toMatch(/quantize[\s\S]*eval[\s\S]*generate[\s\S]*inspect[\s\S]*demo[\s\S]*Exit codes/);
    const { version } = JSON.parse(await readFile(path.join(root, 'package.json'), 'utf8')) as { version: string };
    expect((await gyre(['--version'])).stdout.trim()).toBe(version);
  });

  it('has every flag of quantize', async () => {
    const { stdout } = await gyre(['quantize', '--help']);
    const flags =
      'out method bits group-size krot no-scales no-share rounding steps seed calib calib-samples seq-len device threads resume dry-run revision token';
    for (const flag of flags.split(' ')) expect(stdout).toContain(`--${flag}`);
  });
});

describe('devices', () => {
  it('are listed by doctor, with what to do where one is missing', async () => {
    // No driver: WebGPU is there, a GPU is not.
    const run = await gyre(['doctor', '--json'], { env: { VK_ICD_FILENAMES: '/nowhere.json', VK_DRIVER_FILES: '' } });
    expect(run.code).toBe(0);
    const { backends, auto } = json(run) as {
      backends: { name: string; available: boolean; remedy?: string; copyBytesPerSecond?: number }[];
      auto: { name: string };
    };
    const [cpu, webgpu] = backends;
    expect(cpu).toMatchObject({ name: 'cpu', available: true });
    expect(cpu.copyBytesPerSecond).toBeGreaterThan(1e8);
    expect(webgpu).toMatchObject({ name: 'webgpu', available: false });
    expect(webgpu.remedy).toContain('libvulkan1');
    expect(auto.name).toBe('cpu');
  });

  it('never change on their own', async () => {
    const env = { VK_ICD_FILENAMES: '/nowhere.json', VK_DRIVER_FILES: '' };
    const run = await gyre(['generate', model, '--prompt', 'Once', '--device', 'webgpu'], { env });
    expect(run.code).toBe(1);
    expect(run.stderr).toContain('WebGPU found no GPU');
    expect(run.stderr).toContain('--device cpu');
  });
});

describe('a wrong command line', () => {
  it.each([
    [[], 'no command was given', 'gyre --help'],
    [['quantise', 'x'], "unknown command 'quantise'", 'quantize'],
    [['quantize', 'x', '--out', 'y', '--bit', '4'], "unknown option '--bit'", '--bits'],
    [['quantize', 'x'], '--out', 'gyre quantize --help'],
    [['quantize', 'x', '--out', 'y', '--bits', '5'], 'expected one of 2, 3, 4, 8', 'gyre quantize --help'],
    [['quantize', 'x', '--out', 'y', '--method', 'magic'], 'rtn, awq, gptq, paroquant', 'gyre quantize --help'],
    [['eval'], "missing required argument 'model'", 'gyre eval --help'],
    [['eval', model], 'neither --text nor --tasks', '--text'],
    [['generate', model, '--prompt', 'x', '--top-p', '2'], '--top-p: expected a number', 'gyre generate --help'],
    [['generate', model, '--prompt', 'x', '--system', 'y'], '--system needs --chat', '--chat'],
  ])('%j exits with 2 and says what would work', async (args, message, remedy) => {
    const { code, stderr } = await gyre(args);
    expect(code).toBe(2);
    const lines = stderr.trimEnd().split('\n');
    expect(lines.length).toBe(3);
    expect(lines[0]).toMatch(/^error: /);
    expect(lines[1]).toContain(message);
    expect(lines[2]).toContain(remedy);
    expect(stderr).not.toContain('\x1b');
  });

  it('is one JSON object with --json', async () => {
    const run = await gyre(['eval', model, '--text', prose, '--seq-len', 'x', '--json']);
    expect(run.code).toBe(2);
    expect(run.stderr).toBe('');
    expect(json(run)).toMatchObject({
      error: { code: 'usage', message: expect.stringContaining('--seq-len') as string },
    });
  });
});

describe('a failure', () => {
  it('exits with 1, three lines, and a stack for debugging only', async () => {
    const args = ['inspect', 'no/such/model'];
    const { code, stderr } = await gyre(args);
    expect(code).toBe(1);
    expect(stderr.trimEnd().split('\n').length).toBe(3);
    const debugged = await gyre(args, { env: { GYRE_DEBUG: '1' } });
    expect(debugged.stderr).toContain('    at ');
  });

  it('is one JSON object with --json', async () => {
    const run = await gyre(['eval', model, '--text', 'no-such-file.txt', '--json']);
    expect(run.code).toBe(1);
    expect(run.stderr).toBe('');
    expect(json(run)).toMatchObject({
      error: {
        code: 'file-missing',
        message: expect.stringContaining('no-such-file.txt') as string,
        remedy: expect.any(String) as string,
      },
    });
  });

  it('of a text in the wrong form names the line', async () => {
    const file = path.join(folder, 'texts.jsonl');
    await writeFile(file, '{"text": "a"}\n{"txt": "b"}\n');
    const { code, stderr } = await gyre(['eval', model, '--text', file]);
    expect(code).toBe(1);
    expect(stderr).toContain('line 2');
  });
});

describe('inspect', () => {
  it('shows the model and its linears', async () => {
    const { code, stdout } = await gyre(['inspect', model, '--layers', '0,7']);
    expect(code).toBe(0);
    expect(stdout).toMatch(/architecture +qwen3: 8 blocks/);
    expect(stdout).toMatch(/bits per weight +16\.000/);
    expect(stdout).toMatch(/0\.self_attn\.q_proj +384×384 +dense/);
    expect(stdout).toMatch(/7\.mlp\.down_proj/);
    expect(stdout).not.toMatch(/3\.mlp\.down_proj/);
  });

  it('gives the same as JSON', async () => {
    const run = await gyre(['inspect', model, '--layers', 'down_proj', '--json']);
    expect(run.stderr).toBe('');
    expect(json(run)).toMatchObject({ family: 'qwen3', layers: 8, quantization: null, linearBitsPerWeight: 16 });
    expect(json(run)['linears']).toHaveLength(8);
  });
});

describe('eval', () => {
  it('measures a model against itself', async () => {
    const run = await gyre([
      'eval',
      model,
      '--text',
      prose,
      '--reference',
      model,
      '--seq-len',
      '128',
      '--samples',
      '2',
      '--json',
    ]);
    expect(run.stderr).toBe('');
    expect(run.code).toBe(0);
    const result = resultSchema.parse(json(run));
    const [text] = result.evaluations;
    expect(text).toMatchObject({
      type: 'text',
      tokens: 254,
      windows: 2,
      settings: { protocol: 'windows', seqLen: 128, startToken: 'each' },
      metrics: { top1_agreement: { value: 1 } },
    });
    const { kl, perplexity, nll } = text.metrics;
    expect(Math.abs(kl.value)).toBeLessThan(1e-6);
    expect(perplexity.value).toBeCloseTo(Math.exp(nll.value), 6);
    expect(perplexity.value).toBeLessThan(200);
    expect(perplexity.low).toBeLessThan(perplexity.value);
    expect(result.model).toMatchObject({
      fingerprint: expect.stringMatching(/^[0-9a-f]{16}$/) as string,
      quantization: null,
    });
    expect(result.reference?.fingerprint).toBe(result.model.fingerprint);
    expect(result.machine).toMatchObject({ cores: expect.any(Number) as number });
  });

  it('prints the same for people', async () => {
    const { code, stdout } = await gyre(['eval', model, '--text', prose, '--seq-len', '128', '--samples', '1']);
    expect(code).toBe(0);
    expect(stdout).toMatch(/perplexity +\d+\.\d+/);
    expect(stdout).toContain('127 tokens in 1 windows');
  });

  it('answers chains, by name or by file, and keeps what was written', async () => {
    const out = path.join(folder, 'chains.json');
    const cache = path.join(folder, 'cache');
    const tasks = path.join(model, 'eval', 'tasks.jsonl');
    const run = await gyre(['eval', model, '--tasks', tasks, '--limit', '5', '--out', out, '--cache', cache]);
    expect(run.stderr).not.toContain('error');
    expect(run.code).toBe(0);
    expect(run.stdout).toMatch(/chains +pass@1 +\d+\.\d %/);
    const [chains] = resultSchema.parse(JSON.parse(await readFile(out, 'utf8'))).evaluations;
    expect(chains.metrics['pass@1'].value).toBeGreaterThanOrEqual(0.8);
    const transcripts = await readFile(path.join(folder, 'chains-transcripts', 'chains.jsonl'), 'utf8');
    expect(transcripts.trim().split('\n')).toHaveLength(5);
    // Kept answers: the second run writes none.
    const again = json(await gyre(['eval', model, '--tasks', 'chains', '--limit', '5', '--cache', cache, '--json']));
    const [second] = resultSchema.parse(again).evaluations;
    expect(second.throughput.generatedTokens).toBe(0);
    expect(second.items).toEqual(chains.items);
  });

  it('follows the chains of a reference, in a file that reports read', async () => {
    const out = path.join(folder, 'drift.json');
    const tasks = path.join(model, 'eval', 'tasks.jsonl');
    const args = ['eval', model, '--drift', tasks, '--limit', '2', '--max-tokens', '24', '--out', out];
    const alone = await gyre(args);
    expect([alone.code, alone.stderr]).toEqual([2, expect.stringContaining('--reference')]);
    const both = await gyre([...args, '--reference', model, '--text', prose]);
    expect([both.code, both.stderr]).toEqual([2, expect.stringContaining('--drift')]);
    const run = await gyre([...args, '--reference', model]);
    expect(run.code).toBe(0);
    expect(run.stdout).toMatch(/position +tokens +KL +agreement/);
    const input = readInput('drift.json', await readFile(out, 'utf8'));
    expect(input?.kind).toBe('drift');
    const { chains, positions, freeRunning } = driftSchema.parse(JSON.parse(await readFile(out, 'utf8')));
    expect([chains, freeRunning?.tasks, freeRunning?.departed]).toEqual([2, 2, 0]);
    expect(positions[0]).toMatchObject({ from: 0, to: 16, top1Agreement: { value: 1 } });
  });

  it('measures several tasks from a folder of data; compare tells them apart', async () => {
    const data = path.join(folder, 'data');
    await mkdir(data);
    const rows = Array.from({ length: 6 }, (_, i) => ({
      goal: `open jar ${i}`,
      sol1: 'turn the lid',
      sol2: 'paint it',
      label: i % 2,
    }));
    await writeFile(path.join(data, 'piqa.jsonl'), rows.map((row) => JSON.stringify(row)).join('\n'));
    await writeFile(
      path.join(data, 'wiki.test.raw'),
      ' = A = \n \n It was a dark and stormy night in the town . \n'.repeat(30),
    );
    // Rows of C4's shard, of which some are too short for a window.
    const documents = [3, 60, 5, 80].map((n) =>
      JSON.stringify({ text: 'The rain fell on the town all night. '.repeat(n) }),
    );
    await writeFile(path.join(data, 'c4-validation.00000-of-00008.json.gz'), gzipSync(documents.join('\n')));
    const out = path.join(folder, 'both.json');
    const args = [
      'eval',
      model,
      '--tasks',
      'piqa,wikitext2,c4',
      '--data',
      data,
      '--seq-len',
      '128',
      '--limit',
      '4',
      '--no-cache',
      '--out',
      out,
    ];
    const run = await gyre(args);
    expect(run.code).toBe(0);
    const { evaluations } = resultSchema.parse(JSON.parse(await readFile(out, 'utf8')));
    expect(evaluations.map(({ name, type }) => [name, type])).toEqual([
      ['piqa', 'choices'],
      ['wikitext2', 'text'],
      ['c4', 'text'],
    ]);
    expect(evaluations[2]).toMatchObject({
      windows: 4,
      tokens: 4 * 127,
      settings: { startToken: 'once', seqLen: 128 },
    });
    expect(evaluations[1].settings).toMatchObject({ startToken: 'once', seqLen: 128 });
    const compared = await gyre(['compare', out, out]);
    expect(compared.code).toBe(0);
    expect(compared.stdout).toMatch(/piqa +acc_norm .*no difference shown/);
    const asJson = json(await gyre(['compare', out, out, '--json']));
    expect(asJson).toMatchObject({ comparisons: [{ missing: [] }] });
  });

  it('goes on after it was killed, and ends with the same', { timeout: 300_000 }, async () => {
    const data = path.join(folder, 'killed');
    const cache = path.join(folder, 'cache');
    await mkdir(data);
    const rows = Array.from({ length: 150 }, (_, i) => ({
      goal: `open a jar that holds ${i} ${'very '.repeat(i % 17)}old coins`,
      sol1: `turn the lid ${i % 7} times`,
      sol2: 'paint it',
      label: i % 2,
    }));
    await writeFile(path.join(data, 'piqa.jsonl'), rows.map((row) => JSON.stringify(row)).join('\n'));
    const args = (out: string, ...more: string[]) => [
      'eval',
      model,
      '--tasks',
      'piqa',
      '--data',
      data,
      '--device',
      'cpu',
      '--out',
      path.join(folder, out),
      ...more,
    ];
    const result = async (out: string) =>
      resultSchema.parse(JSON.parse(await readFile(path.join(folder, out), 'utf8'))).evaluations[0];
    expect((await gyre(args('whole.json', '--no-cache'))).code).toBe(0);
    const child = spawn(process.execPath, [bin, ...args('resumed.json', '--cache', cache)], {
      cwd: root,
      stdio: 'ignore',
    });
    const ended = new Promise<void>((resolve) => child.on('close', () => resolve()));
    const known = async (): Promise<number> => {
      const [scope] = await readdir(cache).catch(() => []);
      if (scope === undefined) return 0;
      return (await readFile(path.join(cache, scope, 'piqa.jsonl'), 'utf8').catch(() => '')).split('\n').length - 1;
    };
    while ((await known()) === 0 && child.exitCode === null) await new Promise((resolve) => setTimeout(resolve, 20));
    child.kill('SIGKILL');
    await ended;
    expect(await known()).toBeGreaterThan(0);
    expect((await gyre(args('resumed.json', '--cache', cache))).code).toBe(0);
    const [whole, resumed] = [await result('whole.json'), await result('resumed.json')];
    expect([resumed.items, resumed.metrics]).toEqual([whole.items, whole.metrics]);
    expect(resumed.throughput.promptTokens).toBeLessThan(whole.throughput.promptTokens);
  });

  it('fetches the data of a task from a hub at its commit, once', async () => {
    const commit = '3'.repeat(40);
    const rows = ['rain', 'hail'].map((right, i) => ({
      id: `q${i}`,
      question: 'What falls from clouds?',
      choices: { text: [right, 'stones', 'milk'], label: ['A', 'B', 'C'] },
      answerKey: 'A',
    }));
    const content = new TextEncoder().encode(rows.map((row) => JSON.stringify(row)).join('\n'));
    const hub = await fakeHub([
      { kind: 'dataset', name: 'me/clouds', commits: { [commit]: { 'test.jsonl': content } }, refs: { main: commit } },
    ]);
    const file = path.join(folder, 'clouds.json');
    await writeFile(
      file,
      JSON.stringify({
        schemaVersion: 1,
        name: 'clouds',
        title: 'Clouds',
        version: 1,
        type: 'choices',
        source: { dataset: 'me/clouds', revision: commit, splits: { test: [{ path: 'test.jsonl' }] } },
        split: 'test',
        columns: ['question', 'choices.text', 'choices.label', 'answerKey'],
        id: 'id',
        prompt: '{{ question }}',
        choices: { column: 'choices.text' },
        answer: { column: 'answerKey', labels: 'choices.label' },
        metrics: ['acc', 'acc_norm'],
      }),
    );
    const env = { HF_ENDPOINT: hub.url, HF_HUB_CACHE: path.join(folder, 'hub') };
    const args = ['eval', model, '--tasks', file, '--device', 'cpu', '--no-cache', '--json'];
    const first = await gyre(args, { env: { ...env, HF_HUB_OFFLINE: '' } });
    expect(first.stderr).not.toContain('error');
    const { evaluations } = resultSchema.parse(json(first));
    expect(evaluations[0]).toMatchObject({
      source: { dataset: 'me/clouds', revision: commit, files: [{ name: 'test.jsonl' }] },
      items: { ids: ['q0', 'q1'] },
    });
    // The second time without the hub.
    const again = resultSchema.parse(json(await gyre(args, { env })));
    expect(again.evaluations[0].items).toEqual(evaluations[0].items);
  });

  it('lists tasks, and refuses what it does not know before loading a model', async () => {
    expect((await gyre(['eval', '--list-tasks'])).stdout).toContain('arc_easy\n');
    const unknown = await gyre(['eval', model, '--tasks', 'arc_eazy']);
    expect(unknown.code).toBe(1);
    expect(unknown.stderr).toContain("no task 'arc_eazy'");
    const empty = path.join(folder, 'none');
    await mkdir(empty);
    await writeFile(path.join(empty, 'piqa.jsonl'), '');
    const nothing = await gyre(['eval', model, '--tasks', 'piqa', '--data', empty]);
    expect(nothing.stderr).toContain('no questions');
    expect((await gyre(['compare', model])).code).not.toBe(0);
  });
});

describe('generate', () => {
  const ask = ['generate', model, '--chat', '--prompt', 'Compute 413 + 436.', '--temperature', '0'];

  it('streams to stdout, statistics to stderr', async () => {
    const { code, stdout, stderr } = await gyre(ask);
    expect(code).toBe(0);
    expect(stdout).toMatch(/<think>.*<\/think>849\n$/);
    expect(stderr).toMatch(/tokens\/s.*ended by the model/);
  });

  it('gives the same as JSON, and the same again for the same seed', async () => {
    const run = await gyre([...ask, '--json']);
    expect(run.stderr).toBe('');
    expect(json(run)).toMatchObject({ reason: 'eos', text: expect.stringMatching(/849$/) as string });
    const sample = ['generate', model, '--prompt', 'Once upon a time', '--max-tokens', '12', '--seed', '5'];
    const [first, second] = [await gyre(sample), await gyre(sample)];
    expect(first.stdout).toBe(second.stdout);
    expect(first.stdout.length).toBeGreaterThan(5);
  });

  it('refuses a prompt longer than the context', async () => {
    const { code, stderr } = await gyre(['generate', model, '--prompt', 'word '.repeat(5000)]);
    expect(code).toBe(1);
    expect(stderr).toContain('context is 2048');
  });

  it('stops on Ctrl-C with 130', async () => {
    const args = ['generate', model, '--prompt', 'It was', '--max-tokens', '1900', '--temperature', '1'];
    let sent = false;
    const onOutput = (text: string, kill: () => void): void => {
      if (sent || text.length <= 20) return;
      sent = true;
      kill();
    };
    const { code, stdout, stderr } = await gyre(args, { onOutput });
    expect(code).toBe(130);
    expect(stdout.length).toBeGreaterThan(20);
    expect(stderr).toContain('stopped after');
  });
});

describe('quantize', () => {
  it('plans, quantizes, refuses to overwrite, and the result runs', async () => {
    const out = path.join(folder, 'rtn');
    const args = ['quantize', model, '--out', out, '--method', 'rtn'];
    const plan = await gyre([...args, '--dry-run']);
    expect(plan.code).toBe(0);
    expect(plan.stdout.trim()).not.toBe('');

    const run = await gyre([...args, '--json']);
    expect(run.code).toBe(0);
    expect(run.stderr).toBe('');
    const report = json(run);
    expect(report).toMatchObject({ method: 'rtn', bits: 4, groupSize: 128 });
    expect(report['bitsPerWeight']).toBeCloseTo(4.156, 2);

    const again = await gyre([...args, '--bits', '3']);
    expect(again.code).toBe(1);
    expect(again.stderr).toMatch(/choose another --out/i);

    const shown = json(await gyre(['inspect', out, '--layers', '0', '--json']));
    expect(shown).toMatchObject({ quantization: { method: 'awq', bits: 4 } });
    expect(shown['linearBitsPerWeight']).toBeCloseTo(4.156, 2);
    const args2 = ['eval', out, '--text', prose, '--reference', model, '--seq-len', '128', '--samples', '2', '--json'];
    const [measured] = resultSchema.parse(json(await gyre(args2))).evaluations;
    expect(measured.metrics['kl'].value).toBeGreaterThan(0.005);
    expect(measured.metrics['kl'].value).toBeLessThan(0.3);
  });
});
