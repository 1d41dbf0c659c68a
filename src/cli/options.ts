// Options of the commands: texts from the command line checked by zod, errors that name the flag as it was typed.
import { Option } from 'commander';
import { z } from 'zod';
import { DEVICES, PRECISIONS } from '../backends/registry.js';
import { GyreError } from '../core/errors.js';

/** A whole number in a range. */
export function wholeNumber(min: number, max = Number.MAX_SAFE_INTEGER) {
  const range = max === Number.MAX_SAFE_INTEGER ? `of at least ${min}` : `from ${min} to ${max}`;
  return z.string().transform((text, ctx) => {
    const value = Number(text);
    if (/^[+-]?\d+$/.test(text.trim()) && value >= min && value <= max) return value;
    ctx.addIssue({ code: 'custom', message: `expected a whole number ${range}, found '${text}'` });
    return z.NEVER;
  });
}

/** A number in a range, `above` it or from `min`. */
export function decimalNumber(range: { min?: number; above?: number; max?: number }) {
  const { min, above, max } = range;
  const words = [
    above === undefined ? '' : `above ${above}`,
    min === undefined ? '' : `at least ${min}`,
    max === undefined ? '' : `at most ${max}`,
  ].filter(Boolean);
  return z.string().transform((text, ctx) => {
    const value = Number(text);
    const fits = value >= (min ?? -Infinity) && value > (above ?? -Infinity) && value <= (max ?? Infinity);
    if (text.trim() !== '' && Number.isFinite(value) && fits) return value;
    ctx.addIssue({ code: 'custom', message: `expected a number ${words.join(' and ')}, found '${text}'` });
    return z.NEVER;
  });
}

/** One of several words or numbers, as typed. */
export function oneOf<const T extends string | number>(values: readonly T[]) {
  return z.string().transform((text, ctx) => {
    const value = values.find((v) => String(v) === text.trim());
    if (value !== undefined) return value;
    ctx.addIssue({ code: 'custom', message: `expected one of ${values.join(', ')}, found '${text}'` });
    return z.NEVER;
  });
}

/** `--no-scales` of `scales`, `--top-k` of `topK`. */
export function flagName(key: string): string {
  return `--${key.replaceAll(/[A-Z]/g, (letter) => `-${letter.toLowerCase()}`)}`;
}

/**
 * Checks what commander collected.
 * @throws GyreError `usage` that names every flag that is wrong.
 */
export function parseOptions<T extends z.ZodType>(schema: T, raw: unknown): z.output<T> {
  const result = schema.safeParse(raw);
  if (result.success) return result.data;
  const lines = result.error.issues.map((issue) => `${flagName(String(issue.path[0] ?? ''))}: ${issue.message}`);
  throw new GyreError('usage', lines.join('; '));
}

/** `--json`, on every command. */
export const jsonOption = (): Option =>
  new Option('--json', 'print one JSON object on stdout, errors included, and nothing else');

/** Flags that say where a model comes from. */
export const modelOptions = (): Option[] => [
  new Option('--revision <name>', 'branch, tag or commit of a hub model (default: main)'),
  new Option('--token <token>', 'access token of the hub (default: HF_TOKEN, or the one you logged in with)'),
];

/** `--device`, on every command that computes. */
export const deviceOption = (): Option =>
  new Option(
    '--device <name>',
    'auto (WebGPU if there is a GPU, else the CPU), cpu or webgpu; see gyre doctor',
  ).default('auto');

/** The schema of {@link deviceOption}. */
export const deviceSchema = { device: oneOf(DEVICES) };

/** Flags that say how a model runs. */
export const runtimeOptions = (): Option[] => [
  deviceOption(),
  new Option('--threads <n>', 'CPU threads (default: all cores)'),
  new Option(
    '--activations <how>',
    'inputs of products with quantized weights: exact, or int8 (faster on many tokens at once, some quality lost)',
  ).default('exact'),
  new Option(
    '--head-bits <n>',
    'width of the output head: 16 as stored, or 8 (half the bytes per token, some quality lost)',
  ).default('16'),
  new Option(
    '--precision <name>',
    'of passes over many rows on WebGPU: f32, f16 (activations rounded, on matrix units), or auto (f16 where the GPU has matrix units)',
  ).default('auto'),
];

/** The schema of {@link modelOptions}. */
export const modelSchema = { revision: z.string().optional(), token: z.string().optional() };

/** The schema of {@link runtimeOptions}. */
export const runtimeSchema = {
  ...deviceSchema,
  threads: wholeNumber(1, 1024).optional(),
  activations: oneOf(['exact', 'int8']),
  headBits: oneOf([8, 16]),
  precision: oneOf(PRECISIONS),
};
