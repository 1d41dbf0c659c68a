// The decode plan: every dispatch of one token's step, prepared once over statically planned buffers and run again for each
// token. Nine dispatches per block (design §6): norm + rotate | qkv | attention with RoPE and cache | combine + rotate | o + residual |
// norm + rotate | gate and up | SiLU·mul + rotate | down + residual. While the context is short, attention and what follows are one.
import { ensure } from '../../../core/errors.js';
import type { KvGrid } from '../../../ops/backend.js';
import type { DecodePlace, DecodeProgram, TokenChoice } from '../../../ops/decode.js';
import { checkBufferSize } from '../capabilities.js';
import type { BufferSlice, GpuDevice, PreparedDispatch } from '../device.js';
import { activationGroups, activationKernel, stagesOf, type ActivationSource } from './activations.js';
import { WHOLE_HEAD, wholeAttentionKernel, wholeMemory, type WholeAttentionVariant } from './attention-whole.js';
import { attentionGroups, decodeAttentionKernel } from './attention.js';
import {
  MOST_SEQUENCES,
  batchProductKind,
  batchProducts,
  denseProductKind,
  type BatchProduct,
} from './batch-products.js';
import { CHUNK, MAX_PRODUCTS, gemvBuffers, gemvGroups, gemvKernel } from './gemv.js';
import { denseGemvKernel, denseRowsPerGroup } from './gemv-dense.js';
import { prepareRow, type RowVariant } from './row.js';
import { RowSlices } from './row-slices.js';
import {
  NO_TOKEN,
  SAMPLE_SPAN,
  embedTokensKernel,
  samplePickKernel,
  sampleSpansKernel,
  type EmbeddingType,
} from './sample.js';

/** A weight in GPU memory: int4 as gemv.ts lays it out, or [out, in] in 16 bits. */
export interface PlanWeight {
  readonly kind: 'int4' | 'f16' | 'bf16';
  readonly inFeatures: number;
  readonly outFeatures: number;
  /** Of int4's grid; the input's chunk otherwise. */
  readonly groupSize: number;
  readonly codes: GPUBuffer | BufferSlice;
  /** Of int4; any buffer otherwise. */
  readonly grid: GPUBuffer | BufferSlice;
  readonly bias?: GPUBuffer;
  /** Its input comes as signed bytes; see PlanRow. */
  readonly integers?: boolean;
}

/** What happens to a group's input as a whole row, in place of rotations inside groups of channels. */
export interface PlanRow {
  readonly hadamard?: RowVariant['hadamard'];
  /** Rounds the row onto a symmetric grid; its weights are `integers`. */
  readonly grid?: { readonly top: number; readonly clip: number };
}

/** The products of one linear group and the transforms of their input. */
export interface PlanGroup {
  /** One per distinct transform, in the order of their output columns. */
  readonly weights: readonly PlanWeight[];
  /** Rotations; 0 for none. */
  readonly krot: number;
  /** [weights, channels] f32: what multiplies the input (norm weight × channel scales). */
  readonly gain: GPUBuffer;
  /** Instead of rotations, for a single weight. */
  readonly row?: PlanRow;
  /** Tables of all weights' transforms, see rotationTable. Undefined without rotations. */
  readonly table?: GPUBuffer;
}

/** One block's weights and cache. */
export interface PlanBlock {
  readonly qkv: PlanGroup;
  readonly o: PlanGroup;
  readonly gateUp: PlanGroup;
  readonly down: PlanGroup;
  /** [headDim] f32. */
  readonly qNorm?: GPUBuffer;
  readonly kNorm?: GPUBuffer;
  /** [batch, kvHeads, capacity, headDim] f16, or codes on `grid`. */
  readonly keys: GPUBuffer;
  readonly values: GPUBuffer;
  readonly grid?: KvGrid | undefined;
  /** Hadamard transform of the heads of q and k after RoPE. */
  readonly turn?: boolean;
  /** Keys seen, 0 for all. */
  readonly window: number;
}

/** A whole decoder in GPU memory. */
export interface PlanModel {
  readonly hidden: number;
  readonly intermediate: number;
  readonly heads: number;
  readonly kvHeads: number;
  readonly headDim: number;
  readonly rotaryDim: number;
  readonly vocab: number;
  readonly eps: number;
  /** [positions, rotaryDim/2] (cos, sin) f32. */
  readonly rope: GPUBuffer;
  readonly embedding: { readonly table: GPUBuffer; readonly type: EmbeddingType };
  /** [vocab, hidden] f16, or int4. */
  readonly head:
    | { readonly kind: 'f16' | 'bf16'; readonly weight: GPUBuffer }
    | { readonly kind: 'int4'; readonly weight: PlanWeight };
  /** [hidden] f32. */
  readonly finalNorm: GPUBuffer;
  readonly blocks: readonly PlanBlock[];
}

/** Options of {@link DecodePlan}. */
export interface PlanOptions {
  readonly batch: number;
  /** Tokens per sequence that the caches hold. */
  readonly capacity: number;
}

/** How to choose tokens; see samplePickKernel. */
export type PlanSampling = Pick<TokenChoice, 'temperature'> & Partial<TokenChoice>;

/** Most steps submitted at once. */
const MAX_STEPS = 64;
/** Steps whose tokens stay readable: a read may come that many later, and reads of two submissions may be under way. */
const RING = 4 * MAX_STEPS;

/** A place that nobody holds: its one token is written over and over. */
const EMPTY: DecodePlace = {
  token: 0,
  position: 0,
  end: 0,
  choice: { temperature: 0, topK: 0, topP: 1, seed: 0 },
};

/** A sequence's settings as samplePickKernel reads them. */
const settingsOf = ({ temperature, topP = 1, topK = 0 }: PlanSampling, last: number): number[] => [
  temperature,
  topP,
  topK,
  last,
];

/** Channels per grid or rotation group that the kernels take. */
export const PLAN_GROUPS: readonly number[] = [32, 64, 128];
/** Channels per head that the attention kernel takes. */
export const PLAN_HEADS: readonly number[] = [16, 32, 64, 128, 256];

/** A decoder's step, ready to run. */
export class DecodePlan implements DecodeProgram {
  /** Most sequences. */
  static readonly maxBatch = MOST_SEQUENCES;

  readonly batch: number;
  readonly capacity: number;
  readonly #gpu: GpuDevice;
  /** A step's dispatches while every sequence is short, and after that. */
  readonly #short: PreparedDispatch[] = [];
  readonly #long: PreparedDispatch[] = [];
  readonly #buffers: GPUBuffer[] = [];
  readonly #tokens: GPUBuffer;
  readonly #positions: GPUBuffer;
  readonly #settings: GPUBuffer;
  readonly #seeds: GPUBuffer;
  readonly #logits: GPUBuffer;
  readonly #history: GPUBuffer;
  /** Tokens each sequence's cache will hold when everything submitted is done. */
  readonly #lengths: number[];
  /** Where a sequence that was placed stands still; Infinity for one that was begun. */
  readonly #ends: number[];
  readonly #vocab: number;

  constructor(gpu: GpuDevice, model: PlanModel, { batch, capacity }: PlanOptions) {
    ensure(
      Number.isInteger(batch) && batch >= 1 && batch <= DecodePlan.maxBatch,
      'unsupported',
      () => `the decode plan takes from 1 to ${DecodePlan.maxBatch} sequences, found ${batch}`,
      'decode fewer sequences at once',
    );
    this.#gpu = gpu;
    this.batch = batch;
    this.capacity = capacity;
    this.#lengths = new Array<number>(batch).fill(0);
    this.#ends = new Array<number>(batch).fill(0);
    this.#vocab = model.vocab;
    const { hidden, intermediate, heads, kvHeads, headDim, vocab } = model;
    const { capabilities } = gpu;
    const f16 = capabilities.f16;
    const shuffle = (capabilities.subgroups?.min ?? 0) >= 32;
    const make = (bytes: number): GPUBuffer => {
      const buffer = gpu.buffer(bytes, 'the decode plan');
      this.#buffers.push(buffer);
      return buffer;
    };
    const width = (heads + 2 * kvHeads) * headDim;
    const attended = heads * headDim;
    // Widest input, times the transforms of its group.
    const widest = Math.max(
      ...model.blocks.flatMap((b) =>
        [b.qkv, b.o, b.gateUp, b.down].map((g) => g.weights.length * g.weights[0].inFeatures),
      ),
      hidden,
    );
    const several = batchProductKind(gpu, batch);
    const splits = splitsFor(capacity, kvHeads * batch, batch >= 16 ? 512 : 256);
    // The largest of the buffers below, before any is made.
    for (const [what, bytes] of Object.entries({
      logits: batch * vocab * 4,
      activations: batch * Math.max(widest * 2, width * 4, 2 * intermediate * 4),
      'partial sums of attention': batch * attended * splits * 4,
    }))
      checkBufferSize(gpu.limits, bytes, `the ${what} of ${batch} sequences`);
    this.#tokens = make(batch * 4);
    this.#positions = make(batch * 4);
    this.#settings = make(batch * 16);
    this.#seeds = make(batch * 4);
    const [x, middle] = [make(batch * hidden * 4), make(batch * hidden * 4)];
    const halves = make(batch * widest * 2);
    const factors = make((batch * widest) / 4);
    const qkv = make(batch * width * 4);
    const parts = make(batch * attended * splits * 4);
    const stats = make(batch * heads * splits * 8);
    const gateUp = make(batch * 2 * intermediate * 4);
    this.#logits = make(batch * vocab * 4);
    this.#history = make(RING * batch * 4);
    const spanCount = Math.ceil(vocab / SAMPLE_SPAN);
    const spans = make(batch * spanCount * 16);

    const slices = new RowSlices(gpu, make);
    let steps = [this.#short, this.#long];
    const push = (...dispatches: PreparedDispatch[]): void => {
      for (const step of steps) step.push(...dispatches);
    };
    const activate = (
      source: ActivationSource,
      input: GPUBuffer,
      group: Omit<PlanGroup, 'weights'>,
      channels: number,
      count: number,
    ): void => {
      if (group.row) {
        const { row, gain } = group;
        const buffers = { source: input, stats, gain, x: halves, factors };
        const sliced = slices.prepare({ source, channels, row, batch, splits, eps: model.eps, buffers });
        if (sliced) return push(...sliced);
        push(prepareRow(gpu, { source, channels, row, batch, splits, headDim, eps: model.eps, buffers }));
        return;
      }
      // A whole row's sum, and the parts of 128 channels, are work for more threads than channels.
      const threads = source === 'attention' ? 256 : 128;
      const kernel = activationKernel({ shuffle, source, stages: stagesOf(group.krot), threads, splits, headDim });
      const buffers = { source: input, stats, gain: group.gain, table: group.table ?? group.gain, x: halves, factors };
      push(gpu.prepare(kernel, buffers, { channels, eps: model.eps }, [activationGroups(channels), batch, count]));
    };
    const multiply = (
      weights: readonly PlanWeight[],
      source: BatchProduct['source'],
      y: GPUBuffer,
      residual?: GPUBuffer,
    ): void => {
      const stride = weights.reduce((sum, w) => sum + w.outFeatures, 0);
      const [{ kind, inFeatures, integers = false }] = weights;
      const chunks = inFeatures / CHUNK;
      const batched = kind === 'int4' && !batches(weights[0]) ? undefined : several;
      // 16-bit weights have no GEMV with a residual or bias: a product of several rows reads them as fast.
      const product = batched ?? (kind === 'int4' ? undefined : denseProductKind(gpu));
      const most = product ? 1 : MAX_PRODUCTS;
      let [column, done] = [0, 0];
      for (const run of runsOf(weights, residual !== undefined, most, gpu.limits.maxStorageBuffersPerShaderStage)) {
        const [{ outFeatures, groupSize, codes, grid, bias }] = run;
        const outs = run.map((w) => w.outFeatures);
        const rows = outs.reduce((sum, out) => sum + out, 0);
        const variant = {
          f16,
          shuffle,
          batch,
          groupSize,
          residual: residual !== undefined,
          bias: bias !== undefined,
          integers,
          products: run.length,
          ...gemvShape(rows, inFeatures, batch),
        };
        const buffers = {
          w: codes,
          grid,
          x: halves,
          factors,
          y,
          residual: residual ?? grid,
          bias: bias ?? grid,
        };
        const params = { chunks, outFeatures, stride, column, first: done * batch * chunks };
        column += rows;
        done += run.length;
        if (product) {
          push(...batchProducts(gpu, product, { ...variant, weights: kind, source, buffers, params }));
          continue;
        }
        const named = {
          ...buffers,
          ...numbered('w', run, (w) => w.codes),
          ...numbered('grid', run, (w) => w.grid),
          ...numbered('bias', run, (w) => w.bias ?? w.grid),
        };
        const sizes = { ...params, ...numbered('outFeatures', run, (w) => w.outFeatures) };
        push(gpu.prepare(gemvKernel(variant), named, sizes, groupsOf(gemvGroups(variant, outs))));
      }
    };

    push(
      gpu.prepare(
        embedTokensKernel(model.embedding.type),
        { tokens: this.#tokens, table: model.embedding.table, x },
        { hidden, vocab },
        [Math.ceil(hidden / 256), batch],
      ),
    );
    for (const block of model.blocks) {
      activate('norm', x, block.qkv, hidden, block.qkv.weights.length);
      multiply(block.qkv.weights, 'norm', qkv);
      const cached = {
        qkv,
        qNorm: block.qNorm ?? x,
        kNorm: block.kNorm ?? x,
        rope: model.rope,
        positions: this.#positions,
        keys: block.keys,
        values: block.values,
      };
      const scale = headDim ** -0.5;
      const attention = {
        shuffle,
        heads,
        kvHeads,
        headDim,
        rotaryDim: model.rotaryDim,
        qkNorm: block.qNorm !== undefined,
        window: block.window,
      };
      // That kernel ends with o's rotations inside a head.
      const { grid, turn } = block;
      const whole =
        block.o.row || grid || turn
          ? undefined
          : wholeVariant({ ...attention, stages: stagesOf(block.o.krot) }, batch, gpu.limits);
      if (whole) {
        steps = [this.#short];
        const table = block.o.table ?? block.o.gain;
        push(
          gpu.prepare(
            wholeAttentionKernel(whole),
            { ...cached, gain: block.o.gain, table, x: halves, factors },
            { capacity, channels: attended, scale, eps: model.eps },
            [heads, batch],
          ),
        );
        steps = [this.#long];
      }
      const ranged = { ...attention, splits, grid, turn, ...attentionShape(heads / kvHeads) };
      push(
        gpu.prepare(
          decodeAttentionKernel(ranged),
          { ...cached, out: parts, stats },
          { capacity, scale, eps: model.eps },
          attentionGroups(ranged, batch),
        ),
      );
      activate('attention', parts, block.o, attended, block.o.weights.length);
      steps = [this.#short, this.#long];
      multiply(block.o.weights, 'attention', middle, x);
      activate('norm', middle, block.gateUp, hidden, block.gateUp.weights.length);
      multiply(block.gateUp.weights, 'norm', gateUp);
      activate('silu', gateUp, block.down, intermediate, block.down.weights.length);
      multiply(block.down.weights, 'silu', x, middle);
    }
    activate('norm', x, { krot: 0, gain: model.finalNorm }, hidden, 1);
    if (model.head.kind === 'int4') {
      multiply([model.head.weight], 'norm', this.#logits);
    } else if (several) {
      const { kind: weights, weight } = model.head;
      const unused = { grid: weight, residual: weight, bias: weight };
      push(
        ...batchProducts(gpu, several, {
          batch,
          weights,
          groupSize: CHUNK,
          residual: false,
          bias: false,
          source: 'norm',
          buffers: { w: weight, x: halves, factors, y: this.#logits, ...unused },
          params: { chunks: hidden / CHUNK, outFeatures: vocab, stride: vocab, column: 0, first: 0 },
        }),
      );
    } else {
      const variant = { f16, shuffle, rows: 4, teams: 4, batch, weights: model.head.kind };
      push(
        gpu.prepare(
          denseGemvKernel(variant),
          { w: model.head.weight, x: halves, factors, y: this.#logits },
          { words: hidden / 8, outFeatures: vocab },
          groupsOf(Math.ceil(vocab / denseRowsPerGroup(variant))),
        ),
      );
    }
    push(
      gpu.prepare(sampleSpansKernel, { logits: this.#logits, settings: this.#settings, spans }, { vocab }, [
        spanCount,
        batch,
      ]),
    );
    push(
      gpu.prepare(
        samplePickKernel,
        {
          logits: this.#logits,
          settings: this.#settings,
          seeds: this.#seeds,
          spans,
          tokens: this.#tokens,
          positions: this.#positions,
          history: this.#history,
        },
        { vocab, spanCount, batch, ring: RING },
        [batch],
      ),
    );
  }

  /** The dispatches of the next step, in order. */
  get dispatches(): readonly PreparedDispatch[] {
    return this.#lengths.every((length) => length < WHOLE_KEYS) ? this.#short : this.#long;
  }

  /** Sets each sequence's next input token, the tokens its cache holds, and how to choose what follows. */
  begin(tokens: Uint32Array, positions: Uint32Array, sampling: readonly PlanSampling[]): void {
    const { batch } = this;
    ensure(
      tokens.length === batch && positions.length === batch && sampling.length === batch,
      'usage',
      () => `a plan for ${batch} sequences was begun with ${tokens.length}`,
    );
    for (let b = 0; b < batch; b++) [this.#lengths[b], this.#ends[b]] = [positions[b], Infinity];
    this.#gpu.upload(this.#tokens, tokens);
    this.#gpu.upload(this.#positions, positions);
    this.#gpu.upload(this.#settings, Float32Array.from(sampling.flatMap((s) => settingsOf(s, this.capacity))));
    this.#gpu.upload(
      this.#seeds,
      Uint32Array.from(sampling, (s) => s.seed ?? 0),
    );
  }

  /** See DecodeProgram.place. @throws GyreError `context-length` for an end that the caches have no entry behind. */
  place(sequence: number, place: DecodePlace | undefined): void {
    ensure(sequence >= 0 && sequence < this.batch, 'usage', () => `no sequence ${sequence} of ${this.batch}`);
    const { token, position, end, choice } = place ?? EMPTY;
    ensure(
      position <= end && end < this.capacity,
      'context-length',
      () => `a sequence from ${position} to ${end} tokens does not fit caches of ${this.capacity}`,
    );
    [this.#lengths[sequence], this.#ends[sequence]] = [position, end];
    this.#gpu.upload(this.#tokens, Uint32Array.of(token), 4 * sequence);
    this.#gpu.upload(this.#positions, Uint32Array.of(position), 4 * sequence);
    this.#gpu.upload(this.#settings, Float32Array.from(settingsOf(choice, end)), 16 * sequence);
    this.#gpu.upload(this.#seeds, Uint32Array.of(choice.seed), 4 * sequence);
  }

  /**
   * Submits `count` steps at once: each reads the input tokens, appends to the caches and chooses the next tokens, which become the
   * next input. The promise gives the chosen tokens [count, batch]; more steps may be submitted before it settles.
   * @throws GyreError `context-length` for steps past the end of the caches, `non-finite` for logits without a finite maximum.
   */
  async steps(count: number): Promise<Uint32Array> {
    ensure(count >= 1 && count <= MAX_STEPS, 'usage', () => `from 1 to ${MAX_STEPS} steps at once, not ${count}`);
    const { batch } = this;
    // Where each sequence's tokens of these steps will lie in the ring.
    const slots: number[] = [];
    for (let i = 0; i < count; i++) {
      slots.push(...this.#lengths.map((position) => position % RING));
      this.#advance();
    }
    const ring = new Uint32Array(await this.#gpu.read(this.#history, 0, RING * batch * 4));
    const out = new Uint32Array(count * batch);
    for (const [i, slot] of slots.entries()) out[i] = ring[slot * batch + (i % batch)];
    ensure(
      !out.includes(NO_TOKEN),
      'non-finite',
      'the logits hold no finite maximum: the weights or the caches are damaged, or values left the range of f16',
      'check the checkpoint with gyre inspect, or decode with --device cpu',
    );
    return out;
  }

  /** Submits one step without reading its tokens back. */
  run(): void {
    this.#advance();
    this.#gpu.flush();
  }

  /** Records a step. */
  #advance(): void {
    const { capacity } = this;
    ensure(
      this.#lengths.every((length) => length < capacity),
      'context-length',
      () => `the caches hold ${capacity} tokens, and all are there`,
    );
    this.#gpu.run(this.dispatches);
    for (const [b, length] of this.#lengths.entries()) this.#lengths[b] = Math.min(length + 1, this.#ends[b]);
  }

  /** The logits of the last step [batch, vocab]. */
  async logits(): Promise<Float32Array> {
    return new Float32Array(await this.#gpu.read(this.#logits, 0, this.batch * this.#vocab * 4));
  }

  /** Frees the plan's own buffers; weights and caches are the model's. */
  release(): void {
    for (const buffer of this.#buffers.splice(0)) this.#gpu.release(buffer);
  }
}

/** Most sequences where products take them one by one. */
export const FEW_SEQUENCES = 8;

/** Whether kernels for several sequences at once take a weight: neither codes of activations nor one grid per output. */
export const batches = ({ integers, groupSize }: Pick<PlanWeight, 'integers' | 'groupSize'>): boolean =>
  !integers && PLAN_GROUPS.includes(groupSize);

/** Values of a dispatch's products by the names of its buffers or parameters: `w`, `w1`, `w2`. */
function numbered<N extends string, T>(
  name: N,
  run: readonly PlanWeight[],
  value: (weight: PlanWeight) => T,
): Record<N, T> {
  return Object.fromEntries(run.map((weight, i) => [i === 0 ? name : `${name}${i}`, value(weight)])) as Record<N, T>;
}

/** Weights of one input by dispatch: up to `most` together that have bindings enough, and are alike. */
function runsOf(weights: readonly PlanWeight[], residual: boolean, most: number, bindings: number): PlanWeight[][] {
  const runs: PlanWeight[][] = [];
  for (const weight of weights) {
    const last = runs.at(-1);
    const bias = weight.bias !== undefined;
    const fits =
      last &&
      last.length < most &&
      gemvBuffers({ bias, residual, products: last.length + 1 }) <= bindings &&
      last[0].kind === weight.kind &&
      last[0].groupSize === weight.groupSize &&
      (last[0].bias !== undefined) === bias;
    if (fits) last.push(weight);
    else runs.push([weight]);
  }
  return runs;
}

/** Workgroups over x and y. */
function groupsOf(count: number): [number, number] {
  const y = Math.ceil(count / 65535);
  return [Math.ceil(count / y), y];
}

/** Keys up to which a head's attention in one workgroup is quicker than many, and their combination. */
const WHOLE_KEYS = 1024;

/** Workgroups of wholeAttentionKernel up to which they run at once on a large GPU. */
const WHOLE_GROUPS = 128;

/** The variant of wholeAttentionKernel for a model's attention, where the kernel takes it and the device has room for it. */
function wholeVariant(
  shape: Omit<WholeAttentionVariant, 'teams' | 'unroll'> & { readonly headDim: number },
  batch: number,
  limits: GPUSupportedLimits,
): WholeAttentionVariant | undefined {
  if (shape.headDim !== WHOLE_HEAD || shape.heads * batch > WHOLE_GROUPS) return undefined;
  for (const teams of [16, 8]) {
    const variant = { ...shape, teams, unroll: 4 };
    if (
      teams * 32 <= limits.maxComputeInvocationsPerWorkgroup &&
      wholeMemory(variant) <= limits.maxComputeWorkgroupStorageSize
    )
      return variant;
  }
  return undefined;
}

/** How attention shares its work: up to four query heads per workgroup, as many as keep the accumulators in registers. */
export function attentionShape(group: number): { together: number; teams: number; unroll: number } {
  return { together: [4, 3, 2].find((n) => group % n === 0) ?? 1, teams: 4, unroll: 4 };
}

/** Ranges of keys: enough workgroups for short contexts to be quick, ranges of at least 64 keys. */
export function splitsFor(capacity: number, workgroups: number, fill = 256): number {
  const wanted = Math.ceil(fill / workgroups);
  return Math.max(1, Math.min(wanted, Math.ceil(capacity / 64), 48));
}

/** Rows per team and teams per row, from timing (bench/webgpu-kernels.ts): enough teams to fill the GPU, then fewer, busier ones. */
export function gemvShape(
  outFeatures: number,
  inFeatures: number,
  batch: number,
): { rows: number; teams: number; split: number } {
  if (batch > 1) {
    const rows = batch <= 2 ? 4 : 2;
    return { rows, teams: 4, split: outFeatures / rows >= 3000 ? 1 : 2 };
  }
  if (outFeatures >= 16384) return { rows: 8, teams: 4, split: 1 };
  const rows = 4;
  const most = Math.max(1, inFeatures / CHUNK / 32);
  let split = 1;
  while (split < 4 && split * 2 <= most && (outFeatures / rows) * split < 3000) split *= 2;
  return { rows, teams: 4, split };
}
