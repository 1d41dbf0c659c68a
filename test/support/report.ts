// A report of results that the real commands' code made: a fixture model quantized two ways and measured.
import { mkdir, writeFile } from 'node:fs/promises';
import path from 'node:path';
import { openBackend } from '../../src/backends/registry.js';
import { describeModel, textResultFile } from '../../src/cli/result-files.js';
import { evaluateText } from '../../src/evaluation/index.js';
import { folderFiles } from '../../src/formats/source.node.js';
import { loadDecoder, openModel } from '../../src/models/load.js';
import { findInputs, writeReport } from '../../src/report.node.js';
import { quantizeCheckpoint } from '../../src/quantize.node.js';
import { FIXTURES, randomTokens } from './pipeline.js';

const MODEL = path.join(FIXTURES, 'qwen3');

/** Makes results in `folder` and the report `folder/report.html` with its charts in `folder/charts`. Returns the page. */
export async function writeDemoReport(folder: string): Promise<string> {
  const backend = await openBackend('cpu');
  const results = path.join(folder, 'results');
  await mkdir(results, { recursive: true });
  try {
    const source = await openModel(await folderFiles(MODEL));
    const original = await loadDecoder(backend, source);
    const calibration = { sequences: 8, length: 32 };
    const calibrationTokens = {
      ids: randomTokens(source, calibration.sequences, calibration.length),
      ...calibration,
      description: 'random tokens',
    };
    const reference = await describeModel({ ...source, name: 'qwen3-fixture' });
    const tokens = randomTokens(source, 8, 32, 5);
    const measured = async (name: string, from: typeof source, decoder: typeof original) => {
      const evaluation = await evaluateText(decoder, tokens, {
        seqLen: 32,
        reference: decoder === original ? undefined : original,
      });
      const result = await textResultFile({ name: 'random', text: '' }, evaluation, {
        model: decoder === original ? reference : await describeModel({ ...from, name }),
        reference: decoder === original ? null : reference,
        backend: backend.info,
      });
      await writeFile(path.join(results, `${name}.json`), JSON.stringify(result));
    };
    await measured('original', source, original);
    for (const method of ['rtn', 'gptq', 'paroquant']) {
      const out = path.join(folder, method);
      await quantizeCheckpoint({ model: MODEL, out, method, groupSize: 32, krot: 4, steps: 10, calibrationTokens });
      const quantized = await openModel(await folderFiles(out));
      const decoder = await loadDecoder(backend, quantized);
      await measured(method, quantized, decoder);
      decoder.release();
      await quantized.checkpoint.close();
    }
    original.release();
    await source.checkpoint.close();
  } finally {
    await backend.dispose();
  }
  const names = ['results', 'rtn', 'gptq', 'paroquant'].map((name) => path.join(folder, name));
  const out = path.join(folder, 'report.html');
  await writeReport(await findInputs(names), { out, svg: path.join(folder, 'charts'), madeBy: 'a test' });
  return out;
}
