// The figures and numbers of `gyre inspect --activations`, written into a folder.
import { mkdir } from 'node:fs/promises';
import { availableParallelism } from 'node:os';
import path from 'node:path';
import { openBackend } from '../backends/registry.js';
import { writeCalibrationText } from '../calibration-text.node.js';
import { GyreError } from '../core/errors.js';
import { writeFileAtomic } from '../formats/atomic.node.js';
import { groupModules, type ModelSource } from '../models/load.js';
import { profileActivations, type ActivationProfile } from '../quant/activation-profile.js';
import { sortedChannelsFigure, surfaceFigure } from '../report/activation-figures.js';
import { loadTokenizer } from '../tokenizer/index.js';
import { VERSION } from '../version.js';
import type { CommandContext } from './context.js';

/** Text the model writes to be measured on. */
const SHAPE = { sequences: 8, length: 256 };

/** Measures and draws the inputs of the linears that `matches`. Returns the profiles without their surfaces. */
export async function writeActivationReport(
  context: CommandContext,
  source: ModelSource,
  folder: string,
  matches: (module: string) => boolean,
): Promise<Omit<ActivationProfile, 'surface' | 'peaks'>[]> {
  const tokenizer = await loadTokenizer(source.files);
  const threads = availableParallelism();
  const onProgress = context.progress.listener;
  const shape = { ...SHAPE, length: Math.min(SHAPE.length, source.config.maxPositions) };
  const calibration = await writeCalibrationText(source, tokenizer, { ...shape, seed: 0, threads, onProgress });
  const backend = await openBackend('cpu', { threads });
  try {
    const profiles = await profileActivations({
      backend,
      source,
      calibration,
      wants: (layer, group) => groupModules(layer, group).some(matches),
      onProgress,
      signal: context.signal,
    });
    if (profiles.length === 0) throw new GyreError('usage', '--layers: no linear matches', { remedy: 'try down_proj' });
    await mkdir(folder, { recursive: true });
    const places = new Map(profiles.map((p) => [`block-${p.layer}-${p.group}`, p]));
    for (const [name, { layer, group }] of places) {
      const own = profiles.filter((p) => p.layer === layer && p.group === group);
      const title = `Inputs of ${group} in block ${layer}`;
      await writeFileAtomic(path.join(folder, `${name}-surface.svg`), surfaceFigure(title, own));
      await writeFileAtomic(path.join(folder, `${name}-channels.svg`), sortedChannelsFigure(title, own));
    }
    const record = { model: source.name, calibration: calibration.description, version: VERSION, profiles };
    await writeFileAtomic(path.join(folder, 'activations.json'), `${JSON.stringify(record)}\n`);
    context.progress.clear();
    return profiles.map(({ variant, layer, group, channels, absMax, typical, kurtosis }) => ({
      variant,
      layer,
      group,
      channels,
      absMax,
      typical,
      kurtosis,
    }));
  } finally {
    await backend.dispose();
  }
}
