// Ratios of two recipes' losses on one text, with paired bootstrap intervals over windows, from results of `gyre eval --reference
// --out`. Usage: tsx bench/kl-ratio.ts BASE.json OTHER.json [BASE.json OTHER.json …] > ratios.json
import { readFileSync } from 'node:fs';
import path from 'node:path';
import { createRng } from '../src/core/rng.js';
import { resultSchema } from '../src/evaluation/results.js';

const RESAMPLES = 2000;
const files = process.argv.slice(2);
if (files.length < 2 || files.length % 2 !== 0) throw new Error('usage: tsx bench/kl-ratio.ts BASE.json OTHER.json …');

/** Per window: tokens, KL and increase of −log p, each a mean per token. */
function windows(file: string): { tokens: number[]; kl: number[]; increase: number[] } {
  const result = resultSchema.parse(JSON.parse(readFileSync(file, 'utf8')));
  const { columns } = result.evaluations[0].items;
  const { nll, kl, reference_nll: reference, tokens } = columns;
  if (!nll || !kl || !reference || !tokens) throw new Error(`${file} was not measured with --reference`);
  return { tokens, kl, increase: nll.map((value, i) => value - reference[i]) };
}

const rng = createRng(0);
const ratios = [];
for (let i = 0; i < files.length; i += 2) {
  const [base, other] = [windows(files[i]), windows(files[i + 1])];
  const n = base.tokens.length;
  if (other.tokens.some((count, w) => count !== base.tokens[w]))
    throw new Error('the two results are of different texts');
  const ratio = (key: 'kl' | 'increase', order: ArrayLike<number>): number => {
    let [a, b] = [0, 0];
    for (let w = 0; w < n; w++) {
      a += base.tokens[order[w]] * base[key][order[w]];
      b += base.tokens[order[w]] * other[key][order[w]];
    }
    return b / a;
  };
  const all = Array.from({ length: n }, (_, w) => w);
  const draws = Array.from({ length: RESAMPLES }, () => all.map(() => rng.int(0, n)));
  const interval = (key: 'kl' | 'increase'): [number, number] => {
    const sorted = draws.map((order) => ratio(key, order)).sort((a, b) => a - b);
    return [sorted[Math.floor(0.025 * RESAMPLES)], sorted[Math.ceil(0.975 * RESAMPLES) - 1]];
  };
  const mean = ({ tokens, ...rest }: typeof base, key: 'kl' | 'increase'): number =>
    rest[key].reduce((sum, value, w) => sum + tokens[w] * value, 0) / tokens.reduce((a, b) => a + b, 0);
  ratios.push({
    base: path.basename(files[i], '.json'),
    other: path.basename(files[i + 1], '.json'),
    windows: n,
    tokens: base.tokens.reduce((a, b) => a + b, 0),
    baseKl: mean(base, 'kl'),
    otherKl: mean(other, 'kl'),
    klRatio: ratio('kl', all),
    klRatio95: interval('kl'),
    baseNllIncrease: mean(base, 'increase'),
    otherNllIncrease: mean(other, 'increase'),
    nllIncreaseRatio: ratio('increase', all),
    nllIncreaseRatio95: interval('increase'),
  });
}
console.log(JSON.stringify(ratios, null, 2));
