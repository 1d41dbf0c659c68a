// Seeded random numbers. Every random choice in the project is drawn from here, so that a seed names a result.

/** A stream of random numbers, the same for the same seed on every platform. */
export interface Rng {
  /** The next 32 random bits as an unsigned integer. */
  nextUint32(): number;
  /** A float in [0, 1) with 53 random bits. */
  uniform(): number;
  /** An integer in [lo, hi): `hi` is left out. Every value is equally likely (rejection, no modulo bias). */
  int(lo: number, hi: number): number;
  /** A draw from the standard normal distribution. Its last bits depend on the engine's `Math.log` and `Math.cos`. */
  normal(): number;
  /** One item of a non-empty list. */
  pick<T>(items: readonly T[]): T;
  /** Shuffles the array in place (Fisher-Yates) and returns it. */
  shuffle<T>(items: T[]): T[];
  /** A random order of 0 … n−1. */
  permutation(n: number): Uint32Array;
  /**
   * A new stream that depends on this stream's seed and the label alone, not on how much was drawn: parts of a
   * program that fork with their own label do not disturb each other. The number 1 and the string '1' differ.
   */
  fork(label: string | number): Rng;
}

type State = readonly [number, number, number, number];

/** A random stream for a seed, which is any safe integer. */
export function createRng(seed: number): Rng {
  if (!Number.isSafeInteger(seed)) throw new RangeError(`seed must be a safe integer, got ${seed}`);
  const low = splitmix32(seed >>> 0);
  const state: State = [low(), low(), low(), low()];
  const high = Math.floor(seed / 2 ** 32) >>> 0;
  if (high === 0) return new Xoshiro128(state);
  const more = splitmix32(~high);
  return new Xoshiro128([state[0] ^ more(), state[1] ^ more(), state[2] ^ more(), state[3] ^ more()]);
}

/** xoshiro128** by Blackman and Vigna: 128 bits of state, period 2^128 − 1. */
class Xoshiro128 implements Rng {
  readonly #key: State;
  #a: number;
  #b: number;
  #c: number;
  #d: number;

  constructor(key: State) {
    // The all-zero state is the one fixed point of the generator.
    this.#key = key.some((word) => word !== 0) ? key : [1, 0, 0, 0];
    [this.#a, this.#b, this.#c, this.#d] = this.#key;
  }

  nextUint32(): number {
    const scrambled = Math.imul(rotateLeft(Math.imul(this.#b, 5), 7), 9) >>> 0;
    const shifted = this.#b << 9;
    this.#c ^= this.#a;
    this.#d ^= this.#b;
    this.#b ^= this.#c;
    this.#a ^= this.#d;
    this.#c ^= shifted;
    this.#d = rotateLeft(this.#d, 11);
    return scrambled;
  }

  uniform(): number {
    const high = this.nextUint32() >>> 5;
    const low = this.nextUint32() >>> 6;
    return (high * 2 ** 26 + low) / 2 ** 53;
  }

  int(lo: number, hi: number): number {
    const span = hi - lo;
    if (!Number.isInteger(lo) || !Number.isInteger(hi) || span < 1 || span > 2 ** 32) {
      throw new RangeError(`int needs integers lo < hi at most 2^32 apart, got ${lo} and ${hi}`);
    }
    const limit = 2 ** 32 - (2 ** 32 % span);
    let draw = this.nextUint32();
    while (draw >= limit) draw = this.nextUint32();
    return lo + (draw % span);
  }

  normal(): number {
    const radius = Math.sqrt(-2 * Math.log(1 - this.uniform()));
    return radius * Math.cos(2 * Math.PI * this.uniform());
  }

  pick<T>(items: readonly T[]): T {
    if (items.length === 0) throw new RangeError('pick needs a non-empty list');
    return items[this.int(0, items.length)];
  }

  shuffle<T>(items: T[]): T[] {
    for (let i = items.length - 1; i > 0; i--) {
      const j = this.int(0, i + 1);
      const held = items[i];
      items[i] = items[j];
      items[j] = held;
    }
    return items;
  }

  permutation(n: number): Uint32Array {
    const order = Array.from({ length: n }, (_, i) => i);
    return Uint32Array.from(this.shuffle(order));
  }

  fork(label: string | number): Rng {
    const text = `${typeof label}:${label}`;
    const words = this.#key.map((word, i) => splitmix32(hash32(text, word ^ i))());
    return new Xoshiro128([words[0] ?? 0, words[1] ?? 0, words[2] ?? 0, words[3] ?? 0]);
  }
}

/** splitmix32: spreads a small seed over as many words as a generator's state needs. */
function splitmix32(seed: number): () => number {
  let state = seed | 0;
  return () => {
    state = (state + 0x9e3779b9) | 0;
    let mixed = state ^ (state >>> 16);
    mixed = Math.imul(mixed, 0x21f0aaad);
    mixed ^= mixed >>> 15;
    mixed = Math.imul(mixed, 0x735a2d97);
    return (mixed ^ (mixed >>> 15)) >>> 0;
  };
}

/** FNV-1a over the UTF-16 code units of a text, started from a salt. */
function hash32(text: string, salt: number): number {
  let hash = (0x811c9dc5 ^ salt) >>> 0;
  for (let i = 0; i < text.length; i++) hash = Math.imul(hash ^ text.charCodeAt(i), 0x01000193);
  return hash >>> 0;
}

function rotateLeft(word: number, by: number): number {
  return (word << by) | (word >>> (32 - by));
}
