// Trains the blocks of a fixture model and says what it does, line by line, for a test that kills it in the middle.
// Run: node --import tsx train-and-wait.ts MODEL OUT
import { createRng } from '../../src/core/rng.js';
import { quantizeCheckpoint } from '../../src/quantize.node.js';

const [model, out] = process.argv.slice(2);
const shape = { sequences: 9, length: 16 };
const rng = createRng(4);
const ids = Int32Array.from({ length: shape.sequences * shape.length }, () => rng.int(0, 96));
await quantizeCheckpoint({
  model,
  out,
  method: 'paroquant-block',
  groupSize: 32,
  krot: 2,
  threads: 1,
  resume: true,
  calibrationTokens: { ids, ...shape, description: 'random' },
  block: { epochs: 3, batch: 2 },
  onProgress: ({ message }) => void process.stdout.write(`${message}\n`),
});
