// What a model does to activations while it runs, beside its weights: Hadamard transforms of a linear group's input or of
// the heads, activations rounded before products, keys and values stored as integers.
import { GyreError } from '../core/errors.js';
import type { OnlineConfig } from '../formats/quantization-config.js';
import type { ActivationGrid, HadamardTransform, KvGrid } from '../ops/backend.js';
import { findHadamardBase, hadamardTransform } from '../transforms/index.js';
import type { GroupName } from './block.js';
import type { ModelConfig } from './config.js';

/** See the head of this file. Absent: nothing of the kind. */
export interface Online {
  /** Transforms of the inputs of linear groups; their weights hold the inverses. */
  readonly groups: Readonly<Partial<Record<GroupName, HadamardTransform>>>;
  /** Transform of each head of q and k after RoPE (R3): leaves attention as it is, but not what a cache rounds. */
  readonly heads?: HadamardTransform;
  /** Grid of every linear's input, after its transforms. */
  readonly activations?: ActivationGrid;
  /** Grid of keys and values. */
  readonly kv?: KvGrid;
}

/** A model that runs as it is. */
export const NO_ONLINE: Online = { groups: {} };

/** The same transforms without any rounding: what quantization compares with. */
export function exact(online: Online): Online {
  return { groups: online.groups };
}

/** Channels that a transform sees: a group's input, or a head. */
function channelsAt(config: ModelConfig, at: GroupName | 'heads'): number {
  const widths: Record<GroupName | 'heads', number> = {
    qkv: config.hiddenSize,
    o: config.heads * config.headDim,
    gateUp: config.hiddenSize,
    down: config.intermediateSize,
    heads: config.headDim,
  };
  return widths[at];
}

/** From a checkpoint's description. @throws GyreError `unsupported` for matrices that this version does not build. */
export function readOnline(config: ModelConfig, stored: OnlineConfig | undefined): Online {
  if (!stored) return NO_ONLINE;
  const groups: Partial<Record<GroupName, HadamardTransform>> = {};
  let heads: HadamardTransform | undefined;
  for (const { at, order, inner, construction, baseOrder } of stored.hadamard) {
    const base = findHadamardBase(order);
    if (!base || base.construction !== construction || base.order !== baseOrder) {
      throw new GyreError(
        'unsupported',
        `the checkpoint's Hadamard transform at ${at} is of order ${order} by ${construction} of order ${baseOrder}, which this version of gyre does not build`,
        { remedy: 'update gyre, or quantize the original model with this version' },
      );
    }
    const transform = hadamardTransform(channelsAt(config, at), { order, inner });
    if (at === 'heads') heads = transform;
    else groups[at] = transform;
  }
  const { activations, kvCache } = stored;
  return { groups, heads, activations, kv: kvCache };
}

/** For a checkpoint's description; undefined when nothing happens online. */
export function onlineConfig(online: Online): OnlineConfig | undefined {
  const { groups, heads, activations, kv } = online;
  const places = Object.entries({ ...groups, heads }) as [GroupName | 'heads', HadamardTransform | undefined][];
  const hadamard = places.flatMap(([at, transform]) => {
    const base = transform && findHadamardBase(transform.order);
    if (!transform || !base) return [];
    return [
      { at, order: transform.order, inner: transform.inner, construction: base.construction, baseOrder: base.order },
    ];
  });
  if (hadamard.length === 0 && !activations && !kv) return undefined;
  return { hadamard, ...(activations ? { activations } : {}), ...(kv ? { kvCache: kv } : {}) };
}
