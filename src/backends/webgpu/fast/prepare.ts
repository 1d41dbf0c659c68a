// From the contract's handles to a decode plan: which models the fused path takes, and the tables and gains it needs besides the
// weights, which stay where they are.
import type { KvCacheHandle, Tensor, TransformHandle } from '../../../ops/backend.js';
import type { DecodeProduct, DecodeProgram, DecodeSpec } from '../../../ops/decode.js';
import { GpuKvCache, GpuRope } from '../kv-cache.js';
import type { GpuDevice } from '../device.js';
import { GpuHadamard } from '../hadamard.js';
import { ownLinear, type GpuLinear } from '../linear.js';
import { GpuTransform } from '../rotation.js';
import { downloadTensor, own } from '../tensor.js';
import { rotationTable, type ActivationSource } from './activations.js';
import { CHUNK } from './gemv.js';
import { signsOf } from './hadamard.js';
import { rowTakes } from './row.js';
import { DecodePlan } from './plan.js';
import { sliceTakes } from './row-slices.js';
import {
  PLAN_GROUPS,
  PLAN_HEADS,
  batches,
  type PlanBlock,
  type PlanGroup,
  type PlanModel,
  type PlanRow,
  type PlanWeight,
} from './plan-model.js';
import { FEW_SEQUENCES } from './plan-products.js';

/** A decoder's blocks without their caches, and the buffers that were made for them. */
interface Prepared {
  readonly blocks: Promise<Omit<PlanBlock, 'keys' | 'values'>[]>;
  readonly buffers: GPUBuffer[];
  /** Programs that use them. */
  users: number;
}

/**
 * What programs of one decoder share, by its first weight: making the tables takes longer than the rest of a program, and batches
 * that grow or shrink need new ones.
 */
const prepared = new WeakMap<GpuLinear, Prepared>();

/** See Backend.prepareDecode. */
export async function prepareDecode(gpu: GpuDevice, spec: DecodeSpec): Promise<DecodeProgram | undefined> {
  const caches = spec.blocks.map((block) => block.cache);
  const [first] = caches;
  if (!takes(gpu, spec, caches) || !(first instanceof GpuKvCache)) return undefined;
  const key = ownLinear(spec.blocks[0].qkv[0].weight);
  const shared = prepared.get(key) ?? prepareBlocks(gpu, spec);
  prepared.set(key, shared);
  shared.users++;
  let plan: DecodePlan | undefined;
  const release = (): void => {
    plan?.release();
    if (--shared.users > 0) return;
    prepared.delete(key);
    for (const buffer of shared.buffers.splice(0)) gpu.release(buffer);
  };
  try {
    const blocks = (await shared.blocks).map((block, i) => {
      const { keys, values, grid } = caches[i] as GpuKvCache;
      return { ...block, keys, values, grid };
    });
    const [embedding, head] = [ownLinear(spec.embedding), ownLinear(spec.head)];
    const { rotaryDim, turns: rope } = spec.rope as GpuRope;
    const model: PlanModel = {
      hidden: spec.hidden,
      intermediate: spec.intermediate,
      heads: spec.heads,
      kvHeads: spec.kvHeads,
      headDim: spec.headDim,
      rotaryDim,
      vocab: spec.vocab,
      eps: spec.eps,
      rope,
      embedding: { table: embedding.weights, type: embedding.format.kind === 'int' ? 'f32' : embedding.format.kind },
      head:
        head.format.kind === 'int'
          ? { kind: 'int4', weight: planWeight(head) }
          : { kind: head.format.kind === 'bf16' ? 'bf16' : 'f16', weight: head.weights },
      finalNorm: own(spec.finalNorm).buffer,
      blocks,
    };
    plan = new DecodePlan(gpu, model, { batch: first.batch, capacity: first.capacity });
  } catch (error) {
    release();
    throw error;
  }
  const made = plan;
  return {
    begin: (tokens, positions, choices) => made.begin(tokens, positions, choices),
    place: (sequence, place) => made.place(sequence, place),
    steps: (steps) => made.steps(steps),
    release,
  };
}

/** Gains and tables of every block. */
function prepareBlocks(gpu: GpuDevice, spec: DecodeSpec): Prepared {
  const buffers: GPUBuffer[] = [];
  const upload = (data: Float32Array | Uint32Array): GPUBuffer => {
    const buffer = gpu.buffer(Math.max(16, data.byteLength), 'tables of the decode plan');
    gpu.upload(buffer, data);
    buffers.push(buffer);
    return buffer;
  };
  const group = async (products: readonly DecodeProduct[], norm?: Tensor): Promise<PlanGroup> => {
    const weights = products.map(({ weight }) => planWeight(ownLinear(weight)));
    const channels = weights[0].inFeatures;
    const normWeight = norm && (await downloadTensor(gpu, norm));
    const row = rowOf(products);
    if (row) {
      const gain = normWeight ?? new Float32Array(channels).fill(1);
      return { weights, krot: 0, gain: upload(gain), row };
    }
    const transforms = products.map(({ transform }) => (transform as GpuTransform | undefined)?.source);
    const [transform] = transforms;
    if (!transform || transform.krot === 0) {
      const gain = new Float32Array(products.length * channels);
      for (const [i, own] of transforms.entries())
        for (let c = 0; c < channels; c++)
          gain[i * channels + c] = (normWeight?.[c] ?? 1) * (own?.channelScales[c] ?? 1);
      return { weights, krot: 0, gain: upload(gain) };
    }
    const tables = transforms.flatMap((t) => (t ? [rotationTable(t, normWeight)] : []));
    return { weights, krot: transform.krot, table: upload(concat(tables)) };
  };
  const make = async (): Promise<Omit<PlanBlock, 'keys' | 'values'>[]> => {
    const blocks: Omit<PlanBlock, 'keys' | 'values'>[] = [];
    for (const block of spec.blocks) {
      const { qNorm, kNorm } = block;
      const norms = qNorm && kNorm && (await Promise.all([qNorm, kNorm].map((norm) => downloadTensor(gpu, norm))));
      const headNorms = norms && upload(Float32Array.from(norms.flatMap((norm) => [...norm])));
      blocks.push({
        qkv: await group(block.qkv, block.inputNorm),
        o: await group(block.o),
        gateUp: await group(block.gateUp, block.postAttentionNorm),
        down: await group(block.down),
        ...(headNorms && { headNorms }),
        window: block.window ?? 0,
        turn: block.headTransform !== undefined,
      });
    }
    return blocks;
  };
  const blocks = make();
  // Whoever waits for them hears of an error; nobody has to.
  blocks.catch(() => undefined);
  return { blocks, buffers, users: 0 };
}

function planWeight(linear: GpuLinear): PlanWeight {
  const { inFeatures, outFeatures, weights, grids, bias, format, activations } = linear;
  const kind = format.kind === 'f16' || format.kind === 'bf16' ? format.kind : 'int4';
  return {
    kind,
    inFeatures,
    outFeatures,
    groupSize: kind === 'int4' ? linear.groupSize : CHUNK,
    codes: weights,
    grid: grids ?? weights,
    ...(bias && { bias }),
    ...(activations && { integers: true }),
  };
}

/** What a group does to its input as a whole row; undefined where it only rotates inside groups of channels. */
function rowOf([{ weight, transform }]: readonly DecodeProduct[]): PlanRow | undefined {
  const { activations } = ownLinear(weight);
  const hadamard = transform instanceof GpuHadamard ? rowHadamard(transform) : undefined;
  if (!hadamard && !activations) return undefined;
  return {
    ...(hadamard && { hadamard }),
    ...(activations && { grid: { top: 2 ** (activations.bits - 1) - 1, clip: activations.clip } }),
  };
}

function rowHadamard({ source: { base, order, inner } }: GpuHadamard): NonNullable<PlanRow['hadamard']> {
  const m = Math.sqrt(base.length);
  return { m, p: order / m, inner, signs: signsOf(base) };
}

/**
 * Whether the whole-row kernels take a group: one product, a Hadamard transform or none, codes of 4-bit weights. Behind attention and
 * SiLU rows may be spread over workgroups, whatever the order of the base matrix.
 */
function takesRow(gpu: GpuDevice, products: readonly DecodeProduct[], source: ActivationSource): boolean {
  const [{ weight, transform }] = products;
  const linear = ownLinear(weight);
  const plain = transform === undefined || transform instanceof GpuHadamard;
  const integers = linear.activations === undefined || linear.integers === 4;
  const hadamard = transform instanceof GpuHadamard ? rowHadamard(transform) : undefined;
  const fits =
    rowTakes(linear.inFeatures, hadamard) || (hadamard && sliceTakes(gpu, source, linear.inFeatures, hadamard));
  return products.length === 1 && plain && integers && fits === true;
}

/** Whether the attention kernel takes a transform of heads: Sylvester's matrix over a whole head. */
const takesHeads = (transform: TransformHandle, headDim: number): boolean =>
  transform instanceof GpuHadamard && transform.source.order === headDim && transform.source.base.length === 1;

/** Whether the fused kernels take a model: int4 in groups they know or 16 bits, the head likewise, caches of f16 or of integers. */
function takes(gpu: GpuDevice, spec: DecodeSpec, caches: readonly KvCacheHandle[]): boolean {
  const { embedding, head } = spec;
  const isInt4 = (linear: GpuLinear): boolean =>
    linear.format.kind === 'int' && linear.format.bits === 4 && linear.groupSize % CHUNK === 0;
  const isDense = ({ format, inFeatures }: GpuLinear): boolean =>
    (format.kind === 'f16' || format.kind === 'bf16') && inFeatures % CHUNK === 0;
  const group = (products: readonly DecodeProduct[], source: ActivationSource): boolean =>
    rowOf(products)
      ? takesRow(gpu, products, source) && products.every(({ weight }) => isInt4(ownLinear(weight)))
      : products.every(product) && uniform(products);
  const product = ({ weight, transform }: DecodeProduct): boolean =>
    (isInt4(ownLinear(weight)) || isDense(ownLinear(weight))) &&
    ownLinear(weight).activations === undefined &&
    (transform === undefined ||
      (transform instanceof GpuTransform &&
        transform.source !== undefined &&
        PLAN_GROUPS.includes(transform.groupSize)));
  const uniform = (products: readonly DecodeProduct[]): boolean => {
    const [a] = products.map(({ transform }) => transform as GpuTransform | undefined);
    return products.every(({ transform }) => {
      const b = transform as GpuTransform | undefined;
      return a?.krot === b?.krot && a?.groupSize === b?.groupSize;
    });
  };
  const alone = [{ weight: head }, ...spec.blocks.flatMap((b) => [...b.qkv, ...b.o, ...b.gateUp, ...b.down])].some(
    ({ weight }) => isInt4(ownLinear(weight)) && !batches(planWeight(ownLinear(weight))),
  );
  const most = alone ? FEW_SEQUENCES : DecodePlan.maxBatch;
  const heads = ownLinear(head).format;
  const table = ownLinear(embedding).format;
  return (
    PLAN_HEADS.includes(spec.headDim) &&
    spec.hidden % 32 === 0 &&
    spec.rope instanceof GpuRope &&
    caches.every((cache) => cache.capacity <= (spec.rope as GpuRope).positions) &&
    caches.every((cache) => cache instanceof GpuKvCache && cache.batch <= most) &&
    spec.blocks.every(({ headTransform }) => headTransform === undefined || takesHeads(headTransform, spec.headDim)) &&
    table.kind !== 'int' &&
    (heads.kind === 'f16' || heads.kind === 'bf16' || isInt4(ownLinear(head))) &&
    spec.blocks.every(
      (b) => group(b.qkv, 'norm') && group(b.o, 'attention') && group(b.gateUp, 'norm') && group(b.down, 'silu'),
    ) &&
    // One product adds the residual.
    spec.blocks.every((b) => b.o.length === 1 && b.down.length === 1)
  );
}

function concat(parts: readonly Uint32Array[]): Uint32Array {
  const out = new Uint32Array(parts.reduce((sum, part) => sum + part.length, 0));
  let at = 0;
  for (const part of parts) {
    out.set(part, at);
    at += part.length;
  }
  return out;
}
