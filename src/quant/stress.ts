// Massive activations planted into a model without changing what it computes, to study how quantization copes with them at any
// size. The results are synthetic: they say what would happen to a model that had such activations.
//
// On all tokens (here): channel j of the down projection's input is silu(gate_j)·up_j, and multiplying up's row j (and its
// bias) by c and dividing down's column j by c changes no output. The channel, one that is active everywhere, then carries c
// times its own activations. Because the planting is a scaling, a smoothing by the same scales would undo it exactly: these
// models show smoothing at its best. On the first token and delimiters alone: stress-tokens.ts.
import { ensure } from '../core/errors.js';
import type { ProgressListener } from '../core/progress.js';
import { floats, hostTensor, type HostTensor } from '../core/tensor.js';
import type { TensorReader } from '../formats/safetensors.js';
import type { ModelConfig } from '../models/config.js';
import { groupModules, type ModelSource } from '../models/load.js';
import type { Backend, Tensor } from '../ops/backend.js';
import type { CalibrationTokens } from './calibration/tokens.js';
import { walkInputs, type InputObserver } from './calibration/walk.js';

/** What is planted. */
export interface StressOptions {
  /** Peak of a planted channel over the typical size (median over channels of their root mean square) of its block's channels. */
  readonly magnitude: number;
  /** `all`: on every token; `few`: on the first token and on delimiters (full stops and line breaks). */
  readonly tokens: 'all' | 'few';
  /** Channels per block. */
  readonly channels: number;
  /** Blocks to plant in. */
  readonly blocks: readonly number[];
}

/** One planted channel. */
export interface PlantedChannel {
  readonly layer: number;
  readonly channel: number;
  /** c. */
  readonly factor: number;
  /** Largest |x| after planting. */
  readonly peak: number;
  /** Share of tokens on which |x| exceeds a tenth of its peak: 1 / tokens … 1. */
  readonly share: number;
}

/** Tokens that channels are measured on. */
export const MEASURED_TOKENS = 8192;

/** A model and what it is measured on. */
export interface StressRun {
  readonly backend: Backend;
  readonly source: ModelSource;
  readonly calibration: CalibrationTokens;
  readonly onProgress?: ProgressListener;
  readonly signal?: AbortSignal;
}

/** @throws GyreError `usage` for options that make no sense. */
export function checkStressOptions(config: ModelConfig, { magnitude, channels, blocks }: StressOptions): void {
  ensure(
    magnitude > 1 && magnitude <= 1e5,
    'usage',
    () => `the magnitude must be above 1 and at most 100000, found ${magnitude}`,
  );
  ensure(
    Number.isInteger(channels) && channels >= 1 && channels <= config.intermediateSize / 4,
    'usage',
    () => `channels must be 1 to ${Math.floor(config.intermediateSize / 4)}, found ${channels}`,
  );
  const wrong = blocks.find((b) => !Number.isInteger(b) || b < 0 || b >= config.layers);
  ensure(
    wrong === undefined && blocks.length > 0,
    'usage',
    () => `the model has blocks 0 to ${config.layers - 1}, found ${wrong}`,
  );
}

/** Chooses channels that are active on every token, and their factors. @throws GyreError `usage` as {@link checkStressOptions}. */
export async function chooseChannels(run: StressRun, options: StressOptions): Promise<PlantedChannel[]> {
  const { blocks } = options;
  checkStressOptions(run.source.config, options);
  const planted: PlantedChannel[] = [];
  let profile: ChannelProfile | undefined;
  await walkInputs({
    ...run,
    maxTokens: MEASURED_TOKENS,
    stage: 'stress',
    observe: (layer) => {
      profile = blocks.includes(layer) ? new ChannelProfile(run.backend) : undefined;
      return new Map(profile ? [['down', profile]] : []);
    },
    finish: (layer) => {
      if (profile) planted.push(...profile.choose(layer, options));
      return Promise.resolve();
    },
  });
  return planted;
}

/** Sizes of every channel on every token. */
export class ChannelProfile implements InputObserver {
  readonly #backend: Backend;
  readonly #rows: Float32Array[] = [];
  #width = 0;

  constructor(backend: Backend) {
    this.#backend = backend;
  }

  async add(x: Tensor): Promise<void> {
    this.#rows.push(await this.#backend.download(x));
    this.#width = x.shape[1];
  }

  /** Median over channels of their root mean square. */
  typical(): number {
    const { squares, count } = this.#sizes();
    return median(squares.map((s) => Math.sqrt(s / count)));
  }

  #sizes(): { peaks: Float64Array; squares: Float64Array; count: number } {
    const n = this.#width;
    const peaks = new Float64Array(n);
    const squares = new Float64Array(n);
    let count = 0;
    for (const part of this.#rows) {
      for (let at = 0; at < part.length; at++) {
        const size = Math.abs(part[at]);
        squares[at % n] += size * size;
        if (size > peaks[at % n]) peaks[at % n] = size;
      }
      count += part.length / n;
    }
    return { peaks, squares, count };
  }

  choose(layer: number, { magnitude, channels }: Pick<StressOptions, 'magnitude' | 'channels'>): PlantedChannel[] {
    const n = this.#width;
    const { peaks, count } = this.#sizes();
    const over = new Float64Array(n);
    for (const part of this.#rows)
      for (let at = 0; at < part.length; at++) if (Math.abs(part[at]) > peaks[at % n] / 10) over[at % n]++;
    const typical = this.typical();
    const live = Array.from({ length: n }, (_, c) => c).filter((c) => peaks[c] > 1e-3 * typical);
    // Ties go to the lower channel: the choice depends on nothing but the numbers.
    live.sort((a, b) => over[b] - over[a] || a - b);
    return live.slice(0, channels).map((channel) => ({
      layer,
      channel,
      factor: Math.max(1, (magnitude * typical) / peaks[channel]),
      peak: Math.max(magnitude * typical, peaks[channel]),
      share: over[channel] / count,
    }));
  }
}

function median(values: Float64Array): number {
  const sorted = values.slice().sort();
  return sorted[sorted.length >> 1];
}

/** The model with the channels planted, as a view; changed tensors are f32. */
export function plantActivations(source: ModelSource, planted: readonly PlantedChannel[]): ModelSource {
  return { ...source, checkpoint: new PlantedReader(source, planted) };
}

class PlantedReader implements TensorReader {
  readonly #base: TensorReader;
  /** By tensor: factors of its rows (up) or columns (down). */
  readonly #changes = new Map<string, { axis: 'rows' | 'columns'; factors: Map<number, number> }>();

  constructor({ checkpoint }: ModelSource, planted: readonly PlantedChannel[]) {
    this.#base = checkpoint;
    for (const { layer, channel, factor } of planted) {
      const up = groupModules(layer, 'gateUp')[1];
      this.#change(`${up}.weight`, 'rows').set(channel, factor);
      if (checkpoint.has(`${up}.bias`)) this.#change(`${up}.bias`, 'rows').set(channel, factor);
      this.#change(`${groupModules(layer, 'down')[0]}.weight`, 'columns').set(channel, 1 / factor);
    }
  }

  get name(): string {
    return this.#base.name;
  }

  has(name: string): boolean {
    return this.#base.has(name);
  }

  names(): IterableIterator<string> {
    return this.#base.names();
  }

  info(name: string): ReturnType<TensorReader['info']> {
    const info = this.#base.info(name);
    return this.#changes.has(name) ? { ...info, dtype: 'f32' } : info;
  }

  async read(name: string): Promise<HostTensor> {
    const tensor = await this.#base.read(name);
    const change = this.#changes.get(name);
    if (!change) return tensor;
    const values = floats(tensor).slice();
    const width = values.length / tensor.shape[0];
    for (const [channel, factor] of change.factors) {
      if (change.axis === 'rows') for (let at = channel * width; at < (channel + 1) * width; at++) values[at] *= factor;
      else for (let at = channel; at < values.length; at += width) values[at] *= factor;
    }
    return hostTensor('f32', tensor.shape, values);
  }

  async readRows(name: string, begin: number, end: number): Promise<HostTensor> {
    if (!this.#changes.has(name)) return this.#base.readRows(name, begin, end);
    const { shape, data } = await this.read(name);
    const width = data.length / shape[0];
    return hostTensor('f32', [end - begin, ...shape.slice(1)], data.slice(begin * width, end * width));
  }

  close(): Promise<void> {
    return this.#base.close();
  }

  #change(name: string, axis: 'rows' | 'columns'): Map<number, number> {
    const known = this.#changes.get(name);
    if (known) return known.factors;
    const factors = new Map<number, number>();
    this.#changes.set(name, { axis, factors });
    return factors;
  }
}
