// The bundled model against Transformers: logits and mean negative log-likelihood of a stored token sequence.
import path from 'node:path';
import { expect, it } from 'vitest';
import { openBackend } from '../../src/backends/registry.js';
import { floats } from '../../src/core/tensor.js';
import { SafetensorsFile } from '../../src/formats/safetensors.js';
import { folderFiles, openFile } from '../../src/formats/source.node.js';
import { loadDecoder, openModel } from '../../src/models/load.js';

const ROOT = path.join(import.meta.dirname, '../..');
/** What the project promises for f32, absolute. */
const TOLERANCE = 2e-4;

it('gives the logits that Transformers gives', async () => {
  const expected = await SafetensorsFile.open(
    await openFile(path.join(ROOT, 'test/fixtures/model/expected.safetensors')),
  );
  const ids = Int32Array.from((await expected.read('input_ids')).data as BigInt64Array, Number);
  const logitsWanted = floats(await expected.read('logits'));
  const names = [...expected.tensors.keys()];
  const nllWanted = floats(await expected.read(names.find((n) => /nll/.test(n)) ?? 'mean_nll'))[0];
  await expected.close();
  const backend = await openBackend('cpu');
  try {
    const source = await openModel(await folderFiles(path.join(ROOT, 'models/gyre-14m')));
    const decoder = await loadDecoder(backend, source);
    const logits = await decoder.logits(await decoder.hidden(ids));
    const all = await backend.download(logits);
    const last = all.subarray(all.length - logitsWanted.length);
    let worst = 0;
    for (let i = 0; i < last.length; i++) worst = Math.max(worst, Math.abs(last[i] - logitsWanted[i]));
    expect(worst).toBeLessThan(TOLERANCE);
    const scored = backend.sliceRows(logits, 0, ids.length - 1);
    const { nll } = await backend.score(scored, ids.slice(1));
    expect(nll.reduce((a, b) => a + b, 0) / nll.length).toBeCloseTo(nllWanted, 4);
    await source.checkpoint.close();
  } finally {
    await backend.dispose();
  }
});
