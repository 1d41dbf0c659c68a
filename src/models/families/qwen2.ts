// Qwen2 and Qwen2.5: biases on q, k and v; optional sliding windows in the upper layers.
import { TENSOR_NAMES } from './names.js';
import type { Family } from './types.js';

export const qwen2: Family = {
  name: 'qwen2',
  architecture: 'Qwen2ForCausalLM',
  qkvBias: true,
  outputBias: false,
  mlpBias: false,
  qkNorm: false,
  windows: { kind: 'by-layer', fallback: 4096, fallbackFullLayers: 28 },
  defaults: { kvHeads: 32, maxPositions: 32768 },
  names: TENSOR_NAMES,
};
