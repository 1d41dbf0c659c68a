// What lies in the output folder beside the shards, and what must be known of it before: fingerprint, room on the disk.
import { createHash } from 'node:crypto';
import { readdir, stat } from 'node:fs/promises';
import path from 'node:path';
import { z } from 'zod';
import type { BackendName } from '../backends/registry.js';
import { ensure } from '../core/errors.js';
import { bytesOf } from '../core/tensor.js';
import { ActivationFiles } from '../formats/activations.node.js';
import { freeBytes } from '../formats/atomic.node.js';
import { quantizationConfigJson, type QuantizationConfig } from '../formats/quantization-config.js';
import type { RunFolder } from '../formats/run-folder.node.js';
import { partialFolder } from '../formats/run-folder.node.js';
import { SafetensorsFile } from '../formats/safetensors.js';
import type { ModelFiles } from '../formats/source.js';
import { modelFingerprint, summarizeModel } from '../evaluation/index.js';
import { GROUP_NAMES } from '../models/block.js';
import { groupModules, openModel, type ModelSource } from '../models/load.js';
import type { CalibrationText, CalibrationTokens } from '../quant/calibration/tokens.js';
import { TRAINING_KEY } from '../quant/block-pipeline.js';
import type { QuantizePlan } from '../quant/plan.js';
import {
  RECORD_KIND,
  RECORD_VERSION,
  stageCurveSchema,
  type BlockTraining,
  type QuantizationRecord,
} from '../quant/results.js';
import { blockShard } from '../quant/sink.js';
import type { QuantizeSettings } from '../quant/types.js';
import { VERSION } from '../version.js';
import type { QuantizeReport } from './options.js';
import { megabytes } from './plan-text.js';

/** Files copied beside the weights when the model has them. */
const COPIED_FILES = [
  'generation_config.json',
  'tokenizer.json',
  'tokenizer_config.json',
  'special_tokens_map.json',
  'tokenizer.model',
  'vocab.json',
  'merges.txt',
  'added_tokens.json',
  'chat_template.jinja',
  'chat_template.json',
];

/** Bytes of everything that is copied as it is. */
export function otherBytes(source: ModelSource): number {
  const linears = new Set(
    Array.from({ length: source.config.layers }, (_, layer) =>
      GROUP_NAMES.flatMap((g) => groupModules(layer, g).map((m) => `${m}.weight`)),
    ).flat(),
  );
  let bytes = 0;
  for (const name of source.checkpoint.names()) {
    const info = source.checkpoint.info(name);
    if (!linears.has(name)) bytes += info.end - info.begin;
  }
  return bytes;
}

/**
 * Two runs with equal fingerprints make equal bytes: the model (config, every tensor's place and first row; hashing all of
 * it would take as long as reading it twice), the settings, the device, the calibration, gyre itself. Devices sum in other
 * orders, so that blocks of one must not be continued on another.
 */
export async function fingerprintOf(
  source: ModelSource,
  settings: QuantizeSettings,
  device: BackendName,
  calibration: { shape: object; texts: readonly CalibrationText[]; tokens: CalibrationTokens | undefined } | undefined,
): Promise<string> {
  const hash = createHash('sha256');
  const digest = (data: string | Uint8Array): string => createHash('sha256').update(data).digest('hex');
  hash.update(
    JSON.stringify({ version: VERSION, settings, device, shape: calibration?.shape, config: source.rawConfig }),
  );
  for (const name of [...source.checkpoint.names()].sort()) {
    const { dtype, shape: dims, begin, end } = source.checkpoint.info(name);
    hash.update(JSON.stringify([name, dtype, dims, begin, end]));
    const sample = await (dims.length === 2
      ? source.checkpoint.readRows(name, 0, Math.min(1, dims[0]))
      : source.checkpoint.read(name));
    hash.update(bytesOf(sample.data));
  }
  for (const { name, text } of calibration?.texts ?? []) hash.update(JSON.stringify([name, digest(text)]));
  if (calibration?.tokens) hash.update(digest(bytesOf(calibration.tokens.ids)));
  return hash.digest('hex');
}

/** @throws `disk-full` unless there is room for the result and `temporary` bytes of what is kept until it is whole. */
export async function checkDisk(out: string, plan: QuantizePlan, temporary: number): Promise<void> {
  const free = await freeBytes(out);
  const needed = Math.max(0, plan.outputBytes * 1.05 + temporary - (await bytesIn(partialFolder(out))));
  ensure(
    free >= needed,
    'disk-full',
    () => `the result needs about ${megabytes(needed)} more, ${megabytes(free)} are free where ${out} would be`,
    'free some space or choose another --out',
  );
}

/** Bytes of a folder's finished shards. */
async function bytesIn(folder: string): Promise<number> {
  let bytes = 0;
  for (const name of await readdir(folder).catch(() => [])) {
    if (name.endsWith('.safetensors')) bytes += (await stat(path.join(folder, name))).size;
  }
  return bytes;
}

/** Residual streams on disk when they would take more than `budget` bytes; undefined: keep them in memory. */
export function activationFiles(
  folder: RunFolder,
  source: ModelSource,
  shape: { sequences: number; length: number },
  budget: number,
): ActivationFiles | undefined {
  const elements = shape.length * source.config.hiddenSize;
  if (2 * shape.sequences * elements * 4 <= budget) return undefined;
  return new ActivationFiles(folder.temporary('activations'), elements);
}

/** The losses that finished shards carry, those of an interrupted run included. */
export async function trainingOf(folder: RunFolder, source: ModelSource): Promise<BlockTraining[]> {
  const blocks: BlockTraining[] = [];
  for (let layer = 0; layer < source.config.layers; layer++) {
    const file = await SafetensorsFile.open(await folder.open(blockShard(layer)).open('model.safetensors'));
    blocks.push({ layer, stages: z.array(stageCurveSchema).parse(JSON.parse(file.metadata[TRAINING_KEY] ?? '[]')) });
    await file.close();
  }
  return blocks;
}

export async function resultFiles(
  source: ModelSource,
  quantization: QuantizationConfig,
  run: {
    fingerprint: string;
    settings: QuantizeSettings;
    calibration: string;
    notes: readonly string[];
    training?: readonly BlockTraining[];
    smoothing?: QuantizeReport['smoothing'];
  },
): Promise<Record<string, string>> {
  const { training, ...record } = run;
  const result: Record<string, string> = {
    'config.json': `${JSON.stringify({ ...source.rawConfig, quantization_config: quantizationConfigJson(quantization) }, null, 2)}\n`,
    'gyre.json': `${JSON.stringify({ ...record, gyre: VERSION, model: source.name }, null, 2)}\n`,
  };
  if (training)
    result['training.json'] =
      `${JSON.stringify({ gyre: VERSION, model: source.name, settings: run.settings, blocks: training }, null, 2)}\n`;
  const present = new Set(await source.files.list());
  for (const name of COPIED_FILES) if (present.has(name)) result[name] = await readRaw(source.files, name);
  return result;
}

async function readRaw(files: ModelFiles, name: string): Promise<string> {
  return files.readText(name);
}

/** The record of a run, of the model as it was made and the one it was made from. */
export async function describeResult(
  source: ModelSource,
  files: ModelFiles,
  what: Pick<QuantizationRecord, 'method' | 'settings' | 'layout' | 'calibration' | 'notes' | 'groups' | 'training'>,
): Promise<QuantizationRecord> {
  const size = async (model: ModelSource) => {
    const { parameters, bytes, bitsPerWeight, linearBytes, linearBitsPerWeight } = summarizeModel(model);
    const fingerprint = await modelFingerprint(model);
    return { fingerprint, parameters, bytes, bitsPerWeight, linearBytes, linearBitsPerWeight };
  };
  const made = await openModel(files);
  try {
    return {
      kind: RECORD_KIND,
      schemaVersion: RECORD_VERSION,
      version: VERSION,
      ...what,
      model: await size(made),
      source: { ...(await size(source)), name: source.name, family: source.config.family },
    };
  } finally {
    await made.checkpoint.close();
  }
}
