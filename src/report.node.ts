// Reports on disk: finds result files, writes the page and its charts. What is in them is src/report's business.
import { readdir, readFile, stat } from 'node:fs/promises';
import path from 'node:path';
import { GyreError } from './core/errors.js';
import { writeFileAtomic } from './formats/atomic.node.js';
import { findBrowser, writePictures } from './pictures.node.js';
import { INPUT_KINDS, MAX_INPUT_BYTES, readInput, renderReport, type ReportInput } from './report/index.js';

/** Files looked at in one folder at most. */
const MAX_FILES = 4096;

/**
 * Reads result files. Of a folder, every .json in it and one level below that is a result; other .json files there are
 * passed over. A file named by itself must be one.
 * @throws GyreError `file-missing`, `config-invalid` naming file and field, `usage` when a folder holds no result.
 */
export async function findInputs(
  names: readonly string[],
  options: { readonly allowEmpty?: boolean } = {},
): Promise<ReportInput[]> {
  const found = new Map<string, ReportInput>();
  for (const name of names) {
    const info = await stat(name).catch(() => undefined);
    if (!info) throw new GyreError('file-missing', `${name} does not exist`, { remedy: 'check the path' });
    const files = info.isDirectory() ? await jsonFiles(name) : [name];
    let results = 0;
    for (const file of files) {
      const input = await readResult(file, info.isDirectory());
      if (!input) continue;
      found.set(path.resolve(file), input);
      results++;
    }
    if (results > 0 || options.allowEmpty) continue;
    throw new GyreError('usage', `${name} ${info.isDirectory() ? 'holds no results' : 'is not a result'}`, {
      remedy: `give what these write: ${Object.values(INPUT_KINDS).join(', ')}`,
    });
  }
  return [...found.values()];
}

/** .json files of a folder and of the folders in it, in the order of their names. */
async function jsonFiles(folder: string): Promise<string[]> {
  const files: string[] = [];
  const entries = (await readdir(folder, { withFileTypes: true })).sort((a, b) => (a.name < b.name ? -1 : 1));
  const inside = entries.filter(
    (entry) => entry.isDirectory() && !entry.name.startsWith('.') && entry.name !== 'node_modules',
  );
  for (const entry of entries) if (entry.isFile() && isJson(entry.name)) files.push(path.join(folder, entry.name));
  for (const { name } of inside)
    for (const entry of (await readdir(path.join(folder, name), { withFileTypes: true })).sort((a, b) =>
      a.name < b.name ? -1 : 1,
    ))
      if (entry.isFile() && isJson(entry.name)) files.push(path.join(folder, name, entry.name));
  if (files.length > MAX_FILES)
    throw new GyreError('limit-exceeded', `${folder} has ${files.length} .json files, the limit is ${MAX_FILES}`, {
      remedy: 'name the result files themselves',
    });
  return files;
}

function isJson(name: string): boolean {
  return name.endsWith('.json') && !name.startsWith('.');
}

/** One file; undefined when it is no result, also for files of a folder that are not JSON at all. */
async function readResult(file: string, fromFolder: boolean): Promise<ReportInput | undefined> {
  const { size } = await stat(file);
  if (size > MAX_INPUT_BYTES)
    throw new GyreError('limit-exceeded', `${file} has ${size} bytes, the limit is ${MAX_INPUT_BYTES}`, {
      remedy: 'give files that gyre wrote',
    });
  const text = await readFile(file, 'utf8');
  // Most .json files beside a model are not results: only those that can be are read strictly.
  if (fromFolder && !isObject(text)) return undefined;
  return readInput(file, text);
}

function isObject(text: string): boolean {
  try {
    return typeof JSON.parse(text) === 'object';
  } catch {
    return false;
  }
}

/** Options of {@link writeReport}. */
export interface WriteReportOptions {
  /** The page. */
  readonly out: string;
  readonly title?: string;
  /** Folder for the charts as SVG. */
  readonly svg?: string;
  /** Folder for the charts as PNG. */
  readonly png?: string;
  /** Said at the foot. */
  readonly madeBy: string;
}

/** What was written. */
export interface WrittenReport {
  readonly out: string;
  readonly title: string;
  readonly bytes: number;
  readonly sections: readonly string[];
  readonly charts: readonly { readonly name: string; readonly title: string; readonly files: readonly string[] }[];
}

/** Makes the page and the pictures. @throws GyreError `not-found` for PNG without a browser. */
export async function writeReport(inputs: readonly ReportInput[], options: WriteReportOptions): Promise<WrittenReport> {
  const { out, title, svg, png, madeBy } = options;
  const browser = png === undefined ? undefined : await findBrowser();
  const report = await renderReport(inputs, { title, madeBy });
  const pictures =
    png === undefined || browser === undefined ? undefined : await writePictures(browser, report.charts, png);
  const charts: { name: string; title: string; files: string[] }[] = [];
  for (const { name, title: chartTitle, svg: drawing } of report.charts) {
    const picture = pictures?.get(name);
    const files = picture === undefined ? [] : [picture];
    if (svg !== undefined) {
      const file = path.join(svg, `${name}.svg`);
      await writeFileAtomic(file, drawing);
      files.push(file);
    }
    charts.push({ name, title: chartTitle, files });
  }
  await writeFileAtomic(out, report.html);
  const bytes = new TextEncoder().encode(report.html).length;
  return { out, title: report.title, bytes, sections: report.sections, charts };
}
