// What the page needs beside its own files: the bundled model in 4 bits, and the list of its files.
import { readdir, writeFile } from 'node:fs/promises';
import path from 'node:path';
import { fileURLToPath } from 'node:url';
import { quantizeCheckpoint } from 'gyre/node';

/** The model that comes with gyre. */
export const BUNDLED = fileURLToPath(new URL('../models/gyre-14m', import.meta.url));

/**
 * Quantizes the bundled model into FOLDER/model, unless it is there already, and lists it in FOLDER/files.json. The page
 * is served with FOLDER as Vite's publicDir.
 * @param {string} folder
 * @param {Partial<import('gyre/node').QuantizeOptions>} [options] of quantizeCheckpoint
 */
export async function prepareModel(folder, options = {}) {
  const out = path.join(folder, 'model');
  await quantizeCheckpoint({ model: BUNDLED, out, bits: 4, resume: true, ...options });
  const names = (await readdir(out)).filter((name) => /\.(json|safetensors)$/.test(name));
  await writeFile(path.join(folder, 'files.json'), `${JSON.stringify(names)}\n`);
}
