// Smoothing scales s_j = max|X_j|^α / max_i|W_ij|^(1−α) (SmoothQuant), with α searched: the error of the group's outputs with
// weights and activations rounded as they will be, online transform included, on a sample of its inputs. No smoothing is
// one of the candidates: where a model has no outliers, or a rotation deals with them, less of it is better.
import { hostTensor, type HostTensor } from '../../core/tensor.js';
import type { Backend, HadamardTransform, TransformHandle, WeightBits } from '../../ops/backend.js';
import { activationGrid, type NarrowBits } from '../grids/activations.js';

/** Exponents tried. */
const ALPHAS = [0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9] as const;
/** Peaks below this share of the largest count as it, so that dead channels get no absurd scales. */
const FLOOR = 1e-5;

/** What {@link searchSmoothing} looks at. */
export interface SmoothingTask {
  /** [out, in] each. */
  readonly weights: readonly Float32Array[];
  /** max|x| of each input channel. */
  readonly peaks: Float64Array;
  /** Inputs [rows, in]. */
  readonly rows: HostTensor;
  /** Channels with the same number share a scale (o's inputs that come from one value channel). */
  readonly sharedChannel?: (channel: number) => number;
  /** Online transform between smoothing and rounding. */
  readonly transform?: HadamardTransform;
  readonly bits: WeightBits;
  /** Undefined: activations are not rounded. */
  readonly actBits?: NarrowBits;
  /** Undefined: searched. */
  readonly alpha?: number;
}

/** A choice, with the errors of all candidates relative to no smoothing. */
export interface SmoothingChoice {
  /** Undefined: no smoothing. */
  readonly alpha: number | undefined;
  readonly scales: Float64Array | undefined;
  /** Error by α (null: no smoothing), relative to that of no smoothing. */
  readonly errors: readonly { readonly alpha: number | null; readonly error: number }[];
}

/** Chooses scales; see the head of this file. With a given α it only computes them. */
export async function searchSmoothing(backend: Backend, task: SmoothingTask): Promise<SmoothingChoice> {
  const weightPeaks = channelPeaks(task.weights, task.peaks.length);
  const scalesFor = (alpha: number): Float64Array => smoothingScales(task, weightPeaks, alpha);
  if (task.alpha !== undefined) return { alpha: task.alpha, scales: scalesFor(task.alpha), errors: [] };
  const measure = await SmoothingMeasure.open(backend, task);
  try {
    const none = await measure.error(undefined);
    const errors: { alpha: number | null; error: number }[] = [{ alpha: null, error: 1 }];
    let best: { alpha: number | undefined; scales: Float64Array | undefined; error: number } = {
      alpha: undefined,
      scales: undefined,
      error: 1,
    };
    for (const alpha of ALPHAS) {
      const scales = scalesFor(alpha);
      const error = (await measure.error(scales)) / none;
      errors.push({ alpha, error });
      if (error < best.error) best = { alpha, scales, error };
    }
    return { alpha: best.alpha, scales: best.scales, errors };
  } finally {
    measure.close();
  }
}

/** max_i|W_ij| over all weights of the group. */
function channelPeaks(weights: readonly Float32Array[], inFeatures: number): Float64Array {
  const peaks = new Float64Array(inFeatures);
  for (const w of weights) {
    for (let at = 0, c = 0; at < w.length; at++, c = c + 1 === inFeatures ? 0 : c + 1) {
      const size = Math.abs(w[at]);
      if (size > peaks[c]) peaks[c] = size;
    }
  }
  return peaks;
}

/** The published formula, with geometric mean 1 (a common factor changes nothing), shared where it must be. */
export function smoothingScales(
  { peaks, sharedChannel }: Pick<SmoothingTask, 'peaks' | 'sharedChannel'>,
  weightPeaks: Float64Array,
  alpha: number,
): Float64Array {
  const floor = (values: Float64Array): Float64Array => {
    const top = values.reduce((a, b) => Math.max(a, b), 0) || 1;
    return values.map((v) => Math.max(v, FLOOR * top));
  };
  const [x, w] = [floor(peaks), floor(weightPeaks)];
  const raw = x.map((v, c) => v ** alpha / w[c] ** (1 - alpha));
  if (sharedChannel) {
    const shared = new Map<number, number>();
    raw.forEach((s, c) => shared.set(sharedChannel(c), Math.max(shared.get(sharedChannel(c)) ?? 0, s)));
    raw.forEach((_, c) => (raw[c] = shared.get(sharedChannel(c)) ?? 1));
  }
  const mean = Math.exp(raw.reduce((sum, s) => sum + Math.log(s), 0) / raw.length);
  return raw.map((s) => s / mean);
}

/** Error of the rounded group on the sample, for any scales. */
class SmoothingMeasure {
  readonly #backend: Backend;
  readonly #task: SmoothingTask;
  readonly #transform: TransformHandle | undefined;
  /** Exact outputs [rows, out], one per weight, and the weight of each row in the error. */
  readonly #outputs: readonly Float32Array[];
  readonly #rowWeights: Float64Array;

  private constructor(
    backend: Backend,
    task: SmoothingTask,
    transform: TransformHandle | undefined,
    outputs: readonly Float32Array[],
    rowWeights: Float64Array,
  ) {
    this.#backend = backend;
    this.#task = task;
    this.#transform = transform;
    this.#outputs = outputs;
    this.#rowWeights = rowWeights;
  }

  static async open(backend: Backend, task: SmoothingTask): Promise<SmoothingMeasure> {
    const x = await backend.upload(task.rows);
    const n = task.peaks.length;
    const rows = task.rows.shape[0];
    const energy = new Float64Array(rows);
    const outputs: Float32Array[] = [];
    for (const w of task.weights) {
      const weight = await backend.upload(hostTensor('f32', [w.length / n, n], w));
      const y = await backend.matmul(x, weight, { transposeB: true });
      const values = await backend.download(y);
      const out = values.length / rows;
      for (let at = 0; at < values.length; at++) energy[Math.floor(at / out)] += values[at] ** 2;
      outputs.push(values);
      backend.free(weight, y);
    }
    backend.free(x);
    // A row counts by its relative error, but rows that hardly say anything do not count more than typical ones.
    const mean = energy.reduce((a, b) => a + b, 0) / rows;
    const weights = energy.map((e) => 1 / (e + mean || 1));
    return new SmoothingMeasure(
      backend,
      task,
      task.transform && (await backend.loadTransform(task.transform)),
      outputs,
      weights,
    );
  }

  async error(scales: Float64Array | undefined): Promise<number> {
    const backend = this.#backend;
    const { rows, weights, bits, actBits } = this.#task;
    const n = rows.shape[1];
    const scaled = (values: Float32Array, power: 1 | -1): Float32Array =>
      scales ? values.map((v, at) => (power === 1 ? v * scales[at % n] : v / scales[at % n])) : values;
    const turned = async (values: Float32Array): Promise<ReturnType<Backend['upload']>> => {
      const x = await backend.upload(hostTensor('f32', [values.length / n, n], values));
      if (!this.#transform) return x;
      const y = await backend.rotate(x, this.#transform);
      backend.free(x);
      return y;
    };
    const plain = await turned(scaled(rows.data as Float32Array, -1));
    const x = actBits ? await backend.quantizeRows(plain, activationGrid(actBits)) : plain;
    let sum = 0;
    for (const [i, w] of weights.entries()) {
      const stored = await turned(scaled(w, 1));
      const channelMajor = await backend.transpose(stored);
      const rounded = await backend.roundToNearest(channelMajor, { bits, groupSize: n, symmetric: true });
      const y = await backend.matmul(x, rounded.values);
      const found = await backend.download(y);
      const wanted = this.#outputs[i];
      const out = found.length / rows.shape[0];
      for (let at = 0; at < found.length; at++)
        sum += this.#rowWeights[Math.floor(at / out)] * (found[at] - wanted[at]) ** 2;
      backend.free(stored, channelMajor, rounded.values, y);
    }
    backend.free(x, plain);
    return sum;
  }

  close(): void {
    this.#backend.release(this.#transform);
  }
}
