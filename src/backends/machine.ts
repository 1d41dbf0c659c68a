// What each backend finds on this machine: the facts behind `gyre doctor`.
import { VERSION } from '../version.js';
import { openBackend, type ChosenDevice } from './registry.js';

/** One backend's findings. */
export interface BackendFinding {
  readonly name: ChosenDevice['name'];
  readonly available: boolean;
  /** What it runs on; undefined when it can't. */
  readonly description?: string;
  /** Facts in the order to show them, numbers and lists included. */
  readonly details: Readonly<Record<string, string | number | readonly string[]>>;
  /** Bytes per second of copies in its memory, reads and writes both counted. */
  readonly copyBytesPerSecond?: number;
  /** Why it can't run, and what to do about it. */
  readonly reason?: string;
  readonly remedy?: string;
}

/** See {@link inspectMachine}. */
export interface MachineFindings {
  readonly version: string;
  readonly backends: readonly BackendFinding[];
}

/** Looks at every backend and measures its memory. */
export async function inspectMachine(): Promise<MachineFindings> {
  return { version: VERSION, backends: [await inspectCpu(), await inspectWebGpu()] };
}

async function inspectCpu(): Promise<BackendFinding> {
  const backend = await openBackend('cpu');
  const { description, threads } = backend.info;
  await backend.dispose();
  return {
    name: 'cpu',
    available: true,
    description,
    details: { threads },
    copyBytesPerSecond: measureHostCopy(),
  };
}

async function inspectWebGpu(): Promise<BackendFinding> {
  const { measureGpuCopy, probeWebGpu, hasMatrixUnits } = await import('./webgpu/probe.js');
  const found = await probeWebGpu();
  if (!found.available)
    return { name: 'webgpu', available: false, details: {}, reason: found.reason, remedy: found.remedy };
  const { capabilities, features, limits, version } = found;
  const { subgroups, subgroupMatrices } = capabilities;
  return {
    name: 'webgpu',
    available: true,
    description: capabilities.description,
    details: {
      ...(version !== undefined && { dawn: version }),
      vendor: capabilities.vendor,
      architecture: capabilities.architecture,
      kind: capabilities.software ? 'software: runs on the CPU, for tests; --device auto does not take it' : 'hardware',
      'shader-f16': capabilities.f16 ? 'yes' : 'no',
      subgroups: subgroups ? `${[...new Set([subgroups.min, subgroups.max])].join(' to ')} lanes` : 'no',
      'subgroup matrices': subgroupMatrices.map((m) => `${m.m}×${m.n}×${m.k} ${m.component} → ${m.result}`),
      // What --precision auto comes to, and what runs either way.
      'many rows': hasMatrixUnits(capabilities)
        ? 'f16 on matrix units: products, rotations, attention; tiled f32 with --precision f32'
        : 'tiled f32 (no matrix units for f16 in subgroups of 32); f16 activations with --precision f16',
      timestamps: capabilities.timestamps ? 'yes' : 'no',
      features,
      ...limits,
    },
    copyBytesPerSecond: await measureGpuCopy(),
  };
}

/** Bytes copied at a time: more than any cache. */
const COPY_BYTES = 128 * 2 ** 20;

/** Bytes per second that one thread copies in host memory, reads and writes both counted; best of five. */
function measureHostCopy(): number {
  const from = new Uint8Array(COPY_BYTES).fill(1);
  const to = new Uint8Array(COPY_BYTES);
  let best = 0;
  for (let run = 0; run < 5; run++) {
    const start = performance.now();
    to.set(from);
    best = Math.max(best, (2 * COPY_BYTES) / ((performance.now() - start) / 1000));
  }
  return best;
}
