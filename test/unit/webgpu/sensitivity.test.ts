// Sensitivities and the rounding they lead to on WebGPU, against the float64 oracle.
import path from 'node:path';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { createRng } from '../../../src/core/rng.js';
import { floats, hostTensor } from '../../../src/core/tensor.js';
import { folderFiles } from '../../../src/formats/source.node.js';
import { GROUP_NAMES } from '../../../src/models/block.js';
import { openModel } from '../../../src/models/load.js';
import type { Backend } from '../../../src/ops/backend.js';
import { createReferenceBackend } from '../../../src/ops/reference/backend.js';
import { roundCoupled } from '../../../src/quant/recipes/coupled.js';
import { FIXTURES, randomTokens, sensitivityOf } from '../../support/pipeline.js';
import { openTestWebGpu, webgpuMissing } from '../../support/webgpu.js';

describe.skipIf(webgpuMissing !== undefined)('sensitivity on WebGPU', () => {
  let backend: Backend;
  beforeAll(async () => {
    backend = await openTestWebGpu();
  });
  afterAll(() => backend.dispose());

  it('is what the oracle measures', async () => {
    const source = await openModel(await folderFiles(path.join(FIXTURES, 'qwen3')));
    const ids = randomTokens(source, 2, 8);
    const measure = (on: Backend) => sensitivityOf(on, source, ids, { sequences: 2, rng: createRng(4) });
    const [found, exact] = [await measure(backend), await measure(createReferenceBackend())];
    for (const [layer, groups] of found.entries()) {
      for (const group of GROUP_NAMES) {
        const { tokens, outputs } = exact[layer][group];
        for (const [at, w] of groups[group].tokens.entries()) expect(w / tokens[at]).toBeCloseTo(1, 2);
        if (!outputs) continue;
        const oracle = floats(outputs);
        const largest = oracle.reduce((most, value) => Math.max(most, Math.abs(value)), 0);
        const moment = floats(groups[group].outputs ?? outputs);
        expect(moment.every((value, at) => Math.abs(value - oracle[at]) < 1e-3 * largest)).toBe(true);
      }
    }
    await source.checkpoint.close();
  });

  it('rounds outputs together as the oracle does', async () => {
    const rng = createRng(5);
    const [channels, columns] = [32, 16];
    const w = hostTensor(
      'f32',
      [channels, columns],
      Float32Array.from({ length: channels * columns }, () => rng.normal()),
    );
    const moment = (n: number) => {
      const x = Float64Array.from({ length: 3 * n * n }, () => rng.normal());
      const sum = new Float32Array(n * n);
      for (let r = 0; r < 3 * n; r++)
        for (let i = 0; i < n; i++)
          for (let j = 0; j < n; j++) sum[i * n + j] += (x[r * n + i] * x[r * n + j]) / (3 * n);
      return hostTensor('f32', [n, n], sum);
    };
    const [gram, outputs] = [moment(channels), moment(columns)];
    const round = async (on: Backend) =>
      roundCoupled(on, await on.upload(w), await on.upload(gram), outputs, { bits: 4, groupSize: 32 });
    const [found, exact] = [await round(backend), await round(createReferenceBackend())];
    // A value midway between two codes may fall to either side.
    const other = found.codes.filter((code, at) => code !== exact.codes[at]).length;
    expect(other).toBeLessThan(0.02 * found.codes.length);
  });
});
