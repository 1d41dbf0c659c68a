// What an adapter can do, probed once: optional features, subgroup sizes, matrix units, limits.
import { GyreError } from '../../core/errors.js';

/** A shape of matrix product that the hardware does inside one subgroup: result [m, n] += [m, k] · [k, n]. */
export interface SubgroupMatrixShape {
  readonly m: number;
  readonly n: number;
  readonly k: number;
  readonly component: string;
  readonly result: string;
}

/** See {@link probe}. */
export interface GpuCapabilities {
  readonly vendor: string;
  readonly architecture: string;
  /** The adapter's own description, e.g. "NVIDIA H200". */
  readonly description: string;
  /** True for an adapter that runs on the CPU. */
  readonly software: boolean;
  /** shader-f16: 16-bit arithmetic in kernels. */
  readonly f16: boolean;
  /** Lanes per subgroup; undefined without the feature. */
  readonly subgroups: { readonly min: number; readonly max: number } | undefined;
  readonly subgroupMatrices: readonly SubgroupMatrixShape[];
  /** packed_4x8_integer_dot_product: four products of bytes and their sum in one instruction. */
  readonly integerDot: boolean;
  /** timestamp-query: kernels can be timed on the GPU. */
  readonly timestamps: boolean;
}

/** Switches features off, to test the paths that do without. */
export interface FeatureChoice {
  readonly f16?: boolean;
  readonly subgroups?: boolean;
  readonly subgroupMatrices?: boolean;
  readonly integerDot?: boolean;
}

/** Whether the kernels for matrix units run: 16 × 16 × 16 products of f16, summed in f32 and in f16, in subgroups of 32 lanes. */
export function hasMatrixUnits({ f16, subgroups, subgroupMatrices }: GpuCapabilities): boolean {
  const has = (result: string): boolean =>
    subgroupMatrices.some(
      (s) => s.m === 16 && s.n === 16 && s.k === 16 && s.component === 'f16' && s.result === result,
    );
  return f16 && subgroups?.min === 32 && subgroups.max === 32 && has('f32') && has('f16');
}

const MATRIX_FEATURE = 'chromium-experimental-subgroup-matrix';

interface MatrixConfig {
  readonly M: number;
  readonly N: number;
  readonly K: number;
  readonly componentType: string;
  readonly resultComponentType: string;
}

/** Reads an adapter's features and the entry point's language features, less those switched off. */
export function probe(gpu: GPU, adapter: GPUAdapter, choice: FeatureChoice = {}): GpuCapabilities {
  const { info, features } = adapter;
  const { subgroupMinSize, subgroupMaxSize } = info as { subgroupMinSize?: number; subgroupMaxSize?: number };
  const subgroups = choice.subgroups !== false && features.has('subgroups');
  const configs = (info as { subgroupMatrixConfigs?: readonly MatrixConfig[] }).subgroupMatrixConfigs ?? [];
  const matrices = choice.subgroupMatrices !== false && subgroups && features.has(MATRIX_FEATURE);
  return {
    vendor: info.vendor,
    architecture: info.architecture,
    description: info.description || info.device || info.vendor,
    software:
      info.isFallbackAdapter || /swiftshader|llvmpipe|lavapipe/i.test(`${info.description} ${info.architecture}`),
    f16: choice.f16 !== false && features.has('shader-f16'),
    subgroups: subgroups ? { min: subgroupMinSize ?? 4, max: subgroupMaxSize ?? 128 } : undefined,
    subgroupMatrices: matrices
      ? [...configs].map((c) => ({ m: c.M, n: c.N, k: c.K, component: c.componentType, result: c.resultComponentType }))
      : [],
    integerDot: choice.integerDot !== false && gpu.wgslLanguageFeatures.has('packed_4x8_integer_dot_product'),
    timestamps: features.has('timestamp-query'),
  };
}

/** The features a device must be created with for these capabilities. */
export function requiredFeatures(capabilities: GpuCapabilities): GPUFeatureName[] {
  const names: string[] = [];
  if (capabilities.f16) names.push('shader-f16');
  if (capabilities.subgroups) names.push('subgroups');
  if (capabilities.subgroupMatrices.length > 0) names.push(MATRIX_FEATURE);
  if (capabilities.timestamps) names.push('timestamp-query');
  return names as GPUFeatureName[];
}

/** Limits that kernels and weights profit from; the rest stay at WebGPU's defaults. */
export const RAISED = [
  'maxBufferSize',
  'maxStorageBufferBindingSize',
  'maxStorageBuffersPerShaderStage',
  'maxComputeWorkgroupStorageSize',
  'maxComputeInvocationsPerWorkgroup',
  'maxComputeWorkgroupSizeX',
  'maxComputeWorkgroupSizeY',
] as const;

/** Values of the limits we use. */
export type GpuLimits = Readonly<Record<(typeof RAISED)[number], number>>;

/** Reads an adapter's or a device's limits, once: each read is a call into the GPU's library. */
export function readLimits({ limits }: { readonly limits: GPUSupportedLimits }): GpuLimits {
  return Object.fromEntries(RAISED.map((name) => [name, limits[name]])) as GpuLimits;
}

/** Refuses a buffer that no binding could reach, before anything is allocated. @throws GyreError `limit-exceeded`. */
export function checkBufferSize(limits: GpuLimits, bytes: number, what: string): void {
  const limit = Math.min(limits.maxBufferSize, limits.maxStorageBufferBindingSize);
  if (bytes > limit)
    throw new GyreError('limit-exceeded', `${what} needs ${bytes} bytes in one GPU buffer; this GPU allows ${limit}`, {
      remedy: 'use a smaller batch or context, or --device cpu',
    });
}
