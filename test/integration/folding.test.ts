// Folding changes no function: in float64 the logits of every family stay, tied or untied, with biases, head norms, shared heads.
import { readdir } from 'node:fs/promises';
import path from 'node:path';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { createRng } from '../../src/core/rng.js';
import { floats, hostTensor } from '../../src/core/tensor.js';
import { folderFiles } from '../../src/formats/source.node.js';
import type { TensorReader } from '../../src/formats/safetensors.js';
import { GROUP_NAMES } from '../../src/models/block.js';
import { groupShape, loadDecoder, openModel, type ModelSource } from '../../src/models/load.js';
import { createReferenceBackend, readF64 } from '../../src/ops/reference/backend.js';
import { drawRotation, foldedSource, valueChannel, type Smoothing } from '../../src/quant/folded-source.js';
import { FIXTURES, randomTokens } from '../support/pipeline.js';

/** Biases in steps of 2^-12, whose rotations a f32 holds exactly: backends keep biases in f32. */
function coarseBiases(source: ModelSource): ModelSource {
  const { checkpoint } = source;
  const read: TensorReader['read'] = async (name) => {
    const tensor = await checkpoint.read(name);
    if (!name.endsWith('.bias')) return tensor;
    const coarse = floats(tensor).map((b) => Math.round(b * 4096) / 4096);
    return hostTensor('f32', tensor.shape, coarse);
  };
  return {
    ...source,
    checkpoint: {
      name: checkpoint.name,
      has: (name) => checkpoint.has(name),
      names: () => checkpoint.names(),
      info: (name) => checkpoint.info(name),
      readRows: (name, begin, end) => checkpoint.readRows(name, begin, end),
      close: () => checkpoint.close(),
      read,
    },
  };
}

async function logits(source: ModelSource, ids: Int32Array): Promise<Float64Array> {
  const backend = createReferenceBackend();
  const decoder = await loadDecoder(backend, source);
  return readF64(await decoder.logits(await decoder.hidden(ids, { batch: 2 })));
}

function difference(a: Float64Array, b: Float64Array): number {
  let [d, n] = [0, 0];
  for (let i = 0; i < a.length; i++) {
    d += (a[i] - b[i]) ** 2;
    n += b[i] ** 2;
  }
  return Math.sqrt(d / n);
}

/** Scales between 1/8 and 8; powers of two on o and down, whose inverses meet biases. */
function randomSmoothing(source: ModelSource): Smoothing {
  const rng = createRng(5);
  const { config } = source;
  return Array.from({ length: config.layers }, () => {
    const values = Float64Array.from({ length: config.kvHeads * config.headDim }, () => 2 ** rng.int(-3, 4));
    return Object.fromEntries(
      GROUP_NAMES.map((group) => {
        const n = groupShape(config, group).inFeatures;
        const draw = (_: number, c: number): number => {
          if (group === 'o') return values[valueChannel(config, c)];
          return group === 'down' ? 2 ** rng.int(-3, 4) : Math.exp(2 * rng.uniform() - 1);
        };
        return [group, Float64Array.from({ length: n }, draw as (v: unknown, c: number) => number)];
      }),
    );
  });
}

describe('folding keeps the logits in float64', async () => {
  const fixtures = (await readdir(FIXTURES, { withFileTypes: true })).filter((e) => e.isDirectory()).map((e) => e.name);
  describe.each(fixtures)('%s', (fixture) => {
    let source: ModelSource;
    let ids: Int32Array;
    let expected: Float64Array;
    beforeAll(async () => {
      source = coarseBiases(await openModel(await folderFiles(path.join(FIXTURES, fixture))));
      ids = randomTokens(source, 2, 12, 3);
      expected = await logits(source, ids);
    });
    afterAll(() => source.checkpoint.close());

    it.each([
      ['smoothing', false, true],
      ['rotation', true, false],
      ['smoothing and rotation', true, true],
    ] as const)('%s', async (_, rotate, smooth) => {
      const rotation = rotate ? drawRotation(source.config, createRng(1).fork(fixture)) : undefined;
      const smoothing = smooth ? randomSmoothing(source) : undefined;
      const folded = foldedSource(source, { rotation, smoothing }, { precision: 'f64' });
      expect(difference(await logits(folded, ids), expected)).toBeLessThan(1e-10);
    });
  });
});
