// SmoothRot's kernels on a GPU: Hadamard transforms of many rows against the copy bandwidth measured in the same run, products
// of integer codes, each checked before it is timed. Usage: tsx bench/webgpu-smoothrot.ts [--only hadamard,integer,slices,row,decode,exact] [--sweep]
import { parseArgs } from 'node:util';
import { openWebGpuBackend } from '../src/backends/webgpu/index.js';
import { gemmKernel, type GemmVariant } from '../src/backends/webgpu/fast/gemm.js';
import { tileGroups } from '../src/backends/webgpu/fast/matrix-tiles.js';
import {
  hadamardAhead,
  hadamardRowsKernel,
  hadamardRowsMemory,
  hadamardRowsTuning,
  signsOf,
} from '../src/backends/webgpu/fast/hadamard.js';
import {
  hasIntegerMatrices,
  integerMatrixKernel,
  integerMatrixMemory,
} from '../src/backends/webgpu/fast/gemm-integer.js';
import { DecodePlan } from '../src/backends/webgpu/fast/plan.js';
import { RowSlices } from '../src/backends/webgpu/fast/row-slices.js';
import { rowKernel } from '../src/backends/webgpu/fast/row.js';
import { encodeRowsKernel } from '../src/backends/webgpu/kernels/activation-grid.js';
import { INTEGER_TILE, integerGemmKernel } from '../src/backends/webgpu/kernels/linear-integer.js';
import { GpuTensor } from '../src/backends/webgpu/tensor.js';
import { f16BitsToF32, f32ToF16Bits } from '../src/core/dtype.js';
import { createRng } from '../src/core/rng.js';
import { applyHadamard, hadamardTransform } from '../src/transforms/index.js';
import { copyBandwidth, randomBuffer, timeDispatches, type GpuCandidate } from './support/gpu.js';
import { RandomDecoder, SHAPES, type PlanKind } from './support/random-plan.js';
import { writeResult } from './support/results.js';

const { values } = parseArgs({ options: { only: { type: 'string' }, sweep: { type: 'boolean' } } });
const only = values.only?.split(',');
const wants = (name: string): boolean => !only || only.includes(name);
const rng = createRng(1);
const backend = await openWebGpuBackend();
const { gpu } = backend;
const { capabilities, limits } = gpu;
console.log(backend.info.description, 'integer dot', capabilities.integerDot);
console.log('subgroup matrices', JSON.stringify(capabilities.subgroupMatrices));
// Idle GPUs run at low clocks: a second of work first.
const copied = capabilities.software ? 1 << 20 : 1 << 30;
for (const end = performance.now() + 1200; performance.now() < end;) await copyBandwidth(gpu, copied / 4);
const bandwidth = await copyBandwidth(gpu, copied);
console.log(`copy ${(bandwidth / 1e9).toFixed(0)} GB/s`);
const results: Record<string, unknown>[] = [];

type Candidate = GpuCandidate & { readonly bytes?: number; readonly operations?: number; readonly error: number };

async function timed(kind: string, list: readonly Candidate[]): Promise<void> {
  const times = await timeDispatches(gpu, list);
  for (const { name, bytes, operations, error } of list) {
    const seconds = times.get(name) ?? NaN;
    const line = {
      kind,
      name,
      microseconds: seconds * 1e6,
      ...(bytes && { gigabytesPerSecond: bytes / seconds / 1e9, ofCopy: bytes / seconds / bandwidth }),
      ...(operations && { teraops: operations / seconds / 1e12 }),
      error,
    };
    results.push(line);
    console.log(
      `${kind.padEnd(24)} ${name.padEnd(44)} ${line.microseconds.toFixed(2).padStart(9)} us` +
        (bytes ? ` ${((100 * bytes) / seconds / bandwidth).toFixed(1)}% of copy` : '') +
        (operations ? ` ${(operations / seconds / 1e12).toFixed(1)} TOP/s` : '') +
        ` error ${error.toExponential(1)}`,
    );
  }
}

const relative = (got: ArrayLike<number>, want: ArrayLike<number>): number => {
  let [d, n] = [0, 0];
  for (let i = 0; i < want.length; i++) {
    d += (got[i] - want[i]) ** 2;
    n += want[i] ** 2;
  }
  return Math.sqrt(d / n);
};
const halfPair = (): number => f32ToF16Bits(rng.normal()) | (f32ToF16Bits(rng.normal()) << 16);
const anyWord = (): number => (rng.uniform() * 2 ** 32) >>> 0;

interface Sweep {
  readonly threads?: readonly number[];
  readonly bits?: readonly number[];
  readonly aheads?: readonly number[];
}

async function hadamard(rows: number, channels: number, sweep: Sweep = {}): Promise<void> {
  const transform = hadamardTransform(channels);
  const m = Math.sqrt(transform.base.length);
  const list: Candidate[] = [];
  const buffers: GPUBuffer[] = [];
  for (const halves of [true, false]) {
    const shape = { channels, inner: 1, m, p: channels / m, halves };
    if (hadamardRowsMemory(shape) > limits.maxComputeWorkgroupStorageSize) continue;
    const size = halves ? 2 : 4;
    const x = randomBuffer(
      gpu,
      rows * channels * size,
      halves ? halfPair : () => new Uint32Array(Float32Array.of(rng.normal()).buffer)[0],
    );
    const y = gpu.buffer(rows * channels * size);
    buffers.push(x, y);
    const signed = { ...shape, signs: signsOf(transform.base) };
    const tuned = hadamardRowsTuning(signed, rows);
    const { threads = [tuned.threads], bits = [tuned.bits], aheads = [tuned.ahead ?? 1] } = sweep;
    const variants = threads.flatMap((t) => bits.flatMap((b) => aheads.map((a) => [t, b, a] as const)));
    for (const [count, most, ahead] of variants) {
      const v = { ...signed, threads: count, bits: most, ahead };
      if (ahead > 1 && !hadamardAhead(v)) continue;
      const kernel = hadamardRowsKernel(v);
      const dispatch = gpu.prepare(kernel, { x, y }, { rows }, [Math.ceil(rows / ahead)]);
      gpu.run([dispatch]);
      let error = 0;
      for (const row of [0, 77, rows - 1]) {
        const take = async (buffer: GPUBuffer): Promise<Float64Array> => {
          const bytes = await gpu.read(buffer, row * channels * size, channels * size);
          return Float64Array.from(halves ? Array.from(new Uint16Array(bytes), f16BitsToF32) : new Float32Array(bytes));
        };
        error = Math.max(error, relative(await take(y), applyHadamard(await take(x), transform)));
      }
      list.push({ name: kernel.name, dispatches: [dispatch], bytes: 2 * rows * channels * size, error });
    }
  }
  await timed(`hadamard ${rows}x${channels}`, list);
  for (const buffer of buffers) gpu.release(buffer);
}

/** Orders whose base matrix is too large for a thread's registers, by the general kernels: f32, in as many stages as it takes. */
async function largeBase(rows: number, channels: number): Promise<void> {
  const handle = await backend.loadTransform(hadamardTransform(channels));
  const word = (): number => new Uint32Array(Float32Array.of(rng.normal()).buffer)[0];
  const x = new GpuTensor([rows, channels], randomBuffer(gpu, rows * channels * 4, word));
  let seconds = Infinity;
  for (let i = 0; i < 4; i++) {
    gpu.startProfile();
    const y = await backend.rotate(x, handle);
    const kernels = await gpu.stopProfile();
    seconds = Math.min(
      seconds,
      kernels.reduce((sum, k) => sum + k.seconds, 0),
    );
    backend.free(y);
  }
  gpu.release(x.buffer);
  backend.release(handle);
  const ofCopy = (8 * rows * channels) / seconds / bandwidth;
  results.push({ kind: `hadamard ${rows}x${channels}`, name: 'general, f32', microseconds: seconds * 1e6, ofCopy });
  console.log(
    `hadamard ${rows}x${channels} general, f32: ${(seconds * 1e6).toFixed(0)} us ${(100 * ofCopy).toFixed(1)}% of copy`,
  );
}

const TILES = [
  { tileM: 256, tileN: 128, tileK: 64, warpsM: 4, warpsN: 2 },
  { tileM: 128, tileN: 128, tileK: 64, warpsM: 2, warpsN: 2 },
  { tileM: 64, tileN: 64, tileK: 64, warpsM: 2, warpsN: 2 },
] as const;

/** Products of codes, with dot4I8Packed and on matrix units: exact sums, checked against integers on the host. */
async function integer(rows: number, out: number, inFeatures: number): Promise<void> {
  const x = randomBuffer(gpu, rows * inFeatures * 4, () => new Uint32Array(Float32Array.of(rng.normal()).buffer)[0]);
  const words = inFeatures / 4;
  const [codes, scales] = [gpu.buffer(rows * inFeatures), gpu.buffer(rows * 8)];
  const y = gpu.buffer(rows * out * 4);
  const list: Candidate[] = [];
  for (const bits of [4, 8] as const) {
    const encode = gpu.prepare(
      encodeRowsKernel({ paired: bits === 4, size: inFeatures, halves: false }),
      { x, codes, scales },
      { runs: rows, size: inFeatures, words, top: 127, clip: 1 },
      [rows],
    );
    const weights = randomBuffer(gpu, (out * inFeatures * bits) / 8, anyWord);
    const grids = randomBuffer(
      gpu,
      out * 4,
      () => f32ToF16Bits(0.01 + 0.01 * rng.uniform()) | ((bits === 4 ? rng.int(5, 12) : 128) << 16),
    );
    const product = gpu.prepare(
      integerGemmKernel(bits),
      { codes, scales, weights, grids, bias: grids, residual: grids, out: y },
      {
        rows,
        outFeatures: out,
        words,
        groupWords: words,
        groupsPerRow: 1,
        hasBias: 0,
        hasResidual: 0,
      },
      [Math.ceil(out / INTEGER_TILE), Math.ceil(rows / INTEGER_TILE)],
    );
    const operations = 2 * rows * out * inFeatures;
    list.push({ name: `${encode.name} (${bits})`, dispatches: [encode], bytes: rows * inFeatures * 5, error: 0 });
    const candidates = [product];
    if (hasIntegerMatrices(capabilities))
      for (const tile of TILES) {
        if (integerMatrixMemory(tile) > limits.maxComputeWorkgroupStorageSize) continue;
        const variant = { ...tile, bits, bias: false, residual: false };
        candidates.push(
          gpu.prepare(
            integerMatrixKernel(variant),
            { codes, scales, weights, grids, bias: grids, residual: grids, out: y },
            { m: rows, n: out, k: inFeatures },
            tileGroups(variant, rows, out),
          ),
        );
      }
    for (const candidate of candidates) {
      gpu.run([encode, candidate]);
      let error = 0;
      for (const [r, o] of [
        [0, 0],
        [rows - 1, out - 1],
        [77, 1013],
        [rows - 65, 31],
      ]) {
        const a = new Int8Array(await gpu.read(codes, r * inFeatures, inFeatures));
        const w = new Uint8Array(await gpu.read(weights, (o * inFeatures * bits) / 8, (inFeatures * bits) / 8));
        const [grid] = new Uint32Array(await gpu.read(grids, o * 4, 4));
        let sum = 0;
        for (let i = 0; i < inFeatures; i++) {
          // Both sides lie in the same order: of the 8 codes of two words, bytes are nibbles 0 2 4 6 and 1 3 5 7.
          const byte = (i >> 3) * 4 + (i & 3);
          const q = bits === 8 ? w[i] : (w[byte] >> (i & 4)) & 15;
          sum += a[i] * (q - (grid >>> 16));
        }
        const [scale] = new Float32Array(await gpu.read(scales, r * 8, 4));
        const want = sum * f16BitsToF32(grid & 0xffff) * scale;
        const [got] = new Float32Array(await gpu.read(y, (r * out + o) * 4, 4));
        error = Math.max(error, Math.abs(got / want - 1));
      }
      list.push({ name: candidate.name, dispatches: [candidate], operations, error });
    }
  }
  await timed(`integer ${rows}x${out}x${inFeatures}`, list);
}

/** Whether matrix units add products of 8-bit and 4-bit codes exactly: f16 holds both, f32 their sums below 2^24. */
async function exact(m: number, n: number, k: number): Promise<void> {
  const v: GemmVariant = {
    tileM: 256,
    tileN: 128,
    tileK: 32,
    warpsM: 4,
    warpsN: 2,
    weights: 'int4',
    groupSize: k,
    bias: false,
    residual: false,
  };
  const code = (): number => f32ToF16Bits(rng.int(-127, 128));
  const a = randomBuffer(gpu, m * k * 2, () => code() | (code() << 16));
  const b = randomBuffer(gpu, (n * k) / 2, anyWord);
  const grid = randomBuffer(gpu, n * 4, () => f32ToF16Bits(1) | (8 << 16));
  const c = gpu.buffer(m * n * 4);
  const dispatch = gpu.prepare(
    gemmKernel(v),
    { x: a, weights: b, grids: grid, bias: grid, residual: grid, out: c },
    { m, n, k },
    tileGroups(v, m, n),
  );
  gpu.run([dispatch]);
  const order = [0, 4, 1, 5, 2, 6, 3, 7];
  let wrong = 0;
  let largest = 0;
  for (let i = 0; i < 24; i++) {
    const [r, o] = [rng.int(0, m), rng.int(0, n)];
    const x = Array.from(new Uint16Array(await gpu.read(a, r * k * 2, k * 2)), f16BitsToF32);
    const w = new Uint32Array(await gpu.read(b, (o * k) / 2, k / 2));
    const [got] = new Float32Array(await gpu.read(c, (r * n + o) * 4, 4));
    const sum = x.reduce((s, e, j) => s + e * (((w[j >> 3] >>> (4 * order[j & 7])) & 15) - 8), 0);
    largest = Math.max(largest, Math.abs(sum));
    if (got !== sum) wrong++;
  }
  console.log(`exact ${m}x${n}x${k}: ${wrong} of 24 sums differ from the integers; largest ${largest}`);
  results.push({ kind: `exact ${m}x${n}x${k}`, wrong, largest });
  await timed(`codes ${m}x${n}x${k}`, [
    { name: dispatch.name, dispatches: [dispatch], operations: 2 * m * n * k, error: wrong },
  ]);
}

/** Whole rows of the decode plan: a transform and codes or normalised f16, checked on a plain vector, timed on every source. */
async function rows(channels: number, inner: number): Promise<void> {
  const transform = hadamardTransform(channels, { inner });
  const m = Math.sqrt(transform.base.length);
  const hadamard = { m, p: transform.order / m, inner, signs: signsOf(transform.base) };
  const [splits, headDim] = [16, 128];
  const host = Float32Array.from({ length: channels }, () => rng.normal());
  const source = gpu.buffer(channels * splits * 4);
  gpu.upload(source, host);
  const stats = randomBuffer(
    gpu,
    (channels / headDim) * splits * 8,
    () => new Uint32Array(Float32Array.of(1).buffer)[0],
  );
  const gain = randomBuffer(gpu, channels * 4, () => new Uint32Array(Float32Array.of(1).buffer)[0]);
  const [x, factors] = [gpu.buffer(channels * 2), gpu.buffer(channels / 4)];
  const want = applyHadamard(Float64Array.from(host), transform);
  const list: Candidate[] = [];
  for (const codes of [true, false])
    for (const threads of [256, 512, 1024]) {
      if (threads > limits.maxComputeInvocationsPerWorkgroup) continue;
      const variant = {
        channels,
        hadamard,
        codes,
        threads,
        memory: limits.maxComputeWorkgroupStorageSize,
        splits,
        headDim,
      };
      const make = (kind: 'plain' | 'silu' | 'attention') =>
        gpu.prepare(
          rowKernel({ ...variant, source: kind, subgroups: capabilities.subgroups !== undefined }),
          { source, stats, gain, x, factors },
          { eps: 1e-5, top: 127, clip: 1 },
          [1, 1],
        );
      gpu.run([make('plain')]);
      const scales = new Float32Array(await gpu.read(factors, 0, channels / 4));
      const bytes = await gpu.read(x, 0, channels * (codes ? 1 : 2));
      const place = [0, 2, 4, 6, 1, 3, 5, 7];
      const got = want.map((_, c) => {
        const factor = scales[2 * (c >> 5)];
        return codes
          ? factor * new Int8Array(bytes)[c - (c % 8) + place[c % 8]]
          : factor * f16BitsToF32(new Uint16Array(bytes)[c]);
      });
      const kind = inner > 1 ? 'attention' : 'silu';
      const dispatch = make(kind);
      list.push({ name: `${dispatch.name}.t${threads}`, dispatches: [dispatch], error: relative(got, want) });
    }
  await timed(`row ${channels}`, list);
}

/** The same rows over several workgroups, as the plan runs them: checked against float64 on every source, timed. */
async function slices(channels: number, inner: number): Promise<void> {
  const transform = hadamardTransform(channels, { inner });
  const m = Math.sqrt(transform.base.length);
  const hadamard = { m, p: transform.order / m, inner, signs: signsOf(transform.base) };
  const splits = 24;
  const kind = inner > 1 ? 'attention' : 'silu';
  const width = kind === 'silu' ? 2 * channels : splits * channels;
  const host = Float32Array.from({ length: width }, () => rng.normal());
  const source = gpu.buffer(width * 4);
  gpu.upload(source, host);
  const stats = gpu.buffer((channels / inner) * splits * 8);
  gpu.upload(stats, new Float32Array((2 * channels * splits) / inner).fill(1));
  const [x, factors] = [gpu.buffer(channels * 2), gpu.buffer(channels / 4)];
  const values = Float64Array.from({ length: channels }, (_, c) => {
    if (kind === 'silu') return (host[c] / (1 + Math.exp(-host[c]))) * host[c + channels];
    let sum = 0;
    for (let s = 0; s < splits; s++) sum += host[(Math.floor(c / inner) * splits + s) * inner + (c % inner)];
    return sum / splits;
  });
  const want = applyHadamard(values, transform);
  const list: Candidate[] = [];
  for (const codes of [true, false]) {
    const row = { hadamard, ...(codes && { grid: { top: 127, clip: 1 } }) };
    const buffers = { source, stats, gain: x, x, factors };
    const made = new RowSlices(gpu, (bytes) => gpu.buffer(bytes));
    const dispatches = made.prepare({ source: kind, channels, row, batch: 1, splits, eps: 0, buffers });
    if (!dispatches) throw new Error(`no kernel over several workgroups for ${channels} channels`);
    gpu.run(dispatches);
    const scales = new Float32Array(await gpu.read(factors, 0, channels / 4));
    const bytes = await gpu.read(x, 0, channels * (codes ? 1 : 2));
    const place = [0, 2, 4, 6, 1, 3, 5, 7];
    const got = want.map((_, c) =>
      codes
        ? scales[2 * (c >> 5)] * new Int8Array(bytes)[c - (c % 8) + place[c % 8]]
        : scales[2 * (c >> 5)] * f16BitsToF32(new Uint16Array(bytes)[c]),
    );
    const error = relative(got, want);
    for (const dispatch of dispatches)
      list.push({ name: `${dispatch.name}${codes ? ' (codes)' : ''}`, dispatches: [dispatch], error });
  }
  await timed(`slices ${channels}`, list);
}

/** A whole decoder's step: AWQ, QuaRot and SmoothRot in one engine, GPU time alone. */
async function decode(): Promise<void> {
  const shape = SHAPES[capabilities.software ? SHAPES.length - 1 : 0];
  const decoder = new RandomDecoder(gpu, shape, 2048);
  const kinds: readonly PlanKind[] = ['awq', 'quarot', 'quarot-a8', 'smoothrot-a8', 'smoothrot-a8-kv8', 'paroquant'];
  const plans = kinds.map((kind) => {
    const model = decoder.model(kind, 1, 1536);
    return { kind, model, plan: new DecodePlan(gpu, model, { batch: 1, capacity: 1536 }) };
  });
  const logits: Float32Array[] = [];
  for (const { plan } of plans) {
    plan.begin(Uint32Array.of(11), Uint32Array.of(512), [{ temperature: 0 }]);
    plan.run();
    logits.push(await plan.logits());
  }
  const names = plans.map(({ kind, plan }) => ({ name: kind, dispatches: plan.dispatches }));
  const times = await timeDispatches(gpu, names, { milliseconds: 20, rounds: 5 });
  for (const [i, { kind, plan }] of plans.entries()) {
    const milliseconds = (times.get(kind) ?? NaN) * plan.dispatches.length * 1e3;
    const finite = logits[i].every(Number.isFinite);
    const line = { kind: `decode ${shape.name}`, name: kind, dispatches: plan.dispatches.length, milliseconds, finite };
    results.push({ ...line, againstQuarot: relative(logits[i], logits[1]) });
    console.log(JSON.stringify(results.at(-1)));
  }
  for (const { kind, plan } of plans.filter(({ kind }) => ['awq', 'quarot', 'smoothrot-a8-kv8'].includes(kind))) {
    plan.begin(Uint32Array.of(11), Uint32Array.of(512), [{ temperature: 0 }]);
    gpu.startProfile();
    for (let i = 0; i < 3; i++) plan.run();
    for (const t of (await gpu.stopProfile()).slice(0, 10))
      console.log(`    ${kind} ${t.name.padEnd(52)} ${((t.seconds / t.calls) * 1e6).toFixed(2)} us x ${t.calls / 3}`);
  }
}

// A software GPU is for checking that this runs.
const small = capabilities.software;
const sections: Readonly<Record<string, () => Promise<void>>> = {
  integer: () => (small ? integer(128, 1024, 512) : integer(2048, 14336, 4096)),
  hadamard: async () => {
    const count = small ? 96 : 16384;
    const sweep = values.sweep ? { aheads: [1, 4, 8, 16] } : {};
    for (const channels of [14336, 12288, 10240, 6144, 5120, 4096]) await hadamard(count, channels, sweep);
    await hadamard(count / 8, 14336, sweep);
    for (const channels of [11008, 13824, 9728, 17408]) await largeBase(count / 4, channels);
  },
  decode,
  slices: async () => {
    await slices(14336, 1);
    await slices(11008, 1);
    await slices(4096, 128);
  },
  row: async () => {
    await rows(14336, 1);
    await rows(4096, 128);
  },
  exact: async () => {
    if (capabilities.subgroupMatrices.length > 0) await exact(2048, 4096, 14336);
  },
};
for (const [name, run] of Object.entries(sections)) if (wants(name)) await run();
writeResult('webgpu-smoothrot', { gpu: backend.info.description, copyBytesPerSecond: bandwidth, results });
await backend.dispose();
