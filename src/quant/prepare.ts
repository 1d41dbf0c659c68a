// What happens to a model before its blocks are quantized: rotations are drawn, smoothing scales are searched on the
// calibration tokens (one pass of the original model, one block in memory), and both are folded into a view of the model.
import { GyreError } from '../core/errors.js';
import type { ProgressListener } from '../core/progress.js';
import { createRng } from '../core/rng.js';
import { floats } from '../core/tensor.js';
import { GROUP_NAMES, type GroupName } from '../models/block.js';
import type { ModelConfig } from '../models/config.js';
import { groupModules, groupShape, readLinear, type ModelSource } from '../models/load.js';
import type { ActivationGrid, Backend, GridSpec, HadamardTransform, RoundedWeight, Tensor } from '../ops/backend.js';
import { InputSample } from './calibration/sample.js';
import type { CalibrationTokens } from './calibration/tokens.js';
import { walkInputs } from './calibration/walk.js';
import { drawRotation, foldedSource, valueChannel, type ModelRotation, type Smoothing } from './folded-source.js';
import { activationGrid, kvGrid } from './grids/activations.js';
import { searchSmoothing, type SmoothingChoice } from './objectives/smoothing.js';
import type { QuantizeSettings, Recipe } from './types.js';
import { GPTQ_DAMP } from './recipes/gptq.js';
import { findRecipe } from './recipes/index.js';

/** Arguments of {@link prepareModel}. */
export interface PrepareRun {
  readonly backend: Backend;
  readonly source: ModelSource;
  readonly settings: QuantizeSettings;
  readonly calibration: CalibrationTokens | undefined;
  readonly onProgress?: ProgressListener;
  readonly signal?: AbortSignal;
}

/** What {@link prepareModel} returns. */
export interface PreparedModel {
  /** The model to quantize: folded, with its online transforms and grids. */
  readonly source: ModelSource;
  /** What smoothing was chosen, per block and group; empty without smoothing. */
  readonly smoothing: readonly (SmoothingChoice & { readonly layer: number; readonly group: GroupName })[];
}

/** Tokens of calibration that smoothing looks at: scales come from maxima over few thousand tokens in the published method too. */
const SMOOTHING_TOKENS = 16_384;
/** Rows of a group's inputs that the search keeps: twice the channels, so that their Gram matrix has full rank, within bounds. */
const sampledRows = (channels: number): number => Math.min(Math.max(2 * channels, 1024), 4096);

/** The groups that a setting smooths. */
const SMOOTHED: Readonly<Record<NonNullable<QuantizeSettings['smooth']>, readonly GroupName[]>> = {
  none: [],
  down: ['down'],
  all: ['qkv', 'o', 'gateUp', 'down'],
};

/** Whether a run changes the model before its blocks, or what happens between them. */
export function isPrepared({ rotate, smooth = 'none', actBits, kvBits }: QuantizeSettings): boolean {
  return rotate === true || smooth !== 'none' || actBits !== undefined || kvBits !== undefined;
}

/** Folds what the settings ask for. The same settings and tokens give the same model, to the bit. */
export async function prepareModel(run: PrepareRun): Promise<PreparedModel> {
  const { source, settings } = run;
  if (!isPrepared(settings)) return { source, smoothing: [] };
  const rotation = settings.rotate ? drawRotation(source.config, createRng(settings.seed).fork('rotation')) : undefined;
  const groups = SMOOTHED[settings.smooth ?? 'none'];
  const found = groups.length > 0 ? await smooth(run, groups, rotation) : undefined;
  const activations = activationsOf(settings, source.config);
  const folded = foldedSource(source, { rotation, smoothing: found?.scales });
  const online = { ...folded.online, groups: folded.online?.groups ?? {} };
  return {
    source: {
      ...folded,
      online: {
        ...online,
        ...(activations ? { activations } : {}),
        // Without rounded keys there is nothing that turning them would help.
        heads: settings.kvBits ? online.heads : undefined,
        ...(settings.kvBits ? { kv: kvGrid(settings.kvBits) } : {}),
      },
    },
    smoothing: found?.choices ?? [],
  };
}

/** One pass of the original model over the calibration tokens, choosing each block's scales on the way. */
async function smooth(
  run: PrepareRun,
  groups: readonly GroupName[],
  rotation: ModelRotation | undefined,
): Promise<{ scales: Smoothing; choices: PreparedModel['smoothing'] }> {
  const { backend, source, settings, calibration, onProgress, signal } = run;
  const recipe = findRecipe(settings.method);
  if (!calibration)
    throw new GyreError('calibration', 'smoothing needs calibration tokens', { remedy: 'give texts with --calib' });
  const { config } = source;
  const scales: Partial<Record<GroupName, Float64Array>>[] = [];
  const choices: (SmoothingChoice & { layer: number; group: GroupName })[] = [];
  const roundWeight: RoundWeight = (...given) =>
    recipe.roundWeight ? recipe.roundWeight(...given, settings.rounding) : roundPlainly(...given);
  let samples = new Map<GroupName, InputSample>();
  await walkInputs({
    backend,
    source,
    calibration,
    maxTokens: SMOOTHING_TOKENS,
    stage: 'smooth',
    onProgress,
    signal,
    observe: () => {
      const sampleOf = (group: GroupName): InputSample =>
        new InputSample(backend, settings.seed, { rows: sampledRows(groupShape(config, group).inFeatures) });
      return (samples = new Map(groups.map((group) => [group, sampleOf(group)])));
    },
    finish: async (layer) => {
      scales[layer] = {};
      for (const [group, sample] of samples) {
        const choice = await searchSmoothing(backend, {
          weights: await weightsOf(source, layer, group),
          peaks: sample.peaks(),
          rows: sample.rows(),
          sharedChannel: group === 'o' ? (c) => valueChannel(config, c) : undefined,
          transform: onlineOf(rotation, group),
          grid: gridOf(settings, recipe, groupShape(config, group).inFeatures),
          round: async (w, gram, grid) => (await roundWeight(backend, w, gram, grid)).values,
          activations: activationsOf(settings, config),
          alpha: settings.alpha,
        });
        if (choice.scales) scales[layer][group] = choice.scales;
        choices.push({ ...choice, layer, group });
      }
    },
  });
  return { scales, choices };
}

type RoundWeight = (backend: Backend, w: Tensor, gram: Tensor, grid: GridSpec) => Promise<RoundedWeight>;

/** For recipes that round in a space of their own, where a search cannot follow them. */
const roundPlainly: RoundWeight = async (backend, w, gram, grid) => {
  const factor = await backend.gptqFactor(gram, GPTQ_DAMP);
  const rounded = await backend.gptq(w, factor, grid);
  backend.free(factor);
  return rounded;
};

/** The grid of weights with so many input channels. */
function gridOf({ bits, groupSize }: QuantizeSettings, { symmetric = false }: Recipe, inFeatures: number): GridSpec {
  const divides = groupSize > 0 && inFeatures % groupSize === 0;
  return { bits, groupSize: divides ? groupSize : inFeatures, symmetric };
}

function activationsOf(
  { actBits, actClip, actGroupSize }: QuantizeSettings,
  config: ModelConfig,
): ActivationGrid | undefined {
  return actBits && activationGrid(actBits, { clip: actClip, groupSize: activationGroup(config, actGroupSize) });
}

/** Channels per grid of activations: as many as wanted where that tiles every linear's input, otherwise fewer, or the token. */
export function activationGroup(config: ModelConfig, wanted = -1): number {
  const tiles = (size: number): boolean =>
    GROUP_NAMES.every((group) => groupShape(config, group).inFeatures % size === 0);
  return [wanted, 64, 32].find((size) => size > 0 && size <= wanted && tiles(size)) ?? -1;
}

function onlineOf(rotation: ModelRotation | undefined, group: GroupName): HadamardTransform | undefined {
  if (group === 'down') return rotation?.down;
  return group === 'o' ? rotation?.o : undefined;
}

async function weightsOf(source: ModelSource, layer: number, group: GroupName): Promise<Float32Array[]> {
  const weights: Float32Array[] = [];
  for (let i = 0; i < groupModules(layer, group).length; i++) {
    const part = await readLinear(source, layer, group, i);
    if (part.source.kind === 'dense') weights.push(floats(part.source.weight));
  }
  return weights;
}
