// A plan's products: which kernel multiplies an input by the weights of its group, in how many dispatches and in what shape.
import type { GpuDevice, PreparedDispatch } from '../device.js';
import { batchProductKind, batchProducts, denseProductKind, type BatchProduct } from './batch-products.js';
import { CHUNK, MAX_PRODUCTS, gemvBuffers, gemvGroups, gemvKernel } from './gemv.js';
import { denseGemvKernel, denseRowsPerGroup } from './gemv-dense.js';
import { batches, type PlanModel, type PlanWeight } from './plan-model.js';

/** Where products read and write. */
export interface ProductBuffers {
  /** [transforms, batch, channels] f16, normalised per chunk. */
  readonly x: GPUBuffer;
  /** [transforms, batch, channels/32] (factor, sum). */
  readonly factors: GPUBuffer;
  /** [batch, outputs of all weights] f32. */
  readonly y: GPUBuffer;
  /** Added into y. */
  readonly residual?: GPUBuffer;
}

/** The products of one input's weights with `batch` sequences, outputs side by side. */
export function planProducts(
  gpu: GpuDevice,
  weights: readonly PlanWeight[],
  source: BatchProduct['source'],
  batch: number,
  { x, factors, y, residual }: ProductBuffers,
): PreparedDispatch[] {
  const stride = weights.reduce((sum, w) => sum + w.outFeatures, 0);
  const [{ kind, inFeatures, integers = false }] = weights;
  const chunks = inFeatures / CHUNK;
  const batched = kind === 'int4' && !batches(weights[0]) ? undefined : batchProductKind(gpu, batch);
  // 16-bit weights have no GEMV with a residual or bias: a product of several rows reads them as fast.
  const product = batched ?? (kind === 'int4' ? undefined : denseProductKind(gpu));
  const most = product ? 1 : MAX_PRODUCTS;
  const out: PreparedDispatch[] = [];
  let [column, done] = [0, 0];
  for (const run of runsOf(weights, residual !== undefined, most, gpu.limits.maxStorageBuffersPerShaderStage)) {
    const [{ outFeatures, groupSize, codes, grid, bias }] = run;
    const outs = run.map((w) => w.outFeatures);
    const rows = outs.reduce((sum, n) => sum + n, 0);
    const variant = {
      ...arithmetic(gpu),
      batch,
      groupSize,
      residual: residual !== undefined,
      bias: bias !== undefined,
      integers,
      products: run.length,
      ...gemvShape(rows, inFeatures, batch),
    };
    const buffers = { w: codes, grid, x, factors, y, residual: residual ?? grid, bias: bias ?? grid };
    const params = { chunks, outFeatures, stride, column, first: done * batch * chunks };
    column += rows;
    done += run.length;
    if (product) {
      out.push(...batchProducts(gpu, product, { ...variant, weights: kind, source, buffers, params }));
      continue;
    }
    const named = {
      ...buffers,
      ...numbered('w', run, (w) => w.codes),
      ...numbered('grid', run, (w) => w.grid),
      ...numbered('bias', run, (w) => w.bias ?? w.grid),
    };
    const sizes = { ...params, ...numbered('outFeatures', run, (w) => w.outFeatures) };
    out.push(gpu.prepare(gemvKernel(variant), named, sizes, groupsOf(gemvGroups(variant, outs))));
  }
  return out;
}

/** The product with the head: logits of `batch` sequences. */
export function planHead(
  gpu: GpuDevice,
  { head, hidden, vocab }: PlanModel,
  batch: number,
  { x, factors, y }: ProductBuffers,
): PreparedDispatch[] {
  if (head.kind === 'int4') return planProducts(gpu, [head.weight], 'norm', batch, { x, factors, y });
  const { kind: weights, weight } = head;
  const several = batchProductKind(gpu, batch);
  if (several) {
    const unused = { grid: weight, residual: weight, bias: weight };
    return batchProducts(gpu, several, {
      batch,
      weights,
      groupSize: CHUNK,
      residual: false,
      bias: false,
      source: 'norm',
      buffers: { w: weight, x, factors, y, ...unused },
      params: { chunks: hidden / CHUNK, outFeatures: vocab, stride: vocab, column: 0, first: 0 },
    });
  }
  const variant = { ...arithmetic(gpu), rows: 4, teams: 4, batch, weights };
  return [
    gpu.prepare(
      denseGemvKernel(variant),
      { w: weight, x, factors, y },
      { words: hidden / 8, outFeatures: vocab },
      groupsOf(Math.ceil(vocab / denseRowsPerGroup(variant))),
    ),
  ];
}

/** What a device's kernels may use: f16 arithmetic, reductions by shuffles in teams of 32 lanes. */
export const arithmetic = ({ capabilities }: GpuDevice): { f16: boolean; shuffle: boolean } => ({
  f16: capabilities.f16,
  shuffle: (capabilities.subgroups?.min ?? 0) >= 32,
});

/** Most sequences where products take them one by one. */
export const FEW_SEQUENCES = 8;

/** Values of a dispatch's products by the names of its buffers or parameters: `w`, `w1`, `w2`. */
function numbered<N extends string, T>(
  name: N,
  run: readonly PlanWeight[],
  value: (weight: PlanWeight) => T,
): Record<N, T> {
  return Object.fromEntries(run.map((weight, i) => [i === 0 ? name : `${name}${i}`, value(weight)])) as Record<N, T>;
}

/** Weights of one input by dispatch: up to `most` together that have bindings enough, and are alike. */
function runsOf(weights: readonly PlanWeight[], residual: boolean, most: number, bindings: number): PlanWeight[][] {
  const runs: PlanWeight[][] = [];
  for (const weight of weights) {
    const last = runs.at(-1);
    const bias = weight.bias !== undefined;
    const fits =
      last &&
      last.length < most &&
      gemvBuffers({ bias, residual, products: last.length + 1 }) <= bindings &&
      last[0].kind === weight.kind &&
      last[0].groupSize === weight.groupSize &&
      (last[0].bias !== undefined) === bias;
    if (fits) last.push(weight);
    else runs.push([weight]);
  }
  return runs;
}

/** Workgroups over x and y. */
function groupsOf(count: number): [number, number] {
  const y = Math.ceil(count / 65535);
  return [Math.ceil(count / y), y];
}

/** Rows per team and teams per row, from timing (bench/webgpu-kernels.ts): enough teams to fill the GPU, then fewer, busier ones. */
export function gemvShape(
  outFeatures: number,
  inFeatures: number,
  batch: number,
): { rows: number; teams: number; split: number } {
  if (batch > 1) {
    const rows = batch <= 2 ? 4 : 2;
    return { rows, teams: 4, split: outFeatures / rows >= 3000 ? 1 : 2 };
  }
  if (outFeatures >= 16384) return { rows: 8, teams: 4, split: 1 };
  const rows = 4;
  const most = Math.max(1, inFeatures / CHUNK / 32);
  let split = 1;
  while (split < 4 && split * 2 <= most && (outFeatures / rows) * split < 3000) split *= 2;
  return { rows, teams: 4, split };
}
