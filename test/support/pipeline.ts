// Runs the quantization pipeline on a fixture model with random tokens, into a temporary folder.
import { mkdtemp, rm } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import path from 'node:path';
import { createRng } from '../../src/core/rng.js';
import { quantizationConfigJson } from '../../src/formats/quantization-config.js';
import { RunFolder } from '../../src/formats/run-folder.node.js';
import { folderFiles } from '../../src/formats/source.node.js';
import { loadDecoder, openModel, type ModelSource } from '../../src/models/load.js';
import type { Backend } from '../../src/ops/backend.js';
import {
  measureSensitivity,
  type BlockSensitivity,
  type SensitivityOptions,
} from '../../src/quant/objectives/sensitivity.js';
import { prepareModel } from '../../src/quant/prepare.js';
import { quantizeModel } from '../../src/quant/pipeline.js';
import { planQuantization } from '../../src/quant/plan.js';
import { findRecipe } from '../../src/quant/recipes/index.js';
import { blockShard, REST_SHARD } from '../../src/quant/sink.js';
import { BLOCK_DEFAULTS, type QuantizeSettings } from '../../src/quant/types.js';
import { quantizationOf } from '../../src/quantize.node.js';

export const FIXTURES = path.join(import.meta.dirname, '../fixtures/parity');

/** A temporary folder, removed by the returned function. */
export async function temporaryFolder(): Promise<{ folder: string; remove: () => Promise<void> }> {
  const folder = await mkdtemp(path.join(tmpdir(), 'gyre-test-'));
  return { folder, remove: () => rm(folder, { recursive: true, force: true }) };
}

/** Random token ids [sequences, length]. */
export function randomTokens(source: ModelSource, sequences: number, length: number, seed = 1): Int32Array {
  const rng = createRng(seed);
  return Int32Array.from({ length: sequences * length }, () => rng.int(0, source.config.vocabSize));
}

export const SETTINGS: QuantizeSettings = {
  method: 'paroquant',
  bits: 4,
  groupSize: 32,
  krot: 4,
  scales: true,
  share: true,
  rounding: undefined,
  steps: 20,
  seed: 0,
  block: { ...BLOCK_DEFAULTS, epochs: 1, batch: 4 },
};

/** Quantizes a fixture into `out` (made by the run) and returns the source and the report. */
export async function quantizeFixture(
  backend: Backend,
  fixture: string,
  out: string,
  settings: Partial<QuantizeSettings>,
  options: { sequences?: number; length?: number; resume?: boolean; signal?: AbortSignal; stopAfter?: number } = {},
): Promise<ModelSource> {
  const source = await openModel(await folderFiles(path.join(FIXTURES, fixture)));
  const all = { ...SETTINGS, ...settings };
  const recipe = findRecipe(all.method);
  const shape = { sequences: options.sequences ?? 8, length: options.length ?? 32 };
  const plan = planQuantization(source.config, all, recipe, shape, 0);
  const order = [...Array.from({ length: source.config.layers }, (_, i) => blockShard(i)), REST_SHARD];
  let folder: RunFolder | undefined;
  try {
    folder = await RunFolder.open(out, JSON.stringify(all), order, { resume: options.resume ?? false });
    const calibration = { ids: randomTokens(source, shape.sequences, shape.length), ...shape, description: 'random' };
    const prepared = await prepareModel({ backend, source, settings: all, calibration });
    const quantization = quantizationOf(prepared.source, all, recipe, plan);
    const controller = new AbortController();
    await quantizeModel({
      backend,
      source: prepared.source,
      recipe,
      settings: all,
      plan,
      quantization,
      calibration: recipe.needs === 'nothing' ? undefined : calibration,
      sink: folder,
      signal: controller.signal,
      onProgress: (event) => {
        if (options.stopAfter !== undefined && event.done >= options.stopAfter) controller.abort();
      },
    });
    await folder.finish({
      'config.json': JSON.stringify({
        ...prepared.source.rawConfig,
        quantization_config: quantizationConfigJson(quantization),
      }),
      'gyre.json': JSON.stringify({ fingerprint: JSON.stringify(all) }),
    });
  } finally {
    await folder?.close();
    await source.checkpoint.close();
  }
  return source;
}

/** Logits of a model folder on given tokens. */
export async function logitsOf(
  backend: Backend,
  folder: string,
  ids: Int32Array,
  batch: number,
): Promise<Float32Array> {
  const source = await openModel(await folderFiles(folder));
  const decoder = await loadDecoder(backend, source);
  const logits = await backend.download(await decoder.logits(await decoder.hidden(ids, { batch })));
  decoder.release();
  await source.checkpoint.close();
  return logits;
}

/** ‖a − b‖ / ‖b‖. */
export function relativeError(a: Float32Array, b: Float32Array): number {
  let [difference, norm] = [0, 0];
  for (let i = 0; i < a.length; i++) {
    difference += (a[i] - b[i]) ** 2;
    norm += b[i] ** 2;
  }
  return Math.sqrt(difference / norm);
}

/** What {@link measureSensitivity} measured, by block. */
export async function sensitivityOf(
  backend: Backend,
  source: ModelSource,
  ids: Int32Array,
  options: Omit<SensitivityOptions, 'onMeasured'>,
): Promise<BlockSensitivity[]> {
  const found: BlockSensitivity[] = [];
  await measureSensitivity(backend, source, ids, {
    ...options,
    onMeasured: (layer, sensitivity) => {
      found[layer] = sensitivity;
    },
  });
  return found;
}
