// Asks the bundled model a question and prints its answer as it comes. Run: node examples/generate.mjs ["question"]
import { fileURLToPath } from 'node:url';
import { generate, loadDecoder, loadTokenizer, openBackend, openModel, resolveModel } from 'gyre/node';

const question = process.argv[2] ?? 'Put 24, 14, 36 in order, largest first.';
const { files } = await resolveModel(fileURLToPath(new URL('../models/gyre-14m', import.meta.url)));

const backend = await openBackend('cpu');
const source = await openModel(files);
const decoder = await loadDecoder(backend, source);
const tokenizer = await loadTokenizer(files);

const prompt = tokenizer.applyChatTemplate([{ role: 'user', content: question }], { addGenerationPrompt: true });
const ids = tokenizer.encode(prompt, { addSpecialTokens: false });
const text = tokenizer.createStreamDecoder();

console.log(question);
// Greedy by default; { temperature, topP, topK, seed } sample.
for await (const { id } of generate(decoder, ids, { maxTokens: 200, stopIds: tokenizer.eosTokenIds })) {
  process.stdout.write(text.push(id));
}
console.log(text.flush());

await source.checkpoint.close();
await backend.dispose();
