// What f16 activations cost in quality: KL(original ‖ quantized) and perplexity on the project's prose, with passes in f32 and in f16,
// window by window. The quantized model is made first, from the tokens in FILE where one is given.
// Usage: tsx bench/webgpu-precision.ts [--model FOLDER] [--quantized FOLDER] [--tokens FILE] [--method NAME]
import { mkdtempSync, readdirSync, readFileSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import path from 'node:path';
import { parseArgs } from 'node:util';
import { openBackend } from '../src/backends/registry.js';
import { evaluateText, tokenizeTexts, type TextEvaluation } from '../src/evaluation/index.js';
import { folderFiles } from '../src/formats/source.node.js';
import { loadDecoder, openModel } from '../src/models/load.js';
import type { CalibrationTokens } from '../src/quant/calibration/tokens.js';
import { quantizeCheckpoint } from '../src/quantize.node.js';
import { loadTokenizer } from '../src/tokenizer/index.js';
import { round, writeResult } from './support/results.js';

const { values } = parseArgs({
  options: {
    model: { type: 'string', default: 'models/gyre-14m' },
    quantized: { type: 'string' },
    tokens: { type: 'string' },
    method: { type: 'string', default: 'paroquant' },
  },
});
const scratch = mkdtempSync(path.join(tmpdir(), 'gyre-bench-'));
const quantized = values.quantized ?? path.join(scratch, 'quantized');
let quantizeSeconds: number | undefined;
if (values.quantized === undefined) {
  const given = values.tokens && (JSON.parse(readFileSync(values.tokens, 'utf8')) as { ids: number[] });
  const calibrationTokens = given ? ({ ...given, ids: Int32Array.from(given.ids) } as CalibrationTokens) : undefined;
  const begun = performance.now();
  await quantizeCheckpoint({
    model: values.model,
    out: quantized,
    method: values.method,
    device: 'webgpu',
    calibrationTokens,
  });
  quantizeSeconds = round((performance.now() - begun) / 1000);
  console.log(`quantized on the GPU in ${quantizeSeconds} s`);
}
const folder = path.join(values.model, 'eval/prose');
const texts = readdirSync(folder)
  .filter((name) => name.endsWith('.txt'))
  .sort()
  .map((name) => readFileSync(path.join(folder, name), 'utf8'));
const found = new Map<'f32' | 'f16', TextEvaluation>();
for (const precision of ['f32', 'f16'] as const) {
  const backend = await openBackend('webgpu', { precision });
  const files = await folderFiles(values.model);
  const tokenizer = await loadTokenizer(files);
  const [source, small] = [await openModel(files), await openModel(await folderFiles(quantized))];
  const result = await evaluateText(await loadDecoder(backend, small), tokenizeTexts(tokenizer, texts), {
    reference: await loadDecoder(backend, source),
    bosTokenId: tokenizer.bosTokenId,
  });
  found.set(precision, result);
  console.log(
    `${precision}: KL ${(result.kl ?? NaN).toFixed(6)}, perplexity ${result.perplexity.toFixed(4)}, of the original ${(result.referencePerplexity ?? NaN).toFixed(4)}, ${result.tokens} tokens, ${result.tokensPerSecond.toFixed(0)} tokens/s (${backend.info.description})`,
  );
  await source.checkpoint.close();
  await small.checkpoint.close();
  await backend.dispose();
}
const [f32, f16] = [found.get('f32'), found.get('f16')];
if (f32 && f16) {
  const differences = f16.scores.map((score, i) => (score.kl ?? NaN) - (f32.scores[i].kl ?? NaN));
  const mean = differences.reduce((a, b) => a + b, 0) / differences.length;
  const spread = Math.sqrt(
    differences.reduce((sum, d) => sum + (d - mean) ** 2, 0) / Math.max(1, differences.length - 1) / differences.length,
  );
  const share = (f16.kl ?? NaN) / (f32.kl ?? NaN) - 1;
  const perplexity = f16.perplexity / f32.perplexity - 1;
  console.log(
    `f16 against f32: KL ${(100 * share).toFixed(3)}% (windows: ${mean.toExponential(2)} ± ${spread.toExponential(1)} nats), perplexity ${(100 * perplexity).toFixed(4)}%`,
  );
  const summary = ({ scores: _, ...rest }: TextEvaluation): object => rest;
  writeResult('webgpu-precision', {
    model: values.model,
    method: values.method,
    quantizeSeconds,
    f32: summary(f32),
    f16: summary(f16),
    relativeKl: round(share),
    relativePerplexity: round(perplexity),
  });
}
rmSync(scratch, { recursive: true, force: true });
