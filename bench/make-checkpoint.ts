// Makes a random checkpoint with a published model's shapes. Run: npx tsx bench/make-checkpoint.ts qwen3-0.6b FOLDER [layers]
import { makeRandomCheckpoint, SHAPES, type ShapeName } from './support/random-checkpoint.js';

const [name, folder, layers] = process.argv.slice(2);
if (!(name in SHAPES) || !folder)
  throw new Error(`usage: make-checkpoint.ts ${Object.keys(SHAPES).join('|')} FOLDER [layers]`);
await makeRandomCheckpoint(folder, name as ShapeName, layers ? Number(layers) : undefined);
