// Result files as the commands write them: what they say of a model, and the file of a single text.
import {
  modelFingerprint,
  summarizeModel,
  textResult,
  type ScoredDocument,
  type TextEvaluation,
} from '../evaluation/index.js';
import { RESULT_KIND, RESULT_VERSION, type EvaluationResult, type ModelResult } from '../evaluation/results.js';
import type { ModelSource } from '../models/load.js';
import type { BackendInfo } from '../ops/backend.js';
import { VERSION } from '../version.js';
import { machineInfo } from './context.js';

/** What a result says of a model. */
export async function describeModel(source: ModelSource): Promise<ModelResult> {
  const { family, parameters, bytes, bitsPerWeight, linearBitsPerWeight } = summarizeModel(source);
  return {
    name: source.name,
    family,
    fingerprint: await modelFingerprint(source),
    quantization: source.quantization ? { ...source.quantization } : null,
    parameters,
    bytes,
    bitsPerWeight,
    linearBitsPerWeight,
  };
}

/** The file of one text, scored in windows as a whole. */
export async function textResultFile(
  text: ScoredDocument,
  evaluation: TextEvaluation,
  run: { model: ModelResult; reference: ModelResult | null; backend: BackendInfo },
): Promise<EvaluationResult> {
  return {
    kind: RESULT_KIND,
    schemaVersion: RESULT_VERSION,
    version: VERSION,
    createdAt: new Date().toISOString(),
    ...run,
    machine: machineInfo(),
    settings: { activations: 'exact', headBits: 16, precision: run.backend.precision ?? 'f32' },
    evaluations: [
      {
        type: 'text',
        name: text.name,
        version: 1,
        source: { dataset: null, revision: null, split: null, files: [] },
        settings: { seqLen: evaluation.seqLen },
        ...(await textResult(evaluation, [text], false)),
      },
    ],
  };
}
