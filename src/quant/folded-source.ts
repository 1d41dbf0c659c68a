// A model with smoothing and rotations folded into its weights, tensor by tensor as they are read: the same function as the
// original (its logits are equal up to rounding), in a form whose activations are easier to round. Nothing is held but the
// tensor being read.
//
// Rotations (QuaRot): R1 turns the residual stream (norm weights are folded into the linears after them first, and tied
// embeddings untied), R2 every head of v and o's input, and Hadamard transforms that stay online turn the inputs of o and
// down and (R3) the heads of q and k. Smoothing: inputs of a group arrive divided by s, its columns are multiplied by s.
import { f32ToF16Bits } from '../core/dtype.js';
import { GyreError } from '../core/errors.js';
import type { Rng } from '../core/rng.js';
import { floats, hostTensor, type HostTensor } from '../core/tensor.js';
import type { TensorReader } from '../formats/safetensors.js';
import { GROUP_NAMES, type GroupName } from '../models/block.js';
import type { ModelConfig } from '../models/config.js';
import { TENSOR_NAMES } from '../models/families/names.js';
import { checkFinite, groupModules, type ModelSource } from '../models/load.js';
import type { Online } from '../models/online.js';
import type { HadamardTransform } from '../ops/backend.js';
import {
  applyHadamard,
  findHadamardBase,
  hadamardTransform,
  largestHadamardOrder,
  randomHadamard,
  rotateColumns,
  rotateRows,
  type RandomHadamard,
} from '../transforms/index.js';

/** The rotations of a model. */
export interface ModelRotation {
  /** R1, of the residual stream. */
  readonly residual: RandomHadamard;
  /** R2, of every head of v. */
  readonly values: RandomHadamard;
  /** Online, of o's input; [kvHeads · headDim] signs are folded into v. */
  readonly o: HadamardTransform;
  readonly oSigns: Int8Array;
  /** Online, of down's input; signs are folded into up. */
  readonly down: HadamardTransform;
  readonly downSigns: Int8Array;
  /** R3, online. */
  readonly heads: HadamardTransform;
}

/** Scales s of each group's input channels, by block; absent groups are not smoothed. */
export type Smoothing = readonly Readonly<Partial<Record<GroupName, Float64Array>>>[];

/** What is folded into a model. */
export interface ModelFolding {
  readonly rotation?: ModelRotation;
  readonly smoothing?: Smoothing;
}

/** Random rotations for a model. */
export function drawRotation(config: ModelConfig, rng: Rng): ModelRotation {
  const { hiddenSize, intermediateSize, heads, kvHeads, headDim } = config;
  const signs = (n: number, label: string): Int8Array => {
    const stream = rng.fork(label);
    return Int8Array.from({ length: n }, () => (stream.uniform() < 0.5 ? -1 : 1));
  };
  const width = heads * headDim;
  // Across heads where a matrix has their number: the heads themselves are turned by R2. Otherwise the whole width.
  const o = findHadamardBase(heads)
    ? hadamardTransform(width, { order: heads, inner: headDim })
    : hadamardTransform(width, { order: largestHadamardOrder(width) });
  return {
    residual: randomHadamard(hiddenSize, rng.fork('residual')),
    values: randomHadamard(headDim, rng.fork('values')),
    o,
    oSigns: signs(kvHeads * headDim, 'o'),
    down: hadamardTransform(intermediateSize, { order: largestHadamardOrder(intermediateSize) }),
    downSigns: signs(intermediateSize, 'down'),
    heads: hadamardTransform(headDim, { order: largestHadamardOrder(headDim) }),
  };
}

/** For each input channel of o the output channel of v that it comes from. */
export function valueChannel(config: ModelConfig, channel: number): number {
  const { heads, kvHeads, headDim } = config;
  const head = Math.floor(channel / headDim);
  return Math.floor(head / (heads / kvHeads)) * headDim + (channel % headDim);
}

/**
 * The folded model. Linears come as f32 (or f64, for tests); embeddings and head, which are stored, as f16 unless the
 * original's are f32.
 */
export function foldedSource(
  source: ModelSource,
  folding: ModelFolding,
  options: { precision?: 'f32' | 'f64' } = {},
): ModelSource {
  const { precision = 'f32' } = options;
  const { rotation } = folding;
  const config = rotation ? { ...source.config, tiedEmbeddings: false } : source.config;
  const online: Online = rotation
    ? { ...source.online, groups: { o: rotation.o, down: rotation.down }, heads: rotation.heads }
    : (source.online ?? { groups: {} });
  return {
    ...source,
    config,
    rawConfig: rotation ? { ...source.rawConfig, tie_word_embeddings: false } : source.rawConfig,
    online,
    checkpoint: new FoldedReader(source, folding, precision),
  };
}

type Place =
  | {
      readonly kind: 'linear';
      readonly layer: number;
      readonly group: GroupName;
      readonly index: number;
      readonly bias: boolean;
    }
  | { readonly kind: 'norm'; readonly layer: number; readonly group: 'qkv' | 'gateUp' }
  | { readonly kind: 'embedding' | 'head' | 'finalNorm' };

class FoldedReader implements TensorReader {
  readonly #source: ModelSource;
  readonly #folding: ModelFolding;
  readonly #precision: 'f32' | 'f64';
  readonly #places: ReadonlyMap<string, Place>;

  constructor(source: ModelSource, folding: ModelFolding, precision: 'f32' | 'f64') {
    this.#source = source;
    this.#folding = folding;
    this.#precision = precision;
    this.#places = placesOf(source.config);
  }

  get name(): string {
    return this.#source.checkpoint.name;
  }

  has(name: string): boolean {
    return this.#source.checkpoint.has(name) || (name === TENSOR_NAMES.head && this.#untied);
  }

  names(): IterableIterator<string> {
    const names = new Set(this.#source.checkpoint.names());
    if (this.#untied) names.add(TENSOR_NAMES.head);
    return names.values();
  }

  info(name: string): ReturnType<TensorReader['info']> {
    const info = this.#source.checkpoint.info(this.#stored(name));
    const place = this.#places.get(name);
    return place && this.#changes(place) ? { ...info, dtype: this.#dtype(name, place) } : info;
  }

  async read(name: string): Promise<HostTensor> {
    const place = this.#places.get(name);
    const tensor = await this.#source.checkpoint.read(this.#stored(name));
    return place && this.#changes(place) ? this.#fold(name, place, tensor) : tensor;
  }

  async readRows(name: string, begin: number, end: number): Promise<HostTensor> {
    const place = this.#places.get(name);
    if (!place || !this.#changes(place)) return this.#source.checkpoint.readRows(this.#stored(name), begin, end);
    if (place.kind === 'embedding' || place.kind === 'head')
      return this.#fold(name, place, await this.#source.checkpoint.readRows(this.#stored(name), begin, end));
    const { dtype, shape, data } = await this.read(name);
    const width = data.length / shape[0];
    return { dtype, shape: [end - begin, ...shape.slice(1)], data: data.slice(begin * width, end * width) };
  }

  close(): Promise<void> {
    return this.#source.checkpoint.close();
  }

  get #untied(): boolean {
    return this.#folding.rotation !== undefined && this.#source.config.tiedEmbeddings;
  }

  /** The tensor of the original that a name is made from. */
  #stored(name: string): string {
    return name === TENSOR_NAMES.head && this.#untied ? TENSOR_NAMES.embedding : name;
  }

  #changes(place: Place): boolean {
    const { rotation, smoothing } = this.#folding;
    if (rotation) return true;
    return (place.kind === 'linear' || place.kind === 'norm') && smoothing !== undefined;
  }

  #dtype(name: string, place: Place): 'f16' | 'f32' | 'f64' {
    if (this.#precision === 'f64') return 'f64';
    const table = place.kind === 'embedding' || place.kind === 'head';
    return table && this.#source.checkpoint.info(this.#stored(name)).dtype !== 'f32' ? 'f16' : 'f32';
  }

  async #fold(name: string, place: Place, tensor: HostTensor): Promise<HostTensor> {
    checkFinite(name, tensor);
    const x = doubles(tensor);
    const folded = await this.#values(place, x);
    const { shape } = tensor;
    switch (this.#dtype(name, place)) {
      case 'f64':
        return hostTensor('f64', shape, folded);
      case 'f32':
        return hostTensor('f32', shape, Float32Array.from(folded));
      case 'f16': {
        const bad = folded.findIndex((value) => Math.abs(value) > 65504);
        if (bad < 0)
          return hostTensor(
            'f16',
            shape,
            Uint16Array.from(folded, (value) => f32ToF16Bits(value)),
          );
        throw new GyreError('unsupported', `${name}: rotated, element ${bad} is ${folded[bad]}, beyond f16`, {
          remedy: 'convert the model to f32 first: its rotated embeddings are then stored in f32',
        });
      }
    }
  }

  async #values(place: Place, x: Float64Array): Promise<Float64Array> {
    const { rotation } = this.#folding;
    switch (place.kind) {
      case 'linear':
        return place.bias ? this.#bias(place, x) : this.#weight(place, x);
      case 'norm':
        // Folded into the linears after it, smoothing and all.
        if (rotation) return x.fill(1);
        return scaleRows(x, this.#scales(place.layer, place.group), -1);
      case 'finalNorm':
        return x.fill(1);
      case 'embedding':
        return rotation ? rotateRows(x, rotation.residual) : x;
      case 'head':
        return rotation ? rotateRows(scaleColumns(x, await this.#norm(TENSOR_NAMES.finalNorm)), rotation.residual) : x;
    }
  }

  async #weight({ layer, group, index }: Place & { kind: 'linear' }, w: Float64Array): Promise<Float64Array> {
    const { rotation } = this.#folding;
    const { config } = this.#source;
    // With rotations the norm's weight ÷ s meets the columns × s again: smoothing there changes nothing.
    const cancelled = rotation && (group === 'qkv' || group === 'gateUp');
    const scales = cancelled ? undefined : this.#scales(layer, group);
    if (scales) scaleColumns(w, scales);
    const isValue = group === 'qkv' && index === 2;
    const isUp = group === 'gateUp' && index === 1;
    if (isValue) scaleRows(w, this.#valueScales(layer), -1);
    if (isUp) scaleRows(w, this.#scales(layer, 'down'), -1);
    if (!rotation) return w;
    const prefix = TENSOR_NAMES.block(layer);
    switch (group) {
      case 'qkv':
      case 'gateUp': {
        const norm = group === 'qkv' ? TENSOR_NAMES.inputNorm : TENSOR_NAMES.postAttentionNorm;
        scaleColumns(w, await this.#norm(`${prefix}.${norm}.weight`));
        rotateRows(w, rotation.residual);
        if (isValue) this.#rotateValues(w, config.hiddenSize, rotation);
        if (isUp) scaleRows(w, rotation.downSigns, 1);
        return w;
      }
      case 'o': {
        const width = config.heads * config.headDim;
        rotateRows(w, rotation.values);
        scaleColumns(
          w,
          Float64Array.from({ length: width }, (_, c) => rotation.oSigns[valueChannel(config, c)]),
        );
        return rotateColumns(applyHadamard(w, rotation.o), rotation.residual);
      }
      case 'down':
        scaleColumns(w, rotation.downSigns);
        return rotateColumns(applyHadamard(w, rotation.down), rotation.residual);
    }
  }

  #bias({ layer, group, index }: Place & { kind: 'linear' }, b: Float64Array): Float64Array {
    const { rotation } = this.#folding;
    if (group === 'qkv' && index === 2) {
      scaleRows(b, this.#valueScales(layer), -1);
      return rotation ? this.#rotateValues(b, 1, rotation) : b;
    }
    if (group === 'gateUp' && index === 1) {
      scaleRows(b, this.#scales(layer, 'down'), -1);
      return rotation ? scaleRows(b, rotation.downSigns, 1) : b;
    }
    return rotation && (group === 'o' || group === 'down') ? rotateRows(b, rotation.residual) : b;
  }

  /** R2 on each head of v's outputs, then the signs of o's online transform. v [kvHeads · headDim, columns]. */
  #rotateValues(v: Float64Array, columns: number, { values, oSigns }: ModelRotation): Float64Array {
    const size = this.#source.config.headDim * columns;
    for (let begin = 0; begin < v.length; begin += size) rotateColumns(v.subarray(begin, begin + size), values);
    return scaleRows(v, oSigns, 1);
  }

  #scales(layer: number, group: GroupName): Float64Array | undefined {
    return this.#folding.smoothing?.[layer]?.[group];
  }

  /** Scales of o's input as those of v's outputs; the heads that share a value share its scale. */
  #valueScales(layer: number): Float64Array | undefined {
    const scales = this.#scales(layer, 'o');
    if (!scales) return undefined;
    const { config } = this.#source;
    const shared = new Float64Array(config.kvHeads * config.headDim);
    scales.forEach((s, c) => (shared[valueChannel(config, c)] = s));
    return shared;
  }

  async #norm(name: string): Promise<Float64Array> {
    return doubles(await this.#source.checkpoint.read(name));
  }
}

/** Where each tensor of a model belongs. */
function placesOf(config: ModelConfig): Map<string, Place> {
  const places = new Map<string, Place>([
    [TENSOR_NAMES.embedding, { kind: 'embedding' }],
    [TENSOR_NAMES.head, { kind: 'head' }],
    [TENSOR_NAMES.finalNorm, { kind: 'finalNorm' }],
  ]);
  for (let layer = 0; layer < config.layers; layer++) {
    const prefix = TENSOR_NAMES.block(layer);
    places.set(`${prefix}.${TENSOR_NAMES.inputNorm}.weight`, { kind: 'norm', layer, group: 'qkv' });
    places.set(`${prefix}.${TENSOR_NAMES.postAttentionNorm}.weight`, { kind: 'norm', layer, group: 'gateUp' });
    for (const group of GROUP_NAMES) {
      for (const [index, module] of groupModules(layer, group).entries()) {
        places.set(`${module}.weight`, { kind: 'linear', layer, group, index, bias: false });
        places.set(`${module}.bias`, { kind: 'linear', layer, group, index, bias: true });
      }
    }
  }
  return places;
}

function doubles({ dtype, shape, data }: HostTensor): Float64Array {
  return data instanceof Float64Array ? data.slice() : Float64Array.from(floats({ dtype, shape, data }));
}

/** Columns c of [rows, factors.length] times factors[c], in place. */
function scaleColumns(x: Float64Array, factors: ArrayLike<number>): Float64Array {
  const n = factors.length;
  for (let at = 0; at < x.length; at++) x[at] *= factors[at % n];
  return x;
}

/** Rows r of [factors.length, columns] times factors[r]^power, in place. */
function scaleRows(x: Float64Array, factors: ArrayLike<number> | undefined, power: 1 | -1): Float64Array {
  if (!factors) return x;
  const columns = x.length / factors.length;
  for (let at = 0; at < x.length; at++) {
    const factor = factors[Math.floor(at / columns)];
    x[at] = power === 1 ? x[at] * factor : x[at] / factor;
  }
  return x;
}
