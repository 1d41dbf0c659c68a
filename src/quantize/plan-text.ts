// The plan in words.
import type { ModelSource } from '../models/load.js';
import type { CalibrationText } from '../quant/calibration/tokens.js';
import { sensitivityBytes } from '../quant/kept-sensitivity.js';
import type { QuantizePlan } from '../quant/plan.js';
import type { QuantizeSettings, Recipe } from '../quant/types.js';
import { needsCalibration, lowPrecision } from './settings.js';

export function megabytes(bytes: number): string {
  return bytes >= 1e9 ? `${(bytes / 1e9).toFixed(2)} GB` : `${(bytes / 1e6).toFixed(1)} MB`;
}

export function describePlan(
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
    ...(settings.sensitivity
      ? [
          `sensitivity  measured first, forth and back through the model; ${megabytes(sensitivityBytes(config, shape.sequences * shape.length))} on disk until the end`,
        ]
      : []),
    `cost         about ${(plan.floatingPointOperations / 1e12).toFixed(2)} TFLOP, ${megabytes(plan.memoryBytes)} of memory, ${megabytes(plan.outputBytes)} on disk`,
    ...plan.notes.map((note) => `note         ${note}`),
  ];
}
