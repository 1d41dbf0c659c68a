// Colours and type of the charts, light and dark. Charts are drawn in the light colours; a style sheet recolours them by
// attribute, so that one drawing follows the reader's theme and still looks right where style sheets are not understood.
import type { Config } from 'vega-lite';

/** Name → light and dark. Hues are Okabe and Ito's, darkened or lightened to 3:1 and more against the page. */
export const PALETTE = {
  ink: { light: '#1b1f24', dark: '#e6e9ed' },
  muted: { light: '#59626d', dark: '#a2abb6' },
  faint: { light: '#dfe3e8', dark: '#30373f' },
  paper: { light: '#fefefe', dark: '#14181c' },
  gray: { light: '#78818c', dark: '#8f99a5' },
  pale: { light: '#c3c9d1', dark: '#4d5661' },
  orange: { light: '#c64a06', dark: '#ff9350' },
  blue: { light: '#0a6ab0', dark: '#58b2f0' },
  green: { light: '#007f5c', dark: '#35c496' },
  purple: { light: '#9c4183', dark: '#e38fc6' },
  gold: { light: '#8f6a00', dark: '#dcb03a' },
  red: { light: '#b3252f', dark: '#ff8288' },
  depth1: { light: '#9cc3e0', dark: '#2b4c66' },
  depth2: { light: '#6aa5d0', dark: '#3a6d93' },
  depth3: { light: '#3d86be', dark: '#4a8dbd' },
  depth4: { light: '#1c66a0', dark: '#6fb2e0' },
  depth5: { light: '#0b4575', dark: '#aad8f8' },
} as const;
export type ColorName = keyof typeof PALETTE;

/** The light value of a colour, as charts name it. */
export function color(name: ColorName): string {
  return PALETTE[name].light;
}

/** Colours and shapes of models, in the order they are given out. Shapes tell them apart without colour. */
export const SERIES = [
  { color: 'orange', shape: 'circle' },
  { color: 'blue', shape: 'square' },
  { color: 'green', shape: 'triangle-up' },
  { color: 'purple', shape: 'diamond' },
  { color: 'gold', shape: 'triangle-down' },
  { color: 'red', shape: 'cross' },
  { color: 'gray', shape: 'triangle-right' },
] as const satisfies readonly { color: ColorName; shape: string }[];

/** Layers from first to last in five steps. */
export const DEPTHS = ['depth1', 'depth2', 'depth3', 'depth4', 'depth5'] as const satisfies readonly ColorName[];

/** Rules that recolour charts, each inside `scope`, with the colour that `value` gives for a name. */
export function recolour(scope: string, value: (name: ColorName) => string): string {
  return Object.entries(PALETTE)
    .map(([name, { light }]) => {
      const to = value(name as ColorName);
      return `${scope}[fill="${light}"]{fill:${to}}${scope}[stroke="${light}"]{stroke:${to}}`;
    })
    .join('');
}

export const FONT = 'system-ui, sans-serif';

/** Style of every chart. */
export const CONFIG: Config = {
  background: undefined,
  font: FONT,
  padding: 4,
  view: { stroke: null },
  axis: {
    labelColor: color('muted'),
    titleColor: color('muted'),
    titleFontWeight: 'normal',
    labelFontSize: 12,
    titleFontSize: 12,
    titlePadding: 8,
    labelPadding: 5,
    gridColor: color('faint'),
    domain: false,
    ticks: false,
    tickCount: 5,
  },
  // Labels at the ends stay inside, so that titles of neighbouring panels stand at one height.
  axisYQuantitative: { labelFlush: true },
  text: { color: color('ink'), fontSize: 12 },
  line: { strokeWidth: 2 },
  rule: { color: color('muted') },
};
