// Finds the linears whose channels stand out most. Run: node examples/inspect-layers.mjs [model folder or hub id]
import { fileURLToPath } from 'node:url';
import { linearStatistics, openModel, resolveModel, summarizeModel } from 'gyre/node';

const model = process.argv[2] ?? fileURLToPath(new URL('../models/gyre-14m', import.meta.url));
const { files } = await resolveModel(model);
const source = await openModel(files);

const summary = summarizeModel(source);
console.log(`${summary.family}, ${(summary.parameters / 1e6).toFixed(1)} M parameters`);
console.log(`${summary.linearBitsPerWeight.toFixed(2)} bits per weight in the linears`);

// One linear at a time: models of any size fit.
const linears = [];
for await (const linear of linearStatistics(source)) linears.push(linear);
linears.sort((a, b) => b.channelRatio - a.channelRatio);
for (const { module, channelRatio, kurtosis } of linears.slice(0, 5)) {
  console.log(`${module.padEnd(40)} max/median ${channelRatio.toFixed(2)}, kurtosis ${kurtosis.toFixed(2)}`);
}

await source.checkpoint.close();
