// What evaluations that score many rows share: how many rows of logits are held at a time, and passes whose scores are read while
// later ones are on their way.
import type { Backend, RowScores, Tensor } from '../ops/backend.js';
import type { Decoder } from '../models/decoder.js';

/** Bytes of logits held at a time, unless the backend asks for more. */
const LOGITS_BYTES = 64 * 1024 * 1024;
/** Whole tiles of products: the last, partial one of each part of the rows would be paid for in full. */
const TILE_ROWS = 128;
/** Passes submitted whose scores are not read yet: one runs, one waits, one is being read or prepared. */
const IN_FLIGHT = 3;

/** Rows whose logits are computed at a time. */
export function logitRows(backend: Backend, vocabSize: number): number {
  const rows = Math.max(1, Math.floor((backend.info.pass?.logitsBytes ?? LOGITS_BYTES) / (4 * vocabSize)));
  return rows > TILE_ROWS ? rows - (rows % TILE_ROWS) : rows;
}

/** Scores of rows that a machine is still working on: parts in the order of the rows. */
export type PendingScores = readonly Promise<RowScores>[];

/**
 * Submits the logits of hidden rows and their scores against targets [rows], `step` rows at a time. The hidden rows may be freed
 * when this is done.
 */
export async function submitScores(
  decoder: Pick<Decoder, 'backend' | 'logits'>,
  hidden: Tensor,
  targets: Int32Array,
  step: number,
): Promise<PendingScores> {
  const { backend } = decoder;
  const pending: Promise<RowScores>[] = [];
  for (let begin = 0; begin < targets.length; begin += step) {
    const end = Math.min(begin + step, targets.length);
    const part = backend.sliceRows(hidden, begin, end);
    const logits = await decoder.logits(part);
    pending.push(settled(backend.score(logits, targets.slice(begin, end))));
    backend.free(part, logits);
  }
  return pending;
}

/** A promise whose failure waits for whoever awaits it, however late. */
export function settled<T>(value: T | Promise<T>): Promise<T> {
  const promise = Promise.resolve(value);
  promise.catch(() => undefined);
  return promise;
}

/** Work that is submitted, whose ends are waited for in order and a few at a time. */
export class InFlight {
  readonly #ends: (() => Promise<void>)[] = [];

  /** Takes what is to be done when a pass is through; waits for the oldest where there are too many. */
  async add(end: () => Promise<void>): Promise<void> {
    this.#ends.push(end);
    while (this.#ends.length >= IN_FLIGHT) await this.#next();
  }

  /** Waits for all of them. */
  async drain(): Promise<void> {
    while (this.#ends.length > 0) await this.#next();
  }

  async #next(): Promise<void> {
    await this.#ends.shift()?.();
  }
}
