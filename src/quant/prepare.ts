// What happens to a model before its blocks are quantized: rotations are drawn, smoothing scales are searched on the
// calibration tokens (one pass of the original model, one block in memory), and both are folded into a view of the model.
import { createRng } from '../core/rng.js';
import { silent, type ProgressListener } from '../core/progress.js';
import { GyreError } from '../core/errors.js';
import { floats, hostTensor } from '../core/tensor.js';
import { BlockFrame, type GroupName } from '../models/block.js';
import type { LinearGroup } from '../models/linear-group.js';
import { embedFromFile, groupModules, loadFrame, loadGroup, readLinear, type ModelSource } from '../models/load.js';
import { exact } from '../models/online.js';
import { ropeTable } from '../models/rope.js';
import type { Backend, HadamardTransform, Tensor } from '../ops/backend.js';
import type { CalibrationTokens } from './calibration/tokens.js';
import { drawRotation, foldedSource, valueChannel, type ModelRotation, type Smoothing } from './folded-source.js';
import { activationGrid, kvGrid } from './grids/activations.js';
import { searchSmoothing, type SmoothingChoice } from './objectives/smoothing.js';
import { InputSample } from './calibration/sample.js';
import type { QuantizeSettings } from './types.js';

/** Arguments of {@link prepareModel}. */
export interface PrepareRun {
  readonly backend: Backend;
  readonly source: ModelSource;
  readonly settings: QuantizeSettings;
  readonly calibration: CalibrationTokens | undefined;
  readonly onProgress?: ProgressListener;
  readonly signal?: AbortSignal;
}

/** What {@link prepareModel} returns. */
export interface PreparedModel {
  /** The model to quantize: folded, with its online transforms and grids. */
  readonly source: ModelSource;
  /** What smoothing was chosen, per block and group; empty without smoothing. */
  readonly smoothing: readonly (SmoothingChoice & { readonly layer: number; readonly group: GroupName })[];
}

/** Tokens of calibration that smoothing looks at: scales come from maxima over few thousand tokens in the published method too. */
const SMOOTHING_TOKENS = 16_384;
const CHUNK_TOKENS = 4096;

/** The groups that a setting smooths. */
const SMOOTHED: Readonly<Record<NonNullable<QuantizeSettings['smooth']>, readonly GroupName[]>> = {
  none: [],
  down: ['down'],
  all: ['qkv', 'o', 'gateUp', 'down'],
};

/** Whether a run changes the model before its blocks, or what happens between them. */
export function isPrepared({ rotate, smooth = 'none', actBits, kvBits }: QuantizeSettings): boolean {
  return rotate === true || smooth !== 'none' || actBits !== undefined || kvBits !== undefined;
}

/** Folds what the settings ask for. The same settings and tokens give the same model, to the bit. */
export async function prepareModel(run: PrepareRun): Promise<PreparedModel> {
  const { source, settings } = run;
  if (!isPrepared(settings)) return { source, smoothing: [] };
  const rotation = settings.rotate ? drawRotation(source.config, createRng(settings.seed).fork('rotation')) : undefined;
  const groups = SMOOTHED[settings.smooth ?? 'none'];
  const found = groups.length > 0 ? await smooth(run, groups, rotation) : undefined;
  const folded = foldedSource(source, { rotation, smoothing: found?.scales });
  const online = { ...folded.online, groups: folded.online?.groups ?? {} };
  return {
    source: {
      ...folded,
      online: {
        ...online,
        ...(settings.actBits ? { activations: activationGrid(settings.actBits) } : {}),
        // Without rounded keys there is nothing that turning them would help.
        heads: settings.kvBits ? online.heads : undefined,
        ...(settings.kvBits ? { kv: kvGrid(settings.kvBits) } : {}),
      },
    },
    smoothing: found?.choices ?? [],
  };
}

/** One pass of the original model over the calibration tokens, choosing each block's scales on the way. */
async function smooth(
  run: PrepareRun,
  groups: readonly GroupName[],
  rotation: ModelRotation | undefined,
): Promise<{ scales: Smoothing; choices: PreparedModel['smoothing'] }> {
  const { backend, source, settings, calibration, onProgress = silent, signal } = run;
  if (!calibration)
    throw new GyreError('calibration', 'smoothing needs calibration tokens', { remedy: 'give texts with --calib' });
  const { config } = source;
  const { ids, length } = calibration;
  const sequences = Math.max(1, Math.min(calibration.sequences, Math.floor(SMOOTHING_TOKENS / length)));
  const perChunk = Math.max(1, Math.floor(CHUNK_TOKENS / length));
  const chunks: { x: Tensor; batch: number }[] = [];
  for (let begin = 0; begin < sequences; begin += perChunk) {
    const batch = Math.min(perChunk, sequences - begin);
    const part = ids.subarray(begin * length, (begin + batch) * length);
    chunks.push({ x: await backend.upload(await embedFromFile(source, part)), batch });
  }
  const table = ropeTable(config, length);
  const rope = await backend.loadRope(table.cos, table.sin, table.rotaryDim);
  const scales: Partial<Record<GroupName, Float64Array>>[] = [];
  const choices: (SmoothingChoice & { layer: number; group: GroupName })[] = [];
  const plain: ModelSource = { ...source, online: exact(source.online ?? { groups: {} }) };
  for (let layer = 0; layer < config.layers; layer++) {
    if (signal?.aborted)
      throw new GyreError('interrupted', 'stopped before the first block', { remedy: 'run it again' });
    onProgress({ stage: 'smooth', done: layer, total: config.layers, unit: 'blocks' });
    const frame = await loadFrame(backend, plain, layer);
    const samples = new Map(groups.map((group) => [group, new InputSample(backend, settings.seed)]));
    const through = await BlockWalk.load(backend, plain, layer, frame);
    for (const chunk of chunks) {
      const next = await through.forward(chunk.x, { batch: chunk.batch, start: 0, rope }, samples);
      backend.free(chunk.x);
      chunk.x = next;
    }
    through.release();
    frame.release();
    const own: Partial<Record<GroupName, Float64Array>> = {};
    for (const [group, sample] of samples) {
      const choice = await searchSmoothing(backend, {
        weights: await weightsOf(plain, layer, group),
        peaks: await sample.peaks(),
        rows: await sample.rows(),
        sharedChannel: group === 'o' ? (c) => valueChannel(config, c) : undefined,
        transform: onlineOf(rotation, group),
        bits: settings.bits,
        actBits: settings.actBits,
        alpha: settings.alpha,
      });
      if (choice.scales) own[group] = choice.scales;
      choices.push({ ...choice, layer, group });
    }
    scales.push(own);
  }
  for (const { x } of chunks) backend.free(x);
  backend.release(rope);
  return { scales, choices };
}

function onlineOf(rotation: ModelRotation | undefined, group: GroupName): HadamardTransform | undefined {
  if (group === 'down') return rotation?.down;
  return group === 'o' ? rotation?.o : undefined;
}

async function weightsOf(source: ModelSource, layer: number, group: GroupName): Promise<Float32Array[]> {
  const weights: Float32Array[] = [];
  for (let i = 0; i < groupModules(layer, group).length; i++) {
    const part = await readLinear(source, layer, group, i);
    if (part.source.kind === 'dense')
      weights.push(floats(hostTensor(part.source.weight.dtype, part.source.weight.shape, part.source.weight.data)));
  }
  return weights;
}

/** A block in its stages, whose groups' inputs can be looked at on the way. */
class BlockWalk {
  private constructor(
    readonly backend: Backend,
    readonly frame: BlockFrame,
    readonly groups: Readonly<Record<GroupName, LinearGroup>>,
  ) {}

  static async load(backend: Backend, source: ModelSource, layer: number, frame: BlockFrame): Promise<BlockWalk> {
    return new BlockWalk(backend, frame, {
      qkv: await loadGroup(backend, source, layer, 'qkv'),
      o: await loadGroup(backend, source, layer, 'o'),
      gateUp: await loadGroup(backend, source, layer, 'gateUp'),
      down: await loadGroup(backend, source, layer, 'down'),
    });
  }

  async forward(
    x: Tensor,
    context: Parameters<BlockFrame['attend']>[1],
    samples: ReadonlyMap<GroupName, InputSample>,
  ): Promise<Tensor> {
    const { backend, frame, groups } = this;
    const see = async (group: GroupName, input: Tensor, residual?: Tensor): Promise<Tensor> => {
      await samples.get(group)?.add(input);
      const y = await groups[group].forward(input, residual);
      backend.free(input);
      return y;
    };
    const qkv = await see('qkv', await frame.attentionInput(x));
    const attended = await frame.attend(qkv, context, { exact: true });
    const middle = await see('o', attended, x);
    const gateUp = await see('gateUp', await frame.mlpInput(middle));
    const activated = await frame.activate(gateUp);
    const y = await see('down', activated, middle);
    backend.free(qkv, middle, gateUp);
    return y;
  }

  release(): void {
    for (const group of Object.values(this.groups)) group.release();
  }
}
