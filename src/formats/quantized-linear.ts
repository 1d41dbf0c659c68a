// One quantized linear, between the tensors of a checkpoint (paroquant, awq, gyre) and plain unpacked arrays.
import { fromFloat32, roundToF16 } from '../core/dtype.js';
import { GyreError, ensure } from '../core/errors.js';
import { firstNonFinite, floats, type HostTensor } from '../core/tensor.js';
import { packBits, packGemmTransposed, packedRowBytes, transpose2d, unpackBits, unpackGemmTransposed } from './int4.js';
import {
  groupSizeOf,
  layoutProblem,
  type QuantizationConfig,
  type QuantizationMethod,
  type StoredBits,
} from './quantization-config.js';
import type { TensorReader } from './safetensors.js';
import type { TensorEntry } from './safetensors-writer.js';

/** A learned transform as stored; the same shape as a backend's pairwise transform. */
export interface StoredTransform {
  /** Input channels. */
  readonly channels: number;
  /** Channels per rotation group. */
  readonly groupSize: number;
  readonly krot: number;
  /** [krot, channels]: a permutation inside each group, read two by two as (i, j), local to the group. */
  readonly pairs: Int16Array;
  /** [krot, channels / 2], radians. */
  readonly theta: Float32Array;
  /** [channels], multiply activations. */
  readonly channelScales: Float32Array;
}

/** A quantized linear as plain arrays; the same shape as a backend's quantized weight, with bias and transform. */
export interface StoredQuantizedLinear {
  readonly bits: StoredBits;
  /** Input channels per grid group; `inFeatures` when per channel. */
  readonly groupSize: number;
  readonly inFeatures: number;
  readonly outFeatures: number;
  /** [out, in], one code per byte. */
  readonly codes: Uint8Array;
  /** [out, in / groupSize]. */
  readonly zeros: Uint8Array;
  /** [out, in / groupSize], f16 values. */
  readonly scales: Float32Array;
  /** [out]. */
  readonly bias?: Float32Array;
  readonly transform?: StoredTransform;
}

/** Whether a module is stored quantized in a checkpoint (it has `qweight` or `codes`). */
export function isQuantized(checkpoint: Pick<TensorReader, 'has'>, module: string): boolean {
  return checkpoint.has(`${module}.qweight`) || checkpoint.has(`${module}.codes`);
}

/**
 * Reads and checks one quantized linear.
 * @param module full module name, e.g. `model.layers.0.self_attn.q_proj`.
 * @throws `tensor-missing`; `tensor-shape` for shapes that don't fit each other or the config; `non-finite` naming the
 * tensor for NaN or infinity in scales, angles and channel scales; `file-corrupt` for pairs that are no permutations
 * and zero points out of range; `unsupported` for grid scales that f16 can't hold.
 */
export async function readQuantizedLinear(
  checkpoint: TensorReader,
  module: string,
  config: QuantizationConfig,
): Promise<StoredQuantizedLinear> {
  const weight =
    config.method === 'gyre'
      ? await readGyreWeight(checkpoint, module, config)
      : await readGemmWeight(checkpoint, module, config);
  const transform = await readTransform(checkpoint, module, config, weight.inFeatures, weight.groupSize);
  const biasName = `${module}.bias`;
  let bias: Float32Array | undefined;
  if (checkpoint.has(biasName)) {
    expectShape(biasName, checkpoint.info(biasName).shape, [weight.outFeatures]);
    bias = finite(biasName, await checkpoint.read(biasName));
  }
  return { ...weight, ...(bias ? { bias } : {}), ...(transform ? { transform } : {}) };
}

async function readGemmWeight(
  checkpoint: TensorReader,
  module: string,
  config: QuantizationConfig,
): Promise<StoredQuantizedLinear> {
  const names = { qweight: `${module}.qweight`, qzeros: `${module}.qzeros`, scales: `${module}.scales` };
  const shape = rank2(names.qweight, checkpoint.info(names.qweight).shape);
  const inFeatures = shape[0];
  const outFeatures = shape[1] * 8;
  const groupSize = checkedGroupSize(config, module, inFeatures);
  const groups = inFeatures / groupSize;
  expectShape(names.qzeros, checkpoint.info(names.qzeros).shape, [groups, outFeatures / 8]);
  expectShape(names.scales, checkpoint.info(names.scales).shape, [groups, outFeatures]);
  const qweight = words(names.qweight, await checkpoint.read(names.qweight));
  const qzeros = words(names.qzeros, await checkpoint.read(names.qzeros));
  const scales = gridScales(names.scales, await checkpoint.read(names.scales));
  return {
    bits: 4,
    groupSize,
    inFeatures,
    outFeatures,
    codes: unpackGemmTransposed(qweight, inFeatures, outFeatures),
    zeros: unpackGemmTransposed(qzeros, groups, outFeatures),
    scales: transpose2d(scales, groups, outFeatures),
  };
}

async function readGyreWeight(
  checkpoint: TensorReader,
  module: string,
  config: QuantizationConfig,
): Promise<StoredQuantizedLinear> {
  const names = {
    shape: `${module}.shape`,
    codes: `${module}.codes`,
    zeros: `${module}.zeros`,
    scales: `${module}.scales`,
  };
  expectShape(names.shape, checkpoint.info(names.shape).shape, [2]);
  const [outFeatures, inFeatures] = words(names.shape, await checkpoint.read(names.shape));
  ensure(
    outFeatures > 0 && inFeatures > 0,
    'file-corrupt',
    () => `${names.shape} says [${outFeatures}, ${inFeatures}]; expected two positive numbers`,
    'Fetch or write the checkpoint again.',
  );
  const { bits } = config;
  const groupSize = checkedGroupSize(config, module, inFeatures);
  const groups = inFeatures / groupSize;
  expectShape(names.codes, checkpoint.info(names.codes).shape, [outFeatures, packedRowBytes(inFeatures, bits)]);
  expectShape(names.zeros, checkpoint.info(names.zeros).shape, [outFeatures, groups]);
  expectShape(names.scales, checkpoint.info(names.scales).shape, [outFeatures, groups]);
  const packed = octets(names.codes, await checkpoint.read(names.codes));
  const zeros = octets(names.zeros, await checkpoint.read(names.zeros));
  const worst = zeros.findIndex((zero) => zero >= 2 ** bits);
  ensure(
    worst < 0,
    'file-corrupt',
    () => `${names.zeros}: zero point ${zeros[worst]} at ${worst} does not fit ${bits} bits`,
    'The file is damaged or config.json belongs to another checkpoint.',
  );
  return {
    bits,
    groupSize,
    inFeatures,
    outFeatures,
    codes: unpackBits(packed, outFeatures, inFeatures, bits),
    zeros,
    scales: gridScales(names.scales, await checkpoint.read(names.scales)),
  };
}

async function readTransform(
  checkpoint: TensorReader,
  module: string,
  config: QuantizationConfig,
  channels: number,
  gridGroup: number,
): Promise<StoredTransform | undefined> {
  if (config.method === 'awq') return undefined;
  const names = { theta: `${module}.theta`, pairs: `${module}.pairs`, scales: `${module}.channel_scales` };
  // In the gyre schema a linear may go without a transform; half a transform is a damaged file in every schema.
  if (config.method === 'gyre' && Object.values(names).every((name) => !checkpoint.has(name))) return undefined;
  const { krot } = config;
  const groupSize = config.transformGroupSize ?? gridGroup;
  ensure(
    channels % groupSize === 0 && groupSize % 2 === 0,
    'tensor-shape',
    () => `${module}: rotation groups of ${groupSize} do not divide ${channels} channels into pairs`,
    'config.json and the tensors belong to different checkpoints: fetch both again.',
  );
  expectShape(names.scales, checkpoint.info(names.scales).shape, [1, channels]);
  const channelScales = finite(names.scales, await checkpoint.read(names.scales));
  const zero = channelScales.indexOf(0);
  ensure(zero < 0, 'file-corrupt', () => `${names.scales}: the scale of channel ${zero} is 0, which has no inverse`);
  if (krot === 0) {
    return { channels, groupSize, krot, pairs: new Int16Array(0), theta: new Float32Array(0), channelScales };
  }
  expectShape(names.theta, checkpoint.info(names.theta).shape, [krot, channels / 2]);
  expectShape(names.pairs, checkpoint.info(names.pairs).shape, [krot, channels]);
  const theta = finite(names.theta, await checkpoint.read(names.theta));
  const tensor = await checkpoint.read(names.pairs);
  if (!(tensor.data instanceof Int16Array)) throw wrongDtype(names.pairs, 'int16', tensor);
  checkPairs(names.pairs, tensor.data, channels, groupSize);
  return { channels, groupSize, krot, pairs: tensor.data, theta, channelScales };
}

/** Throws `file-corrupt` unless every group of every rotation is a permutation of 0 … groupSize − 1. */
function checkPairs(name: string, pairs: Int16Array, channels: number, groupSize: number): void {
  const seenIn = new Int32Array(groupSize).fill(-1);
  for (let start = 0, group = 0; start < pairs.length; start += groupSize, group++) {
    for (let i = start; i < start + groupSize; i++) {
      const channel = pairs[i];
      if (channel >= 0 && channel < groupSize && seenIn[channel] !== group) {
        seenIn[channel] = group;
        continue;
      }
      const rotation = Math.floor(start / channels);
      throw new GyreError(
        'file-corrupt',
        `${name}: rotation ${rotation}, channels ${start % channels} to ${(start % channels) + groupSize}: expected a permutation of 0 … ${groupSize - 1}, found ${channel} ${channel >= 0 && channel < groupSize ? 'twice' : 'in it'}`,
        { remedy: 'The file is damaged or config.json has the wrong group_size: fetch both again.' },
      );
    }
  }
}

function checkedGroupSize(config: QuantizationConfig, module: string, inFeatures: number): number {
  const groupSize = groupSizeOf(config, module, inFeatures);
  ensure(
    inFeatures > 0 && inFeatures % groupSize === 0,
    'tensor-shape',
    () => `${module}: ${inFeatures} inputs are no multiple of the group size ${groupSize}`,
    'config.json and the tensors belong to different checkpoints, or group_size_overrides lacks this module.',
  );
  return groupSize;
}

function rank2(name: string, shape: readonly number[]): readonly number[] {
  ensure(shape.length === 2, 'tensor-shape', () => `${name}: expected two dimensions, found [${shape.join(', ')}]`);
  return shape;
}

function expectShape(name: string, found: readonly number[], expected: readonly number[]): void {
  ensure(
    found.length === expected.length && found.every((n, i) => n === expected[i]),
    'tensor-shape',
    () => `${name}: expected shape [${expected.join(', ')}], found [${found.join(', ')}]`,
    'config.json (group_size, krot, bits) and the tensors must belong to the same checkpoint.',
  );
}

function wrongDtype(name: string, expected: string, tensor: HostTensor): GyreError {
  return new GyreError('tensor-shape', `${name}: expected ${expected}, found ${tensor.dtype}`, {
    remedy: 'The checkpoint is not in the layout its config.json names.',
  });
}

function words(name: string, tensor: HostTensor): Int32Array {
  if (!(tensor.data instanceof Int32Array)) throw wrongDtype(name, 'int32', tensor);
  return tensor.data;
}

function octets(name: string, tensor: HostTensor): Uint8Array {
  if (!(tensor.data instanceof Uint8Array)) throw wrongDtype(name, 'uint8', tensor);
  return tensor.data;
}

/** The values as f32. @throws `non-finite` naming the tensor. */
function finite(name: string, tensor: HostTensor): Float32Array {
  const values = floats(tensor);
  const bad = firstNonFinite(values);
  ensure(
    bad < 0,
    'non-finite',
    () => `${name}: element ${bad} is ${values[bad]}`,
    'The checkpoint is damaged or was made from a model with overflows: fetch or quantize it again.',
  );
  return values;
}

/** Grid scales: finite and f16 values whatever they are stored as, for that is what kernels hold. */
function gridScales(name: string, tensor: HostTensor): Float32Array {
  const values = finite(name, tensor);
  if (tensor.dtype === 'f16') return values;
  const bad = values.findIndex((value) => roundToF16(value) !== value);
  ensure(
    bad < 0,
    'unsupported',
    () => `${name}: scale ${values[bad]} is stored as ${tensor.dtype} and is no f16 value`,
    'Use a checkpoint with f16 scales.',
  );
  return values;
}

/**
 * The tensors that store a quantized linear under a method. Packing happens when the data is asked for.
 * A transform shared by several linears is passed with each and written once per linear.
 * @throws `tensor-shape` when the layout can't hold it (see layoutProblem), `usage` when values meant for f16 are no
 * f16 values (they must be rounded before the weights are), `non-finite`.
 */
export function quantizedLinearEntries(
  module: string,
  linear: StoredQuantizedLinear,
  method: QuantizationMethod,
): TensorEntry[] {
  const { inFeatures, outFeatures, bits, groupSize, bias, transform } = linear;
  const problem = layoutProblem(method, linear);
  ensure(problem === undefined, 'tensor-shape', () => `${module}: ${problem}`);
  const groups = inFeatures / groupSize;
  ensure(
    linear.codes.length === outFeatures * inFeatures &&
      linear.zeros.length === outFeatures * groups &&
      linear.scales.length === outFeatures * groups &&
      (bias === undefined || bias.length === outFeatures),
    'tensor-shape',
    () =>
      `${module}: codes, zeros, scales and bias of a [${outFeatures}, ${inFeatures}] linear with ${groups} groups have ${linear.codes.length}, ${linear.zeros.length}, ${linear.scales.length}, ${bias?.length ?? 0} elements`,
  );
  ensure(
    method !== 'paroquant' || transform !== undefined,
    'usage',
    () => `${module}: the paroquant layout needs a transform`,
    'Write the awq layout for linears without one.',
  );
  ensure(
    method !== 'awq' || transform === undefined,
    'usage',
    () => `${module}: the awq layout has no place for a transform`,
    'Write the paroquant or gyre layout.',
  );
  const scales = exactF16(`${module}.scales`, linear.scales);
  const entries: TensorEntry[] = [];
  if (method === 'gyre') {
    entries.push(
      { name: `${module}.shape`, dtype: 'i32', shape: [2], data: () => Int32Array.of(outFeatures, inFeatures) },
      {
        name: `${module}.codes`,
        dtype: 'u8',
        shape: [outFeatures, packedRowBytes(inFeatures, bits)],
        data: () => packBits(linear.codes, outFeatures, inFeatures, bits),
      },
      { name: `${module}.zeros`, dtype: 'u8', shape: [outFeatures, groups], data: () => linear.zeros },
      { name: `${module}.scales`, dtype: 'f16', shape: [outFeatures, groups], data: () => scales },
    );
    if (bias) entries.push({ name: `${module}.bias`, dtype: 'f32', shape: [outFeatures], data: () => bias });
  } else {
    entries.push(
      {
        name: `${module}.qweight`,
        dtype: 'i32',
        shape: [inFeatures, outFeatures / 8],
        data: () => packGemmTransposed(linear.codes, inFeatures, outFeatures),
      },
      {
        name: `${module}.qzeros`,
        dtype: 'i32',
        shape: [groups, outFeatures / 8],
        data: () => packGemmTransposed(linear.zeros, groups, outFeatures),
      },
      {
        name: `${module}.scales`,
        dtype: 'f16',
        shape: [groups, outFeatures],
        data: () => transpose2d(scales, outFeatures, groups),
      },
    );
    if (bias) {
      const bits16 = fromFloat32(bias, 'f16');
      const bad = bias.findIndex((value) => !Number.isFinite(roundToF16(value)));
      ensure(bad < 0, 'non-finite', () => `${module}.bias: ${bias[bad]} is out of the range of f16`);
      entries.push({ name: `${module}.bias`, dtype: 'f16', shape: [outFeatures], data: () => bits16 });
    }
  }
  if (transform) entries.push(...transformEntries(module, transform, inFeatures));
  return entries;
}

function transformEntries(module: string, transform: StoredTransform, inFeatures: number): TensorEntry[] {
  const { channels, krot, pairs } = transform;
  ensure(
    channels === inFeatures &&
      pairs.length === krot * channels &&
      transform.theta.length === (krot * channels) / 2 &&
      transform.channelScales.length === channels,
    'tensor-shape',
    () => `${module}: the transform of ${channels} channels does not fit ${inFeatures} inputs`,
  );
  checkPairs(`${module}.pairs`, pairs, channels, transform.groupSize);
  const theta = exactF16(`${module}.theta`, transform.theta);
  const channelScales = exactF16(`${module}.channel_scales`, transform.channelScales);
  const scaleEntry: TensorEntry = {
    name: `${module}.channel_scales`,
    dtype: 'f16',
    shape: [1, channels],
    data: () => channelScales,
  };
  if (krot === 0) return [scaleEntry];
  return [
    { name: `${module}.theta`, dtype: 'f16', shape: [krot, channels / 2], data: () => theta },
    { name: `${module}.pairs`, dtype: 'i16', shape: [krot, channels], data: () => pairs },
    scaleEntry,
  ];
}

/** The values as f16 bits. @throws `non-finite`; `usage` when rounding would change one. */
function exactF16(name: string, values: Float32Array): Uint16Array {
  const bad = values.findIndex((value) => !Number.isFinite(value) || roundToF16(value) !== value);
  if (bad >= 0) {
    ensure(Number.isFinite(values[bad]), 'non-finite', () => `${name}: element ${bad} is ${values[bad]}`);
    throw new GyreError('usage', `${name}: element ${bad}, ${values[bad]}, is not an f16 value`, {
      remedy: 'Round transforms and grid scales to f16 before the weights are rounded against them.',
    });
  }
  return fromFloat32(values, 'f16') as Uint16Array;
}

/** Channel-major codes [in, out] as rows per output [out, in]; what rounding kernels produce, as storage wants it. */
export function channelMajorToRows(codes: Uint8Array, inFeatures: number, outFeatures: number): Uint8Array {
  return transpose2d(codes, inFeatures, outFeatures);
}
