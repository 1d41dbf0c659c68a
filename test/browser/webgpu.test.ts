// The WebGPU backend in a page: web/ bundled by vite, loading the bundled model in 4 bits over HTTP in headless Chromium
// on SwiftShader. The tokens must be those that Node.js generates from the same files.
import { existsSync } from 'node:fs';
import { mkdtemp, rm } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import path from 'node:path';
import { pathToFileURL } from 'node:url';
import { chromium, type BrowserContext } from 'playwright-core';
import { build, createLogger, preview } from 'vite';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { folderFiles } from '../../src/formats/source.node.js';
import { collect, generate } from '../../src/generate/index.js';
import { loadDecoder, openModel } from '../../src/models/load.js';
import type { BackendInfo } from '../../src/ops/backend.js';
import type { QuantizeOptions } from '../../src/quantize.node.js';
import { loadTokenizer } from '../../src/tokenizer/index.js';
import { openTestWebGpu, webgpuMissing } from '../support/webgpu.js';

const ROOT = path.join(import.meta.dirname, '../..');
const executable = process.env['CHROMIUM_PATH'] ?? '/usr/bin/chromium';
const inCi = process.env['CI'] === 'true';
const reason = existsSync(executable)
  ? webgpuMissing
  : `no Chromium at ${executable} (install it, or set CHROMIUM_PATH)`;
/** In CI a missing browser fails. */
const missing = inCi ? undefined : reason;
const TOKENS = 8;
/** Milliseconds: quantizing and a software GPU, on a machine that may be busy with other tests. */
const PATIENCE = 400_000;

/** What `complete` of the page returns. */
interface Completion {
  readonly ids: readonly number[];
  readonly info: BackendInfo;
}

describe.skipIf(missing)(`WebGPU in a browser${missing ? `: skipped, ${missing}` : ''}`, () => {
  let folder: string;
  let browser: BrowserContext | undefined;
  const warnings: string[] = [];

  beforeAll(async () => {
    folder = await mkdtemp(path.join(tmpdir(), 'gyre-web-'));
    const { prepareModel } = (await import(pathToFileURL(path.join(ROOT, 'web/prepare.mjs')).href)) as {
      prepareModel: (folder: string, options: Partial<QuantizeOptions>) => Promise<void>;
    };
    const prose = path.join(ROOT, 'models/gyre-14m/eval/prose/01-fiction-nineteenth-century.txt');
    // Little calibration and few steps: real rotations and codes, in seconds.
    await prepareModel(path.join(folder, 'public'), {
      calib: [prose],
      calibSamples: 2,
      seqLen: 64,
      steps: 1,
      rounding: 'rtn',
    });
    const customLogger = createLogger('silent');
    customLogger.warn = customLogger.warnOnce = (message) => warnings.push(message);
    await build({
      configFile: false,
      root: path.join(ROOT, 'web'),
      publicDir: path.join(folder, 'public'),
      customLogger,
      build: { outDir: path.join(folder, 'site'), target: 'es2022', minify: false },
    });
    browser = await chromium.launchPersistentContext(path.join(folder, 'profile'), {
      executablePath: executable,
      headless: true,
      args: [
        '--no-sandbox',
        '--enable-unsafe-webgpu',
        '--use-webgpu-adapter=swiftshader',
        '--enable-features=Vulkan',
        '--use-vulkan=swiftshader',
        // As in Node.js; see DAWN_TOGGLES.
        '--enable-dawn-features=disable_workgroup_init',
        '--disable-quic',
        '--no-first-run',
        '--disable-background-networking',
        '--disable-component-update',
        '--disable-sync',
      ],
    });
  }, PATIENCE);
  afterAll(async () => {
    await browser?.close();
    await rm(folder, { recursive: true, force: true });
  });

  it('needs nothing of Node.js', () => {
    expect(warnings.filter((warning) => warning.includes('externalized for browser'))).toEqual([]);
  });

  it(
    'generates the tokens that Node.js generates',
    async () => {
      const backend = await openTestWebGpu();
      const files = await folderFiles(path.join(folder, 'public', 'model'));
      const source = await openModel(files);
      const decoder = await loadDecoder(backend, source);
      const tokenizer = await loadTokenizer(files);
      const prompt = tokenizer.encode(
        tokenizer.applyChatTemplate([{ role: 'user', content: 'Compute 413 + 436.' }], { addGenerationPrompt: true }),
        { addSpecialTokens: false },
      );
      const stopIds = [...new Set([...decoder.config.eosTokenIds, ...tokenizer.eosTokenIds])];
      const expected = await collect(generate(decoder, prompt, { temperature: 0, maxTokens: TOKENS, stopIds }));
      await source.checkpoint.close();
      await backend.dispose();

      const server = await preview({
        configFile: false,
        root: path.join(ROOT, 'web'),
        logLevel: 'error',
        build: { outDir: path.join(folder, 'site') },
        preview: { host: '127.0.0.1', port: 0 },
      });
      const page = await browser?.newPage();
      page?.setDefaultTimeout(PATIENCE);
      if (!page) throw new Error('the browser did not start');
      const errors: string[] = [];
      page.on('pageerror', (error) => errors.push(String(error)));
      try {
        await page.goto(server.resolvedUrls?.local[0] ?? '');
        await page
          .waitForFunction(() => 'complete' in globalThis, undefined, { timeout: PATIENCE })
          .catch((cause: unknown) => {
            throw new Error(`the page did not start: ${errors.join('; ')}`, { cause });
          });
        const found = await page.evaluate(
          (request) => (globalThis as unknown as { complete(r: object): Promise<Completion> }).complete(request),
          { ids: [...prompt], maxTokens: TOKENS },
        );
        expect(found.info.name).toBe('webgpu');
        expect(found.ids.length).toBeGreaterThan(1);
        expect(found.ids).toEqual([...expected.ids]);
      } finally {
        await page.close();
        await server.close();
      }
    },
    PATIENCE,
  );
});
