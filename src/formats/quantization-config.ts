// `quantization_config` of config.json: three schemas (paroquant, awq, gyre), one normal form.
import { z } from 'zod';
import { GyreError, ensure } from '../core/errors.js';
import { validate } from './huggingface-config.js';

/** Quantization methods gyre reads and writes. */
export type QuantizationMethod = 'paroquant' | 'awq' | 'gyre';

/** Bit widths of stored codes. */
export type StoredBits = 2 | 3 | 4 | 8;

/** Version of gyre's own schema that this code writes for linears alone. */
export const GYRE_SCHEMA_VERSION = 1;
/** Version with things that happen online: readers of version 1 refuse it. */
export const GYRE_ONLINE_VERSION = 2;
/** What a version 2 checkpoint may require of its reader. */
const FEATURES = ['hadamard', 'activations', 'kv_cache'] as const;
/** Most rotations of a transform. */
export const MAX_KROT = 64;
/** Largest group, input channels (`pairs` are int16). */
export const MAX_GROUP_SIZE = 32768;

/** What a model does to activations while it runs (gyre schema, version 2). */
export interface OnlineConfig {
  /** Hadamard transforms of the inputs of linear groups, and of the heads of q and k. */
  readonly hadamard: readonly {
    readonly at: (typeof PLACES)[number];
    readonly order: number;
    readonly inner: number;
    readonly construction: (typeof CONSTRUCTIONS)[number];
    readonly baseOrder: number;
  }[];
  /** Grid of every quantized linear's input. Group −1: per token. */
  readonly activations?: {
    readonly bits: 4 | 8;
    readonly symmetric: boolean;
    readonly groupSize: number;
    readonly clip: number;
  };
  /** Grid of keys and values: asymmetric, per token and head. */
  readonly kvCache?: { readonly bits: 4 | 8; readonly clip: number };
}

const PLACES = ['qkv', 'o', 'gateUp', 'down', 'heads'] as const;
const CONSTRUCTIONS = ['sylvester', 'paley1', 'paley2', 'williamson'] as const;

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
  /** Weights are on grids symmetric about 0: every zero point is 2^(bits − 1) (gyre schema only). */
  readonly symmetric?: boolean;
  readonly online?: OnlineConfig;
}

const groupSize = z.union([z.literal(-1), z.number().int().positive().max(MAX_GROUP_SIZE)]);
const shared = {
  modules_to_not_convert: z.array(z.string()).nullish(),
  group_size_overrides: z.record(z.string(), groupSize).nullish(),
};
const krot = z.number().int().nonnegative().max(MAX_KROT);

const narrow = z.union([z.literal(4), z.literal(8)]);
const clip = z.number().positive().max(1);
const onlineFields = {
  symmetric: z.boolean().nullish(),
  requires: z.array(z.string()).max(100).default([]),
  online_transforms: z
    .array(
      z.object({
        kind: z.literal('hadamard'),
        at: z.enum(PLACES),
        order: z.number().int().positive().max(1_048_576),
        inner: z.number().int().positive().max(65_536),
        construction: z.enum(CONSTRUCTIONS),
        base_order: z.number().int().positive().max(1024),
      }),
    )
    .max(PLACES.length)
    .default([]),
  activations: z.object({ bits: narrow, symmetric: z.boolean(), group_size: groupSize, clip }).nullish(),
  kv_cache: z.object({ bits: narrow, clip }).nullish(),
};

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
    version: z.union([z.literal(GYRE_SCHEMA_VERSION), z.literal(GYRE_ONLINE_VERSION)]),
    bits: z.union([z.literal(2), z.literal(3), z.literal(4), z.literal(8)]),
    group_size: groupSize,
    krot: krot.default(0),
    transform_group_size: z.number().int().positive().max(MAX_GROUP_SIZE).nullish(),
    recipe: z.string().max(200).nullish(),
    ...onlineFields,
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
      checkFeatures(raw, where);
      const c = validate(schemas.gyre, raw, where);
      const online = onlineOf(c);
      return {
        method,
        bits: c.bits,
        groupSize: c.group_size,
        krot: c.krot,
        ...common(c),
        ...(c.transform_group_size ? { transformGroupSize: c.transform_group_size } : {}),
        ...(c.recipe ? { recipe: c.recipe } : {}),
        ...(c.symmetric ? { symmetric: true } : {}),
        ...(online ? { online } : {}),
      };
    }
    default:
      throw new GyreError('unsupported', `${where}: quant_method ${JSON.stringify(method)} is not supported`, {
        remedy: `gyre reads ${Object.keys(schemas).join(', ')} and unquantized models: use the 16-bit original.`,
      });
  }
}

/** Refuses, in words, what a newer gyre wrote and this one cannot run: a missing transform would give nonsense. */
function checkFeatures(raw: unknown, where: string): void {
  const {
    version,
    requires,
    online_transforms: transforms,
  } = validate(
    z.looseObject({
      version: z.number(),
      requires: z.array(z.string()).nullish(),
      online_transforms: z.array(z.looseObject({ kind: z.string() })).nullish(),
    }),
    raw,
    where,
  );
  const refuse = (what: string): never => {
    throw new GyreError('unsupported', `${where}: ${what}`, {
      remedy: 'Update gyre, or quantize the original model with this version.',
    });
  };
  if (version > GYRE_ONLINE_VERSION) refuse(`version ${version} of the gyre layout is newer than this gyre reads`);
  for (const feature of requires ?? []) {
    if (!FEATURES.some((known) => known === feature)) refuse(`the model requires '${feature}', which this gyre lacks`);
  }
  for (const { kind } of transforms ?? []) {
    if (kind !== 'hadamard') refuse(`the model has an online transform '${kind}', which this gyre lacks`);
  }
}

function onlineOf(c: z.output<typeof schemas.gyre>): OnlineConfig | undefined {
  const { online_transforms: transforms, activations, kv_cache: kvCache } = c;
  if (transforms.length === 0 && !activations && !kvCache) return undefined;
  return {
    hadamard: transforms.map(({ at, order, inner, construction, base_order: baseOrder }) => ({
      at,
      order,
      inner,
      construction,
      baseOrder,
    })),
    ...(activations
      ? {
          activations: {
            bits: activations.bits,
            symmetric: activations.symmetric,
            groupSize: activations.group_size,
            clip: activations.clip,
          },
        }
      : {}),
    ...(kvCache ? { kvCache: { bits: kvCache.bits, clip: kvCache.clip } } : {}),
  };
}

/** The fields of {@link OnlineConfig} as written. */
function onlineJson({ hadamard, activations, kvCache }: OnlineConfig): Record<string, unknown> {
  const used = { hadamard: hadamard.length > 0, activations, kv_cache: kvCache };
  return {
    requires: FEATURES.filter((feature) => used[feature]),
    ...(hadamard.length > 0
      ? {
          online_transforms: hadamard.map(({ at, order, inner, construction, baseOrder }) => ({
            kind: 'hadamard',
            at,
            order,
            inner,
            construction,
            base_order: baseOrder,
          })),
        }
      : {}),
    ...(activations
      ? {
          activations: {
            bits: activations.bits,
            symmetric: activations.symmetric,
            group_size: activations.groupSize,
            clip: activations.clip,
          },
        }
      : {}),
    ...(kvCache ? { kv_cache: { bits: kvCache.bits, clip: kvCache.clip } } : {}),
  };
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
  ensure(
    config.method === 'gyre' || config.online === undefined,
    'unsupported',
    () => `the ${config.method} layout has no place for online transforms and grids`,
    'Write the gyre layout.',
  );
  const json: Record<string, unknown> = { quant_method: config.method };
  if (config.method === 'gyre') json.version = config.online ? GYRE_ONLINE_VERSION : GYRE_SCHEMA_VERSION;
  json.bits = config.bits;
  json.group_size = config.groupSize;
  if (config.method === 'awq') Object.assign(json, { zero_point: true, version: 'gemm' });
  else json.krot = config.krot;
  if (config.method === 'gyre') {
    if (config.transformGroupSize !== undefined) json.transform_group_size = config.transformGroupSize;
    if (config.recipe !== undefined) json.recipe = config.recipe;
    if (config.symmetric) json.symmetric = true;
    if (config.online) Object.assign(json, onlineJson(config.online));
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
