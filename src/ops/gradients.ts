// The gradient section of the op contract: what training through a decoder block asks of a machine beyond its forward
// ops. A backend offers it as `backend.gradients`, or not at all: whoever trains asks `requireGradients` first.
//
// The conventions are those of backend.ts. `…Gradient` ops take the inputs of the forward op they belong to and
// ∂L/∂output, and return ∂L/∂input for each input that can be trained, in new tensors. Products need no ops of their own:
// with y = a·b, ∂a = ∂y·bᵀ and ∂b = aᵀ·∂y are `matmul`. Every op has a float64 oracle in ops/reference, checked against
// finite differences, and cases in the gradient conformance suite.
import { GyreError } from '../core/errors.js';
import type {
  AttentionOptions,
  Awaitable,
  Backend,
  GridSpec,
  PairwiseTransform,
  SplitHeadsOptions,
  Tensor,
  TransformHandle,
} from './backend.js';

/** Losses over elements: the mean of d², or of d²/(2β) where |d| < β and |d| − β/2 elsewhere (Huber, scaled by 1/β). */
export type ElementLoss = { readonly kind: 'mse' } | { readonly kind: 'smooth-l1'; readonly beta: number };

/** A loss and its gradient with respect to the prediction. */
export interface LossGradient {
  /** Mean over elements or rows, [1]: summed beyond f32's precision, and on the backend until somebody reads it. */
  readonly loss: Tensor;
  /** ∂loss/∂prediction, of the prediction's shape. */
  readonly gradient: Tensor;
}

/** One step of AdamW (Loshchilov & Hutter 2019); every value is the caller's, there are no defaults here. */
export interface AdamWStep {
  readonly learningRate: number;
  readonly beta1: number;
  readonly beta2: number;
  readonly eps: number;
  readonly weightDecay: number;
  /** 1 for the first step; corrects the bias of the moments. */
  readonly step: number;
  /** Where the parameter is held after the step; free when undefined. */
  readonly range?: { readonly minimum: number; readonly maximum: number };
}

/** Heads as they are split in training: all sequences of a batch start at one position. */
export type SplitHeadsGradientOptions = Omit<SplitHeadsOptions, 'start'> & { readonly start: number };

/** The attention that is trained: a whole chunk from position 0, without a cache. */
export type AttentionGradientOptions = Omit<AttentionOptions, 'cache' | 'start'>;

/** Ops of training. */
export interface GradientOps {
  /** [rows, Σ widths] → [rows, widths[0]], [rows, widths[1]], …: concatColumns backwards. */
  splitColumns(x: Tensor, widths: readonly number[]): Awaitable<Tensor[]>;
  /** x, dy [rows, n], weight [n] → x [rows, n], weight [n]. */
  rmsNormGradient(x: Tensor, weight: Tensor, eps: number, dy: Tensor): Awaitable<{ x: Tensor; weight: Tensor }>;
  /**
   * A transform whose angles theta [krot, channels / 2] and activation-side scales [channels] are tensors, as they are now.
   * Released like one of `loadTransform`.
   */
  transformOf(
    layout: Pick<PairwiseTransform, 'channels' | 'groupSize' | 'krot' | 'pairs'>,
    theta: Tensor,
    channelScales: Tensor,
  ): Awaitable<TransformHandle>;
  /**
   * Of `rotate`: x, dy [rows, channels] → x, and for the transform theta [krot, channels / 2] and channelScales
   * [channels] (activation side, a).
   */
  rotateGradient(
    x: Tensor,
    transform: TransformHandle,
    dy: Tensor,
  ): Awaitable<{ x: Tensor; theta: Tensor; channelScales: Tensor }>;
  /**
   * Of `splitHeads`, through RoPE and the per-head norms: dq, dk, dv as splitHeads returns q, k, v → qkv
   * [rows, (heads + 2·kvHeads)·headDim], and qNorm, kNorm [headDim] where there are norms.
   */
  splitHeadsGradient(
    qkv: Tensor,
    options: SplitHeadsGradientOptions,
    dy: { readonly q: Tensor; readonly k: Tensor; readonly v: Tensor },
  ): Awaitable<{ qkv: Tensor; qNorm?: Tensor; kNorm?: Tensor }>;
  /** Of `attention` from position 0: q, dy [rows, heads·headDim], k, v [rows, kvHeads·headDim] → q, k, v. */
  attentionGradient(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    options: AttentionGradientOptions,
    dy: Tensor,
  ): Awaitable<{ q: Tensor; k: Tensor; v: Tensor }>;
  /** gateUp [rows, 2·n], dy [rows, n] → [rows, 2·n]. */
  siluMulGradient(gateUp: Tensor, dy: Tensor): Awaitable<Tensor>;

  /**
   * Rounds a weight onto a grid of free scales and zero points: with z = clamp(round(zeros), 0, 2ᵇ−1),
   * `(clamp(round(w/scale) + z, 0, 2ᵇ−1) − z)·scale`. w [in, cols], scales (> 0) and zeros [in / groupSize, cols].
   */
  fakeQuantize(w: Tensor, scales: Tensor, zeros: Tensor, grid: GridSpec): Awaitable<Tensor>;
  /**
   * Straight through both roundings and the zero point's clamp; the codes' clamp keeps its gradient. Inside the range
   * ∂w = dy, ∂scale = dy·(code − z − w/scale), ∂zero = 0; on codes cut off at an end ∂w = 0, ∂scale = dy·(code − z),
   * ∂zero = −dy·scale. (Were the clamp straight-through as well, a zero point would never feel anything.)
   */
  fakeQuantizeGradient(
    w: Tensor,
    scales: Tensor,
    zeros: Tensor,
    grid: GridSpec,
    dy: Tensor,
  ): Awaitable<{ w: Tensor; scales: Tensor; zeros: Tensor }>;

  /** Rows of x [in, cols] times the scales [in / groupSize, cols] of their groups. */
  scaleGroups(x: Tensor, scales: Tensor, groupSize: number): Awaitable<Tensor>;
  /** ∂scales of scaleGroups, for an x that is fixed: Σ over each group's rows of dy·x, [in / groupSize, cols]. */
  scaleGroupsGradient(x: Tensor, groupSize: number, dy: Tensor): Awaitable<Tensor>;

  /** Mean over all elements of prediction and target (of one shape). */
  elementLoss(prediction: Tensor, target: Tensor, loss: ElementLoss): Awaitable<LossGradient>;
  /** Mean over rows of −log softmax(logits)[target]: logits [rows, classes], targets [rows]. */
  crossEntropy(logits: Tensor, targets: Int32Array): Awaitable<LossGradient>;
  /** Mean over rows of KL(softmax(reference) ‖ softmax(logits)): both [rows, classes]; gradient with respect to logits. */
  klDivergence(logits: Tensor, reference: Tensor): Awaitable<LossGradient>;

  /** One AdamW step, in place on `parameter` and its moments (all of one shape; moments start at zero). */
  adamW(parameter: Tensor, gradient: Tensor, first: Tensor, second: Tensor, step: AdamWStep): Awaitable<void>;
}

/** A backend's gradient ops. @throws GyreError `unsupported` where it has none. */
export function requireGradients(backend: Backend): GradientOps {
  if (backend.gradients) return backend.gradients;
  throw new GyreError('unsupported', `the ${backend.info.name} backend has no gradient ops, which training needs`, {
    remedy: 'run it with --device cpu or --device webgpu',
  });
}
