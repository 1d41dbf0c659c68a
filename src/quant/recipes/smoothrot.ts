// SmoothRot (Czakó et al. 2025): QuaRot with channel scaling in front of the down projection's Hadamard transform, where
// massive activations would otherwise be spread over all channels of their token. The exponent is searched block by block.
import type { Recipe } from '../types.js';
import { symmetricRounding } from './symmetric.js';

export const smoothrot: Recipe = {
  name: 'smoothrot',
  summary: 'QuaRot with channel scaling before the down projection (SmoothRot)',
  needs: 'gram',
  layout: 'gyre',
  symmetric: true,
  defaults: { groupSize: -1, rotate: true, smooth: 'down', actBits: 4, kvBits: 4 },
  ...symmetricRounding('gptq'),
};
