// The decoder's hyper-parameters: one normal form that every supported Hugging Face config maps to.
import { unreachable } from '../core/errors.js';

/** RoPE variants (Hugging Face `rope_type`). */
export type RopeScaling =
  | { readonly type: 'default' }
  | { readonly type: 'linear'; readonly factor: number }
  | { readonly type: 'dynamic'; readonly factor: number }
  | {
      readonly type: 'llama3';
      readonly factor: number;
      readonly lowFreqFactor: number;
      readonly highFreqFactor: number;
      readonly originalMaxPositions: number;
    }
  | {
      readonly type: 'yarn';
      readonly factor: number;
      readonly originalMaxPositions: number;
      readonly betaFast: number;
      readonly betaSlow: number;
      /** Factor on cos and sin; computed from `factor` when undefined. */
      readonly attentionFactor?: number;
      readonly truncate: boolean;
    };

/** Everything the decoder needs to know of a model. */
export interface ModelConfig {
  /** Family name in the table of families, e.g. `qwen3`. */
  readonly family: string;
  readonly vocabSize: number;
  readonly hiddenSize: number;
  readonly intermediateSize: number;
  readonly layers: number;
  readonly heads: number;
  readonly kvHeads: number;
  readonly headDim: number;
  readonly rmsNormEps: number;
  readonly maxPositions: number;
  readonly ropeTheta: number;
  readonly ropeScaling: RopeScaling;
  readonly tiedEmbeddings: boolean;
  /** Biases on q, k, v. */
  readonly qkvBias: boolean;
  readonly outputBias: boolean;
  readonly mlpBias: boolean;
  /** RMSNorm over each head of q and k (Qwen3). */
  readonly qkNorm: boolean;
  /** Sliding window per layer; undefined where a layer sees everything. Length `layers`. */
  readonly windows: readonly (number | undefined)[];
  readonly bosTokenId?: number;
  readonly eosTokenIds: readonly number[];
}

/**
 * Tokens a model can be trusted with in one sequence. YaRN configs give the extended context or the original one: the
 * larger counts. Dynamic NTK adapts its angles to any length, so that no length fails; its factor says what it was meant for.
 */
export function contextLength(config: Pick<ModelConfig, 'maxPositions' | 'ropeScaling'>): number {
  const { ropeScaling, maxPositions } = config;
  switch (ropeScaling.type) {
    case 'default':
    case 'linear':
    case 'llama3':
      return maxPositions;
    case 'yarn':
      return Math.max(maxPositions, Math.floor(ropeScaling.originalMaxPositions * ropeScaling.factor));
    case 'dynamic':
      return Math.max(maxPositions, Math.floor(maxPositions * ropeScaling.factor));
    default:
      return unreachable(ropeScaling);
  }
}
