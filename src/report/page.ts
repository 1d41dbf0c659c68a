// The page around the sections: one HTML file with its styles and drawings inside, no script, nothing fetched.
import { escape, Html, html, renderTable } from './html.js';
import { draw, symbol, type Drawing, type Figure, type KeyItem } from './render.js';
import type { Part, Section } from './sections/section.js';
import { PALETTE, recolour, type ColorName } from './theme.js';

/** What the page says before its sections. */
export interface Opening {
  readonly title: string;
  /** The answer, in a sentence or two. */
  readonly lead: Html;
  /** Numbers to see first. */
  readonly tiles: readonly { readonly value: string; readonly label: string; readonly note: string }[];
  /** Who made it of what, for the foot. */
  readonly foot: Html;
}

/** Drawings of one figure. */
export interface DrawnFigure {
  readonly figure: Figure;
  readonly wide: Drawing;
  readonly narrow: Drawing;
}

/** Draws every figure of the sections, in both layouts. */
export async function drawFigures(sections: readonly Section[]): Promise<Map<string, DrawnFigure>> {
  const drawn = new Map<string, DrawnFigure>();
  for (const part of sections.flatMap((section) => section.parts)) {
    if (part.kind !== 'figure') continue;
    const { figure } = part;
    drawn.set(figure.id, { figure, wide: await draw(figure, 'wide'), narrow: await draw(figure, 'narrow') });
  }
  return drawn;
}

/** The whole page. */
export function renderPage(opening: Opening, sections: readonly Section[], drawn: Map<string, DrawnFigure>): string {
  let number = 0;
  const part = (p: Part): Html => {
    switch (p.kind) {
      case 'text':
        return p.html;
      case 'table':
        return renderTable(p.table);
      case 'figure': {
        const found = drawn.get(p.figure.id);
        return found ? figure(found, ++number) : new Html('');
      }
    }
  };
  const contents = sections.map(({ id, title }) => html`<li><a href="#${id}">${title}</a></li>`);
  const body = sections.map(
    ({ id, title, parts }) =>
      html`<section id="${id}">
        <h2>${title}</h2>
        ${parts.map(part)}
      </section>`,
  );
  const tiles = opening.tiles.map(
    ({ value, label, note }) =>
      html`<div>
        <dt>${label}</dt>
        <dd><b>${value}</b><span>${note}</span></dd>
      </div>`,
  );
  return `<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<title>${escape(opening.title)}</title>
<link rel="icon" href="data:,">
<style>${STYLES}</style>
</head>
<body>
${
  html`<a class="skip" href="#main">Skip to the report</a>
    <header>
      <p class="kicker">Quantization report</p>
      <h1>${opening.title}</h1>
      <p class="lead">${opening.lead}</p>
      <dl class="tiles">${tiles}</dl>
    </header>
    <nav aria-label="Contents">
      <ul>
        ${contents}
      </ul>
    </nav>
    <main id="main">${body}</main>
    <footer>${opening.foot}</footer>`.markup
}
</body>
</html>
`;
}

function figure({ figure: { id, title, caption, key, table }, wide, narrow }: DrawnFigure, number: number): Html {
  const legend =
    key && key.length > 0
      ? html`<ul class="key">
          ${key.map(keyItem)}
        </ul>`
      : new Html('');
  return html`<figure id="${id}">
    <h3>${title}</h3>
    ${legend}
    <div class="chart wide">${new Html(wide.svg)}</div>
    <div class="chart narrow">${new Html(narrow.svg)}</div>
    <figcaption><b>Figure ${number}.</b> ${caption}</figcaption>
    <details>
      <summary>The numbers of figure ${number}</summary>
      ${renderTable(table)}
    </details>
  </figure>`;
}

function keyItem(item: KeyItem): Html {
  const mark = `<svg viewBox="-8 -8 16 16" width="16" height="16" aria-hidden="true">${symbol(item, PALETTE[item.color].light)}</svg>`;
  return html`<li>${new Html(mark)}${item.label}</li>`;
}

const variables = (theme: 'light' | 'dark'): string =>
  Object.entries(PALETTE)
    .map(([name, value]) => `--${name}:${value[theme]}`)
    .join(';');

/** Below this width the narrow drawings are shown. */
const NARROW = '47.99rem';

const STYLES = `
:root{${variables('light')};--soft:#f4f6f8;color-scheme:light}
@media screen and (prefers-color-scheme:dark){:root{${variables('dark')};--soft:#1c2127;color-scheme:dark}}
${recolour('svg ', (name: ColorName) => `var(--${name})`)}
*{box-sizing:border-box}
html{-webkit-text-size-adjust:100%;scroll-behavior:smooth}
body{margin:0 auto;padding:0 1.25rem 4rem;max-width:52rem;background:var(--paper);color:var(--ink);
 font:1rem/1.6 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",sans-serif;overflow-wrap:break-word}
.skip{position:absolute;left:-100vw}.skip:focus{left:1rem;top:1rem;background:var(--paper);padding:.5rem}
a{color:var(--blue);text-underline-offset:.15em}
:focus-visible{outline:2px solid var(--blue);outline-offset:2px}
header{padding-top:3rem}
.kicker{margin:0;font-size:.8125rem;letter-spacing:.08em;text-transform:uppercase;color:var(--muted)}
h1{margin:.25rem 0 1rem;font-size:clamp(1.6rem,1.2rem + 2vw,2.3rem);line-height:1.18;letter-spacing:-.015em;text-wrap:balance}
h2{margin:3.5rem 0 .75rem;padding-top:.9rem;border-top:1px solid var(--faint);font-size:1.4rem;line-height:1.25;letter-spacing:-.01em}
h3{margin:0 0 .5rem;font-size:1rem;line-height:1.35}
p{margin:.75rem 0;max-width:44rem}
.lead{font-size:1.125rem;line-height:1.55}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(10.5rem,1fr));gap:1px;margin:1.75rem 0 0;background:var(--faint);
 border:1px solid var(--faint);border-radius:.5rem;overflow:hidden}
.tiles div{display:flex;flex-direction:column;padding:.85rem 1rem;background:var(--paper)}
.tiles dt{font-size:.8125rem;color:var(--muted)}
.tiles dd{margin:0}.tiles b{display:block;font-size:1.55rem;line-height:1.3;font-weight:650;letter-spacing:-.01em;font-variant-numeric:tabular-nums}
.tiles span{display:block;font-size:.8125rem;line-height:1.4;color:var(--muted)}
nav{margin-top:1.5rem;font-size:.9375rem}
nav ul{display:flex;flex-wrap:wrap;gap:.25rem 1.1rem;margin:0;padding:0;list-style:none}
figure{margin:2.25rem 0;break-inside:avoid}
.chart svg{display:block;max-width:100%;height:auto}
.chart.narrow{display:none}
.key{display:flex;flex-wrap:wrap;gap:.1rem 1.1rem;margin:0 0 .6rem;padding:0;list-style:none;font-size:.875rem}
.key li{display:flex;align-items:center;gap:.35rem}
.key svg{flex:none}
figcaption{margin-top:.6rem;max-width:44rem;font-size:.875rem;line-height:1.5;color:var(--muted)}
figcaption b{color:var(--ink)}
details{margin-top:.4rem;font-size:.875rem}
summary{width:fit-content;padding:.2rem 0;color:var(--blue);cursor:pointer}
.table{margin:1.5rem 0;overflow-x:auto}
details .table{margin:.5rem 0;max-height:26rem;overflow:auto}
table{border-collapse:collapse;min-width:100%;font-size:.875rem;line-height:1.4}
caption{padding-bottom:.5rem;text-align:left;color:var(--muted)}
caption span{display:block;position:sticky;left:0;max-width:min(44rem,100vw - 2rem)}
th,td{padding:.4rem .75rem;text-align:left;vertical-align:baseline;font-weight:400}
th:first-child{padding-left:0}th:last-child,td:last-child{padding-right:0}
thead th{border-bottom:1.5px solid var(--ink);font-weight:600;vertical-align:bottom}
tbody tr{border-bottom:1px solid var(--faint)}
.n{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap}
thead .n{white-space:normal}
.strong th,.strong td{font-weight:650}
dl.facts{display:grid;grid-template-columns:max-content 1fr;gap:.35rem 1.25rem;font-size:.875rem;line-height:1.5}
dl.facts dt{color:var(--muted)}dl.facts dd{margin:0;min-width:0;overflow-wrap:anywhere}
code{font:.875em ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;overflow-wrap:anywhere}
footer{margin-top:4rem;padding-top:1rem;border-top:1px solid var(--faint);font-size:.8125rem;color:var(--muted)}
@media (max-width:${NARROW}){
 body{padding:0 1rem 3rem}header{padding-top:1.75rem}
 .chart.wide{display:none}.chart.narrow{display:block}
 .tiles{grid-template-columns:1fr 1fr}.tiles div{padding:.7rem .8rem}.tiles b{font-size:1.3rem}
 dl.facts{grid-template-columns:1fr;gap:0}dl.facts dd{margin-bottom:.6rem}
}
@media print{
 @page{margin:16mm 14mm}
 body{max-width:none;padding:0;font-size:10pt}
 nav,.skip,summary{display:none}
 header{padding-top:0}h2{margin-top:1.75rem;break-after:avoid}
 .chart.wide{display:block!important}.chart.narrow{display:none!important}
 .table,details .table{overflow:visible;max-height:none}
 table{font-size:8pt}th,td{padding:.2rem .4rem}.n{white-space:normal}
 tr{break-inside:avoid}
 a{color:inherit;text-decoration:none}
}`.replaceAll(/\n\s*/g, '\n');
