// Kernels compiled for a device. Drivers take up to tenths of a second for one, so they are compiled beside one another and beside the
// host, which goes on recording; the device runs what was recorded when its pipelines are there.
import { paramBytes, paramsOf, type Kernel, type Param } from './kernel.js';

/** What a dispatch reads and writes. */
export interface Binding {
  readonly bindGroup: GPUBindGroup;
  readonly buffers: readonly GPUBuffer[];
}

/** A kernel that is compiled, or about to be. */
export interface CompiledKernel {
  /** Undefined while it is being compiled, and where that failed. */
  readonly pipeline: GPUComputePipeline | undefined;
  readonly failed: boolean;
  readonly layout: GPUBindGroupLayout;
  /** Names of its buffers in binding order, and its parameters. */
  readonly names: readonly string[];
  readonly params: readonly Param[];
  readonly paramBytes: number;
  /** Bindings made so far, by what tells their buffers apart. */
  readonly bindings: Map<string, Binding>;
}

/** Where parameters are: anywhere in a buffer that dispatches share, or in one of the dispatch's own. */
export type ParamPlace = 'shared' | 'own';

/** What a device wants to be told. */
export interface CompileEvents {
  /** An error scope that was closed around what belongs to a kernel. */
  watch(scope: Promise<GPUError | null>, what: string): void;
  /** A pipeline could not be made. */
  fail(error: unknown, what: string): void;
  /** A kernel is compiled, or has failed. */
  settled(): void;
}

/** Kernels compiled so far: by their code, and by themselves, which is quicker to look up. */
class Known {
  readonly byCode = new Map<string, CompiledKernel>();
  readonly byKernel = new WeakMap<Kernel, CompiledKernel>();
}

/** See the head of this file. */
export class Pipelines {
  readonly #device: GPUDevice;
  readonly #events: CompileEvents;
  readonly #known: Readonly<Record<ParamPlace, Known>> = { shared: new Known(), own: new Known() };
  readonly #pending = new Set<Promise<void>>();

  constructor(device: GPUDevice, events: CompileEvents) {
    this.#device = device;
    this.#events = events;
  }

  /** A kernel's pipeline and layout; compiling begins when it is first asked for. */
  get(kernel: Kernel, place: ParamPlace): CompiledKernel {
    const { byCode, byKernel } = this.#known[place];
    let known = byKernel.get(kernel);
    if (known) return known;
    known = byCode.get(kernel.code) ?? this.#compile(kernel, place);
    byCode.set(kernel.code, known);
    byKernel.set(kernel, known);
    return known;
  }

  /** Waits for what is being compiled and forgets everything. */
  async dispose(): Promise<void> {
    await Promise.all(this.#pending);
    for (const { byCode } of Object.values(this.#known)) byCode.clear();
  }

  #compile(kernel: Kernel, place: ParamPlace): CompiledKernel {
    const device = this.#device;
    const what = `kernel '${kernel.name}'`;
    const params = paramsOf(kernel);
    device.pushErrorScope('internal');
    device.pushErrorScope('validation');
    const module = device.createShaderModule({ label: kernel.name, code: kernel.code });
    const entries: GPUBindGroupLayoutEntry[] = [];
    const add = (type: GPUBufferBindingType, hasDynamicOffset = false): void => {
      const buffer = { type, hasDynamicOffset };
      entries.push({ binding: entries.length, visibility: GPUShaderStage.COMPUTE, buffer });
    };
    if (params.length > 0) add('uniform', place === 'shared');
    for (const { access } of Object.values(kernel.buffers)) add(access === 'read' ? 'read-only-storage' : 'storage');
    const layout = device.createBindGroupLayout({ label: kernel.name, entries });
    const pipelineLayout = device.createPipelineLayout({ bindGroupLayouts: [layout] });
    const scopes = [device.popErrorScope(), device.popErrorScope()];
    for (const scope of scopes) this.#events.watch(scope, what);
    const compiled = {
      pipeline: undefined as GPUComputePipeline | undefined,
      failed: false,
      layout,
      names: Object.keys(kernel.buffers),
      params,
      paramBytes: paramBytes(params),
      bindings: new Map<string, Binding>(),
    };
    const pending: Promise<void> = device
      .createComputePipelineAsync({
        label: kernel.name,
        layout: pipelineLayout,
        compute: { module, entryPoint: 'main' },
      })
      .then(
        (pipeline) => {
          compiled.pipeline = pipeline;
        },
        async (error: unknown) => {
          // What is wrong with a shader says more than that its pipeline can't be made.
          await Promise.allSettled(scopes);
          compiled.failed = true;
          this.#events.fail(error, what);
        },
      )
      .then(() => {
        this.#pending.delete(pending);
        this.#events.settled();
      });
    this.#pending.add(pending);
    return compiled;
  }
}
