// How large the inputs of chosen linear groups are, channel by channel, in a model as it is, smoothed, rotated, and both.
import { GyreError } from '../core/errors.js';
import type { ProgressListener } from '../core/progress.js';
import type { GroupName } from '../models/block.js';
import type { ModelSource } from '../models/load.js';
import type { Backend, Tensor } from '../ops/backend.js';
import type { CalibrationTokens } from './calibration/tokens.js';
import { walkInputs, type InputObserver } from './calibration/walk.js';
import { prepareModel } from './prepare.js';
import type { QuantizeSettings } from './types.js';

/** Forms of a model that are compared, with what is folded into each. */
export const PROFILE_VARIANTS = {
  original: {},
  smoothed: { smooth: 'all' },
  rotated: { rotate: true },
  'smooth-rotated': { smooth: 'down', rotate: true },
} as const satisfies Record<string, Partial<QuantizeSettings>>;
export type ProfileVariant = keyof typeof PROFILE_VARIANTS;

/** The inputs of one group in one form of the model. */
export interface ActivationProfile {
  readonly variant: ProfileVariant;
  readonly layer: number;
  readonly group: GroupName;
  readonly channels: number;
  /** max|x| of each channel over all tokens, in the channels' order. */
  readonly peaks: readonly number[];
  readonly absMax: number;
  /** Median over channels of their root mean square. */
  readonly typical: number;
  /** Fourth standardised moment over all values: 3 for a normal distribution. */
  readonly kurtosis: number;
  /** |x| of the first tokens [tokens, bins]: channels pooled into bins by their maximum. */
  readonly surface: { readonly tokens: number; readonly bins: number; readonly values: readonly number[] };
}

/** Tokens and channel bins of a surface; more would not be told apart in a figure. */
const SURFACE_TOKENS = 32;
const SURFACE_BINS = 96;
const MEASURED_TOKENS = 4096;

/** Arguments of {@link profileActivations}. */
export interface ProfileRun {
  readonly backend: Backend;
  readonly source: ModelSource;
  readonly calibration: CalibrationTokens;
  /** Which groups of which blocks. */
  readonly wants: (layer: number, group: GroupName) => boolean;
  /** Default all. */
  readonly variants?: readonly ProfileVariant[];
  readonly seed?: number;
  /** Exponent of the smoothing scales; default 0.5, the published one. */
  readonly alpha?: number;
  readonly onProgress?: ProgressListener;
  readonly signal?: AbortSignal;
}

/** Measures the inputs as the linears see them, after online transforms. @throws `unsupported` for quantized models. */
export async function profileActivations(run: ProfileRun): Promise<ActivationProfile[]> {
  const { backend, source, seed = 0, alpha = 0.5 } = run;
  if (source.quantization)
    throw new GyreError(
      'unsupported',
      `${source.name} is quantized: its activations are compared with themselves rotated`,
      {
        remedy: 'give the original 16-bit model',
      },
    );
  const profiles: ActivationProfile[] = [];
  const variants = run.variants ?? (Object.keys(PROFILE_VARIANTS) as ProfileVariant[]);
  for (const variant of variants) {
    const settings: QuantizeSettings = { ...BASE, seed, alpha, ...PROFILE_VARIANTS[variant] };
    const prepared = await prepareModel({ ...run, settings });
    let meters: Meter[] = [];
    await walkInputs({
      ...run,
      source: prepared.source,
      maxTokens: MEASURED_TOKENS,
      stage: `activations, ${variant}`,
      observe: (layer) => {
        meters = GROUPS.filter((group) => run.wants(layer, group)).map(
          (group) => new Meter(backend, prepared.source, variant, layer, group),
        );
        return new Map(meters.map((meter) => [meter.group, meter]));
      },
      finish: async () => {
        for (const meter of meters) profiles.push(await meter.profile());
      },
    });
  }
  return profiles;
}

const GROUPS: readonly GroupName[] = ['qkv', 'o', 'gateUp', 'down'];
/** Settings that folding does not look at. */
const BASE: QuantizeSettings = {
  method: 'smoothrot',
  bits: 4,
  groupSize: -1,
  krot: 0,
  scales: false,
  share: true,
  rounding: undefined,
  steps: 0,
  seed: 0,
};

class Meter implements InputObserver {
  readonly #rows: Float32Array[] = [];
  #channels = 0;

  constructor(
    private readonly backend: Backend,
    private readonly source: ModelSource,
    private readonly variant: ProfileVariant,
    private readonly layer: number,
    readonly group: GroupName,
  ) {}

  async add(x: Tensor): Promise<void> {
    const transform = this.source.online?.groups[this.group];
    this.#channels = x.shape[1];
    if (!transform) {
      this.#rows.push(await this.backend.download(x));
      return;
    }
    const handle = await this.backend.loadTransform(transform);
    const y = await this.backend.rotate(x, handle);
    this.#rows.push(await this.backend.download(y));
    this.backend.free(y);
    this.backend.release(handle);
  }

  profile(): Promise<ActivationProfile> {
    const n = this.#channels;
    const peaks = new Float64Array(n);
    const squares = new Float64Array(n);
    let [count, second, fourth] = [0, 0, 0];
    for (const part of this.#rows) {
      for (let at = 0; at < part.length; at++) {
        const square = part[at] * part[at];
        const c = at % n;
        squares[c] += square;
        second += square;
        fourth += square * square;
        const size = Math.abs(part[at]);
        if (size > peaks[c]) peaks[c] = size;
      }
      count += part.length;
    }
    const bins = Math.min(SURFACE_BINS, n);
    const first = this.#rows[0];
    const tokens = Math.min(SURFACE_TOKENS, first.length / n);
    const values = new Array<number>(tokens * bins).fill(0);
    for (let t = 0; t < tokens; t++) {
      for (let c = 0; c < n; c++) {
        const at = t * bins + Math.floor((c * bins) / n);
        values[at] = Math.max(values[at], significant(Math.abs(first[t * n + c])));
      }
    }
    const rms = squares.map((s) => Math.sqrt(s / (count / n))).sort();
    return Promise.resolve({
      variant: this.variant,
      layer: this.layer,
      group: this.group,
      channels: n,
      peaks: Array.from(peaks, significant),
      absMax: significant(peaks.reduce((a, b) => Math.max(a, b), 0)),
      typical: significant(rms[n >> 1]),
      kurtosis: significant(second === 0 ? 0 : fourth / count / (second / count) ** 2),
      surface: { tokens, bins, values },
    });
  }
}

/** Five significant digits: figures and people need no more. */
function significant(x: number): number {
  return Number(x.toPrecision(5));
}
