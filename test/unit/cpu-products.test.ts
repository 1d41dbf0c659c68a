// Products of the CPU backend: the same bits for any number of threads.
import { expect, it } from 'vitest';
import { openBackend } from '../../src/backends/registry.js';
import { createRng } from '../../src/core/rng.js';
import { hostTensor } from '../../src/core/tensor.js';

// Fewer rows than columns, and few columns a thread: the library below divides columns and would sum parts in longer runs.
it.each([
  [96, 384, 128],
  [5, 352, 100],
  [200, 172, 260],
])('of %i × %i with %i columns', async (rows, inner, cols) => {
  const rng = createRng(7);
  const random = (m: number, n: number) =>
    hostTensor(
      'f32',
      [m, n],
      Float32Array.from({ length: m * n }, () => rng.normal()),
    );
  const [a, b] = [random(rows, inner), random(inner, cols)];
  const results: Float32Array[] = [];
  for (const threads of [1, 2, 3]) {
    const backend = await openBackend('cpu', { threads });
    const y = await backend.matmul(await backend.upload(a), await backend.upload(b));
    results.push(await backend.download(y));
    await backend.dispose();
  }
  expect(results[1]).toEqual(results[0]);
  expect(results[2]).toEqual(results[0]);
});
