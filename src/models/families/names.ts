// Tensor names of checkpoints: the ones Llama chose and every supported family kept.

/** Where a checkpoint keeps each part of a decoder. */
export interface TensorNames {
  /** Tensor of token embeddings, [vocab, hidden]. */
  readonly embedding: string;
  /** Tensor of the last norm, [hidden]. */
  readonly finalNorm: string;
  /** Tensor of the output head, [vocab, hidden]; checkpoints with tied embeddings leave it out. */
  readonly head: string;
  /** Prefix of a block's modules. */
  readonly block: (layer: number) => string;
  /** Norms of a block, as modules below its prefix. */
  readonly inputNorm: string;
  readonly postAttentionNorm: string;
  /** Norms over each head of q and k, in families that have them. */
  readonly qNorm: string;
  readonly kNorm: string;
  /** Linears of a block by group, in merged order, as modules below its prefix. */
  readonly groups: Readonly<Record<'qkv' | 'o' | 'gateUp' | 'down', readonly string[]>>;
}

export const TENSOR_NAMES: TensorNames = {
  embedding: 'model.embed_tokens.weight',
  finalNorm: 'model.norm.weight',
  head: 'lm_head.weight',
  block: (layer) => `model.layers.${layer}`,
  inputNorm: 'input_layernorm',
  postAttentionNorm: 'post_attention_layernorm',
  qNorm: 'self_attn.q_norm',
  kNorm: 'self_attn.k_norm',
  groups: {
    qkv: ['self_attn.q_proj', 'self_attn.k_proj', 'self_attn.v_proj'],
    o: ['self_attn.o_proj'],
    gateUp: ['mlp.gate_proj', 'mlp.up_proj'],
    down: ['mlp.down_proj'],
  },
};
