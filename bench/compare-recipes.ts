// Puts several runs of bench/recipes.ts together (later files replace rows of earlier ones), prints the table and the ratios
// to AWQ, and draws docs/images/recipes.svg. Run: npx tsx bench/compare-recipes.ts bench/results/recipes.json [more.json…]
import { readFileSync } from 'node:fs';
import { z } from 'zod';
import { plotRecipes } from './support/plot.js';
import { round } from './support/results.js';

const row = z.object({
  bits: z.number(),
  method: z.string(),
  seed: z.number(),
  text: z.string(),
  kl: z.number(),
  klStandardError: z.number(),
  perplexity: z.number(),
  perplexityIncrease: z.number(),
  top1Agreement: z.number(),
  seconds: z.number(),
  bitsPerWeight: z.number(),
});
const rows = new Map<string, z.output<typeof row>>();
for (const file of process.argv.slice(2)) {
  const result = z.looseObject({ rows: z.array(row) }).parse(JSON.parse(readFileSync(file, 'utf8')));
  for (const r of result.rows) rows.set(`${r.bits} ${r.text} ${r.seed} ${r.method}`, r);
}
const table = [...rows.values()].map((r) => {
  const awq = rows.get(`${r.bits} ${r.text} ${r.seed} awq`);
  return {
    ...r,
    klToAwq: awq && round(r.kl / awq.kl),
    increaseToAwq: awq && round(r.perplexityIncrease / awq.perplexityIncrease),
  };
});
console.table(table.sort((a, b) => b.bits - a.bits || (a.text < b.text ? -1 : a.text > b.text ? 1 : 0)));
await plotRecipes(table, 'recipes');
