// Quantization for library users: recipes, plan, pipeline and its types (`gyre/quant`).
export { sampleWindows, documentsOf, type CalibrationText, type CalibrationTokens } from './calibration/tokens.js';
export { searchClip, type ClipSearchOptions } from './grids/clip.js';
export { evaluateObjective, learnTransform, type LayerObjective, type LearnOptions } from './objectives/layer.js';
export { quadraticError } from './objectives/error.js';
export { quantizeModel } from './pipeline.js';
export { planQuantization, type GroupDecision, type Layout, type QuantizePlan } from './plan.js';
export { findRecipe, RECIPES } from './recipes/index.js';
export { memoryActivations, type ActivationStore, type Stream } from './activations.js';
export type { BlockReport, GroupReport, PipelineReport, QuantizeRun } from './run.js';
export { blockShard, REST_SHARD, type CheckpointSink } from './sink.js';
export {
  BLOCK_DEFAULTS,
  isBlockRecipe,
  type BlockGroup,
  type BlockRecipe,
  type BlockResult,
  type BlockSamples,
  type BlockSettings,
  type BlockTask,
  type GroupRecipe,
  type GroupResult,
  type GroupTask,
  type InputFold,
  type QuantizedPart,
  type QuantizeSettings,
  type Recipe,
  type Rounding,
  type StageCurve,
} from './types.js';
