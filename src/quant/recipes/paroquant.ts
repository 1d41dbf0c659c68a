// ParoQuant with the full-batch layer objective (design §4.3): learned pairwise rotations and channel scales, one
// transform per linear group, least-squares target against the reference path, GPTQ in the transformed space.
import { createRng } from '../../core/rng.js';
import { floats, hostTensor, type HostTensor } from '../../core/tensor.js';
import type { Backend, PairwiseTransform, RoundedWeight, Tensor } from '../../ops/backend.js';
import { xorPairs } from '../../transforms/index.js';
import { learnTransform } from '../objectives/layer.js';
import { quadraticError, quadraticForm, requireGram } from '../objectives/error.js';
import type { GroupRecipe, GroupResult, GroupTask, QuantizedPart } from '../types.js';
import { channelMajor, splitRounded } from '../weights.js';
import { roundCompensated } from './compensated.js';
import { roundCoupled } from './coupled.js';

/** Columns of W that learning looks at: a transform has few parameters, so a sample of the outputs determines it. */
const LEARNING_COLUMNS = 512;
/** Peak learning rate of angles and scales. With full-batch gradients and 100 steps, 0.2 to 0.4 end lowest (docs/log.md). */
const LEARNING_RATE = 0.3;
/** Damping µ of the least-squares target W* = (P + µW)(H + µI)⁻¹, share of the mean diagonal of H. */
const TARGET_DAMP = 0.01;

export const paroquant: GroupRecipe = {
  name: 'paroquant',
  summary: 'learned pairwise rotations and channel scales, error-compensated rounding (ParoQuant)',
  needs: 'cross-gram',
  sensitive: true,
  layout: 'paroquant',
  async quantizeGroup(backend, task) {
    if (task.settings.share) return quantizeTogether(backend, task);
    const parts: QuantizedPart[] = [];
    const stats: Record<string, number> = {};
    let curve: readonly number[] | undefined;
    let begin = 0;
    for (const [i, name] of task.names.entries()) {
      const end = begin + task.outFeatures[i];
      const alone = {
        ...task,
        names: [name],
        weights: [task.weights[i]],
        outFeatures: [task.outFeatures[i]],
        outputs: task.outputs && diagonalBlock(task.outputs, begin, end),
      };
      begin = end;
      const result = await quantizeTogether(backend, alone);
      parts.push(...result.parts);
      curve ??= result.curve;
      for (const [key, value] of Object.entries(result.stats)) stats[`${key}.${i}`] = value;
    }
    return { parts, stats, curve };
  },
};

/** Rows and columns `begin` to `end` of a square matrix. */
function diagonalBlock(matrix: HostTensor, begin: number, end: number): HostTensor {
  const [columns] = matrix.shape;
  const values = floats(matrix);
  const size = end - begin;
  const block = new Float32Array(size * size);
  for (let row = 0; row < size; row++) {
    const from = (begin + row) * columns;
    block.set(values.subarray(from + begin, from + end), row * size);
  }
  return hostTensor('f32', [size, size], block);
}

async function quantizeTogether(backend: Backend, task: GroupTask): Promise<GroupResult> {
  const { inFeatures, grid } = task;
  const gram = requireGram(task);
  const w = await channelMajor(backend, task.weights, inFeatures);
  // Pt: what the outputs should be, seen through the inputs that the quantized model has; (W·C)ᵀ = Cᵀ·Wt unless given.
  const aims = aimsAtReference(task);
  const wanted = aims ? task.target : undefined;
  const target = wanted ?? (await backend.matmul((aims && task.cross) || gram, w, { transposeA: true }));
  const { transform, curve } = await learn(backend, task, gram, w, target);

  const { transformed, transformedGram } = task.activations
    ? await withRoundedInputs(backend, task, transform, { gram, w, target })
    : await withExactInputs(backend, task, transform, { gram, w, target });
  const rounded = await round(backend, task, transformed, transformedGram);
  const error = await quadraticError(backend, transformedGram, rounded.values, transformed);
  backend.free(w, target === wanted ? undefined : target, transformed, transformedGram, rounded.values);
  const parts = splitRounded(rounded, grid, inFeatures, task.outFeatures, transform);
  return { parts, curve, stats: { error, ...curveStats(curve) } };
}

async function round(
  backend: Backend,
  { grid, settings, outputs }: GroupTask,
  w: Tensor,
  gram: Tensor,
): Promise<RoundedWeight> {
  if (settings.rounding === 'rtn') return backend.roundToNearest(w, grid);
  return outputs ? roundCoupled(backend, w, gram, outputs, grid) : roundCompensated(backend, w, gram, grid);
}

/**
 * Whether a group makes good what earlier groups did wrong: its target is what the reference path's outputs are, seen through
 * its own inputs. With inputs of 4 bits it is not: most of what could be told from them is their own rounding, least squares
 * answers noisy inputs by shrinking the weights, and what is least per group adds up over blocks to a model that is worse by
 * a fifth (docs/log.md).
 */
function aimsAtReference({ activations }: GroupTask): boolean {
  return activations === undefined || activations.bits > 4;
}

/** What is rounded, and what its error is measured with, both in the transformed space. */
interface Transformed {
  readonly transformed: Tensor;
  readonly transformedGram: Tensor;
}

async function withExactInputs(
  backend: Backend,
  task: GroupTask,
  transform: PairwiseTransform,
  { gram, w, target }: { gram: Tensor; w: Tensor; target: Tensor },
): Promise<Transformed> {
  const best = task.cross || task.target ? await leastSquaresWeight(backend, gram, w, target) : w;
  const transformed = await backend.transformChannels(best, transform, 'forward');
  if (best !== w) backend.free(best);
  return { transformed, transformedGram: await transformGram(backend, gram, transform) };
}

/**
 * With activations rounded after the transform, the weights meet Q(T⁻ᵀx) = T⁻ᵀx + e: the Gram matrix grows by that of e,
 * measured on a sample.
 */
async function withRoundedInputs(
  backend: Backend,
  task: GroupTask,
  transform: PairwiseTransform,
  { gram, w, target }: { gram: Tensor; w: Tensor; target: Tensor },
): Promise<Transformed> {
  const exactGram = await transformGram(backend, gram, transform);
  const noise = await roundingNoise(backend, task, transform);
  const transformedGram = noise ? await backend.addScaled(exactGram, noise, 1, true) : exactGram;
  const weight = await backend.transformChannels(w, transform, 'forward');
  if (!aimsAtReference(task)) {
    backend.free(noise);
    return { transformed: weight, transformedGram };
  }
  const aim = await backend.transformChannels(target, transform, 'forward', 'activation');
  const transformed = await leastSquaresWeight(backend, transformedGram, weight, aim);
  backend.free(noise, weight, aim);
  return { transformed, transformedGram };
}

/** eᵀe / n of the rounding of a sample of transformed inputs [in, in]. */
async function roundingNoise(
  backend: Backend,
  { sample, activations }: GroupTask,
  transform: PairwiseTransform,
): Promise<Tensor | undefined> {
  if (!sample || !activations) return undefined;
  const handle = await backend.loadTransform(transform);
  const x = await backend.upload(sample);
  const turned = await backend.rotate(x, handle);
  const rounded = await backend.quantizeRows(turned, activations);
  const error = await backend.addScaled(rounded, turned, -1, true);
  const product = await backend.matmul(error, error, { transposeA: true });
  const noise = await backend.addScaled(product, product, 1 / sample.shape[0] - 1, true);
  backend.free(x, turned, error);
  backend.release(handle);
  return noise;
}

function curveStats(curve: readonly number[]): Record<string, number> {
  return curve.length === 0 ? {} : { lossBefore: curve[0], lossAfter: Math.min(...curve) };
}

/** Learns the group's transform on a seeded sample of columns; curve relative to tr(WHWᵀ), offset so that 0 is no error. */
async function learn(
  backend: Backend,
  task: GroupTask,
  gram: Tensor,
  w: Tensor,
  target: Tensor,
): Promise<{ transform: PairwiseTransform; curve: number[] }> {
  const { settings, inFeatures, grid } = task;
  const rng = createRng(settings.seed).fork(`${task.layer}.${task.names[0]}`);
  // Rotations stay inside a grid group; per-channel grids keep the kernel's 128-channel rotation groups.
  const groupSize = rotationGroup(inFeatures, grid.groupSize);
  const pairs = xorPairs(inFeatures, groupSize, settings.krot, rng);
  const cols = w.shape[1];
  const sampled =
    cols > LEARNING_COLUMNS ? Int32Array.from(rng.permutation(cols).subarray(0, LEARNING_COLUMNS)).sort() : undefined;
  const ws = sampled ? await backend.gatherColumns(w, sampled) : w;
  const ts = sampled ? await backend.gatherColumns(target, sampled) : target;
  const norm = await quadraticForm(backend, gram, ws);
  const { transform, curve } = await learnTransform(
    backend,
    ws,
    { gram, target: ts },
    {
      channels: inFeatures,
      groupSize,
      krot: settings.krot,
      pairs,
      grid,
      steps: settings.steps,
      learningRate: LEARNING_RATE,
      learnScales: settings.scales,
    },
  );
  if (sampled) backend.free(ws, ts);
  return { transform, curve: curve.map((loss) => loss / norm + 1) };
}

/** The largest rotation group the kernels use (128) that divides the grid's group. */
export function rotationGroup(channels: number, gridGroup: number): number {
  if (gridGroup <= 128) return gridGroup;
  for (const size of [128, 64, 32, 16, 8, 4, 2]) if (channels % size === 0) return size;
  return gridGroup;
}

/** W* = (P + µW)(H + µI)⁻¹, channel-major: the weight that best reproduces the reference outputs from quantized inputs. */
async function leastSquaresWeight(backend: Backend, gram: Tensor, w: Tensor, target: Tensor): Promise<Tensor> {
  const n = gram.shape[0];
  const trace = (await backend.diagonal(gram)).reduce((sum, value) => sum + value, 0);
  const right = await backend.addScaled(target, w, (TARGET_DAMP * trace) / n);
  const rows = await backend.transpose(right);
  const solved = await backend.solveSymmetric(gram, rows, TARGET_DAMP);
  const result = await backend.transpose(solved);
  backend.free(right, rows, solved);
  return result;
}

/** T⁻ᵀ·H·T⁻¹: the Gram matrix of transformed inputs. */
export async function transformGram(backend: Backend, gram: Tensor, transform: PairwiseTransform): Promise<Tensor> {
  const left = await backend.transformChannels(gram, transform, 'forward', 'activation');
  const turned = await backend.transpose(left);
  const both = await backend.transformChannels(turned, transform, 'forward', 'activation');
  backend.free(left, turned);
  return both;
}
