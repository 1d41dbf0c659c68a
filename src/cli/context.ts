// What every command gets: where to print, how to show progress, when to stop; and models opened the same way everywhere.
import { arch, cpus, platform, totalmem } from 'node:os';
import {
  chooseDevice,
  openBackend,
  type ChosenDevice,
  type DeviceName,
  type PrecisionName,
} from '../backends/registry.js';
import { byteLength } from '../core/tensor.js';
import { resolveModel } from '../formats/hub.node.js';
import { loadDecoder, openModel, type ModelSource } from '../models/load.js';
import type { Decoder } from '../models/decoder.js';
import type { Backend } from '../ops/backend.js';
import { colorsFor, type Colors } from './ui/colors.js';
import { createProgress, type ProgressView } from './ui/progress.js';

/** The surroundings of one command. */
export interface CommandContext {
  readonly json: boolean;
  /** Aborted by Ctrl-C. */
  readonly signal: AbortSignal;
  readonly progress: ProgressView;
  /** Colours of stdout. */
  readonly colors: Colors;
  /** Writes text to stdout as it is. */
  readonly write: (text: string) => void;
  /** Writes a line to stdout; nothing under --json. */
  readonly print: (line?: string) => void;
  /** Writes the command's result to stdout under --json. */
  readonly result: (value: unknown) => void;
}

/** A context on the process's streams. */
export function createContext(json: boolean, signal: AbortSignal): CommandContext {
  const write = (text: string): void => void process.stdout.write(text);
  return {
    json,
    signal,
    progress: createProgress({ stream: process.stderr, quiet: json, colors: colorsFor(process.stderr) }),
    colors: colorsFor(process.stdout),
    write,
    print: (line = '') => {
      if (!json) write(`${line}\n`);
    },
    result: (value) => {
      if (json) write(`${JSON.stringify(value, null, 2)}\n`);
    },
  };
}

/** Where a model comes from. */
export interface ModelChoice {
  readonly revision?: string;
  readonly token?: string;
}

/** Finds a model and reads its headers; `use` gets it, and it is closed afterwards. */
export async function withModel<T>(
  context: CommandContext,
  model: string,
  choice: ModelChoice,
  use: (source: ModelSource) => Promise<T>,
): Promise<T> {
  const { files } = await resolveModel(model, { ...choice, onProgress: context.progress.listener });
  // For people the model is called what they called it, not the folder of the cache.
  const source = { ...(await openModel(files)), name: model };
  try {
    return await use(source);
  } finally {
    await source.checkpoint.close();
  }
}

/** How and where a command computes. */
export interface RuntimeChoice {
  readonly device: DeviceName;
  readonly threads?: number;
  readonly activations?: 'exact' | 'int8';
  /** Default auto. */
  readonly precision?: PrecisionName;
}

/** Decides where a command runs a model, and says so. */
export async function pickDevice(
  context: CommandContext,
  source: ModelSource,
  options: Pick<RuntimeChoice, 'device' | 'activations'>,
): Promise<ChosenDevice> {
  const tensors = [...source.checkpoint.names()].map((name) => source.checkpoint.info(name));
  const largestTensor = Math.max(0, ...tensors.map(({ dtype, shape }) => byteLength(dtype, shape)));
  const device = await chooseDevice(options.device, { largestTensor, activations: options.activations });
  context.progress.note(`device: ${device.name} (${device.reason})`);
  return device;
}

/** Opens the backend that runs a model, saying which; `use` gets it, and it is disposed of afterwards. */
export async function withBackend<T>(
  context: CommandContext,
  source: ModelSource,
  options: RuntimeChoice,
  use: (backend: Backend) => Promise<T>,
): Promise<T> {
  return onDevice((await pickDevice(context, source, options)).name, options, use);
}

/** Opens a device's backend; `use` gets it, and it is disposed of afterwards. */
export async function onDevice<T>(
  device: ChosenDevice['name'],
  { threads, activations, precision = 'auto' }: Omit<RuntimeChoice, 'device'>,
  use: (backend: Backend) => Promise<T>,
): Promise<T> {
  const backend = await openBackend(device, { threads, activations, precision });
  try {
    return await use(backend);
  } finally {
    await backend.dispose();
  }
}

/** Loads a model onto a backend with progress; `use` gets it, and it is released afterwards. */
export async function withDecoder<T>(
  context: CommandContext,
  backend: Backend,
  source: ModelSource,
  use: (decoder: Decoder) => Promise<T>,
  options: { readonly headBits?: 8 | 16 } = {},
): Promise<T> {
  const decoder = await loadDecoder(backend, source, {
    onProgress: context.progress.listener,
    headBits: options.headBits,
  });
  try {
    return await use(decoder);
  } finally {
    decoder.release();
  }
}

/** The machine, for results. */
export function machineInfo(): Readonly<Record<string, string | number>> {
  const cores = cpus();
  return {
    platform: `${platform()} ${arch()}`,
    cpu: cores[0]?.model.trim() ?? 'unknown',
    cores: cores.length,
    memoryBytes: totalmem(),
    node: process.versions.node,
  };
}
