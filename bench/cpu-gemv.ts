// One-row products with weights resident in the arena: GB/s of packed weights for int4 in groups of 128, 1 and 2 threads.
// Weights of several layers are cycled through, so that they come from memory as in decoding, and one is kept hot as the
// bound set by arithmetic. Medians of interleaved runs. Run: npx tsx bench/cpu-gemv.ts
import { mkdirSync, writeFileSync } from 'node:fs';
import { cpus, loadavg } from 'node:os';
import { KernelPool, PackedLinear } from '../src/backends/cpu/kernels.js';
import { createRng } from '../src/core/rng.js';

const ROUNDS = Number(process.env.ROUNDS ?? 41);
const SHAPES = [
  [6144, 1024],
  [3072, 1024],
] as const;
const GROUP = 128;
/** Enough copies to overflow the L3 cache. */
const COPIES = 32;

const pool = await KernelPool.create({ threads: 2 });
const rng = createRng(1);
const median = (values: readonly number[]): number => [...values].sort((a, b) => a - b)[values.length >> 1];
const round = (x: number): number => Number(x.toPrecision(4));
const results: object[] = [];
for (const [outFeatures, inFeatures] of SHAPES) {
  const groups = (outFeatures * inFeatures) / GROUP;
  const codes = Uint8Array.from({ length: outFeatures * inFeatures }, () => rng.int(0, 16));
  const weight = {
    bits: 4 as const,
    groupSize: GROUP,
    inFeatures,
    outFeatures,
    codes,
    zeros: new Uint8Array(groups).fill(8),
    scales: new Float32Array(groups).fill(0.01),
  };
  const linears = Array.from({ length: COPIES }, () => PackedLinear.quantized(pool, weight));
  const x = Float32Array.from({ length: 4 * inFeatures }, () => rng.normal());
  const y = new Float32Array(4 * outFeatures);
  const times = new Map<string, number[]>();
  for (let r = -5; r < ROUNDS; r++) {
    for (const threads of [1, 2]) {
      pool.activeThreads = threads;
      for (const rows of [1, 4]) {
        for (const hot of [true, false]) {
          const input = x.subarray(0, rows * inFeatures);
          const output = y.subarray(0, rows * outFeatures);
          const start = performance.now();
          for (let i = 0; i < COPIES; i++) linears[hot ? 0 : i].gemv(input, rows, output);
          const key = `${threads} ${rows} ${hot}`;
          const seconds = (performance.now() - start) / 1000 / COPIES;
          if (r >= 0) times.set(key, [...(times.get(key) ?? []), seconds]);
        }
      }
    }
  }
  for (const [key, values] of times) {
    const [threads, rows, hot] = key.split(' ');
    const seconds = median(values);
    results.push({
      shape: `${outFeatures}×${inFeatures}`,
      threads: Number(threads),
      rows: Number(rows),
      weights: hot === 'true' ? 'in cache' : 'from memory',
      microseconds: round(seconds * 1e6),
      gigabytesPerSecond: round(linears[0].bytes / seconds / 1e9),
    });
  }
  for (const linear of linears) linear.free();
}
const report = {
  date: new Date().toISOString(),
  node: process.version,
  machine: `${cpus()[0].model}, ${cpus().length} cores`,
  load: round(loadavg()[0]),
  bits: 4,
  groupSize: GROUP,
  rounds: ROUNDS,
  results,
};
console.log(report.machine, 'node', report.node, 'load', report.load);
console.table(results);
mkdirSync(new URL('results/', import.meta.url), { recursive: true });
writeFileSync(new URL('results/cpu-gemv.json', import.meta.url), JSON.stringify(report, null, 2) + '\n');
await pool.dispose();
