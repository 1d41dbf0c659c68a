// The kernel pool: WebAssembly instances of the kernels in several threads over one memory, and the dispatch of jobs.
//
// A job is one kernel over units [0, n), cut into contiguous ranges that threads take one after another: a thread that the
// machine runs slowly, or not at all for a while, delays a job by no more than a range. Kernels partition independent
// outputs, so results are the same bits for any number of threads and any order.
import { GyreError } from '../../core/errors.js';
import { ARGUMENTS_AT, CONTROL, CONTROL_BYTES, TICKET_BITS, type Workers, type WorkerStart } from './pool-worker.js';
import { Arena } from './wasm/arena.js';
import { PLAIN_WASM, SHARED_WASM } from './wasm/kernels.generated.js';

/** Options of {@link KernelPool.create}. */
export interface PoolOptions {
  /** Threads, the caller's included; all of the machine's when undefined. */
  readonly threads?: number;
  /** Whether to use shared memory; by default where the platform has it. Without it there is one thread. */
  readonly shared?: boolean;
}

type Kernel = (...args: number[]) => number;

/** Most arguments a job can carry. */
const MAX_ARGUMENTS = (CONTROL_BYTES - ARGUMENTS_AT) / 8;
/** Scratch each thread has from the start; {@link KernelPool.ensureScratch} enlarges it. */
const SCRATCH_BYTES = 1 << 20;
/** Spin of workers when long products by others follow, and while decoding, microseconds. */
export const SHORT_SPIN = 40;
export const LONG_SPIN = 2000;
/** Ranges a job is cut into, per thread. Taking one costs about 0.2 µs. */
const PIECES = 6;
/** Polls before the main thread starts yielding its core to the workers (they may not all be running). */
const SPINS = 50_000;

/** Runs kernels on the calling thread and its workers. Not reentrant: one job at a time, and `run` blocks until done. */
export class KernelPool {
  readonly arena: Arena;
  readonly threads: number;
  readonly #kernels: Readonly<Record<string, Kernel>>;
  readonly #ids: ReadonlyMap<string, number>;
  readonly #control: Int32Array;
  readonly #arguments: Float64Array;
  readonly #workers: Workers | undefined;
  readonly #mayWait: boolean;
  #scratch: number;
  #scratchBytes = SCRATCH_BYTES;
  #sequence = 0;
  #active: number;

  private constructor(
    arena: Arena,
    module: WebAssembly.Module,
    instance: WebAssembly.Instance,
    control: Int32Array,
    threads: number,
    workers: Workers | undefined,
  ) {
    this.arena = arena;
    this.threads = threads;
    this.#active = threads;
    this.#kernels = instance.exports as Record<string, Kernel>;
    this.#ids = new Map(WebAssembly.Module.exports(module).map((e, i) => [e.name, i]));
    this.#control = control;
    this.#arguments = new Float64Array(control.buffer, ARGUMENTS_AT);
    this.#workers = workers;
    this.#mayWait = inNode();
    this.#scratch = arena.alloc(SCRATCH_BYTES * threads);
    this.spinMicroseconds = SHORT_SPIN;
  }

  /** Compiles the kernels and starts the workers. */
  static async create(options: PoolOptions = {}): Promise<KernelPool> {
    const shared = options.shared ?? typeof SharedArrayBuffer !== 'undefined';
    const platform = shared ? await (inNode() ? import('./pool.node.js') : import('./pool.web.js')) : undefined;
    const threads = Math.max(1, Math.min(64, platform ? (options.threads ?? platform.hardwareThreads()) : 1));
    const module = await WebAssembly.compile(decodeBase64(shared ? SHARED_WASM : PLAIN_WASM));
    const memory = new WebAssembly.Memory({ initial: 256, maximum: 65536, shared });
    const instance = await WebAssembly.instantiate(module, { env: { memory } });
    const arena = new Arena(memory);
    if (!platform || threads === 1) {
      return new KernelPool(arena, module, instance, new Int32Array(CONTROL_BYTES / 4), 1, undefined);
    }
    const control = new SharedArrayBuffer(CONTROL_BYTES);
    const starts = Array.from({ length: threads - 1 }, (_, i): WorkerStart => ({
      module,
      memory,
      control,
      index: i + 1,
    }));
    const workers = await platform.startWorkers(starts);
    return new KernelPool(arena, module, instance, new Int32Array(control), threads, workers);
  }

  /**
   * How long idle workers keep a core busy waiting for the next job. Decoding calls hundreds of short kernels per token
   * and wants them awake; before a long product by ONNX Runtime they should sleep.
   */
  set spinMicroseconds(value: number) {
    this.#control[CONTROL.spin] = value;
  }

  /** Threads used by the next jobs, at most {@link threads} (for measurements and tests). */
  get activeThreads(): number {
    return this.#active;
  }
  set activeThreads(count: number) {
    this.#active = Math.max(1, Math.min(this.threads, count));
  }

  /** Makes each thread's scratch at least `bytes`. */
  ensureScratch(bytes: number): void {
    if (bytes <= this.#scratchBytes) return;
    const size = Math.ceil(bytes / 4096) * 4096;
    this.arena.free(this.#scratch);
    this.#scratch = 0;
    this.#scratch = this.arena.alloc(size * this.threads);
    this.#scratchBytes = size;
  }

  /**
   * Runs `kernel(begin, end, scratch, ...args)` over units [0, units). Each thread gets at least `minUnits`, so that small
   * jobs stay on the calling thread, where no hand-over is paid.
   */
  run(kernel: string, units: number, args: readonly number[], minUnits = 1): void {
    if (units <= 0) return;
    const parts = Math.min(this.#active, Math.max(1, Math.floor(units / Math.max(1, minUnits))));
    const call = this.#kernels[kernel];
    if (parts === 1) {
      call(0, units, this.#scratch, ...args);
      return;
    }
    const control = this.#control;
    if (args.length > MAX_ARGUMENTS) throw new GyreError('backend', `kernel ${kernel} has too many arguments`);
    // No piece below minUnits either: each begins a stream of its own from memory.
    const pieces = Math.max(parts, Math.min(Math.floor(units / Math.max(1, minUnits)), parts * PIECES));
    control[CONTROL.kernel] = this.#ids.get(kernel) as number;
    control[CONTROL.units] = units;
    control[CONTROL.parts] = parts;
    control[CONTROL.pieces] = pieces;
    control[CONTROL.argumentCount] = args.length;
    control[CONTROL.scratch] = this.#scratch;
    control[CONTROL.scratchBytes] = this.#scratchBytes;
    for (let i = 0; i < args.length; i++) this.#arguments[i] = args[i];
    Atomics.store(control, CONTROL.done, 0);
    this.#publish(pieces);
    let failure: Error | undefined;
    for (;;) {
      const ticket = Atomics.load(control, CONTROL.ticket);
      const left = ticket & ((1 << TICKET_BITS) - 1);
      if (left === 0) break;
      if (Atomics.compareExchange(control, CONTROL.ticket, ticket, ticket - 1) !== ticket) continue;
      const piece = pieces - left;
      try {
        call(Math.floor((units * piece) / pieces), Math.floor((units * (piece + 1)) / pieces), this.#scratch, ...args);
      } catch (error) {
        failure = error as Error;
      }
      Atomics.add(control, CONTROL.done, 1);
    }
    this.#join(pieces);
    if (failure) throw failure;
    if (Atomics.load(control, CONTROL.failed)) {
      throw new GyreError('backend', `kernel ${kernel} failed in a worker thread`);
    }
  }

  /** Calls a kernel that is not split, on this thread; returns its result. */
  call(kernel: string, ...args: number[]): number {
    return this.#kernels[kernel](...args);
  }

  /** Stops the workers. */
  async dispose(): Promise<void> {
    if (!this.#workers) return;
    this.#control[CONTROL.stop] = 1;
    this.#publish(0);
    await this.#workers.stop();
  }

  #publish(pieces: number): void {
    this.#sequence = (this.#sequence + 1) | 0;
    Atomics.store(this.#control, CONTROL.ticket, (this.#sequence << TICKET_BITS) | pieces);
    Atomics.store(this.#control, CONTROL.sequence, this.#sequence);
    if (Atomics.load(this.#control, CONTROL.sleepers) > 0) Atomics.notify(this.#control, CONTROL.sequence);
  }

  #join(pieces: number): void {
    const control = this.#control;
    let spins = 0;
    for (;;) {
      const done = Atomics.load(control, CONTROL.done);
      if (done === pieces) return;
      // A page's main thread may not wait, only poll.
      if (++spins > SPINS && this.#mayWait) Atomics.wait(control, CONTROL.done, done, 0.05);
    }
  }
}

function inNode(): boolean {
  return typeof process !== 'undefined' && typeof process.versions?.node === 'string';
}

function decodeBase64(text: string): Uint8Array<ArrayBuffer> {
  const binary = atob(text);
  const bytes = new Uint8Array(binary.length);
  for (let i = 0; i < binary.length; i++) bytes[i] = binary.charCodeAt(i);
  return bytes;
}
