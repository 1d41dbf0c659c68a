// Sizes, statistics and fingerprints of checkpoints.
import { describe, expect, it } from 'vitest';
import { fileURLToPath } from 'node:url';
import { createRng } from '../../src/core/rng.js';
import { valueStatistics } from '../../src/core/statistics.js';
import { linearStatistics, modelFingerprint, summarizeModel } from '../../src/evaluation/index.js';
import { folderFiles } from '../../src/formats/source.node.js';
import { openModel, type ModelSource } from '../../src/models/load.js';

async function withModel<T>(name: string, use: (source: ModelSource) => Promise<T>): Promise<T> {
  const folder = fileURLToPath(new URL(`../fixtures/parity/${name}`, import.meta.url));
  const source = await openModel(await folderFiles(folder));
  try {
    return await use(source);
  } finally {
    await source.checkpoint.close();
  }
}

describe('summarizeModel', () => {
  it.each(['qwen3', 'qwen2', 'llama', 'llama2', 'llama3', 'mistral-full'])(
    'counts the parameters of %s',
    async (name) => {
      await withModel(name, async (source) => {
        const summary = summarizeModel(source);
        let stored = 0;
        for (const tensor of source.checkpoint.names()) {
          stored += source.checkpoint.info(tensor).shape.reduce((a, b) => a * b, 1);
        }
        expect(summary.parameters).toBe(stored);
        const width = summary.dtypes[0].dtype === 'F32' ? 32 : 16;
        expect(summary.bitsPerWeight).toBe(width);
        expect(summary.linearBitsPerWeight).toBe(width);
      });
    },
  );
});

describe('linearStatistics', () => {
  it('goes through the linears in order, those asked for', async () => {
    await withModel('qwen3', async (source) => {
      const modules: string[] = [];
      for await (const { module } of linearStatistics(source)) modules.push(module);
      expect(modules.length).toBe(2 * 7);
      expect(modules[0]).toBe('model.layers.0.self_attn.q_proj');
      const down: number[] = [];
      for await (const { layer, space } of linearStatistics(source, (m) => m.includes('down'))) {
        down.push(layer);
        expect(space).toBe('dense');
      }
      expect(down).toEqual([0, 1]);
    });
  });

  it('knows a normal distribution, and a channel that stands out', () => {
    const rng = createRng(2);
    const [rows, columns] = [400, 64];
    const values = Float32Array.from({ length: rows * columns }, () => rng.normal());
    const even = valueStatistics(values, columns);
    expect(even.kurtosis).toBeCloseTo(3, 0);
    expect(even.standardDeviation).toBeCloseTo(1, 1);
    expect(even.channelRatio).toBeLessThan(2);
    for (let row = 0; row < rows; row++) values[row * columns + 5] *= 20;
    const odd = valueStatistics(values, columns);
    expect(odd.channelRatio).toBeGreaterThan(10);
    expect(odd.kurtosis).toBeGreaterThan(20);
  });

  it('stays finite on zeros', () => {
    expect(valueStatistics(new Float32Array(12), 4)).toMatchObject({
      absMax: 0,
      standardDeviation: 0,
      channelRatio: 1,
      kurtosis: 0,
    });
    const one = new Float32Array(12);
    one[0] = 1;
    expect(Number.isFinite(valueStatistics(one, 4).channelRatio)).toBe(true);
  });
});

describe('modelFingerprint', () => {
  it('names content: equal for the same files, different for others', async () => {
    const of = (name: string): Promise<string> => withModel(name, modelFingerprint);
    expect(await of('qwen3')).toMatch(/^[0-9a-f]{16}$/);
    expect(await of('qwen3')).toBe(await of('qwen3'));
    expect(await of('qwen3')).not.toBe(await of('qwen3-yarn'));
  });
});
