// Rounding that knows how outputs act together. The layer error counts every output for itself; what a model's predictions
// feel of an error D [in, out] is tr(G·Dᵗ·H·D), with H the Gram matrix of the inputs and G the second moment of the
// gradients of the outputs (a Kronecker-factored Fisher information). Where G is not diagonal, an error in one output can be
// made good by others, as GPTQ makes one in an input channel good by the channels after it. Outputs are rounded in turns:
// each turn's targets take up what the turns before it did wrong, then every turn is visited again, given all others.
import { floats, hostTensor, type HostTensor } from '../../core/tensor.js';
import type { Backend, GridSpec, RoundedWeight, Tensor } from '../../ops/backend.js';
import { CLIP_SEARCH, roundCompensated } from './compensated.js';
import { searchClip } from '../grids/clip.js';
import { GPTQ_DAMP } from './gptq.js';

/** Turns that the outputs are rounded in: every fourth one together. */
const TURNS = 4;
/**
 * Added to G, share of its mean diagonal. G is measured, and the Fisher information is no Kronecker product: from .003 to 1 KL is
 * the same, and the more, the fewer tokens are needed (docs/log.md).
 */
const DAMP = 1;
/** Visits of every turn after the first, each a refit of scales and sweeps of descent. */
const ROUNDS = 2;
const SWEEPS = 2;
/** Outputs of one turn move together: their joint step must be below 2 / λ of their part of G, scaled to a diagonal of 1. */
const STEP = 1.5;

/**
 * Rounds w [in, cols], channel-major, whose inputs have the Gram matrix `gram` [in, in] and whose outputs the second moment of
 * gradients `outputs` [cols, cols].
 */
export async function roundCoupled(
  backend: Backend,
  w: Tensor,
  gram: Tensor,
  outputs: HostTensor,
  grid: GridSpec,
): Promise<RoundedWeight> {
  const columns = w.shape[1];
  const order = turnOrder(columns);
  const coupling = dampedAndOrdered(floats(outputs), order);
  if (!coupling || columns < 2 * TURNS) return roundCompensated(backend, w, gram, grid);
  const turns = await prepareTurns(backend, w, coupling, order);
  const factor = await backend.gptqFactor(gram, GPTQ_DAMP);
  const g = await backend.upload(hostTensor('f32', [columns, columns], coupling));
  const done: Turn[] = [];
  for (const turn of turns) {
    const target = await withEarlierErrors(backend, turn, done, g);
    const clip = await searchClip(backend, target, gram, grid, CLIP_SEARCH);
    turn.take(await backend.gptq(target, factor, grid, clip));
    turn.take(await backend.descend(target, turn.rounded, gram, grid, 1));
    turn.take(await backend.refitScales(target, turn.rounded, gram, grid, 1));
    turn.take(await backend.descend(target, turn.rounded, gram, grid, 1));
    await turn.measure();
    if (target !== turn.w) backend.free(target);
    done.push(turn);
  }
  backend.free(factor, g);
  for (let round = 0; round < ROUNDS; round++) {
    for (const turn of turns) {
      const target = await givenAllOthers(backend, turn, turns);
      turn.take(await backend.refitScales(target, turn.rounded, gram, grid, 1));
      turn.take(await backend.descend(target, turn.rounded, gram, grid, SWEEPS));
      await turn.measure();
      backend.free(target);
    }
  }
  const result = await inPlace(backend, turns, order, w.shape[0], grid);
  for (const turn of turns) turn.free();
  return result;
}

/** Outputs that are rounded together. */
class Turn {
  #rounded: RoundedWeight | undefined;
  #deviation: Tensor | undefined;

  constructor(
    readonly backend: Backend,
    /** Of the turn's first output, in the order of turns. */
    readonly begin: number,
    /** [in, size]. */
    readonly w: Tensor,
    /** G's columns of these outputs, each over what its output's joint step asks for: [columns, size]. */
    readonly pull: Tensor,
  ) {}

  get size(): number {
    return this.w.shape[1];
  }

  get rounded(): RoundedWeight {
    if (!this.#rounded) throw new Error('a turn that was not rounded yet');
    return this.#rounded;
  }

  /** Ŵ − W [in, size]. */
  get deviation(): Tensor {
    if (!this.#deviation) throw new Error('a turn that was not rounded yet');
    return this.#deviation;
  }

  take(rounded: RoundedWeight): void {
    if (this.#rounded) this.backend.free(this.#rounded.values);
    this.#rounded = rounded;
  }

  async measure(): Promise<void> {
    this.backend.free(this.#deviation);
    this.#deviation = await this.backend.addScaled(this.rounded.values, this.w, -1);
  }

  free(): void {
    this.backend.free(this.w, this.pull, this.#rounded?.values, this.#deviation);
  }
}

/** Outputs in the order of turns: 0, 4, 8, …, 1, 5, 9, … */
function turnOrder(columns: number): Int32Array {
  const order: number[] = [];
  for (let turn = 0; turn < TURNS; turn++) for (let c = turn; c < columns; c += TURNS) order.push(c);
  return Int32Array.from(order);
}

/** G + damping with rows and columns in this order; undefined when nothing was measured. */
function dampedAndOrdered(outputs: Float32Array, order: Int32Array): Float32Array | undefined {
  const n = order.length;
  const mean = order.reduce((sum, c) => sum + outputs[c * n + c], 0) / n;
  if (!(mean > 0)) return undefined;
  const out = new Float32Array(n * n);
  for (let a = 0; a < n; a++) {
    const row = order[a] * n;
    for (let b = 0; b < n; b++) out[a * n + b] = outputs[row + order[b]] / mean;
    out[a * n + a] += DAMP;
  }
  return out;
}

async function prepareTurns(backend: Backend, w: Tensor, coupling: Float32Array, order: Int32Array): Promise<Turn[]> {
  const n = order.length;
  const turns: Turn[] = [];
  for (let turn = 0, begin = 0; turn < TURNS; turn++) {
    const size = Math.ceil((n - turn) / TURNS);
    const pull = new Float32Array(n * size);
    const divisor = Math.max(1, largestEigenvalue(coupling, n, begin, size) / STEP);
    for (let r = 0; r < n; r++)
      for (let c = 0; c < size; c++)
        pull[r * size + c] = coupling[r * n + begin + c] / (divisor * coupling[(begin + c) * (n + 1)]);
    const own = await backend.gatherColumns(w, order.subarray(begin, begin + size));
    turns.push(new Turn(backend, begin, own, await backend.upload(hostTensor('f32', [n, size], pull))));
    begin += size;
  }
  return turns;
}

/** Of the block [size, size] on G's diagonal, scaled to a diagonal of 1; by power iteration. */
function largestEigenvalue(g: Float32Array, n: number, begin: number, size: number): number {
  const scale = Float64Array.from({ length: size }, (_, i) => 1 / Math.sqrt(g[(begin + i) * (n + 1)]));
  let x = Float64Array.from({ length: size }, (_, i) => 1 + (i % 7) / 7);
  let value = 1;
  for (let step = 0; step < 30; step++) {
    const y = new Float64Array(size);
    for (let r = 0; r < size; r++) {
      const row = (begin + r) * n + begin;
      let sum = 0;
      for (let c = 0; c < size; c++) sum += g[row + c] * scale[c] * x[c];
      y[r] = sum * scale[r];
    }
    value = Math.hypot(...y) / Math.hypot(...x);
    x = y.map((v) => v / value);
  }
  return value;
}

/**
 * The turn's weight as the turns before it leave it to be: W − D_E·G_EL·G_LL⁻¹, the optimum of all outputs not yet rounded (L)
 * given the errors of those that are (E), of which the turn's own are the first.
 */
async function withEarlierErrors(backend: Backend, turn: Turn, done: readonly Turn[], g: Tensor): Promise<Tensor> {
  if (done.length === 0) return turn.w;
  const n = g.shape[0];
  const { begin, size } = turn;
  const later = Int32Array.from({ length: n - begin }, (_, i) => begin + i);
  const among = await backend.gatherColumns(backend.sliceRows(g, begin, n), later);
  const between = await backend.gatherColumns(backend.sliceRows(g, 0, begin), later);
  const solved = await backend.solveSymmetric(among, between, 0);
  const own = await backend.gatherColumns(
    solved,
    Int32Array.from({ length: size }, (_, i) => i),
  );
  const errors = await backend.concatColumns(done.map((earlier) => earlier.deviation));
  const shift = await backend.matmul(errors, own);
  const target = await backend.addScaled(turn.w, shift, -1);
  backend.free(among, between, solved, own, errors, shift);
  return target;
}

/** Where the turn's weight should go from where it is: Ŵ − D·G over G's diagonal. */
async function givenAllOthers(backend: Backend, turn: Turn, turns: readonly Turn[]): Promise<Tensor> {
  const errors = await backend.concatColumns(turns.map((each) => each.deviation));
  const pull = await backend.matmul(errors, turn.pull);
  const target = await backend.addScaled(turn.rounded.values, pull, -1);
  backend.free(errors, pull);
  return target;
}

/** All turns as one weight, outputs where they belong. */
async function inPlace(
  backend: Backend,
  turns: readonly Turn[],
  order: Int32Array,
  channels: number,
  { groupSize }: GridSpec,
): Promise<RoundedWeight> {
  const n = order.length;
  const groups = channels / groupSize;
  const codes = new Uint8Array(channels * n);
  const zeros = new Uint8Array(groups * n);
  const scales = new Float32Array(groups * n);
  for (const { begin, size, rounded } of turns) {
    const place = order.subarray(begin, begin + size);
    for (let r = 0; r < channels; r++)
      for (let c = 0; c < size; c++) codes[r * n + place[c]] = rounded.codes[r * size + c];
    for (let r = 0; r < groups; r++) {
      for (let c = 0; c < size; c++) {
        zeros[r * n + place[c]] = rounded.zeros[r * size + c];
        scales[r * n + place[c]] = rounded.scales[r * size + c];
      }
    }
  }
  const inverse = new Int32Array(n);
  order.forEach((column, at) => (inverse[column] = at));
  const joined = await backend.concatColumns(turns.map(({ rounded }) => rounded.values));
  const values = await backend.gatherColumns(joined, inverse);
  backend.free(joined);
  return { codes, zeros, scales, values };
}
