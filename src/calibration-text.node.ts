// Calibration text the model writes itself, so that quantizing needs no data set: sampled at temperature 1 from its start
// token and a few neutral openings. On the CPU it is written with 8-bit weights, activations, keys and values: fast, and near
// enough its own voice.
import { openBackend, type BackendName } from './backends/registry.js';
import { silent, type ProgressListener } from './core/progress.js';
import { generateContinuously } from './generate/index.js';
import { GROUP_NAMES } from './models/block.js';
import type { Decoder } from './models/decoder.js';
import { groupShape, loadDecoder, type ModelSource } from './models/load.js';
import { NO_ONLINE } from './models/online.js';
import type { Backend, KvGrid } from './ops/backend.js';
import type { CalibrationTokens } from './quant/calibration/tokens.js';
import type { Tokenizer } from './tokenizer/index.js';

/** Openings after the start token; the empty one twice as often. Neutral on purpose: the model chooses what to write. */
const OPENINGS = ['', '', 'The', 'It was', 'Question:', 'In the beginning', '1.', 'def '] as const;
/** Memory for keys and values of the sequences written together, bytes, and on a GPU. */
const [CACHE_BYTES, GPU_CACHE_BYTES] = [0.5e9, 4 * 2 ** 30];
/** Sequences written together on the CPU: products of more rows are no faster there. */
const CPU_BATCH = 32;
/** Groups of 8-bit weights, the first that tiles every linear: products on groups of 128 take two thirds of the time on 32. */
const GROUP_SIZES = [128, 64, 32] as const;

/** Settings of {@link writeCalibrationText}. */
export interface SelfWrittenOptions {
  readonly sequences: number;
  /** Tokens per sequence. */
  readonly length: number;
  readonly seed: number;
  readonly threads: number;
  /** Default `cpu`. */
  readonly device?: BackendName;
  /** An open backend of a device that is no CPU, to be used instead of one more. */
  readonly backend?: Backend;
  readonly onProgress?: ProgressListener;
  readonly signal?: AbortSignal;
}

/** Lets the model write `sequences` × `length` tokens. Deterministic for a seed. */
export async function writeCalibrationText(
  source: ModelSource,
  tokenizer: Tokenizer,
  options: SelfWrittenOptions,
): Promise<CalibrationTokens> {
  const { sequences, length, seed } = options;
  const { config } = source;
  const onProgress = options.onProgress ?? silent;
  const device = options.device ?? 'cpu';
  // A GPU reads a weight once for all sequences of a step: rounding it would gain nothing there. On the CPU a step reads all keys
  // and values, and floats take four times the memory.
  const onCpu = device === 'cpu';
  const kv: KvGrid | undefined = onCpu ? { bits: 8, clip: 1 } : undefined;
  const writer = kv ? { ...source, online: { ...(source.online ?? NO_ONLINE), kv } } : source;
  const given = onCpu ? undefined : options.backend;
  const backend =
    given ?? (await openBackend(device, { threads: options.threads, ...(onCpu && { activations: 'int8' }) }));
  let decoder: Decoder | undefined;
  try {
    const inputs = GROUP_NAMES.map((group) => groupShape(config, group).inFeatures);
    const groupSize = GROUP_SIZES.find((size) => inputs.every((n) => n % size === 0)) ?? 32;
    const roundWeights = onCpu ? { bits: 8 as const, groupSize } : undefined;
    const model = await loadDecoder(backend, writer, { roundWeights, onProgress });
    decoder = model;
    const start = tokenizer.bosTokenId ?? config.bosTokenId ?? config.eosTokenIds[0];
    const prompts = Array.from({ length: sequences }, (_, i) => {
      const opening = tokenizer.encode(OPENINGS[i % OPENINGS.length], { addSpecialTokens: false });
      const ids = start === undefined ? opening : Int32Array.of(start, ...opening);
      return ids.length > 0 ? ids : Int32Array.of(0);
    });
    const requests = prompts.map((prompt, stream) => ({ prompt, maxTokens: length - prompt.length, stream }));
    // Codes and a grid of two floats per head, or what the backend keeps.
    const { cacheValueBytes = 4 } = backend;
    const perHead = kv ? config.headDim + 8 : config.headDim * cacheValueBytes;
    const heads = config.layers * config.kvHeads * 2 * length;
    const cacheBytes = onCpu ? CACHE_BYTES : GPU_CACHE_BYTES;
    const slots = Math.max(
      1,
      Math.min(sequences, Math.floor(cacheBytes / (heads * perHead)), onCpu ? CPU_BATCH : Infinity),
    );
    const { texts } = await generateContinuously(model, requests, {
      temperature: 1,
      seed,
      stopIds: [],
      slots,
      // As if it were not codes: the slots are what limits it.
      cacheBytes: slots * heads * config.headDim * cacheValueBytes,
      signal: options.signal,
      onProgress: (event) => onProgress({ ...event, stage: 'calibration text' }),
    });
    const ids = new Int32Array(sequences * length);
    texts.forEach((text, i) => {
      ids.set(prompts[i].subarray(0, length), i * length);
      ids.set(text.ids.subarray(0, length - prompts[i].length), i * length + prompts[i].length);
    });
    return {
      ids,
      sequences,
      length,
      description: `${sequences} × ${length} tokens written by the model itself (seed ${seed})`,
    };
  } finally {
    decoder?.release();
    if (!given) await backend.dispose();
  }
}
