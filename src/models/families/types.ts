// What a model family is: data that turns a Hugging Face config and checkpoint into gyre's one decoder.
import type { TensorNames } from './names.js';

/** A bias is always there, never, or as a flag of the config says. */
export type BiasRule = boolean | 'attention_bias' | 'mlp_bias';

/** How a config's sliding window spreads over the layers. */
export type WindowRule =
  /** No layer has one. */
  | { readonly kind: 'none' }
  /** All layers, when `sliding_window` is a number; `fallback` is Transformers' default for an absent field. */
  | { readonly kind: 'all'; readonly fallback: number }
  /** Only with `use_sliding_window`, and there by `layer_types` or from layer `max_window_layers` on. */
  | { readonly kind: 'by-layer'; readonly fallback: number; readonly fallbackFullLayers: number };

/** One model family. */
export interface Family {
  /** Also the config's `model_type`. */
  readonly name: string;
  /** Entry of the config's `architectures`. */
  readonly architecture: string;
  readonly qkvBias: BiasRule;
  readonly outputBias: BiasRule;
  readonly mlpBias: BiasRule;
  readonly qkNorm: boolean;
  readonly windows: WindowRule;
  /** Transformers' defaults for fields that a config leaves out. */
  readonly defaults: {
    /** `num_key_value_heads`; undefined: as many as heads. */
    readonly kvHeads?: number;
    /** `head_dim`; undefined: hidden size / heads. */
    readonly headDim?: number;
    readonly maxPositions: number;
  };
  readonly names: TensorNames;
}
