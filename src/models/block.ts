// One decoder block: attention and MLP with their norms. The stages are separate functions because quantization stops
// between them; `forward` runs them all.
import type {
  Backend,
  KvCacheHandle,
  KvGrid,
  PerSequence,
  RopeHandle,
  Tensor,
  TransformHandle,
} from '../ops/backend.js';
import type { ModelConfig } from './config.js';
import type { LinearGroup } from './linear-group.js';

/** Names of the linear groups, in the order data flows through them. */
export const GROUP_NAMES = ['qkv', 'o', 'gateUp', 'down'] as const;
export type GroupName = (typeof GROUP_NAMES)[number];
/** Groups whose outputs are added to the residual stream. */
export const RESIDUAL_GROUPS: ReadonlySet<GroupName> = new Set<GroupName>(['o', 'down']);

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
  readonly start: PerSequence;
  readonly rope: RopeHandle;
  /** This block's cache; without one the chunk attends to itself. */
  readonly cache?: KvCacheHandle;
  /** Rows are packed tokens of several sequences: batch = rows, start their positions. See `AttentionOptions.ends`. */
  readonly ends?: Int32Array;
}

/** What happens to heads on the way to attention; see online.ts. */
export interface HeadsOnline {
  readonly transform?: TransformHandle;
  readonly kv?: KvGrid;
}

/** The parts of a block that are not linears: what stays as it is when the linears are replaced. */
export class BlockFrame {
  readonly backend: Backend;
  readonly config: ModelConfig;
  readonly layer: number;
  readonly norms: BlockNorms;
  readonly online: HeadsOnline;

  constructor(backend: Backend, config: ModelConfig, layer: number, norms: BlockNorms, online: HeadsOnline = {}) {
    this.backend = backend;
    this.config = config;
    this.layer = layer;
    this.norms = norms;
    this.online = online;
  }

  /** Input of the qkv group: x [rows, hidden] normalised. */
  attentionInput(x: Tensor): Tensor | Promise<Tensor> {
    return this.backend.rmsNorm(x, this.norms.input, this.config.rmsNormEps);
  }

  /**
   * Merged projections [rows, (heads + 2·kvHeads)·headDim] → input of the o group [rows, heads·headDim]. Keys and values are
   * rounded onto the block's grid, by its cache or here when there is none; not with `exact`.
   */
  async attend(qkv: Tensor, context: ChunkContext, options: { exact?: boolean } = {}): Promise<Tensor> {
    const { backend, config } = this;
    const { heads, kvHeads, headDim } = config;
    const online = options.exact ? {} : this.online;
    const split = await backend.splitHeads(qkv, {
      heads,
      kvHeads,
      headDim,
      batch: context.batch,
      start: context.start,
      rope: context.rope,
      qNorm: this.norms.q,
      kNorm: this.norms.k,
      eps: config.rmsNormEps,
      headTransform: online.transform,
    });
    const { q } = split;
    const [k, v] = await this.#asStored([split.k, split.v], context.cache ? undefined : online.kv);
    const y = await backend.attention(q, k, v, {
      heads,
      kvHeads,
      headDim,
      batch: context.batch,
      start: context.start,
      scale: headDim ** -0.5,
      window: config.windows[this.layer],
      cache: context.cache,
      ends: context.ends,
    });
    backend.free(q, k, v);
    return y;
  }

  /** Keys and values as a cache on the grid would hold them. */
  async #asStored(parts: readonly [Tensor, Tensor], grid: KvGrid | undefined): Promise<readonly [Tensor, Tensor]> {
    if (!grid) return parts;
    const { backend, config } = this;
    const rows = { bits: grid.bits, clip: grid.clip, symmetric: false, groupSize: config.headDim };
    const rounded = [await backend.quantizeRows(parts[0], rows), await backend.quantizeRows(parts[1], rows)] as const;
    backend.free(...parts);
    return rounded;
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
    this.backend.release(this.online.transform);
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
