// Mistral: Llama without biases, with one sliding window for all layers (or none).
import { TENSOR_NAMES } from './names.js';
import type { Family } from './types.js';

export const mistral: Family = {
  name: 'mistral',
  architecture: 'MistralForCausalLM',
  qkvBias: false,
  outputBias: false,
  mlpBias: false,
  qkNorm: false,
  windows: { kind: 'all', fallback: 4096 },
  defaults: { kvHeads: 8, maxPositions: 131072 },
  names: TENSOR_NAMES,
};
