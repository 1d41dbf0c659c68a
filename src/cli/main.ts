// The command line: one file per command under commands/; this one parses, stops on Ctrl-C, and turns errors into exit codes.
import { Command, CommanderError } from 'commander';
import { GyreError } from '../core/errors.js';
import { VERSION } from '../version.js';
import { demoCommand } from './commands/demo.js';
import { doctorCommand } from './commands/doctor.js';
import { evalCommand } from './commands/eval.js';
import { generateCommand } from './commands/generate.js';
import { inspectCommand } from './commands/inspect.js';
import { quantizeCommand } from './commands/quantize.js';
import { stressCommand } from './commands/stress.js';
import { createContext, type CommandContext } from './context.js';
import { colorsFor } from './ui/colors.js';
import { describeError, errorJson, EXIT, formatError, stacks } from './ui/errors.js';

/**
 * Runs a command line and sets the process's exit code: 0 when it worked, 1 when it failed, 2 when the command line was
 * wrong, 130 when it was stopped by Ctrl-C.
 * @param argv arguments without node and script.
 */
export async function main(argv: readonly string[]): Promise<void> {
  const json = argv.includes('--json');
  const interrupt = new AbortController();
  const context = createContext(json, interrupt.signal);
  let first = 0;
  const onSignal = (): void => {
    if (interrupt.signal.aborted) {
      // npx hands on the Ctrl-C that the terminal has sent to us already.
      if (performance.now() - first > 500) process.exit(EXIT.interrupted);
      return;
    }
    first = performance.now();
    interrupt.abort();
    context.progress.note('Stopping at the next safe point; press Ctrl-C again to stop at once.');
  };
  process.on('SIGINT', onSignal);
  process.on('SIGTERM', onSignal);
  // A reader that has seen enough (`gyre … | head`) is no error.
  process.stdout.on('error', (error: NodeJS.ErrnoException) => {
    if (error.code === 'EPIPE') process.exit(EXIT.ok);
    throw error;
  });
  const program = buildProgram(context);
  try {
    await program.parseAsync(argv, { from: 'user' });
    process.exitCode ??= EXIT.ok;
  } catch (error) {
    if (error instanceof CommanderError && error.exitCode === 0) return; // --help, --version
    context.progress.clear();
    const bare = error instanceof CommanderError && error.code === 'commander.help'; // no command
    if (bare && !json) process.stdout.write(`${program.helpInformation()}\n`);
    const failure = bare ? new GyreError('usage', 'no command was given') : error;
    const shown = describeError(failure, commandOf(program, argv));
    if (json) process.stdout.write(`${errorJson(shown)}\n`);
    else process.stderr.write(`${formatError(shown, colorsFor(process.stderr))}\n`);
    if (process.env['GYRE_DEBUG'] === '1') process.stderr.write(`${stacks(error)}\n`);
    process.exitCode = shown.exitCode;
  } finally {
    process.off('SIGINT', onSignal);
    process.off('SIGTERM', onSignal);
  }
}

/** The program with its commands. */
function buildProgram(context: CommandContext): Command {
  const program = new Command('gyre')
    .description('Quantizes large language models to 2, 3, 4 or 8 bits with learned rotations, measures and runs them.')
    .version(VERSION, '-V, --version', 'print the version')
    .helpOption('-h, --help', 'print this help')
    .helpCommand('help [command]', 'print the help of a command')
    .addHelpText(
      'after',
      `
Examples:
  $ gyre demo                                              # everything once, on the bundled model
  $ gyre quantize Qwen/Qwen3-0.6B --out qwen3-0.6b-w4
  $ gyre eval qwen3-0.6b-w4 --text book.txt --reference Qwen/Qwen3-0.6B
  $ gyre generate qwen3-0.6b-w4 --chat --prompt "Why is the sky blue?"

A model is a folder in Hugging Face layout or an id on the hub. Every command takes --json and has its own --help.
Exit codes: 0 done, 1 failed, 2 wrong command line, 130 stopped by Ctrl-C. GYRE_DEBUG=1 prints stacks of errors.`,
    );
  const commands = [
    quantizeCommand,
    evalCommand,
    generateCommand,
    inspectCommand,
    stressCommand,
    demoCommand,
    doctorCommand,
  ];
  for (const command of commands) program.addCommand(command(context));
  for (const command of [program, ...program.commands]) {
    // Errors are thrown and printed in one place; help goes to stdout as it is.
    command.exitOverride().configureOutput({ writeErr: () => undefined });
    command.showSuggestionAfterError(true).helpOption('-h, --help', 'print this help');
    command.configureHelp({
      optionDescription: ({ description, defaultValue }) =>
        typeof defaultValue === 'string' ? `${description} (default: ${defaultValue})` : description,
    });
  }
  return program;
}

/** `gyre quantize` for messages. */
function commandOf(program: Command, argv: readonly string[]): string {
  const name = argv.find((arg) => !arg.startsWith('-'));
  return program.commands.some((command) => command.name() === name) ? `gyre ${name}` : 'gyre';
}
