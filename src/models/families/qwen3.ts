// Qwen3 (dense): RMSNorm over each head of q and k, a head size of its own.
import { TENSOR_NAMES } from './names.js';
import type { Family } from './types.js';

export const qwen3: Family = {
  name: 'qwen3',
  architecture: 'Qwen3ForCausalLM',
  qkvBias: 'attention_bias',
  outputBias: 'attention_bias',
  mlpBias: false,
  qkNorm: true,
  windows: { kind: 'by-layer', fallback: 4096, fallbackFullLayers: 28 },
  defaults: { kvHeads: 32, headDim: 128, maxPositions: 32768 },
  names: TENSOR_NAMES,
};
