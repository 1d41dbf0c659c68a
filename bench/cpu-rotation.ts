// Rotation kernels on the CPU: 8 rotations of a 4096 × 4096 weight in groups of 128, forward, inverse and gradient, in
// GFLOP/s per thread against the multiply-add peak of the same WebAssembly build, and the gain from 1 to 2 threads.
// Variants are interleaved and medians taken, because the machine may be shared. Run: npx tsx bench/cpu-rotation.ts
import { mkdirSync, writeFileSync } from 'node:fs';
import { cpus, loadavg } from 'node:os';
import { KernelPool } from '../src/backends/cpu/kernels.js';
import { rotationTable } from '../src/backends/cpu/kernels.js';
import { createRng } from '../src/core/rng.js';

const CHANNELS = 4096;
const COLUMNS = 4096;
const GROUP = 128;
const ROTATIONS = 8;
/** Columns that the gradient kernel sums together. */
const CHUNK = 256;
const ROUNDS = Number(process.env.ROUNDS ?? 15);
/** 4 multiplications and 2 additions per pair and column. */
const PAIRS = (CHANNELS / 2) * ROTATIONS * COLUMNS;
/** The gradient rotates two matrices and takes their cross product: 12 + 4 operations. */
const FLOP = { forward: 6 * PAIRS, inverse: 6 * PAIRS, gradient: 16 * PAIRS };
const PEAK_ITERATIONS = 1_500_000;
const PEAK_FLOP = PEAK_ITERATIONS * 24 * 4;

const pool = await KernelPool.create({ threads: 2 });
const { arena } = pool;
const rng = createRng(1);
const pairs = new Int16Array(ROTATIONS * CHANNELS);
for (let at = 0; at < pairs.length; at += GROUP) pairs.set(rng.permutation(GROUP), at);
const theta = Float32Array.from({ length: pairs.length / 2 }, () => rng.normal());
const spec = { channels: CHANNELS, groupSize: GROUP, krot: ROTATIONS, pairs };
const table = rotationTable(pool, spec, theta);
const matrix = (): number => arena.alloc(CHANNELS * COLUMNS * 4);
const [w, y, gradient] = [matrix(), matrix(), matrix()];
const scales = arena.alloc(CHANNELS * 4);
const sums = arena.alloc((COLUMNS / CHUNK) * (pairs.length / 2) * 8);
arena.f32.fill(1, scales >>> 2, (scales >>> 2) + CHANNELS);
for (const at of [w, y, gradient]) {
  for (let i = 0; i < CHANNELS * COLUMNS; i++) arena.f32[(at >>> 2) + i] = rng.uniform() - 0.5;
}

const groups = CHANNELS / GROUP;
const PANEL = 256;
const wide = groups * (COLUMNS / PANEL);
const jobs = {
  peak: () => pool.run('multiplyAddPeak', PEAK_ITERATIONS * pool.activeThreads, []),
  forward: () => pool.run('transformChannels', wide, [w, w, COLUMNS, GROUP, ROTATIONS, table, scales, 0, PANEL]),
  inverse: () => pool.run('transformChannels', wide, [w, w, COLUMNS, GROUP, ROTATIONS, table, scales, 1, PANEL]),
  gradient: () =>
    pool.run('rotationGradient', groups * (COLUMNS / CHUNK), [
      y,
      gradient,
      gradient,
      COLUMNS,
      GROUP,
      ROTATIONS,
      table,
      sums,
      groups,
    ]),
};
type Name = keyof typeof jobs;
/** The same work on one group of 1024 columns again and again: what is left when memory is not the limit. One thread. */
const HOT_COLUMNS = 1024;
const HOT_REPEATS = groups * (COLUMNS / HOT_COLUMNS);
const hotJobs = {
  forward: () =>
    pool.run('transformChannels', HOT_COLUMNS / PANEL, [w, w, HOT_COLUMNS, GROUP, ROTATIONS, table, scales, 0, PANEL]),
  inverse: () =>
    pool.run('transformChannels', HOT_COLUMNS / PANEL, [w, w, HOT_COLUMNS, GROUP, ROTATIONS, table, scales, 1, PANEL]),
  gradient: () =>
    pool.run('rotationGradient', HOT_COLUMNS / CHUNK, [
      y,
      gradient,
      gradient,
      HOT_COLUMNS,
      GROUP,
      ROTATIONS,
      table,
      sums,
      1,
    ]),
};
const names = Object.keys(jobs) as Name[];
const times = new Map<string, number[]>();
for (let round = -2; round < ROUNDS; round++) {
  for (const threads of [1, 2]) {
    pool.activeThreads = threads;
    for (const name of names) {
      const start = performance.now();
      jobs[name]();
      const seconds = (performance.now() - start) / 1000;
      const key = `${name} ${threads}`;
      if (round >= 0) times.set(key, [...(times.get(key) ?? []), seconds]);
    }
  }
}

pool.activeThreads = 1;
for (let round = -1; round < ROUNDS; round++) {
  for (const name of ['forward', 'inverse', 'gradient'] as const) {
    const start = performance.now();
    for (let i = 0; i < HOT_REPEATS; i++) hotJobs[name]();
    const key = `${name} hot`;
    if (round >= 0) times.set(key, [...(times.get(key) ?? []), (performance.now() - start) / 1000]);
  }
}

const median = (values: readonly number[]): number => [...values].sort((a, b) => a - b)[values.length >> 1];
const seconds = (name: Name, threads: number | 'hot'): number => median(times.get(`${name} ${threads}`) ?? []);
const round = (x: number): number => Number(x.toPrecision(4));
const peak = PEAK_FLOP / seconds('peak', 1) / 1e9;
const results = (['forward', 'inverse', 'gradient'] as const).map((name) => {
  const one = FLOP[name] / seconds(name, 1) / 1e9;
  return {
    kernel: name,
    flopPerPairAndColumn: name === 'gradient' ? 16 : 6,
    milliseconds1: round(seconds(name, 1) * 1000),
    milliseconds2: round(seconds(name, 2) * 1000),
    gflops1: round(one),
    ofPeak: round(one / peak),
    ofPeakInCache: round(FLOP[name] / seconds(name, 'hot') / 1e9 / peak),
    scaling2: round(seconds(name, 1) / seconds(name, 2)),
  };
});

// Hand-over cost: an empty job on both threads, workers warm.
pool.activeThreads = 2;
const empty: number[] = [];
for (let i = 0; i < 20000; i++) {
  const start = performance.now();
  pool.run('multiplyAddPeak', 2, []);
  empty.push((performance.now() - start) * 1000);
}
const report = {
  date: new Date().toISOString(),
  node: process.version,
  machine: `${cpus()[0].model}, ${cpus().length} cores`,
  load: round(loadavg()[0]),
  problem: { channels: CHANNELS, columns: COLUMNS, groupSize: GROUP, rotations: ROTATIONS, rounds: ROUNDS },
  peakGflopsPerThread: round(peak),
  peakScaling2: round((2 * seconds('peak', 1)) / seconds('peak', 2)),
  results,
  dispatchMicroseconds: round(median(empty)),
};
console.log(report.machine, 'node', report.node, 'load', report.load);
console.log('peak', report.peakGflopsPerThread, 'GFLOP/s per thread, 2 threads ×', report.peakScaling2);
console.table(results);
console.log('dispatch', report.dispatchMicroseconds, 'µs');
mkdirSync(new URL('results/', import.meta.url), { recursive: true });
writeFileSync(new URL('results/cpu-rotation.json', import.meta.url), JSON.stringify(report, null, 2) + '\n');
await pool.dispose();
