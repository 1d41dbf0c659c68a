// The layer objective (design §4.3): the error of a linear group's outputs as a quadratic form in its weights, so that
// neither loss nor gradient depends on the number of calibration tokens, and learning a transform against it.
//
// Channel-major throughout: Wt [in, cols] = Wᵀ. With Gram H and target Pt = (W·C)ᵀ = Cᵀ·Wt the loss of Ŵ is
// tr(ŴᵗHŴt) − 2·⟨Ŵt, Pt⟩, its gradient 2(H·Ŵt − Pt).
import type { Backend, GridSpec, PairwiseTransform, Tensor } from '../../ops/backend.js';
import { AdamW, cosineRate } from '../optimizer.js';
import { roundTransform } from '../../transforms/index.js';

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

/** The same with the loss still under way: a backend that computes elsewhere can be given more to do meanwhile. */
async function beginEvaluation(
  backend: Backend,
  objective: LayerObjective,
  w: Tensor,
): Promise<{ loss: Promise<number>; halfGradient: Tensor }> {
  const product = await backend.matmul(objective.gram, w);
  const halfGradient = await backend.addScaled(product, objective.target, -1, true);
  const terms = Promise.all([backend.dot(w, halfGradient), backend.dot(w, objective.target)]);
  return { loss: terms.then(([square, linear]) => square - linear), halfGradient };
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
  const theta = new Float64Array((krot * channels) / 2);
  const scales = new Float64Array(channels).fill(1);
  const curve: number[] = [];
  let best = { loss: Infinity, theta: theta.slice(), scales: scales.slice() };
  const learned = await backend.createObjective(w, { channels, groupSize, krot, pairs }, grid);
  const thetaOptimizer = new AdamW(theta.length);
  const scaleOptimizer = new AdamW(channels);
  try {
    for (let step = 0; step <= steps; step++) {
      const estimate = await learned.forward(Float32Array.from(theta), Float32Array.from(scales));
      const { loss: pending, halfGradient } = await beginEvaluation(backend, objective, estimate);
      // Both are asked for before either is waited for: one round trip a step.
      const [loss, gradient] = await Promise.all([pending, step < steps ? learned.backward(halfGradient) : undefined]);
      curve.push(loss);
      if (loss < best.loss) best = { loss, theta: theta.slice(), scales: scales.slice() };
      if (gradient) {
        const rate = cosineRate(step, steps, peak);
        if (krot > 0) thetaOptimizer.step(theta, gradient.theta, rate);
        if (learnScales) {
          scaleOptimizer.step(scales, gradient.scales, rate);
          keepPositive(scales);
        }
      }
      backend.free(halfGradient);
    }
  } finally {
    learned.dispose();
  }
  const transform = roundTransform({ channels, groupSize, krot, pairs }, best.theta, best.scales);
  return { transform, curve };
}

/** A scale near zero or below would blow up its inverse: hold it where f16 and the optimiser stay well-behaved. */
function keepPositive(scales: Float64Array): void {
  for (let i = 0; i < scales.length; i++) scales[i] = Math.min(Math.max(scales[i], 1 / 64), 64);
}
