// Training a decoder block as one function (design §4.4): steps of AdamW on the block's output error over shuffled batches,
// the best epoch kept by the loss on held-out sequences.
import { constant, Optimizer, Tape, type ParameterGroup } from '../../autograd/index.js';
import { GyreError } from '../../core/errors.js';
import type { Rng } from '../../core/rng.js';
import type { Backend, Tensor } from '../../ops/backend.js';
import type { ElementLoss } from '../../ops/gradients.js';
import type { BlockSamples, BlockSettings, BlockTask, StageCurve } from '../types.js';
import { blockForward, type ApplyLinear } from './block.js';

/** Tokens of one pass: a batch of more is split, and its gradients are added up. */
const PASS_TOKENS = 4096;

/** What is trained, and how the block's forward pass is made of it. */
export interface BlockModel {
  readonly groups: readonly ParameterGroup[];
  /**
   * Makes of the parameters, once per step and on a tape of its own, what all batches of the step share (weights, say);
   * returns how a batch's tape applies the linears.
   */
  prepare(tape: Tape): Promise<(tape: Tape) => ApplyLinear>;
  /** Remembers the parameters as they are now (called when an epoch is the best so far). */
  keep(): Promise<void>;
}

/** What training needs to know of a task. */
export type TrainingTask = Pick<
  BlockTask,
  'fixed' | 'rope' | 'length' | 'training' | 'validation' | 'tell' | 'checkAborted'
>;

/** How a pass is computed. */
export interface StepOptions {
  readonly loss: ElementLoss;
  /** Of products; see MatmulOptions. */
  readonly precision?: BlockSettings['precision'];
}

/** The loss of block settings as an op's argument. */
export function lossOf({ loss, beta }: Pick<BlockSettings, 'loss' | 'beta'>): ElementLoss {
  return loss === 'mse' ? { kind: 'mse' } : { kind: 'smooth-l1', beta };
}

/**
 * Trains a model of the block and returns the losses; the best parameters are those last kept.
 * @throws GyreError `non-finite` when the loss is.
 */
export async function trainBlock(
  backend: Backend,
  task: TrainingTask,
  model: BlockModel,
  options: BlockSettings & { readonly stage: string; readonly rng: Rng },
): Promise<StageCurve> {
  const { epochs, batch, stage, rng, weightDecay } = options;
  const { training } = task;
  const stepsPerEpoch = Math.ceil(training.count / batch);
  const optimizer = new Optimizer(backend, model.groups, { steps: epochs * stepsPerEpoch, weightDecay });
  const loss = lossOf(options);
  const train: number[] = [];
  const validation: number[] = [await validationLoss(backend, task, model, { loss, precision: options.precision })];
  let best = 0;
  await model.keep();
  try {
    for (let epoch = 0; epoch < epochs; epoch++) {
      const order = [...rng.permutation(training.count)];
      let sum = 0;
      const settle = async ({ value, count, step }: Submitted): Promise<void> => {
        const found = await value;
        sum += found * count;
        if (!Number.isFinite(found)) throw diverged(stage);
        task.tell(
          `${stage}: epoch ${epoch + 1}/${epochs}, step ${step + 1}/${stepsPerEpoch}, loss ${found.toExponential(3)}`,
        );
      };
      // A step's loss is waited for when the next one is submitted: the backend never runs dry, and never far behind.
      let last: Submitted | undefined;
      for (let step = 0; step < stepsPerEpoch; step++) {
        task.checkAborted();
        const indices = order.slice(step * batch, (step + 1) * batch);
        const mean = await trainStep(backend, task, model, { loss, precision: options.precision }, indices);
        await optimizer.step();
        const value = read(backend, mean);
        if (last) await settle(last);
        last = { value, count: indices.length, step };
      }
      if (last) await settle(last);
      train.push(sum / training.count);
      const held = await validationLoss(backend, task, model, { loss, precision: options.precision });
      validation.push(held);
      if (!Number.isFinite(held)) throw diverged(stage);
      if (held < validation[best]) {
        best = epoch + 1;
        await model.keep();
      }
    }
  } finally {
    optimizer.dispose();
  }
  return { stage, train, validation, best };
}

/** A step whose loss is on its way. */
interface Submitted {
  readonly value: Promise<number>;
  /** Sequences. */
  readonly count: number;
  readonly step: number;
}

/** Starts to read a loss, and frees it. An error is thrown where the promise is waited for, and only there. */
function read(backend: Backend, loss: Tensor): Promise<number> {
  const value = backend.download(loss).then(([number]) => number);
  value.catch(() => undefined);
  backend.free(loss);
  return value;
}

/** sum + share · value, [1]; the sum is taken over. */
async function addShare(backend: Backend, sum: Tensor | undefined, value: Tensor, share: number): Promise<Tensor> {
  return sum ? backend.addScaled(sum, value, share, true) : backend.addScaled(value, value, share - 1);
}

/** Adds the gradients of one batch to the parameters; returns its mean loss [1]. */
async function trainStep(
  backend: Backend,
  task: TrainingTask,
  model: BlockModel,
  { loss, precision }: StepOptions,
  indices: readonly number[],
): Promise<Tensor> {
  const weightTape = new Tape(backend);
  const apply = await model.prepare(weightTape);
  let mean: Tensor | undefined;
  for (const part of passes(indices, task.length)) {
    const { input, target } = await task.training.read(part);
    const tape = new Tape(backend, { precision });
    const y = await blockForward(tape, constant(input), task.fixed, apply(tape), {
      batch: part.length,
      rope: task.rope,
    });
    const found = await tape.elementLoss(y, target, loss);
    mean = await addShare(backend, mean, found.value, part.length / indices.length);
    await found.backward(part.length / indices.length);
    tape.free();
    backend.free(input, target);
  }
  await weightTape.backward();
  weightTape.free();
  if (!mean) throw new Error('a step without sequences');
  return mean;
}

/** Mean loss on the held-out sequences. */
export async function validationLoss(
  backend: Backend,
  task: Pick<TrainingTask, 'fixed' | 'rope' | 'length' | 'validation'>,
  model: BlockModel,
  { loss, precision }: StepOptions,
): Promise<number> {
  const samples: BlockSamples = task.validation;
  const weightTape = new Tape(backend, { record: false });
  const apply = await model.prepare(weightTape);
  let mean: Tensor | undefined;
  for (const part of passes(
    Array.from({ length: samples.count }, (_, i) => i),
    task.length,
  )) {
    const { input, target } = await samples.read(part);
    const tape = new Tape(backend, { record: false, precision });
    const y = await blockForward(tape, constant(input), task.fixed, apply(tape), {
      batch: part.length,
      rope: task.rope,
    });
    const { value } = await tape.elementLoss(y, target, loss);
    mean = await addShare(backend, mean, value, part.length / samples.count);
    tape.free();
    backend.free(input, target);
  }
  weightTape.free();
  return mean ? read(backend, mean) : NaN;
}

function passes(indices: readonly number[], length: number): number[][] {
  const size = Math.max(1, Math.floor(PASS_TOKENS / length));
  const parts: number[][] = [];
  for (let begin = 0; begin < indices.length; begin += size) parts.push(indices.slice(begin, begin + size));
  return parts;
}

function diverged(stage: string): GyreError {
  return new GyreError('non-finite', `the loss of ${stage} is NaN or infinite`, {
    remedy: 'lower the learning rate, or check the model with gyre eval',
  });
}
