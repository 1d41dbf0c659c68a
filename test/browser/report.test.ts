// A report in Chromium: at the widths of a phone, a tablet and a desk, light, dark and on paper, it fits, follows the theme,
// can be read by everyone, and asks the network for nothing.
import { existsSync } from 'node:fs';
import { mkdir, mkdtemp, readFile, rm } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import path from 'node:path';
import { pathToFileURL } from 'node:url';
import { chromium, type BrowserContext, type Page } from 'playwright-core';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { writeDemoReport } from '../support/report.js';
import { PALETTE } from '../../src/report/theme.js';

const executable = process.env['CHROMIUM_PATH'] ?? '/usr/bin/chromium';
const missing = !existsSync(executable);
const reason = `no Chromium at ${executable} (install it, or set CHROMIUM_PATH)`;
const inCi = process.env['CI'] === 'true';
/** Where to keep the pictures that the test takes, to look at them. */
const pictures = process.env['REPORT_PICTURES'];

describe.runIf(missing && inCi)('a browser', () => {
  it('is there, because this is CI', () => expect.fail(reason));
});

describe.skipIf(missing)(missing ? `a report in a browser: skipped, ${reason}` : 'a report in a browser', () => {
  let folder: string;
  let browser: BrowserContext;
  let address: string;

  beforeAll(async () => {
    folder = await mkdtemp(path.join(tmpdir(), 'gyre-report-'));
    const out = await writeDemoReport(folder);
    address = pathToFileURL(out).href;
    browser = await chromium.launchPersistentContext(path.join(folder, 'profile'), {
      executablePath: executable,
      headless: true,
      args: ['--no-sandbox', '--disable-gpu', '--no-first-run', '--disable-background-networking', '--disable-sync'],
    });
    if (pictures !== undefined) await mkdir(pictures, { recursive: true });
  });
  afterAll(async () => {
    await browser?.close();
    await rm(folder, { recursive: true, force: true });
  });

  /** Opens the report; what it asks for beside itself and what it complains of must come to nothing. */
  async function open<T>(
    view: { width: number; scheme: 'light' | 'dark'; media?: 'print' },
    use: (page: Page) => Promise<T>,
  ): Promise<T> {
    const page = await browser.newPage();
    const asked: string[] = [];
    const complaints: string[] = [];
    page.on('request', (request) => asked.push(request.url()));
    page.on('console', (message) => complaints.push(message.text()));
    page.on('pageerror', (error) => complaints.push(String(error)));
    try {
      await page.setViewportSize({ width: view.width, height: 900 });
      await page.emulateMedia({ colorScheme: view.scheme, media: view.media ?? 'screen' });
      await page.goto(address);
      if (pictures !== undefined) {
        const name = `${view.width}-${view.scheme}${view.media ? '-print' : ''}.png`;
        await page.screenshot({ path: path.join(pictures, name), fullPage: true });
      }
      const result = await use(page);
      expect(asked.filter((url) => url !== address && !url.startsWith('data:'))).toEqual([]);
      expect(complaints).toEqual([]);
      return result;
    } finally {
      await page.close();
    }
  }

  /** What a view looks like, from the page itself. */
  function look(page: Page) {
    return page.evaluate(() => {
      const shown = (element: Element): boolean => {
        const { width, height } = element.getBoundingClientRect();
        return width > 0 && height > 0;
      };
      const charts = Array.from(document.querySelectorAll('figure .chart')).filter(shown);
      const color = (element: Element, property: string): string =>
        getComputedStyle(element).getPropertyValue(property);
      const label = charts[0].querySelector('text');
      return {
        overflow: document.documentElement.scrollWidth - document.documentElement.clientWidth,
        figures: document.querySelectorAll('figure').length,
        charts: charts.map((chart) => ({
          narrow: chart.classList.contains('narrow'),
          inside: chart.querySelector('svg')!.getBoundingClientRect().right <= innerWidth,
          // Letters as they come out on the screen, in pixels.
          letters: Math.min(
            ...Array.from(chart.querySelectorAll('text')).map(
              (text) => parseFloat(color(text, 'font-size')) * (text.ownerSVGElement!.getScreenCTM()?.a ?? 0),
            ),
          ),
        })),
        background: color(document.body, 'background-color'),
        ink: color(document.body, 'color'),
        label: label ? color(label, 'fill') : '',
      };
    });
  }

  const rgb = (hex: string): string => `rgb(${[1, 3, 5].map((i) => parseInt(hex.slice(i, i + 2), 16)).join(', ')})`;

  it.each([
    [360, 'light'],
    [360, 'dark'],
    [800, 'light'],
    [800, 'dark'],
    [1280, 'light'],
    [1280, 'dark'],
  ] as const)('fits %i pixels, %s', async (width, scheme) => {
    const seen = await open({ width, scheme }, look);
    expect(seen.overflow).toBeLessThanOrEqual(0);
    expect(seen.figures).toBeGreaterThanOrEqual(5);
    expect(seen.charts).toHaveLength(seen.figures);
    for (const chart of seen.charts) {
      expect(chart.narrow).toBe(width < 768);
      expect(chart.inside).toBe(true);
      expect(chart.letters).toBeGreaterThanOrEqual(10);
    }
    expect(seen.background).toBe(rgb(PALETTE.paper[scheme]));
    expect(seen.ink).toBe(rgb(PALETTE.ink[scheme]));
    expect([rgb(PALETTE.muted[scheme]), rgb(PALETTE.ink[scheme])]).toContain(seen.label);
  });

  it('prints light, with the wide charts, also where the screen is dark', async () => {
    const seen = await open({ width: 700, scheme: 'dark', media: 'print' }, look);
    expect(seen.background).toBe(rgb(PALETTE.paper.light));
    expect(seen.charts.every(({ narrow }) => !narrow)).toBe(true);
    expect(seen.overflow).toBeLessThanOrEqual(0);
  });

  it('is read out in order: headings, charts with descriptions, tables with headers', async () => {
    await open({ width: 1280, scheme: 'light' }, async (page) => {
      const outline = await page.evaluate(() =>
        Array.from(document.querySelectorAll('h1, h2, h3')).map((heading) => Number(heading.tagName[1])),
      );
      expect(outline.filter((level) => level === 1)).toHaveLength(1);
      for (const [i, level] of outline.entries()) if (i > 0) expect(level - outline[i - 1]).toBeLessThanOrEqual(1);
      const images = await page.getByRole('img').count();
      expect(images).toBe(await page.locator('figure').count());
      const unnamed = await page.evaluate(
        () => Array.from(document.querySelectorAll('th')).filter((cell) => !cell.hasAttribute('scope')).length,
      );
      expect(unnamed).toBe(0);
      expect(await page.locator('html').getAttribute('lang')).toBe('en');
    });
  });

  it('keeps text and lines apart from the page in both themes', () => {
    const luminance = (hex: string): number => {
      const [r, g, b] = [1, 3, 5].map((i) => {
        const c = parseInt(hex.slice(i, i + 2), 16) / 255;
        return c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4;
      });
      return 0.2126 * r + 0.7152 * g + 0.0722 * b;
    };
    const contrast = (a: string, b: string): number => {
      const [x, y] = [luminance(a), luminance(b)].sort((p, q) => q - p);
      return (x + 0.05) / (y + 0.05);
    };
    for (const theme of ['light', 'dark'] as const) {
      const paper = PALETTE.paper[theme];
      // WCAG 2.2: 4.5 for text, 3 for what must be seen in a chart.
      for (const name of ['ink', 'muted', 'blue'] as const)
        expect(contrast(PALETTE[name][theme], paper), `${name}, ${theme}`).toBeGreaterThanOrEqual(4.5);
      for (const name of ['orange', 'green', 'purple', 'gold', 'red', 'gray'] as const)
        expect(contrast(PALETTE[name][theme], paper), `${name}, ${theme}`).toBeGreaterThanOrEqual(3);
    }
  });

  it('has charts that stand alone', async () => {
    const svg = await readFile(path.join(folder, 'charts', 'size-quality.svg'), 'utf8');
    const page = await browser.newPage();
    await page.emulateMedia({ colorScheme: 'dark' });
    await page.goto(pathToFileURL(path.join(folder, 'charts', 'size-quality.svg')).href);
    const paper = await page.evaluate(() => getComputedStyle(document.querySelector('rect')!).fill);
    expect(paper).toBe(rgb(PALETTE.paper.dark));
    expect(svg).toContain('<desc');
    await page.close();
  });
});
