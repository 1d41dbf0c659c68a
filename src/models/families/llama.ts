// Llama 1 to 3.x, and what was distilled into their shape.
import { TENSOR_NAMES } from './names.js';
import type { Family } from './types.js';

export const llama: Family = {
  name: 'llama',
  architecture: 'LlamaForCausalLM',
  qkvBias: 'attention_bias',
  outputBias: 'attention_bias',
  mlpBias: 'mlp_bias',
  qkNorm: false,
  windows: { kind: 'none' },
  defaults: { maxPositions: 2048 },
  names: TENSOR_NAMES,
};
