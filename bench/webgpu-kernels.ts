// GPU kernels one by one: rotation of many rows, int4 products with one row, matrix products, each against the copy bandwidth
// measured in the same run, each checked before it is timed. Usage: tsx bench/webgpu-kernels.ts [--only name]
import { openWebGpuBackend } from '../src/backends/webgpu/index.js';
import type { PreparedDispatch } from '../src/backends/webgpu/device.js';
import { GEMM_TILES, gemmKernel, gemmMemory, type GemmVariant } from '../src/backends/webgpu/fast/gemm.js';
import { tileGroups, type MatrixTile } from '../src/backends/webgpu/fast/matrix-tiles.js';
import { hasMatrixUnits } from '../src/backends/webgpu/capabilities.js';
import { gemvKernel, gemvRowsPerGroup, type GemvVariant } from '../src/backends/webgpu/fast/gemv.js';
import { denseGemvKernel, denseRowsPerGroup } from '../src/backends/webgpu/fast/gemv-dense.js';
import { rotateDenseKernel } from '../src/backends/webgpu/fast/rotate-dense.js';
import { ROTATE_ROWS, pairTable, rotateRowsKernel } from '../src/backends/webgpu/fast/rotate-rows.js';
import {
  activationGroups,
  activationKernel,
  rotationTable,
  stagesOf,
} from '../src/backends/webgpu/fast/activations.js';
import { GpuTransform } from '../src/backends/webgpu/rotation.js';
import { f16BitsToF32, f32ToF16Bits } from '../src/core/dtype.js';
import { createRng } from '../src/core/rng.js';
import { randomPairs } from '../src/transforms/index.js';
import { copyBandwidth, randomBuffer, timeDispatches, type GpuCandidate } from './support/gpu.js';
import { writeResult } from './support/results.js';

const only = process.argv.includes('--only') ? process.argv[process.argv.indexOf('--only') + 1].split(',') : undefined;
const wants = (name: string): boolean => !only || only.includes(name);
const rng = createRng(1);
const backend = await openWebGpuBackend();
const { gpu } = backend;
const { capabilities } = gpu;
const f16 = capabilities.f16;
const shuffle = (capabilities.subgroups?.min ?? 0) >= 32;
console.log(backend.info.description, JSON.stringify(capabilities.subgroupMatrices.slice(0, 12)));
console.log(
  `workgroup memory ${gpu.limits.maxComputeWorkgroupStorageSize}, invocations ${gpu.limits.maxComputeInvocationsPerWorkgroup}, binding ${gpu.limits.maxStorageBufferBindingSize}`,
);
// Idle GPUs run at low clocks: a second of work first.
for (const end = performance.now() + 1500; performance.now() < end;) await copyBandwidth(gpu, 1 << 28);
const bandwidth = await copyBandwidth(gpu);
console.log(`copy ${(bandwidth / 1e9).toFixed(0)} GB/s`);
const results: Record<string, unknown>[] = [];

const halfPair = (): number => f32ToF16Bits(rng.normal() * 0.5) | (f32ToF16Bits(rng.normal() * 0.5) << 16);
const anyWord = (): number => (rng.uniform() * 2 ** 32) >>> 0;
const gridWord = (): number => f32ToF16Bits(0.01 + 0.01 * rng.uniform()) | (rng.int(0, 16) << 16);
function factorBuffer(count: number): GPUBuffer {
  const data = new Float32Array(2 * count).map((_, i) => (i % 2 === 0 ? 1 + rng.uniform() : rng.normal()));
  const buffer = gpu.buffer(data.byteLength);
  gpu.upload(buffer, data);
  return buffer;
}
const halves = async (buffer: GPUBuffer, offset: number, n: number): Promise<Float32Array> =>
  Float32Array.from(new Uint16Array(await gpu.read(buffer, offset, n * 2)), f16BitsToF32);
const floats = async (buffer: GPUBuffer, offset: number, n: number): Promise<Float32Array> =>
  new Float32Array(await gpu.read(buffer, offset, n * 4));

/** Prints and records one figure. */
function report(
  kind: string,
  name: string,
  seconds: number,
  extra: { bytes?: number; flops?: number; error: number },
): void {
  const { bytes, flops, error } = extra;
  const line = {
    kind,
    name,
    microseconds: seconds * 1e6,
    ...(bytes && { gigabytesPerSecond: bytes / seconds / 1e9, ofCopy: bytes / seconds / bandwidth }),
    ...(flops && { teraflops: flops / seconds / 1e12 }),
    relativeError: error,
  };
  results.push(line);
  console.log(
    `${kind.padEnd(26)} ${name.padEnd(52)} ${(seconds * 1e6).toFixed(2).padStart(9)} us` +
      (bytes
        ? ` ${(bytes / seconds / 1e9).toFixed(0).padStart(6)} GB/s ${((100 * bytes) / seconds / bandwidth).toFixed(1)}%`
        : '') +
      (flops ? ` ${(flops / seconds / 1e12).toFixed(1).padStart(7)} TFLOP/s` : '') +
      ` err ${error.toExponential(1)}`,
  );
}

const relative = (got: ArrayLike<number>, want: ArrayLike<number>): number => {
  let [d, n] = [0, 0];
  for (let i = 0; i < want.length; i++) {
    d += (got[i] - want[i]) ** 2;
    n += want[i] ** 2;
  }
  return Math.sqrt(d / n);
};

async function timed(
  kind: string,
  list: (GpuCandidate & { bytes?: number; flops?: number; error: number })[],
): Promise<void> {
  const times = await timeDispatches(gpu, list);
  for (const c of list) report(kind, c.name, times.get(c.name) ?? NaN, c);
}

// Rotation of many rows.
async function rotation(rows: number, channels: number, blocks: readonly number[]): Promise<void> {
  const [groupSize, krot] = [128, 8];
  const transform = {
    channels,
    groupSize,
    krot,
    pairs: randomPairs(channels, groupSize, krot, rng),
    theta: new Float32Array((krot * channels) / 2).map(() => rng.normal()),
    channelScales: new Float32Array(channels).fill(1),
  };
  const x = randomBuffer(gpu, rows * channels * 2, halfPair);
  const y = gpu.buffer(rows * channels * 2);
  const scale = randomBuffer(gpu, channels * 2, halfPair);
  const table = gpu.buffer(krot * channels * 4);
  gpu.upload(table, pairTable(transform));
  const s = await halves(scale, 0, channels);
  const list: (GpuCandidate & { bytes: number; error: number })[] = [];
  const dense = new GpuTransform(gpu, { ...transform, channelScales: s });
  const r = dense.matrices(gpu);
  const candidates = [
    (() => {
      const kernel = rotateRowsKernel({ f16, krot, groupSize });
      const groups = [channels / groupSize, Math.ceil(rows / ROTATE_ROWS)] as const;
      return { kernel, dispatch: gpu.prepare(kernel, { x, y, scale, table }, { rows, channels }, groups) };
    })(),
    ...blocks.flatMap((block) =>
      [32, 64].map((tile) => {
        const kernel = rotateDenseKernel({ rows: block, tile });
        const groups = [channels / groupSize, Math.ceil(rows / block)] as const;
        return { kernel, dispatch: gpu.prepare(kernel, { x, y, r }, { rows, channels }, groups) };
      }),
    ),
  ];
  for (const { kernel, dispatch } of candidates) {
    gpu.run([dispatch]);
    let error = 0;
    for (const row of [0, 77, rows - 1]) {
      const input = await halves(x, row * channels * 2, channels);
      const v = Float64Array.from(input, (e, c) => e * s[c]);
      for (let k = 0; k < krot; k++)
        for (let p = 0; p < channels / 2; p++) {
          const base = Math.floor((2 * p) / groupSize) * groupSize;
          const [i, j] = [
            base + transform.pairs[k * channels + 2 * p],
            base + transform.pairs[k * channels + 2 * p + 1],
          ];
          const t = transform.theta[(k * channels) / 2 + p];
          [v[i], v[j]] = [v[i] * Math.cos(t) + v[j] * Math.sin(t), v[j] * Math.cos(t) - v[i] * Math.sin(t)];
        }
      error = Math.max(error, relative(await halves(y, row * channels * 2, channels), v));
    }
    list.push({ name: kernel.name, dispatches: [dispatch], bytes: rows * channels * 4, error });
  }
  await timed(`rotate ${rows}x${channels}`, list);
  dense.free(gpu);
  for (const b of [x, y, scale, table]) gpu.release(b);
}

// int4 products with few rows of x. Weights rotate among copies so that caches don't hold them.
async function gemv(
  out: number,
  inFeatures: number,
  variants: Omit<GemvVariant, 'f16' | 'shuffle' | 'groupSize' | 'residual' | 'bias'>[],
): Promise<void> {
  const groupSize = 128;
  const bytes = (out * inFeatures) / 2 + (out * inFeatures * 4) / groupSize;
  const copies = Math.max(2, Math.min(24, Math.ceil(400e6 / bytes)));
  const ws = Array.from({ length: copies }, () => randomBuffer(gpu, (out * inFeatures) / 2, anyWord));
  const grids = Array.from({ length: copies }, () => randomBuffer(gpu, (out * inFeatures * 4) / groupSize, gridWord));
  const batch = variants[0].batch;
  const x = randomBuffer(gpu, batch * inFeatures * 2, halfPair);
  const factors = factorBuffer((batch * inFeatures) / 32);
  const y = gpu.buffer(batch * out * 4);
  const xs = await halves(x, 0, batch * inFeatures);
  const fs = await floats(factors, 0, (batch * inFeatures) / 16);
  const order = [0, 4, 1, 5, 2, 6, 3, 7];
  const list: (GpuCandidate & { bytes: number; error: number })[] = [];
  for (const v of variants) {
    const variant = { ...v, f16, shuffle, groupSize, residual: false, bias: false };
    const kernel = gemvKernel(variant);
    const groups = Math.ceil(out / gemvRowsPerGroup(variant));
    const dispatches = ws.map((w, i) =>
      gpu.prepare(
        kernel,
        { w, grid: grids[i], x, factors, y } as unknown as Record<
          'w' | 'grid' | 'x' | 'factors' | 'y' | 'residual' | 'bias',
          GPUBuffer
        >,
        { chunks: inFeatures / 32, outFeatures: out, stride: out, column: 0, first: 0 },
        [groups],
      ),
    );
    gpu.run([dispatches[0]]);
    const sample = [0, 1, 17, out - 1];
    const [got, want]: number[][] = [[], []];
    const result = await floats(y, 0, batch * out);
    for (const r of sample) {
      const words = new Uint32Array(await gpu.read(ws[0], (r * inFeatures) / 2, inFeatures / 2));
      const g = new Uint32Array(
        await gpu.read(grids[0], (r * inFeatures * 4) / groupSize, (inFeatures * 4) / groupSize),
      );
      for (let b = 0; b < batch; b++) {
        let sum = 0;
        for (let c = 0; c < inFeatures; c += 32) {
          const word = g[Math.floor(c / groupSize)];
          const [scale, zero] = [f16BitsToF32(word & 0xffff), (word >>> 16) - 8];
          const at = (b * inFeatures + c) / 16;
          let dot = 0;
          for (let i = 0; i < 32; i++) {
            const code = (words[(c + i) >> 3] >>> (4 * order[(c + i) & 7])) & 15;
            dot += (code - 8) * xs[b * inFeatures + c + i];
          }
          sum += fs[at] * scale * (dot - zero * fs[at + 1]);
        }
        want.push(sum);
        got.push(result[b * out + r]);
      }
    }
    list.push({ name: kernel.name, dispatches, bytes, error: relative(got, want) });
  }
  await timed(`gemv ${batch}x${out}x${inFeatures}`, list);
  for (const b of [...ws, ...grids, x, factors, y]) gpu.release(b);
}

async function dense(out: number, inFeatures: number): Promise<void> {
  const w = randomBuffer(gpu, out * inFeatures * 2, halfPair);
  const x = randomBuffer(gpu, inFeatures * 2, halfPair);
  const factors = factorBuffer(inFeatures / 32);
  const y = gpu.buffer(out * 4);
  const list: (GpuCandidate & { bytes: number; error: number })[] = [];
  for (const [rows, teams] of [
    [2, 4],
    [4, 4],
    [8, 4],
    [4, 8],
    [1, 8],
  ] as const) {
    const variant = { f16, shuffle, rows, teams, batch: 1, weights: 'f16' as const };
    const kernel = denseGemvKernel(variant);
    const dispatch = gpu.prepare(kernel, { w, x, factors, y }, { words: inFeatures / 8, outFeatures: out }, [
      Math.ceil(out / denseRowsPerGroup(variant)),
    ]);
    gpu.run([dispatch]);
    const [xs, fs, ys, row] = [
      await halves(x, 0, inFeatures),
      await floats(factors, 0, inFeatures / 16),
      await floats(y, 0, out),
      await halves(w, 0, inFeatures),
    ];
    const want = row.reduce((sum, e, c) => sum + e * xs[c] * fs[2 * Math.floor(c / 32)], 0);
    list.push({
      name: kernel.name,
      dispatches: [dispatch],
      bytes: out * inFeatures * 2,
      error: Math.abs(ys[0] / want - 1),
    });
  }
  await timed(`head 1x${out}x${inFeatures}`, list);
  for (const b of [w, x, factors, y]) gpu.release(b);
}

async function gemm(m: number, n: number, k: number, variants: GemmVariant[]): Promise<void> {
  const groupSize = 128;
  const x = randomBuffer(gpu, m * k * 2, halfPair);
  const weights = { f16: randomBuffer(gpu, n * k * 2, halfPair), int4: randomBuffer(gpu, (n * k) / 2, anyWord) };
  const grids = randomBuffer(gpu, (n * k * 4) / groupSize, gridWord);
  const out = gpu.buffer(m * n * 4);
  const list: (GpuCandidate & { flops: number; error: number })[] = [];
  const order = [0, 4, 1, 5, 2, 6, 3, 7];
  for (const v of variants) {
    const kernel = gemmKernel(v);
    const type = v.weights === 'int4' ? 'int4' : 'f16';
    const dispatch: PreparedDispatch = gpu.prepare(
      kernel,
      { x, weights: weights[type], grids, bias: grids, residual: grids, out },
      { m, n, k },
      tileGroups(v, m, n),
    );
    gpu.run([dispatch]);
    const [got, want]: number[][] = [[], []];
    for (const [i, j] of [
      [0, 0],
      [m - 1, n - 1],
      [137, 1013],
      [m - 65, 31],
    ]) {
      const row = await halves(x, i * k * 2, k);
      let sum = 0;
      if (type === 'f16') {
        const col = await halves(weights.f16, j * k * 2, k);
        for (let e = 0; e < k; e++) sum += row[e] * col[e];
      } else {
        const words = new Uint32Array(await gpu.read(weights.int4, (j * k) / 2, k / 2));
        const g = new Uint32Array(await gpu.read(grids, (j * k * 4) / groupSize, (k * 4) / groupSize));
        for (let e = 0; e < k; e++) {
          const word = g[Math.floor(e / groupSize)];
          const code = (words[e >> 3] >>> (4 * order[e & 7])) & 15;
          sum += row[e] * (code - (word >>> 16)) * f16BitsToF32(word & 0xffff);
        }
      }
      want.push(sum);
      got.push((await floats(out, (i * n + j) * 4, 1))[0]);
    }
    list.push({ name: kernel.name, dispatches: [dispatch], flops: 2 * m * n * k, error: relative(got, want) });
  }
  await timed(`gemm ${m}x${n}x${k}`, list);
  for (const b of [x, weights.f16, weights.int4, grids, out]) gpu.release(b);
}

async function activation(channels: number): Promise<void> {
  const [groupSize, krot, splits, headDim] = [128, 8, 16, 128];
  const source = factorBuffer(channels * 8);
  const stats = factorBuffer(1024 * splits);
  const gain = factorBuffer(channels / 2);
  const x = gpu.buffer(channels * 2);
  const factors = gpu.buffer(channels / 4);
  const list: (GpuCandidate & { error: number })[] = [];
  const words = rotationTable({
    channels,
    groupSize,
    krot,
    pairs: randomPairs(channels, groupSize, krot, rng),
    theta: new Float32Array((krot * channels) / 2).map(() => rng.normal()),
    channelScales: new Float32Array(channels).fill(1),
  });
  // Tables rotate so that they come from memory, as they do between the weights of a model.
  const tables = Array.from({ length: 256 }, () => gpu.buffer(words.byteLength));
  for (const table of tables) gpu.upload(table, words);
  for (const stages of [0, stagesOf(krot)])
    for (const kind of ['norm', 'silu', 'plain', 'attention'] as const)
      for (const threads of [128, 256]) {
        if (kind === 'attention' && channels > 8192) continue;
        const kernel = activationKernel({ shuffle, source: kind, stages, threads, splits, headDim });
        const groups = [activationGroups(channels), 1, 1] as const;
        const dispatches = tables.map((table) =>
          gpu.prepare(kernel, { source, stats, gain, table, x, factors }, { channels, eps: 1e-5 }, groups),
        );
        list.push({ name: kernel.name, dispatches, error: 0 });
      }
  return timed(`activations ${channels}`, list);
}

const sweep = (rows: number[], teams: number[], splits: number[], batch = 1) =>
  rows.flatMap((r) =>
    teams.flatMap((t) => splits.filter((s) => s <= t).map((s) => ({ rows: r, teams: t, split: s, batch }))),
  );
if (wants('rotate')) {
  await rotation(16384, 4096, [1024, 2048]);
  await rotation(16384, 14336, [1024, 2048]);
}
if (wants('rotate-prefill')) {
  await rotation(2048, 4096, [64, 128, 256, 512]);
  await rotation(2048, 14336, [128, 256, 512]);
  await rotation(2048, 1024, [64, 128]);
}
if (wants('activations')) {
  await activation(4096);
  await activation(14336);
}
if (wants('gemv')) {
  await gemv(24576, 4096, sweep([2, 4, 8], [4], [1]).concat(sweep([4], [2, 8], [1])));
  await gemv(4096, 14336, sweep([2, 4], [4, 8], [2, 4, 8]));
  await gemv(4096, 4096, sweep([1, 2, 4], [4, 8], [1, 2, 4]));
  await gemv(6144, 4096, sweep([2, 4], [4], [1, 2, 4]));
  await dense(128256, 4096);
}
if ((wants('gemm') || wants('gemm-small')) && hasMatrixUnits(capabilities)) {
  const memory = gpu.limits.maxComputeWorkgroupStorageSize;
  const tiles: MatrixTile[] = [
    ...GEMM_TILES,
    { tileM: 128, tileN: 256, tileK: 32, warpsM: 2, warpsN: 4 },
    { tileM: 128, tileN: 128, tileK: 32, warpsM: 4, warpsN: 2 },
    { tileM: 128, tileN: 64, tileK: 32, warpsM: 2, warpsN: 2 },
    { tileM: 128, tileN: 64, tileK: 32, warpsM: 4, warpsN: 2 },
    { tileM: 128, tileN: 64, tileK: 64, warpsM: 2, warpsN: 2 },
  ];
  const of = (weights: GemmVariant['weights']): GemmVariant[] =>
    tiles
      .filter((tile) => gemmMemory(tile) <= memory)
      .map((tile) => ({ ...tile, weights, groupSize: 128, bias: false, residual: false }));
  if (wants('gemm')) {
    await gemm(4096, 4096, 4096, of('f16'));
    for (const [n, k] of [
      [14336, 4096],
      [6144, 4096],
      [4096, 4096],
      [28672, 4096],
      [4096, 14336],
    ])
      await gemm(2048, n, k, of('int4'));
  }
  for (const [n, k] of [
    [1024, 3072],
    [6144, 1024],
  ])
    await gemm(2048, n, k, of('int4'));
}
writeResult('webgpu-kernels', { gpu: backend.info.description, copyBytesPerSecond: bandwidth, results });
await backend.dispose();
