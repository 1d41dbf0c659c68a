// The CPU backend in a page: gyre bundled by vite from its package exports, run by headless Chromium on a fixture fetched
// over HTTP, with threads (a cross-origin-isolated page) and without.
import { existsSync } from 'node:fs';
import { mkdtemp, rm } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import path from 'node:path';
import { chromium, type BrowserContext } from 'playwright-core';
import { build, createLogger, preview, type PreviewServer } from 'vite';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { createRng } from '../../src/core/rng.js';
import { floats } from '../../src/core/tensor.js';
import { SafetensorsFile } from '../../src/formats/safetensors.js';
import { openFile } from '../../src/formats/source.node.js';
import type { BackendInfo } from '../../src/ops/backend.js';

const PAGE = path.join(import.meta.dirname, 'page');
const FIXTURE = path.join(import.meta.dirname, '../fixtures/parity/qwen3');
/** What the project promises for f32, as in test/integration/parity.test.ts. */
const TOLERANCE = 2e-4;
/** What makes a page cross-origin isolated, so that it has SharedArrayBuffer. */
const ISOLATION = { 'Cross-Origin-Opener-Policy': 'same-origin', 'Cross-Origin-Embedder-Policy': 'require-corp' };

const executable = process.env['CHROMIUM_PATH'] ?? '/usr/bin/chromium';
const missing = !existsSync(executable);
const reason = `no Chromium at ${executable} (install it, or set CHROMIUM_PATH)`;
const inCi = process.env['CI'] === 'true';

/** What `run` of the page returns. */
interface PageResult {
  readonly isolated: boolean;
  readonly info: BackendInfo;
  /** [batch, tokens, vocab]. */
  readonly prefill: readonly number[];
  /** Per token, [batch, vocab]. */
  readonly steps: readonly (readonly number[])[];
}

describe.runIf(missing && inCi)('a browser', () => {
  it('is there, because this is CI', () => expect.fail(reason));
});

describe.skipIf(missing)(
  missing ? `the CPU backend in a browser: skipped, ${reason}` : 'the CPU backend in a browser',
  () => {
    let folder: string;
    let browser: BrowserContext;
    const warnings: string[] = [];
    let expected: { ids: number[]; batch: number; tokens: number; vocab: number; logits: Float32Array };

    beforeAll(async () => {
      folder = await mkdtemp(path.join(tmpdir(), 'gyre-browser-'));
      const customLogger = createLogger('silent');
      customLogger.warn = customLogger.warnOnce = (message) => warnings.push(message);
      await build({
        configFile: false,
        root: PAGE,
        publicDir: FIXTURE,
        customLogger,
        build: { outDir: path.join(folder, 'site'), target: 'es2022', minify: false },
      });
      browser = await chromium.launchPersistentContext(path.join(folder, 'profile'), {
        executablePath: executable,
        headless: true,
        args: [
          '--no-sandbox',
          '--disable-gpu',
          '--disable-quic',
          '--no-first-run',
          '--disable-background-networking',
          '--disable-component-update',
          '--disable-sync',
        ],
      });
      const file = await SafetensorsFile.open(await openFile(path.join(FIXTURE, 'expected.safetensors')));
      const [ids, logits] = [await file.read('input_ids'), await file.read('logits')];
      await file.close();
      const [batch, tokens, vocab] = logits.shape;
      expected = { ids: Array.from(ids.data as BigInt64Array, Number), batch, tokens, vocab, logits: floats(logits) };
    });
    afterAll(async () => {
      await browser?.close();
      await rm(folder, { recursive: true, force: true });
    });

    /** Serves the bundle with these headers and calls one of the page's functions in a fresh page. */
    async function callPage<T>(headers: Record<string, string>, name: 'run' | 'solve', request: object): Promise<T> {
      const server: PreviewServer = await preview({
        configFile: false,
        root: PAGE,
        logLevel: 'error',
        build: { outDir: path.join(folder, 'site') },
        preview: { host: '127.0.0.1', port: 0, headers },
      });
      const page = await browser.newPage();
      const errors: string[] = [];
      page.on('pageerror', (error) => errors.push(String(error)));
      try {
        await page.goto(server.resolvedUrls?.local[0] ?? '');
        await page
          .waitForFunction(() => 'run' in globalThis, undefined, { timeout: 30_000 })
          .catch((cause: unknown) => {
            throw new Error(`the page did not start: ${errors.join('; ')}`, { cause });
          });
        return await page.evaluate(
          (call) => (globalThis as unknown as Record<string, (r: object) => Promise<T>>)[call.name](call.request),
          { name, request },
        );
      } finally {
        await page.close();
        await server.close();
      }
    }

    function runPage(headers: Record<string, string>): Promise<PageResult> {
      const { ids, batch } = expected;
      return callPage(headers, 'run', { model: '.', files: ['config.json', 'model.safetensors'], ids, batch });
    }

    /** Largest differences from the expected logits. */
    function worst({ prefill, steps }: PageResult): { prefill: number; steps: number } {
      const { batch, tokens, vocab, logits } = expected;
      expect(prefill.length).toBe(logits.length);
      expect(steps.map((s) => s.length)).toEqual(new Array<number>(tokens).fill(batch * vocab));
      const difference = (a: number, b: number): number => (Number.isFinite(a) ? Math.abs(a - b) : Infinity);
      const out = { prefill: 0, steps: 0 };
      for (const [i, value] of prefill.entries()) out.prefill = Math.max(out.prefill, difference(value, logits[i]));
      for (const [t, step] of steps.entries()) {
        for (const [i, value] of step.entries()) {
          const at = (Math.floor(i / vocab) * tokens + t) * vocab + (i % vocab);
          out.steps = Math.max(out.steps, difference(value, logits[at]));
        }
      }
      return out;
    }

    it('needs nothing of Node.js', () => {
      expect(warnings.filter((warning) => warning.includes('externalized for browser'))).toEqual([]);
    });

    it('matches Transformers in several threads on an isolated page', async () => {
      const result = await runPage(ISOLATION);
      expect(result.isolated).toBe(true);
      expect(result.info.threads).toBeGreaterThan(1);
      expect(result.info.description).toContain('onnxruntime-web');
      const { prefill, steps } = worst(result);
      expect(prefill, 'prefill').toBeLessThan(TOLERANCE);
      expect(steps, 'token by token').toBeLessThan(TOLERANCE);
    });

    it('matches Transformers in one thread where there is no SharedArrayBuffer', async () => {
      const result = await runPage({});
      expect(result.isolated).toBe(false);
      expect(result.info.threads).toBe(1);
      const { prefill, steps } = worst(result);
      expect(prefill, 'prefill').toBeLessThan(TOLERANCE);
      expect(steps, 'token by token').toBeLessThan(TOLERANCE);
    });

    it('solves what quantizing solves, in f64', async () => {
      const [m, n, damp] = [3, 300, 0.01];
      const rng = createRng(1);
      const normals = (count: number): number[] => Array.from({ length: count }, () => Math.fround(rng.normal()));
      // H = I + vvᵀ/n: (H + λI)⁻¹ has a closed form (Sherman and Morrison).
      const v = normals(n);
      const h = Array.from({ length: n * n }, (_, i) => {
        const [r, c] = [Math.floor(i / n), i % n];
        return Math.fround((v[r] * v[c]) / n + (r === c ? 1 : 0));
      });
      const b = normals(m * n);
      const d = 1 + damp * (v.reduce((sum, x) => sum + (x * x) / n, n) / n);
      const squares = v.reduce((sum, x) => sum + x * x, 0);
      const x = await callPage<number[]>(ISOLATION, 'solve', { h, b, m, n, damp });
      for (let r = 0; r < m; r++) {
        const along = v.reduce((sum, value, c) => sum + value * b[r * n + c], 0);
        for (let c = 0; c < n; c++) {
          const exact = b[r * n + c] / d - (v[c] * along) / n / (d * d * (1 + squares / n / d));
          // H, B and X are stored in f32: √n · 2^-24 · norms of order 3, with a margin of three.
          expect(Math.abs(x[r * n + c] - exact)).toBeLessThan(1e-5);
        }
      }
    });
  },
);
