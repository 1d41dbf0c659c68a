// Decoding one sequence with a backend's own program: steps are submitted a few at a time, the next before the last are read.
import type { DecodeProgram, TokenChoice } from '../ops/decode.js';

/** Steps submitted at once: enough that the host is never waited for, few enough that tokens come in a stream. */
const AT_ONCE = 4;

/** A program and the tokens it has in flight. */
export class FusedDecoding {
  readonly #program: DecodeProgram;
  readonly #choice: TokenChoice;
  readonly #position: number;
  /** Steps still to submit. */
  #left: number;
  #begun = false;
  readonly #flight: Promise<Uint32Array>[] = [];
  #ready: number[] = [];

  /** @param position tokens in the cache; @param room tokens that may be generated, the one already chosen included. */
  constructor(program: DecodeProgram, position: number, room: number, options: Partial<TokenChoice>) {
    this.#program = program;
    this.#position = position;
    this.#left = room - 1;
    const { temperature = 0, topK = 0, topP = 1, seed = 0 } = options;
    this.#choice = { temperature, topK, topP, seed };
  }

  /** The token after `last`, which is what this gave before (or what prefill chose). */
  async next(last: number): Promise<number> {
    if (!this.#begun) {
      this.#begun = true;
      this.#program.begin(Uint32Array.of(last), Uint32Array.of(this.#position), [this.#choice]);
      this.#submit();
    }
    if (this.#ready.length === 0) {
      this.#submit();
      this.#ready = [...((await this.#flight.shift()) ?? [])];
    }
    return this.#ready.shift() ?? last;
  }

  release(): void {
    // Tokens past the end are nobody's, and so are their errors.
    for (const steps of this.#flight) steps.catch(() => undefined);
    this.#program.release();
  }

  #submit(): void {
    const count = Math.min(AT_ONCE, this.#left);
    if (count === 0) return;
    this.#left -= count;
    this.#flight.push(this.#program.steps(count));
  }
}
