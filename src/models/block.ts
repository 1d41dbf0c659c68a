// One decoder block: attention and MLP with their norms. The stages are separate functions because quantization stops
// between them; `forward` runs them all.
import type { Backend, KvCacheHandle, RopeHandle, Tensor } from '../ops/backend.js';
import type { ModelConfig } from './config.js';
import type { LinearGroup } from './linear-group.js';

/** Names of the linear groups, in the order data flows through them. */
export const GROUP_NAMES = ['qkv', 'o', 'gateUp', 'down'] as const;
export type GroupName = (typeof GROUP_NAMES)[number];

/** Norm weights of a block. */
export interface BlockNorms {
  readonly input: Tensor;
  readonly postAttention: Tensor;
  readonly q?: Tensor;
  readonly k?: Tensor;
}

/** Where a chunk of tokens stands. */
export interface ChunkContext {
  readonly batch: number;
  /** Tokens of each sequence before this chunk. */
  readonly start: number;
  readonly rope: RopeHandle;
  /** This block's cache; without one the chunk attends to itself. */
  readonly cache?: KvCacheHandle;
}

/** The parts of a block that are not linears: what stays as it is when the linears are replaced. */
export class BlockFrame {
  readonly backend: Backend;
  readonly config: ModelConfig;
  readonly layer: number;
  readonly norms: BlockNorms;

  constructor(backend: Backend, config: ModelConfig, layer: number, norms: BlockNorms) {
    this.backend = backend;
    this.config = config;
    this.layer = layer;
    this.norms = norms;
  }

  /** Input of the qkv group: x [rows, hidden] normalised. */
  attentionInput(x: Tensor): Tensor | Promise<Tensor> {
    return this.backend.rmsNorm(x, this.norms.input, this.config.rmsNormEps);
  }

  /** Merged projections [rows, (heads + 2·kvHeads)·headDim] → input of the o group [rows, heads·headDim]. */
  async attend(qkv: Tensor, context: ChunkContext): Promise<Tensor> {
    const { backend, config } = this;
    const { heads, kvHeads, headDim } = config;
    const { q, k, v } = await backend.splitHeads(qkv, {
      heads,
      kvHeads,
      headDim,
      batch: context.batch,
      start: context.start,
      rope: context.rope,
      qNorm: this.norms.q,
      kNorm: this.norms.k,
      eps: config.rmsNormEps,
    });
    const y = await backend.attention(q, k, v, {
      heads,
      kvHeads,
      headDim,
      batch: context.batch,
      start: context.start,
      scale: headDim ** -0.5,
      window: config.windows[this.layer],
      cache: context.cache,
    });
    backend.free(q, k, v);
    return y;
  }

  /** Input of the gate/up group. */
  mlpInput(x: Tensor): Tensor | Promise<Tensor> {
    return this.backend.rmsNorm(x, this.norms.postAttention, this.config.rmsNormEps);
  }

  /** Merged gate and up [rows, 2·intermediate] → input of the down group [rows, intermediate]. */
  activate(gateUp: Tensor): Tensor | Promise<Tensor> {
    return this.backend.siluMul(gateUp);
  }

  release(): void {
    this.backend.free(this.norms.input, this.norms.postAttention, this.norms.q, this.norms.k);
  }
}

/** A whole decoder block. */
export class DecoderBlock {
  readonly frame: BlockFrame;
  readonly groups: Readonly<Record<GroupName, LinearGroup>>;

  constructor(frame: BlockFrame, groups: Readonly<Record<GroupName, LinearGroup>>) {
    this.frame = frame;
    this.groups = groups;
  }

  /** Residual stream x [rows, hidden] → after this block. `x` is not freed. */
  async forward(x: Tensor, context: ChunkContext): Promise<Tensor> {
    const { frame, groups } = this;
    const { backend } = frame;
    const normed = await frame.attentionInput(x);
    const qkv = await groups.qkv.forward(normed);
    backend.free(normed);
    const attended = await frame.attend(qkv, context);
    backend.free(qkv);
    const middle = await groups.o.forward(attended, x);
    backend.free(attended);
    const mlpIn = await frame.mlpInput(middle);
    const gateUp = await groups.gateUp.forward(mlpIn);
    backend.free(mlpIn);
    const activated = await frame.activate(gateUp);
    backend.free(gateUp);
    const y = await groups.down.forward(activated, middle);
    backend.free(activated, middle);
    return y;
  }

  release(): void {
    this.frame.release();
    for (const group of Object.values(this.groups)) group.release();
  }
}
