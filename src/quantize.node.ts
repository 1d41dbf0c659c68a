// `gyre quantize` as a function: from a model's name to a finished checkpoint folder. Ties together the hub, the plan,
// calibration text (given or written by the model), the pipeline and the output folder.
import { availableParallelism, freemem } from 'node:os';
import { openBackend } from './backends/registry.js';
import { GyreError, ensure } from './core/errors.js';
import { silent } from './core/progress.js';
import { createRng } from './core/rng.js';
import { resolveModel } from './formats/hub.node.js';
import { inspectOutput, RunFolder } from './formats/run-folder.node.js';
import { writeCalibrationText } from './calibration-text.node.js';
import { checkTensors, openModel } from './models/load.js';
import { requireGradients } from './ops/gradients.js';
import { calibrationSequences, sampleWindows } from './quant/calibration/tokens.js';
import { sensitivityBytes } from './quant/kept-sensitivity.js';
import { groupRecord, quantizeModel } from './quant/pipeline.js';
import { planQuantization } from './quant/plan.js';
import { prepareModel, type PreparedModel } from './quant/prepare.js';
import { findRecipe } from './quant/recipes/index.js';
import { RECORD_FILE, type QuantizationRecord } from './quant/results.js';
import { blockShard, REST_SHARD } from './quant/sink.js';
import { isBlockRecipe } from './quant/types.js';
import { loadTokenizer } from './tokenizer/index.js';
import type { QuantizeOptions, QuantizeReport } from './quantize/options.js';
import {
  LOW_BIT_METHOD,
  DEFAULTS,
  settingsOf,
  flatSettings,
  needsCalibration,
  quantizationOf,
} from './quantize/settings.js';
import { checkShape, readTexts, storedTokens, blockWeights } from './quantize/calibration.node.js';
import {
  fingerprintOf,
  checkDisk,
  otherBytes,
  activationFiles,
  trainingOf,
  resultFiles,
  describeResult,
} from './quantize/output.node.js';
import { describePlan } from './quantize/plan-text.js';

export type { QuantizeOptions, QuantizeReport } from './quantize/options.js';
export { quantizationOf } from './quantize/settings.js';

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
    const temporary = settings.sensitivity ? sensitivityBytes(source.config, shape.sequences * shape.length) : 0;
    await checkDisk(options.out, plan, temporary);

    const threads = options.threads ?? availableParallelism();
    const backend = options.backend ?? (await openBackend(device, { threads }));
    try {
      if (isBlockRecipe(recipe) || settings.sensitivity) requireGradients(backend);
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
          backend,
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
        const training = isBlockRecipe(recipe) ? await trainingOf(folder, source) : undefined;
        const files = await resultFiles(prepared.source, quantization, {
          fingerprint,
          settings,
          training,
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
            ...(training && { training }),
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

function describeSmoothing({ smoothing }: PreparedModel): QuantizeReport['smoothing'] {
  return smoothing.map(({ layer, group, rule }) => ({ layer, group, rule: rule ?? null }));
}
