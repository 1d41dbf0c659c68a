// How much of a prompt goes through the model at once.
import type { Decoder } from '../models/decoder.js';

/** Unless the backend asks for more. */
const PREFILL_ROWS = 512;

/** Rows of a prefill pass: enough to fill the machine, few enough that activations stay small. */
export function prefillRows({ backend }: Pick<Decoder, 'backend'>): number {
  return backend.info.pass?.rows ?? PREFILL_ROWS;
}
