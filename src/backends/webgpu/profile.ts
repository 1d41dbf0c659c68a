// Times dispatches on the GPU with timestamp queries.

/** Time one kernel took in a profile. */
export interface KernelTime {
  readonly name: string;
  readonly calls: number;
  /** Sum over its calls. */
  readonly seconds: number;
}

const QUERIES = 512;

/** A profile being taken; see GpuDevice.startProfile. */
export class Profile {
  readonly #device: GPUDevice;
  readonly #queries: GPUQuerySet;
  readonly #resolved: GPUBuffer;
  #names: string[] = [];
  readonly #batches: { names: readonly string[]; staging: GPUBuffer }[] = [];
  #staging: GPUBuffer | undefined;

  constructor(device: GPUDevice) {
    this.#device = device;
    this.#queries = device.createQuerySet({ type: 'timestamp', count: QUERIES });
    this.#resolved = device.createBuffer({
      size: QUERIES * 8,
      usage: GPUBufferUsage.QUERY_RESOLVE | GPUBufferUsage.COPY_SRC,
    });
  }

  /** Whether the next dispatch must wait for a submission. */
  get full(): boolean {
    return this.#names.length * 2 >= QUERIES;
  }

  /** The queries of the next dispatch. */
  next(name: string): GPUComputePassTimestampWrites {
    const index = this.#names.length * 2;
    this.#names.push(name);
    return { querySet: this.#queries, beginningOfPassWriteIndex: index, endOfPassWriteIndex: index + 1 };
  }

  /** Records the end of a submission. */
  resolve(encoder: GPUCommandEncoder): void {
    const count = this.#names.length * 2;
    if (count === 0) return;
    this.#staging = this.#device.createBuffer({
      size: count * 8,
      usage: GPUBufferUsage.COPY_DST | GPUBufferUsage.MAP_READ,
    });
    encoder.resolveQuerySet(this.#queries, 0, count, this.#resolved, 0);
    encoder.copyBufferToBuffer(this.#resolved, 0, this.#staging, 0, count * 8);
  }

  submitted(): void {
    if (this.#staging) this.#batches.push({ names: this.#names, staging: this.#staging });
    this.#staging = undefined;
    this.#names = [];
  }

  async times(): Promise<KernelTime[]> {
    const totals = new Map<string, { calls: number; seconds: number }>();
    for (const { names, staging } of this.#batches) {
      await staging.mapAsync(GPUMapMode.READ);
      const stamps = new BigInt64Array(staging.getMappedRange().slice(0));
      for (const [i, name] of names.entries()) {
        const total = totals.get(name) ?? { calls: 0, seconds: 0 };
        total.calls++;
        total.seconds += Number(stamps[2 * i + 1] - stamps[2 * i]) * 1e-9;
        totals.set(name, total);
      }
    }
    this.dispose();
    return [...totals].map(([name, t]) => ({ name, ...t })).sort((a, b) => b.seconds - a.seconds);
  }

  dispose(): void {
    for (const { staging } of this.#batches) staging.destroy();
    this.#resolved.destroy();
    this.#queries.destroy();
  }
}
