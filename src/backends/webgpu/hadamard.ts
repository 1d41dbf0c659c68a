// Hadamard transforms of activations on the GPU: which stages a transform takes, and running them.
import { ensure, GyreError } from '../../core/errors.js';
import type { HadamardTransform, TransformHandle } from '../../ops/backend.js';
import type { GpuDevice } from './device.js';
import {
  hadamardRowsKernel,
  hadamardRowsMemory,
  hadamardRowsTakes,
  hadamardRowsTuning,
  signsOf,
  type HadamardRowsVariant,
} from './fast/hadamard.js';
import { hadamardKernel, hadamardMemory, type HadamardStage } from './kernels/hadamard.js';
import { makeHalf, makeTensor, spread, type GpuTensor, type HalfTensor } from './tensor.js';

/** Elements that a workgroup takes at least, where vectors are short. */
const BUSY = 1024;

/** A Hadamard transform's signs and stages. */
export class GpuHadamard implements TransformHandle {
  readonly channels: number;
  /** What was loaded, for plans that make tables of their own. */
  readonly source: HadamardTransform;
  /** In the order they run; one where the vectors fit workgroup memory. */
  readonly stages: readonly HadamardStage[];
  /** [m, m] of B, and of Bᵀ for the inverse. */
  readonly signs: { readonly forward: GPUBuffer; readonly inverse: GPUBuffer };

  constructor(gpu: GpuDevice, transform: HadamardTransform) {
    const { channels, order, inner, base } = transform;
    const m = Math.sqrt(base.length);
    const p = order / m;
    ensure(
      Number.isInteger(m) && m >= 1 && Number.isInteger(Math.log2(p)) && p >= 1 && inner >= 1,
      'tensor-shape',
      () => `a Hadamard transform of order ${order} with a base matrix of ${base.length} entries, inner ${inner}`,
    );
    ensure(
      channels % (order * inner) === 0,
      'tensor-shape',
      () => `${channels} channels are no multiple of order ${order} · inner ${inner} of a Hadamard transform`,
    );
    this.channels = channels;
    this.source = transform;
    this.stages = stagesOf(gpu.limits.maxComputeWorkgroupStorageSize, m, p, inner);
    const load = (entry: (i: number, j: number) => number): GPUBuffer => {
      const buffer = gpu.buffer(Math.max(16, 4 * m * m), 'a Hadamard matrix');
      gpu.upload(
        buffer,
        Float32Array.from({ length: m * m }, (_, at) => entry(Math.floor(at / m), at % m)),
      );
      return buffer;
    };
    const forward = load((i, j) => base[i * m + j]);
    this.signs = { forward, inverse: m === 1 ? forward : load((i, j) => base[j * m + i]) };
  }

  free(gpu: GpuDevice): void {
    for (const buffer of new Set([this.signs.forward, this.signs.inverse])) gpu.release(buffer);
  }
}

/** B ⊗ S in as few stages as `memory` bytes of a workgroup allow. */
function stagesOf(memory: number, m: number, p: number, inner: number): HadamardStage[] {
  if (hadamardMemory({ m, p }, 1) <= memory) return [{ m, p, inner }];
  if (m > 1) return [...stagesOf(memory, 1, p, inner), ...stagesOf(memory, m, 1, inner * p)];
  if (p === 1)
    throw new GyreError(
      'limit-exceeded',
      `a Hadamard matrix does not fit this GPU's workgroup memory of ${memory} bytes`,
    );
  const low = 2 ** Math.floor(Math.log2(p) / 2);
  return [...stagesOf(memory, 1, low, inner), ...stagesOf(memory, 1, p / low, inner * low)];
}

/** Channels from which a workgroup of the fast kernel has work enough. */
const LONG = 256;

/** Channels of runs that go together. */
const LONG_RUNS = 2048;

/** The fast kernel's variant for a stage, a row being a run of it; undefined where it doesn't take it. */
function rowsVariant(
  gpu: GpuDevice,
  handle: GpuHadamard,
  { m, p, inner }: HadamardStage,
  {
    direction,
    halves,
    elements,
    together = 1,
  }: {
    readonly direction: 'forward' | 'inverse';
    readonly halves: boolean;
    readonly elements: number;
    readonly together?: number;
  },
): HadamardRowsVariant | undefined {
  const shape = { channels: m * p * inner * together, m, p, inner, halves };
  const memory = gpu.limits.maxComputeWorkgroupStorageSize;
  if (!hadamardRowsTakes(shape) || shape.channels < LONG || hadamardRowsMemory(shape) > memory) return undefined;
  const signed = { ...shape, signs: m > 1 ? signsOf(handle.source.base, direction) : '' };
  return { ...signed, ...hadamardRowsTuning(signed, elements / shape.channels) };
}

/**
 * H·x / √n on rows of f16, or on the heads in them: every run of the transform's channels; undefined where no kernel for them takes
 * the transform.
 */
export function hadamardHalf(gpu: GpuDevice, x: HalfTensor, handle: GpuHadamard): HalfTensor | undefined {
  const { rows, cols } = x.matrix;
  const { channels, source } = handle;
  ensure(cols % channels === 0, 'tensor-shape', () => `a transform of ${channels} channels was given ${cols}`);
  const { order, inner, base } = source;
  const m = Math.sqrt(base.length);
  // Short runs go together, or a workgroup would have nothing to do.
  let together = 1;
  while (order * inner * together < LONG_RUNS && x.elements % (2 * order * inner * together) === 0) together *= 2;
  const variant = rowsVariant(
    gpu,
    handle,
    { m, p: order / m, inner },
    { direction: 'forward', halves: true, elements: x.elements, together },
  );
  if (!variant) return undefined;
  const y = makeHalf(gpu, rows, cols);
  const runs = x.elements / variant.channels;
  gpu.dispatch(hadamardRowsKernel(variant), { x, y }, { rows: runs }, spread(Math.ceil(runs / (variant.ahead ?? 1))));
  return y;
}

/** See {@link applyHadamard}. */
export interface HadamardOptions {
  /** Default 'forward'. */
  readonly direction?: 'forward' | 'inverse';
  /** Default false: into a new tensor. */
  readonly inPlace?: boolean;
}

/**
 * H·x / √n, or Hᵀ·x / √n, along the transformed axis. x [rows, k · channels]: every run of `channels` values is transformed,
 * so that heads are as good as rows.
 */
export function applyHadamard(
  gpu: GpuDevice,
  x: GpuTensor,
  handle: GpuHadamard,
  { direction = 'forward', inPlace = false }: HadamardOptions = {},
): GpuTensor {
  ensure(
    x.elements % handle.channels === 0,
    'tensor-shape',
    () => `a transform of ${handle.channels} channels was given [${x.shape.join(', ')}]`,
  );
  const out = inPlace ? x : makeTensor(gpu, x.shape);
  const memory = gpu.limits.maxComputeWorkgroupStorageSize;
  for (const [index, stage] of handle.stages.entries()) {
    const { m, p, inner } = stage;
    const n = m * p;
    const vectors = x.elements / n;
    const variant =
      inPlace || index > 0
        ? undefined
        : rowsVariant(gpu, handle, stage, { direction, halves: false, elements: x.elements });
    if (variant) {
      const rows = x.elements / variant.channels;
      const groups = spread(Math.ceil(rows / (variant.ahead ?? 1)));
      gpu.dispatch(hadamardRowsKernel(variant), { x, y: out }, { rows }, groups);
      continue;
    }
    let together = Math.min(32, 2 ** Math.ceil(Math.log2(BUSY / n)), 2 ** Math.floor(Math.log2(vectors)));
    // Across an inner axis neighbours in memory are neighbouring vectors: at least a few, for whole cache lines.
    if (inner > 1) together = Math.max(together, Math.min(16, 2 ** Math.floor(Math.log2(inner))));
    together = Math.max(1, together);
    while (together > 1 && hadamardMemory(stage, together) > memory) together /= 2;
    const kernel = hadamardKernel({ ...stage, together, inPlace: inPlace || index > 0 });
    gpu.dispatch(
      kernel,
      { x, signs: handle.signs[direction], out },
      { vectors, scale: 1 / Math.sqrt(n) },
      spread(Math.ceil(vectors / together)),
    );
  }
  return out;
}
