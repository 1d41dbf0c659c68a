// Figures of activation magnitudes as SVG: the 3-D style surface of the field (tokens × channels × |x|), one panel per form of
// the model on one scale, and the sorted peaks of all channels as lines.

/** What the figures need of a profile (see activation-profile.ts of quant, and the JSON that `gyre inspect` writes). */
export interface FigureProfile {
  readonly variant: string;
  readonly channels: number;
  readonly peaks: readonly number[];
  readonly absMax: number;
  readonly surface: { readonly tokens: number; readonly bins: number; readonly values: readonly number[] };
}

const COLORS = ['#4a6fa5', '#e0a458', '#6a994e', '#d1495b'];
const TEXT = 'font-family="system-ui, sans-serif" fill="#333"';

/** Panels side by side, each with its own height scale, which its label names. @param title above the panels. */
export function surfaceFigure(title: string, profiles: readonly FigureProfile[]): string {
  const [width, height] = [340, 300];
  const columns = Math.min(2, profiles.length);
  const rows = Math.ceil(profiles.length / columns);
  const panels = profiles.map((profile, i) => {
    const [x, y] = [(i % columns) * width, 40 + Math.floor(i / columns) * height];
    return `<g transform="translate(${x} ${y})">${surface(profile, width, height, COLORS[i % COLORS.length])}</g>`;
  });
  return document(columns * width, 40 + rows * height, title, panels);
}

/** Oblique projection, back to front: every token is a filled ridge over the channels. */
function surface(profile: FigureProfile, width: number, height: number, color: string): string {
  const { tokens, bins, values } = profile.surface;
  const top = Math.max(...values, Number.MIN_VALUE);
  const [left, base, across] = [30, height - 45, width - 120];
  const [slantX, slantY, rise] = [60, 70, height - 150];
  const parts: string[] = [];
  for (let t = tokens - 1; t >= 0; t--) {
    const depth = tokens > 1 ? t / (tokens - 1) : 0;
    const [x0, y0] = [left + slantX * depth, base - slantY * depth];
    const points = [`${fixed(x0)},${fixed(y0)}`];
    for (let b = 0; b < bins; b++) {
      const x = x0 + (across * b) / Math.max(1, bins - 1);
      points.push(`${fixed(x)},${fixed(y0 - (rise * values[t * bins + b]) / top)}`);
    }
    points.push(`${fixed(x0 + across)},${fixed(y0)}`);
    parts.push(
      `<polygon points="${points.join(' ')}" fill="${color}" fill-opacity="0.25" stroke="${color}" stroke-width="0.6"/>`,
    );
  }
  parts.push(
    `<text x="${width / 2}" y="16" text-anchor="middle" font-size="13" font-weight="600" ${TEXT}>${escape(profile.variant)}</text>`,
    `<text x="${width / 2}" y="32" text-anchor="middle" font-size="11" ${TEXT}>highest shown ${short(top)}, highest of all ${short(profile.absMax)}</text>`,
    `<text x="${left + across / 2}" y="${base + 18}" text-anchor="middle" font-size="11" ${TEXT}>${profile.channels} channels</text>`,
    `<text x="${left + across + slantX / 2 + 8}" y="${base - slantY / 2 + 12}" font-size="11" ${TEXT}>${tokens} tokens</text>`,
  );
  return parts.join('');
}

/** Peaks of all channels, largest first, on a logarithmic axis: one line per form of the model. */
export function sortedChannelsFigure(title: string, profiles: readonly FigureProfile[]): string {
  const [width, height, left, bottom, top, right] = [640, 380, 60, 50, 50, 20];
  const sorted = profiles.map(({ peaks }) => [...peaks].sort((a, b) => b - a).map((p) => Math.max(p, 1e-9)));
  const all = sorted.flat();
  const high = Math.ceil(Math.log10(Math.max(...all, 1e-9)));
  const low = Math.max(high - 8, Math.floor(Math.log10(Math.min(...all, 1))));
  const yAt = (value: number): number =>
    top + ((height - top - bottom) * (high - Math.max(low, Math.log10(value)))) / Math.max(1, high - low);
  const xAt = (share: number): number => left + (width - left - right) * share;
  const parts: string[] = [];
  for (let e = low; e <= high; e++) {
    const y = fixed(yAt(10 ** e));
    parts.push(
      `<line x1="${left}" x2="${width - right}" y1="${y}" y2="${y}" stroke="#ddd"/>`,
      `<text x="${left - 6}" y="${y}" dy="4" text-anchor="end" font-size="11" ${TEXT}>${short(10 ** e)}</text>`,
    );
  }
  sorted.forEach((peaks, i) => {
    const points = peaks.map((p, c) => `${fixed(xAt(c / Math.max(1, peaks.length - 1)))},${fixed(yAt(p))}`);
    const color = COLORS[i % COLORS.length];
    const y = top + 14 + 16 * i;
    parts.push(
      `<polyline points="${points.join(' ')}" fill="none" stroke="${color}" stroke-width="1.6"/>`,
      `<line x1="${width - 170}" x2="${width - 150}" y1="${y}" y2="${y}" stroke="${color}" stroke-width="3"/>`,
      `<text x="${width - 144}" y="${y + 4}" font-size="12" ${TEXT}>${escape(profiles[i].variant)}</text>`,
    );
  });
  parts.push(
    `<text x="${(left + width - right) / 2}" y="${height - 14}" text-anchor="middle" font-size="12" ${TEXT}>channels, largest first</text>`,
    `<text transform="translate(16 ${(top + height - bottom) / 2}) rotate(-90)" text-anchor="middle" font-size="12" ${TEXT}>max |x|</text>`,
  );
  return document(width, height, title, parts);
}

function document(width: number, height: number, title: string, parts: readonly string[]): string {
  return `<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 ${width} ${height}" width="${width}" height="${height}">
<rect width="100%" height="100%" fill="white"/>
<text x="${width / 2}" y="24" text-anchor="middle" font-size="15" font-weight="600" ${TEXT}>${escape(title)}</text>
${parts.join('\n')}
</svg>
`;
}

function fixed(x: number): string {
  return x.toFixed(1);
}

function short(x: number): string {
  return Number(x.toPrecision(3)).toString();
}

function escape(text: string): string {
  return text.replaceAll('&', '&amp;').replaceAll('<', '&lt;').replaceAll('>', '&gt;');
}
