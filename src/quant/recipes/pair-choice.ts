// Which channels a rotation pairs: at random (the default everywhere), largest with smallest magnitude, or those of many
// random candidates whose angles grow most when learned. The last two are there for the ablation.
import { hostTensor } from '../../core/tensor.js';
import type { Rng } from '../../core/rng.js';
import type { Backend, GridSpec, Tensor } from '../../ops/backend.js';
import { randomPairs } from '../../transforms/index.js';
import { learnTransform } from '../objectives/layer.js';
import type { BlockSettings } from '../types.js';

/** Candidate rotations per one kept, and the steps they are learned for. */
const CANDIDATES = 3;
const CANDIDATE_STEPS = 30;

/** Pairs [krot, channels] for a weight w [channels, cols]. */
export async function choosePairs(
  backend: Backend,
  kind: BlockSettings['pairs'],
  w: Tensor,
  shape: { readonly groupSize: number; readonly krot: number; readonly grid: GridSpec },
  rng: Rng,
): Promise<Int16Array> {
  const { groupSize, krot, grid } = shape;
  const [channels] = w.shape;
  if (krot === 0) return new Int16Array(0);
  switch (kind) {
    case 'random':
      return randomPairs(channels, groupSize, krot, rng);
    case 'magnitude':
      return magnitudePairs(await backend.download(w), channels, groupSize, krot);
    case 'learned':
      return learnedPairs(backend, w, channels, groupSize, krot, grid, rng);
  }
}

/** Rotation k pairs rank r of a group's channels, by largest magnitude, with rank r + k from the far half. */
function magnitudePairs(w: Float32Array, channels: number, groupSize: number, krot: number): Int16Array {
  const cols = w.length / channels;
  const size = Float64Array.from({ length: channels }, (_, c) =>
    w.subarray(c * cols, (c + 1) * cols).reduce((max, v) => Math.max(max, Math.abs(v)), 0),
  );
  const pairs = new Int16Array(krot * channels);
  const half = groupSize / 2;
  for (let group = 0; group < channels; group += groupSize) {
    const ranks = Array.from({ length: groupSize }, (_, i) => i).sort((a, b) => size[group + b] - size[group + a]);
    for (let k = 0; k < krot; k++) {
      for (let r = 0; r < half; r++) {
        pairs[k * channels + group + 2 * r] = ranks[r];
        pairs[k * channels + group + 2 * r + 1] = ranks[groupSize - 1 - ((r + k) % half)];
      }
    }
  }
  return pairs;
}

/** Learns CANDIDATES·krot random rotations on the weight alone; each group keeps the krot with the largest Σθ². */
async function learnedPairs(
  backend: Backend,
  w: Tensor,
  channels: number,
  groupSize: number,
  krot: number,
  grid: GridSpec,
  rng: Rng,
): Promise<Int16Array> {
  const candidates = CANDIDATES * krot;
  const pairs = randomPairs(channels, groupSize, candidates, rng);
  const identity = new Float32Array(channels * channels);
  for (let c = 0; c < channels; c++) identity[c * channels + c] = 1;
  const gram = await backend.upload(hostTensor('f32', [channels, channels], identity));
  const { transform } = await learnTransform(
    backend,
    w,
    { gram, target: w },
    { channels, groupSize, krot: candidates, pairs, grid, steps: CANDIDATE_STEPS, learnScales: false },
  );
  backend.free(gram);
  const kept = new Int16Array(krot * channels);
  for (let group = 0; group < channels; group += groupSize) {
    const weight = (k: number): number => {
      const begin = (k * channels + group) / 2;
      return transform.theta.subarray(begin, begin + groupSize / 2).reduce((sum, angle) => sum + angle ** 2, 0);
    };
    const order = Array.from({ length: candidates }, (_, k) => k).sort((a, b) => weight(b) - weight(a));
    // In the order they were learned in: an angle means something after the rotations before it.
    const chosen = order.slice(0, krot).sort((a, b) => a - b);
    for (const [k, from] of chosen.entries()) {
      kept.set(pairs.subarray(from * channels + group, from * channels + group + groupSize), k * channels + group);
    }
  }
  return kept;
}
