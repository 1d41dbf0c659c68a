// A page that runs a model with gyre as its users would import it. test/browser/cpu.test.ts bundles, serves and calls it.
import { loadDecoder, openBackend, openModel, urlFiles } from 'gyre';

/** Logits of `ids` [batch, tokens] on the CPU backend, all at once and token by token. */
globalThis.run = async ({ model, files, ids, batch }) => {
  const backend = await openBackend('cpu');
  const source = await openModel(urlFiles(new URL(model, location.href).href, files));
  const decoder = await loadDecoder(backend, source);
  const logits = async (chunk, options) =>
    Array.from(await backend.download(await decoder.logits(await decoder.hidden(Int32Array.from(chunk), options))));

  const prefill = await logits(ids, { batch });
  const tokens = ids.length / batch;
  const cache = await decoder.createCache(batch, tokens);
  const steps = [];
  for (let t = 0; t < tokens; t++) {
    steps.push(
      await logits(
        Array.from({ length: batch }, (_, b) => ids[b * tokens + t]),
        { cache },
      ),
    ); // [batch, vocab]
  }
  const result = { isolated: crossOriginIsolated, info: backend.info, prefill, steps };
  await backend.dispose();
  return result;
};

/** X of X·(H + λI) = B, λ = damp · mean(diag H), with B [m, n] and H [n, n]: what quantizing computes in f64. */
globalThis.solve = async ({ h, b, m, n, damp }) => {
  const backend = await openBackend('cpu');
  const matrix = (rows, values) => backend.upload({ dtype: 'f32', shape: [rows, n], data: Float32Array.from(values) });
  const x = Array.from(
    await backend.download(await backend.solveSymmetric(await matrix(n, h), await matrix(m, b), damp)),
  );
  await backend.dispose();
  return x;
};
