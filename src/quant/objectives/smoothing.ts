// Smoothing scales, and the search for them. Two rules give candidates, with x_j the inputs of channel j and W_ij its weights:
//
//   peaks     s_j = max|x_j|^α / max_i|W_ij|^(1−α)         SmoothQuant's
//   energies  s_j = (Σ_t w_t·x_tj² / Σ_i W_ij²)^(p/4)      w_t ∝ 1 / (the token's output energy + the mean)
//
// The second is what the error itself asks for when a rotation follows: steps are then proportional to the norm of the whole
// row, for activations and weights alike, and Σ_j x_j²/s_j² · Σ_j W_j²·s_j² is least at p = 1 (Cauchy–Schwarz). Candidates are
// judged by the error that counts: that of the group's outputs with weights and activations rounded as they will be (RTN, or
// GPTQ on the Gram matrix of the rounded inputs), the online transform between, on tokens that neither the scales nor the Gram
// matrix have seen. No smoothing is a candidate, and another must beat it by a least gain: where a model has no outliers, or a
// rotation deals with them, less of it is better.
import { hostTensor, type HostTensor } from '../../core/tensor.js';
import type {
  ActivationGrid,
  Backend,
  GridSpec,
  HadamardTransform,
  Tensor,
  TransformHandle,
} from '../../ops/backend.js';

/** A rule and its exponent: α of peaks, p of energies. */
export interface SmoothingRule {
  readonly by: 'peaks' | 'energies';
  readonly exponent: number;
}

/** Rules tried. */
const RULES: readonly SmoothingRule[] = [
  { by: 'energies', exponent: 1 },
  { by: 'energies', exponent: 0.5 },
  { by: 'peaks', exponent: 0.3 },
  { by: 'peaks', exponent: 0.5 },
  { by: 'peaks', exponent: 0.7 },
];
/** Gain over no smoothing, as a share of its error, below which nothing is smoothed. */
const LEAST_GAIN = 0.02;
/** Peaks below this share of the largest count as it (energies: its square), so that dead channels get no absurd scales. */
const FLOOR = 1e-5;
/** Output channels looked at: scales of inputs need few. */
const MEASURED_OUTPUTS = 512;
/** Share of the rows that candidates are judged on; the rest makes scales and Gram matrices. */
const JUDGED = 0.25;

/** What {@link searchSmoothing} looks at. */
export interface SmoothingTask {
  /** [out, in] each. */
  readonly weights: readonly Float32Array[];
  /** max|x| of each input channel. */
  readonly peaks: Float64Array;
  /** Inputs [rows, in], in no order. */
  readonly rows: HostTensor;
  /** Channels with the same number share a scale (o's inputs that come from one value channel). */
  readonly sharedChannel?: (channel: number) => number;
  /** Online transform between smoothing and rounding. */
  readonly transform?: HadamardTransform;
  readonly grid: GridSpec;
  /** Rounds weights [in, cols], stored channel-major, given the Gram matrix [in, in] of their inputs; returns their values. */
  readonly round: (w: Tensor, gram: Tensor, grid: GridSpec) => Promise<Tensor>;
  /** Undefined: activations are not rounded. */
  readonly activations?: ActivationGrid;
  /** Exponent of `peaks`; undefined: searched. */
  readonly alpha?: number;
}

/** A choice, with the errors of all candidates relative to no smoothing. */
export interface SmoothingChoice {
  /** Undefined: no smoothing. */
  readonly rule: SmoothingRule | undefined;
  readonly scales: Float64Array | undefined;
  /** Error by rule (null: no smoothing), relative to that of no smoothing. */
  readonly errors: readonly { readonly rule: SmoothingRule | null; readonly error: number }[];
}

/** Chooses scales; see the head of this file. With a given α it only computes them. */
export async function searchSmoothing(backend: Backend, task: SmoothingTask): Promise<SmoothingChoice> {
  const ranges = { peaks: channelPeaks(task.weights, task.peaks.length), energies: channelEnergies(task) };
  const scalesFor = (rule: SmoothingRule): Float64Array => smoothingScales(task, ranges, rule);
  if (task.alpha !== undefined) {
    const rule = { by: 'peaks', exponent: task.alpha } as const;
    return { rule, scales: scalesFor(rule), errors: [] };
  }
  const measure = await SmoothingMeasure.open(backend, task);
  try {
    const none = await measure.error(undefined);
    // Inputs that are all zero, or overflow, tell nothing apart; who quantizes the group names the latter.
    if (!Number.isFinite(none)) return { rule: undefined, scales: undefined, errors: [{ rule: null, error: 1 }] };
    const errors: SmoothingChoice['errors'][number][] = [{ rule: null, error: 1 }];
    let best: Omit<SmoothingChoice, 'errors'> & { error: number } = {
      rule: undefined,
      scales: undefined,
      error: 1 - LEAST_GAIN,
    };
    for (const rule of RULES) {
      const scales = scalesFor(rule);
      const error = (await measure.error(scales)) / none;
      errors.push({ rule, error });
      if (error < best.error) best = { rule, scales, error };
    }
    return { rule: best.rule, scales: best.scales, errors };
  } finally {
    measure.close();
  }
}

/** What the rules look at. */
export interface ChannelRanges {
  /** max_i|W_ij| over all weights of the group. */
  readonly peaks: Float64Array;
  readonly energies: {
    /** Σ_t w_t·x_tj² */
    readonly inputs: Float64Array;
    /** Σ_i W_ij² */
    readonly weights: Float64Array;
  };
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

/** Energies of inputs (rows kept for judging left out) and weights. */
function channelEnergies({ weights, rows }: SmoothingTask): ChannelRanges['energies'] {
  const [count, n] = rows.shape;
  const own = new Float64Array(n);
  for (const w of weights) for (let at = 0; at < w.length; at++) own[at % n] += w[at] ** 2;
  // A token's output energy, taken from its inputs' as if channels were independent: a weighting needs no more.
  const x = rows.data as Float32Array;
  const fitted = fittedRows(count);
  const energy = Float64Array.from({ length: fitted }, (_, t) => {
    let sum = 0;
    for (let c = 0; c < n; c++) sum += x[t * n + c] ** 2 * own[c];
    return sum;
  });
  const mean = energy.reduce((a, b) => a + b, 0) / fitted;
  const inputs = new Float64Array(n);
  for (let t = 0; t < fitted; t++) for (let c = 0; c < n; c++) inputs[c] += x[t * n + c] ** 2 / (energy[t] + mean || 1);
  return { inputs, weights: own };
}

/** Rows that scales and Gram matrices are made from: the first ones. */
function fittedRows(count: number): number {
  return Math.max(1, Math.ceil(count * (1 - JUDGED)));
}

/** The scales of a rule, with geometric mean 1 (a common factor changes nothing), shared where they must be. */
export function smoothingScales(
  { peaks, sharedChannel }: Pick<SmoothingTask, 'peaks' | 'sharedChannel'>,
  ranges: ChannelRanges,
  { by, exponent }: SmoothingRule,
): Float64Array {
  const floor = (values: Float64Array, share: number): Float64Array => {
    const top = values.reduce((a, b) => Math.max(a, b), 0) || 1;
    return values.map((v) => Math.max(v, share * top));
  };
  let raw: Float64Array;
  switch (by) {
    case 'peaks': {
      const [x, w] = [floor(peaks, FLOOR), floor(ranges.peaks, FLOOR)];
      raw = x.map((v, c) => v ** exponent / w[c] ** (1 - exponent));
      break;
    }
    case 'energies': {
      const [x, w] = [floor(ranges.energies.inputs, FLOOR ** 2), floor(ranges.energies.weights, FLOOR ** 2)];
      raw = x.map((v, c) => (v / w[c]) ** (exponent / 4));
      break;
    }
  }
  if (sharedChannel) {
    const shared = new Map<number, number>();
    raw.forEach((s, c) => shared.set(sharedChannel(c), Math.max(shared.get(sharedChannel(c)) ?? 0, s)));
    raw.forEach((_, c) => (raw[c] = shared.get(sharedChannel(c)) ?? 1));
  }
  const mean = Math.exp(raw.reduce((sum, s) => sum + Math.log(s), 0) / raw.length);
  return raw.map((s) => s / mean);
}

/** Error of the rounded group on rows it was not fitted to, for any scales. */
class SmoothingMeasure {
  readonly #backend: Backend;
  readonly #task: SmoothingTask;
  readonly #transform: TransformHandle | undefined;
  /** A sample of the outputs' weights [cols, in]. */
  readonly #weights: Float32Array;
  /** Exact outputs of the judged rows [rows, cols], and the weight of each row in the error. */
  readonly #outputs: Float32Array;
  readonly #rowWeights: Float64Array;

  private constructor(
    backend: Backend,
    task: SmoothingTask,
    transform: TransformHandle | undefined,
    exact: { weights: Float32Array; outputs: Float32Array; rowWeights: Float64Array },
  ) {
    this.#backend = backend;
    this.#task = task;
    this.#transform = transform;
    this.#weights = exact.weights;
    this.#outputs = exact.outputs;
    this.#rowWeights = exact.rowWeights;
  }

  static async open(backend: Backend, task: SmoothingTask): Promise<SmoothingMeasure> {
    const [count, n] = task.rows.shape;
    const weights = sampleOutputs(task.weights, n);
    const judged = (task.rows.data as Float32Array).subarray(fittedRows(count) * n);
    const rows = judged.length / n;
    const x = await backend.upload(hostTensor('f32', [rows, n], judged));
    const w = await backend.upload(hostTensor('f32', [weights.length / n, n], weights));
    const y = await backend.matmul(x, w, { transposeB: true });
    const outputs = await backend.download(y);
    backend.free(x, w, y);
    const energy = new Float64Array(rows);
    const cols = outputs.length / rows;
    for (let at = 0; at < outputs.length; at++) energy[Math.floor(at / cols)] += outputs[at] ** 2;
    // A row counts by its relative error, but rows that hardly say anything do not count more than typical ones.
    const mean = energy.reduce((a, b) => a + b, 0) / rows;
    const rowWeights = energy.map((e) => 1 / (e + mean || 1));
    const transform = task.transform && (await backend.loadTransform(task.transform));
    return new SmoothingMeasure(backend, task, transform, { weights, outputs, rowWeights });
  }

  /** NaN where the inputs have no Gram matrix to round by: all zero, or beyond f32. */
  async error(scales: Float64Array | undefined): Promise<number> {
    const backend = this.#backend;
    const { rows, grid, round } = this.#task;
    const [count, n] = rows.shape;
    const split = fittedRows(count) * n;
    const data = rows.data as Float32Array;
    const fitted = await this.#inputs(data.subarray(0, split), scales);
    const product = await backend.matmul(fitted, fitted, { transposeA: true });
    const gram = await backend.addScaled(product, product, n / split - 1, true);
    const size = await backend.dot(gram, gram);
    if (!(size > 0 && Number.isFinite(size))) {
      backend.free(fitted, gram);
      return NaN;
    }
    const stored = await this.#turned(scaled(this.#weights, n, scales, 1));
    const channelMajor = await backend.transpose(stored);
    const values = await round(channelMajor, gram, grid);
    const x = await this.#inputs(data.subarray(split), scales);
    const y = await backend.matmul(x, values);
    const found = await backend.download(y);
    backend.free(fitted, gram, stored, channelMajor, values, x, y);
    const cols = this.#weights.length / n;
    let sum = 0;
    for (const [row, weight] of this.#rowWeights.entries()) {
      let squares = 0;
      for (let at = row * cols; at < (row + 1) * cols; at++) squares += (found[at] - this.#outputs[at]) ** 2;
      sum += weight * squares;
    }
    return sum;
  }

  close(): void {
    this.#backend.release(this.#transform);
  }

  /** Inputs as the weights meet them: divided by the scales, turned, rounded. */
  async #inputs(values: Float32Array, scales: Float64Array | undefined): Promise<Tensor> {
    const backend = this.#backend;
    const { activations, rows } = this.#task;
    const plain = await this.#turned(scaled(values, rows.shape[1], scales, -1));
    if (!activations) return plain;
    const rounded = await backend.quantizeRows(plain, activations);
    backend.free(plain);
    return rounded;
  }

  async #turned(values: Float32Array): Promise<Tensor> {
    const backend = this.#backend;
    const n = this.#task.rows.shape[1];
    const x = await backend.upload(hostTensor('f32', [values.length / n, n], values));
    if (!this.#transform) return x;
    const y = await backend.rotate(x, this.#transform);
    backend.free(x);
    return y;
  }
}

function scaled(values: Float32Array, n: number, scales: Float64Array | undefined, power: 1 | -1): Float32Array {
  if (!scales) return values;
  const out = new Float32Array(values.length);
  for (let begin = 0; begin < values.length; begin += n)
    for (let c = 0; c < n; c++)
      out[begin + c] = power === 1 ? values[begin + c] * scales[c] : values[begin + c] / scales[c];
  return out;
}

/** At most {@link MEASURED_OUTPUTS} rows of all weights, evenly spread. */
function sampleOutputs(weights: readonly Float32Array[], n: number): Float32Array {
  const rows = weights.flatMap((w) => Array.from({ length: w.length / n }, (_, r) => w.subarray(r * n, (r + 1) * n)));
  const count = Math.min(rows.length, MEASURED_OUTPUTS);
  const out = new Float32Array(count * n);
  for (let i = 0; i < count; i++) out.set(rows[Math.floor((i * rows.length) / count)], i * n);
  return out;
}
