// GPTQ (Frantar et al. 2022): rounds one input channel at a time and spreads its error over the channels not yet rounded.
import type { Recipe } from '../types.js';
import { quadraticError, requireGram } from '../objectives/error.js';
import { channelMajor, splitRounded } from '../weights.js';

/** Share of the mean diagonal added to H before it is inverted (the method's published default). */
export const GPTQ_DAMP = 0.01;

export const gptq: Recipe = {
  name: 'gptq',
  summary: 'error-compensated rounding (GPTQ)',
  needs: 'gram',
  layout: 'awq',
  async quantizeGroup(backend, task) {
    const gram = requireGram(task);
    const w = await channelMajor(backend, task.weights, task.inFeatures);
    const factor = await backend.gptqFactor(gram, GPTQ_DAMP);
    const rounded = await backend.gptq(w, factor, task.grid);
    const error = await quadraticError(backend, gram, rounded.values, w);
    backend.free(factor, w, rounded.values);
    return { parts: splitRounded(rounded, task.grid, task.inFeatures, task.outFeatures), stats: { error } };
  },
};
