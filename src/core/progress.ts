// Progress of long work as events: the pipeline emits, the CLI (or a web page) shows.

/** What long-running functions report. `done` and `total` are in `unit`s. */
export interface ProgressEvent {
  /** Stable name of the stage, e.g. `calibrate`, `block`. */
  readonly stage: string;
  readonly done: number;
  readonly total: number;
  readonly unit: string;
  /** One line for people, e.g. `block 3/28 mlp.down_proj: loss 0.0123`. */
  readonly message?: string;
}

/** Receives progress events; must not throw. */
export type ProgressListener = (event: ProgressEvent) => void;

/** A listener that ignores everything. */
export const silent: ProgressListener = () => undefined;
