// The decoder's hyper-parameters: one normal form that every supported Hugging Face config maps to.

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
