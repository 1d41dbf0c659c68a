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
  cutWindows,
  evaluateText,
  remembering,
  type EvaluateOptions,
  type Predictor,
  type TextEvaluation,
  type WindowScore,
} from './perplexity.js';
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
