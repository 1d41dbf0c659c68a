// RTN: round to nearest on a min–max grid per group. Needs no calibration; the baseline of every table.
import type { Recipe } from '../types.js';
import { channelMajor, splitRounded } from '../weights.js';

export const rtn: Recipe = {
  name: 'rtn',
  summary: 'round to nearest, no calibration',
  needs: 'nothing',
  layout: 'awq',
  async quantizeGroup(backend, task) {
    const w = await channelMajor(backend, task.weights, task.inFeatures);
    const rounded = await backend.roundToNearest(w, task.grid);
    backend.free(w, rounded.values);
    return { parts: splitRounded(rounded, task.grid, task.inFeatures, task.outFeatures), stats: {} };
  },
};
