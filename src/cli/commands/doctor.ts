// gyre doctor: what each backend finds on this machine, and what to install where it finds nothing.
import { Command } from 'commander';
import { inspectMachine, type BackendFinding } from '../../backends/machine.js';
import { chooseDevice } from '../../backends/registry.js';
import { machineInfo, type CommandContext } from '../context.js';
import { jsonOption } from '../options.js';
import { formatBytes, formatFields } from '../ui/table.js';

/** The command. */
export function doctorCommand(context: CommandContext): Command {
  const command = new Command('doctor').description(
    'show what each backend finds on this machine: versions, GPU, features, limits, memory bandwidth, what to install',
  );
  command.addOption(jsonOption());
  return command
    .addHelpText(
      'after',
      `
Examples:
  $ gyre doctor
  $ gyre doctor --json

Bandwidths are of copies, reads and writes both counted; on the CPU of one thread.`,
    )
    .action(async () => {
      const findings = await inspectMachine();
      const auto = await chooseDevice('auto');
      const machine = machineInfo();
      context.result({ ...findings, auto, machine });
      context.print(
        formatFields([
          ['gyre', findings.version],
          ['node', String(machine['node'])],
          ['platform', String(machine['platform'])],
          ['processor', `${machine['cpu']}, ${machine['cores']} cores`],
          ['memory', formatBytes(Number(machine['memoryBytes']))],
          ['--device auto', `${auto.name} (${auto.reason})`],
        ]),
      );
      for (const finding of findings.backends) context.print(`\n${report(finding, context)}`);
    });
}

function report(finding: BackendFinding, { colors }: CommandContext): string {
  const { name, available, description = '', details, copyBytesPerSecond, reason = '', remedy = '' } = finding;
  const mark = available ? colors.green('✓') : colors.red('✗');
  const title = `${mark} ${colors.bold(name)}  ${available ? description : reason}`;
  if (!available) return `${title}\n  ${remedy}`;
  const fields: [string, string][] = Object.entries(details)
    // Most of an adapter's features are about drawing; the ones that matter have lines of their own.
    .filter(([key]) => key !== 'features')
    .map(([key, value]) => [`  ${key}`, show(key, value)]);
  if (copyBytesPerSecond !== undefined) fields.push(['  copy bandwidth', `${formatBytes(copyBytesPerSecond)}/s`]);
  return `${title}\n${formatFields(fields)}`;
}

function show(key: string, value: string | number | readonly string[]): string {
  if (typeof value === 'number')
    return /BufferSize|BindingSize|StorageSize/.test(key) ? formatBytes(value) : String(value);
  if (typeof value === 'string') return value;
  return value.length > 0 ? value.join(', ') : 'none';
}
