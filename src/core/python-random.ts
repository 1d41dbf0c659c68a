// Python's `random.Random`, number for number: the field's evaluation scripts draw examples and windows from it, so that
// only the same numbers give the same items. For everything of our own there is rng.ts.
//
// The generator is MT19937 (Matsumoto and Nishimura, 1998), seeded by its `init_by_array` with the 32-bit words of the seed;
// whole numbers below n are drawn by rejection from n's bit length, samples as CPython draws them since 3.2.

const SIZE = 624;
const PERIOD = 397;

/** The parts of `random.Random` that are needed. */
export interface PythonRandom {
  /** A whole number of `bits` random bits, 1 … 32. */
  getrandbits(bits: number): number;
  /** A whole number from `low` to `high`, both included; at most 2³² of them. */
  randint(low: number, high: number): number;
  /** `count` different whole numbers below `n`, in the order in which they are drawn: `sample(range(n), count)`. */
  sampleIndices(n: number, count: number): number[];
}

/** `random.Random(seed)`. @param seed a safe integer; like Python, the sign is dropped. */
export function createPythonRandom(seed: number): PythonRandom {
  if (!Number.isSafeInteger(seed)) throw new RangeError(`seed must be a safe integer, got ${seed}`);
  const twister = new MersenneTwister(wordsOf(Math.abs(seed)));
  const below = (n: number): number => {
    const bits = 32 - Math.clz32(n);
    let value: number;
    do value = twister.next() >>> (32 - bits);
    while (value >= n);
    return value;
  };
  return {
    getrandbits: (bits) => twister.next() >>> (32 - bits),
    randint: (low, high) => low + below(high - low + 1),
    sampleIndices: (n, count) => {
      if (count > n) throw new RangeError(`can't draw ${count} of ${n}`);
      // Small populations by swapping what was drawn to the end, large ones by drawing again what was drawn before.
      const few = 21 + (count > 5 ? 4 ** Math.ceil(Math.log(count * 3) / Math.log(4)) : 0);
      const drawn: number[] = [];
      if (n <= few) {
        const pool = Array.from({ length: n }, (_, i) => i);
        for (let i = 0; i < count; i++) {
          const at = below(n - i);
          drawn.push(pool[at]);
          pool[at] = pool[n - i - 1];
        }
        return drawn;
      }
      const seen = new Set<number>();
      while (drawn.length < count) {
        const index = below(n);
        if (seen.has(index)) continue;
        seen.add(index);
        drawn.push(index);
      }
      return drawn;
    },
  };
}

/** 32-bit words of a whole number, the lowest first; at least one. */
function wordsOf(value: number): number[] {
  const high = Math.floor(value / 2 ** 32);
  return high === 0 ? [value >>> 0] : [value >>> 0, high];
}

class MersenneTwister {
  readonly #state = new Uint32Array(SIZE);
  #at = SIZE;

  constructor(key: readonly number[]) {
    const state = this.#state;
    state[0] = 19650218;
    for (let i = 1; i < SIZE; i++) state[i] = Math.imul(1812433253, state[i - 1] ^ (state[i - 1] >>> 30)) + i;
    let i = 1;
    for (let k = 0; k < SIZE; k++) {
      const mixed = Math.imul(state[i - 1] ^ (state[i - 1] >>> 30), 1664525);
      state[i] = (state[i] ^ mixed) + key[k % key.length] + (k % key.length);
      i = this.#wrap(i);
    }
    for (let k = 1; k < SIZE; k++) {
      const mixed = Math.imul(state[i - 1] ^ (state[i - 1] >>> 30), 1566083941);
      state[i] = (state[i] ^ mixed) - i;
      i = this.#wrap(i);
    }
    state[0] = 0x80000000;
  }

  /** The index after `i` while seeding: the last word comes before the second. */
  #wrap(i: number): number {
    if (i + 1 < SIZE) return i + 1;
    this.#state[0] = this.#state[SIZE - 1];
    return 1;
  }

  /** The next 32 bits. */
  next(): number {
    if (this.#at === SIZE) this.#twist();
    let y = this.#state[this.#at++];
    y ^= y >>> 11;
    y ^= (y << 7) & 0x9d2c5680;
    y ^= (y << 15) & 0xefc60000;
    return (y ^ (y >>> 18)) >>> 0;
  }

  #twist(): void {
    const state = this.#state;
    for (let i = 0; i < SIZE; i++) {
      const y = (state[i] & 0x80000000) | (state[(i + 1) % SIZE] & 0x7fffffff);
      state[i] = state[(i + PERIOD) % SIZE] ^ (y >>> 1) ^ (y & 1 ? 0x9908b0df : 0);
    }
    this.#at = 0;
  }
}
