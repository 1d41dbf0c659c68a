// Writes chain-of-thought tasks as .jsonl, for `gyre eval --tasks FILE` or `--drift FILE`. Run: npx tsx bench/make-chains.ts COUNT SEED > FILE
import { createRng } from '../src/core/rng.js';
import { taskSet } from '../src/evaluation/tasks/index.js';

const [count, seed] = process.argv.slice(2).map(Number);
if (!Number.isInteger(count) || !Number.isInteger(seed))
  throw new Error('usage: make-chains.ts COUNT SEED > FILE.jsonl');
for (const task of taskSet(createRng(seed), count)) process.stdout.write(`${JSON.stringify(task)}\n`);
