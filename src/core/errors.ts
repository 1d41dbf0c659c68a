// Typed errors for people: each says what failed, what was expected and found, and what to do about it.

/** Stable machine-readable error codes (`--json` prints them). */
export type ErrorCode =
  | 'usage'
  | 'file-missing'
  | 'file-corrupt'
  | 'limit-exceeded'
  | 'config-invalid'
  | 'unsupported'
  | 'tensor-missing'
  | 'tensor-shape'
  | 'non-finite'
  | 'calibration'
  | 'output-exists'
  | 'output-busy'
  | 'disk-full'
  | 'out-of-memory'
  | 'device-lost'
  | 'context-length'
  | 'not-found'
  | 'network'
  | 'interrupted'
  | 'backend';

/** Options of a {@link GyreError}. */
export interface GyreErrorOptions {
  /** What the user can do about it; printed on a line of its own. */
  remedy?: string;
  /** The lower-level error. */
  cause?: unknown;
}

/** Every error gyre raises on purpose. `message` names what failed, expected and found; `remedy` what to do. */
export class GyreError extends Error {
  readonly code: ErrorCode;
  readonly remedy: string | undefined;

  constructor(code: ErrorCode, message: string, options: GyreErrorOptions = {}) {
    super(message, options.cause === undefined ? undefined : { cause: options.cause });
    this.name = 'GyreError';
    this.code = code;
    this.remedy = options.remedy;
  }
}

/** Throws a GyreError unless `condition` holds. */
export function ensure(
  condition: unknown,
  code: ErrorCode,
  message: string | (() => string),
  remedy?: string,
): asserts condition {
  if (!condition) throw new GyreError(code, typeof message === 'string' ? message : message(), { remedy });
}

/** For exhaustive switches: unreachable when the type checker is right. */
export function unreachable(value: never): never {
  throw new Error(`unreachable: ${String(value)}`);
}
