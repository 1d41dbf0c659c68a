// From a model's files to a decoder on a backend: config, then weights tensor by tensor, block by block.
import { toFloat32 } from '../core/dtype.js';
import { GyreError, ensure } from '../core/errors.js';
import { silent, type ProgressListener } from '../core/progress.js';
import { firstNonFinite, floats, hostTensor, type HostTensor } from '../core/tensor.js';
import { readJson } from '../formats/huggingface-config.js';
import { parseQuantizationConfig, type QuantizationConfig } from '../formats/quantization-config.js';
import { isQuantized, readQuantizedLinear } from '../formats/quantized-linear.js';
import { Checkpoint, type TensorReader } from '../formats/safetensors.js';
import type { ModelFiles } from '../formats/source.js';
import type { Backend, LinearSource, Tensor } from '../ops/backend.js';
import { BlockFrame, DecoderBlock, GROUP_NAMES, type GroupName } from './block.js';
import type { ModelConfig } from './config.js';
import { Decoder } from './decoder.js';
import { parseModelConfig } from './families.js';
import { LinearGroup, type LinearPart } from './linear-group.js';
import { TENSOR_NAMES } from './families/names.js';
import { NO_ONLINE, readOnline, type Online } from './online.js';
import { roundRows, type RoundAtLoad } from './round.js';

/** A model's files, read as far as its config and the table of its tensors. */
export interface ModelSource {
  /** Folder or hub id, for messages and results. */
  readonly name: string;
  readonly files: ModelFiles;
  readonly config: ModelConfig;
  /** The raw config.json, to be copied into what is made of the model. */
  readonly rawConfig: Readonly<Record<string, unknown>>;
  readonly quantization: QuantizationConfig | undefined;
  /** What the model does to activations while it runs; nothing when undefined. */
  readonly online?: Online;
  readonly checkpoint: TensorReader;
}

/** Reads config.json and the safetensors headers. @throws GyreError for unknown architectures and broken files. */
export async function openModel(files: ModelFiles): Promise<ModelSource> {
  const raw = await readJson(files, 'config.json');
  if (typeof raw !== 'object' || raw === null || Array.isArray(raw))
    throw new GyreError('config-invalid', `${files.name}: config.json is not an object`);
  const rawConfig = raw as Readonly<Record<string, unknown>>;
  const config = parseModelConfig(raw, files.name);
  const quantization = parseQuantizationConfig(rawConfig['quantization_config']);
  const online = readOnline(config, quantization?.online);
  const checkpoint = await Checkpoint.open(files);
  return { name: files.name, files, config, rawConfig, quantization, online, checkpoint };
}

/** Module names of a block's linear groups, in merged order. */
export function groupModules(layer: number, group: GroupName): string[] {
  return TENSOR_NAMES.groups[group].map((name) => `${TENSOR_NAMES.block(layer)}.${name}`);
}

/** Features in and out of each linear of a group. */
export function groupShape(config: ModelConfig, group: GroupName): { inFeatures: number; outFeatures: number[] } {
  const { hiddenSize, intermediateSize, heads, kvHeads, headDim } = config;
  const shapes: Record<GroupName, { inFeatures: number; outFeatures: number[] }> = {
    qkv: { inFeatures: hiddenSize, outFeatures: [heads * headDim, kvHeads * headDim, kvHeads * headDim] },
    o: { inFeatures: heads * headDim, outFeatures: [hiddenSize] },
    gateUp: { inFeatures: hiddenSize, outFeatures: [intermediateSize, intermediateSize] },
    down: { inFeatures: intermediateSize, outFeatures: [hiddenSize] },
  };
  return shapes[group];
}

/** Which biases a family has, by group. */
function hasBias(config: ModelConfig, group: GroupName): boolean {
  switch (group) {
    case 'qkv':
      return config.qkvBias;
    case 'o':
      return config.outputBias;
    case 'gateUp':
    case 'down':
      return config.mlpBias;
  }
}

/** Reads a float tensor, checking its shape and that every value is finite. */
export async function readChecked(source: ModelSource, name: string, shape: readonly number[]): Promise<HostTensor> {
  const tensor = await source.checkpoint.read(name);
  checkShape(name, tensor.shape, shape);
  checkFinite(name, tensor);
  return tensor;
}

/** Elements converted to f32 at once by {@link checkFinite}. */
const FINITE_CHUNK = 1 << 20;

/** Throws `non-finite`, naming the tensor and the element, when a float tensor holds NaN or infinity. */
export function checkFinite(name: string, tensor: HostTensor): void {
  const { data, dtype } = tensor;
  if (!['f64', 'f32', 'f16', 'bf16'].includes(dtype)) return;
  // Piece by piece: a bf16 embedding table as f32 would take twice its memory.
  for (let begin = 0; begin < data.length; begin += FINITE_CHUNK) {
    const at = firstNonFinite(toFloat32(data.subarray(begin, begin + FINITE_CHUNK), dtype));
    if (at < 0) continue;
    throw new GyreError('non-finite', `${name}: element ${begin + at} is NaN or infinite`, {
      remedy: 'the checkpoint is damaged: fetch it again',
    });
  }
}

/**
 * Checks by the headers alone that a 16-bit checkpoint has every tensor the decoder reads, in the shape its config says.
 * @throws `tensor-missing`, `tensor-shape`, `unsupported`, naming the tensor.
 */
export function checkTensors(source: ModelSource): void {
  const { config, checkpoint } = source;
  const check = (name: string, ...shape: number[]): void => checkShape(name, checkpoint.info(name).shape, shape);
  check(TENSOR_NAMES.embedding, config.vocabSize, config.hiddenSize);
  for (let layer = 0; layer < config.layers; layer++) {
    const prefix = TENSOR_NAMES.block(layer);
    const norms = [TENSOR_NAMES.inputNorm, TENSOR_NAMES.postAttentionNorm];
    for (const name of norms) check(`${prefix}.${name}.weight`, config.hiddenSize);
    const headNorms = config.qkNorm ? [TENSOR_NAMES.qNorm, TENSOR_NAMES.kNorm] : [];
    for (const name of headNorms) check(`${prefix}.${name}.weight`, config.headDim);
    for (const group of GROUP_NAMES) {
      const { inFeatures, outFeatures } = groupShape(config, group);
      for (const [i, module] of groupModules(layer, group).entries()) {
        check(`${module}.weight`, outFeatures[i], inFeatures);
        if (hasBias(config, group)) check(`${module}.bias`, outFeatures[i]);
      }
    }
  }
  check(TENSOR_NAMES.finalNorm, config.hiddenSize);
  if (!config.tiedEmbeddings) check(TENSOR_NAMES.head, config.vocabSize, config.hiddenSize);
}

function checkShape(name: string, found: readonly number[], expected: readonly number[]): void {
  if (found.length === expected.length && found.every((n, i) => n === expected[i])) return;
  throw new GyreError('tensor-shape', `${name}: expected shape [${expected.join(', ')}], found [${found.join(', ')}]`, {
    remedy: 'config.json and the weights disagree: check that they are of the same model',
  });
}

/** Reads one linear, quantized or dense, as the checkpoint stores it. */
export async function readLinear(
  source: ModelSource,
  layer: number,
  group: GroupName,
  index: number,
): Promise<LinearPart> {
  const { config, checkpoint, quantization } = source;
  const module = groupModules(layer, group)[index];
  const { inFeatures, outFeatures } = groupShape(config, group);
  const out = outFeatures[index];
  const bias = hasBias(config, group) ? floats(await readChecked(source, `${module}.bias`, [out])) : undefined;
  if (quantization && isQuantized(checkpoint, module)) {
    const { transform, ...weight } = await readQuantizedLinear(checkpoint, module, quantization);
    checkShape(module, [weight.outFeatures, weight.inFeatures], [out, inFeatures]);
    return { source: { kind: 'quantized', weight, bias }, transform };
  }
  return { source: { kind: 'dense', weight: await readChecked(source, `${module}.weight`, [out, inFeatures]), bias } };
}

/** Loads what of a block is not linears. */
export async function loadFrame(backend: Backend, source: ModelSource, layer: number): Promise<BlockFrame> {
  const { config } = source;
  const prefix = TENSOR_NAMES.block(layer);
  const norm = async (name: string, size: number): Promise<Tensor> =>
    backend.upload(await readChecked(source, `${prefix}.${name}.weight`, [size]));
  const { heads, kv } = source.online ?? NO_ONLINE;
  const norms = {
    input: await norm(TENSOR_NAMES.inputNorm, config.hiddenSize),
    postAttention: await norm(TENSOR_NAMES.postAttentionNorm, config.hiddenSize),
    q: config.qkNorm ? await norm(TENSOR_NAMES.qNorm, config.headDim) : undefined,
    k: config.qkNorm ? await norm(TENSOR_NAMES.kNorm, config.headDim) : undefined,
  };
  return new BlockFrame(backend, config, layer, norms, {
    transform: heads && (await backend.loadTransform(heads)),
    kv,
  });
}

/** Options of {@link loadDecoder}. */
export interface LoadOptions {
  readonly onProgress?: ProgressListener;
  /** Round dense linears while loading (and the head, to 8 bits); inputs that the groups don't tile stay dense. */
  readonly roundWeights?: RoundAtLoad;
  /** Width of the output head's weights: as stored (16, default), or rounded to 8 bits to read half the bytes per token. */
  readonly headBits?: 8 | 16;
}

/** Loads one linear group. */
export async function loadGroup(
  backend: Backend,
  source: ModelSource,
  layer: number,
  group: GroupName,
  options: LoadOptions = {},
): Promise<LinearGroup> {
  const parts: LinearPart[] = [];
  for (let i = 0; i < groupModules(layer, group).length; i++) {
    const part = await readLinear(source, layer, group, i);
    parts.push(options.roundWeights ? { ...part, source: rounded(part.source, options.roundWeights) } : part);
  }
  const { groups, activations } = source.online ?? NO_ONLINE;
  return LinearGroup.load(backend, parts, { before: groups[group], activations });
}

function rounded(source: LinearSource, grid: RoundAtLoad): LinearSource {
  if (source.kind === 'quantized') return source;
  const [out, inFeatures] = source.weight.shape;
  const weight = roundRows(floats(source.weight), out, inFeatures, grid);
  return weight ? { kind: 'quantized', weight, bias: source.bias } : source;
}

/** Loads one decoder block. */
export async function loadBlock(
  backend: Backend,
  source: ModelSource,
  layer: number,
  options: LoadOptions = {},
): Promise<DecoderBlock> {
  const frame = await loadFrame(backend, source, layer);
  const groups: Partial<Record<GroupName, LinearGroup>> = {};
  for (const group of GROUP_NAMES) groups[group] = await loadGroup(backend, source, layer, group, options);
  return new DecoderBlock(frame, groups as Record<GroupName, LinearGroup>);
}

/** Grid of a head rounded to 8 bits: the longest of these groups that tiles its input. */
function headGrid(hiddenSize: number): RoundAtLoad {
  return { bits: 8, groupSize: [128, 64, 32].find((size) => hiddenSize % size === 0) ?? hiddenSize };
}

/** Loads a whole model. Progress in blocks. */
export async function loadDecoder(backend: Backend, source: ModelSource, options: LoadOptions = {}): Promise<Decoder> {
  const { config } = source;
  const onProgress = options.onProgress ?? silent;
  const readTable = async (name: string): Promise<LinearSource> => ({
    kind: 'dense',
    weight: await readChecked(source, name, [config.vocabSize, config.hiddenSize]),
  });
  const table = await readTable(TENSOR_NAMES.embedding);
  const embedding = await backend.loadLinear(table);
  const blocks: DecoderBlock[] = [];
  for (let layer = 0; layer < config.layers; layer++) {
    blocks.push(await loadBlock(backend, source, layer, options));
    onProgress({ stage: 'load', done: layer + 1, total: config.layers, unit: 'blocks' });
  }
  const finalNorm = await backend.upload(await readChecked(source, TENSOR_NAMES.finalNorm, [config.hiddenSize]));
  const narrowHead = options.headBits === 8 || options.roundWeights !== undefined;
  let head = embedding;
  if (narrowHead || !config.tiedEmbeddings) {
    const headSource = config.tiedEmbeddings ? table : await readTable(TENSOR_NAMES.head);
    head = await backend.loadLinear(narrowHead ? rounded(headSource, headGrid(config.hiddenSize)) : headSource);
  }
  return new Decoder(backend, config, { embedding, head, finalNorm, blocks, kvGrid: source.online?.kv });
}

/** Bytes of embedding rows that are remembered. */
const MOST_ROW_BYTES = 256 * 2 ** 20;

/**
 * Rows of the embedding table for these ids, read from the file: [ids.length, hidden] f32. `rows` remembers those of earlier
 * calls, within a limit: text repeats itself, and a read takes longer than a row.
 */
export async function embedFromFile(
  source: ModelSource,
  ids: Int32Array,
  rows = new Map<number, Float32Array>(),
): Promise<HostTensor> {
  const { hiddenSize, vocabSize } = source.config;
  if (rows.size * hiddenSize * 4 > MOST_ROW_BYTES) rows.clear();
  const out = new Float32Array(ids.length * hiddenSize);
  for (const [i, id] of ids.entries()) {
    let row = rows.get(id);
    if (!row) {
      ensure(
        id >= 0 && id < vocabSize,
        'calibration',
        () => `token id ${id} is outside the model's vocabulary of ${vocabSize}`,
        'check that tokenizer.json belongs to the model',
      );
      row = floats(await source.checkpoint.readRows(TENSOR_NAMES.embedding, id, id + 1));
      const at = firstNonFinite(row);
      if (at >= 0) {
        throw new GyreError('non-finite', `${TENSOR_NAMES.embedding}: row ${id}, column ${at} is NaN or infinite`, {
          remedy: 'the checkpoint is damaged: fetch it again',
        });
      }
      rows.set(id, row);
    }
    out.set(row, i * hiddenSize);
  }
  return hostTensor('f32', [ids.length, hiddenSize], out);
}
