// `gyre quantize` as a function: from a model's name to a finished checkpoint folder. Ties together the hub, the plan,
// calibration text (given or written by the model), the pipeline and the output folder.
import { createHash } from 'node:crypto';
import { readdir, readFile, stat } from 'node:fs/promises';
import { availableParallelism, freemem } from 'node:os';
import path from 'node:path';
import { openBackend, type BackendName } from './backends/registry.js';
import { GyreError, ensure } from './core/errors.js';
import { silent, type ProgressListener } from './core/progress.js';
import { createRng } from './core/rng.js';
import { bytesOf, hostTensor } from './core/tensor.js';
import { ActivationFiles } from './formats/activations.node.js';
import { freeBytes } from './formats/atomic.node.js';
import { resolveModel } from './formats/hub.node.js';
import { quantizationConfigJson, type QuantizationConfig } from './formats/quantization-config.js';
import { inspectOutput, partialFolder, RunFolder, TOKENS_FILE } from './formats/run-folder.node.js';
import { SafetensorsFile } from './formats/safetensors.js';
import { writeSafetensors } from './formats/safetensors-writer.node.js';
import { openFile } from './formats/source.node.js';
import { MAX_TEXT_BYTES, type ModelFiles } from './formats/source.js';
import { writeCalibrationText } from './calibration-text.node.js';
import { modelFingerprint, summarizeModel } from './evaluation/index.js';
import { GROUP_NAMES } from './models/block.js';
import type { ModelConfig } from './models/config.js';
import { onlineConfig } from './models/online.js';
import { checkTensors, groupModules, groupShape, openModel, type ModelSource } from './models/load.js';
import type { Backend, WeightBits } from './ops/backend.js';
import { requireGradients } from './ops/gradients.js';
import {
  calibrationSequences,
  documentsOf,
  sampleWindows,
  type CalibrationText,
  type CalibrationTokens,
} from './quant/calibration/tokens.js';
import { TRAINING_KEY } from './quant/block-pipeline.js';
import { groupRecord, quantizeModel } from './quant/pipeline.js';
import type { BlockReport, GroupReport, PipelineReport } from './quant/run.js';
import { planQuantization, type QuantizePlan } from './quant/plan.js';
import { prepareModel, type PreparedModel } from './quant/prepare.js';
import type { SmoothingRule } from './quant/objectives/smoothing.js';
import { rotationGroup } from './quant/recipes/paroquant.js';
import { findRecipe } from './quant/recipes/index.js';
import { RECORD_FILE, RECORD_KIND, RECORD_VERSION, type QuantizationRecord } from './quant/results.js';
import { blockShard, REST_SHARD } from './quant/sink.js';
import type { NarrowBits } from './quant/grids/activations.js';
import {
  isBlockRecipe,
  type BlockSettings,
  type QuantizeSettings,
  type Recipe,
  type Rounding,
  type SmoothedGroups,
  type StageCurve,
} from './quant/types.js';
import { loadTokenizer } from './tokenizer/index.js';
import { VERSION } from './version.js';

/** Options of {@link quantizeCheckpoint}; all but `model` and `out` have defaults. */
export interface QuantizeOptions {
  /** Folder, or hub id `owner/name`. */
  readonly model: string;
  readonly revision?: string;
  /** Hub access token; default HF_TOKEN or the stored one. */
  readonly token?: string;
  /** Folder to make. It appears whole, at the end. */
  readonly out: string;
  /** Recipe; default `lowbit` with 4-bit activations, otherwise `paroquant`. */
  readonly method?: string;
  /** Default 4 (8 with `smoothquant`). */
  readonly bits?: WeightBits;
  /** Input channels per group, -1 per channel; default 128, -1 with `smoothquant`, `quarot` and `smoothrot`. */
  readonly groupSize?: number;
  /** Rotations; default 8. */
  readonly krot?: number;
  readonly scales?: boolean;
  readonly share?: boolean;
  readonly rounding?: Rounding;
  /** Optimiser steps per transform; default 100. */
  readonly steps?: number;
  readonly seed?: number;
  /** Settings of recipes that train whole blocks; the rest default to the published ones. */
  readonly block?: Partial<BlockSettings>;
  /** Bytes of residual streams that such recipes may keep in memory; more goes to disk. Default half of what is free. */
  readonly activationBytes?: number;
  /** Bits of activations; default 16, or the recipe's own. */
  readonly actBits?: NarrowBits | 16;
  /** Share of the range that a grid of activations keeps, 0 … 1; default by bits, or the recipe's own. */
  readonly actClip?: number;
  /** Channels per grid of activations: 32, 64, 128, or −1 for one per token; default −1, or the recipe's own. */
  readonly actGroupSize?: number;
  /** Bits of keys and values; default 16, or the recipe's own; with a recipe that rounds them, as many as activations have. */
  readonly kvBits?: NarrowBits | 16;
  /** Fold Hadamard rotations into the model first; default as the recipe has it. */
  readonly rotate?: boolean;
  /** Where activation outliers are scaled into the weights; default as the recipe has it. */
  readonly smooth?: SmoothedGroups;
  /** Exponent of the smoothing scales, 0 … 1; searched block by block when undefined. */
  readonly alpha?: number;
  /** Calibration texts (.txt, .jsonl with "text"); without any, the model writes its own. */
  readonly calib?: readonly string[];
  /** Calibration sequences made before (by {@link writeCalibrationText}, say), instead of texts. */
  readonly calibrationTokens?: CalibrationTokens;
  /** Calibration sequences; default {@link calibrationSequences}. */
  readonly calibSamples?: number;
  /** Tokens per calibration sequence; default 512. */
  readonly seqLen?: number;
  /** Default: the machine's cores. */
  readonly threads?: number;
  readonly device?: BackendName;
  /** An open backend to run on, in place of one of `device` opened for the call; it stays open. */
  readonly backend?: Backend;
  /** Continue an interrupted run. */
  readonly resume?: boolean;
  /** Plan only. */
  readonly dryRun?: boolean;
  readonly signal?: AbortSignal;
  readonly onProgress?: ProgressListener;
  /** Called with the plan before anything is written. */
  readonly onPlan?: (plan: QuantizePlan & { readonly lines: readonly string[] }) => void;
}

/** What {@link quantizeCheckpoint} returns; also written to `gyre.json` (without `out` and times). */
export interface QuantizeReport {
  readonly out: string;
  /** True when an equal run had finished it before, or for a dry run: nothing was done. */
  readonly skipped: boolean;
  readonly method: string;
  readonly bits: WeightBits;
  /** -1: per channel. */
  readonly groupSize: number;
  readonly settings: QuantizeSettings;
  readonly layout: QuantizePlan['layout'];
  readonly bitsPerWeight: number;
  /** Bytes of the quantized linears and of all tensors; 0 when skipped. */
  readonly linearBytes: number;
  readonly calibration: string;
  readonly notes: readonly string[];
  readonly seconds: number;
  readonly breakdown: PipelineReport['seconds'] & { readonly calibrationText: number };
  readonly groups: readonly GroupReport[];
  /** Of recipes that train whole blocks; losses by epoch are in `training.json` beside the weights. */
  readonly blocks?: readonly BlockReport[];
  /** Smoothing as searched or given, per block and group. */
  readonly smoothing: readonly {
    readonly layer: number;
    readonly group: string;
    /** Null: no smoothing. */
    readonly rule: SmoothingRule | null;
  }[];
  /** What was written to `gyre-report.json`; undefined when nothing was done. */
  readonly record: QuantizationRecord | undefined;
}

/** What `--act-bits 4` means when no method is named: docs/recipes/lowbit.md has the trials. */
const LOW_BIT_METHOD = 'lowbit';

const DEFAULTS = {
  method: 'paroquant',
  bits: 4,
  groupSize: 128,
  krot: 8,
  scales: true,
  steps: 100,
  seed: 0,
  seqLen: 512,
} as const;

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

/** Quantizes a checkpoint. @throws GyreError for bad input, before anything is written, and for failures, with nothing lost. */
export async function quantizeCheckpoint(options: QuantizeOptions): Promise<QuantizeReport> {
  const start = performance.now();
  const recipe = findRecipe(options.method ?? (options.actBits === 4 ? LOW_BIT_METHOD : DEFAULTS.method));
  const settings = settingsOf(options, recipe);
  const onProgress = options.onProgress ?? silent;
  const resolved = await resolveModel(options.model, { revision: options.revision, token: options.token, onProgress });
  const source = await openModel(resolved.files);
  try {
    if (source.quantization) {
      throw new GyreError('unsupported', `${source.name} is quantized already (${source.quantization.method})`, {
        remedy: 'start from the original 16-bit checkpoint',
      });
    }
    checkTensors(source);
    const sequences =
      options.calibrationTokens?.sequences ??
      options.calibSamples ??
      calibrationSequences(options.device ?? 'cpu', blockWeights(source.config));
    if (isBlockRecipe(recipe))
      ensure(
        sequences >= 2,
        'usage',
        `${recipe.name} needs at least two calibration sequences: one to train on, one to choose the best epoch by`,
        'raise --calib-samples',
      );
    const calibrated = needsCalibration(recipe, settings);
    const given = calibrated ? options.calibrationTokens : undefined;
    const shape = {
      sequences,
      length: given?.length ?? options.seqLen ?? DEFAULTS.seqLen,
    };
    if (calibrated) checkShape(source, shape, given);
    const plan = planQuantization(source.config, settings, recipe, shape, otherBytes(source));
    const texts = calibrated && !given ? await readTexts(options.calib ?? []) : [];
    const tokenizer = calibrated && !given ? await loadTokenizer(source.files) : undefined;
    const ready =
      given ??
      (tokenizer && texts.length > 0
        ? sampleWindows(tokenizer, texts, shape, createRng(settings.seed).fork('calibration'), {
            evenly: isBlockRecipe(recipe),
          })
        : undefined);
    const device = options.device ?? 'cpu';
    const fingerprint = await fingerprintOf(
      source,
      settings,
      device,
      calibrated ? { shape, texts, tokens: given } : undefined,
    );
    options.onPlan?.({ ...plan, lines: describePlan(source, plan, settings, recipe, shape, texts) });
    const state = await inspectOutput(options.out, fingerprint);
    const report = (parts: Partial<QuantizeReport>): QuantizeReport => ({
      out: options.out,
      skipped: false,
      method: settings.method,
      bits: settings.bits,
      groupSize: settings.groupSize,
      settings,
      layout: plan.layout,
      bitsPerWeight: plan.bitsPerWeight,
      linearBytes: 0,
      calibration: '',
      notes: plan.notes,
      seconds: (performance.now() - start) / 1000,
      breakdown: { forward: 0, statistics: 0, quantize: 0, write: 0, calibrationText: 0 },
      groups: [],
      smoothing: [],
      record: undefined,
      ...parts,
    });
    if (state === 'finished' || options.dryRun) return report({ skipped: true });
    await checkDisk(options.out, plan);

    const threads = options.threads ?? availableParallelism();
    const backend = options.backend ?? (await openBackend(device, { threads }));
    try {
      if (isBlockRecipe(recipe)) requireGradients(backend);
      const order = [...Array.from({ length: source.config.layers }, (_, layer) => blockShard(layer)), REST_SHARD];
      const folder = await RunFolder.open(options.out, fingerprint, order, { resume: options.resume ?? false });
      try {
        // Another run may have finished between the look at the folder and the lock.
        if ((await inspectOutput(options.out, fingerprint)) === 'finished') return report({ skipped: true });
        const textStart = performance.now();
        const writing = {
          ...shape,
          seed: settings.seed,
          threads,
          device,
          onProgress,
          signal: options.signal,
        };
        const calibration =
          ready ??
          (tokenizer && (await storedTokens(folder, shape, () => writeCalibrationText(source, tokenizer, writing))));
        const calibrationText = (performance.now() - textStart) / 1000;
        const activations = isBlockRecipe(recipe)
          ? activationFiles(folder, source, shape, options.activationBytes ?? freemem() / 2)
          : undefined;
        const prepared = await prepareModel({
          backend,
          source,
          settings,
          calibration,
          onProgress,
          signal: options.signal,
        });
        const quantization = quantizationOf(prepared.source, settings, recipe, plan);
        const pipeline = await quantizeModel({
          backend,
          source: prepared.source,
          recipe,
          settings,
          plan,
          quantization,
          calibration: recipe.needs === 'nothing' ? undefined : calibration,
          sink: folder,
          activations,
          onProgress,
          signal: options.signal,
        }).finally(() => activations?.remove());
        const description = calibration?.description ?? 'none';
        let record: QuantizationRecord | undefined;
        const files = await resultFiles(prepared.source, quantization, {
          fingerprint,
          settings,
          training: isBlockRecipe(recipe) ? await trainingOf(folder, source) : undefined,
          calibration: description,
          notes: plan.notes,
          ...(prepared.smoothing.length > 0 ? { smoothing: describeSmoothing(prepared) } : {}),
        });
        await folder.finish(files, async (made) => {
          record = await describeResult(source, made, {
            method: settings.method,
            settings: flatSettings(settings),
            layout: plan.layout,
            calibration: description,
            notes: [...plan.notes],
            groups: pipeline.groups.map(groupRecord),
          });
          return { [RECORD_FILE]: `${JSON.stringify(record)}\n` };
        });
        return report({
          record,
          calibration: description,
          linearBytes: record?.model.linearBytes ?? 0,
          seconds: (performance.now() - start) / 1000,
          breakdown: { ...pipeline.seconds, calibrationText },
          groups: pipeline.groups,
          ...(pipeline.blocks && { blocks: pipeline.blocks }),
          smoothing: describeSmoothing(prepared),
        });
      } finally {
        await folder.close();
      }
    } finally {
      if (!options.backend) await backend.dispose();
    }
  } finally {
    await source.checkpoint.close();
  }
}

/** Whether anything looks at calibration tokens: the recipe, or the search for smoothing scales. */
function needsCalibration(recipe: Recipe, { smooth = 'none' }: QuantizeSettings): boolean {
  return recipe.needs !== 'nothing' || smooth !== 'none';
}

function describeSmoothing({ smoothing }: PreparedModel): QuantizeReport['smoothing'] {
  return smoothing.map(({ layer, group, rule }) => ({ layer, group, rule: rule ?? null }));
}

/** Below 16 bits, or undefined. */
function narrow(bits: NarrowBits | 16 | undefined, name: string): NarrowBits | undefined {
  ensure(bits === undefined || [4, 8, 16].includes(bits), 'usage', () => `${name} must be 4, 8 or 16, found ${bits}`);
  return bits === 16 ? undefined : bits;
}

function settingsOf(options: QuantizeOptions, recipe: Recipe): QuantizeSettings {
  const defaults = { ...DEFAULTS, ...recipe.defaults };
  const bits = options.bits ?? defaults.bits;
  const groupSize = options.groupSize ?? defaults.groupSize;
  const krot = options.krot ?? DEFAULTS.krot;
  ensure([2, 3, 4, 8].includes(bits), 'usage', () => `--bits must be 2, 3, 4 or 8, found ${bits}`);
  ensure(
    [-1, 32, 64, 128].includes(groupSize),
    'usage',
    () => `--group-size must be 32, 64, 128 or -1 (per channel), found ${groupSize}`,
  );
  ensure(
    Number.isInteger(krot) && krot >= 0 && krot <= 31,
    'usage',
    () => `--krot must be between 0 and 31, found ${krot}`,
  );
  const actBits = narrow(options.actBits ?? recipe.defaults?.actBits, '--act-bits');
  // A recipe that rounds the cache rounds it as finely as activations.
  const kvBits = narrow(options.kvBits ?? (recipe.defaults?.kvBits && (actBits ?? 16)), '--kv-bits');
  const ownClip = actBits === recipe.defaults?.actBits ? recipe.defaults?.actClip : undefined;
  const actClip = options.actClip ?? ownClip;
  const ownGroup = actBits === recipe.defaults?.actBits ? recipe.defaults?.actGroupSize : undefined;
  const actGroupSize = options.actGroupSize ?? ownGroup;
  ensure(
    actGroupSize === undefined || [-1, 32, 64, 128].includes(actGroupSize),
    'usage',
    () => `--act-group-size must be 32, 64, 128 or -1 (per token), found ${actGroupSize}`,
  );
  ensure(
    actClip === undefined || (actClip > 0 && actClip <= 1),
    'usage',
    () => `--act-clip must be above 0 and at most 1, found ${actClip}`,
  );
  const rotate = options.rotate ?? recipe.defaults?.rotate ?? false;
  const smooth = options.smooth ?? recipe.defaults?.smooth ?? 'none';
  const { alpha } = options;
  ensure(
    alpha === undefined || (alpha >= 0 && alpha <= 1),
    'usage',
    () => `--alpha must be between 0 and 1, found ${alpha}`,
  );
  ensure(
    !isBlockRecipe(recipe) || (!actBits && !kvBits && !rotate && smooth === 'none'),
    'usage',
    () => `${recipe.name} trains blocks as they are, with activations in full precision`,
    'leave out --act-bits, --kv-bits, --rotate and --smooth, or choose another method',
  );
  return {
    method: recipe.name,
    bits,
    groupSize,
    krot,
    scales: options.scales ?? DEFAULTS.scales,
    share: options.share ?? (isBlockRecipe(recipe) ? recipe.share : true),
    rounding: options.rounding,
    steps: options.steps ?? DEFAULTS.steps,
    seed: options.seed ?? DEFAULTS.seed,
    ...(isBlockRecipe(recipe) ? { block: blockSettings(recipe.training, options.block) } : {}),
    ...(actBits ? { actBits, ...defined({ actClip, actGroupSize }) } : {}),
    ...(kvBits ? { kvBits } : {}),
    ...(rotate ? { rotate } : {}),
    ...(smooth !== 'none' ? { smooth, ...(alpha === undefined ? {} : { alpha }) } : {}),
  };
}

/** What of some settings is set. */
function defined<T extends object>(settings: T): Partial<T> {
  return Object.fromEntries(Object.entries(settings).filter(([, value]) => value !== undefined)) as Partial<T>;
}

/** Settings as a record has them: one flat table. */
function flatSettings({ block, ...settings }: QuantizeSettings): QuantizationRecord['settings'] {
  const entries = Object.entries({ ...settings, ...block });
  return Object.fromEntries(entries.flatMap(([name, value]) => (value === undefined ? [] : [[name, value]])));
}

function blockSettings(defaults: BlockSettings, given: Partial<BlockSettings> = {}): BlockSettings {
  const chosen = Object.fromEntries(Object.entries(given).filter(([, value]) => value !== undefined));
  const block: BlockSettings = { ...defaults, ...chosen };
  for (const name of ['epochs', 'batch', 'validation'] as const)
    ensure(
      Number.isInteger(block[name]) && block[name] >= 1,
      'usage',
      () => `${name} must be a whole number of at least 1, found ${block[name]}`,
    );
  for (const name of ['transformRate', 'weightRate', 'gridRate', 'weightDecay', 'beta'] as const)
    ensure(
      Number.isFinite(block[name]) && block[name] >= 0 && (name !== 'beta' || block[name] > 0),
      'usage',
      () => `${name} must be a positive number, found ${block[name]}`,
    );
  return block;
}

function checkShape(
  source: ModelSource,
  shape: { sequences: number; length: number },
  given: CalibrationTokens | undefined,
): void {
  const { sequences, length } = shape;
  ensure(
    Number.isInteger(sequences) && Number.isInteger(length) && sequences >= 1 && length >= 2,
    'usage',
    () => `calibration needs at least one sequence of two tokens, found ${sequences} of ${length}`,
    'raise --calib-samples or --seq-len',
  );
  ensure(
    !given || given.ids.length === sequences * length,
    'calibration',
    () => `the calibration tokens should be ${sequences} × ${length} ids, found ${given?.ids.length}`,
    'pass sequences of equal length, one after the other',
  );
  ensure(
    shape.length <= source.config.maxPositions,
    'context-length',
    () =>
      `calibration sequences of ${shape.length} tokens are longer than the model's context of ${source.config.maxPositions}`,
    'use a smaller --seq-len',
  );
}

/** Bytes of everything that is copied as it is. */
function otherBytes(source: ModelSource): number {
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

async function readTexts(names: readonly string[]): Promise<CalibrationText[]> {
  const texts: CalibrationText[] = [];
  for (const name of names) {
    const info = await stat(name).catch(() => undefined);
    if (!info?.isFile())
      throw new GyreError('file-missing', `calibration text ${name} is not a file`, {
        remedy: 'check the path given to --calib',
      });
    ensure(
      info.size <= MAX_TEXT_BYTES,
      'limit-exceeded',
      `calibration text ${name} has ${info.size} bytes, the limit is ${MAX_TEXT_BYTES}`,
      'give a part of it',
    );
    const text = { name: path.basename(name), text: decodeText(await readFile(name), name) };
    const documents = documentsOf(text); // names a line that is wrong before anything is done
    ensure(
      documents.some((document) => document.trim() !== ''),
      'calibration',
      () => `calibration text ${name} is empty`,
      'give a file with text in it',
    );
    texts.push(text);
  }
  return texts;
}

function decodeText(bytes: Uint8Array, name: string): string {
  try {
    return new TextDecoder('utf-8', { fatal: true }).decode(bytes);
  } catch (cause) {
    throw new GyreError('calibration', `calibration text ${name} is not UTF-8 text`, {
      remedy: 'save it as UTF-8',
      cause,
    });
  }
}

/**
 * Two runs with equal fingerprints make equal bytes: the model (config, every tensor's place and first row; hashing all of
 * it would take as long as reading it twice), the settings, the device, the calibration, gyre itself. Devices sum in other
 * orders, so that blocks of one must not be continued on another.
 */
async function fingerprintOf(
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

async function checkDisk(out: string, plan: QuantizePlan): Promise<void> {
  const free = await freeBytes(out);
  const needed = Math.max(0, plan.outputBytes * 1.05 - (await bytesIn(partialFolder(out))));
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

/** Tokens that take long to make, kept beside the shards: those of the interrupted run if there are any. */
async function storedTokens(
  folder: RunFolder,
  shape: { sequences: number; length: number },
  make: () => Promise<CalibrationTokens>,
): Promise<CalibrationTokens> {
  const stored = folder.temporary(TOKENS_FILE);
  if (await stat(stored).catch(() => undefined)) {
    const file = await SafetensorsFile.open(await openFile(stored));
    const ids = await file.read('ids');
    await file.close();
    return { ...shape, ids: ids.data as Int32Array, description: file.metadata['description'] ?? '' };
  }
  const tokens = await make();
  const ids = hostTensor('i32', [shape.sequences, shape.length], tokens.ids);
  await writeSafetensors(stored, [{ name: 'ids', dtype: 'i32', shape: ids.shape, data: () => ids.data }], {
    metadata: { description: tokens.description },
  });
  return tokens;
}

/** Residual streams on disk when they would take more than `budget` bytes; undefined: keep them in memory. */
function activationFiles(
  folder: RunFolder,
  source: ModelSource,
  shape: { sequences: number; length: number },
  budget: number,
): ActivationFiles | undefined {
  const elements = shape.length * source.config.hiddenSize;
  if (2 * shape.sequences * elements * 4 <= budget) return undefined;
  return new ActivationFiles(folder.temporary('activations'), elements);
}

/** Losses of one block's training, as `training.json` has them. */
interface BlockTraining {
  readonly layer: number;
  readonly stages: readonly StageCurve[];
}

/** The losses that finished shards carry, those of an interrupted run included. */
async function trainingOf(folder: RunFolder, source: ModelSource): Promise<BlockTraining[]> {
  const blocks: BlockTraining[] = [];
  for (let layer = 0; layer < source.config.layers; layer++) {
    const file = await SafetensorsFile.open(await folder.open(blockShard(layer)).open('model.safetensors'));
    blocks.push({ layer, stages: JSON.parse(file.metadata[TRAINING_KEY] ?? '[]') as StageCurve[] });
    await file.close();
  }
  return blocks;
}

/** The quantization config of a planned run. */
export function quantizationOf(
  source: ModelSource,
  settings: QuantizeSettings,
  recipe: Recipe,
  plan: QuantizePlan,
): QuantizationConfig {
  const { config } = source;
  const overrides: Record<string, number> = {};
  const kept: string[] = config.tiedEmbeddings ? [] : ['lm_head'];
  for (const group of GROUP_NAMES) {
    const decision = plan.decisions[group];
    for (let layer = 0; layer < config.layers; layer++) {
      for (const module of groupModules(layer, group)) {
        if (decision.kind === 'keep') kept.push(module);
        else if (settings.groupSize !== -1 && decision.groupSize !== settings.groupSize)
          overrides[module] = decision.groupSize;
      }
    }
  }
  const learned = recipe.layout === 'paroquant';
  const online = onlineConfig(source.online ?? { groups: {} });
  const perChannel = settings.groupSize === -1;
  return {
    method: plan.layout,
    bits: settings.bits,
    groupSize: settings.groupSize,
    krot: learned ? settings.krot : 0,
    modulesToNotConvert: kept,
    groupSizeOverrides: overrides,
    ...(plan.layout === 'gyre' ? { recipe: recipe.name } : {}),
    ...(plan.layout === 'gyre' && recipe.symmetric ? { symmetric: true } : {}),
    ...(online ? { online } : {}),
    ...(plan.layout === 'gyre' && learned && perChannel ? { transformGroupSize: commonRotationGroup(source) } : {}),
  };
}

/** With per-channel grids every transform keeps the same rotation group. */
function commonRotationGroup(source: ModelSource): number {
  return Math.min(...GROUP_NAMES.map((g) => groupShape(source.config, g).inFeatures).map((n) => rotationGroup(n, n)));
}

async function resultFiles(
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
async function describeResult(
  source: ModelSource,
  files: ModelFiles,
  what: Pick<QuantizationRecord, 'method' | 'settings' | 'layout' | 'calibration' | 'notes' | 'groups'>,
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

function megabytes(bytes: number): string {
  return bytes >= 1e9 ? `${(bytes / 1e9).toFixed(2)} GB` : `${(bytes / 1e6).toFixed(1)} MB`;
}

/** A line on what happens to activations; none when nothing does. */
function lowPrecision(settings: QuantizeSettings): string[] {
  const { actBits, actClip, actGroupSize = -1, kvBits, rotate, smooth, alpha } = settings;
  const per = actGroupSize === -1 ? 'token' : `token and ${actGroupSize} channels`;
  const parts = [
    ...(rotate ? ['Hadamard rotations'] : []),
    ...(smooth
      ? [`smoothing ${smooth === 'all' ? 'everywhere' : 'before down'}, exponent ${alpha ?? 'searched'}`]
      : []),
    ...(actBits
      ? [`${actBits}-bit inputs, one grid per ${per}${actClip === undefined ? '' : `, ${actClip} of its range`}`]
      : []),
    ...(kvBits ? [`${kvBits}-bit keys and values`] : []),
  ];
  return parts.length > 0 ? [`activations  ${parts.join(', ')}`] : [];
}

function describePlan(
  source: ModelSource,
  plan: QuantizePlan,
  settings: QuantizeSettings,
  recipe: Recipe,
  shape: { sequences: number; length: number },
  texts: readonly CalibrationText[],
): string[] {
  const { config } = source;
  const grid = settings.groupSize === -1 ? 'per channel' : `groups of ${settings.groupSize}`;
  const calibration = !needsCalibration(recipe, settings)
    ? 'none needed'
    : `${shape.sequences} × ${shape.length} tokens ${texts.length > 0 ? `from ${texts.map((t) => t.name).join(', ')}` : 'written by the model itself'}`;
  return [
    `model        ${source.name}: ${config.family}, ${config.layers} blocks of ${config.hiddenSize}, vocabulary ${config.vocabSize}`,
    `method       ${recipe.name}: ${recipe.summary}`,
    `weights      ${settings.bits} bits, ${grid} (${plan.bitsPerWeight.toFixed(2)} bits per weight), ${plan.layout} layout`,
    ...lowPrecision(settings),
    `calibration  ${calibration}`,
    `cost         about ${(plan.floatingPointOperations / 1e12).toFixed(2)} TFLOP, ${megabytes(plan.memoryBytes)} of memory, ${megabytes(plan.outputBytes)} on disk`,
    ...plan.notes.map((note) => `note         ${note}`),
  ];
}

/** Weights of a block's linears. */
function blockWeights(config: ModelConfig): number {
  const shapes = GROUP_NAMES.map((group) => groupShape(config, group));
  return shapes.reduce((sum, { inFeatures, outFeatures }) => sum + inFeatures * outFeatures.reduce((a, b) => a + b), 0);
}
