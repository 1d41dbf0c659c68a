// Ranges of a linear group's weights and inputs, before its transform and after: what `gyre report` draws. Looked at
// through a sample of rows, so that it costs little beside quantizing, and the same for equal runs.
import { hostTensor } from '../core/tensor.js';
import { valueStatistics } from '../core/statistics.js';
import type { Backend, PairwiseTransform, Tensor } from '../ops/backend.js';
import type { GroupRanges, Range } from './results.js';
import type { GroupResult, GroupTask } from './types.js';

/** Rows of the stacked weights looked at, spread evenly over the outputs. */
const WEIGHT_ROWS = 384;
/** Rows of inputs looked at: from each chunk the first ones of its first sequence and its very last. */
const INPUT_ROWS = { perChunk: 64, total: 256 } as const;
/** Channels are drawn in at most this many runs. */
const CHANNEL_BINS = 128;
const HISTOGRAM_BINS = 81;

/** A few of a linear group's inputs, for its ranges. First tokens are in it: that is where massive activations live. */
export class RangeSample {
  readonly #backend: Backend;
  readonly #parts: Float32Array[] = [];
  #rows = 0;

  constructor(backend: Backend) {
    this.#backend = backend;
  }

  /** Looks at a chunk of inputs x [rows, in]. */
  async add(x: Tensor): Promise<void> {
    const [rows] = x.shape;
    const half = Math.min(INPUT_ROWS.perChunk, INPUT_ROWS.total - this.#rows, rows) >> 1;
    if (half === 0) return;
    for (const [begin, end] of [
      [0, half],
      [rows - half, rows],
    ]) {
      this.#parts.push((await this.#backend.download(this.#backend.sliceRows(x, begin, end))).slice());
    }
    this.#rows += 2 * half;
  }

  /** [rows, in], row-major; undefined when nothing was seen. */
  values(): Float32Array | undefined {
    return this.#parts.length === 0 ? undefined : concat(this.#parts);
  }
}

/** Ranges of a quantized group. `inputs` [rows, in]: a sample of what the quantized path sees. */
export async function groupRanges(
  backend: Backend,
  task: Pick<GroupTask, 'weights' | 'inFeatures'>,
  result: Pick<GroupResult, 'parts' | 'foldedScales'>,
  inputs: Float32Array | undefined,
): Promise<GroupRanges> {
  const { weights, inFeatures } = task;
  const transforms = result.parts.map((part) => (result.foldedScales ? divideBy(result.foldedScales) : part.transform));
  const total = weights.reduce((sum, w) => sum + w.length / inFeatures, 0);
  const samples = weights.map((w) => sampleRows(w, inFeatures, Math.min(1, WEIGHT_ROWS / total)));
  const transformed = async (x: Float32Array, transform: PairwiseTransform, side: 'weight' | 'activation') => {
    const rows = await backend.upload(hostTensor('f32', [x.length / inFeatures, inFeatures], x));
    const channels = await backend.transpose(rows);
    const after = await backend.transformChannels(channels, transform, 'forward', side);
    const back = await backend.transpose(after);
    const values = (await backend.download(back)).slice();
    backend.free(rows, channels, after, back);
    return values;
  };
  const every = transforms.every((transform) => transform !== undefined);
  const weightsAfter = every
    ? concat(await Promise.all(samples.map((w, i) => transformed(w, transforms[i], 'weight'))))
    : undefined;
  // With a transform for each linear, the inputs are shown under the first one's.
  const [first] = transforms;
  const inputsAfter = inputs && first ? await transformed(inputs, first, 'activation') : undefined;
  return {
    channelsPerBin: Math.ceil(inFeatures / CHANNEL_BINS),
    weights: beforeAfter(concat(samples), weightsAfter, inFeatures),
    activations: inputs ? beforeAfter(inputs, inputsAfter, inFeatures) : null,
  };
}

function beforeAfter(before: Float32Array, after: Float32Array | undefined, channels: number) {
  const ranges = [before, ...(after ? [after] : [])].map((values) => ({
    values,
    statistics: valueStatistics(values, channels),
  }));
  // One axis for both.
  const limit = fourDigits(Math.max(...ranges.map(({ statistics: s }) => (s.rms > 0 ? s.absMax / s.rms : 1))));
  const [first, second] = ranges.map(({ values, statistics: s }): Range => {
    const unit = s.rms > 0 ? s.rms : 1;
    const bin = Math.ceil(channels / CHANNEL_BINS);
    return {
      rows: values.length / channels,
      rms: fourDigits(s.rms),
      absMax: fourDigits(s.absMax),
      channelRatio: fourDigits(s.channelRatio),
      kurtosis: fourDigits(s.kurtosis),
      channels: Array.from({ length: Math.ceil(channels / bin) }, (_, i) =>
        fourDigits(Math.max(...s.channelMax.subarray(i * bin, (i + 1) * bin)) / unit),
      ),
      histogram: { limit, counts: histogram(values, limit * unit) },
    };
  });
  return { before: first, after: second ?? null };
}

/** Counts of values in equal bins over [−limit, limit]. */
function histogram(values: Float32Array, limit: number): number[] {
  const counts = new Array<number>(HISTOGRAM_BINS).fill(0);
  const scale = HISTOGRAM_BINS / (2 * limit);
  for (let i = 0; i < values.length; i++) {
    counts[Math.min(HISTOGRAM_BINS - 1, Math.max(0, Math.floor((values[i] + limit) * scale)))]++;
  }
  return counts;
}

/** A share of the rows of [rows, channels], spread evenly, at least one. */
function sampleRows(values: Float32Array, channels: number, share: number): Float32Array {
  const rows = values.length / channels;
  const count = Math.max(1, Math.round(rows * share));
  if (count >= rows) return values;
  const out = new Float32Array(count * channels);
  for (let i = 0; i < count; i++) {
    const row = Math.floor((i * rows) / count);
    out.set(values.subarray(row * channels, (row + 1) * channels), i * channels);
  }
  return out;
}

function concat(parts: readonly Float32Array[]): Float32Array {
  if (parts.length === 1) return parts[0];
  const out = new Float32Array(parts.reduce((sum, part) => sum + part.length, 0));
  let offset = 0;
  for (const part of parts) {
    out.set(part, offset);
    offset += part.length;
  }
  return out;
}

/** The transform that divides inputs by s and multiplies weights by it: scales that were folded into the op before. */
export function divideBy(scales: Float32Array): PairwiseTransform {
  return {
    channels: scales.length,
    groupSize: scales.length,
    krot: 0,
    pairs: new Int16Array(0),
    theta: new Float32Array(0),
    channelScales: scales.map((s) => 1 / s),
  };
}

/** Four significant digits: what a drawing needs, in a file that stays small. */
export function fourDigits(value: number): number {
  return Number(value.toPrecision(4));
}
