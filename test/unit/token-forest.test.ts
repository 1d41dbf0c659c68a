// Sequences with common beginnings, packed into passes.
import { describe, expect, it } from 'vitest';
import { createRng } from '../../src/core/rng.js';
import { forestRoots } from '../../src/ops/sequences.js';
import { forestOrder, packSequences, type PackedPass, type ScoredSequence } from '../../src/evaluation/token-forest.js';

const sequence = (index: number, context: readonly number[], targets: readonly number[]): ScoredSequence => ({
  index,
  ids: Int32Array.from([...context, ...targets.slice(0, -1)]),
  first: context.length - 1,
  targets: Int32Array.from(targets),
});

const pack = (sequences: readonly ScoredSequence[], rows: number, most = 4 * rows): PackedPass[] => [
  ...packSequences(forestOrder(sequences), { rows, most }),
];

/** The tokens that a row sees, its own last. */
const seen = ({ ids, ends }: PackedPass, row: number): number[] =>
  [...ids.subarray(0, row + 1)].filter((_, j) => row < ends[j]);

/** What the model is asked: after these tokens, how likely is this one? */
const questions = (passes: readonly PackedPass[]): string[] =>
  passes.flatMap((pass) => [...pass.rows].map((row, i) => `${seen(pass, row).join(' ')} → ${pass.targets[i]}`));
const wanted = (sequences: readonly ScoredSequence[]): string[] =>
  sequences.flatMap(({ ids, first, targets }) =>
    [...targets].map((target, i) => `${ids.slice(0, first + i + 1).join(' ')} → ${target}`),
  );

describe('packSequences', () => {
  it('asks what each sequence asks alone, whatever they share and wherever passes end', () => {
    const rng = createRng(3);
    const draw = (length: number, tokens: number): number[] => Array.from({ length }, () => rng.int(0, tokens));
    for (const tokens of [2, 3, 1000]) {
      const header = draw(20, tokens);
      const sequences = Array.from({ length: 60 }, (_, i) => {
        const context = [...(i % 3 === 0 ? header : []), ...draw(rng.int(1, 30), tokens)];
        return [context, ...Array.from({ length: rng.int(1, 4) }, () => context)].map((c) => [
          c,
          draw(rng.int(1, 9), tokens),
        ]);
      })
        .flat()
        .map(([context, targets], i) => sequence(i, context, targets));
      for (const rows of [40, 200, 100_000]) {
        const passes = pack(sequences, rows, 500_000);
        for (const pass of passes) {
          expect(pass.ids.length).toBeLessThanOrEqual(rows + 3 * 38);
          // Refuses forests that are none.
          forestRoots(pass.ends, pass.positions);
        }
        const order = passes.flatMap((pass) => pass.sequences);
        expect(order.map(({ index }) => index).sort((a, b) => a - b)).toEqual(sequences.map((_, i) => i));
        expect(questions(passes)).toEqual(wanted(order));
      }
    }
  });

  it('has a row per token after what is shared: choices of one letter are asked of one row', () => {
    const context = [1, 2, 3, 4, 5];
    const letters = [10, 11, 12, 13].map((letter, i) => sequence(i, context, [letter]));
    const [pass, ...others] = pack(letters, 100);
    expect(others).toEqual([]);
    expect([...pass.ids]).toEqual(context);
    expect([...pass.rows]).toEqual([4, 4, 4, 4]);
    // Two endings with the same first token.
    const [words] = pack([sequence(0, context, [7, 8, 9]), sequence(1, context, [7, 6, 5])], 100);
    expect([...words.ids]).toEqual([1, 2, 3, 4, 5, 7, 6, 8]);
    expect([...words.ends]).toEqual([8, 8, 8, 8, 8, 8, 7, 8]);
    expect([...words.positions]).toEqual([0, 1, 2, 3, 4, 5, 6, 6]);
  });

  it('does not join sequences for a start token alone; the longest come first', () => {
    const [pass] = pack([sequence(0, [1, 5, 6], [2]), sequence(1, [1, 7, 8, 9], [2])], 100);
    expect([...pass.positions]).toEqual([0, 1, 2, 3, 0, 1, 2]);
    expect([...pass.ids]).toEqual([1, 7, 8, 9, 1, 5, 6]);
  });

  it('lets a pass grow by three times what it shares rather than compute that again, and no further than allowed', () => {
    const header = Array.from({ length: 50 }, (_, i) => i);
    const sequences = Array.from({ length: 100 }, (_, i) => sequence(i, [...header, 100 + i, 5, 5, 5, 5], [1]));
    const lengths = (rows: number, most: number): number[] => pack(sequences, rows, most).map(({ ids }) => ids.length);
    expect(Math.max(...lengths(60, 10_000))).toBe(210);
    expect(Math.max(...lengths(60, 120))).toBe(120);
  });
});
