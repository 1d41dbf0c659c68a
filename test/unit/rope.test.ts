// RoPE tables against numbers worked out independently of rope.ts: Transformers' formulas, written once more by hand.
import { describe, expect, it } from 'vitest';
import { inverseFrequencies, ropeTable, type RopeConfig } from '../../src/models/rope.js';
import { expectError } from './formats/helpers.js';

const base: RopeConfig = { headDim: 128, maxPositions: 8192, ropeTheta: 10000, ropeScaling: { type: 'default' } };
const frequencies = (config: Partial<RopeConfig>, length?: number): Float64Array =>
  inverseFrequencies({ ...base, ...config }, length).inverseFrequencies;

function close(found: ArrayLike<number>, expected: ArrayLike<number>): void {
  expect(found.length).toBe(expected.length);
  for (let i = 0; i < found.length; i++) expect(Math.abs(found[i] / expected[i] - 1)).toBeLessThan(1e-12);
}
const plain = (theta: number, dim = 128): number[] =>
  Array.from({ length: dim / 2 }, (_, i) => 1 / theta ** ((2 * i) / dim));

it('default and linear', () => {
  close(frequencies({}), plain(10000));
  close(
    frequencies({ ropeScaling: { type: 'linear', factor: 4 } }),
    plain(10000).map((f) => f / 4),
  );
});

it('dynamic: grows with sequences beyond the maximum, and only then', () => {
  const ropeScaling = { type: 'dynamic', factor: 2 } as const;
  close(frequencies({ ropeScaling }), plain(10000));
  close(frequencies({ ropeScaling }, 100), plain(10000));
  close(frequencies({ ropeScaling }, 16384), plain(10000 * (2 * 2 - 1) ** (128 / 126)));
});

it('llama3: keeps short waves, stretches long ones, ramps between', () => {
  const ropeScaling = {
    type: 'llama3',
    factor: 8,
    lowFreqFactor: 1,
    highFreqFactor: 4,
    originalMaxPositions: 8192,
  } as const;
  const expected = plain(500000).map((f) => {
    const turns = (8192 * f) / (2 * Math.PI); // over the original context
    if (turns > 4) return f;
    if (turns < 1) return f / 8;
    const smooth = (turns - 1) / 3;
    return (1 - smooth) * (f / 8) + smooth * f;
  });
  close(frequencies({ ropeTheta: 500000, ropeScaling }), expected);
  expect(expected.filter((f, i) => f === plain(500000)[i]).length).toBeGreaterThan(20);
});

describe('yarn', () => {
  const ropeScaling = {
    type: 'yarn',
    factor: 4,
    originalMaxPositions: 32768,
    betaFast: 32,
    betaSlow: 1,
    truncate: true,
  } as const;

  it('bounds, ramp and attention factor', () => {
    const { inverseFrequencies: found, attentionFactor } = inverseFrequencies({ ...base, ropeTheta: 1e6, ropeScaling });
    // d · ln(L / (2π·β)) / (2 ln b) = 128 · ln(162.97) / 27.631 = 23.60 and 128 · ln(5215.2) / 27.631 = 39.65
    const [low, high] = [23, 40];
    const expected = plain(1e6).map((f, i) => {
      const keep = 1 - Math.min(1, Math.max(0, (i - low) / (high - low)));
      return (f / 4) * (1 - keep) + f * keep;
    });
    close(found, expected);
    expect(attentionFactor).toBeCloseTo(0.1 * Math.log(4) + 1, 14);
  });

  it('without truncation, and with a given attention factor', () => {
    const { inverseFrequencies: found, attentionFactor } = inverseFrequencies({
      ...base,
      ropeTheta: 1e6,
      ropeScaling: { ...ropeScaling, truncate: false, attentionFactor: 1.25 },
    });
    const bound = (turns: number): number => (128 * Math.log(32768 / (turns * 2 * Math.PI))) / (2 * Math.log(1e6));
    const ramp = (30 - bound(32)) / (bound(1) - bound(32));
    close([found[30]], [plain(1e6)[30] * (ramp / 4 + 1 - ramp)]);
    expect(attentionFactor).toBe(1.25);
  });

  it('does not amplify when it does not stretch', () => {
    expect(inverseFrequencies({ ...base, ropeScaling: { ...ropeScaling, factor: 1 } }).attentionFactor).toBe(1);
  });
});

describe('table', () => {
  it('holds cos and sin times the attention factor, position by position', () => {
    const ropeScaling = {
      type: 'yarn',
      factor: 2,
      originalMaxPositions: 16,
      betaFast: 32,
      betaSlow: 1,
      truncate: true,
      attentionFactor: 1.5,
    } as const;
    const config = { ...base, headDim: 8, maxPositions: 32, ropeScaling };
    const { cos, sin, rotaryDim } = ropeTable(config, 5);
    const f = inverseFrequencies(config).inverseFrequencies;
    expect(rotaryDim).toBe(8);
    expect(cos.length).toBe(20);
    for (let p = 0; p < 5; p++) {
      for (let i = 0; i < 4; i++) {
        expect(cos[4 * p + i]).toBe(Math.fround(1.5 * Math.cos(p * f[i])));
        expect(sin[4 * p + i]).toBe(Math.fround(1.5 * Math.sin(p * f[i])));
      }
    }
  });

  it('is limited before it is allocated', async () => {
    await expectError(() => ropeTable(base, 1e9), 'limit-exceeded', /1000000000 positions/);
  });
});
