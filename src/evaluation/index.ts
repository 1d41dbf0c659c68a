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
} from './perplexity.js';
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
