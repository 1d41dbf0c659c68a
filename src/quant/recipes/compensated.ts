// Rounding that takes its time: clip search on the outputs, GPTQ, coordinate descent, scales and codes refitted in turn.
import type { Backend, GridSpec, RoundedWeight, Tensor } from '../../ops/backend.js';
import { searchClip } from '../grids/clip.js';
import { GPTQ_DAMP } from './gptq.js';

/** Ranges tried for each group's grid: what rotations leave of the extremes is worth little. */
export const CLIP_SEARCH = { minimum: 0.6, steps: 10 } as const;
/** Sweeps of coordinate descent after GPTQ. */
const DESCENT_SWEEPS = 3;
/** Rounds of refitting scales to the codes, each followed by sweeps of descent on the new grids. */
const REFITS = { rounds: 2, passes: 1, sweeps: 2 } as const;

/** Clip search and GPTQ alone. w [in, cols] channel-major, gram [in, in]. */
export async function roundClippedGptq(
  backend: Backend,
  w: Tensor,
  gram: Tensor,
  grid: GridSpec,
): Promise<RoundedWeight> {
  const clip = await searchClip(backend, w, gram, grid, CLIP_SEARCH);
  const factor = await backend.gptqFactor(gram, GPTQ_DAMP);
  const rounded = await backend.gptq(w, factor, grid, clip);
  backend.free(factor);
  return rounded;
}

/**
 * Then coordinate descent (GPTQ cannot take back what it decided before it knew the later channels), then scales and codes
 * in turn.
 */
export async function roundCompensated(
  backend: Backend,
  w: Tensor,
  gram: Tensor,
  grid: GridSpec,
): Promise<RoundedWeight> {
  let rounded = await roundClippedGptq(backend, w, gram, grid);
  const replace = (next: RoundedWeight): void => {
    backend.free(rounded.values);
    rounded = next;
  };
  replace(await backend.descend(w, rounded, gram, grid, DESCENT_SWEEPS));
  for (let round = 0; round < REFITS.rounds; round++) {
    replace(await backend.refitScales(w, rounded, gram, grid, REFITS.passes));
    replace(await backend.descend(w, rounded, gram, grid, REFITS.sweeps));
  }
  return rounded;
}
