// Where the seconds of `gyre quantize --device webgpu` go, on the bundled model: opening GPUs, compiling kernels (until each was there, several
// at a time), waiting for results, by phase of the run; then the same with every dispatch timed on the GPU.
// Run: npx tsx bench/quantize-phases.ts [--model DIR] [--method paroquant] [--samples 256] [--length 512] [--rounds 2] [--kernels] [--epochs N] [--host null] [--profile]
//
// --host null leaves the GPU out, as in bench/eval-throughput.ts: what is read back is made up, so with few --samples (48 fit its 512 MB).
// --profile tells the host's functions.
import { mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import path from 'node:path';
import { parseArgs } from 'node:util';
import { GpuDevice } from '../src/backends/webgpu/device.js';
import type { KernelTime } from '../src/backends/webgpu/profile.js';
import { quantizeCheckpoint } from '../src/quantize.node.js';
import { EMPTY_BACKENDS, emptyGpu, feigning, ones, sparing } from './support/empty-gpu.js';
import { profileHost } from './support/host-profile.js';
import { round, writeResult } from './support/results.js';

const { values: options } = parseArgs({
  options: {
    model: { type: 'string', default: 'models/gyre-14m' },
    method: { type: 'string', default: 'paroquant' },
    samples: { type: 'string' },
    length: { type: 'string' },
    rounds: { type: 'string', default: '2' },
    kernels: { type: 'boolean', default: false },
    epochs: { type: 'string' },
    name: { type: 'string', default: 'quantize-phases' },
    host: { type: 'string' },
    profile: { type: 'boolean', default: false },
  },
});

const empty = EMPTY_BACKENDS.find((name) => name === options.host);
if (options.host !== empty) throw new Error(`--host is ${EMPTY_BACKENDS.join(' or ')}`);
const entry = empty && (await emptyGpu(empty));

/** Whether the calibration text is being written. */
let writing = true;

/** What a run can go on with where nothing is computed: tokens while text is written, then finite numbers. */
function feign(bytes: ArrayBuffer): void {
  if (writing) {
    new Uint32Array(bytes).fill(7);
    return;
  }
  // What is large is codes of 4 bits in bytes.
  if (bytes.byteLength >= 2 ** 16) new Uint8Array(bytes).fill(7);
  else ones(bytes);
  // One word says where a factorization failed: nowhere. Four may be the probe of how sums and products are rounded (kernels/double.ts).
  if (bytes.byteLength === 4) new Uint32Array(bytes).fill(0);
  if (bytes.byteLength !== 16) return;
  const [a, b] = [Math.fround(4 / 3), Math.fround(1 / 700)];
  const [product, sum] = [Math.fround(a * b), Math.fround(a + b)];
  new Float32Array(bytes).set([product, a * b - product, sum, a + b - sum]);
}

/** What devices did, in seconds of the host and counts. */
class Trace {
  readonly opened = new Sum();
  readonly compiled = new Sum();
  readonly submitted = new Sum();
  /** Waiting for results included. */
  readonly read = new Sum();

  /** The sums since an earlier {@link values}. */
  values(): Record<string, { calls: number; seconds: number }> {
    return Object.fromEntries(
      (['opened', 'compiled', 'submitted', 'read'] as const).map((key) => [key, { ...this[key] }]),
    );
  }
}

class Sum {
  calls = 0;
  seconds = 0;

  add(begun: number): void {
    this.calls++;
    this.seconds += (performance.now() - begun) / 1000;
  }
}

/** Runs `work` with the devices that it opens traced, and their kernels timed if asked for. */
async function traced<T>(
  kernels: boolean,
  work: (trace: Trace) => Promise<T>,
): Promise<{ value: T; times: KernelTime[] }> {
  const trace = new Trace();
  const open = GpuDevice.open.bind(GpuDevice);
  const times: KernelTime[] = [];
  GpuDevice.open = async (gpuOptions) => {
    const begun = performance.now();
    const gpu = await open({ ...gpuOptions, ...(entry && { entry }) });
    trace.opened.add(begun);
    if (empty) {
      sparing(gpu, 'the keys of');
      feigning(gpu, feign);
    }
    watch(gpu, trace);
    if (!kernels) return gpu;
    gpu.startProfile();
    const dispose = gpu.dispose.bind(gpu);
    gpu.dispose = async () => {
      times.push(...(await gpu.stopProfile()));
      await dispose();
    };
    return gpu;
  };
  try {
    return { value: await work(trace), times };
  } finally {
    GpuDevice.open = open;
  }
}

function watch(gpu: GpuDevice, trace: Trace): void {
  const { device } = gpu;
  const [compile, flush, read] = [
    device.createComputePipelineAsync.bind(device),
    gpu.flush.bind(gpu),
    gpu.read.bind(gpu),
  ];
  device.createComputePipelineAsync = async (descriptor) => {
    const begun = performance.now();
    const pipeline = await compile(descriptor);
    trace.compiled.add(begun);
    return pipeline;
  };
  gpu.flush = () => {
    const begun = performance.now();
    flush();
    trace.submitted.add(begun);
  };
  gpu.read = async (...args) => {
    const begun = performance.now();
    const bytes = await read(...args);
    trace.read.add(begun);
    return bytes;
  };
}

async function run(kernels: boolean) {
  const out = mkdtempSync(path.join(tmpdir(), 'gyre-phases-'));
  try {
    const { value, times } = await traced(kernels, async (trace) => {
      const begun = performance.now();
      let afterText: ReturnType<Trace['values']> | undefined;
      let [textBegan, textEnded] = [0, 0];
      writing = true;
      const report = await quantizeCheckpoint({
        model: options.model,
        out: path.join(out, 'q'),
        device: 'webgpu',
        method: options.method,
        ...(options.samples && { calibSamples: Number(options.samples) }),
        ...(options.length && { seqLen: Number(options.length) }),
        ...(options.epochs && { block: { epochs: Number(options.epochs) } }),
        onProgress: ({ stage }) => {
          if (stage === 'quantize') {
            writing = false;
            textEnded ||= performance.now();
            afterText ??= trace.values();
          } else textBegan ||= performance.now();
        },
      });
      const ended = performance.now();
      const firstBlock = report.groups.filter(({ layer }) => layer === 0).map((g) => [g.group, round(g.seconds)]);
      return {
        seconds: round((ended - begun) / 1000),
        beforeText: round((textBegan - begun) / 1000),
        untilFirstBlock: round((textEnded - begun) / 1000),
        breakdown: Object.fromEntries(Object.entries(report.breakdown).map(([key, s]) => [key, round(s)])),
        firstBlock: Object.fromEntries(firstBlock) as Record<string, number>,
        textTrace: afterText,
        trace: trace.values(),
      };
    });
    const gpuSeconds = times.reduce((sum, { seconds }) => sum + seconds, 0);
    return { ...value, ...(kernels && { gpuSeconds: round(gpuSeconds), kernels: top(times) }) };
  } finally {
    rmSync(out, { recursive: true, force: true });
  }
}

/** The kernels that take longest. */
function top(times: readonly KernelTime[]): { name: string; calls: number; milliseconds: number }[] {
  return [...times]
    .sort((a, b) => b.seconds - a.seconds)
    .slice(0, 40)
    .map(({ name, calls, seconds }) => ({ name, calls, milliseconds: round(seconds * 1000) }));
}

const runs = [];
for (let i = 0; i < Number(options.rounds); i++) {
  runs.push(await run(false));
  console.log(JSON.stringify(runs.at(-1)));
}
if (options.profile) {
  const functions = await profileHost(() => run(false));
  const total = functions.reduce((sum, { milliseconds }) => sum + milliseconds, 0);
  console.log(`${round(total / 1000)} s of the main thread under the profiler`);
  for (const { where, milliseconds } of functions.slice(0, 60))
    console.log(`  ${milliseconds.toFixed(0).padStart(6)} ms ${where}`);
}
const profile = options.kernels ? await run(true) : undefined;
if (profile) {
  const { kernels = [], ...rest } = profile;
  console.log('with every dispatch timed:', JSON.stringify(rest));
  for (const { name, calls, milliseconds } of kernels)
    console.log(`  ${name.padEnd(48)} ${String(calls).padStart(7)} ${milliseconds.toFixed(1).padStart(9)} ms`);
}
if (!empty) writeResult(options.name, { method: options.method, runs, ...(profile && { profile }) });
