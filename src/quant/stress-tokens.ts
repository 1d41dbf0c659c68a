// Massive activations on the first token and on delimiters alone, planted without changing what a model computes.
//
// A scaling cannot do it: whatever divides a channel's column divides it on every token. So the MLP gets channels of its own,
// in pairs: both of a pair have the same gate and up rows, and columns d and −d in the down projection. Their products cancel
// on every token, whatever the rows are, and the logits stay. The rows decide where the pair fires: silu(K·z)·(m·z), where
// z = e·x is linear in the MLP's input, about 1 on marked tokens and below 0 on all others, where silu leaves e^−K|z| of
// it. e is a least-squares separator of the two classes, and whether it separates them is measured on sequences that it was
// not fitted to: a block where it does not is refused by name. A trained model has no idle channels to use instead (the
// bundled model's idlest channel writes a tenth of its block's typical output), so the MLP is widened; other blocks' new
// channels are zero.
import { ensure, GyreError } from '../core/errors.js';
import { createRng } from '../core/rng.js';
import { floats, hostTensor, type HostTensor } from '../core/tensor.js';
import type { TensorReader } from '../formats/safetensors.js';
import type { GroupName } from '../models/block.js';
import { groupModules, type ModelSource } from '../models/load.js';
import type { Backend, Tensor } from '../ops/backend.js';
import { largestHadamardOrder } from '../transforms/index.js';
import { walkInputs, type InputObserver } from './calibration/walk.js';
import {
  ChannelProfile,
  checkStressOptions,
  MEASURED_TOKENS,
  type PlantedChannel,
  type StressOptions,
  type StressRun,
} from './stress.js';

/** K: marked tokens lie near z = 1, and at z = −0.3 silu(K·z) is 2e-6 of what it is there. */
const GATE_STEEPNESS = 40;
/** Share of calibration sequences that a separator is judged by, not fitted to. */
const HELD_OUT = 0.25;
/** Damping of the separator's normal equations, share of the mean diagonal. */
const DAMP = 1e-3;
/** Marked tokens a separator may miss, and others it may take for marked, on held-out sequences. */
const ALLOWED_MISSES = 0.02;
const ALLOWED_FALSE = 0.002;
/** The MLP grows by a multiple of this, so that groups of input channels still tile it. */
const WIDTH_STEP = 128;
/** Multiples tried for one that has a Hadamard matrix, when the original width has one. */
const WIDTHS_TRIED = 16;

/** How well a block's inputs tell marked tokens from others, on held-out sequences. */
export interface Separation {
  readonly layer: number;
  readonly marked: number;
  readonly others: number;
  /** Marked tokens at which z ≤ 0. */
  readonly missed: number;
  /** Other tokens at which z > 0. */
  readonly mistaken: number;
  /** Smallest z of marked tokens − largest z of others; marked tokens average 1. */
  readonly margin: number;
}

interface Separator extends Separation {
  /** [hidden] */
  readonly direction: Float64Array;
  /** Largest z of a marked token. */
  readonly top: number;
  /** Typical size of the block's channels. */
  readonly typical: number;
}

/** A pair of channels of one block. */
interface Pair {
  readonly layer: number;
  /** Of the first; the second follows it. */
  readonly channel: number;
  readonly gate: Float32Array;
  readonly up: Float32Array;
  /** Column of the first in the down projection [hidden]; the second's is its negative. */
  readonly down: Float32Array;
}

/** What {@link plantOnTokens} made. */
export interface PlantedTokens {
  readonly source: ModelSource;
  readonly planted: readonly PlantedChannel[];
  readonly separations: readonly Separation[];
}

/**
 * Plants pairs of channels that fire on marked tokens alone.
 *
 * @param marked By calibration token [sequences · length]: whether it is one of them.
 * @param blocks The blocks to plant in; undefined: of either half of the model the block that separates best; `every`: all
 * blocks that separate well enough.
 * @throws GyreError `usage` for options that make no sense, `unsupported` naming the block whose inputs do not separate them.
 */
export async function plantOnTokens(
  run: StressRun,
  marked: Uint8Array,
  options: Omit<StressOptions, 'blocks' | 'tokens'> & {
    readonly blocks?: readonly number[] | 'every';
    readonly seed: number;
  },
): Promise<PlantedTokens> {
  const { source } = run;
  const { layers } = source.config;
  const { channels, magnitude } = options;
  const given = options.blocks === 'every' ? undefined : options.blocks;
  checkStressOptions(source.config, { ...options, tokens: 'few', blocks: given ?? [0] });
  ensure(channels % 2 === 0, 'usage', () => `channels that fire on few tokens come in pairs: ${channels} is odd`);
  const found = await separate(run, marked, given ?? Array.from({ length: layers }, (_, layer) => layer));
  const able = options.blocks === 'every' ? found.filter(isSeparated) : [];
  // Where no block is able, the best one says in its message by how much it is not.
  const chosen = given ? found : able.length > 0 ? able : bestOfHalves(found, layers);
  for (const separation of chosen) refuseUnlessSeparated(separation, given === undefined);

  const width = widened(source.config.intermediateSize, channels);
  const pairs: Pair[] = [];
  const planted: PlantedChannel[] = [];
  for (const separator of chosen) {
    const peak = magnitude * separator.typical;
    for (let i = 0; i < channels; i += 2) {
      const channel = source.config.intermediateSize + i;
      pairs.push(await makePair(source, separator, { channel, peak, seed: options.seed }));
      const share = separator.marked / (separator.marked + separator.others);
      for (const c of [channel, channel + 1])
        planted.push({ layer: separator.layer, channel: c, factor: magnitude, peak, share });
    }
  }
  return {
    source: widenedSource(source, width, pairs),
    planted,
    separations: chosen.map(({ layer, marked: m, others, missed, mistaken, margin }) => ({
      layer,
      marked: m,
      others,
      missed,
      mistaken,
      margin,
    })),
  };
}

/** One pass of the model: a separator for each of the blocks. */
async function separate(run: StressRun, marked: Uint8Array, blocks: readonly number[]): Promise<Separator[]> {
  const found: Separator[] = [];
  const { backend } = run;
  let rows: Rows | undefined;
  let profile: ChannelProfile | undefined;
  await walkInputs({
    ...run,
    maxTokens: MEASURED_TOKENS,
    stage: 'stress',
    observe: (layer) => {
      const observers = new Map<GroupName, InputObserver>();
      if (!blocks.includes(layer)) return observers;
      rows = new Rows(backend);
      profile = new ChannelProfile(backend);
      return observers.set('gateUp', rows).set('down', profile);
    },
    finish: async (layer) => {
      if (!blocks.includes(layer) || !rows || !profile) return;
      const fitted = await fit(backend, layer, rows, marked, run.calibration.length);
      found.push({ ...fitted, typical: profile.typical() });
    },
  });
  return found;
}

/** Keeps a block's MLP inputs. */
class Rows implements InputObserver {
  readonly #backend: Backend;
  readonly #parts: Float32Array[] = [];
  width = 0;

  constructor(backend: Backend) {
    this.#backend = backend;
  }

  async add(x: Tensor): Promise<void> {
    this.width = x.shape[1];
    this.#parts.push(await this.#backend.download(x));
  }

  /** [rows, width] */
  all(): Float32Array {
    const out = new Float32Array(this.#parts.reduce((n, part) => n + part.length, 0));
    let at = 0;
    for (const part of this.#parts) {
      out.set(part, at);
      at += part.length;
    }
    return out;
  }
}

/**
 * Least squares with both classes weighing alike: e₁ for targets 1 (marked) and −1, e₂ for 1 everywhere, which stands in for
 * the bias that linears here lack. z = (e₁ − θ·e₂)·x with θ halfway between the classes, scaled to average 1 on marked.
 */
async function fit(
  backend: Backend,
  layer: number,
  inputs: Rows,
  marked: Uint8Array,
  length: number,
): Promise<Omit<Separator, 'typical'>> {
  const n = inputs.width;
  const x = inputs.all();
  const tokens = x.length / n;
  const sequences = tokens / length;
  const fitted = Math.max(1, Math.min(sequences - 1, Math.round(sequences * (1 - HELD_OUT)))) * length;
  const counts = [0, 0];
  for (let t = 0; t < fitted; t++) counts[marked[t]]++;
  ensure(
    counts[0] > 0 && counts[1] > 0 && tokens > fitted,
    'calibration',
    'the calibration tokens need first or delimiter tokens and others, in at least two sequences',
    'give more text with --calib',
  );
  const weighted = new Float32Array(fitted * n);
  const right = new Float32Array(2 * n);
  for (let t = 0; t < fitted; t++) {
    const weight = 0.5 / counts[marked[t]];
    const root = Math.sqrt(weight);
    for (let c = 0; c < n; c++) {
      const value = x[t * n + c];
      weighted[t * n + c] = root * value;
      right[c] += (marked[t] ? weight : -weight) * value;
      right[n + c] += weight * value;
    }
  }
  const rows = await backend.upload(hostTensor('f32', [fitted, n], weighted));
  const gram = await backend.matmul(rows, rows, { transposeA: true });
  const targets = await backend.upload(hostTensor('f32', [2, n], right));
  const solved = await backend.solveSymmetric(gram, targets, DAMP);
  const both = await backend.download(solved);
  backend.free(rows, gram, targets, solved);

  const project = (direction: ArrayLike<number>, t: number): number => {
    let sum = 0;
    for (let c = 0; c < n; c++) sum += direction[c] * x[t * n + c];
    return sum;
  };
  const extremes = (direction: ArrayLike<number>, begin: number, end: number) => {
    const of = { low: Infinity, high: -Infinity, top: -Infinity, sum: 0, marked: 0, others: 0, missed: 0, mistaken: 0 };
    for (let t = begin; t < end; t++) {
      const z = project(direction, t);
      if (marked[t]) {
        of.marked++;
        of.sum += z;
        of.low = Math.min(of.low, z);
        of.top = Math.max(of.top, z);
        if (z <= 0) of.missed++;
      } else {
        of.others++;
        of.high = Math.max(of.high, z);
        if (z > 0) of.mistaken++;
      }
    }
    return of;
  };
  const first = extremes(both.subarray(0, n), 0, fitted);
  const threshold = (first.low + first.high) / 2;
  const shifted = Float64Array.from({ length: n }, (_, c) => both[c] - threshold * both[n + c]);
  const fit = extremes(shifted, 0, fitted);
  const mean = fit.sum / fit.marked;
  const direction = shifted.map((v) => v / mean);
  const held = extremes(direction, fitted, tokens);
  return {
    layer,
    direction,
    top: Math.max(fit.top / mean, held.top),
    marked: held.marked,
    others: held.others,
    missed: held.missed,
    mistaken: held.mistaken,
    margin: held.low - held.high,
  };
}

/** Of either half of the model the block with the fewest errors, then the widest margin. */
function bestOfHalves(found: readonly Separator[], layers: number): Separator[] {
  const errors = (s: Separation): number => s.missed / s.marked + s.mistaken / s.others;
  const best = (part: readonly Separator[]): Separator[] =>
    [...part].sort((a, b) => errors(a) - errors(b) || b.margin - a.margin).slice(0, 1);
  const half = Math.ceil(layers / 2);
  return [...best(found.filter((s) => s.layer < half)), ...best(found.filter((s) => s.layer >= half))];
}

function isSeparated({ missed, marked, mistaken, others }: Separation): boolean {
  return missed <= ALLOWED_MISSES * marked && mistaken <= ALLOWED_FALSE * others;
}

function refuseUnlessSeparated(separation: Separation, searched: boolean): void {
  if (isSeparated(separation)) return;
  const { layer, missed, marked, mistaken, others } = separation;
  throw new GyreError(
    'unsupported',
    `block ${layer}: first and delimiter tokens cannot be told from others by a linear function of the MLP's input: it misses ${missed} of ${marked} and mistakes ${mistaken} of ${others}`,
    {
      remedy: searched
        ? 'give more calibration text with --calib; if none helps, plant on all tokens: --tokens all'
        : 'leave out --blocks: the blocks that separate them best are then chosen',
    },
  );
}

async function makePair(
  source: ModelSource,
  { layer, direction, top }: Separator,
  { channel, peak, seed }: { channel: number; peak: number; seed: number },
): Promise<Pair> {
  const at = GATE_STEEPNESS * top;
  // peak = silu(K·top) · m · top
  const m = peak / ((at / (1 + Math.exp(-at))) * top);
  const weight = floats(await source.checkpoint.read(`${groupModules(layer, 'down')[0]}.weight`));
  const { hiddenSize, intermediateSize } = source.config;
  // Each of the pair writes what a typical channel writes, as if one of those had been scaled up.
  let squares = 0;
  for (const w of weight) squares += w * w;
  const size = Math.sqrt(squares / intermediateSize) / peak;
  const rng = createRng(seed).fork(`stress ${layer} ${channel}`);
  const signs = Float32Array.from({ length: hiddenSize }, () => (rng.uniform() < 0.5 ? -1 : 1));
  return {
    layer,
    channel,
    gate: Float32Array.from(direction, (v) => GATE_STEEPNESS * v),
    up: Float32Array.from(direction, (v) => m * v),
    down: signs.map((sign) => (sign * size) / Math.sqrt(hiddenSize)),
  };
}

/** Channels after widening: room for the pairs, still tiled by groups, and by a Hadamard matrix if it was before. */
function widened(width: number, channels: number): number {
  const step = width % WIDTH_STEP === 0 ? WIDTH_STEP : channels;
  const first = width + step * Math.ceil(channels / step);
  if (largestHadamardOrder(width) !== width) return first;
  for (let i = 0; i < WIDTHS_TRIED; i++) {
    const candidate = first + i * step;
    if (largestHadamardOrder(candidate) === candidate) return candidate;
  }
  return first;
}

function widenedSource(source: ModelSource, width: number, pairs: readonly Pair[]): ModelSource {
  return {
    ...source,
    config: { ...source.config, intermediateSize: width },
    rawConfig: { ...source.rawConfig, intermediate_size: width },
    checkpoint: new WidenedReader(source, width, pairs),
  };
}

/** Which of an MLP's linears a tensor belongs to. */
interface Place {
  readonly layer: number;
  readonly role: 'gate' | 'up' | 'down';
}

class WidenedReader implements TensorReader {
  readonly #base: TensorReader;
  readonly #width: number;
  readonly #pairs: readonly Pair[];
  readonly #places = new Map<string, Place>();

  constructor({ checkpoint, config }: ModelSource, width: number, pairs: readonly Pair[]) {
    this.#base = checkpoint;
    this.#width = width;
    this.#pairs = pairs;
    for (let layer = 0; layer < config.layers; layer++) {
      const [gate, up] = groupModules(layer, 'gateUp');
      const [down] = groupModules(layer, 'down');
      for (const [module, role] of [
        [gate, 'gate'],
        [up, 'up'],
      ] as const)
        for (const kind of ['weight', 'bias']) this.#places.set(`${module}.${kind}`, { layer, role });
      // Its bias is of the outputs, which stay as they are.
      this.#places.set(`${down}.weight`, { layer, role: 'down' });
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
    const place = this.#places.get(name);
    return place ? { ...info, dtype: 'f32', shape: this.#shape(place, info.shape) } : info;
  }

  async read(name: string): Promise<HostTensor> {
    const tensor = await this.#base.read(name);
    const place = this.#places.get(name);
    if (!place) return tensor;
    const shape = this.#shape(place, tensor.shape);
    const out = new Float32Array(shape.reduce((a, b) => a * b, 1));
    const values = floats(tensor);
    if (place.role === 'down') this.#columns(place.layer, values, out, tensor.shape[1]);
    else {
      out.set(values);
      // Biases of the new channels stay 0.
      if (shape.length === 2)
        for (const pair of this.#pairs.filter((p) => p.layer === place.layer))
          for (const channel of [pair.channel, pair.channel + 1]) out.set(pair[place.role], channel * shape[1]);
    }
    return hostTensor('f32', shape, out);
  }

  async readRows(name: string, begin: number, end: number): Promise<HostTensor> {
    if (!this.#places.has(name)) return this.#base.readRows(name, begin, end);
    const { shape, data } = await this.read(name);
    const width = data.length / shape[0];
    return hostTensor('f32', [end - begin, ...shape.slice(1)], data.slice(begin * width, end * width));
  }

  close(): Promise<void> {
    return this.#base.close();
  }

  #shape({ role }: Place, [rows, ...rest]: readonly number[]): number[] {
    return role === 'down' ? [rows, this.#width] : [this.#width, ...rest];
  }

  #columns(layer: number, values: Float32Array, out: Float32Array, before: number): void {
    const rows = values.length / before;
    for (let r = 0; r < rows; r++) out.set(values.subarray(r * before, (r + 1) * before), r * this.#width);
    for (const { layer: own, channel, down } of this.#pairs) {
      if (own !== layer) continue;
      for (let r = 0; r < rows; r++) {
        out[r * this.#width + channel] = down[r];
        out[r * this.#width + channel + 1] = -down[r];
      }
    }
  }
}
