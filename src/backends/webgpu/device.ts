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
import { packParams, type Kernel } from './kernel.js';
import { BufferPool, StagingPool, UploadPool } from './buffer-pool.js';
import { Pipelines, type Binding, type CompiledKernel } from './pipelines.js';
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
export interface PreparedDispatch extends Binding {
  readonly name: string;
  readonly kernel: CompiledKernel;
  readonly groups: Workgroups;
}

/** A command that comes after one whose kernel is being compiled. */
interface Waiting {
  /** Of a dispatch. */
  readonly kernel?: CompiledKernel;
  /** Whether somebody awaits it, who must be told in any case. */
  readonly awaited?: boolean;
  run(): void;
}

/** Bindings kept per kernel. The pool hands the same buffers out again and again, so loops need few; passes of many sizes through a
 * large model need some per layer, use and size. */
const MOST_BINDINGS = 16384;

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
  readonly #pipelines: Pipelines;
  /** Everything since the first dispatch whose kernel is still being compiled, in order. */
  readonly #waiting: Waiting[] = [];
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
    this.#pool = new BufferPool(
      (bytes) => this.#allocate(bytes),
      options.memoryBytes ?? Infinity,
      () => {
        this.flush();
        if (this.#waiting.length === 0) this.#pool.submitted();
      },
    );
    this.#staging = new StagingPool(device);
    this.#uploads = new UploadPool(device);
    this.#pipelines = new Pipelines(device, {
      watch: (scope, what) => this.#watch(scope, what),
      fail: (error, what) => this.#fail(describe(error, what)),
      settled: () => this.#proceed(),
    });
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
    this.#check();
    if (this.#waiting.length > 0) {
      // The caller's data may change before its turn comes.
      const own = new Uint8Array(data.buffer as ArrayBuffer, data.byteOffset, data.byteLength).slice();
      this.#waiting.push({ run: () => this.#write(buffer, own, offset) });
    } else this.#write(buffer, data, offset);
  }

  /** Copies between buffers on the GPU. Offsets and size are multiples of 4. */
  copy(from: GPUBuffer, fromOffset: number, to: GPUBuffer, toOffset: number, bytes: number): void {
    this.#check();
    if (this.#waiting.length > 0)
      this.#waiting.push({ run: () => this.#recordCopy(from, fromOffset, to, toOffset, bytes) });
    else this.#recordCopy(from, fromOffset, to, toOffset, bytes);
  }

  /** Reads part of a buffer back, after all earlier commands. @throws GyreError what any earlier command failed with. */
  async read(buffer: GPUBuffer, offset: number, bytes: number): Promise<ArrayBuffer> {
    this.#check();
    const size = Math.max(4, (bytes + 3) & ~3);
    const staging = this.#staging.take(size);
    try {
      this.copy(buffer, offset, staging, 0, size);
      this.flush();
      if (this.#waiting.length > 0) await this.#turn();
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
    const compiled = this.#pipelines.get(kernel, 'shared');
    if (this.#waiting.length > 0 || !compiled.pipeline)
      this.#waiting.push({
        kernel: compiled,
        run: () => this.#recordDispatch(kernel, compiled, buffers, params, groups),
      });
    else this.#recordDispatch(kernel, compiled, buffers, params, groups);
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
    const compiled = this.#pipelines.get(kernel, 'own');
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
    return { name: kernel.name, kernel: compiled, ...this.#bind(kernel, compiled, buffers, uniform), groups };
  }

  /** Records prepared dispatches in order. */
  run(dispatches: readonly PreparedDispatch[]): void {
    this.#check();
    for (const dispatch of dispatches) {
      const { name, kernel, groups } = dispatch;
      if (this.#waiting.length > 0 || !kernel.pipeline)
        this.#waiting.push({ kernel, run: () => this.#encode(name, kernel, dispatch, groups) });
      else this.#encode(name, kernel, dispatch, groups);
    }
  }

  /** Submits what is recorded; doesn't wait. What waits for kernels that are being compiled follows by itself. */
  flush(): void {
    if (this.#waiting.length > 0) this.#waiting.push({ run: () => this.#submit() });
    else this.#submit();
  }

  /** Waits for everything submitted so far. @throws GyreError what any command failed with. */
  async sync(): Promise<void> {
    this.flush();
    if (this.#waiting.length > 0) await this.#turn();
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
    // Those who wait for their turn find the device gone.
    for (const waiting of this.#waiting.splice(0)) if (waiting.awaited) waiting.run();
    await this.#pipelines.dispose();
    this.#pool.dispose();
    this.#staging.dispose();
    this.#uploads.dispose();
    this.device.destroy();
    await this.device.lost;
  }

  /** When all commands so far are recorded. */
  #turn(): Promise<void> {
    return new Promise((resolve) => {
      this.#waiting.push({ awaited: true, run: resolve });
    });
  }

  /** Records what waited, up to the next kernel that is still being compiled. */
  #proceed(): void {
    for (let next = this.#waiting[0]; this.#waiting.length > 0; next = this.#waiting[0]) {
      if (next.kernel && !next.kernel.pipeline && !next.kernel.failed) return;
      this.#waiting.shift();
      // After a failure nothing is worth recording, and whoever waits is told of it.
      if (this.#failure && next.kernel) continue;
      next.run();
    }
  }

  #recordDispatch(
    kernel: Kernel,
    compiled: CompiledKernel,
    buffers: Readonly<Record<string, GPUBuffer | BufferSlice>>,
    params: Readonly<Record<string, number>>,
    groups: Workgroups,
  ): void {
    // Here, since parameters go with the submission that they are written for.
    if (this.#profile?.full) this.#submit();
    const { paramBytes: size } = compiled;
    let offset: number | undefined;
    if (size > 0) {
      if (this.#slots === UNIFORM_SLOTS) this.#submit();
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
    this.#encode(kernel.name, compiled, binding, groups, offset);
    if (this.#dispatches >= BATCH) this.#submit();
  }

  #recordCopy(from: GPUBuffer, fromOffset: number, to: GPUBuffer, toOffset: number, bytes: number): void {
    this.#endPass();
    this.#commands().copyBufferToBuffer(from, fromOffset, to, toOffset, bytes);
    this.#recorded.push([from, to]);
    this.#dispatches++;
  }

  #write(buffer: GPUBuffer, data: ArrayBufferView, offset: number): void {
    // Writes come before all that is not submitted yet, which only matters to commands with the same buffer.
    if (this.#recorded.some((buffers) => buffers.includes(buffer))) this.#submit();
    const whole = data.byteLength & ~3;
    const source = data.buffer as ArrayBuffer;
    if (whole > 0) this.device.queue.writeBuffer(buffer, offset, source, data.byteOffset, whole);
    if (whole === data.byteLength) return;
    // Writes are in words: the last, partial one is padded with zeros.
    const rest = new Uint8Array(4);
    rest.set(new Uint8Array(source, data.byteOffset + whole, data.byteLength - whole));
    this.device.queue.writeBuffer(buffer, offset + whole, rest);
  }

  #submit(): void {
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
    this.#profile?.submitted();
    // Commands that still wait may use buffers that were given up or filled in the meantime.
    if (this.#waiting.length > 0) return;
    this.#pool.submitted();
    this.#uploads.submitted();
  }

  #commands(): GPUCommandEncoder {
    this.#encoder ??= this.device.createCommandEncoder();
    return this.#encoder;
  }

  #endPass(): void {
    this.#pass?.end();
    this.#pass = undefined;
  }

  /** `offset`: of the parameters, where dispatches share a buffer for them. */
  #encode(
    name: string,
    { pipeline }: CompiledKernel,
    { bindGroup, buffers }: Binding,
    groups: Workgroups,
    offset?: number,
  ): void {
    if (!pipeline) return;
    if (this.#profile) {
      this.#endPass();
      if (this.#profile.full) this.#submit();
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

  /** What tells a kernel's bindings apart. */
  #key({ names }: CompiledKernel, buffers: Readonly<Record<string, GPUBuffer | BufferSlice>>): string {
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
    { layout, names }: CompiledKernel,
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

function describe(error: unknown, what: string): GyreError {
  if (error instanceof GPUOutOfMemoryError)
    return new GyreError('out-of-memory', `${what}: the GPU is out of memory (${error.message})`, {
      remedy: 'use a smaller batch, context or model, or --device cpu',
      cause: error,
    });
  return new GyreError(
    'backend',
    `${what} failed on the GPU: ${error instanceof Error || error instanceof GPUError ? error.message : String(error)}`,
    {
      cause: error,
    },
  );
}
