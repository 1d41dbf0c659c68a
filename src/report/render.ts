// Charts: a Vega-Lite specification in, an SVG out that needs no script, has a title and a description, and follows the
// reader's theme.
import { parse, View } from 'vega';
import { compile, type TopLevelSpec } from 'vega-lite';
import { escape, type Html, type Table } from './html.js';
import { CONFIG, PALETTE, recolour } from './theme.js';

/** Room a chart is drawn for. */
export interface Layout {
  /** Pixels in all, about. */
  readonly width: number;
  /** A phone: panels below each other. */
  readonly narrow: boolean;
}

/** Every chart is drawn twice: type keeps its size on a phone. */
export const LAYOUTS = {
  wide: { width: 760, narrow: false },
  narrow: { width: 340, narrow: true },
} as const satisfies Record<string, Layout>;

/** A chart with what belongs to it. */
export interface Figure {
  /** Unique on the page, a file name under --svg. */
  readonly id: string;
  readonly title: string;
  /** What is drawn and how to read it. */
  readonly caption: Html;
  /** What the chart shows, for those who don't see it. */
  readonly alt: string;
  /** Meaning of colours and shapes, where labels in the chart don't say it. */
  readonly key?: readonly KeyItem[];
  readonly spec: (layout: Layout) => TopLevelSpec;
  /** The numbers drawn. */
  readonly table: Table;
}

/** An entry of a chart's key. */
export interface KeyItem {
  readonly label: string;
  readonly color: keyof typeof PALETTE;
  /** A vega symbol, or `line`. */
  readonly shape: string;
}

/** One drawing. */
export interface Drawing {
  /** The element, without theme. */
  readonly svg: string;
  readonly width: number;
  readonly height: number;
}

/** Draws a figure for one layout. */
export async function draw(figure: Figure, layoutName: keyof typeof LAYOUTS): Promise<Drawing> {
  const spec = { ...figure.spec(LAYOUTS[layoutName]), background: undefined, config: CONFIG } as TopLevelSpec;
  const compiled = compile(spec).spec;
  const view = new View(parse(compiled), { renderer: 'none' });
  const raw = await view.toSVG();
  view.finalize();
  const id = `${figure.id}-${layoutName}`;
  const size = /<svg[^>]* width="([\d.]+)" height="([\d.]+)"/.exec(raw);
  const [width, height] = [Math.ceil(Number(size?.[1])), Math.ceil(Number(size?.[2]))];
  const body = raw
    .slice(raw.indexOf('>') + 1)
    // One element with a title says it all; parts would be read out one by one.
    .replaceAll(/ (?:class|role|aria-[a-z]+)="[^"]*"/g, '')
    .replaceAll(/<path d="M0,0h0v0h0Z"[^>]*\/?>(?:<\/path>)?/g, '')
    // Ids are per drawing in vega, per page here.
    .replaceAll(/(id="|url\(#)((?:clip|gradient)[\w-]*)/g, `$1${id}-$2`)
    // In tags, not in what labels say.
    .replaceAll(/<[^>]+>/g, (tag) =>
      tag.replaceAll(/\d+\.\d{3,}/g, (number) => String(Math.round(Number(number) * 100) / 100)),
    );
  const head =
    `<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 ${width} ${height}" width="${width}" height="${height}"` +
    ` role="img" aria-labelledby="${id}-t ${id}-d"><title id="${id}-t">${escape(figure.title)}</title>` +
    `<desc id="${id}-d">${escape(figure.alt)}</desc>`;
  return { svg: head + body, width, height };
}

/** A drawing as a file of its own, with its theme inside and the key below. */
export function standalone(drawing: Drawing, key: readonly KeyItem[] = []): Drawing {
  const rows = layOutKey(key, drawing.width);
  const height = drawing.height + rows.length * KEY_LINE;
  const legend = rows.flatMap((row, r) =>
    row.map(({ item, x }) => {
      const y = drawing.height + r * KEY_LINE + KEY_LINE / 2;
      const fill = PALETTE[item.color].light;
      return (
        `<g transform="translate(${x},${y})">${symbol(item, fill)}<text x="12" y="4" font-family="system-ui, sans-serif"` +
        ` font-size="12px" fill="${PALETTE.ink.light}">${escape(item.label)}</text></g>`
      );
    }),
  );
  const dark = recolour('', (name) => PALETTE[name].dark);
  const style = `<style>@media (prefers-color-scheme:dark){${dark}}</style>`;
  const paper = `<rect width="100%" height="100%" fill="${PALETTE.paper.light}"/>`;
  const svg = `${drawing.svg
    .replace(`viewBox="0 0 ${drawing.width} ${drawing.height}"`, `viewBox="0 0 ${drawing.width} ${height}"`)
    .replace(` height="${drawing.height}"`, ` height="${height}"`)
    .replace('</desc>', `</desc>${style}${paper}`)
    .replace(/<\/svg>\s*$/, `${legend.join('')}</svg>`)}\n`;
  return { svg, width: drawing.width, height };
}

const KEY_LINE = 22;

/** Places of a key's entries, in lines that fit; widths are estimated from the letters. */
function layOutKey(key: readonly KeyItem[], width: number): { item: KeyItem; x: number }[][] {
  const rows: { item: KeyItem; x: number }[][] = [];
  let x = Infinity;
  for (const item of key) {
    const needed = 32 + item.label.length * 7.5;
    if (x + needed > width) {
      rows.push([]);
      x = 14;
    }
    rows[rows.length - 1].push({ item, x });
    x += needed;
  }
  return rows;
}

const SYMBOLS: Readonly<Record<string, string>> = {
  circle: 'M5,0A5,5,0,1,1,-5,0A5,5,0,1,1,5,0Z',
  square: 'M-4.5,-4.5h9v9h-9Z',
  'triangle-up': 'M0,-5.5L5.5,4.5H-5.5Z',
  'triangle-down': 'M0,5.5L5.5,-4.5H-5.5Z',
  'triangle-right': 'M5.5,0L-4.5,5.5V-5.5Z',
  diamond: 'M0,-6L5,0L0,6L-5,0Z',
  cross: 'M-5,-2H-2V-5H2V-2H5V2H2V5H-2V2H-5Z',
  line: 'M-7,-1.25h14v2.5h-14Z',
  block: 'M-6,-5h12v10h-12Z',
};

/** An entry's mark around the origin. */
export function symbol({ shape }: Pick<KeyItem, 'shape'>, fill: string): string {
  return `<path d="${SYMBOLS[shape] ?? SYMBOLS['circle']}" fill="${fill}"/>`;
}
