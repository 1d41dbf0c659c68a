// Quantizes the bundled model to 4 bits and measures what it cost. Run: node examples/quantize-and-evaluate.mjs [method]
import { mkdtemp, readFile, rm } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import path from 'node:path';
import { fileURLToPath } from 'node:url';
import {
  evaluateText,
  loadDecoder,
  loadTokenizer,
  openBackend,
  openModel,
  quantizeCheckpoint,
  resolveModel,
  tokenizeTexts,
} from 'gyre/node';

const method = process.argv[2] ?? 'rtn';
const model = fileURLToPath(new URL('../models/gyre-14m', import.meta.url));
const folder = await mkdtemp(path.join(tmpdir(), 'gyre-example-'));
const out = path.join(folder, method);

const report = await quantizeCheckpoint({ model, out, method, bits: 4, groupSize: 128 });
console.log(`${method}: ${report.bitsPerWeight.toFixed(3)} bits per weight, ${report.seconds.toFixed(1)} s`);

const backend = await openBackend('cpu');
const load = async (name) => {
  const { files } = await resolveModel(name);
  const source = await openModel(files);
  return { source, files, decoder: await loadDecoder(backend, source) };
};
const original = await load(model);
const quantized = await load(out);

const tokenizer = await loadTokenizer(original.files);
const text = await readFile(path.join(model, 'eval/prose/05-popular-science.txt'), 'utf8');
const result = await evaluateText(quantized.decoder, tokenizeTexts(tokenizer, [text]), {
  seqLen: 512,
  bosTokenId: tokenizer.bosTokenId,
  reference: original.decoder,
});
console.log(`perplexity ${result.referencePerplexity.toFixed(3)} → ${result.perplexity.toFixed(3)}`);
console.log(`KL ${result.kl.toFixed(5)} nats per token, top-1 agreement ${(100 * result.top1Agreement).toFixed(1)} %`);

await Promise.all([original, quantized].map(({ source }) => source.checkpoint.close()));
await backend.dispose();
await rm(folder, { recursive: true });
