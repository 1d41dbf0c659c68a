// Text generation: public exports.
export {
  collect,
  contextLength,
  generate,
  generateBatch,
  type GenerateBatchOptions,
  type GeneratedText,
  type GeneratedToken,
  type GenerateOptions,
  type GenerationSummary,
  type StopReason,
} from './generate.js';
export { argmax, createSampler, type Sampler, type SamplingOptions } from './sampler.js';
