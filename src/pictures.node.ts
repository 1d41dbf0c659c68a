// Drawings (SVG) to pictures (PNG), by whatever Chromium the machine has: what is drawn there is what people see in a browser.
import { spawn } from 'node:child_process';
import { access, mkdtemp, rm } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import path from 'node:path';
import { pathToFileURL } from 'node:url';
import { GyreError } from './core/errors.js';
import { writeFileAtomic } from './formats/atomic.node.js';

/** Where Chromium and its kin are, first what the user says. */
const BROWSERS = [
  '/usr/bin/chromium',
  '/usr/bin/chromium-browser',
  '/usr/bin/google-chrome',
  '/Applications/Google Chrome.app/Contents/MacOS/Google Chrome',
  'C:\\Program Files\\Google\\Chrome\\Application\\chrome.exe',
];

/** A browser to draw with. @throws GyreError `not-found` when there is none. */
export async function findBrowser(): Promise<string> {
  const chosen = process.env['CHROMIUM_PATH'];
  for (const file of chosen === undefined ? BROWSERS : [chosen]) {
    const there = await access(file).then(
      () => true,
      () => false,
    );
    if (there) return file;
  }
  throw new GyreError(
    'not-found',
    `--png needs Chromium or Chrome, and there is none${chosen === undefined ? '' : ` at ${chosen}`}`,
    {
      remedy: 'install one or set CHROMIUM_PATH; --svg needs nothing',
    },
  );
}

/** A drawing; width and height in its own units. */
export interface Drawing {
  readonly name: string;
  readonly svg: string;
  readonly width: number;
  readonly height: number;
}

/**
 * Every drawing as `folder`/name.png, twice as many pixels as it has units: a headless browser paints the SVGs onto canvases.
 * @returns the files by name. @throws GyreError `backend` when the browser fails.
 */
export async function writePictures(
  browser: string,
  drawings: readonly Drawing[],
  folder: string,
): Promise<Map<string, string>> {
  const scratch = await mkdtemp(path.join(tmpdir(), 'gyre-pictures-'));
  try {
    const file = path.join(scratch, 'drawings.html');
    const base64 = (svg: string): string => Buffer.from(svg).toString('base64');
    const images = drawings.map(
      ({ name, width, height, svg }) =>
        `<img id="${name}" width="${width}" height="${height}" src="data:image/svg+xml;base64,${base64(svg)}">`,
    );
    // The page's text becomes the pictures, which --dump-dom prints.
    await writeFileAtomic(
      file,
      `<!doctype html><meta charset="utf-8">${images.join('')}<script>
addEventListener('load', () => {
  const pictures = [...document.images].map((image) => {
    const canvas = document.createElement('canvas');
    [canvas.width, canvas.height] = [2 * image.width, 2 * image.height];
    canvas.getContext('2d').drawImage(image, 0, 0, canvas.width, canvas.height);
    return image.id + ' ' + canvas.toDataURL('image/png').split(',')[1];
  });
  document.body.textContent = pictures.join('\\n');
});
</script>`,
    );
    const page = await run(browser, [
      '--headless',
      '--no-sandbox',
      '--disable-gpu',
      `--user-data-dir=${path.join(scratch, 'profile')}`,
      '--dump-dom',
      pathToFileURL(file).href,
    ]);
    const files = new Map<string, string>();
    for (const { name } of drawings) {
      const found = new RegExp(`(?:^|[>\\n])${name} ([A-Za-z0-9+/=]+)`).exec(page)?.[1];
      if (found === undefined) throw new GyreError('backend', `${browser} did not draw ${name}`, { remedy: OTHER_WAY });
      const out = path.join(folder, `${name}.png`);
      await writeFileAtomic(out, Buffer.from(found, 'base64'));
      files.set(name, out);
    }
    return files;
  } finally {
    await rm(scratch, { recursive: true, force: true });
  }
}

const OTHER_WAY = 'use --svg, or another browser by CHROMIUM_PATH';

/** Runs a program. @returns what it printed. */
function run(command: string, args: readonly string[]): Promise<string> {
  return new Promise((resolve, reject) => {
    const child = spawn(command, args, { stdio: ['ignore', 'pipe', 'ignore'], timeout: 120_000 });
    const chunks: Buffer[] = [];
    child.stdout.on('data', (chunk: Buffer) => chunks.push(chunk));
    const failed = (why: string, cause?: unknown): void =>
      reject(new GyreError('backend', `${command} could not draw the charts: ${why}`, { remedy: OTHER_WAY, cause }));
    child.on('error', (error) => failed(error.message, error));
    child.on('close', (code) =>
      code === 0 ? resolve(Buffer.concat(chunks).toString()) : failed(`it ended with ${code}`),
    );
  });
}
