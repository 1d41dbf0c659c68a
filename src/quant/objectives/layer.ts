// The layer objective (design §4.3): the error of a linear group's outputs as a quadratic form in its weights, so that
// neither loss nor gradient depends on the number of calibration tokens, and learning a transform against it.
//
// Channel-major throughout: Wt [in, cols] = Wᵀ. With Gram H and target Pt = (W·C)ᵀ = Cᵀ·Wt the loss of Ŵ is
// tr(ŴᵗHŴt) − 2·⟨Ŵt, Pt⟩, its gradient 2(H·Ŵt − Pt).
import type { Backend, GridSpec, PairwiseTransform, Tensor } from '../../ops/backend.js';
import { ADAM_DEFAULTS, cosineRate } from '../../autograd/index.js';
import { hostTensor } from '../../core/tensor.js';
import { requireGradients } from '../../ops/gradients.js';
import { roundTransform } from '../../transforms/index.js';

/** Scales stay where f16 holds their inverse well: one near zero or below would blow it up. */
export const USABLE_SCALES = { minimum: 1 / 64, maximum: 64 } as const;
/** Steps that are submitted before the loss of the first of them is waited for. */
const STEPS_UNDER_WAY = 4;

/** A group's quadratic objective on a backend. */
export interface LayerObjective {
  /** [in, in]. */
  readonly gram: Tensor;
  /** [in, cols]. */
  readonly target: Tensor;
}

/** Loss of Ŵt (up to the constant ‖WX̃ᵀ‖²/n), and H·Ŵt − Pt, half its gradient (the caller frees it). */
export async function evaluateObjective(
  backend: Backend,
  objective: LayerObjective,
  w: Tensor,
): Promise<{ loss: number; halfGradient: Tensor }> {
  const { halfGradient, loss } = await beginEvaluation(backend, objective, w);
  return { loss: await loss, halfGradient };
}

/** The same with the loss, ⟨Ŵ, HŴ − 2P⟩, still under way: one sum, so that a backend that computes elsewhere is asked once. */
async function beginEvaluation(
  backend: Backend,
  { gram, target }: LayerObjective,
  w: Tensor,
): Promise<{ loss: Promise<number>; halfGradient: Tensor }> {
  const product = await backend.matmul(gram, w);
  const halfGradient = await backend.addScaled(product, target, -1, true);
  const rest = await backend.addScaled(halfGradient, target, -1);
  const loss = Promise.resolve(backend.dot(w, rest));
  backend.free(rest);
  return { loss, halfGradient };
}

/** Settings of {@link learnTransform}. */
export interface LearnOptions {
  readonly channels: number;
  readonly groupSize: number;
  readonly krot: number;
  /** [krot, channels], see transforms/pairwise. */
  readonly pairs: Int16Array;
  readonly grid: GridSpec;
  readonly steps: number;
  /** Peak learning rate of angles and scales; default 0.05. */
  readonly learningRate?: number;
  readonly learnScales: boolean;
}

/**
 * Learns angles and channel scales of one transform by AdamW on the layer objective with straight-through rounding,
 * full batch, cosine schedule, best step kept. Returns the transform rounded to its stored precision, because the
 * weights must be rounded against the numbers the kernel will use.
 *
 * @param w [in, cols] weight (or a sample of its columns, with the objective's target sampled alike).
 */
export async function learnTransform(
  backend: Backend,
  w: Tensor,
  objective: LayerObjective,
  options: LearnOptions,
): Promise<{ transform: PairwiseTransform; curve: number[] }> {
  const { channels, groupSize, krot, pairs, grid, steps, learnScales } = options;
  const peak = options.learningRate ?? 0.05;
  const gradients = requireGradients(backend);
  const angles = (krot * channels) / 2;
  const theta = await parameterOf(backend, [krot, channels / 2], 0);
  const scales = await parameterOf(backend, [channels], 1);
  const learned = await backend.createObjective(w, { channels, groupSize, krot, pairs }, grid);
  const trained = [
    ...(krot > 0 ? [{ parameter: theta, of: 'theta' as const }] : []),
    ...(learnScales ? [{ parameter: scales, of: 'scales' as const, range: USABLE_SCALES }] : []),
  ];
  const curve: number[] = [];
  let best: Point | undefined;
  const settle = async (point: Point): Promise<void> => {
    const loss = await point.loss;
    curve.push(loss);
    const worse = loss < (best ? await best.loss : Infinity) ? best : point;
    if (worse !== point) best = point;
    if (worse) backend.free(worse.theta, worse.scales);
  };
  // Losses are waited for when later steps are submitted, so that a backend that computes elsewhere never runs dry.
  const underWay: Point[] = [];
  try {
    for (let step = 0; step <= steps; step++) {
      const estimate = await learned.forward(theta.value, scales.value);
      const { loss, halfGradient } = await beginEvaluation(backend, objective, estimate);
      // An error is thrown where the promise is waited for, and only there.
      loss.catch(() => undefined);
      underWay.push({ loss, theta: await copyOf(backend, theta.value), scales: await copyOf(backend, scales.value) });
      if (step < steps) {
        const gradient = await learned.backwardOn(halfGradient);
        const learningRate = cosineRate(step, steps, peak);
        for (const { parameter, of, range } of trained)
          await gradients.adamW(parameter.value, gradient[of], parameter.first, parameter.second, {
            ...ADAM_DEFAULTS,
            weightDecay: 0,
            learningRate,
            step: step + 1,
            range,
          });
        backend.free(gradient.theta, gradient.scales);
      }
      backend.free(halfGradient);
      if (underWay.length > STEPS_UNDER_WAY) await settle(underWay.shift() as Point);
    }
    for (const point of underWay.splice(0)) await settle(point);
    // A loss that never was a number leaves the start.
    const start = { theta: new Float32Array(angles), scales: new Float32Array(channels).fill(1) };
    const found = best
      ? { theta: await backend.download(best.theta), scales: await backend.download(best.scales) }
      : start;
    return { transform: roundTransform({ channels, groupSize, krot, pairs }, found.theta, found.scales), curve };
  } finally {
    learned.dispose();
    for (const point of [...underWay, ...(best ? [best] : [])]) backend.free(point.theta, point.scales);
    for (const { value, first, second } of [theta, scales]) backend.free(value, first, second);
  }
}

/** What is learned, and its moments. */
interface Learned {
  readonly value: Tensor;
  readonly first: Tensor;
  readonly second: Tensor;
}

/** A step's parameters, and the loss that they have, which may be under way. */
interface Point {
  readonly loss: Promise<number>;
  readonly theta: Tensor;
  readonly scales: Tensor;
}

async function parameterOf(backend: Backend, shape: readonly number[], value: number): Promise<Learned> {
  const size = shape.reduce((a, b) => a * b, 1);
  const filled = async (x: number): Promise<Tensor> =>
    backend.upload(hostTensor('f32', shape, new Float32Array(size).fill(x)));
  return { value: await filled(value), first: await filled(0), second: await filled(0) };
}

async function copyOf(backend: Backend, tensor: Tensor): Promise<Tensor> {
  return backend.addScaled(tensor, tensor, 0);
}
