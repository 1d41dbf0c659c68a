// The quantization pipeline on WebGPU against the CPU's, on a small random model: every recipe, end to end.
import path from 'node:path';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { createRng } from '../../src/core/rng.js';
import { folderFiles } from '../../src/formats/source.node.js';
import { Checkpoint } from '../../src/formats/safetensors.js';
import { quantizeCheckpoint, type QuantizeReport } from '../../src/quantize.node.js';
import { FIXTURES, temporaryFolder } from '../support/pipeline.js';
import { openTestWebGpu, webgpuMissing } from '../support/webgpu.js';

const MODEL = path.join(FIXTURES, 'qwen3');
const [SEQUENCES, LENGTH] = [2, 48];

/**
 * What may differ. Rounding errors flip codes that lie between two grid points: few of them in rtn and awq, and those that
 * follow from them in gptq. Learning amplifies flips step by step, so paroquant is held to the layer errors alone, their sum above all.
 */
const RECIPES = [
  { method: 'rtn', equalCodes: 0.999, error: 0 },
  { method: 'gptq', equalCodes: 0.98, error: 0.01 },
  { method: 'paroquant', equalCodes: 0, error: 0.05 },
] as const;

describe.skipIf(webgpuMissing)('quantization on WebGPU', () => {
  let temporary: Awaited<ReturnType<typeof temporaryFolder>>;
  beforeAll(async () => {
    temporary = await temporaryFolder();
    // Chooses the driver before the pipeline opens the backend by name.
    await (await openTestWebGpu()).dispose();
  });
  afterAll(() => temporary.remove());

  const rng = createRng(1);
  const ids = Int32Array.from({ length: SEQUENCES * LENGTH }, () => rng.int(0, 96));

  async function run(method: string, device: 'cpu' | 'webgpu'): Promise<{ report: QuantizeReport; codes: Int32Array }> {
    const out = path.join(temporary.folder, `${method}-${device}`);
    const report = await quantizeCheckpoint({
      model: MODEL,
      out,
      device,
      method,
      groupSize: 32,
      krot: 2,
      steps: 4,
      calibrationTokens: { ids, sequences: SEQUENCES, length: LENGTH, description: 'random' },
    });
    const checkpoint = await Checkpoint.open(await folderFiles(out));
    const words: number[] = [];
    for (const name of [...checkpoint.names()].filter((n) => /layers\.0\..*q_proj\.qweight$/.test(n)))
      words.push(...((await checkpoint.read(name)).data as Int32Array));
    await checkpoint.close();
    return { report, codes: Int32Array.from(words) };
  }

  it.each(RECIPES)('$method', { timeout: 180_000 }, async ({ method, equalCodes, error }) => {
    const cpu = await run(method, 'cpu');
    const gpu = await run(method, 'webgpu');
    expect(gpu.codes.length).toBeGreaterThan(0);
    expect(gpu.codes.length).toBe(cpu.codes.length);
    let equal = 0;
    for (let i = 0; i < cpu.codes.length; i++)
      for (let shift = 0; shift < 32; shift += 4) if (((cpu.codes[i] ^ gpu.codes[i]) >>> shift) % 16 === 0) equal++;
    expect(equal / (8 * cpu.codes.length)).toBeGreaterThanOrEqual(equalCodes);
    expect(gpu.report.groups.map(({ group }) => group)).toEqual(cpu.report.groups.map(({ group }) => group));
    const errors = cpu.report.groups.flatMap(({ stats }, i) =>
      stats['error'] === undefined ? [] : [{ cpu: stats['error'], gpu: gpu.report.groups[i].stats['error'] }],
    );
    if (errors.length === 0) return;
    const sum = (side: 'cpu' | 'gpu'): number => errors.reduce((total, e) => total + e[side], 0);
    expect(Math.abs(sum('gpu') / sum('cpu') - 1)).toBeLessThan(error);
    // One small group learned along another path may end further off, in either direction.
    for (const e of errors) expect(Math.abs(e.gpu / e.cpu - 1)).toBeLessThan(3 * error);
  });
});
