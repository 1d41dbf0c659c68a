// npm run web: quantizes the bundled model to out/web (once, about two minutes on two cores) and serves the page.
import path from 'node:path';
import { fileURLToPath } from 'node:url';
import { createServer } from 'vite';
import { prepareModel } from './prepare.mjs';

const root = fileURLToPath(new URL('.', import.meta.url));
const publicDir = path.join(root, '..', 'out', 'web');
let shown = '';
console.log('Quantizing the bundled model to 4 bits …');
await prepareModel(publicDir, {
  onProgress: ({ stage }) => {
    if (stage !== shown) console.log(`  ${(shown = stage)}`);
  },
});
const server = await createServer({ configFile: false, root, publicDir });
await server.listen();
console.log('Open this in a browser with WebGPU:');
server.printUrls();
