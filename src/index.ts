// gyre's public API for any JavaScript engine: models read, run, sampled from and measured. Node.js adds more: gyre/node.
export { GyreError, type ErrorCode, type GyreErrorOptions } from './core/errors.js';
export { type ProgressEvent, type ProgressListener } from './core/progress.js';
export { createRng, type Rng } from './core/rng.js';
export { type HostTensor } from './core/tensor.js';
export { BACKENDS, openBackend, type BackendName, type BackendOptions } from './backends/registry.js';
export { type Backend, type BackendInfo, type Tensor } from './ops/backend.js';
export { memoryFiles, modelFiles, type FileSource, type ModelFiles } from './formats/source.js';
export { blobFiles, urlFiles } from './formats/source.web.js';
export { loadTokenizer, type Tokenizer } from './tokenizer/index.js';
export { type ModelConfig } from './models/config.js';
export { Decoder, DecoderCache } from './models/decoder.js';
export { loadDecoder, openModel, type ModelSource } from './models/load.js';
export {
  collect,
  contextLength,
  createSampler,
  generate,
  generateContinuously,
  type ContinuousOptions,
  type ContinuousRequest,
  type ContinuousSummary,
  type ContinuousText,
  type GeneratedToken,
  type GenerateOptions,
  type GenerationSummary,
  type Sampler,
  type SamplingOptions,
  type StopReason,
} from './generate/index.js';
export {
  evaluateTasks,
  evaluateText,
  linearStatistics,
  modelFingerprint,
  parseTasks,
  remembering,
  summarizeModel,
  tokenizeTexts,
  type EvaluateOptions,
  type EvaluateTasksOptions,
  type LinearStatistics,
  type ModelSummary,
  type Predictor,
  type TasksEvaluation,
  type TextEvaluation,
} from './evaluation/index.js';
