// The figures are whole SVGs with one panel or line per form of the model, and nothing unescaped in them.
import { describe, expect, it } from 'vitest';
import { sortedChannelsFigure, surfaceFigure, type FigureProfile } from '../../src/report/activation-figures.js';

const profile = (variant: string): FigureProfile => ({
  variant,
  channels: 6,
  peaks: [1, 20, 0, 3, 500, 2],
  absMax: 500,
  surface: { tokens: 2, bins: 3, values: [1, 20, 3, 0.5, 500, 2] },
});

describe('activation figures', () => {
  it('draws a ridge per token and panel', () => {
    const svg = surfaceFigure('down & <o>', [profile('original'), profile('rotated')]);
    expect(svg.match(/<polygon/g)).toHaveLength(4);
    expect(svg).toContain('down &amp; &lt;o&gt;');
    expect(svg).toContain('highest of all 500');
    expect(svg).not.toMatch(/NaN|Infinity|undefined/);
    expect(svg.trim()).toMatch(/^<svg[\s\S]*<\/svg>$/);
  });

  it('draws a line per form, also for channels that are silent', () => {
    const svg = sortedChannelsFigure('peaks', [profile('original'), profile('smoothed')]);
    expect(svg.match(/<polyline/g)).toHaveLength(2);
    expect(svg).not.toMatch(/NaN|Infinity|undefined/);
  });
});
