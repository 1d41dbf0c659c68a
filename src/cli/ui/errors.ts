// Errors for people: three lines (what, detail, remedy), or one JSON object; and the exit code.
import { CommanderError } from 'commander';
import { GyreError, type ErrorCode } from '../../core/errors.js';
import type { Colors } from './colors.js';

/** Exit codes of the command line. */
export const EXIT = { ok: 0, failure: 1, usage: 2, interrupted: 130 } as const;

const TITLES: Readonly<Record<ErrorCode, string>> = {
  usage: 'That command does not work like this',
  'file-missing': 'A file is missing',
  'file-corrupt': 'A file is damaged',
  'limit-exceeded': 'A file is over a limit',
  'config-invalid': 'A configuration is not what it should be',
  unsupported: 'This is not supported',
  'tensor-missing': 'The checkpoint lacks a tensor',
  'tensor-shape': 'A tensor does not fit',
  'non-finite': 'A value is not finite',
  calibration: 'The calibration text will not do',
  'output-exists': 'The output is already there',
  'output-busy': 'The output is being written by another run',
  'disk-full': 'The disk is full',
  'out-of-memory': 'The memory is not enough',
  'device-lost': 'The GPU was lost',
  'context-length': 'The text is too long for the model',
  'not-found': 'Not found',
  network: 'The network failed',
  interrupted: 'Stopped',
  backend: 'The backend failed',
};

/** An error as it will be shown. */
export interface ShownError {
  readonly code: ErrorCode | 'internal';
  readonly title: string;
  readonly message: string;
  readonly remedy: string;
  readonly exitCode: number;
}

/**
 * Makes any thrown value fit to show.
 * @param commandHelp the command whose help to name, e.g. `gyre quantize`.
 */
export function describeError(error: unknown, commandHelp = 'gyre'): ShownError {
  if (error instanceof CommanderError) return describeUsage(error, commandHelp);
  if (error instanceof GyreError) {
    const { code, message } = error;
    const remedy =
      error.remedy ?? (code === 'usage' ? `see \`${commandHelp} --help\`` : 'run again with GYRE_DEBUG=1 for details');
    const exitCode = code === 'usage' ? EXIT.usage : code === 'interrupted' ? EXIT.interrupted : EXIT.failure;
    return { code, title: TITLES[code], message, remedy, exitCode };
  }
  const system = describeSystem(error);
  if (system) return describeError(system, commandHelp);
  return {
    code: 'internal',
    title: 'Something went wrong inside gyre',
    message: error instanceof Error ? error.message : String(error),
    remedy: 'run again with GYRE_DEBUG=1 for the stack, and report it with the command',
    exitCode: EXIT.failure,
  };
}

/** Commander's complaints: `error: unknown option '--bit'\n(Did you mean --bits?)`. */
function describeUsage(error: CommanderError, commandHelp: string): ShownError {
  const [first, ...rest] = error.message.split('\n');
  const message = first.replace(/^error: /, '');
  const suggestion = rest.join(' ').match(/\((.*)\)/)?.[1];
  const help = `see \`${commandHelp} --help\``;
  if (error.code === 'commander.missingArgument') {
    // Flags that take several files would swallow an argument put after them.
    const remedy = `put it right after the command: \`${commandHelp} <model> …\`; or ${help}`;
    return { code: 'usage', title: TITLES.usage, message, remedy, exitCode: EXIT.usage };
  }
  return {
    code: 'usage',
    title: TITLES.usage,
    message,
    remedy: suggestion ? `${suggestion[0].toLowerCase()}${suggestion.slice(1)} Or ${help}` : help,
    exitCode: EXIT.usage,
  };
}

/** Errors of the system that people meet. */
function describeSystem(error: unknown): GyreError | undefined {
  if (!(error instanceof Error) || !('code' in error)) return undefined;
  const { message, code } = error;
  switch (code) {
    case 'ENOSPC':
    case 'EDQUOT':
      return new GyreError('disk-full', message, {
        cause: error,
        remedy: 'free some space, or write elsewhere with --out',
      });
    case 'ENOENT':
      return new GyreError('file-missing', message, { cause: error, remedy: 'check the path' });
    case 'EACCES':
    case 'EPERM':
    case 'EROFS':
      return new GyreError('file-missing', message, {
        cause: error,
        remedy: 'check that you may read and write there',
      });
    case 'EISDIR':
      return new GyreError('usage', message, { cause: error, remedy: 'name a file, not a folder' });
    case 'ERR_WORKER_OUT_OF_MEMORY':
      return new GyreError('out-of-memory', message, {
        cause: error,
        remedy: 'use fewer calibration samples or shorter ones',
      });
    default:
      return undefined;
  }
}

/** The three lines. */
export function formatError(shown: ShownError, colors: Colors): string {
  const head =
    shown.code === 'interrupted'
      ? colors.yellow(colors.bold(shown.title))
      : colors.red(colors.bold(`error: ${shown.title}`));
  return [head, `  ${shown.message}`, `  ${colors.cyan('→')} ${sentence(shown.remedy)}`].join('\n');
}

/** With a capital, when it starts with a plain word (not a flag, a path or a name with dots). */
function sentence(text: string): string {
  return /^[a-z]+[ ,:;]/.test(text) ? text[0].toUpperCase() + text.slice(1) : text;
}

/** The JSON of `--json`. */
export function errorJson(shown: ShownError): string {
  return JSON.stringify({ error: { code: shown.code, message: shown.message, remedy: shown.remedy } });
}

/** The stacks of an error and its causes, for GYRE_DEBUG=1. */
export function stacks(error: unknown): string {
  const lines: string[] = [];
  for (let at: unknown = error; at instanceof Error; at = at.cause) {
    lines.push(`${lines.length > 0 ? 'caused by ' : ''}${at.stack ?? at.message}`);
  }
  return lines.join('\n');
}
