// What a checkpoint is: sizes, bits per weight, a fingerprint, and how far each linear's channels stand out. Reads headers,
// and for the statistics one linear at a time.
import type { TensorInfo } from '../formats/index.js';
import { valueStatistics } from '../core/statistics.js';
import { floats } from '../core/tensor.js';
import { GROUP_NAMES, type GroupName } from '../models/block.js';
import type { LinearPart } from '../models/linear-group.js';
import { groupModules, groupShape, readLinear, type ModelSource } from '../models/load.js';

/** Tensors of one element type. */
export interface DtypeSummary {
  /** As spelled in the file, e.g. `BF16`. */
  readonly dtype: string;
  readonly tensors: number;
  readonly bytes: number;
}

/** Sizes of a model; see {@link summarizeModel}. */
export interface ModelSummary {
  readonly name: string;
  readonly family: string;
  readonly layers: number;
  readonly hiddenSize: number;
  readonly intermediateSize: number;
  readonly heads: number;
  readonly kvHeads: number;
  readonly headDim: number;
  readonly vocabSize: number;
  readonly contextLength: number;
  readonly tiedEmbeddings: boolean;
  /** Parameters of the unquantized model. */
  readonly parameters: number;
  /** Of those, in the linears of the blocks (what is quantized). */
  readonly linearParameters: number;
  readonly tensors: number;
  readonly dtypes: readonly DtypeSummary[];
  /** Bytes of tensor data. */
  readonly bytes: number;
  /** Of those, the linears of the blocks with scales, zero points and transforms, without biases. */
  readonly linearBytes: number;
  /** Stored bits per parameter of the linears. */
  readonly linearBitsPerWeight: number;
  /** Stored bits per parameter of the whole model. */
  readonly bitsPerWeight: number;
}

/** Sizes of a model from its headers alone. */
export function summarizeModel(source: ModelSource): ModelSummary {
  const { config, checkpoint } = source;
  const { hiddenSize, layers, heads, kvHeads, headDim, vocabSize } = config;
  const dtypes = new Map<string, { tensors: number; bytes: number }>();
  const linears = new Set<string>();
  for (let layer = 0; layer < layers; layer++) {
    for (const group of GROUP_NAMES) for (const module of groupModules(layer, group)) linears.add(module);
  }
  let bytes = 0;
  let linearBytes = 0;
  let tensors = 0;
  for (const name of checkpoint.names()) {
    const { storedDtype, begin, end } = checkpoint.info(name);
    const size = end - begin;
    const entry = dtypes.get(storedDtype) ?? { tensors: 0, bytes: 0 };
    dtypes.set(storedDtype, { tensors: entry.tensors + 1, bytes: entry.bytes + size });
    tensors++;
    bytes += size;
    const dot = name.lastIndexOf('.');
    if (linears.has(name.slice(0, dot)) && name.slice(dot + 1) !== 'bias') linearBytes += size;
  }
  let linearParameters = 0;
  let biases = 0;
  for (const group of GROUP_NAMES) {
    const { inFeatures, outFeatures } = groupShape(config, group);
    const out = outFeatures.reduce((sum, n) => sum + n, 0);
    linearParameters += layers * inFeatures * out;
    const biased = group === 'qkv' ? config.qkvBias : group === 'o' ? config.outputBias : config.mlpBias;
    if (biased) biases += layers * out;
  }
  const norms = layers * (2 * hiddenSize + (config.qkNorm ? 2 * headDim : 0)) + hiddenSize;
  const parameters = linearParameters + biases + norms + vocabSize * hiddenSize * (config.tiedEmbeddings ? 1 : 2);
  return {
    name: source.name,
    family: config.family,
    layers,
    hiddenSize,
    intermediateSize: config.intermediateSize,
    heads,
    kvHeads,
    headDim,
    vocabSize,
    contextLength: config.maxPositions,
    tiedEmbeddings: config.tiedEmbeddings,
    parameters,
    linearParameters,
    tensors,
    dtypes: [...dtypes].map(([dtype, entry]) => ({ dtype, ...entry })).sort((a, b) => b.bytes - a.bytes),
    bytes,
    linearBytes,
    linearBitsPerWeight: (8 * linearBytes) / linearParameters,
    bitsPerWeight: (8 * bytes) / parameters,
  };
}

/** How far the channels and values of one linear's weight stand out. */
export interface LinearStatistics {
  readonly module: string;
  readonly layer: number;
  readonly group: GroupName;
  readonly inFeatures: number;
  readonly outFeatures: number;
  /**
   * What the numbers are of: the weight itself; its value on the grid (`quantized`); the same in the space of its
   * transform, which is what the grid has to hold (`rotated`).
   */
  readonly space: 'dense' | 'quantized' | 'rotated';
  /** Largest magnitude. */
  readonly absMax: number;
  readonly standardDeviation: number;
  /** Largest over median of the input channels' largest magnitudes; 1 means that no channel stands out. */
  readonly channelRatio: number;
  /** Fourth standardised moment of the values: 3 for a normal distribution, more with heavier tails. */
  readonly kurtosis: number;
}

/**
 * Statistics of every linear whose module name `matches`, one at a time, in the order data flows.
 * Memory: one linear as f32.
 */
export async function* linearStatistics(
  source: ModelSource,
  matches: (module: string) => boolean = () => true,
): AsyncGenerator<LinearStatistics, void, void> {
  for (let layer = 0; layer < source.config.layers; layer++) {
    for (const group of GROUP_NAMES) {
      const modules = groupModules(layer, group);
      for (const [i, module] of modules.entries()) {
        if (!matches(module)) continue;
        const { inFeatures, outFeatures } = groupShape(source.config, group);
        const part = await readLinear(source, layer, group, i);
        const shape = { inFeatures, outFeatures: outFeatures[i] };
        const kind = part.source.kind === 'dense' ? 'dense' : part.transform ? 'rotated' : 'quantized';
        const { absMax, standardDeviation, channelRatio, kurtosis } = valueStatistics(denseValues(part), inFeatures);
        yield { module, layer, group, ...shape, space: kind, absMax, standardDeviation, channelRatio, kurtosis };
      }
    }
  }
}

/** The weight [out, in] as stored: quantized ones as values on their grid. */
function denseValues(part: LinearPart): Float32Array {
  if (part.source.kind === 'dense') return floats(part.source.weight);
  const { codes, zeros, scales, inFeatures, outFeatures, groupSize } = part.source.weight;
  const values = new Float32Array(codes.length);
  const groups = inFeatures / groupSize;
  for (let row = 0; row < outFeatures; row++) {
    for (let channel = 0; channel < inFeatures; channel++) {
      const cell = row * groups + Math.floor(channel / groupSize);
      const at = row * inFeatures + channel;
      values[at] = (codes[at] - zeros[cell]) * scales[cell];
    }
  }
  return values;
}

/**
 * Names a model's content, quickly: SHA-256 over config.json, every tensor's name, type and shape, and the first and
 * last row of each. Two checkpoints of one run have one fingerprint; a damaged row in between may go unseen.
 * @returns 16 hexadecimal digits.
 */
export async function modelFingerprint(source: ModelSource): Promise<string> {
  const { checkpoint } = source;
  const encoder = new TextEncoder();
  let state = await sha256(encoder.encode(JSON.stringify(source.rawConfig)));
  for (const name of [...checkpoint.names()].sort()) {
    const info = checkpoint.info(name);
    const parts = [state, encoder.encode(JSON.stringify([name, info.storedDtype, info.shape]))];
    parts.push(...(await edges(source, name, info)));
    state = await sha256(concat(parts));
  }
  return [...state.subarray(0, 8)].map((byte) => byte.toString(16).padStart(2, '0')).join('');
}

/** Bytes of a tensor's first and last row; a vector is one row. */
async function edges(source: ModelSource, name: string, info: TensorInfo): Promise<Uint8Array[]> {
  const { checkpoint } = source;
  const whole = info.shape.length !== 2 || info.shape[0] < 2;
  const tensors = whole
    ? [await checkpoint.read(name)]
    : [await checkpoint.readRows(name, 0, 1), await checkpoint.readRows(name, info.shape[0] - 1, info.shape[0])];
  return tensors.map(({ data }) => new Uint8Array(data.buffer, data.byteOffset, data.byteLength));
}

function concat(parts: readonly Uint8Array[]): Uint8Array<ArrayBuffer> {
  const out = new Uint8Array(parts.reduce((sum, part) => sum + part.length, 0));
  let offset = 0;
  for (const part of parts) {
    out.set(part, offset);
    offset += part.length;
  }
  return out;
}

async function sha256(bytes: Uint8Array<ArrayBuffer>): Promise<Uint8Array> {
  return new Uint8Array(await crypto.subtle.digest('SHA-256', bytes));
}
