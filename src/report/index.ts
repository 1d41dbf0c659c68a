// Reports: result JSON in, one self-contained HTML page and its charts out. Runs in any JavaScript engine.
import { html } from './html.js';
import type { ReportInput } from './inputs.js';
import { joinInputs, type ReportData } from './models.js';
import { drawFigures, renderPage } from './page.js';
import { standalone, type Drawing } from './render.js';
import { openingOf } from './sections/headline.js';
import { lossSections } from './sections/losses.js';
import { driftSections } from './sections/drift.js';
import { layerSections } from './sections/layers.js';
import { provenanceSections } from './sections/provenance.js';
import { rangeSections } from './sections/ranges.js';
import { taskSections } from './sections/tasks.js';
import { speedSections } from './sections/speed.js';
import type { Section } from './sections/section.js';

export { INPUT_KINDS, MAX_INPUT_BYTES, readInput, type ReportInput } from './inputs.js';

/** Sections in reading order; each makes none where its data is missing. */
const SECTIONS: readonly ((data: ReportData) => readonly Section[])[] = [
  lossSections,
  taskSections,
  driftSections,
  rangeSections,
  layerSections,
  speedSections,
  provenanceSections,
];

/** A finished report. */
export interface Report {
  readonly title: string;
  readonly html: string;
  /** Each chart as an SVG file. */
  readonly charts: readonly (Drawing & { readonly name: string; readonly title: string })[];
  readonly sections: readonly string[];
}

/** Options of {@link renderReport}. */
export interface ReportOptions {
  /** Default: the model and its widths. */
  readonly title?: string;
  /** Said at the foot, e.g. `gyre 0.1.0`. */
  readonly madeBy: string;
}

/** Makes a report of what there is; the same inputs give the same bytes. */
export async function renderReport(inputs: readonly ReportInput[], options: ReportOptions): Promise<Report> {
  const data = joinInputs(inputs);
  const sections = SECTIONS.flatMap((section) => section(data));
  const drawn = await drawFigures(sections);
  const opening = openingOf(data, options.title);
  const foot = html`Made by ${options.madeBy} from ${inputs.length} result file${inputs.length === 1 ? '' : 's'}. No
  scripts, nothing loaded from elsewhere.`;
  return {
    title: opening.title,
    html: renderPage({ ...opening, foot }, sections, drawn),
    charts: [...drawn.values()].map(({ figure, wide }) => ({
      name: figure.id,
      title: figure.title,
      ...standalone(wide, figure.key),
    })),
    sections: sections.map(({ id }) => id),
  };
}
