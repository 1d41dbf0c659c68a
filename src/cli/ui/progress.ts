// Progress on stderr: one line that updates itself on a terminal, an occasional line elsewhere, nothing under --json.
import type { ProgressEvent, ProgressListener } from '../../core/progress.js';
import { createColors, type Colors } from './colors.js';
import { formatDuration } from './table.js';

/** Shortest time between two drawings of the line on a terminal, ms. */
const REDRAW_MS = 80;

/** Time between two lines elsewhere, ms. */
const LINE_MS = 5000;

/** Where progress is written: process.stderr, or a stand-in. */
export interface ProgressStream {
  readonly isTTY?: boolean;
  readonly columns?: number;
  write(text: string): unknown;
}

/** Shows progress events. */
export interface ProgressView {
  readonly listener: ProgressListener;
  /** Prints a line of its own above the progress line. */
  readonly note: (line: string) => void;
  /** Takes the progress line away. */
  readonly clear: () => void;
}

/** Options of {@link createProgress}. */
export interface ProgressOptions {
  readonly stream: ProgressStream;
  /** Write nothing at all. */
  readonly quiet?: boolean;
  readonly colors?: Colors;
  /** Milliseconds; default performance.now. */
  readonly now?: () => number;
}

/** A view on a stream. */
export function createProgress(options: ProgressOptions): ProgressView {
  const { stream, quiet = false, colors = createColors(false), now = () => performance.now() } = options;
  if (quiet) return { listener: () => undefined, note: () => undefined, clear: () => undefined };
  const tty = stream.isTTY === true;
  const eta = new EtaEstimator();
  let shown = false;
  let lastDrawn = -Infinity;
  let stageStarted = now();
  let stage: string | undefined;
  const clear = (): void => {
    if (shown) stream.write('\r\x1b[K');
    shown = false;
  };
  const listener = (event: ProgressEvent): void => {
    const time = now();
    if (event.stage !== stage) {
      stage = event.stage;
      stageStarted = time;
      if (!tty) lastDrawn = time;
    }
    const remaining = eta.update(event, time / 1000);
    const finished = event.done >= event.total;
    if (tty) {
      if (time - lastDrawn < REDRAW_MS && !finished) return;
      lastDrawn = time;
      stream.write(`\r\x1b[K${progressLine(event, remaining, (stream.columns ?? 80) - 1, colors)}`);
      shown = true;
      if (finished) clear();
    } else if (time - lastDrawn >= LINE_MS || (finished && time - stageStarted >= LINE_MS)) {
      lastDrawn = time;
      stream.write(`${plainLine(event, remaining)}\n`);
    }
  };
  const note = (line: string): void => {
    clear();
    stream.write(`${line}\n`);
  };
  return { listener, note, clear };
}

/** Estimates what remains of a stage from its rate so far. */
export class EtaEstimator {
  #stage: string | undefined;
  #since = 0;
  #doneThen = 0;
  #done = 0;
  /** When the stage would end, as of the last step. */
  #end: number | undefined;

  /**
   * @param seconds a clock.
   * @returns seconds remaining, or undefined while too little is known.
   */
  update(event: Pick<ProgressEvent, 'stage' | 'done' | 'total'>, seconds: number): number | undefined {
    if (event.stage !== this.#stage || event.done < this.#done) {
      // What was done before the first event (an earlier run's blocks) says nothing about the rate of this one.
      this.#stage = event.stage;
      this.#since = seconds;
      this.#doneThen = event.done;
      this.#done = event.done;
      this.#end = undefined;
    }
    const elapsed = seconds - this.#since;
    if (event.done > this.#done && elapsed >= 1) {
      const rate = (event.done - this.#doneThen) / elapsed;
      this.#end = seconds + Math.max(0, event.total - event.done) / rate;
      this.#done = event.done;
    }
    // Between steps the time left runs down; a step that takes longer than the others leaves it unknown.
    if (this.#end === undefined) return undefined;
    const left = this.#end - seconds;
    return left >= 0 ? left : undefined;
  }
}

/** A bar of `width` characters: `█████▌    `. */
export function formatBar(fraction: number, width: number): string {
  const eighths = Math.round(Math.min(1, Math.max(0, fraction)) * width * 8);
  const full = Math.floor(eighths / 8);
  const rest = eighths % 8;
  const bar = '█'.repeat(full) + (rest === 0 ? '' : ' ▏▎▍▌▋▊▉'[rest]);
  return bar + ' '.repeat(width - bar.length);
}

function counts(event: ProgressEvent): string {
  return event.unit === 'bytes'
    ? `${(event.done / 1e6).toFixed(0)}/${(event.total / 1e6).toFixed(0)} MB`
    : `${event.done}/${event.total} ${event.unit}`;
}

/** One line for a terminal: stage, bar, counts, time left, message; cut to `columns`. */
export function progressLine(
  event: ProgressEvent,
  remaining: number | undefined,
  columns: number,
  colors: Colors,
): string {
  const fraction = event.total > 0 ? event.done / event.total : 0;
  const left = !remaining ? '' : `  ${formatDuration(remaining)} left`;
  const head = `${event.stage} `;
  const bar = formatBar(fraction, 20);
  const tail = ` ${counts(event)}${left}${event.message ? `  ${event.message}` : ''}`;
  const room = columns - head.length - bar.length - 2;
  const cut = tail.length > room ? `${tail.slice(0, Math.max(0, room - 1))}…` : tail;
  return `${head}${colors.dim('▕')}${colors.cyan(bar)}${colors.dim('▏')}${cut}`;
}

/** One line for a log. */
export function plainLine(event: ProgressEvent, remaining: number | undefined): string {
  const left = !remaining ? '' : `, ${formatDuration(remaining)} left`;
  return `${event.stage}: ${counts(event)}${left}${event.message ? `; ${event.message}` : ''}`;
}
