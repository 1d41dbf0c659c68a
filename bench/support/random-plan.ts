// A decoder with random weights in the real layout, made in GPU memory: for timing, not for talking.
import type { BufferSlice, GpuDevice } from '../../src/backends/webgpu/device.js';
import { signsOf } from '../../src/backends/webgpu/fast/hadamard.js';
import { rotationTable } from '../../src/backends/webgpu/fast/activations.js';
import type { PlanGroup, PlanModel, PlanWeight } from '../../src/backends/webgpu/fast/plan-model.js';
import { gridCacheWords } from '../../src/backends/webgpu/kernels/activation-grid.js';
import { f32ToF16Bits } from '../../src/core/dtype.js';
import { createRng } from '../../src/core/rng.js';
import { hadamardTransform, randomPairs, type HadamardOptions } from '../../src/transforms/index.js';
import { randomBuffer } from './gpu.js';

/** Shapes of a decoder. */
export interface DecoderShape {
  readonly name: string;
  readonly layers: number;
  readonly hidden: number;
  readonly intermediate: number;
  readonly heads: number;
  readonly kvHeads: number;
  readonly headDim: number;
  readonly vocab: number;
  readonly qkNorm: boolean;
}

/** True shapes of the models the field measures. */
export const SHAPES: readonly DecoderShape[] = [
  {
    name: 'Llama-3.1-8B',
    layers: 32,
    hidden: 4096,
    intermediate: 14336,
    heads: 32,
    kvHeads: 8,
    headDim: 128,
    vocab: 128256,
    qkNorm: false,
  },
  {
    name: 'Qwen3-8B',
    layers: 36,
    hidden: 4096,
    intermediate: 12288,
    heads: 32,
    kvHeads: 8,
    headDim: 128,
    vocab: 151936,
    qkNorm: true,
  },
  {
    name: 'Qwen3-4B',
    layers: 36,
    hidden: 2560,
    intermediate: 9728,
    heads: 32,
    kvHeads: 8,
    headDim: 128,
    vocab: 151936,
    qkNorm: true,
  },
  {
    name: 'Qwen3-1.7B',
    layers: 28,
    hidden: 2048,
    intermediate: 6144,
    heads: 16,
    kvHeads: 8,
    headDim: 128,
    vocab: 151936,
    qkNorm: true,
  },
  {
    name: 'Qwen3-0.6B',
    layers: 28,
    hidden: 1024,
    intermediate: 3072,
    heads: 16,
    kvHeads: 8,
    headDim: 128,
    vocab: 151936,
    qkNorm: true,
  },
];

/**
 * AWQ has no transform; ParoQuant one per linear group, with pairs of any kind, or one per projection as published. QuaRot has
 * Hadamard transforms before o and down and one grid per output, its activations in 16 bits or in 8; SmoothRot runs the same, with
 * `kv8` on caches of 8-bit integers, its heads turned.
 */
export type PlanKind =
  'awq' | 'paroquant' | 'paroquant-per-projection' | 'quarot' | 'quarot-a8' | 'smoothrot-a8' | 'smoothrot-a8-kv8';

/** A decoder's weights without its caches: made once, planned with several kinds of transforms. */
export class RandomDecoder {
  readonly #gpu: GpuDevice;
  readonly shape: DecoderShape;
  readonly #rng = createRng(3);
  readonly #weights: Readonly<Record<'q' | 'k' | 'v' | 'qkv' | 'o' | 'gate' | 'up' | 'gateUp' | 'down', PlanWeight>>[] =
    [];
  readonly #common: Pick<PlanModel, 'rope' | 'embedding' | 'head' | 'finalNorm'>;
  readonly #norms: GPUBuffer;
  readonly #ones = new Map<number, GPUBuffer>();
  /** All but the caches. */
  readonly #buffers: GPUBuffer[] = [];
  readonly #tables = new Map<number, Uint32Array>();

  constructor(gpu: GpuDevice, shape: DecoderShape, positions: number) {
    this.#gpu = gpu;
    this.shape = shape;
    const { hidden, heads, kvHeads, headDim, intermediate, vocab, layers } = shape;
    const half = (): number =>
      f32ToF16Bits(this.#rng.normal() * 0.02) | (f32ToF16Bits(this.#rng.normal() * 0.02) << 16);
    const table = this.#own(randomBuffer(gpu, vocab * hidden * 2, half));
    const rope = new Float32Array(positions * headDim).map((_, i) => (i % 2 === 0 ? Math.cos(i) : Math.sin(i - 1)));
    const ropeBuffer = this.#own(gpu.buffer(rope.byteLength));
    gpu.upload(ropeBuffer, rope);
    this.#norms = this.#full(2 * headDim, 1);
    this.#common = {
      rope: ropeBuffer,
      embedding: { table, type: 'f16' },
      head: { kind: 'f16', weight: table },
      finalNorm: this.#full(hidden, 1),
    };
    for (let i = 0; i < layers; i++) {
      const qkv = this.#weight((heads + 2 * kvHeads) * headDim, hidden);
      const gateUp = this.#weight(2 * intermediate, hidden);
      this.#weights.push({
        qkv,
        q: part(qkv, 0, heads * headDim),
        k: part(qkv, heads * headDim, kvHeads * headDim),
        v: part(qkv, (heads + kvHeads) * headDim, kvHeads * headDim),
        o: this.#weight(hidden, heads * headDim),
        gateUp,
        gate: part(gateUp, 0, intermediate),
        up: part(gateUp, intermediate, intermediate),
        down: this.#weight(hidden, intermediate),
      });
    }
  }

  /** Bytes of weights one token reads, without rotation tables. */
  get bytesPerToken(): number {
    const { hidden, vocab } = this.shape;
    const bytes = (w: PlanWeight): number => w.outFeatures * (w.inFeatures / 2 + (4 * w.inFeatures) / w.groupSize);
    return this.#weights.reduce(
      (sum, b) => sum + bytes(b.qkv) + bytes(b.o) + bytes(b.gateUp) + bytes(b.down),
      vocab * hidden * 2,
    );
  }

  /** A plan's model; caches are shared by all blocks of all kinds when `sharedCache`, which changes nothing but memory. */
  model(kind: PlanKind, batch: number, capacity: number): PlanModel {
    const { hidden, heads, kvHeads, headDim, intermediate, vocab, qkNorm } = this.shape;
    const grid = kind === 'smoothrot-a8-kv8' ? { bits: 8 as const, clip: 1 } : undefined;
    const bytes = batch * kvHeads * capacity * (grid ? 4 * gridCacheWords(headDim, grid.bits) : headDim * 2);
    const split = apart(kind);
    return {
      hidden,
      intermediate,
      heads,
      kvHeads,
      headDim,
      rotaryDim: headDim,
      vocab,
      eps: 1e-6,
      ...this.#common,
      blocks: this.#weights.map((w) => ({
        qkv: this.#group(kind, split ? [w.q, w.k, w.v] : [w.qkv], true),
        o: this.#group(kind, [w.o], false, { inner: headDim }),
        gateUp: this.#group(kind, split ? [w.gate, w.up] : [w.gateUp], true),
        down: this.#group(kind, [w.down], false, {}),
        ...(qkNorm && { headNorms: this.#norms }),
        keys: this.#gpu.buffer(bytes),
        values: this.#gpu.buffer(bytes),
        grid,
        turn: grid !== undefined,
        window: 0,
      })),
    };
  }

  /** Frees a model's caches. */
  releaseCaches(model: PlanModel): void {
    for (const block of model.blocks) {
      this.#gpu.release(block.keys);
      this.#gpu.release(block.values);
    }
  }

  /** Frees everything else; plans of its models can't run after. */
  release(): void {
    for (const buffer of this.#buffers.splice(0)) this.#gpu.release(buffer);
  }

  #own(buffer: GPUBuffer): GPUBuffer {
    this.#buffers.push(buffer);
    return buffer;
  }

  #full(count: number, value: number): GPUBuffer {
    const buffer = this.#own(this.#gpu.buffer(count * 4));
    this.#gpu.upload(buffer, new Float32Array(count).fill(value));
    return buffer;
  }

  #weight(outFeatures: number, inFeatures: number): PlanWeight {
    const groupSize = 128;
    const rng = this.#rng;
    // Billions of them: xorshift, and grids from a table.
    let state = rng.int(1, 2 ** 31);
    const codes = (): number => {
      state ^= state << 13;
      state ^= state >>> 17;
      return (state ^= state << 5);
    };
    const grids = Uint32Array.from(
      { length: 1024 },
      () => f32ToF16Bits(0.004 + 0.004 * rng.uniform()) | (rng.int(5, 11) << 16),
    );
    return {
      kind: 'int4',
      outFeatures,
      inFeatures,
      groupSize,
      codes: this.#own(randomBuffer(this.#gpu, (outFeatures * inFeatures) / 2, codes)),
      grid: this.#own(
        randomBuffer(
          this.#gpu,
          (outFeatures * inFeatures * 4) / groupSize,
          (i) => grids[(i ^ codes()) & (grids.length - 1)],
        ),
      ),
    };
  }

  #group(kind: PlanKind, weights: readonly PlanWeight[], norm: boolean, online?: HadamardOptions): PlanGroup {
    const channels = weights[0].inFeatures;
    if (kind.startsWith('quarot') || kind.startsWith('smoothrot')) {
      const integers = kind !== 'quarot';
      const transform = online && hadamardTransform(channels, online);
      const m = transform ? Math.sqrt(transform.base.length) : 1;
      const hadamard = transform && {
        m,
        p: transform.order / m,
        inner: transform.inner,
        signs: signsOf(transform.base),
      };
      return {
        weights: weights.map((w) => ({ ...w, groupSize: channels, integers })),
        krot: 0,
        gain: this.#full(channels, 1),
        ...((hadamard || integers) && {
          row: { ...(hadamard && { hadamard }), ...(integers && { grid: { top: 127, clip: 1 } }) },
        }),
      };
    }
    const count = channels * weights.length;
    if (kind === 'awq') {
      // Norms have weights of their own in every model; elsewhere AWQ multiplies by nothing.
      let gain = norm ? undefined : this.#ones.get(count);
      if (!gain) {
        gain = this.#full(count, 1);
        if (!norm) this.#ones.set(count, gain);
      }
      return { weights, krot: 0, gain };
    }
    // Every group has a table of its own, as in a checkpoint, or the cache would serve them all.
    const krot = 8;
    let words = this.#tables.get(count);
    if (!words) {
      const one = rotationTable({
        channels,
        groupSize: 128,
        krot,
        pairs: randomPairs(channels, 128, krot, this.#rng),
        theta: new Float32Array((krot * channels) / 2).map(() => this.#rng.normal()),
        channelScales: new Float32Array(channels).fill(1),
      });
      words = new Uint32Array(weights.length * one.length);
      for (const i of weights.keys()) words.set(one, i * one.length);
      this.#tables.set(count, words);
    }
    const table = this.#own(this.#gpu.buffer(words.byteLength));
    this.#gpu.upload(table, words);
    return { weights, krot, table };
  }
}

/** Rows of a weight, in the same memory. */
function part(weight: PlanWeight, first: number, outFeatures: number): PlanWeight {
  const { inFeatures, groupSize, codes, grid } = weight;
  const rows = (buffer: GPUBuffer | BufferSlice, bytes: number): BufferSlice => {
    if ('bytes' in buffer) throw new Error('a part of a part');
    return { buffer, offset: first * bytes, bytes: outFeatures * bytes };
  };
  return { ...weight, outFeatures, codes: rows(codes, inFeatures / 2), grid: rows(grid, (4 * inFeatures) / groupSize) };
}

const apart = (kind: PlanKind): boolean => kind === 'paroquant-per-projection';
