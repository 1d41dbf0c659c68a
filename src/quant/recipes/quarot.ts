// QuaRot (Ashkboos et al. 2024): randomised Hadamard rotations of residual stream, heads and MLP leave no activation
// outliers, so that weights, activations and key/value cache fit 4 bits.
import type { Recipe } from '../types.js';
import { symmetricRounding } from './symmetric.js';

export const quarot: Recipe = {
  name: 'quarot',
  summary: 'Hadamard rotations; 4-bit weights, activations and key/value cache (QuaRot)',
  needs: 'gram',
  layout: 'gyre',
  symmetric: true,
  defaults: { groupSize: -1, rotate: true, actBits: 4, kvBits: 4 },
  ...symmetricRounding('gptq'),
};
