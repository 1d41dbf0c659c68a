// What evaluations that score many rows share: how many rows of logits are held at a time, and passes whose scores are read while
// later ones are on their way.
import type { Awaitable, Backend, RowScores, Tensor } from '../ops/backend.js';
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

/** Scores of rows that a machine may still be working on: parts in the order of the rows. */
export type PendingScores = readonly Awaitable<RowScores>[];

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
  const pending: Awaitable<RowScores>[] = [];
  for (let begin = 0; begin < targets.length; begin += step) {
    const end = Math.min(begin + step, targets.length);
    const part = backend.sliceRows(hidden, begin, end);
    const logits = await decoder.logits(part);
    pending.push(settled(backend.score(logits, targets.slice(begin, end))));
    backend.free(part, logits);
  }
  return pending;
}

/** What a promise fails with waits for whoever awaits it, however late. */
export function settled<T>(value: Awaitable<T>): Awaitable<T> {
  if (value instanceof Promise) value.catch(() => undefined);
  return value;
}

/** Work that is submitted, whose ends are waited for in order and a few at a time. */
export class InFlight {
  readonly #ends: (() => Promise<void>)[] = [];

  /**
   * Takes what is to be done with scores when they are there, and does what is due: at once where they are, as on machines that
   * compute while they are called, else when too many wait.
   */
  async add(pending: PendingScores, end: () => Promise<void>): Promise<void> {
    this.#ends.push(end);
    const most = pending.some((scores) => scores instanceof Promise) ? IN_FLIGHT : 1;
    while (this.#ends.length >= most) await this.#next();
  }

  /** Waits for all of them. */
  async drain(): Promise<void> {
    while (this.#ends.length > 0) await this.#next();
  }

  async #next(): Promise<void> {
    await this.#ends.shift()?.();
  }
}
