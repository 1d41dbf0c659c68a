// A decoder block as a differentiable function of its input and of its linear groups: the block objective
// of the published recipe (design §4.4), and the pieces of an end-to-end gradient.
import { constant, type Tape, type Variable } from '../../autograd/index.js';
import { GROUP_NAMES, type BlockFrame, type GroupName } from '../../models/block.js';
import { hostTensor } from '../../core/tensor.js';
import type { RopeHandle, Tensor } from '../../ops/backend.js';

/** Weights of a block's linear groups, channel-major and merged: [in, Σ out]. */
export type BlockWeights = Readonly<Record<GroupName, Variable>>;

/** What of a block is not trained. */
export interface FixedBlock {
  readonly frame: BlockFrame;
  /** Bias of a merged group [Σ out], where it has one. */
  readonly biases: Readonly<Partial<Record<GroupName, Float32Array>>>;
}

/** Where a batch of sequences stands: whole sequences from position 0. */
export interface BlockContext {
  readonly batch: number;
  readonly rope: RopeHandle;
}

/** A group's linears without their bias: input [rows, in] → [rows, Σ out]. */
export type ApplyLinear = (group: GroupName, input: Variable) => Promise<Variable>;

/** Plain products with the groups' weights. */
export function byWeights(tape: Tape, weights: BlockWeights): ApplyLinear {
  return (group, input) => tape.matmul(input, weights[group]);
}

/** Sees ∂loss/∂output of each group on the way back; the tensor is only lent. */
export type WatchOutput = (group: GroupName, gradient: Tensor) => Promise<void>;

/** Residual stream x [rows, hidden] → after the block. */
export async function blockForward(
  tape: Tape,
  x: Variable,
  block: FixedBlock,
  apply: ApplyLinear,
  context: BlockContext,
  watch?: WatchOutput,
): Promise<Variable> {
  const { config, norms, layer } = block.frame;
  const { heads, kvHeads, headDim, rmsNormEps } = config;
  const shape = { heads, kvHeads, headDim, batch: context.batch };
  const linear = async (group: GroupName, input: Variable): Promise<Variable> => {
    const product = await apply(group, input);
    const bias = block.biases[group];
    const output = bias ? await addBias(tape, product, bias) : product;
    return watch ? tape.tap(output, (gradient) => watch(group, gradient)) : output;
  };
  const normed = await tape.rmsNorm(x, constant(norms.input), rmsNormEps);
  const { q, k, v } = await tape.splitHeads(
    await linear('qkv', normed),
    { ...shape, start: 0, rope: context.rope, eps: rmsNormEps },
    { q: norms.q && constant(norms.q), k: norms.k && constant(norms.k) },
  );
  const attended = await tape.attention(q, k, v, {
    ...shape,
    scale: headDim ** -0.5,
    window: config.windows[layer],
  });
  const middle = await tape.add(x, await linear('o', attended));
  const mlpInput = await tape.rmsNorm(middle, constant(norms.postAttention), rmsNormEps);
  const activated = await tape.siluMul(await linear('gateUp', mlpInput));
  return tape.add(middle, await linear('down', activated));
}

/** y + bias on every row. Biases are spread to a matrix for the call: few families have them. */
async function addBias(tape: Tape, y: Variable, bias: Float32Array): Promise<Variable> {
  const [rows, columns] = y.value.shape;
  const spread = new Float32Array(rows * columns);
  for (let r = 0; r < rows; r++) spread.set(bias, r * columns);
  const tensor = await tape.backend.upload(hostTensor('f32', [rows, columns], spread));
  const sum = await tape.add(y, constant(tensor));
  tape.backend.free(tensor);
  return sum;
}

/** One value per linear group. */
export async function perGroup<T>(make: (group: GroupName) => Promise<T>): Promise<Record<GroupName, T>> {
  const out: Partial<Record<GroupName, T>> = {};
  for (const group of GROUP_NAMES) out[group] = await make(group);
  return out as Record<GroupName, T>;
}
