// From options to settings: defaults, checks, and how a record and a plan name them.
import { ensure } from '../core/errors.js';
import type { QuantizationConfig } from '../formats/quantization-config.js';
import { GROUP_NAMES } from '../models/block.js';
import { onlineConfig } from '../models/online.js';
import { groupModules, groupShape, type ModelSource } from '../models/load.js';
import type { QuantizePlan } from '../quant/plan.js';
import { rotationGroup } from '../quant/recipes/paroquant.js';
import type { QuantizationRecord } from '../quant/results.js';
import type { NarrowBits } from '../quant/grids/activations.js';
import { isBlockRecipe, type BlockSettings, type QuantizeSettings, type Recipe } from '../quant/types.js';
import type { QuantizeOptions } from './options.js';

/** What `--act-bits 4` means when no method is named: docs/recipes/lowbit.md has the trials. */
export const LOW_BIT_METHOD = 'lowbit';

export const DEFAULTS = {
  method: 'paroquant',
  bits: 4,
  groupSize: 128,
  krot: 8,
  scales: true,
  steps: 100,
  seed: 0,
  seqLen: 512,
} as const;

/** Whether anything looks at calibration tokens: the recipe, or the search for smoothing scales. */
export function needsCalibration(recipe: Recipe, { smooth = 'none' }: QuantizeSettings): boolean {
  return recipe.needs !== 'nothing' || smooth !== 'none';
}

/** Below 16 bits, or undefined. */
function narrow(bits: NarrowBits | 16 | undefined, name: string): NarrowBits | undefined {
  ensure(bits === undefined || [4, 8, 16].includes(bits), 'usage', () => `${name} must be 4, 8 or 16, found ${bits}`);
  return bits === 16 ? undefined : bits;
}

export function settingsOf(options: QuantizeOptions, recipe: Recipe): QuantizeSettings {
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
    !isBlockRecipe(recipe) || (!rotate && smooth === 'none'),
    'usage',
    () => `${recipe.name} trains blocks as they are, without rotations or smoothing before`,
    'leave out --rotate and --smooth, or choose another method',
  );
  const plain = !actBits && !kvBits && !rotate && smooth === 'none' && options.rounding !== 'rtn';
  ensure(
    options.sensitivity !== true || (recipe.sensitive === true && plain),
    'usage',
    () => `--sensitivity is for paroquant on a model as it is, with activations in full precision`,
    'leave out --sensitivity, or --method, --rounding rtn, --act-bits, --kv-bits, --rotate and --smooth',
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
    ...(options.sensitivity ? { sensitivity: true } : {}),
    ...(rotate ? { rotate } : {}),
    ...(smooth !== 'none' ? { smooth, ...(alpha === undefined ? {} : { alpha }) } : {}),
  };
}

/** What of some settings is set. */
function defined<T extends object>(settings: T): Partial<T> {
  return Object.fromEntries(Object.entries(settings).filter(([, value]) => value !== undefined)) as Partial<T>;
}

/** Settings as a record has them: one flat table. */
export function flatSettings({ block, ...settings }: QuantizeSettings): QuantizationRecord['settings'] {
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

/** A line on what happens to activations; none when nothing does. */
export function lowPrecision(settings: QuantizeSettings): string[] {
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
