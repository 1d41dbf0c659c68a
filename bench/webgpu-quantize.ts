// `gyre quantize --device webgpu` through the library: the bundled model, Qwen3-0.6B's shapes, one Llama-3.1-8B-shaped block.
// Run: npx tsx bench/webgpu-quantize.ts [--only bundled,qwen,llama,kernels] [--device webgpu|cpu] [--tokens FILE] [--profile]
//
// bundled: the whole job, calibration text included; then KL(original ‖ quantized) on the project's prose, once more with
// the tokens stored in FILE (made if missing), so that another device can quantize with the same ones and be compared.
// qwen, llama: random weights and random tokens, as many sequences as the command takes by itself; the block of the latter is timed twice, the first time with
// the compilation of kernels. --profile runs each once more with every dispatch timed on the GPU.
import { mkdtempSync, readdirSync, readFileSync, existsSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import path from 'node:path';
import { parseArgs } from 'node:util';
import { openBackend, type BackendName } from '../src/backends/registry.js';
import { openWebGpuBackend } from '../src/backends/webgpu/index.js';
import { GpuDevice } from '../src/backends/webgpu/device.js';
import type { KernelTime } from '../src/backends/webgpu/profile.js';
import { writeCalibrationText } from '../src/calibration-text.node.js';
import { createRng } from '../src/core/rng.js';
import { hostTensor } from '../src/core/tensor.js';
import { evaluateText, tokenizeTexts } from '../src/evaluation/index.js';
import { folderFiles } from '../src/formats/source.node.js';
import { loadDecoder, openModel } from '../src/models/load.js';
import {
  CALIBRATION_SEQUENCES,
  LARGE_CALIBRATION_SEQUENCES,
  type CalibrationTokens,
} from '../src/quant/calibration/tokens.js';
import { quantizeCheckpoint, type QuantizeReport } from '../src/quantize.node.js';
import { loadTokenizer } from '../src/tokenizer/index.js';
import { makeRandomCheckpoint, SHAPES, type ShapeName } from './support/random-checkpoint.js';
import { round, writeResult } from './support/results.js';

const { values: options } = parseArgs({
  options: {
    only: { type: 'string', default: 'kernels,bundled,qwen,llama' },
    device: { type: 'string', default: 'webgpu' },
    tokens: { type: 'string' },
    model: { type: 'string', default: 'models/gyre-14m' },
    profile: { type: 'boolean', default: false },
    name: { type: 'string', default: 'webgpu-quantize' },
  },
});
const device = options.device as BackendName;
const wanted = new Set(options.only.split(','));
const scratch = mkdtempSync(path.join(tmpdir(), 'gyre-bench-'));
const result: Record<string, unknown> = { device };

/** One quantization, timed from outside. */
interface Run {
  readonly seconds: number;
  readonly breakdown: QuantizeReport['breakdown'];
  /** Seconds per linear group of the first block. */
  readonly firstBlock: Readonly<Record<string, number>>;
}

async function quantize(model: string, out: string, calibrationTokens?: CalibrationTokens): Promise<Run> {
  const start = performance.now();
  const report = await quantizeCheckpoint({ model, out, device, calibrationTokens });
  const seconds = (performance.now() - start) / 1000;
  const firstBlock = Object.fromEntries(
    report.groups.filter((group) => group.layer === 0).map((group) => [group.group, round(group.seconds)]),
  );
  return {
    seconds: round(seconds),
    breakdown: Object.fromEntries(
      Object.entries(report.breakdown).map(([key, value]) => [key, round(value)]),
    ) as QuantizeReport['breakdown'],
    firstBlock,
  };
}

/** Runs `work` with every dispatch of the devices it opens timed; slower, since each gets a pass of its own. */
async function profiled(work: () => Promise<unknown>): Promise<KernelTime[]> {
  const open = GpuDevice.open.bind(GpuDevice);
  const times = new Map<string, { calls: number; seconds: number }>();
  GpuDevice.open = async (gpuOptions) => {
    const gpu = await open(gpuOptions);
    const dispose = gpu.dispose.bind(gpu);
    gpu.startProfile();
    gpu.dispose = async () => {
      for (const { name, calls, seconds } of await gpu.stopProfile()) {
        const sum = times.get(name) ?? { calls: 0, seconds: 0 };
        times.set(name, { calls: sum.calls + calls, seconds: sum.seconds + seconds });
      }
      await dispose();
    };
    return gpu;
  };
  try {
    await work();
  } finally {
    GpuDevice.open = open;
  }
  return [...times].map(([name, sum]) => ({ name, ...sum })).sort((a, b) => b.seconds - a.seconds);
}

async function maybeProfile(model: string, out: string, tokens?: CalibrationTokens): Promise<object> {
  if (!options.profile || device !== 'webgpu') return {};
  const times = await profiled(() => quantizeCheckpoint({ model, out, device, calibrationTokens: tokens }));
  const total = times.reduce((sum, { seconds }) => sum + seconds, 0);
  console.log(`  on the GPU: ${total.toFixed(3)} s`);
  for (const { name, calls, seconds } of times.slice(0, 16))
    console.log(
      `    ${name.padEnd(40)} ${String(calls).padStart(7)} calls ${(seconds * 1000).toFixed(1).padStart(10)} ms`,
    );
  return {
    gpuSeconds: round(total),
    kernels: times.slice(0, 30).map((time) => ({ ...time, seconds: round(time.seconds) })),
  };
}

function show(what: string, run: Run): void {
  console.log(`${what}: ${run.seconds} s`, JSON.stringify(run.breakdown), JSON.stringify(run.firstBlock));
}

function randomTokens(
  vocabulary: number,
  sequences: number = CALIBRATION_SEQUENCES.webgpu,
  length = 512,
): CalibrationTokens {
  const rng = createRng(1);
  const ids = Int32Array.from({ length: sequences * length }, () => rng.int(0, vocabulary));
  return { ids, sequences, length, description: 'random tokens' };
}

/** KL(original ‖ quantized) per token on the project's prose. */
async function divergence(original: string, quantized: string): Promise<{ kl: number; perplexity: number }> {
  const backend = await openBackend(device);
  try {
    const files = await folderFiles(original);
    const tokenizer = await loadTokenizer(files);
    const folder = path.join(original, 'eval/prose');
    const texts = readdirSync(folder)
      .filter((name) => name.endsWith('.txt'))
      .map((name) => readFileSync(path.join(folder, name), 'utf8'));
    const sources = [await openModel(files), await openModel(await folderFiles(quantized))];
    const [reference, decoder] = [await loadDecoder(backend, sources[0]), await loadDecoder(backend, sources[1])];
    for (const source of sources) await source.checkpoint.close();
    const { kl, perplexity } = await evaluateText(decoder, tokenizeTexts(tokenizer, texts), {
      reference,
      bosTokenId: tokenizer.bosTokenId,
    });
    return { kl: kl ?? NaN, perplexity };
  } finally {
    await backend.dispose();
  }
}

async function storedTokens(model: string): Promise<CalibrationTokens> {
  const file = options.tokens;
  if (file && existsSync(file)) {
    const { ids, ...rest } = JSON.parse(readFileSync(file, 'utf8')) as Omit<CalibrationTokens, 'ids'> & {
      ids: number[];
    };
    return { ...rest, ids: Int32Array.from(ids) };
  }
  const files = await folderFiles(model);
  const source = await openModel(files);
  const written = await writeCalibrationText(source, await loadTokenizer(files), {
    sequences: CALIBRATION_SEQUENCES.webgpu,
    length: 512,
    seed: 0,
    threads: 4,
    device,
  });
  await source.checkpoint.close();
  if (file) writeFileSync(file, JSON.stringify({ ...written, ids: [...written.ids] }));
  return written;
}

async function bundled(): Promise<void> {
  const cold = await quantize(options.model, path.join(scratch, 'bundled-1'));
  show('bundled model, everything', cold);
  const tokens = await storedTokens(options.model);
  const out = path.join(scratch, 'bundled-2');
  const given = await quantize(options.model, out, tokens);
  show('bundled model, tokens given', given);
  const quality = await divergence(options.model, out);
  console.log(`  KL ${quality.kl.toFixed(6)}, perplexity ${quality.perplexity.toFixed(3)}`);
  const profile = await maybeProfile(options.model, path.join(scratch, 'bundled-3'), tokens);
  result.bundled = { everything: cold, tokensGiven: given, ...quality, ...profile };
}

async function qwen(): Promise<void> {
  const model = path.join(scratch, 'qwen3-0.6b');
  await makeRandomCheckpoint(model, 'qwen3-0.6b');
  const tokens = randomTokens(4096);
  const run = await quantize(model, path.join(scratch, 'qwen-out'), tokens);
  show('Qwen3-0.6B shapes', run);
  result.qwen = { ...run };
  rmSync(path.join(scratch, 'qwen-out'), { recursive: true });
  if (options.profile) {
    // Two blocks are enough to see the kernels' shares.
    const short = path.join(scratch, 'qwen-2');
    await makeRandomCheckpoint(short, 'qwen3-0.6b', 2);
    result.qwen = { ...run, twoBlocks: await maybeProfile(short, path.join(scratch, 'qwen-2-out'), tokens) };
  }
}

/** Times one block, and two: the difference is a block without what a run does once. */
async function llama(): Promise<void> {
  const name: ShapeName = 'llama-3.1-8b';
  const tokens = randomTokens(4096, LARGE_CALIBRATION_SEQUENCES);
  const runs: Run[] = [];
  const record = (more: object = {}): void => {
    result.llama = { runs, ...more };
    // After each run: what follows may be cut short.
    writeResult(options.name, result);
  };
  for (const layers of [1, 2]) {
    const model = path.join(scratch, `llama-${layers}`);
    await makeRandomCheckpoint(model, name, layers);
    const run = await quantize(model, path.join(scratch, `llama-${layers}-out`), tokens);
    show(`${layers} Llama-3.1-8B-shaped block${layers > 1 ? 's' : ''}`, run);
    runs.push(run);
    record();
    rmSync(path.join(scratch, `llama-${layers}-out`), { recursive: true });
  }
  const perBlock = runs[1].seconds - runs[0].seconds;
  const projected = runs[0].seconds + (SHAPES[name].layers - 1) * perBlock;
  console.log(
    `  ${perBlock.toFixed(2)} s per further block, the model projected at ${(projected / 60).toFixed(1)} min`,
  );
  const whole = { perBlock: round(perBlock), projectedMinutes: round(projected / 60) };
  record(whole);
  const profile = await maybeProfile(path.join(scratch, 'llama-1'), path.join(scratch, 'llama-3-out'), tokens);
  record({ ...whole, ...profile });
}

/** The large kernels alone, at a Llama-3.1-8B block's shapes. */
async function kernels(): Promise<void> {
  const backend = await openWebGpuBackend();
  const { gpu } = backend;
  console.log(backend.info.description);
  const rng = createRng(1);
  const table = Float32Array.from({ length: 65536 }, () => rng.normal());
  const random = async (rows: number, cols: number) => {
    const data = new Float32Array(rows * cols);
    for (let i = 0; i < data.length; i++) data[i] = table[(i * 40503 + (i >>> 16) * 977) & 65535];
    return backend.upload(hostTensor('f32', [rows, cols], data));
  };
  const rows: Record<string, unknown>[] = [];
  const time = async (what: string, operations: number, work: () => Promise<unknown>): Promise<void> => {
    await work();
    await gpu.sync();
    const seconds: number[] = [];
    for (let i = 0; i < 3; i++) {
      const start = performance.now();
      await work();
      await gpu.sync();
      seconds.push((performance.now() - start) / 1000);
    }
    const best = Math.min(...seconds);
    rows.push({ what, milliseconds: round(best * 1000), teraflops: round(operations / best / 1e12) });
    console.log(
      `${what.padEnd(48)} ${(best * 1000).toFixed(2).padStart(9)} ms ${(operations / best / 1e12).toFixed(2).padStart(7)} TFLOP/s`,
    );
  };
  const x = await random(4096, 4096);
  const w = await random(4096, 14336);
  await time('XᵀX 4096 tokens → 4096²', 2 * 4096 ** 3, async () =>
    backend.free(await backend.matmul(x, x, { transposeA: true })),
  );
  await time('4096² · [4096, 14336]', 2 * 4096 ** 2 * 14336, async () => backend.free(await backend.matmul(x, w)));
  const sample = await random(4096, 512);
  await time('4096² · [4096, 512]', 2 * 4096 ** 2 * 512, async () => backend.free(await backend.matmul(x, sample)));
  const gram = await backend.matmul(x, x, { transposeA: true });
  await time('gptqFactor 4096 (double-single)', (2 * 4096 ** 3) / 3, async () =>
    backend.free(await backend.gptqFactor(gram, 0.01)),
  );
  await time('solveSymmetric 4096, 4096 rows (double-single)', (1 / 3 + 1 / 3 + 2) * 4096 ** 3, async () =>
    backend.free(await backend.solveSymmetric(gram, x, 0.01)),
  );
  const factor = await backend.gptqFactor(gram, 0.01);
  const grid = { bits: 4, groupSize: 128 } as const;
  await time('gptq 4096 × 14336', 4096 ** 2 * 14336, async () =>
    backend.free((await backend.gptq(w, factor, grid)).values),
  );
  const rounded = await backend.roundToNearest(w, grid);
  await time('descend 4096 × 14336, one sweep', 3 * 4096 ** 2 * 14336, async () =>
    backend.free((await backend.descend(w, rounded, gram, grid, 1)).values),
  );
  await time('searchClip 4096 × 14336, 10 ratios', 10 * 2 * 128 * 4096 * 14336, () =>
    Promise.resolve(
      backend.searchClip(
        w,
        gram,
        grid,
        Array.from({ length: 10 }, (_, i) => 1 - i / 25),
      ),
    ),
  );
  await backend.dispose();
  result.kernels = rows;
}

const parts: Readonly<Record<string, () => Promise<void>>> = { kernels, bundled, qwen, llama };
try {
  for (const [name, part] of Object.entries(parts)) {
    if (!wanted.has(name)) continue;
    await part();
    // After each part: a later one that fails must not lose the earlier figures.
    writeResult(options.name, result);
  }
} finally {
  rmSync(scratch, { recursive: true, force: true });
}
