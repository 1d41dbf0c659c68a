// How much the model's predictions feel an error in the output of a linear group: token by token (the diagonal of the
// Fisher information summed over a group's outputs), and output by output (the second moment of the gradients of a group's
// outputs, which says what an error in one output does to what another may still put right).
//
// With labels drawn from the model's own predictions, E[∂ −log p(label) / ∂y · (∂ −log p(label) / ∂y)ᵀ] is the curvature of
// KL(model ‖ model with y disturbed). A text that the model wrote at temperature 1 is such a draw: its next tokens are the
// labels. On a text by others they make it the empirical Fisher information.
//
// Block by block, forth and back: one block's weights are on the backend, and the inputs of all blocks for as many
// sequences at a time as a bound on their bytes allows. What is found of a block is given away as soon as it is whole.
import { constant, Tape, Variable } from '../../autograd/index.js';
import { GyreError } from '../../core/errors.js';
import type { Rng } from '../../core/rng.js';
import { floats, type HostTensor, hostTensor } from '../../core/tensor.js';
import type { GroupName } from '../../models/block.js';
import { TENSOR_NAMES } from '../../models/families/names.js';
import {
  embedFromFile,
  groupModules,
  groupShape,
  loadFrame,
  readChecked,
  readLinear,
  type ModelSource,
} from '../../models/load.js';
import { ropeTable } from '../../models/rope.js';
import type { Awaitable, Backend, RopeHandle, Tensor } from '../../ops/backend.js';
import { channelMajor } from '../weights.js';
import { blockForward, byWeights, perGroup, type BlockWeights, type FixedBlock } from './block.js';

/** What was measured of one linear group. */
export interface GroupSensitivity {
  /** Σ over the group's outputs of the squared gradient, per token, scaled to a mean of 1: only differences matter. */
  readonly tokens: Float32Array;
  /**
   * gᵀg / n of the gradients g [n, out] of the group's outputs [out, out]; for q, k and v zero between heads, whose outputs
   * meet in no product. Absent for gate and up, where it was no use (docs/log.md).
   */
  readonly outputs?: HostTensor;
}

/** What was measured of one block. */
export type BlockSensitivity = Readonly<Record<GroupName, GroupSensitivity>>;

/** Options of {@link measureSensitivity}. */
export interface SensitivityOptions {
  /** Sequences in `ids`, all of one length. */
  readonly sequences: number;
  /** Rows of a pass, in whole sequences; default what the backend asks for, or 2048. Logits of a whole pass are held. */
  readonly rows?: number;
  /** Bytes of block inputs kept at a time on the way forth: what bounds how many sequences go through the model together. */
  readonly keptBytes?: number;
  /** Draws the label of each sequence's last token. */
  readonly rng: Rng;
  /** Takes what was measured of a block, the last block first. */
  readonly onMeasured: (layer: number, sensitivity: BlockSensitivity) => Promise<void> | void;
  /** Called before each block, forth and back. @throws to stop. */
  readonly onBlock?: (done: number, total: number) => void;
}

/** Rows of a pass unless a backend asks for more. */
const PASS_ROWS = 2048;
/** Bytes of logits of a pass, gradient not counted. */
const LOGITS_BYTES = 512 * 2 ** 20;
/** Bytes of block inputs kept on the way forth unless asked otherwise, in memory of the processor and of a GPU. */
const KEPT_BYTES = { cpu: 512e6, gpu: 4e9 } as const;

/** Sequences that pass through the model together. */
interface Batch {
  readonly first: number;
  readonly count: number;
}

/**
 * Measures a model on token ids [sequences × length]: every token's weight, and the outputs' second moments over as many
 * sequences as go through the model together. @throws GyreError `unsupported` without gradient ops, `non-finite`.
 */
export async function measureSensitivity(
  backend: Backend,
  source: ModelSource,
  ids: Int32Array,
  options: SensitivityOptions,
): Promise<void> {
  return new Measurement(backend, source, ids, options).run();
}

class Measurement {
  readonly #backend: Backend;
  readonly #source: ModelSource;
  readonly #ids: Int32Array;
  readonly #options: SensitivityOptions;
  readonly #length: number;
  readonly #tokens: Record<GroupName, Float32Array>[];

  constructor(backend: Backend, source: ModelSource, ids: Int32Array, options: SensitivityOptions) {
    this.#backend = backend;
    this.#source = source;
    this.#ids = ids;
    this.#options = options;
    this.#length = ids.length / options.sequences;
    const { layers } = source.config;
    this.#tokens = Array.from({ length: layers }, () => ({
      qkv: new Float32Array(ids.length),
      o: new Float32Array(ids.length),
      gateUp: new Float32Array(ids.length),
      down: new Float32Array(ids.length),
    }));
  }

  async run(): Promise<void> {
    const { config } = this.#source;
    const { sequences, keptBytes, onBlock } = this.#options;
    const table = ropeTable(config, this.#length);
    const rope = await this.#backend.loadRope(table.cos, table.sin, table.rotaryDim);
    const inputBytes = this.#length * config.hiddenSize * config.layers * 4;
    const kept = keptBytes ?? (this.#backend.info.pass ? KEPT_BYTES.gpu : KEPT_BYTES.cpu);
    const together = Math.max(1, Math.min(sequences, Math.floor(kept / inputBytes)));
    const rounds = Math.ceil(sequences / together);
    let done = 0;
    const beforeBlock = () => onBlock?.(done++, rounds * config.layers * 2);
    try {
      // The last round, which measures outputs too and completes each block, is a full one.
      for (let round = 1, end = sequences - (rounds - 1) * together; round <= rounds; round++, end += together) {
        const batches = this.#batches(Math.max(0, end - together), end);
        await this.#throughModel(batches, rope, { last: round === rounds, beforeBlock });
      }
    } finally {
      this.#backend.release(rope);
    }
  }

  #batches(first: number, end: number): Batch[] {
    const { vocabSize } = this.#source.config;
    const rows = this.#options.rows ?? this.#backend.info.pass?.rows ?? PASS_ROWS;
    const most = Math.min(rows, LOGITS_BYTES / (4 * vocabSize));
    const size = Math.max(1, Math.floor(most / this.#length));
    const batches: Batch[] = [];
    for (let at = first; at < end; at += size) batches.push({ first: at, count: Math.min(size, end - at) });
    return batches;
  }

  /** Forth through all blocks, keeping their inputs, and back. */
  async #throughModel(
    batches: readonly Batch[],
    rope: RopeHandle,
    { last, beforeBlock }: { last: boolean; beforeBlock: () => void },
  ): Promise<void> {
    const backend = this.#backend;
    const { layers } = this.#source.config;
    /** By batch: the inputs of the blocks so far, last the residual stream behind them. */
    const streams: Tensor[][] = [];
    const gradients: (Tensor | undefined)[] = [];
    try {
      for (const { first, count } of batches) {
        const ids = this.#ids.subarray(first * this.#length, (first + count) * this.#length);
        streams.push([await backend.upload(await embedFromFile(this.#source, ids))]);
      }
      for (let layer = 0; layer < layers; layer++) {
        beforeBlock();
        const block = await this.#loadBlock(layer);
        for (const [i, { count }] of batches.entries()) {
          const tape = new Tape(backend, { record: false });
          const x = constant(streams[i][layer]);
          const y = await blockForward(tape, x, block.fixed, byWeights(tape, block.weights), { batch: count, rope });
          tape.free(y);
          streams[i].push(y.value);
        }
        block.release();
      }
      const predictions = await this.#loadPredictions();
      for (const [i, batch] of batches.entries())
        gradients.push(await this.#fromPredictions(take(streams[i]), batch, predictions));
      backend.free(predictions.norm, predictions.head);
      for (let layer = layers - 1; layer >= 0; layer--) {
        beforeBlock();
        const block = await this.#loadBlock(layer);
        const sums = last ? new OutputProducts(backend) : undefined;
        // Read when the block is through: waiting for each would leave a GPU without work.
        const reads: Promise<void>[] = [];
        for (const [i, batch] of batches.entries()) {
          const input = take(streams[i]);
          const x = new Variable(input, true);
          const tape = new Tape(backend);
          const see = async (group: GroupName, gradient: Tensor) => {
            const read = this.#keepTokens(layer, group, batch, backend.rowSquares(gradient));
            // It is awaited below, unless something else fails first.
            read.catch(() => undefined);
            reads.push(read);
            if (group !== 'gateUp') await sums?.add(group, gradient);
          };
          const context = { batch: batch.count, rope };
          const y = await blockForward(tape, x, block.fixed, byWeights(tape, block.weights), context, see);
          y.gradient = gradients[i];
          gradients[i] = undefined;
          await tape.backward();
          gradients[i] = x.takeGradient();
          tape.free();
          backend.free(input);
        }
        await Promise.all(reads);
        if (sums) await this.#options.onMeasured(layer, this.#measured(layer, batches, await sums.finish()));
        block.release();
      }
    } finally {
      backend.free(...streams.flat(), ...gradients);
    }
  }

  async #keepTokens(
    layer: number,
    group: GroupName,
    { first }: Batch,
    squares: Awaitable<Float32Array>,
  ): Promise<void> {
    this.#tokens[layer][group].set(await squares, first * this.#length);
  }

  #measured(layer: number, batches: readonly Batch[], sums: ReadonlyMap<GroupName, Float32Array>): BlockSensitivity {
    const rows = batches.reduce((sum, { count }) => sum + count, 0) * this.#length;
    const group = (name: GroupName): GroupSensitivity => {
      const sum = sums.get(name);
      const tokens = normalized(this.#tokens[layer][name], `${name} of block ${layer}`);
      return sum ? { tokens, outputs: this.#secondMoment(name, sum, rows) } : { tokens };
    };
    return { qkv: group('qkv'), o: group('o'), gateUp: group('gateUp'), down: group('down') };
  }

  async #loadPredictions(): Promise<{ norm: Tensor; head: Tensor }> {
    const { hiddenSize, vocabSize, tiedEmbeddings } = this.#source.config;
    const headName = tiedEmbeddings ? TENSOR_NAMES.embedding : TENSOR_NAMES.head;
    const norm = await this.#backend.upload(await readChecked(this.#source, TENSOR_NAMES.finalNorm, [hiddenSize]));
    const head = await this.#backend.upload(await readChecked(this.#source, headName, [vocabSize, hiddenSize]));
    return { norm, head };
  }

  /** ∂ Σ −log p(label) / ∂ of the residual stream behind the last block; frees the stream. */
  async #fromPredictions(
    stream: Tensor,
    { first, count }: Batch,
    { norm, head }: { norm: Tensor; head: Tensor },
  ): Promise<Tensor> {
    const backend = this.#backend;
    const { config } = this.#source;
    const tape = new Tape(backend);
    const x = new Variable(stream, true);
    const normed = await tape.rmsNorm(x, constant(norm), config.rmsNormEps);
    const logits = await tape.matmul(normed, constant(head), { transposeB: true });
    const labels = new Int32Array(count * this.#length);
    for (let s = 0; s < count; s++) {
      const begin = s * this.#length;
      const last = begin + this.#length - 1;
      const text = (first + s) * this.#length;
      labels.set(this.#ids.subarray(text + 1, text + this.#length), begin);
      labels[last] = draw(
        await backend.download(backend.sliceRows(logits.value, last, last + 1)),
        this.#options.rng.fork(`label ${first + s}`),
      );
    }
    const loss = await tape.crossEntropy(logits, labels);
    await loss.backward(labels.length);
    tape.free();
    const gradient = x.takeGradient();
    backend.free(stream);
    if (!gradient) throw new Error('a loss without a gradient');
    return gradient;
  }

  async #loadBlock(layer: number): Promise<{ fixed: FixedBlock; weights: BlockWeights; release: () => void }> {
    const backend = this.#backend;
    const frame = await loadFrame(backend, this.#source, layer);
    const biases: Partial<Record<GroupName, Float32Array>> = {};
    const tensors: Tensor[] = [];
    const weights = await perGroup(async (group) => {
      const parts: Float32Array[] = [];
      const bias: number[] = [];
      const { inFeatures } = groupShape(this.#source.config, group);
      for (let i = 0; i < groupModules(layer, group).length; i++) {
        const { source: linear } = await readLinear(this.#source, layer, group, i);
        if (linear.kind !== 'dense') throw new Error('sensitivity is measured on the original model');
        parts.push(floats(linear.weight));
        bias.push(...(linear.bias ?? []));
      }
      if (bias.length > 0) biases[group] = Float32Array.from(bias);
      const weight = await channelMajor(backend, parts, inFeatures);
      tensors.push(weight);
      return constant(weight);
    });
    const release = () => {
      backend.free(...tensors);
      frame.release();
    };
    return { fixed: { frame, biases }, weights, release };
  }

  #secondMoment(group: GroupName, sum: Float32Array, rows: number): HostTensor {
    const n = Math.round(Math.sqrt(sum.length));
    const { headDim } = this.#source.config;
    const between =
      group === 'qkv' ? (a: number, b: number) => Math.floor(a / headDim) !== Math.floor(b / headDim) : undefined;
    const mean = sum.map((value, at) => (between?.(Math.floor(at / n), at % n) ? 0 : value / rows));
    return hostTensor('f32', [n, n], mean);
  }
}

/** Σ gᵀg of one block's groups. */
class OutputProducts {
  readonly #backend: Backend;
  readonly #sums = new Map<GroupName, Tensor>();

  constructor(backend: Backend) {
    this.#backend = backend;
  }

  async add(group: GroupName, gradient: Tensor): Promise<void> {
    const product = await this.#backend.matmul(gradient, gradient, { transposeA: true });
    const sum = this.#sums.get(group);
    if (!sum) {
      this.#sums.set(group, product);
      return;
    }
    await this.#backend.addScaled(sum, product, 1, true);
    this.#backend.free(product);
  }

  /** The sums, on the host; frees them. */
  async finish(): Promise<Map<GroupName, Float32Array>> {
    const found = new Map<GroupName, Float32Array>();
    for (const [group, sum] of this.#sums) {
      found.set(group, (await this.#backend.download(sum)).slice());
      this.#backend.free(sum);
    }
    return found;
  }
}

function take(stack: Tensor[]): Tensor {
  const top = stack.pop();
  if (!top) throw new Error('a residual stream was taken twice');
  return top;
}

/** One label from the softmax of a row of logits. */
function draw(row: Float32Array, rng: Rng): number {
  const top = row.reduce((max, z) => Math.max(max, z), -Infinity);
  const total = row.reduce((sum, z) => sum + Math.exp(z - top), 0);
  let left = rng.uniform() * total;
  let label = 0;
  while (label < row.length - 1 && (left -= Math.exp(row[label] - top)) > 0) label++;
  return label;
}

/** @throws `non-finite`: NaN and infinity would spread to everything that is weighted by it. */
function normalized(weights: Float32Array, what: string): Float32Array {
  const mean = weights.reduce((sum, w) => sum + w, 0) / weights.length;
  if (!Number.isFinite(mean)) {
    throw new GyreError('non-finite', `gradients at ${what} are NaN, infinite or overflow on the calibration data`, {
      remedy: 'leave out --sensitivity',
    });
  }
  return mean > 0 ? weights.map((w) => w / mean) : weights.fill(1);
}
