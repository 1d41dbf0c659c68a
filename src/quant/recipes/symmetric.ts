// What SmoothQuant, QuaRot and SmoothRot share: weights on symmetric grids, one per output channel, their range clipped by a
// search, rounded to nearest or by GPTQ. What makes the three differ happens to the model before (prepare.ts).
import type { Backend, GridSpec, RoundedWeight, Tensor } from '../../ops/backend.js';
import { searchClipNorm } from '../grids/clip-norm.js';
import { quadraticError, requireGram } from '../objectives/error.js';
import type { GroupResult, GroupTask, Recipe, Rounding } from '../types.js';
import { channelMajor, splitRounded } from '../weights.js';
import { GPTQ_DAMP } from './gptq.js';

/** The two members of a recipe that rounds onto clipped symmetric grids, by `usual` unless settings say otherwise. */
export function symmetricRounding(usual: Rounding): Required<Pick<Recipe, 'roundWeight'>> & {
  quantizeGroup(backend: Backend, task: GroupTask): Promise<GroupResult>;
} {
  return {
    roundWeight: (backend, w, gram, grid, rounding = usual) => roundSymmetric(backend, w, gram, grid, rounding),
    async quantizeGroup(backend, task) {
      const gram = requireGram(task);
      const { inFeatures, outFeatures } = task;
      const grid = { ...task.grid, symmetric: true };
      const w = await channelMajor(backend, task.weights, inFeatures);
      const rounded = await roundSymmetric(backend, w, gram, grid, task.settings.rounding ?? usual);
      const error = await quadraticError(backend, gram, rounded.values, w);
      backend.free(w, rounded.values);
      return { parts: splitRounded(rounded, grid, inFeatures, outFeatures), stats: { error } };
    },
  };
}

async function roundSymmetric(
  backend: Backend,
  w: Tensor,
  gram: Tensor,
  grid: GridSpec,
  rounding: Rounding,
): Promise<RoundedWeight> {
  const clip = await searchClipNorm(backend, w, grid);
  if (rounding === 'rtn') return backend.roundToNearest(w, grid, clip);
  const factor = await backend.gptqFactor(gram, GPTQ_DAMP);
  const rounded = await backend.gptq(w, factor, grid, clip);
  backend.free(factor);
  return rounded;
}
