// What a section of a report is made of, and how charts of several sections lay out their panels.
import type { TopLevelSpec } from 'vega-lite';
import type { Html, Table } from '../html.js';
import type { ReportModel } from '../models.js';
import { color, PALETTE } from '../theme.js';
import type { Figure, KeyItem, Layout } from '../render.js';

/** A part of a section, in reading order. */
export type Part =
  | { readonly kind: 'text'; readonly html: Html }
  | { readonly kind: 'table'; readonly table: Table }
  | { readonly kind: 'figure'; readonly figure: Figure };

/** A section; one without data is not made. */
export interface Section {
  readonly id: string;
  readonly title: string;
  readonly parts: readonly Part[];
}

/** A layer of a chart. */
export type Layer = Extract<TopLevelSpec, { layer: unknown }>['layer'][number];
/** A chart among others. */
export type Panel = Extract<TopLevelSpec, { hconcat: unknown }>['hconcat'][number];

/** Panels side by side, or below each other on a phone; gaps are between their plots, with room for axes and titles. */
export function stack(layout: Layout, panels: Panel[], gap: { wide: number; narrow: number }): TopLevelSpec {
  return layout.narrow
    ? { vconcat: panels, spacing: gap.narrow, bounds: 'flush' }
    : { hconcat: panels, spacing: gap.wide, bounds: 'flush' };
}

/** What stands above a panel. */
export function panelTitle(text: string, strong = false): { [key: string]: unknown } & { text: string } {
  return {
    text,
    anchor: 'start',
    frame: 'group',
    fontSize: strong ? 13 : 12,
    fontWeight: strong ? 'bold' : 'normal',
    color: color(strong ? 'ink' : 'muted'),
    offset: 8,
  };
}

/** Ends of an axis that holds all of these and zero, with a little room. */
export function domainFromZero(values: readonly number[]): [number, number] {
  const [low, high] = [Math.min(0, ...values), Math.max(0, ...values)];
  const room = 0.05 * (high - low || 1);
  return [low < 0 ? low - room : 0, high > 0 ? high + room : 0];
}

/** Width of each of several panels side by side, after axes (`margin` in all) and the gaps between. */
export function panelWidth({ width }: Layout, columns: number, margin: number, gap = 24): number {
  return Math.floor((width - margin - gap * (columns - 1)) / columns);
}

/** Key of models by colour and shape. */
export function modelKey(models: readonly ReportModel[], shape?: string): KeyItem[] {
  return models.map(({ label, style }) => ({ label, color: style.color, shape: shape ?? style.shape }));
}

/** A colour scale that gives models their own colours. */
export function modelColors(models: readonly ReportModel[]): { domain: string[]; range: string[] } {
  return {
    domain: models.map((model) => model.label),
    range: models.map((model) => PALETTE[model.style.color].light),
  };
}

/** A shape scale that gives models their own shapes. */
export function modelShapes(models: readonly ReportModel[]): { domain: string[]; range: string[] } {
  return { domain: models.map((model) => model.label), range: models.map((model) => model.style.shape) };
}

/** Linear groups in the order data flows: above a panel, and in a sentence. */
export const GROUPS = [
  ['qkv', 'q, k, v', 'q, k and v'],
  ['o', 'attention output', 'the attention output'],
  ['gateUp', 'gate, up', 'gate and up'],
  ['down', 'down', 'the down projection'],
] as const;

/** A group's name above a panel. */
export function groupTitle(group: string): string {
  return GROUPS.find(([name]) => name === group)?.[1] ?? group;
}

/** `the down projection of block 7`. */
export function groupPhrase(group: string, layer: number): string {
  return `${GROUPS.find(([name]) => name === group)?.[2] ?? group} of block ${layer}`;
}

/** An axis of powers of ten with lines and labels at 1, 2 and 5 times each, or fewer where there would be many. */
export function logAxis([low, high]: readonly [number, number]): { values: number[]; labelExpr: string } {
  const ticks = (steps: readonly number[]): number[] => {
    const found: number[] = [];
    for (let power = Math.floor(Math.log10(low)); power <= Math.ceil(Math.log10(high)); power++)
      for (const step of steps) {
        const tick = Number((step * 10 ** power).toPrecision(1));
        if (tick >= low * 0.999 && tick <= high * 1.001) found.push(tick);
      }
    return found;
  };
  const values = [[1, 2, 5], [1, 3], [1]].map(ticks).find((candidate) => candidate.length <= 6) ?? ticks([1]);
  const labelExpr = "datum.value < 0.0005 ? format(datum.value, '.0e') : format(datum.value, '~g')";
  return { values, labelExpr };
}
