// What only whole-block recipes have: losses by epoch, residual streams on disk, stages and pair choices, and limits in which
// they must be something simpler.
import { spawn } from 'node:child_process';
import { readdir, readFile, stat } from 'node:fs/promises';
import path from 'node:path';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { openBackend } from '../../src/backends/registry.js';
import { folderFiles } from '../../src/formats/source.node.js';
import { GROUP_NAMES } from '../../src/models/block.js';
import { openModel, readLinear } from '../../src/models/load.js';
import type { Backend } from '../../src/ops/backend.js';
import { sampleWindows } from '../../src/quant/calibration/tokens.js';
import { validationCount } from '../../src/quant/block-pipeline.js';
import type { BlockSettings } from '../../src/quant/types.js';
import { quantizeCheckpoint, type QuantizeOptions } from '../../src/quantize.node.js';
import { createRng } from '../../src/core/rng.js';
import { loadTokenizer } from '../../src/tokenizer/index.js';
import { FIXTURES, logitsOf, randomTokens, relativeError, temporaryFolder } from '../support/pipeline.js';
import { useSoftwareGpu, webgpuMissing } from '../support/webgpu.js';

const MODEL = path.join(FIXTURES, 'qwen3');
const SHAPE = { sequences: 9, length: 16 };

let scratch: Awaited<ReturnType<typeof temporaryFolder>>;
let backend: Backend;
beforeAll(async () => {
  scratch = await temporaryFolder();
  backend = await openBackend('cpu', { threads: 1 });
});
afterAll(async () => {
  await backend.dispose();
  await scratch.remove();
});

async function quantize(name: string, block: Partial<BlockSettings>, options: Partial<QuantizeOptions> = {}) {
  const source = await openModel(await folderFiles(MODEL));
  const ids = randomTokens(source, SHAPE.sequences, SHAPE.length);
  await source.checkpoint.close();
  const out = path.join(scratch.folder, name);
  const report = await quantizeCheckpoint({
    model: MODEL,
    out,
    method: 'paroquant-block',
    groupSize: 32,
    krot: 2,
    threads: 1,
    calibrationTokens: { ids, ...SHAPE, description: 'random' },
    ...options,
    block: { epochs: 2, batch: 4, ...block },
  });
  return { out, report };
}

interface Training {
  readonly blocks: readonly {
    readonly layer: number;
    readonly stages: readonly { stage: string; train: number[]; validation: number[]; best: number }[];
  }[];
}

async function trainingOf(out: string): Promise<Training> {
  return JSON.parse(await readFile(path.join(out, 'training.json'), 'utf8')) as Training;
}

describe('paroquant-block', () => {
  it('writes its losses, and keeps the best epoch of each stage', async () => {
    const { out, report } = await quantize('losses', {});
    const { blocks } = await trainingOf(out);
    expect(blocks.map((b) => b.layer)).toEqual([0, 1]);
    for (const [i, { stages }] of blocks.entries()) {
      expect(stages.map((s) => s.stage)).toEqual(['transforms', 'weights']);
      for (const { stage, train, validation, best } of stages) {
        expect([train.length, validation.length]).toEqual([2, 3]);
        expect(validation[best]).toBe(Math.min(...validation));
        expect(report.blocks?.[i].stats[`${stage}.after`]).toBe(validation[best]);
      }
      // Stage 2 starts where stage 1 ended, but for the transform's f16 and its grids' zero points.
      expect(Math.abs(stages[1].validation[0] / stages[0].validation[stages[0].best] - 1)).toBeLessThan(0.15);
    }
  });

  it('gives the same bytes with residual streams on disk, and leaves none there', async () => {
    const memory = await quantize('memory', {});
    const disk = await quantize('disk', {}, { activationBytes: 1 });
    const names = (await readdir(disk.out)).sort();
    expect(names).toEqual((await readdir(memory.out)).sort());
    for (const name of names.filter((n) => n.endsWith('.safetensors') || n === 'training.json'))
      expect(await readFile(path.join(disk.out, name))).toEqual(await readFile(path.join(memory.out, name)));
    expect(await stat(`${disk.out}.partial`).catch(() => undefined)).toBeUndefined();
  });

  it('goes on behind a finished stage after it was killed, and ends with the same bytes', async () => {
    /** Runs until a line matches, if one is given; all lines. */
    const run = (out: string, until?: RegExp): Promise<string[]> =>
      new Promise((resolve, reject) => {
        const script = path.join(import.meta.dirname, '../support/train-and-wait.ts');
        const child = spawn(process.execPath, ['--import', 'tsx', script, MODEL, out]);
        let text = '';
        child.stdout.on('data', (data: Buffer) => {
          text += data.toString();
          if (until?.test(text)) child.kill('SIGKILL');
        });
        child.on('error', reject);
        child.on('close', (code) => {
          if (code !== 0 && !until) reject(new Error(`ended with ${code}`));
          else resolve(text.split('\n'));
        });
      });
    const [whole, killed] = ['whole', 'killed'].map((name) => path.join(scratch.folder, name));
    await run(whole);
    // In the second epoch of the second block's second stage.
    await run(killed, /block 2\/2 weights: epoch 2/);
    const kept = await readdir(`${killed}.partial`);
    expect(kept.filter((name) => name.endsWith('.stage.safetensors'))).toEqual([
      'model-00002-of-00003.stage.safetensors',
    ]);
    const rest = await run(killed);
    expect(rest.some((line) => line.includes('block 1/2 is finished'))).toBe(true);
    expect(rest.some((line) => /block 2\/2 weights: epoch 1/.test(line))).toBe(true);
    expect(rest.filter((line) => line.includes('transforms:'))).toEqual([]);
    const names = (await readdir(whole)).sort();
    expect((await readdir(killed)).sort()).toEqual(names);
    for (const name of names.filter((n) => n.endsWith('.safetensors') || n === 'training.json'))
      expect((await readFile(path.join(killed, name))).equals(await readFile(path.join(whole, name))), name).toBe(true);
  });

  it('without rotations, scales and stage 2 is rounding to nearest', async () => {
    const plain = await quantize('plain', { stages: 'transforms', epochs: 1 }, { krot: 0, scales: false });
    const rtn = await quantize('rtn', {}, { method: 'rtn' });
    const [a, b] = await Promise.all([plain, rtn].map(async ({ out }) => openModel(await folderFiles(out))));
    for (let layer = 0; layer < a.config.layers; layer++) {
      for (const group of GROUP_NAMES) {
        const [x, y] = [await readLinear(a, layer, group, 0), await readLinear(b, layer, group, 0)];
        if (x.source.kind !== 'quantized' || y.source.kind !== 'quantized') throw new Error('expected codes');
        expect(x.source.weight.codes).toEqual(y.source.weight.codes);
        expect(x.source.weight.scales).toEqual(y.source.weight.scales);
      }
    }
    await a.checkpoint.close();
    await b.checkpoint.close();
  });

  it.each(['magnitude', 'learned'] as const)('pairs channels by %s', async (pairs) => {
    const { report } = await quantize(`pairs-${pairs}`, { pairs, epochs: 1, stages: 'transforms' });
    expect(report.blocks).toHaveLength(2);
  });

  it('shares transforms when asked', async () => {
    const { out } = await quantize('shared', { epochs: 1, stages: 'transforms' }, { share: true });
    const source = await openModel(await folderFiles(out));
    const [q, k] = [await readLinear(source, 0, 'qkv', 0), await readLinear(source, 0, 'qkv', 1)];
    expect(q.transform).toEqual(k.transform);
    await source.checkpoint.close();
    const own = await openModel(await folderFiles((await quantize('own', { epochs: 1, stages: 'transforms' })).out));
    const transforms = await Promise.all([0, 1].map((i) => readLinear(own, 0, 'qkv', i)));
    expect(transforms[0].transform?.pairs).not.toEqual(transforms[1].transform?.pairs);
    await own.checkpoint.close();
  });

  it('refuses settings and sequences that cannot be trained with', async () => {
    await expect(quantize('bad', { epochs: 0 })).rejects.toMatchObject({ code: 'usage' });
    await expect(quantize('bad', { beta: 0 })).rejects.toMatchObject({ code: 'usage' });
    const one = { ids: new Int32Array(16), sequences: 1, length: 16, description: 'one' };
    await expect(quantize('bad', {}, { calibrationTokens: one })).rejects.toThrow(/two calibration sequences/);
  });
});

describe('paroquant-tuned', () => {
  it('keeps the codes and never ends above where tuning began', async () => {
    const { out, report } = await quantize('tuned', {}, { method: 'paroquant-tuned', steps: 10 });
    for (const { stats } of report.blocks ?? []) expect(stats['tune.after']).toBeLessThanOrEqual(stats['tune.before']);
    const { blocks } = await trainingOf(out);
    expect(blocks.flatMap((b) => b.stages.map((s) => s.stage))).toEqual(['tune', 'tune']);
  });
});

describe('rounded activations and caches', () => {
  it.each(['paroquant-block', 'paroquant-tuned'])('%s: W8A8KV8 keeps the logits', async (method) => {
    const wide = { method, bits: 8, actBits: 8, kvBits: 8, steps: 4 } as const;
    const { out } = await quantize(`${method}-a8`, { epochs: 1 }, wide);
    const model = await openModel(await folderFiles(out));
    expect(model.online).toMatchObject({ activations: { bits: 8 }, kv: { bits: 8 } });
    const ids = randomTokens(model, 2, 24, 7);
    await model.checkpoint.close();
    const exact = await logitsOf(backend, MODEL, ids, 2);
    const error = relativeError(await logitsOf(backend, out, ids, 2), exact);
    expect(error).toBeLessThan(0.08);
    // Rounding inputs to 4 bits costs more: it happens.
    const { out: narrow } = await quantize(`${method}-a4`, { epochs: 1 }, { ...wide, actBits: 4, kvBits: 4 });
    expect(relativeError(await logitsOf(backend, narrow, ids, 2), exact)).toBeGreaterThan(2 * error);
  });

  it('refuses rotations before training', async () => {
    await expect(quantize('turned', {}, { rotate: true })).rejects.toThrow(/without rotations or smoothing/);
  });
});

describe.skipIf(webgpuMissing)(
  `whole-block recipes on WebGPU${webgpuMissing ? `: skipped, ${webgpuMissing}` : ''}`,
  () => {
    it('paroquant-block learns as on the CPU', async () => {
      useSoftwareGpu();
      const [cpu, gpu] = await Promise.all([
        quantize('cpu', { epochs: 1 }),
        quantize('webgpu', { epochs: 1 }, { device: 'webgpu' }),
      ]);
      const [expected, found] = await Promise.all([cpu, gpu].map(({ out }) => trainingOf(out)));
      // Sums round differently, and codes at the edge of a cell fall on the other side: losses, not bits, are the same, and on
      // 128 tokens only as long as no block stands on another's codes.
      for (const [i, { stage, train, validation }] of expected.blocks[0].stages.entries()) {
        const own = found.blocks[0].stages[i];
        for (const [a, b] of [
          ...train.map((v, n) => [v, own.train[n]]),
          ...validation.map((v, n) => [v, own.validation[n]]),
        ])
          expect(Math.abs(b / a - 1), `${stage}: ${b}, on the CPU ${a}`).toBeLessThan(0.05);
      }
    });

    it('paroquant-tuned never ends above where tuning began', async () => {
      useSoftwareGpu();
      const options = { method: 'paroquant-tuned', steps: 5, device: 'webgpu' } as const;
      const { report } = await quantize('webgpu-tuned', { epochs: 1 }, options);
      for (const { stats } of report.blocks ?? [])
        expect(stats['tune.after']).toBeLessThanOrEqual(stats['tune.before']);
    });
  },
);

describe('calibration of whole-block recipes', () => {
  it('holds out an eighth at most, and at least one', () => {
    expect([2, 8, 64, 1024].map((n) => validationCount(n, 64))).toEqual([1, 1, 8, 64]);
  });

  it('mixes texts evenly, however long they are', async () => {
    const bundled = path.join(import.meta.dirname, '../../models/gyre-14m');
    const tokenizer = await loadTokenizer(await folderFiles(bundled));
    const texts = [
      { name: 'a.txt', text: 'a '.repeat(5000) },
      { name: 'b.txt', text: 'b '.repeat(100) },
    ];
    const shape = { sequences: 5, length: 8 };
    const { ids } = sampleWindows(tokenizer, texts, shape, createRng(1), { evenly: true });
    const first = Array.from({ length: 5 }, (_, s) => tokenizer.decode(ids.subarray(s * 8, (s + 1) * 8)));
    expect(first.map((text) => (text.includes('a') ? 'a' : 'b'))).toEqual(['a', 'b', 'a', 'b', 'a']);
  });
});
