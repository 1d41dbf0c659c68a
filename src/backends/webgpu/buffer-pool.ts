// GPU buffers used again by size: allocating is slow, and a decoder asks for the same few sizes for ever.
import { GyreError } from '../../core/errors.js';

/** Bytes of idle buffers that are always kept. */
const IDLE_BYTES = 4 * 2 ** 30;
/** Beyond that, idle bytes kept per byte in use: a training step wants again all that it gave back, and allocating is slow. */
const IDLE_SHARE = 2;

/** See {@link BufferPool.take}. */
export class BufferPool {
  readonly #make: (bytes: number) => GPUBuffer;
  readonly #budget: number;
  readonly #submit: () => void;
  readonly #idle = new Map<number, GPUBuffer[]>();
  /** Buffers in use with their bytes: asking a buffer itself is a call into the GPU's library. */
  readonly #live = new Map<GPUBuffer, number>();
  /** Buffers to destroy once the commands that use them are submitted. */
  #doomed: GPUBuffer[] = [];
  #idleBytes = 0;
  allocatedBytes = 0;

  /** `submit`: submits what is recorded, so that idle buffers can be destroyed before others take their place. */
  constructor(make: (bytes: number) => GPUBuffer, budget: number, submit: () => void) {
    this.#make = make;
    this.#budget = budget;
    this.#submit = submit;
  }

  /** A buffer of at least `bytes`, contents undefined. @throws GyreError `out-of-memory` beyond the budget. */
  take(bytes: number): GPUBuffer {
    const size = sizeClass(bytes);
    let buffer = this.#idle.get(size)?.pop();
    if (buffer) {
      this.#idleBytes -= size;
    } else {
      if (this.allocatedBytes + size > this.#budget) {
        this.#drop();
        this.#submit();
      }
      if (this.allocatedBytes + size > this.#budget)
        throw new GyreError(
          'out-of-memory',
          `${size} more bytes of GPU memory would exceed the budget of ${this.#budget} (${this.allocatedBytes} in use)`,
          { remedy: 'raise the memory budget, or use a smaller batch or context' },
        );
      buffer = this.#make(size);
      this.allocatedBytes += size;
    }
    this.#live.set(buffer, size);
    return buffer;
  }

  /** Takes a buffer back. Giving one back twice does nothing. */
  give(buffer: GPUBuffer): void {
    const size = this.#live.get(buffer);
    if (size === undefined) return;
    this.#live.delete(buffer);
    const inUse = this.allocatedBytes - this.#idleBytes - size;
    if (this.#idleBytes + size > Math.max(IDLE_BYTES, IDLE_SHARE * inUse)) {
      this.#doom(buffer, size);
      return;
    }
    const list = this.#idle.get(size);
    if (list) list.push(buffer);
    else this.#idle.set(size, [buffer]);
    this.#idleBytes += size;
  }

  /** Called after each submission. */
  submitted(): void {
    for (const buffer of this.#doomed) buffer.destroy();
    this.#doomed = [];
  }

  /** Destroys every buffer, those in use too. */
  dispose(): void {
    this.#drop();
    this.submitted();
    for (const buffer of this.#live.keys()) buffer.destroy();
    this.#live.clear();
    this.allocatedBytes = 0;
  }

  #drop(): void {
    for (const [size, list] of this.#idle) for (const buffer of list) this.#doom(buffer, size);
    this.#idle.clear();
    this.#idleBytes = 0;
  }

  #doom(buffer: GPUBuffer, size: number): void {
    this.allocatedBytes -= size;
    this.#doomed.push(buffer);
  }
}

/** Most bytes of idle staging buffers kept. */
const IDLE_STAGING_BYTES = 256 * 2 ** 20;

/** Buffers through which GPU memory is read back, used again: drivers take a millisecond to map a new one. */
export class StagingPool {
  readonly #device: GPUDevice;
  readonly #idle = new Map<number, GPUBuffer[]>();
  #idleBytes = 0;

  constructor(device: GPUDevice) {
    this.#device = device;
  }

  /** An unmapped buffer of at least `bytes`. */
  take(bytes: number): GPUBuffer {
    const size = sizeClass(bytes);
    const known = this.#idle.get(size)?.pop();
    if (!known)
      return this.#device.createBuffer({
        label: 'read back',
        size,
        usage: GPUBufferUsage.COPY_DST | GPUBufferUsage.MAP_READ,
      });
    this.#idleBytes -= size;
    return known;
  }

  /** Takes a mapped buffer back; one whose mapping failed is let go. */
  give(buffer: GPUBuffer): void {
    if (buffer.mapState !== 'mapped' || this.#idleBytes + buffer.size > IDLE_STAGING_BYTES) {
      buffer.destroy();
      return;
    }
    buffer.unmap();
    const list = this.#idle.get(buffer.size);
    if (list) list.push(buffer);
    else this.#idle.set(buffer.size, [buffer]);
    this.#idleBytes += buffer.size;
  }

  dispose(): void {
    for (const list of this.#idle.values()) for (const buffer of list) buffer.destroy();
    this.#idle.clear();
    this.#idleBytes = 0;
  }
}

/** Most bytes of idle upload buffers kept. */
const IDLE_UPLOAD_BYTES = 2 ** 30;

/** Mapped buffers through which data go to the GPU, used again when the copies out of them are done. */
export class UploadPool {
  readonly #device: GPUDevice;
  readonly #idle = new Map<number, GPUBuffer[]>();
  #idleBytes = 0;
  /** Filled since the last submission. */
  #filled: GPUBuffer[] = [];
  #disposed = false;

  constructor(device: GPUDevice) {
    this.#device = device;
  }

  /** Bytes filled since the last submission. */
  get filledBytes(): number {
    return this.#filled.reduce((sum, buffer) => sum + buffer.size, 0);
  }

  /** A buffer with these bytes at its start, to be copied from in the next submission. */
  fill(data: ArrayBufferView): GPUBuffer {
    const size = sizeClass(data.byteLength);
    let buffer = this.#idle.get(size)?.pop();
    if (buffer) this.#idleBytes -= size;
    else
      buffer = this.#device.createBuffer({
        label: 'upload',
        size,
        usage: GPUBufferUsage.MAP_WRITE | GPUBufferUsage.COPY_SRC,
        mappedAtCreation: true,
      });
    const bytes = new Uint8Array(data.buffer, data.byteOffset, data.byteLength);
    new Uint8Array(buffer.getMappedRange(0, data.byteLength)).set(bytes);
    buffer.unmap();
    this.#filled.push(buffer);
    return buffer;
  }

  /** Called after each submission. */
  submitted(): void {
    const filled = this.#filled;
    this.#filled = [];
    for (const buffer of filled)
      buffer.mapAsync(GPUMapMode.WRITE).then(
        () => this.#take(buffer),
        // A lost device, which is reported where somebody waits.
        () => buffer.destroy(),
      );
  }

  dispose(): void {
    this.#disposed = true;
    for (const list of this.#idle.values()) for (const buffer of list) buffer.destroy();
    for (const buffer of this.#filled) buffer.destroy();
    this.#idle.clear();
  }

  #take(buffer: GPUBuffer): void {
    if (this.#disposed || this.#idleBytes + buffer.size > IDLE_UPLOAD_BYTES) {
      buffer.destroy();
      return;
    }
    const list = this.#idle.get(buffer.size);
    if (list) list.push(buffer);
    else this.#idle.set(buffer.size, [buffer]);
    this.#idleBytes += buffer.size;
  }
}

/** Sizes are rounded up to an eighth of their power of two, so that similar ones share buffers and little is wasted. */
function sizeClass(bytes: number): number {
  const size = Math.max(256, bytes);
  const step = Math.max(256, 2 ** (Math.ceil(Math.log2(size)) - 4));
  return Math.ceil(size / step) * step;
}
