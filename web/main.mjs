// A page that runs a quantized model on WebGPU with gyre as its users would import it. `npm run web` serves it;
// test/browser/webgpu.test.ts calls `complete`.
import { generate, loadDecoder, loadTokenizer, openBackend, openModel, urlFiles } from 'gyre';

const [status, form, prompt, run, answer] = ['status', 'form', 'prompt', 'run', 'answer'].map((id) =>
  document.getElementById(id),
);

/** Opens the GPU and loads the model that lies beside the page. */
async function open() {
  const backend = await openBackend('webgpu', { precision: 'auto' });
  const names = await (await fetch('files.json')).json();
  const files = urlFiles(new URL('model/', location.href).href, names);
  const decoder = await loadDecoder(backend, await openModel(files), {
    onProgress: ({ done, total }) => (status.textContent = `Loading the model: ${Math.round((100 * done) / total)} %`),
  });
  return { backend, decoder, tokenizer: await loadTokenizer(files) };
}

const opened = open();

/** Greedy continuation of token ids; `onToken` gets each as it comes. */
async function complete({ ids, maxTokens }, onToken = () => undefined) {
  const { backend, decoder, tokenizer } = await opened;
  const stopIds = [...new Set([...decoder.config.eosTokenIds, ...tokenizer.eosTokenIds])];
  const generation = generate(decoder, Int32Array.from(ids), { temperature: 0, maxTokens, stopIds });
  const found = [];
  let next = await generation.next();
  for (; !next.done; next = await generation.next()) {
    found.push(next.value.id);
    onToken(next.value.id);
  }
  return { ids: found, summary: next.value, info: backend.info };
}
globalThis.complete = complete;

form.addEventListener('submit', async (event) => {
  event.preventDefault();
  run.disabled = true;
  try {
    const { tokenizer } = await opened;
    const messages = [{ role: 'user', content: prompt.value }];
    const text = tokenizer.applyChatTemplate(messages, { addGenerationPrompt: true });
    const decoding = tokenizer.createStreamDecoder();
    answer.textContent = '';
    const ids = Array.from(tokenizer.encode(text, { addSpecialTokens: false }));
    const { summary } = await complete({ ids, maxTokens: 512 }, (id) => (answer.textContent += decoding.push(id)));
    answer.textContent += decoding.flush();
    status.textContent = `${summary.tokens} tokens, ${summary.decodeTokensPerSecond.toFixed(1)} per second`;
  } catch (error) {
    fail(error);
  } finally {
    run.disabled = false;
  }
});

function fail(error) {
  status.textContent = `${error.message}${error.remedy ? ` (${error.remedy})` : ''}`;
}

opened.then(({ backend }) => {
  status.textContent = `Ready: ${backend.info.description}`;
  run.disabled = false;
}, fail);
