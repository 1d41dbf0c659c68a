// Text generation: public exports.
export { contextLength } from '../models/config.js';
export { createBreath } from './breathe.js';
export {
  collect,
  generate,
  type GeneratedToken,
  type GenerateOptions,
  type GenerationSummary,
  type StopReason,
} from './generate.js';
export { argmax, createSampler, type Sampler, type SamplingOptions } from './sampler.js';
export {
  generateContinuously,
  type ContinuousOptions,
  type ContinuousRequest,
  type ContinuousSummary,
  type ContinuousText,
} from './continuous.js';
