// How much the model's predictions feel an error in the output of a linear group, token by token: an ingredient for Gram
// matrices weighted by it. The measure is the diagonal of the Fisher information summed over a group's outputs: with labels
// drawn from the model's own predictions, E[(∂ −log p(label) / ∂y)²] is the curvature of KL(model ‖ model with y disturbed).
//
// One block at a time is on the backend: the tape keeps each block's input and runs the block again on the way back.
import { constant, Tape, Variable } from '../../autograd/index.js';
import type { Rng } from '../../core/rng.js';
import { floats, hostTensor } from '../../core/tensor.js';
import type { GroupName } from '../../models/block.js';
import { TENSOR_NAMES } from '../../models/families/names.js';
import {
  embedFromFile,
  loadFrame,
  readChecked,
  readLinear,
  groupModules,
  type ModelSource,
} from '../../models/load.js';
import { ropeTable } from '../../models/rope.js';
import type { Backend, Tensor } from '../../ops/backend.js';
import { channelMajor } from '../weights.js';
import { blockForward, byWeights, perGroup, type FixedBlock } from './block.js';

/** Σ over a group's outputs of the squared gradient, per token: by block, then by group, [tokens]. */
export type Sensitivity = readonly Readonly<Record<GroupName, Float32Array>>[];

/** Options of {@link measureSensitivity}. */
export interface SensitivityOptions {
  /** Sequences in `ids`, all of one length. */
  readonly sequences: number;
  /** Sequences of a pass; default 4. Logits of a whole pass are held. */
  readonly batch?: number;
  /** Draws the labels. */
  readonly rng: Rng;
}

/**
 * Measures a model on token ids [sequences × length], one draw of labels per token. Each group's weights are scaled to a
 * mean of 1, since only their differences between tokens matter to a group.
 */
export async function measureSensitivity(
  backend: Backend,
  source: ModelSource,
  ids: Int32Array,
  { sequences, batch = 4, rng }: SensitivityOptions,
): Promise<Sensitivity> {
  const { config } = source;
  const length = ids.length / sequences;
  const found = Array.from({ length: config.layers }, () => ({
    qkv: new Float32Array(ids.length),
    o: new Float32Array(ids.length),
    gateUp: new Float32Array(ids.length),
    down: new Float32Array(ids.length),
  }));
  const table = ropeTable(config, length);
  const rope = await backend.loadRope(table.cos, table.sin, table.rotaryDim);
  const norm = await backend.upload(await readChecked(source, TENSOR_NAMES.finalNorm, [config.hiddenSize]));
  const headName = config.tiedEmbeddings ? TENSOR_NAMES.embedding : TENSOR_NAMES.head;
  const head = await backend.upload(await readChecked(source, headName, [config.vocabSize, config.hiddenSize]));
  for (let begin = 0; begin < sequences; begin += batch) {
    const count = Math.min(batch, sequences - begin);
    const first = begin * length;
    const tape = new Tape(backend);
    const embedded = await backend.upload(await embedFromFile(source, ids.subarray(first, first + count * length)));
    // Gradients are asked for all the way down, so that every block is walked back through.
    let x: Variable = new Variable(embedded, true);
    const embedding = x;
    for (let layer = 0; layer < config.layers; layer++) {
      x = await tape.checkpoint([x], (inner, [input]) =>
        runBlock(backend, source, layer, inner, input, { batch: count, rope }, (group, squares) =>
          found[layer][group].set(squares, first),
        ),
      );
    }
    const normed = await tape.rmsNorm(x, constant(norm), config.rmsNormEps);
    const logits = await tape.matmul(normed, constant(head), { transposeB: true });
    const labels = drawLabels(await backend.download(logits.value), config.vocabSize, rng);
    const loss = await tape.crossEntropy(logits, labels);
    await loss.backward();
    tape.free();
    backend.free(embedded, embedding.takeGradient());
  }
  backend.free(norm, head);
  backend.release(rope);
  for (const block of found) for (const weights of Object.values(block)) normalize(weights);
  return found;
}

/** One block on a tape, loaded for the call; `see` gets Σ over outputs of the squared gradient, per row. */
async function runBlock(
  backend: Backend,
  source: ModelSource,
  layer: number,
  tape: Tape,
  input: Variable,
  context: Parameters<typeof blockForward>[4],
  see: (group: GroupName, squares: Float32Array) => void,
): Promise<Variable> {
  const frame = await loadFrame(backend, source, layer);
  const biases: Partial<Record<GroupName, Float32Array>> = {};
  const tensors: Tensor[] = [];
  const weights = await perGroup(async (group) => {
    const parts: Float32Array[] = [];
    const bias: number[] = [];
    let inFeatures = 0;
    for (let i = 0; i < groupModules(layer, group).length; i++) {
      const { source: linear } = await readLinear(source, layer, group, i);
      if (linear.kind !== 'dense') throw new Error('sensitivity is measured on the original model');
      parts.push(floats(linear.weight));
      inFeatures = linear.weight.shape[1];
      bias.push(...(linear.bias ?? []));
    }
    if (bias.length > 0) biases[group] = Float32Array.from(bias);
    const weight = await channelMajor(backend, parts, inFeatures);
    tensors.push(weight);
    return constant(weight);
  });
  tape.onFree(() => {
    backend.free(...tensors);
    frame.release();
  });
  const block: FixedBlock = { frame, biases };
  return blockForward(tape, input, block, byWeights(tape, weights), context, async (group, gradient) => {
    const [rows, columns] = gradient.shape;
    const values = await backend.download(gradient);
    const squares = new Float32Array(rows);
    for (let r = 0; r < rows; r++) for (let c = 0; c < columns; c++) squares[r] += values[r * columns + c] ** 2;
    see(group, squares);
  });
}

/** One label per row of logits, drawn from its softmax. */
function drawLabels(logits: Float32Array, vocab: number, rng: Rng): Int32Array {
  const labels = new Int32Array(logits.length / vocab);
  for (let r = 0; r < labels.length; r++) {
    const row = logits.subarray(r * vocab, (r + 1) * vocab);
    const top = row.reduce((max, z) => Math.max(max, z), -Infinity);
    const total = row.reduce((sum, z) => sum + Math.exp(z - top), 0);
    let left = rng.uniform() * total;
    let label = 0;
    while (label < vocab - 1 && (left -= Math.exp(row[label] - top)) > 0) label++;
    labels[r] = label;
  }
  return labels;
}

function normalize(weights: Float32Array): void {
  const mean = weights.reduce((sum, w) => sum + w, 0) / weights.length;
  if (mean > 0) for (const [i, w] of weights.entries()) weights[i] = w / mean;
}

/** Rows of x [rows, n] times the square roots of their weights: its Gram matrix is Σ w·x·xᵀ. The caller frees it. */
export async function weighRows(backend: Backend, x: Tensor, weights: Float32Array): Promise<Tensor> {
  const [rows, columns] = x.shape;
  const values = (await backend.download(x)).slice();
  for (let r = 0; r < rows; r++) {
    const factor = Math.sqrt(weights[r]);
    for (let c = 0; c < columns; c++) values[r * columns + c] *= factor;
  }
  return backend.upload(hostTensor('f32', [rows, columns], values));
}
