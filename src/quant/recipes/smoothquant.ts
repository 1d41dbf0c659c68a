// SmoothQuant (Xiao et al. 2023): moves the outliers of activations into the weights, channel by channel, at every linear
// group, so that 8-bit grids fit both.
import type { Recipe } from '../types.js';
import { symmetricRounding } from './symmetric.js';

export const smoothquant: Recipe = {
  name: 'smoothquant',
  summary: 'activation outliers scaled into the weights at every linear (SmoothQuant)',
  needs: 'gram',
  layout: 'gyre',
  symmetric: true,
  defaults: { bits: 8, groupSize: -1, smooth: 'all', actBits: 8, kvBits: 8 },
  ...symmetricRounding('rtn'),
};
