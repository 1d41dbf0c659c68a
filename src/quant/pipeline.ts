// The main job: block by block, stream the weights in, run both paths, quantize each linear group with what the quantized
// path sees, write the block's shard, go on. Memory: one block, the residual stream of both paths, one group's inputs.
import { z } from 'zod';
import { GyreError } from '../core/errors.js';
import { Checkpoint } from '../formats/safetensors.js';
import { TENSOR_NAMES } from '../models/families/names.js';
import { embedFromFile, loadBlock, loadFrame, type ModelSource } from '../models/load.js';
import { exact, NO_ONLINE } from '../models/online.js';
import { ropeTable } from '../models/rope.js';
import type { Backend, RopeHandle } from '../ops/backend.js';
import { BlockQuantizer, type BlockHooks } from './block-quantizer.js';
import type { CalibrationTokens } from './calibration/tokens.js';
import { BlockPipeline } from './block-pipeline.js';
import { fourDigits } from './ranges.js';
import { groupRecordSchema, type GroupRecord } from './results.js';
import {
  MAX_SQUARES,
  restEntries,
  type Chunk,
  type GroupReport,
  type PipelineReport,
  type QuantizeRun,
} from './run.js';
import { createRng } from '../core/rng.js';
import { keepSensitivity, keptSensitivity } from './kept-sensitivity.js';
import { measureSensitivity } from './objectives/sensitivity.js';
import { RunMonitor } from './monitor.js';
import { blockShard, REST_SHARD } from './sink.js';
import { isBlockRecipe } from './types.js';

/** Tokens per chunk of the calibration run: large enough for full speed, small enough for memory. */
const CHUNK_TOKENS = 4096;

/** Quantizes every block into `run.sink`. Resumes after the last finished block, to the same bytes. */
export async function quantizeModel(run: QuantizeRun): Promise<PipelineReport> {
  const { recipe } = run;
  return isBlockRecipe(recipe) ? new BlockPipeline(run, recipe).run() : new Pipeline(run).run();
}

class Pipeline {
  readonly #run: QuantizeRun;
  readonly #monitor: RunMonitor;
  readonly #groups: GroupReport[] = [];

  constructor(run: QuantizeRun) {
    this.#run = run;
    this.#monitor = new RunMonitor(run);
  }

  async run(): Promise<PipelineReport> {
    const { backend, source, sink, calibration } = this.#run;
    const { layers } = source.config;
    let first = 0;
    while (first < layers && (await sink.has(blockShard(first)))) {
      await this.#recall(blockShard(first));
      first++;
    }
    const chunks = calibration && first < layers ? await this.#embed(calibration) : [];
    const rope = calibration && (await this.#rope(calibration.length));
    if (calibration && first < layers && this.#run.settings.sensitivity)
      await this.#measureSensitivity(calibration, first);
    for (let layer = 0; layer < layers; layer++) {
      this.#monitor.checkAborted();
      if (layer < first) {
        this.#monitor.tell(layer, `block ${layer + 1}/${layers} is finished; following it`);
        if (chunks.length > 0 && rope) await this.#follow(layer, chunks, rope);
      } else {
        await this.#quantizeBlock(layer, chunks, rope);
      }
    }
    this.#monitor.tell(layers, 'embeddings, norms and head');
    if (!(await sink.has(REST_SHARD)))
      await this.#monitor.timed('write', () => sink.write(REST_SHARD, restEntries(this.#run.source)));
    for (const chunk of chunks) freeChunk(backend, chunk);
    if (rope) backend.release(rope);
    return { groups: this.#groups, seconds: this.#monitor.seconds };
  }

  /** Takes up what was reported of a block that an earlier run finished. */
  async #recall(shard: string): Promise<void> {
    const kept = await this.#run.sink.keptRecord(shard);
    if (kept === undefined) return;
    const records = z.array(groupRecordSchema.required({ ranges: true })).safeParse(parseJson(kept));
    // The record is for people: a run must not fail because a disk lost it.
    if (records.success) this.#groups.push(...records.data.map((record) => ({ ...record, seconds: 0 })));
  }

  /** Measures what the predictions feel of errors in block `first` and those behind, unless an earlier run kept it all. */
  async #measureSensitivity({ ids, sequences }: CalibrationTokens, first: number): Promise<void> {
    const { backend, source, settings, sink } = this.#run;
    const { config } = source;
    let kept = config.layers;
    // The last block's is kept first.
    while (kept > first && (await this.#hasSensitivity(kept - 1))) kept--;
    if (kept === first) return;
    await this.#monitor.timed('statistics', () =>
      measureSensitivity(backend, source, ids, {
        sequences,
        rng: createRng(settings.seed).fork('sensitivity'),
        onBlock: (done, total) => {
          this.#monitor.checkAborted();
          this.#monitor.tell(first, `sensitivity ${done + 1}/${total}`);
        },
        onMeasured: async (layer, sensitivity) => {
          if (layer >= first) await keepSensitivity(sink, layer, sensitivity, config);
        },
      }),
    );
  }

  async #hasSensitivity(layer: number): Promise<boolean> {
    const file = await this.#run.sink.keptStage(blockShard(layer));
    await file?.close();
    return file !== undefined;
  }

  async #embed(calibration: CalibrationTokens): Promise<Chunk[]> {
    const { source, backend } = this.#run;
    const { ids, sequences, length } = calibration;
    const perChunk = Math.max(1, Math.floor(CHUNK_TOKENS / length));
    const chunks: Chunk[] = [];
    const rows = new Map<number, Float32Array>();
    for (let begin = 0; begin < sequences; begin += perChunk) {
      const batch = Math.min(perChunk, sequences - begin);
      const x = await backend.upload(
        await embedFromFile(source, ids.subarray(begin * length, (begin + batch) * length), rows),
      );
      chunks.push({ batch, reference: x, quantized: x });
    }
    await this.#checkFinite(TENSOR_NAMES.embedding, chunks);
    return chunks;
  }

  async #rope(length: number): Promise<RopeHandle> {
    const table = ropeTable(this.#run.source.config, length);
    return this.#run.backend.loadRope(table.cos, table.sin, table.rotaryDim);
  }

  /** Moves both paths through a block that is already on disk. */
  async #follow(layer: number, chunks: Chunk[], rope: RopeHandle): Promise<void> {
    const { backend, source } = this.#run;
    const wantsReference = this.#run.recipe.needs === 'cross-gram';
    await this.#monitor.timed('forward', async () => {
      const plain = { ...source, online: exact(source.online ?? NO_ONLINE) };
      const reference = wantsReference ? await loadBlock(backend, plain, layer) : undefined;
      const stored = await this.#openBlock(layer);
      try {
        const quantized = await loadBlock(backend, stored, layer);
        for (const chunk of chunks) {
          this.#monitor.checkAborted();
          const context = { batch: chunk.batch, start: 0, rope };
          const next = await quantized.forward(chunk.quantized, context);
          const ahead = reference ? await reference.forward(chunk.reference, context) : next;
          freeChunk(backend, chunk);
          chunk.quantized = next;
          chunk.reference = ahead;
        }
        reference?.release();
        quantized.release();
      } finally {
        await stored.checkpoint.close();
      }
    });
    await this.#checkFinite(`the output of block ${layer}`, chunks);
  }

  async #openBlock(layer: number): Promise<ModelSource> {
    const { source, sink, quantization } = this.#run;
    return { ...source, quantization, checkpoint: await Checkpoint.open(sink.open(blockShard(layer))) };
  }

  async #quantizeBlock(layer: number, chunks: Chunk[], rope: RopeHandle | undefined): Promise<void> {
    const { backend, source, sink, recipe } = this.#run;
    const frame = await loadFrame(backend, source, layer);
    // Folding changes norms and earlier rows after the fact: what the next block sees must come from the stored block,
    // so the block's own input is kept to run it again.
    const inputs = recipe.folds ? chunks.map((chunk) => chunk.quantized) : [];
    const hooks: BlockHooks = {
      tell: (message) => this.#monitor.tell(layer, `block ${layer + 1}/${source.config.layers} ${message}`),
      checkAborted: () => this.#monitor.checkAborted(),
      timed: (what, work) => this.#monitor.timed(what, work),
      report: (group) => this.#groups.push(group),
      free: (tensor) => {
        if (!inputs.includes(tensor)) backend.free(tensor);
      },
    };
    const sensitivity = this.#run.settings.sensitivity ? await keptSensitivity(sink, layer) : undefined;
    const block = new BlockQuantizer(this.#run, frame, chunks, rope, hooks, sensitivity);
    const entries = await block.run();
    await this.#checkFinite(`the output of block ${layer}`, chunks);
    await this.#monitor.timed('write', async () => {
      const own = this.#groups.filter((group) => group.layer === layer);
      await sink.keepRecord(blockShard(layer), JSON.stringify(own.map(groupRecord)));
      await sink.write(blockShard(layer), entries);
    });
    frame.release();
    for (const [i, input] of inputs.entries()) {
      backend.free(chunks[i].quantized);
      chunks[i].reference = chunks[i].quantized = input;
    }
    if (recipe.folds && rope) await this.#follow(layer, chunks, rope);
  }

  async #checkFinite(what: string, chunks: readonly Chunk[]): Promise<void> {
    const { backend } = this.#run;
    for (const { quantized, reference } of chunks) {
      for (const x of new Set([quantized, reference])) {
        // Negated, so that NaN is caught too.
        if (!((await backend.dot(x, x)) <= MAX_SQUARES)) {
          throw new GyreError('non-finite', `${what} is NaN, infinite or overflows on the calibration data`, {
            remedy: 'check the model with gyre eval; if it is sound, report this as a bug with the model and command',
          });
        }
      }
    }
  }
}

function parseJson(text: string): unknown {
  try {
    return JSON.parse(text);
  } catch {
    return undefined;
  }
}

/** A group's report without what differs from run to run. */
export function groupRecord({ layer, group, modules, stats, curve, ranges }: GroupReport): GroupRecord {
  return { layer, group, modules: [...modules], stats, curve: curve?.map(fourDigits), ranges };
}

function freeChunk(backend: Backend, chunk: Chunk): void {
  backend.free(chunk.quantized);
  if (chunk.reference !== chunk.quantized) backend.free(chunk.reference);
}
