// Decoding many sequences with a backend's own program: steps are submitted a few at a time, the next before the last are read, so a
// sequence that has ended goes on for some steps whose tokens nobody wants.
import type { DecodePlace, DecodeProgram } from '../ops/decode.js';

/** Steps submitted at once, and submissions under way. */
const [AT_ONCE, UNDER_WAY] = [4, 2];

/** One of the sequences: what {@link FusedBatch} has to know of it. */
export interface FusedSequence extends DecodePlace {
  /** Grows as tokens are taken. */
  readonly position: number;
}

/** A token that a program chose. */
export interface FusedToken<S extends FusedSequence> {
  readonly place: number;
  readonly sequence: S;
  readonly id: number;
}

interface Submission<S> {
  readonly count: number;
  /** Who held the places. */
  readonly sequences: readonly (S | undefined)[];
  readonly tokens: Promise<Uint32Array>;
}

/** A program, who holds its places, and the steps under way. */
export class FusedBatch<S extends FusedSequence> {
  readonly #program: DecodeProgram;
  readonly #sequences: (S | undefined)[];
  readonly #submissions: Submission<S>[] = [];

  /** Takes the program over, with a sequence or nobody in each of its places. */
  constructor(program: DecodeProgram, sequences: readonly (S | undefined)[]) {
    this.#program = program;
    this.#sequences = [...sequences];
    for (const [place, sequence] of sequences.entries()) program.place(place, sequence);
  }

  /** Gives a place to a sequence, or to nobody; what is under way for the one before is dropped. */
  place(place: number, sequence: S | undefined): void {
    this.#sequences[place] = sequence;
    this.#program.place(place, sequence);
  }

  /** Tokens of the next steps, in order, of sequences that still hold their places and have room; none when no one has any left. */
  async next(): Promise<FusedToken<S>[]> {
    while (this.#submissions.length < UNDER_WAY && this.#submit());
    const submission = this.#submissions.shift();
    if (!submission) return [];
    const { count, sequences, tokens } = submission;
    const chosen = await tokens;
    const places = sequences.length;
    return Array.from(chosen.subarray(0, count * places), (id, i) => ({ place: i % places, id })).flatMap(
      ({ place, id }) => {
        const sequence = sequences[place];
        return sequence && sequence === this.#sequences[place] ? [{ place, sequence, id }] : [];
      },
    );
  }

  release(): void {
    this.#program.release();
  }

  /** Submits as many steps as the one with the most to do needs; false when nobody needs any. */
  #submit(): boolean {
    const needed = this.#sequences.map((sequence, place) => {
      if (!sequence) return 0;
      const ahead = this.#submissions.reduce(
        (sum, { count, sequences }) => sum + (sequences[place] === sequence ? count : 0),
        0,
      );
      return sequence.end - sequence.position - ahead;
    });
    const count = Math.min(AT_ONCE, Math.max(...needed));
    if (count <= 0) return false;
    const tokens = this.#program.steps(count);
    // Of steps that are dropped nobody wants the errors either.
    tokens.catch(() => undefined);
    this.#submissions.push({ count, sequences: [...this.#sequences], tokens });
    return true;
  }
}
