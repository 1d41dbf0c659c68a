// The figures and numbers of `gyre inspect --activations`, written into a folder.
import { mkdir } from 'node:fs/promises';
import { availableParallelism } from 'node:os';
import path from 'node:path';
import { openBackend } from '../backends/registry.js';
import { writeCalibrationText } from '../calibration-text.node.js';
import { GyreError } from '../core/errors.js';
import { writeFileAtomic } from '../formats/atomic.node.js';
import { groupModules, type ModelSource } from '../models/load.js';
import { findBrowser, writePictures, type Drawing } from '../pictures.node.js';
import { profileActivations, type ActivationProfile } from '../quant/activation-profile.js';
import { sortedChannelsFigure, surfaceFigure } from '../report/activation-figures.js';
import { loadTokenizer } from '../tokenizer/index.js';
import { VERSION } from '../version.js';
import type { CommandContext } from './context.js';

/** Text the model writes to be measured on. */
const SHAPE = { sequences: 8, length: 256 };

/**
 * Measures and draws the inputs of the linears that `matches`, as SVG and with `png` as PNG too. Returns the profiles without
 * their surfaces. @throws GyreError `not-found` for `png` without a browser.
 */
export async function writeActivationReport(
  context: CommandContext,
  source: ModelSource,
  folder: string,
  matches: (module: string) => boolean,
  png: boolean,
): Promise<Omit<ActivationProfile, 'surface' | 'peaks'>[]> {
  const browser = png ? await findBrowser() : undefined;
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
    const figures: { name: string; svg: string }[] = [];
    for (const [name, { layer, group }] of places) {
      const own = profiles.filter((p) => p.layer === layer && p.group === group);
      const title = `Inputs of ${group} in block ${layer}`;
      figures.push({ name: `${name}-surface`, svg: surfaceFigure(title, own) });
      figures.push({ name: `${name}-channels`, svg: sortedChannelsFigure(title, own) });
    }
    for (const { name, svg } of figures) await writeFileAtomic(path.join(folder, `${name}.svg`), svg);
    if (browser) await writePictures(browser, figures.map(sized), folder);
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

/** With the size that the drawing gives itself. */
function sized({ name, svg }: { name: string; svg: string }): Drawing {
  const [, width, height] = /width="(\d+)" height="(\d+)"/.exec(svg) ?? [];
  return { name, svg, width: Number(width), height: Number(height) };
}
