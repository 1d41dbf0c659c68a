// Measuring models: public exports (`gyre/evaluation`).
export {
  linearStatistics,
  modelFingerprint,
  summarizeModel,
  type DtypeSummary,
  type LinearStatistics,
  type ModelSummary,
} from './inspect.js';
export {
  evaluateText,
  remembering,
  type EvaluateOptions,
  type Predictor,
  type TextEvaluation,
  type WindowScore,
} from './perplexity.js';
export { cutWindows, type ProtocolOptions, type StartPlacement, type TextWindow } from './windows.js';
export {
  evaluateDrift,
  type DriftEvaluation,
  type DriftOptions,
  type LengthDrift,
  type PositionDrift,
  type TaskDrift,
} from './drift.js';
export * from './tasks/index.js';
export {
  evaluateTasks,
  judge,
  parseTasks,
  taskPrompt,
  type AnsweredTask,
  type EvaluateTasksOptions,
  type KindAccuracy,
  type TasksEvaluation,
} from './tasks-eval.js';
export { parseTextFile, tokenizeTexts } from './text.js';
export { equivalent } from './answers/equivalence.js';
export { evaluateChoices, type ChoicesEvaluation, type EvaluateChoicesOptions } from './choices.js';
export { compareResults, parseResult, type Comparison, type MetricComparison } from './compare.js';
export { parseTaskDefinition, TASK_LIMITS, type TaskDefinition } from './definition.js';
export { metric, pairedBootstrap, type PairedDifference } from './metrics.js';
export {
  choiceItems,
  completionItems,
  drawnWindows,
  generationItems,
  taskTexts,
  type ChoiceItem,
  type GenerationItem,
} from './items.js';
export { judgeText, type Verdict } from './judge.js';
export { encodePair, scoreContinuations, type Likelihood, type LikelihoodRequest } from './likelihood.js';
export { evaluateReasoning, type EvaluateReasoningOptions, type Transcript } from './reasoning.js';
export { type RequestCache } from './request-cache.js';
export { resultSchema, type Evaluation, type EvaluationResult, type Metric, type ModelResult } from './results.js';
export { readRows, type Row } from './rows.js';
export { textResult, type ScoredDocument } from './text-result.js';
