// Packs token sequences into passes without padding: what sequences begin with alike is in a pass once. A pass is a forest of tokens
// in preorder (`AttentionOptions.ends`), so its rows are as many as a backend likes, whatever the lengths.
import type { TokenForest } from '../models/decoder.js';

/** Beginnings from this length on are shared by sequences that have nothing else in common. */
const SHARED = 16;
/** A pass that much of a shared beginning opens may have so many times as many rows more, rather than compute it again. */
const SHARED_ROWS = 3;

/** A sequence, and where what is scored of it begins. */
export interface ScoredSequence {
  readonly index: number;
  /** Tokens that go through the model. */
  readonly ids: Int32Array;
  /** The row that predicts the first of `targets`; there is one for each. */
  readonly first: number;
  readonly targets: Int32Array;
}

/** A pass. */
export interface PackedPass extends TokenForest {
  readonly ids: Int32Array;
  /** Rows that are scored, sequence by sequence; one may be scored several times. */
  readonly rows: Int32Array;
  /** The token that each of them should predict. */
  readonly targets: Int32Array;
  readonly sequences: readonly ScoredSequence[];
}

/** Tokens at the front that two sequences share. */
export function sharedLength(a: Int32Array, b: Int32Array): number {
  const most = Math.min(a.length, b.length);
  let length = 0;
  while (length < most && a[length] === b[length]) length++;
  return length;
}

/** Equal beginnings beside one another. */
function compare(a: ScoredSequence, b: ScoredSequence): number {
  const same = sharedLength(a.ids, b.ids);
  const [x, y] = [a.ids.at(same) ?? -1, b.ids.at(same) ?? -1];
  return same < a.ids.length && same < b.ids.length ? x - y : a.ids.length - b.ids.length || a.index - b.index;
}

/** How much of the sequence before it one goes on from: nothing where that is not worth walking past the other's tokens. */
function continued(before: ScoredSequence, next: ScoredSequence): number {
  const same = sharedLength(before.ids, next.ids);
  return same >= Math.min(SHARED, before.first + 1, next.first + 1) ? same : 0;
}

/** Sequences in the order in which they are packed: those that share a beginning together, the longest such group first. */
export function forestOrder(sequences: readonly ScoredSequence[]): ScoredSequence[] {
  const groups: { longest: number; readonly members: ScoredSequence[] }[] = [];
  for (const sequence of [...sequences].sort(compare)) {
    const group = groups.at(-1);
    const before = group?.members.at(-1);
    if (group && before && continued(before, sequence) > 0) {
      group.members.push(sequence);
      group.longest = Math.max(group.longest, sequence.ids.length);
    } else {
      groups.push({ longest: sequence.ids.length, members: [sequence] });
    }
  }
  return groups.sort((a, b) => b.longest - a.longest).flatMap(({ members }) => members);
}

/**
 * Packs sequences, in {@link forestOrder}, into passes of about `rows` rows: fewer when the next sequence does not fit, up to
 * `most` when it shares much of them or is that long by itself.
 */
export function* packSequences(
  ordered: readonly ScoredSequence[],
  { rows, most }: { readonly rows: number; readonly most: number },
): Generator<PackedPass, void, void> {
  let pass = new Builder();
  for (const sequence of ordered) {
    const before = pass.sequences.at(-1);
    const shared = before ? continued(before, sequence) : 0;
    const room = Math.min(most, rows + SHARED_ROWS * shared);
    if (before && pass.rows + sequence.ids.length - shared > room) {
      yield pass.finish();
      pass = new Builder();
      pass.add(sequence, 0);
    } else {
      pass.add(sequence, shared);
    }
  }
  if (pass.rows > 0) yield pass.finish();
}

/** A pass that grows. */
class Builder {
  readonly sequences: ScoredSequence[] = [];
  readonly #ids: number[] = [];
  readonly #positions: number[] = [];
  /** Rows that each continues; −1 for the first of a tree. */
  readonly #parents: number[] = [];
  readonly #scored: number[] = [];
  readonly #targets: number[] = [];
  /** Rows of the last sequence's tokens. */
  #path: number[] = [];

  get rows(): number {
    return this.#ids.length;
  }

  /** Adds a sequence whose first tokens are those of the last one. */
  add(sequence: ScoredSequence, shared: number): void {
    this.sequences.push(sequence);
    this.#path = this.#path.slice(0, shared);
    for (let at = shared; at < sequence.ids.length; at++) {
      this.#parents.push(this.#path.at(-1) ?? -1);
      this.#positions.push(at);
      this.#path.push(this.#ids.push(sequence.ids[at]) - 1);
    }
    for (const [i, target] of sequence.targets.entries()) {
      this.#scored.push(this.#path[sequence.first + i]);
      this.#targets.push(target);
    }
  }

  finish(): PackedPass {
    const ends = Int32Array.from(this.#parents, (_, row) => row + 1);
    for (let row = ends.length - 1; row >= 0; row--) {
      const parent = this.#parents[row];
      if (parent >= 0) ends[parent] = Math.max(ends[parent], ends[row]);
    }
    return {
      ids: Int32Array.from(this.#ids),
      positions: Int32Array.from(this.#positions),
      ends,
      rows: Int32Array.from(this.#scored),
      targets: Int32Array.from(this.#targets),
      sequences: this.sequences,
    };
  }
}
