// Python's generator, against numbers that CPython 3.11 gave.
import { describe, expect, it } from 'vitest';
import { createPythonRandom } from '../../src/core/python-random.js';

// random.Random(seed): getrandbits(32) × 3, randint(0, 45575) × 5, sample of range(1000), range(1119), range(30), randint(0, 9).
const EXPECTED = [
  {
    seed: 0,
    bits: [3626764237, 1654615998, 3255389356],
    integers: [27562, 2653, 16968, 33506, 31845],
    few: [414, 940, 802, 849, 310],
    many: [
      976, 733, 447, 1033, 285, 577, 286, 194, 513, 1090, 300, 635, 202, 151, 676, 966, 206, 724, 889, 647, 418, 906,
      1067, 533, 127,
    ],
    pool: [25, 17, 0, 2, 23, 12, 22, 21, 20, 27],
    last: 9,
  },
  {
    seed: 1234,
    bits: [4150886329, 3342196574, 1892932127],
    integers: [7657, 490, 5940, 38156, 2288],
    few: [687, 709, 85, 100, 784],
    many: [
      726, 484, 35, 63, 32, 708, 991, 949, 304, 186, 374, 234, 29, 1030, 996, 511, 132, 1108, 954, 140, 182, 1054, 94,
      552, 129,
    ],
    pool: [20, 9, 15, 11, 8, 7, 29, 6, 14, 16],
    last: 0,
  },
  {
    seed: 2 ** 40 + 5,
    bits: [2166296868, 2220160828, 1153647273],
    integers: [43502, 1797, 34796, 3053, 10843],
    few: [81, 815, 835, 137, 244],
    many: [
      280, 507, 778, 248, 471, 956, 113, 228, 873, 90, 675, 899, 584, 267, 194, 361, 692, 116, 456, 946, 239, 304, 450,
      262, 205,
    ],
    pool: [16, 9, 21, 5, 24, 4, 23, 1, 17, 28],
    last: 4,
  },
] as const;

describe('createPythonRandom', () => {
  it.each(EXPECTED)('seed $seed', ({ seed, bits, integers, few, many, pool, last }) => {
    const random = createPythonRandom(seed);
    expect(bits.map(() => random.getrandbits(32))).toEqual(bits);
    expect(integers.map(() => random.randint(0, 45575))).toEqual(integers);
    expect(random.sampleIndices(1000, 5)).toEqual(few);
    expect(random.sampleIndices(1119, 25)).toEqual(many);
    expect(random.sampleIndices(30, 10)).toEqual(pool);
    expect(random.randint(0, 9)).toBe(last);
  });

  it('runs on past its state, drops the sign, and refuses what is no whole number', () => {
    // random.Random(-7): the 2000th getrandbits(32).
    const random = createPythonRandom(-7);
    const drawn = Array.from({ length: 2000 }, () => random.getrandbits(32));
    expect(drawn[1999]).toBe(2803521222);
    expect(() => createPythonRandom(0.5)).toThrow(RangeError);
    expect(() => random.sampleIndices(3, 4)).toThrow(RangeError);
  });
});
