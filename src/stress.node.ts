// `gyre stress` as a function: a copy of a checkpoint with massive activations planted (quant/stress.ts). Synthetic on purpose,
// and says so in its gyre.json.
import { readFile } from 'node:fs/promises';
import { availableParallelism } from 'node:os';
import path from 'node:path';
import { openBackend, type BackendName } from './backends/registry.js';
import { writeCalibrationText } from './calibration-text.node.js';
import { GyreError } from './core/errors.js';
import type { ProgressListener } from './core/progress.js';
import { createRng } from './core/rng.js';
import { resolveModel } from './formats/hub.node.js';
import { inspectOutput, RunFolder } from './formats/run-folder.node.js';
import { openModel, type ModelSource } from './models/load.js';
import { sampleWindows, type CalibrationTokens } from './quant/calibration/tokens.js';
import type { Backend } from './ops/backend.js';
import { copyEntry } from './quant/run.js';
import { plantOnTokens, type Separation } from './quant/stress-tokens.js';
import {
  chooseChannels,
  plantActivations,
  type PlantedChannel,
  type StressOptions,
  type StressRun,
} from './quant/stress.js';
import { loadTokenizer, type Tokenizer } from './tokenizer/index.js';
import { VERSION } from './version.js';

/** Options of {@link stressCheckpoint}. */
export interface StressCheckpointOptions extends Partial<Omit<StressOptions, 'blocks'>> {
  /** Default: the second and the last; with `tokens: 'few'` of either half the one that tells them apart best. `every`: all that can. */
  readonly blocks?: readonly number[] | 'every';
  /** Folder or hub id. */
  readonly model: string;
  readonly revision?: string;
  readonly token?: string;
  /** Folder to make. */
  readonly out: string;
  /** Texts on which channels are measured; without any the model writes its own. */
  readonly calib?: readonly string[];
  readonly calibrationTokens?: CalibrationTokens;
  readonly seed?: number;
  readonly threads?: number;
  /** Default `cpu`. */
  readonly device?: BackendName;
  /** An open backend of that device, kept open; otherwise one is opened and disposed of. */
  readonly backend?: Backend;
  readonly onProgress?: ProgressListener;
  readonly signal?: AbortSignal;
}

/** What {@link stressCheckpoint} did. */
export interface StressReport {
  readonly out: string;
  readonly settings: StressOptions;
  readonly planted: readonly PlantedChannel[];
  /** With `tokens: 'few'`, how well those tokens were told from the others. */
  readonly separations: readonly Separation[];
}

/** Said wherever numbers of such a model appear. */
export const SYNTHETIC = 'synthetic: massive activations were planted into this model by gyre stress';

const SHARD = 'model';
const TEXT_FILES = [
  'generation_config.json',
  'tokenizer.json',
  'tokenizer_config.json',
  'special_tokens_map.json',
  'chat_template.jinja',
  'chat_template.json',
];

/** Writes the stressed copy. @throws GyreError for bad options and outputs that exist, before anything is written. */
export async function stressCheckpoint(options: StressCheckpointOptions): Promise<StressReport> {
  const { model, out, seed = 0, onProgress, signal } = options;
  const threads = options.threads ?? availableParallelism();
  const resolved = await resolveModel(model, { revision: options.revision, token: options.token, onProgress });
  const source = await openModel(resolved.files);
  try {
    if (source.quantization) {
      throw new GyreError('unsupported', `${source.name} is quantized already`, {
        remedy: 'start from the original 16-bit checkpoint',
      });
    }
    const { layers } = source.config;
    const tokens = options.tokens ?? 'all';
    const wanted = {
      magnitude: options.magnitude ?? 500,
      tokens,
      channels: options.channels ?? 2,
      // One early and one late block, where published models have theirs; for few tokens those that tell them apart.
      blocks: tokens === 'few' ? options.blocks : blocksFor(options.blocks, layers),
    };
    const fingerprint = JSON.stringify({ stress: wanted, model: source.name, seed, gyre: VERSION });
    if ((await inspectOutput(out, fingerprint)) === 'finished')
      throw new GyreError('output-exists', `${out} is there already`, { remedy: 'choose another --out' });
    const backend = options.backend ?? (await openBackend(options.device ?? 'cpu', { threads }));
    try {
      const calibration = options.calibrationTokens ?? (await calibrationOf(options, source, threads, seed));
      const { stressed, planted, separations, blocks } = await plant(
        { backend, source, calibration, onProgress, signal },
        wanted,
        seed,
      );
      const settings: StressOptions = { ...wanted, blocks };
      const folder = await RunFolder.open(out, fingerprint, [SHARD], { resume: true });
      try {
        await folder.write(
          SHARD,
          [...stressed.checkpoint.names()].map((name) => copyEntry(stressed, name)),
        );
        const files: Record<string, string> = {
          'config.json': `${JSON.stringify(stressed.rawConfig, null, 2)}\n`,
          'gyre.json': `${JSON.stringify({ fingerprint, note: SYNTHETIC, gyre: VERSION, model: source.name, settings, planted, separations }, null, 2)}\n`,
        };
        const present = new Set(await source.files.list());
        for (const name of TEXT_FILES) if (present.has(name)) files[name] = await source.files.readText(name);
        await folder.finish(files);
      } finally {
        await folder.close();
      }
      return { out, settings, planted, separations };
    } finally {
      if (!options.backend) await backend.dispose();
    }
  } finally {
    await source.checkpoint.close();
  }
}

/** Any block can have channels that are large on all tokens. */
function blocksFor(blocks: StressCheckpointOptions['blocks'], layers: number): readonly number[] {
  if (blocks === 'every') return Array.from({ length: layers }, (_, layer) => layer);
  return blocks ?? [...new Set([Math.min(1, layers - 1), layers - 1])];
}

async function plant(
  run: StressRun,
  options: Omit<StressOptions, 'blocks'> & Pick<StressCheckpointOptions, 'blocks'>,
  seed: number,
): Promise<Omit<StressReport, 'out' | 'settings'> & { stressed: ModelSource; blocks: readonly number[] }> {
  const { source, calibration } = run;
  const { tokens, blocks } = options;
  if (tokens === 'all' && blocks && blocks !== 'every') {
    const planted = await chooseChannels(run, { ...options, blocks });
    return { stressed: plantActivations(source, planted), planted, separations: [], blocks };
  }
  const marked = markTokens(await loadTokenizer(source.files), calibration);
  const made = await plantOnTokens(run, marked, { ...options, seed });
  return { ...made, stressed: made.source, blocks: made.separations.map(({ layer }) => layer) };
}

/** Which tokens are the first of their sequence, or delimiters: full stops and line breaks. */
function markTokens(tokenizer: Tokenizer, { ids, length }: CalibrationTokens): Uint8Array {
  const known = new Map<number, boolean>();
  const isDelimiter = (id: number): boolean => {
    let answer = known.get(id);
    if (answer === undefined) known.set(id, (answer = /^ *[.\n]+ *$/.test(tokenizer.decode([id]))));
    return answer;
  };
  return Uint8Array.from(ids, (id, t) => (t % length === 0 || isDelimiter(id) ? 1 : 0));
}

async function calibrationOf(
  options: StressCheckpointOptions,
  source: Awaited<ReturnType<typeof openModel>>,
  threads: number,
  seed: number,
): Promise<CalibrationTokens> {
  const tokenizer = await loadTokenizer(source.files);
  const shape = { sequences: 16, length: Math.min(512, source.config.maxPositions) };
  if (!options.calib || options.calib.length === 0)
    return writeCalibrationText(source, tokenizer, {
      ...shape,
      seed,
      threads,
      device: options.device,
      onProgress: options.onProgress,
      signal: options.signal,
    });
  const texts = [];
  for (const name of options.calib) {
    const text = await readFile(name, 'utf8').catch((cause: unknown) => {
      throw new GyreError('file-missing', `text ${name} can't be read`, {
        remedy: 'check the path given to --calib',
        cause,
      });
    });
    texts.push({ name: path.basename(name), text });
  }
  return sampleWindows(tokenizer, texts, shape, createRng(seed).fork('calibration'));
}
