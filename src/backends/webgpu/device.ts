// The device layer: one GPU device with pooled buffers, kernels compiled once, dispatches gathered into few submissions,
// and every asynchronous error turned into a typed one at the next point that waits.
import { GyreError } from '../../core/errors.js';
import {
  checkBufferSize,
  probe,
  requiredFeatures,
  readLimits,
  type FeatureChoice,
  type GpuCapabilities,
  type GpuLimits,
} from './capabilities.js';
import { packParams, paramBytes, paramsOf, type Kernel, type Param } from './kernel.js';
import { BufferPool, StagingPool, UploadPool } from './buffer-pool.js';
import { Profile, type KernelTime } from './profile.js';
import { webgpuEntry } from './provider.js';

/** Options of {@link GpuDevice.open}. */
export interface GpuDeviceOptions {
  /** Most bytes of GPU memory to allocate; default: what the GPU gives. */
  readonly memoryBytes?: number;
  /** Features to do without, for testing. */
  readonly features?: FeatureChoice;
  readonly powerPreference?: GPUPowerPreference;
  /** WebGPU's entry point; default: this machine's. */
  readonly entry?: GPU;
}

/** Part of a GPU buffer. `offset` is a multiple of 256. */
export interface BufferSlice {
  readonly buffer: GPUBuffer;
  readonly offset: number;
  readonly bytes: number;
}

/** Workgroups in x, y, z. */
export type Workgroups = readonly [number, number?, number?];

/** A dispatch whose pipeline, bindings and parameters are fixed: made once, run many times. */
export interface PreparedDispatch {
  readonly name: string;
  readonly pipeline: GPUComputePipeline;
  readonly bindGroup: GPUBindGroup;
  /** What it reads and writes. */
  readonly buffers: readonly GPUBuffer[];
  readonly groups: Workgroups;
}

type Binding = Pick<PreparedDispatch, 'bindGroup' | 'buffers'>;

interface Compiled {
  readonly pipeline: GPUComputePipeline;
  readonly layout: GPUBindGroupLayout;
  /** Names of its buffers in binding order, and its parameters. */
  readonly names: readonly string[];
  readonly params: readonly Param[];
  readonly paramBytes: number;
  /** Bindings made so far, by {@link GpuDevice.#key} of their buffers. */
  readonly bindings: Map<string, Binding>;
}

/** Kernels compiled so far: by their code, and by themselves, which is quicker to look up. */
class CompiledKernels {
  readonly byCode = new Map<string, Compiled>();
  readonly byKernel = new WeakMap<Kernel, Compiled>();
}

/** Bindings kept per kernel. The pool hands the same buffers out again and again, so loops
 * need few, and a pass through a large model one per layer and use. */
const MOST_BINDINGS = 2048;

/** Bytes between uniform blocks of dispatches in one submission. */
const UNIFORM_STRIDE = 256;
const UNIFORM_SLOTS = 256;
/** Uploads from this many bytes on are staged. */
const STAGED_BYTES = 256 * 2 ** 10;
/** Bytes waiting in staging memory at most, before they are submitted. */
const MOST_STAGED_BYTES = 64 * 2 ** 20;
/** Dispatches gathered before they are submitted: few enough that the GPU starts early, many enough that submitting is cheap. */
const BATCH = 64;

/** An open GPU. */
export class GpuDevice {
  readonly device: GPUDevice;
  readonly capabilities: GpuCapabilities;
  readonly limits: GpuLimits;
  readonly #pool: BufferPool;
  readonly #staging: StagingPool;
  readonly #uploads: UploadPool;
  /** Kernels of dispatches, whose parameters lie anywhere in {@link GpuDevice.#uniforms}, and of prepared ones, which have their own. */
  readonly #compiled = { dispatch: new CompiledKernels(), prepare: new CompiledKernels() };
  /** Numbers of buffers, for the keys of bindings. */
  readonly #numbers = new WeakMap<GPUBuffer, number>();
  #lastNumber = 0;
  readonly #uniforms: GPUBuffer;
  readonly #uniformData = new DataView(new ArrayBuffer(UNIFORM_STRIDE * UNIFORM_SLOTS));
  #slots = 0;
  #dispatches = 0;
  /** Buffers of the commands that are recorded and not submitted. */
  #recorded: (readonly GPUBuffer[])[] = [];
  #encoder: GPUCommandEncoder | undefined;
  #pass: GPUComputePassEncoder | undefined;
  /** The pipeline the pass has set: every call into Dawn costs about as much as a small kernel. */
  #bound: GPUComputePipeline | undefined;
  #profile: Profile | undefined;
  /** The first error whose cause is known by name; it outranks what follows from it without a name. */
  #failure: GyreError | undefined;
  #uncaptured: GyreError | undefined;
  readonly #scopes = new Set<Promise<void>>();
  #disposed = false;

  private constructor(device: GPUDevice, capabilities: GpuCapabilities, options: GpuDeviceOptions) {
    this.device = device;
    this.capabilities = capabilities;
    this.limits = readLimits(device);
    this.#pool = new BufferPool((bytes) => this.#allocate(bytes), options.memoryBytes ?? Infinity);
    this.#staging = new StagingPool(device);
    this.#uploads = new UploadPool(device);
    this.#uniforms = device.createBuffer({
      label: 'uniforms',
      size: UNIFORM_STRIDE * UNIFORM_SLOTS,
      usage: GPUBufferUsage.UNIFORM | GPUBufferUsage.COPY_DST,
    });
    device.addEventListener('uncapturederror', (event) => {
      this.#uncaptured ??= describe(event.error, 'a GPU command');
    });
    void device.lost.then((info) => {
      if (this.#disposed) return;
      this.#fail(
        new GyreError('device-lost', `the GPU was lost: ${info.message || info.reason}`, {
          remedy: 'open the backend again and reload the model; if it happens again, use less memory or --device cpu',
        }),
      );
    });
  }

  /** Opens the machine's GPU. @throws GyreError `unsupported` when there is none. */
  static async open(options: GpuDeviceOptions = {}): Promise<GpuDevice> {
    const gpu = options.entry ?? (await webgpuEntry());
    const adapter = await gpu.requestAdapter({ powerPreference: options.powerPreference ?? 'high-performance' });
    if (!adapter)
      throw new GyreError('unsupported', 'WebGPU found no GPU on this machine', {
        remedy: 'see `gyre doctor` for what is missing, or use --device cpu',
      });
    const capabilities = probe(gpu, adapter, options.features);
    const device = await adapter.requestDevice({
      label: 'gyre',
      requiredFeatures: requiredFeatures(capabilities),
      requiredLimits: readLimits(adapter),
    });
    return new GpuDevice(device, capabilities, options);
  }

  /** Bytes of buffers now allocated, idle pooled ones included. */
  get allocatedBytes(): number {
    return this.#pool.allocatedBytes;
  }

  /** A storage buffer with undefined contents, from the pool. `bytes` are rounded up to a multiple of 16. */
  buffer(bytes: number, what = 'a tensor'): GPUBuffer {
    this.#check();
    checkBufferSize(this.limits, bytes, what);
    return this.#pool.take(bytes);
  }

  /** Gives a buffer back to the pool. Commands recorded before still see its contents. */
  release(buffer: GPUBuffer): void {
    this.#pool.give(buffer);
  }

  /** Copies host data into a buffer; earlier commands see the old contents, later ones the new. */
  upload(buffer: GPUBuffer, data: ArrayBufferView, offset = 0): void {
    if (data.byteLength >= STAGED_BYTES && data.byteLength % 4 === 0) {
      // Through memory that is mapped already: the queue's own way takes fresh memory each time, at a tenth of the speed.
      const staging = this.#uploads.fill(data);
      this.copy(staging, 0, buffer, offset, data.byteLength);
      if (this.#uploads.filledBytes > MOST_STAGED_BYTES) this.flush();
      return;
    }
    // Writes come before all that is not submitted yet, which only matters to commands with the same buffer.
    if (this.#recorded.some((buffers) => buffers.includes(buffer))) this.flush();
    const whole = data.byteLength & ~3;
    const source = data.buffer as ArrayBuffer;
    if (whole > 0) this.device.queue.writeBuffer(buffer, offset, source, data.byteOffset, whole);
    if (whole === data.byteLength) return;
    // Writes are in words: the last, partial one is padded with zeros.
    const rest = new Uint8Array(4);
    rest.set(new Uint8Array(source, data.byteOffset + whole, data.byteLength - whole));
    this.device.queue.writeBuffer(buffer, offset + whole, rest);
  }

  /** Copies between buffers on the GPU. Offsets and size are multiples of 4. */
  copy(from: GPUBuffer, fromOffset: number, to: GPUBuffer, toOffset: number, bytes: number): void {
    this.#check();
    this.#endPass();
    this.#commands().copyBufferToBuffer(from, fromOffset, to, toOffset, bytes);
    this.#recorded.push([from, to]);
    this.#dispatches++;
  }

  /** Reads part of a buffer back, after all earlier commands. @throws GyreError what any earlier command failed with. */
  async read(buffer: GPUBuffer, offset: number, bytes: number): Promise<ArrayBuffer> {
    this.#check();
    const size = Math.max(4, (bytes + 3) & ~3);
    const staging = this.#staging.take(size);
    try {
      this.copy(buffer, offset, staging, 0, size);
      this.flush();
      await staging.mapAsync(GPUMapMode.READ, 0, size).catch((cause: unknown) => {
        this.#check();
        throw new GyreError('backend', 'reading GPU memory failed', { cause });
      });
      await this.#settle();
      return staging.getMappedRange(0, size).slice(0, bytes);
    } finally {
      this.#staging.give(staging);
    }
  }

  /** Records one dispatch. Buffers are by the kernel's names; values are bound whole unless they are slices. */
  dispatch<B extends string, P extends string>(
    kernel: Kernel<B, P>,
    buffers: Readonly<Record<NoInfer<B>, GPUBuffer | BufferSlice>>,
    params: Readonly<Record<NoInfer<P>, number>>,
    groups: Workgroups,
  ): void {
    this.#check();
    if (groups[0] === 0 || groups[1] === 0 || groups[2] === 0) return;
    const compiled = this.#compile(kernel, 'dispatch');
    // Here, since parameters go with the submission that they are written for.
    if (this.#profile?.full) this.flush();
    const { paramBytes: size } = compiled;
    let offset: number | undefined;
    if (size > 0) {
      if (this.#slots === UNIFORM_SLOTS) this.flush();
      offset = this.#slots++ * UNIFORM_STRIDE;
      packParams(compiled.params, params, this.#uniformData, offset);
    }
    // Making a binding takes longer than all the rest of a dispatch.
    const key = this.#key(compiled, buffers);
    let binding = compiled.bindings.get(key);
    if (!binding) {
      if (compiled.bindings.size >= MOST_BINDINGS) compiled.bindings.clear();
      binding = this.#bind(kernel, compiled, buffers, size > 0 ? { buffer: this.#uniforms, size } : undefined);
      compiled.bindings.set(key, binding);
    }
    this.#encode(kernel.name, compiled.pipeline, binding, groups, offset);
    if (this.#dispatches >= BATCH) this.flush();
  }

  /**
   * A dispatch with everything fixed, parameters included: nothing is written or created when it runs. The buffers must
   * outlive it.
   */
  prepare<B extends string, P extends string>(
    kernel: Kernel<B, P>,
    buffers: Readonly<Record<NoInfer<B>, GPUBuffer | BufferSlice>>,
    params: Readonly<Record<NoInfer<P>, number>>,
    groups: Workgroups,
  ): PreparedDispatch {
    this.#check();
    const compiled = this.#compile(kernel, 'prepare');
    const { paramBytes: size } = compiled;
    let uniform: GPUBufferBinding | undefined;
    if (size > 0) {
      const buffer = this.device.createBuffer({
        label: `${kernel.name} parameters`,
        size,
        usage: GPUBufferUsage.UNIFORM,
        mappedAtCreation: true,
      });
      packParams(compiled.params, params, new DataView(buffer.getMappedRange()));
      buffer.unmap();
      uniform = { buffer };
    }
    return {
      name: kernel.name,
      pipeline: compiled.pipeline,
      ...this.#bind(kernel, compiled, buffers, uniform),
      groups,
    };
  }

  /** Records prepared dispatches in order. */
  run(dispatches: readonly PreparedDispatch[]): void {
    this.#check();
    for (const dispatch of dispatches) this.#encode(dispatch.name, dispatch.pipeline, dispatch, dispatch.groups);
  }

  /** Submits what is recorded; doesn't wait. */
  flush(): void {
    const encoder = this.#encoder;
    if (!encoder) return;
    this.#endPass();
    this.#profile?.resolve(encoder);
    if (this.#slots > 0)
      this.device.queue.writeBuffer(this.#uniforms, 0, this.#uniformData.buffer, 0, this.#slots * UNIFORM_STRIDE);
    this.device.queue.submit([encoder.finish()]);
    this.#encoder = undefined;
    this.#recorded = [];
    this.#slots = 0;
    this.#dispatches = 0;
    this.#pool.submitted();
    this.#uploads.submitted();
    this.#profile?.submitted();
  }

  /** Waits for everything submitted so far. @throws GyreError what any command failed with. */
  async sync(): Promise<void> {
    this.flush();
    await this.device.queue.onSubmittedWorkDone();
    await this.#settle();
  }

  /** From here on, times every dispatch on the GPU (in a pass of its own, which costs some speed). */
  startProfile(): void {
    this.flush();
    if (!this.capabilities.timestamps)
      throw new GyreError('unsupported', 'this GPU has no timestamp queries; kernels can not be timed');
    this.#profile = new Profile(this.device);
  }

  /** Ends {@link startProfile}: time per kernel, the longest first. */
  async stopProfile(): Promise<KernelTime[]> {
    const profile = this.#profile;
    await this.sync();
    this.#profile = undefined;
    return profile ? profile.times() : [];
  }

  /** Frees everything; the device can't be used after. */
  async dispose(): Promise<void> {
    if (this.#disposed) return;
    this.#disposed = true;
    this.#encoder = undefined;
    this.#pass = undefined;
    this.#profile?.dispose();
    for (const { byCode } of Object.values(this.#compiled)) byCode.clear();
    this.#pool.dispose();
    this.#staging.dispose();
    this.#uploads.dispose();
    this.device.destroy();
    await this.device.lost;
  }

  #commands(): GPUCommandEncoder {
    this.#encoder ??= this.device.createCommandEncoder();
    return this.#encoder;
  }

  #endPass(): void {
    this.#pass?.end();
    this.#pass = undefined;
  }

  /** `offset`: of the parameters, for what was compiled for dispatches. */
  #encode(
    name: string,
    pipeline: GPUComputePipeline,
    { bindGroup, buffers }: Binding,
    groups: Workgroups,
    offset?: number,
  ): void {
    if (this.#profile) {
      this.#endPass();
      if (this.#profile.full) this.flush();
    }
    const encoder = this.#commands();
    const profiled = this.#profile?.next(name);
    let pass = this.#pass;
    if (!pass) {
      pass = this.#pass = encoder.beginComputePass(profiled && { timestampWrites: profiled });
      this.#bound = undefined;
    }
    if (this.#bound !== pipeline) pass.setPipeline(pipeline);
    this.#bound = pipeline;
    if (offset === undefined) pass.setBindGroup(0, bindGroup);
    else pass.setBindGroup(0, bindGroup, [offset]);
    pass.dispatchWorkgroups(groups[0], groups[1] ?? 1, groups[2] ?? 1);
    this.#recorded.push(buffers);
    this.#dispatches++;
    if (profiled) this.#endPass();
  }

  #compile(kernel: Kernel, use: 'dispatch' | 'prepare'): Compiled {
    const { byCode, byKernel } = this.#compiled[use];
    let known = byKernel.get(kernel);
    if (known) return known;
    known = byCode.get(kernel.code);
    if (known) {
      byKernel.set(kernel, known);
      return known;
    }
    const { device } = this;
    device.pushErrorScope('out-of-memory');
    device.pushErrorScope('internal');
    device.pushErrorScope('validation');
    const module = device.createShaderModule({ label: kernel.name, code: kernel.code });
    const entries: GPUBindGroupLayoutEntry[] = [];
    const add = (type: GPUBufferBindingType, hasDynamicOffset = false): void => {
      const buffer = { type, hasDynamicOffset };
      entries.push({ binding: entries.length, visibility: GPUShaderStage.COMPUTE, buffer });
    };
    const params = paramsOf(kernel);
    if (params.length > 0) add('uniform', use === 'dispatch');
    for (const { access } of Object.values(kernel.buffers)) add(access === 'read' ? 'read-only-storage' : 'storage');
    const layout = device.createBindGroupLayout({ label: kernel.name, entries });
    const pipeline = device.createComputePipeline({
      label: kernel.name,
      layout: device.createPipelineLayout({ bindGroupLayouts: [layout] }),
      compute: { module, entryPoint: 'main' },
    });
    for (let i = 0; i < 3; i++) this.#watch(device.popErrorScope(), `kernel '${kernel.name}'`);
    const compiled: Compiled = {
      pipeline,
      layout,
      names: Object.keys(kernel.buffers),
      params,
      paramBytes: paramBytes(params),
      bindings: new Map(),
    };
    byCode.set(kernel.code, compiled);
    byKernel.set(kernel, compiled);
    return compiled;
  }

  /** What tells a kernel's bindings apart. */
  #key({ names }: Compiled, buffers: Readonly<Record<string, GPUBuffer | BufferSlice>>): string {
    let key = '';
    for (const name of names) {
      const value = buffers[name];
      key +=
        'bytes' in value ? `${this.#number(value.buffer)}+${value.offset}:${value.bytes},` : `${this.#number(value)},`;
    }
    return key;
  }

  #number(buffer: GPUBuffer): number {
    let number = this.#numbers.get(buffer);
    if (number === undefined) this.#numbers.set(buffer, (number = ++this.#lastNumber));
    return number;
  }

  #bind(
    { name }: Kernel,
    { layout, names }: Compiled,
    buffers: Readonly<Record<string, GPUBuffer | BufferSlice>>,
    uniform: GPUBufferBinding | undefined,
  ): Binding {
    const bound = names.map((own): GPUBufferBinding => {
      const value = buffers[own];
      return 'bytes' in value
        ? { buffer: value.buffer, offset: value.offset, size: (value.bytes + 3) & ~3 }
        : { buffer: value };
    });
    const entries = [...(uniform ? [uniform] : []), ...bound].map((resource, binding) => ({ binding, resource }));
    return {
      bindGroup: this.device.createBindGroup({ label: name, layout, entries }),
      buffers: bound.map(({ buffer }) => buffer),
    };
  }

  #allocate(bytes: number): GPUBuffer {
    this.device.pushErrorScope('out-of-memory');
    const buffer = this.device.createBuffer({
      size: bytes,
      usage: GPUBufferUsage.STORAGE | GPUBufferUsage.COPY_SRC | GPUBufferUsage.COPY_DST,
    });
    this.#watch(this.device.popErrorScope(), `allocating ${bytes} bytes`);
    return buffer;
  }

  /** Remembers what an error scope caught, for the next point that waits. */
  #watch(scope: Promise<GPUError | null>, what: string): void {
    const settled = scope
      .then(
        (error) => error && this.#fail(describe(error, what)),
        () => undefined,
      )
      .then(() => void this.#scopes.delete(settled));
    this.#scopes.add(settled);
  }

  #fail(error: GyreError): void {
    this.#failure ??= error;
  }

  async #settle(): Promise<void> {
    await Promise.all(this.#scopes);
    this.#check();
  }

  #check(): void {
    if (this.#disposed) throw new GyreError('backend', 'the WebGPU backend was used after it was disposed of');
    const failure = this.#failure ?? this.#uncaptured;
    if (failure) throw failure;
  }
}

function describe(error: GPUError, what: string): GyreError {
  if (error instanceof GPUOutOfMemoryError)
    return new GyreError('out-of-memory', `${what}: the GPU is out of memory (${error.message})`, {
      remedy: 'use a smaller batch, context or model, or --device cpu',
      cause: error,
    });
  return new GyreError('backend', `${what} failed on the GPU: ${error.message}`, { cause: error });
}
