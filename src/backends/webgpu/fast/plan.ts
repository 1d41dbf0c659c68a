// The decode plan: every dispatch of one token's step, prepared once over statically planned buffers and run again for each
// token. Nine dispatches per block (design §6): norm + rotate | qkv | attention with RoPE and cache | combine + rotate | o + residual |
// norm + rotate | gate and up | SiLU·mul + rotate | down + residual. While the context is short, attention and what follows are one.
import { ensure } from '../../../core/errors.js';
import type { DecodePlace, DecodeProgram, TokenChoice } from '../../../ops/decode.js';
import { checkBufferSize } from '../capabilities.js';
import type { GpuDevice, PreparedDispatch } from '../device.js';
import { withConstants } from '../kernel.js';
import { activationGroups, activationKernel, stagesOf, type ActivationSource } from './activations.js';
import { MOST_SEQUENCES } from './batch-products.js';
import { WHOLE_KEYS, planAttention, splitsFor } from './plan-attention.js';
import { inputTables, type PlanGroup, type PlanModel, type PlanWeight } from './plan-model.js';
import { arithmetic, planHead, planProducts } from './plan-products.js';
import { prepareRow } from './row.js';
import { RowSlices } from './row-slices.js';
import { NO_TOKEN, SAMPLE_SPAN, embedTokensKernel, samplePickKernel, sampleSpansKernel } from './sample.js';

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
    const { shuffle } = arithmetic(gpu);
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
    const splits = splitsFor(capacity, kvHeads * batch, batch >= 16 ? 512 : 256);
    // The largest of the buffers below, before any is made.
    for (const [what, bytes] of Object.entries({
      logits: batch * vocab * 4,
      activations: batch * Math.max(widest * 2, width * 4, 2 * intermediate * 4),
      'partial sums of attention': batch * attended * splits * 4,
    }))
      checkBufferSize(gpu.limits, bytes, `the ${what} of ${batch} sequences`);
    this.#tokens = make(batch * 4);
    this.#positions = make(batch * 4 + 4);
    gpu.upload(this.#positions, Uint32Array.of(capacity), batch * 4);
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
        const { row } = group;
        const buffers = { source: input, stats, gain: inputTables(group).gain, x: halves, factors };
        const sliced = slices.prepare({ source, channels, row, batch, splits, eps: model.eps, buffers });
        if (sliced) return push(...sliced);
        push(prepareRow(gpu, { source, channels, row, batch, splits, headDim, eps: model.eps, buffers }));
        return;
      }
      // A whole row's sum, and the parts of 128 channels, are work for more threads than channels.
      const threads = source === 'attention' ? 256 : 128;
      const kernel = activationKernel({ shuffle, source, stages: stagesOf(group.krot), threads, splits, headDim });
      const buffers = { source: input, stats, ...inputTables(group), x: halves, factors };
      const constant = withConstants(kernel, { channels, eps: model.eps });
      push(gpu.prepare(constant, buffers, {}, [activationGroups(channels), batch, count]));
    };
    const multiply = (
      weights: readonly PlanWeight[],
      source: Exclude<ActivationSource, 'plain'>,
      y: GPUBuffer,
      residual?: GPUBuffer,
    ): void => {
      push(...planProducts(gpu, weights, source, batch, { x: halves, factors, y, residual }));
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
      const buffers = { qkv, positions: this.#positions, parts, stats, x: halves, factors };
      const { whole, ranged } = planAttention(gpu, model, block, { batch, splits }, buffers);
      if (whole) {
        this.#short.push(whole);
        steps = [this.#long];
      }
      push(ranged);
      activate('attention', parts, block.o, attended, block.o.weights.length);
      steps = [this.#short, this.#long];
      multiply(block.o.weights, 'attention', middle, x);
      activate('norm', middle, block.gateUp, hidden, block.gateUp.weights.length);
      multiply(block.gateUp.weights, 'norm', gateUp);
      activate('silu', gateUp, block.down, intermediate, block.down.weights.length);
      multiply(block.down.weights, 'silu', x, middle);
    }
    activate('norm', x, { krot: 0, gain: model.finalNorm }, hidden, 1);
    push(...planHead(gpu, model, batch, { x: halves, factors, y: this.#logits }));
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
