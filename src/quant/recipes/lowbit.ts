// Low-bit activations with everything here that helps them (docs/recipes/lowbit.md): rotations and smoothing as SmoothRot,
// grids of 128 channels, clip ranges searched on the outputs, GPTQ on the Gram matrix of the rounded inputs, coordinate
// descent, refitted scales, and activations on grids of 32 channels that give up their extremes.
import type { Recipe } from '../types.js';
import { quadraticError, requireGram } from '../objectives/error.js';
import { channelMajor, splitRounded } from '../weights.js';
import { roundClippedGptq, roundCompensated } from './compensated.js';

export const lowbit: Recipe = {
  name: 'lowbit',
  summary: '4-bit activations at their best: rotations, smoothing, grouped grids, compensated rounding',
  needs: 'gram',
  layout: 'gyre',
  defaults: { rotate: true, smooth: 'down', actBits: 4, actClip: 0.92, actGroupSize: 32, kvBits: 4 },
  // Descent and refits lower every candidate's error alike: the search does without.
  roundWeight: (backend, w, gram, grid, rounding = 'gptq') =>
    rounding === 'rtn' ? Promise.resolve(backend.roundToNearest(w, grid)) : roundClippedGptq(backend, w, gram, grid),
  async quantizeGroup(backend, task) {
    const gram = requireGram(task);
    const { inFeatures, outFeatures, grid } = task;
    const w = await channelMajor(backend, task.weights, inFeatures);
    const rounded =
      task.settings.rounding === 'rtn'
        ? await backend.roundToNearest(w, grid)
        : await roundCompensated(backend, w, gram, grid);
    const error = await quadraticError(backend, gram, rounded.values, w);
    backend.free(w, rounded.values);
    return { parts: splitRounded(rounded, grid, inFeatures, outFeatures), stats: { error } };
  },
};
