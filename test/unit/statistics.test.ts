// Statistics of calibration inputs: the matrices by definition, and the targets of groups that write to the residual stream.
import { describe, expect, it } from 'vitest';
import { createRng } from '../../src/core/rng.js';
import { hostTensor } from '../../src/core/tensor.js';
import type { Tensor } from '../../src/ops/backend.js';
import { createReferenceBackend } from '../../src/ops/reference/index.js';
import { InputStatistics, wantedOutputs } from '../../src/quant/statistics.js';

const backend = createReferenceBackend();
const rng = createRng(3);

async function random(rows: number, columns: number): Promise<{ data: Float32Array; tensor: Tensor }> {
  const data = Float32Array.from({ length: rows * columns }, () => rng.normal());
  return { data, tensor: await backend.upload(hostTensor('f32', [rows, columns], data)) };
}

/** aᵀ·b / rows of row-major [rows, m] and [rows, n]. */
function product(a: Float32Array, b: Float32Array, rows: number): Float64Array {
  const [m, n] = [a.length / rows, b.length / rows];
  return Float64Array.from({ length: m * n }, (_, at) => {
    let sum = 0;
    for (let r = 0; r < rows; r++) sum += a[r * m + Math.floor(at / n)] * b[r * n + (at % n)];
    return sum / rows;
  });
}

function expectClose(actual: Float32Array, expected: Float64Array): void {
  expect(actual).toHaveLength(expected.length);
  for (let i = 0; i < expected.length; i++) expect(actual[i]).toBeCloseTo(expected[i], 5);
}

describe('InputStatistics', () => {
  it('averages the matrices over the rows of all chunks', async () => {
    const statistics = new InputStatistics(backend);
    const x = await random(10, 3);
    const reference = await random(10, 3);
    const outputs = await random(10, 2);
    for (const [begin, end] of [
      [0, 4],
      [4, 10],
    ]) {
      const rows = (of: { tensor: Tensor }): Tensor => backend.sliceRows(of.tensor, begin, end);
      await statistics.add(rows(x), { reference: rows(reference), outputs: rows(outputs) });
    }
    const { gram, cross, target } = await statistics.finish('a test');
    expectClose(await backend.download(gram), product(x.data, x.data, 10));
    expectClose(await backend.download(cross as Tensor), product(reference.data, x.data, 10));
    expectClose(await backend.download(target as Tensor), product(x.data, outputs.data, 10));
  });

  it('knows nothing of groups whose inputs are all zero', async () => {
    const statistics = new InputStatistics(backend);
    const outputs = await random(4, 2);
    await statistics.add(await backend.upload(hostTensor('f32', [4, 2], new Float32Array(8))), {
      outputs: outputs.tensor,
    });
    const { gram, cross, target } = await statistics.finish('a test');
    expect([...(await backend.download(gram))]).toEqual([1, 0, 0, 1]);
    expect([cross, target]).toEqual([undefined, undefined]);
  });
});

describe('wantedOutputs', () => {
  it('brings one residual stream to the other, the bias apart', async () => {
    const [after, before] = [await random(3, 2), await random(3, 2)];
    const bias = Float32Array.of(0.5, -2);
    for (const b of [undefined, bias]) {
      const wanted = await backend.download(await wantedOutputs(backend, after.tensor, before.tensor, b));
      wanted.forEach((value, at) => {
        expect(before.data[at] + value + (b ? b[at % 2] : 0)).toBeCloseTo(after.data[at], 5);
      });
    }
  });
});
