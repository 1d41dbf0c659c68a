// The sampler against a plain full sort, distributions against probabilities, and its bounds.
import { describe, expect, it } from 'vitest';
import { createRng } from '../../src/core/rng.js';
import { argmax, createSampler, type SamplingOptions } from '../../src/generate/index.js';

/** Probabilities after the filters, by sorting everything. */
function expected(logits: Float32Array, { temperature = 1, topK = 0, topP = 1 }: SamplingOptions): Map<number, number> {
  const max = Math.max(...logits);
  let entries = [...logits].map((logit, id) => ({ id, weight: Math.exp((logit - max) / temperature) }));
  entries.sort((a, b) => b.weight - a.weight || a.id - b.id);
  if (topK > 0) entries = entries.slice(0, topK);
  const goal = topP * entries.reduce((sum, e) => sum + e.weight, 0);
  let mass = 0;
  let kept = 0;
  while (kept < entries.length && (kept === 0 || mass < goal)) mass += entries[kept++].weight;
  return new Map(entries.slice(0, kept).map(({ id, weight }) => [id, weight / mass]));
}

const random = (seed: number, n: number, spread = 3): Float32Array => {
  const rng = createRng(seed);
  return Float32Array.from({ length: n }, () => spread * rng.normal());
};

describe('createSampler', () => {
  it('is greedy by default, the first of equals', () => {
    const { sample } = createSampler();
    expect(sample(Float32Array.of(1, 5, 5, -2), createRng(0))).toBe(1);
    expect(argmax(Float32Array.of(-Infinity, -3, NaN))).toBe(1);
  });

  it.each<SamplingOptions>([
    { temperature: 1 },
    { temperature: 0.5 },
    { temperature: 2, topK: 5 },
    { temperature: 1, topP: 0.6 },
    { temperature: 0.8, topK: 12, topP: 0.7 },
    { temperature: 1, topK: 1 },
    { temperature: 1, topP: 1e-9 },
  ])('draws with the probabilities of a full sort: %o', (options) => {
    const logits = random(3, 40, 1.5);
    const probabilities = expected(logits, options);
    const { sample } = createSampler(options);
    const rng = createRng(11);
    const draws = 20_000;
    const counts = new Map<number, number>();
    for (let i = 0; i < draws; i++) {
      const id = sample(logits, rng);
      counts.set(id, (counts.get(id) ?? 0) + 1);
    }
    for (const id of counts.keys()) expect(probabilities.has(id)).toBe(true);
    for (const [id, p] of probabilities) {
      const error = Math.sqrt((p * (1 - p)) / draws);
      expect(Math.abs((counts.get(id) ?? 0) / draws - p)).toBeLessThan(5 * error + 1e-9);
    }
  });

  it('draws across a large vocabulary by temperature alone, impossible ids never', () => {
    const logits = new Float32Array(5000).fill(-Infinity);
    const likely = [3, 1023, 1024, 2500, 4999];
    for (const [i, id] of likely.entries()) logits[id] = 10 - 0.3 * i;
    logits[2000] = NaN;
    logits[4000] = -800;
    const probabilities = expected(
      Float32Array.from(likely, (id) => logits[id]),
      { temperature: 0.7 },
    );
    const { sample } = createSampler({ temperature: 0.7 });
    const rng = createRng(2);
    const draws = 20_000;
    const counts = new Array<number>(likely.length).fill(0);
    for (let i = 0; i < draws; i++) counts[likely.indexOf(sample(logits, rng))]++;
    expect(counts.reduce((sum, count) => sum + count, 0)).toBe(draws);
    for (const [i, p] of probabilities)
      expect(Math.abs(counts[i] / draws - p)).toBeLessThan(5 * Math.sqrt((p * (1 - p)) / draws));
  });

  it('keeps exactly the set of a full sort, ties and all', () => {
    for (let seed = 0; seed < 60; seed++) {
      const rng = createRng(seed);
      const n = rng.int(1, 60);
      // Few distinct values: many ties.
      const logits = Float32Array.from({ length: n }, () => rng.int(-3, 4));
      const options = { temperature: 1, topK: rng.int(0, n + 3), topP: 0.05 + 0.95 * rng.uniform() };
      const wanted = [...expected(logits, options).keys()].sort((a, b) => a - b);
      const { sample } = createSampler(options);
      const found = new Set<number>();
      for (let i = 0; i < 1500; i++) found.add(sample(logits, rng));
      for (const id of found) expect(wanted).toContain(id);
      expect(found.size).toBeGreaterThan(0.7 * wanted.length);
    }
  });

  it('gives the same draws for the same seed and leaves the logits alone', () => {
    const logits = random(5, 1000);
    const before = logits.slice();
    const draw = (seed: number): number[] => {
      const rng = createRng(seed);
      const { sample } = createSampler({ temperature: 1, topP: 0.9 });
      return Array.from({ length: 20 }, () => sample(logits, rng));
    };
    expect(draw(1)).toEqual(draw(1));
    expect(draw(1)).not.toEqual(draw(2));
    expect(logits).toEqual(before);
  });

  it('stays fast on a vocabulary of 150,000, all equal or sorted', () => {
    const n = 150_000;
    for (const logits of [new Float32Array(n), Float32Array.from({ length: n }, (_, i) => -i / n), random(1, n)]) {
      const { sample } = createSampler({ temperature: 1, topK: 50, topP: 0.9 });
      const rng = createRng(0);
      sample(logits, rng);
      const start = performance.now();
      for (let i = 0; i < 10; i++) sample(logits, rng);
      // About 4 ms each when linear; a sort takes 50 and a quadratic selection minutes.
      expect((performance.now() - start) / 10).toBeLessThan(100);
    }
  });

  it('never draws impossible tokens and refuses rows without a finite maximum', () => {
    const { sample } = createSampler({ temperature: 1 });
    const rng = createRng(0);
    const logits = Float32Array.of(-Infinity, 0, NaN, 0, -Infinity);
    for (let i = 0; i < 200; i++) expect([1, 3]).toContain(sample(logits, rng));
    expect(() => sample(Float32Array.of(NaN, -Infinity), rng)).toThrow(/not finite/);
    expect(() => sample(Float32Array.of(0, Infinity), rng)).toThrow(/not finite/);
  });

  it.each<SamplingOptions>([{ temperature: -1 }, { topK: 1.5 }, { topK: -1 }, { topP: 0 }, { topP: 1.1 }])(
    'refuses %o',
    (options) => {
      expect(() => createSampler(options)).toThrow(/must be/);
    },
  );
});
