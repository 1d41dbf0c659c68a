// Reverse-mode differentiation over the op contract: a tape records ops as they run and walks them backwards.
//
// A Variable is a tensor with a place for ∂loss/∂itself. Gradients add up: over the uses of a variable, and for those
// that outlive a tape (parameters, weights shared by several batches) over tapes, until they are taken. A tape owns the
// values its ops made and frees them with `free`; gradients of what it made are freed as the walk passes them.
import { ensure } from '../core/errors.js';
import type {
  Backend,
  GridSpec,
  MatmulOptions,
  PairwiseTransform,
  Tensor,
  TransformHandle,
  TransformObjective,
} from '../ops/backend.js';
import {
  requireGradients,
  type AttentionGradientOptions,
  type ElementLoss,
  type GradientOps,
  type LossGradient,
  type SplitHeadsGradientOptions,
} from '../ops/gradients.js';

/** A tensor that takes part in differentiation. */
export class Variable {
  /** Replaced when a parameter is set from outside; otherwise fixed. */
  value: Tensor;
  readonly requiresGradient: boolean;
  /** Sum of the gradients that have arrived. */
  gradient: Tensor | undefined;

  constructor(value: Tensor, requiresGradient: boolean) {
    this.value = value;
    this.requiresGradient = requiresGradient;
  }

  /** The gradient, which is the caller's to free; the sum starts anew. */
  takeGradient(): Tensor | undefined {
    const { gradient } = this;
    this.gradient = undefined;
    return gradient;
  }
}

/** A leaf that is trained. */
export function parameter(value: Tensor): Variable {
  return new Variable(value, true);
}

/** A leaf that is not. */
export function constant(value: Tensor): Variable {
  return new Variable(value, false);
}

/** What a loss op returns. */
export interface Loss {
  /** Mean over elements or rows, [1]: the tape's, like every other value. */
  readonly value: Tensor;
  /** The value as a number. Waits for all work up to it where the backend works in the background. */
  read(): Promise<number>;
  /** Adds scale · ∂loss/∂… to the gradient of every variable the loss depends on. Once per loss. */
  backward(scale?: number): Promise<void>;
}

/** The layout of a transform whose angles and scales are variables. */
export type RotationLayout = Pick<PairwiseTransform, 'channels' | 'groupSize' | 'krot' | 'pairs'>;

interface Node {
  readonly outputs: readonly Variable[];
  /** Called once, with the gradients of the outputs (undefined where none arrived). */
  readonly backward: (gradients: readonly (Tensor | undefined)[]) => Promise<void>;
}

/** Options of {@link Tape}. */
export interface TapeOptions {
  /** False: ops run, nothing is recorded (validation). Default true. */
  readonly record?: boolean;
  /** Of products, forward and back; see MatmulOptions. Default f32. */
  readonly precision?: MatmulOptions['precision'];
}

/** Runs ops on a backend and remembers how to differentiate them. @throws GyreError `unsupported` without gradient ops. */
export class Tape {
  readonly backend: Backend;
  readonly #ops: GradientOps;
  readonly #record: boolean;
  readonly #precision: MatmulOptions['precision'];
  #nodes: Node[] = [];
  #owned: Tensor[] = [];
  #handles: TransformHandle[] = [];
  #whenFreed: (() => void)[] = [];

  constructor(backend: Backend, options: TapeOptions = {}) {
    this.backend = backend;
    this.#ops = requireGradients(backend);
    this.#record = options.record ?? true;
    this.#precision = options.precision;
  }

  /** a [m, k] · b [k, n], either stored transposed. */
  async matmul(
    a: Variable,
    b: Variable,
    options: { readonly transposeA?: boolean; readonly transposeB?: boolean } = {},
  ): Promise<Variable> {
    const { transposeA = false, transposeB = false } = options;
    const product = (left: Tensor, right: Tensor, turned: MatmulOptions) =>
      this.backend.matmul(left, right, { ...turned, precision: this.#precision });
    return this.#unary([a, b], await product(a.value, b.value, { transposeA, transposeB }), async (dy) => {
      // y = op(a)·op(b): ∂op(a) = ∂y·op(b)ᵀ, ∂op(b) = op(a)ᵀ·∂y, each transposed back if it was stored so.
      if (a.requiresGradient)
        await this.#add(
          a,
          transposeA
            ? await product(b.value, dy, { transposeA: transposeB, transposeB: true })
            : await product(dy, b.value, { transposeB: !transposeB }),
        );
      if (b.requiresGradient)
        await this.#add(
          b,
          transposeB
            ? await product(dy, a.value, { transposeA: true, transposeB: transposeA })
            : await product(a.value, dy, { transposeA: !transposeA }),
        );
    });
  }

  /** a + scale·b, elementwise (residuals, biases spread over rows). */
  async add(a: Variable, b: Variable, scale = 1): Promise<Variable> {
    return this.#unary([a, b], await this.backend.addScaled(a.value, b.value, scale), async (dy) => {
      if (a.requiresGradient) await this.#add(a, dy, 1, false);
      if (b.requiresGradient) await this.#add(b, dy, scale, false);
    });
  }

  /** factor · x. */
  async scale(x: Variable, factor: number): Promise<Variable> {
    return this.#unary([x], await this.backend.addScaled(x.value, x.value, factor - 1), (dy) =>
      this.#add(x, dy, factor, false),
    );
  }

  /** x itself; `look` sees ∂loss/∂x on the way back (the tensor is only lent). */
  tap(x: Variable, look: (gradient: Tensor) => Promise<void>): Variable {
    const [output] = this.#push(
      [x],
      [x.value],
      async ([dy]) => {
        if (!dy) return;
        await look(dy);
        await this.#add(x, dy, 1, false);
      },
      false,
    );
    return output;
  }

  /** [rows, a], [rows, b], … → [rows, a + b + …]. */
  async concatColumns(parts: readonly Variable[]): Promise<Variable> {
    if (parts.length === 1) return parts[0];
    const joined = await this.backend.concatColumns(parts.map((part) => part.value));
    return this.#unary(parts, joined, async (dy) => {
      const pieces = await this.#ops.splitColumns(
        dy,
        parts.map((part) => part.value.shape[1]),
      );
      for (const [i, part] of parts.entries()) await this.#add(part, pieces[i]);
    });
  }

  /** x [rows, n], weight [n]. */
  async rmsNorm(x: Variable, weight: Variable, eps: number): Promise<Variable> {
    return this.#unary([x, weight], await this.backend.rmsNorm(x.value, weight.value, eps), async (dy) => {
      const gradient = await this.#ops.rmsNormGradient(x.value, weight.value, eps, dy);
      await this.#add(x, gradient.x);
      await this.#add(weight, gradient.weight);
    });
  }

  /** Merged gate and up [rows, 2·n] → [rows, n]. */
  async siluMul(gateUp: Variable): Promise<Variable> {
    return this.#unary([gateUp], await this.backend.siluMul(gateUp.value), async (dy) =>
      this.#add(gateUp, await this.#ops.siluMulGradient(gateUp.value, dy)),
    );
  }

  /** Merged projections → q, k, v through per-head norms and RoPE; see the op. */
  async splitHeads(
    qkv: Variable,
    options: Omit<SplitHeadsGradientOptions, 'qNorm' | 'kNorm'>,
    norms: { readonly q?: Variable; readonly k?: Variable } = {},
  ): Promise<{ q: Variable; k: Variable; v: Variable }> {
    const full: SplitHeadsGradientOptions = { ...options, qNorm: norms.q?.value, kNorm: norms.k?.value };
    const parts = await this.backend.splitHeads(qkv.value, full);
    const inputs = [qkv, norms.q, norms.k].filter((v) => v !== undefined);
    const [q, k, v] = this.#push(inputs, [parts.q, parts.k, parts.v], async (gradients) => {
      const shapes = [parts.q, parts.k, parts.v];
      const dy: Tensor[] = [];
      const zeros: Tensor[] = [];
      for (const [i, gradient] of gradients.entries()) {
        if (gradient) dy.push(gradient);
        else {
          zeros.push(await this.backend.addScaled(shapes[i], shapes[i], -1));
          dy.push(zeros[zeros.length - 1]);
        }
      }
      const out = await this.#ops.splitHeadsGradient(qkv.value, full, { q: dy[0], k: dy[1], v: dy[2] });
      this.backend.free(...zeros);
      await this.#add(qkv, out.qkv);
      if (norms.q && out.qNorm) await this.#add(norms.q, out.qNorm);
      if (norms.k && out.kNorm) await this.#add(norms.k, out.kNorm);
    });
    return { q, k, v };
  }

  /** Causal grouped-query attention of whole sequences from position 0. */
  async attention(q: Variable, k: Variable, v: Variable, options: AttentionGradientOptions): Promise<Variable> {
    const y = await this.backend.attention(q.value, k.value, v.value, { ...options, start: 0 });
    return this.#unary([q, k, v], y, async (dy) => {
      const out = await this.#ops.attentionGradient(q.value, k.value, v.value, options, dy);
      await this.#add(q, out.q);
      await this.#add(k, out.k);
      await this.#add(v, out.v);
    });
  }

  /**
   * A pairwise transform of activation rows x [rows, channels] with variable angles theta [krot, channels / 2] and
   * activation-side scales [channels].
   */
  async rotate(x: Variable, layout: RotationLayout, theta: Variable, channelScales: Variable): Promise<Variable> {
    const { backend } = this;
    const handle = await this.#ops.transformOf(layout, theta.value, channelScales.value);
    this.#handles.push(handle);
    const y = await backend.rotate(x.value, handle);
    return this.#unary([x, theta, channelScales], y, async (dy) => {
      const out = await this.#ops.rotateGradient(x.value, handle, dy);
      await this.#add(x, out.x);
      await this.#add(theta, out.theta);
      await this.#add(channelScales, out.channelScales);
    });
  }

  /**
   * Ŵ = T⁻¹(Q(T(W))) [in, cols] of a transform objective with variable angles and weight-side scales s; straight-through.
   * One use per walk: the objective keeps one forward point.
   */
  async transformedWeight(objective: TransformObjective, theta: Variable, scales: Variable): Promise<Variable> {
    const value = await objective.forward(theta.value, scales.value);
    // The objective owns the value.
    const [w] = this.#push(
      [theta, scales],
      [value],
      async ([dy]) => {
        if (!dy) return;
        const out = await objective.backwardOn(dy);
        await this.#add(theta, out.theta);
        await this.#add(scales, out.scales);
      },
      false,
    );
    return w;
  }

  /**
   * A fixed transform of a weight's channels w [in, cols], forward or inverse. Gradients pass through its transpose, the
   * other direction on the activation side: T = R·diag(s), so Tᵀ = diag(s)·R⁻¹ and T⁻ᵀ = R·diag(1/s).
   */
  async transformChannels(
    w: Variable,
    transform: PairwiseTransform | TransformHandle,
    direction: 'forward' | 'inverse',
  ): Promise<Variable> {
    const { backend } = this;
    const y = await backend.transformChannels(w.value, transform, direction);
    return this.#unary([w], y, async (dy) => {
      const back = direction === 'forward' ? 'inverse' : 'forward';
      await this.#add(w, await backend.transformChannels(dy, transform, back, 'activation'));
    });
  }

  /** Rounds w [in, cols] onto a grid of variable scales and zero points [in / groupSize, cols]; see the op. */
  async fakeQuantize(w: Variable, scales: Variable, zeros: Variable, grid: GridSpec): Promise<Variable> {
    const y = await this.#ops.fakeQuantize(w.value, scales.value, zeros.value, grid);
    return this.#unary([w, scales, zeros], y, async (dy) => {
      const out = await this.#ops.fakeQuantizeGradient(w.value, scales.value, zeros.value, grid, dy);
      await this.#add(w, out.w);
      await this.#add(scales, out.scales);
      await this.#add(zeros, out.zeros);
    });
  }

  /** A fixed x [in, cols] with each group's rows times variable scales [in / groupSize, cols]. */
  async scaleGroups(x: Tensor, scales: Variable, groupSize: number): Promise<Variable> {
    return this.#unary([scales], await this.#ops.scaleGroups(x, scales.value, groupSize), async (dy) =>
      this.#add(scales, await this.#ops.scaleGroupsGradient(x, groupSize, dy)),
    );
  }

  /** Smooth-L1 or mean squared error against a fixed target. */
  async elementLoss(prediction: Variable, target: Tensor, loss: ElementLoss): Promise<Loss> {
    return this.#loss(prediction, await this.#ops.elementLoss(prediction.value, target, loss));
  }

  /** Cross-entropy of logits [rows, classes]. */
  async crossEntropy(logits: Variable, targets: Int32Array): Promise<Loss> {
    return this.#loss(logits, await this.#ops.crossEntropy(logits.value, targets));
  }

  /** KL(softmax(reference) ‖ softmax(logits)), mean over rows. */
  async klDivergence(logits: Variable, reference: Tensor): Promise<Loss> {
    return this.#loss(logits, await this.#ops.klDivergence(logits.value, reference));
  }

  /**
   * Runs a segment and keeps only its result; the walk runs it a second time, recorded. `run` must be a function of its
   * inputs and of leaves it closes over, and do the same both times.
   */
  async checkpoint(
    inputs: readonly Variable[],
    run: (tape: Tape, inputs: readonly Variable[]) => Promise<Variable>,
  ): Promise<Variable> {
    const { backend } = this;
    const first = new Tape(backend, { record: false, precision: this.#precision });
    const result = await run(
      first,
      inputs.map((v) => constant(v.value)),
    );
    first.free(result);
    if (!this.#record) {
      this.#owned.push(result.value);
      return constant(result.value);
    }
    // Leaves inside may be trained even where no input is: gradients are always asked for.
    const output = new Variable(result.value, true);
    this.#owned.push(result.value);
    this.#nodes.push({
      outputs: [output],
      backward: async ([dy]) => {
        if (!dy) return;
        const again = new Tape(backend, { precision: this.#precision });
        const copies = inputs.map((v) => new Variable(v.value, v.requiresGradient));
        const y = await run(again, copies);
        await again.#add(y, dy, 1, false);
        await again.backward();
        again.free();
        for (const [i, copy] of copies.entries()) {
          const gradient = copy.takeGradient();
          if (gradient) await this.#add(inputs[i], gradient);
        }
      },
    });
    return output;
  }

  /** Walks back from every variable made here that has a gradient (set by losses, or by another tape that used it). */
  async backward(): Promise<void> {
    for (const node of this.#nodes.reverse()) {
      const gradients = node.outputs.map((output) => output.takeGradient());
      if (gradients.every((g) => g === undefined)) continue;
      await node.backward(gradients);
      this.backend.free(...gradients);
    }
    this.#nodes = [];
  }

  /** Frees something the tape's functions read for as long as they may be walked back. */
  onFree(release: () => void): void {
    this.#whenFreed.push(release);
  }

  /** Frees the values the tape made, but for `kept`. */
  free(...kept: readonly Variable[]): void {
    const keep = new Set(kept.map((v) => v.value));
    this.backend.free(...this.#owned.filter((tensor) => !keep.has(tensor)));
    this.backend.release(...this.#handles);
    for (const release of this.#whenFreed) release();
    this.#whenFreed = [];
    this.#owned = [];
    this.#handles = [];
    this.#nodes = [];
  }

  #loss(prediction: Variable, { loss, gradient }: LossGradient): Loss {
    if (!this.#record) this.backend.free(gradient);
    this.#owned.push(loss);
    let used = !this.#record;
    return {
      value: loss,
      read: async () => (await this.backend.download(loss))[0],
      backward: async (scale = 1) => {
        ensure(!used, 'usage', 'a loss of an unrecorded tape, or one already walked back from, has no gradient');
        used = true;
        await this.#add(prediction, gradient, scale);
        await this.backward();
      },
    };
  }

  /** Records an op of one result. */
  #unary(inputs: readonly Variable[], value: Tensor, backward: (dy: Tensor) => Promise<void>): Variable {
    const [output] = this.#push(inputs, [value], async ([dy]) => {
      if (dy) await backward(dy);
    });
    return output;
  }

  #push(inputs: readonly Variable[], values: readonly Tensor[], backward: Node['backward'], owned = true): Variable[] {
    const requires = this.#record && inputs.some((v) => v.requiresGradient);
    const outputs = values.map((value) => new Variable(value, requires));
    if (owned) this.#owned.push(...values);
    if (requires) this.#nodes.push({ outputs, backward });
    return outputs;
  }

  /** Adds scale · gradient to a variable's; takes the tensor over unless `owned` is false. */
  async #add(variable: Variable, gradient: Tensor, scale = 1, owned = true): Promise<void> {
    const { backend } = this;
    if (!variable.requiresGradient) {
      if (owned) backend.free(gradient);
      return;
    }
    if (variable.gradient) {
      await backend.addScaled(variable.gradient, gradient, scale, true);
      if (owned) backend.free(gradient);
    } else if (owned) {
      variable.gradient = scale === 1 ? gradient : await backend.addScaled(gradient, gradient, scale - 1, true);
    } else {
      variable.gradient = await backend.addScaled(gradient, gradient, scale - 1);
    }
  }
}
