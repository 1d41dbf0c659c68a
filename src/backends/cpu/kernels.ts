// The CPU kernels as TypeScript functions over plain arrays: each stages its operands in the arena, runs the WebAssembly
// kernel over the pool's threads and copies results out. What is used again (weights, objectives) stays in the arena.
export { KernelPool, LONG_SPIN, SHORT_SPIN, type PoolOptions } from './pool.js';
export { Arena, type ArenaFloats, type Floats, type Pointer } from './wasm/arena.js';
export {
  transformChannels,
  rotationTable,
  fakeQuantize,
  transpose,
  addScaled,
  dot,
  type RotationSpec,
  type QuantizedMatrix,
  type FakeQuantizeOutputs,
} from './wasm/transform-kernels.js';
export { ObjectiveKernel, type ObjectiveSpec } from './wasm/objective-kernel.js';
export { gptqBlock, gptqBlocks, type GptqBlockArguments } from './wasm/gptq-kernel.js';
export { descentBlock, type DescentBlockArguments } from './wasm/descent-kernel.js';
export { cholesky, invertLower } from './wasm/linalg-kernels.js';
export { encodeRows, QuantizedKvCache, quantizeRows, RowHadamard } from './wasm/activation-kernels.js';
export {
  attention,
  attentionForest,
  KvCache,
  rmsNorm,
  RopeTable,
  RowTransform,
  score,
  siluMul,
  splitHeads,
  type AttentionArguments,
  type ForestArguments,
  type LogitScores,
  type SplitHeadsArguments,
} from './wasm/forward-kernels.js';
export { MAX_GEMV_ROWS, PackedLinear } from './wasm/packed-linear.js';
export {
  adamW,
  attentionGradient,
  elementLoss,
  freeGrid,
  logitLoss,
  rmsNormGradient,
  rotateGradient,
  scaleGroups,
  siluMulGradient,
  splitHeadsGradient,
  sumGroups,
} from './wasm/gradient-kernels.js';
