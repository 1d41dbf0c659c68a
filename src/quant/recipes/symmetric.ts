// What SmoothQuant, QuaRot and SmoothRot share: weights on symmetric grids, one per output channel, their range clipped by a
// search, rounded to nearest or by GPTQ. What makes the three differ happens to the model before (prepare.ts).
import type { Backend } from '../../ops/backend.js';
import { searchClipNorm } from '../grids/clip-norm.js';
import { quadraticError, requireGram } from '../objectives/error.js';
import type { GroupResult, GroupTask, Rounding } from '../types.js';
import { channelMajor, splitRounded } from '../weights.js';
import { GPTQ_DAMP } from './gptq.js';

/** Rounds a group's weights onto clipped symmetric grids. */
export async function roundSymmetric(backend: Backend, task: GroupTask, rounding: Rounding): Promise<GroupResult> {
  const gram = requireGram(task);
  const { inFeatures, outFeatures } = task;
  const grid = { ...task.grid, symmetric: true };
  const w = await channelMajor(backend, task.weights, inFeatures);
  const clip = await searchClipNorm(backend, w, grid);
  const factor = rounding === 'gptq' ? await backend.gptqFactor(gram, GPTQ_DAMP) : undefined;
  const rounded = factor ? await backend.gptq(w, factor, grid, clip) : await backend.roundToNearest(w, grid, clip);
  const error = await quadraticError(backend, gram, rounded.values, w);
  backend.free(w, factor, rounded.values);
  return { parts: splitRounded(rounded, grid, inFeatures, outFeatures), stats: { error } };
}
