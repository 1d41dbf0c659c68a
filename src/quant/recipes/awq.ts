// AWQ (Lin et al. 2023): scales salient input channels up before rounding, the inverse folded into the op before, then
// searches the clip of each group. The peer to beat, so it gets every honest advantage: both published scale families,
// a fine grid of exponents, the whole Gram matrix as the error measure, clipping on every projection.
import { f16BitsToF32, f32ToF16Bits } from '../../core/dtype.js';
import type { Backend, Tensor } from '../../ops/backend.js';
import type { GroupTask, Recipe } from '../types.js';
import { searchClip } from '../grids/clip.js';
import { quadraticError, requireGram } from '../objectives/error.js';
import { channelMajor, splitRounded } from '../weights.js';

/** Exponents tried per family of scales. */
const EXPONENTS = 20;

export const awq: Recipe = {
  name: 'awq',
  summary: 'activation-aware channel scales and clip search (AWQ)',
  needs: 'gram',
  folds: true,
  layout: 'awq',
  async quantizeGroup(backend, task) {
    const gram = requireGram(task);
    const { inFeatures, grid } = task;
    const w = await channelMajor(backend, task.weights, inFeatures);
    let best = { error: Infinity, exponent: 0, scales: new Float32Array(inFeatures).fill(1) };
    for (const candidate of await candidateScales(backend, task, gram, w)) {
      const scaled = await scaleRows(backend, w, candidate.scales);
      const rounded = await backend.roundToNearest(scaled, grid);
      const estimate = await scaleRows(
        backend,
        rounded.values,
        candidate.scales.map((s) => 1 / s),
      );
      const error = await quadraticError(backend, gram, estimate, w);
      backend.free(scaled, rounded.values, estimate);
      if (error < best.error) best = { error, ...candidate };
    }
    const scaled = await scaleRows(backend, w, best.scales);
    const scaledGram = await scaleBoth(
      backend,
      gram,
      best.scales.map((s) => 1 / s),
    );
    const clip = await searchClip(backend, scaled, scaledGram, grid);
    let rounded = await backend.roundToNearest(scaled, grid, clip);
    let error = await quadraticError(backend, scaledGram, rounded.values, scaled);
    if (error > best.error) {
      // The search looks at one group at a time; where that misleads, keep the full range.
      backend.free(rounded.values);
      rounded = await backend.roundToNearest(scaled, grid);
      error = best.error;
    }
    backend.free(w, scaled, scaledGram, rounded.values);
    return {
      parts: splitRounded(rounded, grid, inFeatures, task.outFeatures),
      foldedScales: best.scales,
      stats: { error, exponent: best.exponent },
    };
  },
};

/** The published families: rms(x)^α, and rms(x)^α / mean|w|^(1−α), each normalised to geometric mid-range 1. */
async function candidateScales(
  backend: Backend,
  task: GroupTask,
  gram: Tensor,
  w: Tensor,
): Promise<{ exponent: number; scales: Float32Array<ArrayBuffer> }[]> {
  const n = task.inFeatures;
  const x = Float64Array.from(await backend.diagonal(gram), (v) => Math.sqrt(Math.max(v, 0)));
  const host = await backend.download(w);
  const cols = w.shape[1];
  const weight = Float64Array.from({ length: n }, (_, i) => {
    let sum = 0;
    for (let c = 0; c < cols; c++) sum += Math.abs(host[i * cols + c]);
    return sum / cols;
  });
  const candidates: { exponent: number; scales: Float32Array<ArrayBuffer> }[] = [];
  for (let i = 0; i < EXPONENTS; i++) {
    const exponent = i / EXPONENTS;
    candidates.push({
      exponent,
      scales: foldable(
        task,
        x.map((v) => Math.max(v, 1e-6) ** exponent),
      ),
    });
    candidates.push({
      exponent,
      scales: foldable(
        task,
        x.map((v, c) => Math.max(v, 1e-6) ** exponent / Math.max(weight[c], 1e-6) ** (1 - exponent)),
      ),
    });
  }
  return candidates;
}

/** Normalises scales, makes channels that fold into one source share theirs, and rounds them to what the file can hold. */
function foldable(task: GroupTask, raw: Float64Array): Float32Array<ArrayBuffer> {
  const { source, roundScale } = task.fold;
  const shared = new Map<number, number>();
  raw.forEach((s, c) => shared.set(source[c], Math.max(shared.get(source[c]) ?? 0, s)));
  let [low, high] = [Infinity, 0];
  for (const s of shared.values()) [low, high] = [Math.min(low, s), Math.max(high, s)];
  const middle = Math.sqrt(low * high);
  return Float32Array.from(raw, (_, c) => {
    const s = (shared.get(source[c]) ?? 1) / middle;
    return roundScale ? roundScale(c, s) : f16BitsToF32(f32ToF16Bits(s));
  });
}

/** Rows of [in, cols] times s [in]: a transform with scales and no rotations. */
async function scaleRows(backend: Backend, w: Tensor, s: Float32Array): Promise<Tensor> {
  return backend.transformChannels(
    w,
    {
      channels: s.length,
      groupSize: s.length,
      krot: 0,
      pairs: new Int16Array(0),
      theta: new Float32Array(0),
      channelScales: s,
    },
    'forward',
    'activation',
  );
}

/** diag(s)·M·diag(s) of a symmetric M. */
async function scaleBoth(backend: Backend, matrix: Tensor, s: Float32Array): Promise<Tensor> {
  const rows = await scaleRows(backend, matrix, s);
  const turned = await backend.transpose(rows);
  const both = await scaleRows(backend, turned, s);
  backend.free(rows, turned);
  return both;
}
