// `quantization_config` of config.json: three schemas (paroquant, awq, gyre), one normal form.
import { z } from 'zod';
import { GyreError, ensure } from '../core/errors.js';
import { validate } from './huggingface-config.js';

/** Quantization methods gyre reads and writes. */
export type QuantizationMethod = 'paroquant' | 'awq' | 'gyre';

/** Bit widths of stored codes. */
export type StoredBits = 2 | 3 | 4 | 8;

/** Version of gyre's own schema that this code writes. */
export const GYRE_SCHEMA_VERSION = 1;
/** Most rotations of a transform. */
export const MAX_KROT = 64;
/** Largest group, input channels (`pairs` are int16). */
export const MAX_GROUP_SIZE = 32768;

/** Normal form of a `quantization_config`. */
export interface QuantizationConfig {
  readonly method: QuantizationMethod;
  readonly bits: StoredBits;
  /** Input channels per grid group; −1: one group per output channel. */
  readonly groupSize: number;
  /** Rotations of the transforms; 0: none. */
  readonly krot: number;
  /** Input channels per rotation group where it differs from the grid's (gyre schema only). */
  readonly transformGroupSize?: number;
  /** Modules (or parts of their names) left in 16 bits. */
  readonly modulesToNotConvert: readonly string[];
  /** Full module name → its own group size (−1: per channel). An extension of gyre's to all three schemas. */
  readonly groupSizeOverrides: Readonly<Record<string, number>>;
  /** Recipe that made it, e.g. `paroquant`, `gptq`, `smoothrot`; for people and reports (gyre schema only). */
  readonly recipe?: string;
}

const groupSize = z.union([z.literal(-1), z.number().int().positive().max(MAX_GROUP_SIZE)]);
const shared = {
  modules_to_not_convert: z.array(z.string()).nullish(),
  group_size_overrides: z.record(z.string(), groupSize).nullish(),
};
const krot = z.number().int().nonnegative().max(MAX_KROT);

const schemas = {
  paroquant: z.looseObject({
    quant_method: z.literal('paroquant'),
    bits: z.literal(4),
    group_size: z.number().int().positive().max(MAX_GROUP_SIZE),
    krot: krot.min(1),
    ...shared,
  }),
  awq: z.looseObject({
    quant_method: z.literal('awq'),
    bits: z.literal(4),
    group_size: groupSize,
    zero_point: z.literal(true).default(true),
    version: z
      .string()
      .default('gemm')
      .refine((version) => version.toLowerCase() === 'gemm', { error: 'only the gemm version is supported' }),
    ...shared,
  }),
  gyre: z.looseObject({
    quant_method: z.literal('gyre'),
    version: z.literal(GYRE_SCHEMA_VERSION),
    bits: z.union([z.literal(2), z.literal(3), z.literal(4), z.literal(8)]),
    group_size: groupSize,
    krot: krot.default(0),
    transform_group_size: z.number().int().positive().max(MAX_GROUP_SIZE).nullish(),
    recipe: z.string().max(200).nullish(),
    ...shared,
  }),
};

/**
 * Reads the `quantization_config` of a config.json.
 * @param raw its value; undefined and null mean that the model isn't quantized.
 * @param where for messages.
 * @throws `unsupported` for other methods, `config-invalid` for wrong fields.
 */
export function parseQuantizationConfig(
  raw: unknown,
  where = 'quantization_config of config.json',
): QuantizationConfig | undefined {
  if (raw === null || raw === undefined) return undefined;
  const { quant_method: method } = validate(z.looseObject({ quant_method: z.string() }), raw, where);
  switch (method) {
    case 'paroquant': {
      const c = validate(schemas.paroquant, raw, where);
      return { method, bits: 4, groupSize: c.group_size, krot: c.krot, ...common(c) };
    }
    case 'awq': {
      const c = validate(schemas.awq, raw, where);
      return { method, bits: 4, groupSize: c.group_size, krot: 0, ...common(c) };
    }
    case 'gyre': {
      const c = validate(schemas.gyre, raw, where);
      return {
        method,
        bits: c.bits,
        groupSize: c.group_size,
        krot: c.krot,
        ...common(c),
        ...(c.transform_group_size ? { transformGroupSize: c.transform_group_size } : {}),
        ...(c.recipe ? { recipe: c.recipe } : {}),
      };
    }
    default:
      throw new GyreError('unsupported', `${where}: quant_method ${JSON.stringify(method)} is not supported`, {
        remedy: `gyre reads ${Object.keys(schemas).join(', ')} and unquantized models: use the 16-bit original.`,
      });
  }
}

function common(c: {
  modules_to_not_convert?: string[] | null;
  group_size_overrides?: Record<string, number> | null;
}): Pick<QuantizationConfig, 'modulesToNotConvert' | 'groupSizeOverrides'> {
  return { modulesToNotConvert: c.modules_to_not_convert ?? [], groupSizeOverrides: c.group_size_overrides ?? {} };
}

/** The `quantization_config` to write into config.json. Keys are in a fixed order. */
export function quantizationConfigJson(config: QuantizationConfig): Record<string, unknown> {
  ensure(
    config.method === 'gyre' || config.bits === 4,
    'unsupported',
    () => `the ${config.method} layout holds 4 bits, found ${config.bits}`,
    'Write the gyre layout for other widths.',
  );
  const json: Record<string, unknown> = { quant_method: config.method };
  if (config.method === 'gyre') json.version = GYRE_SCHEMA_VERSION;
  json.bits = config.bits;
  json.group_size = config.groupSize;
  if (config.method === 'awq') Object.assign(json, { zero_point: true, version: 'gemm' });
  else json.krot = config.krot;
  if (config.method === 'gyre') {
    if (config.transformGroupSize !== undefined) json.transform_group_size = config.transformGroupSize;
    if (config.recipe !== undefined) json.recipe = config.recipe;
  }
  if (config.modulesToNotConvert.length > 0) json.modules_to_not_convert = [...config.modulesToNotConvert];
  const overrides = Object.entries(config.groupSizeOverrides).sort(([a], [b]) => (a < b ? -1 : 1));
  if (overrides.length > 0) json.group_size_overrides = Object.fromEntries(overrides);
  return json;
}

/** Grid group size of a module, in channels: its override or the common one, per channel resolved to `inFeatures`. */
export function groupSizeOf(config: QuantizationConfig, module: string, inFeatures: number): number {
  const size = Object.hasOwn(config.groupSizeOverrides, module) ? config.groupSizeOverrides[module] : config.groupSize;
  return size === -1 ? inFeatures : size;
}

/**
 * Why a linear can't be stored by a method, in words and with the remedy, or undefined when it can. For plans: the
 * answer is known before any work is done.
 */
export function layoutProblem(
  method: QuantizationMethod,
  linear: { inFeatures: number; outFeatures: number; bits: number; groupSize: number },
): string | undefined {
  const { inFeatures, outFeatures, bits, groupSize: size } = linear;
  if (inFeatures % size !== 0) {
    return `${inFeatures} inputs are no multiple of the group size ${size}: choose a smaller group or leave it in 16 bits`;
  }
  if (method === 'gyre') return undefined;
  if (bits !== 4) return `the ${method} layout holds 4 bits, not ${bits}: write the gyre layout`;
  if (outFeatures % 8 !== 0) {
    return `the ${method} layout packs 8 outputs to a word, ${outFeatures} is no multiple: write the gyre layout or leave it in 16 bits`;
  }
  return undefined;
}
