// The arena: one WebAssembly memory that holds what kernels read and write, and an allocator over it.
import { GyreError } from '../../../core/errors.js';

/** Address of a block in the arena. */
export type Pointer = number;

/** Floats that lie in the arena already. */
export interface ArenaFloats {
  readonly pointer: Pointer;
  readonly length: number;
}
/** Operand of a kernel: an ordinary array, copied in or out for the call, or floats in the arena, used in place. */
export type Floats = Float32Array | ArenaFloats;

const PAGE = 65536;
const LIMIT = 65536 * PAGE;
/** Cache lines: blocks of different threads never share one. */
const ALIGN = 64;
/** Growing is slow (views are made anew), so it happens in steps of at least this. */
const MIN_GROWTH = 16 * 1024 * 1024;

interface Block {
  start: number;
  end: number;
}

/**
 * Allocator over a WebAssembly memory of at most 4 GiB. `alloc`/`free` are for what stays; `scratch` blocks live until
 * `reset` returns to an earlier `mark`. Typed views (`f32`, `u8`, …) cover the whole memory and are replaced when it
 * grows: read them from the arena each time instead of keeping them.
 */
export class Arena {
  readonly memory: WebAssembly.Memory;
  f32!: Float32Array;
  f64!: Float64Array;
  u8!: Uint8Array;
  u16!: Uint16Array;
  u32!: Uint32Array;
  i32!: Int32Array;
  /** Free blocks, by address, never adjacent. */
  readonly #free: Block[] = [];
  readonly #sizes = new Map<Pointer, number>();
  readonly #stack: Pointer[] = [];
  #end: number;
  #used = 0;
  readonly #limit: number;

  /** `limit` (bytes) lowers the 4 GiB ceiling, for tests. */
  constructor(memory: WebAssembly.Memory, limit = LIMIT) {
    this.memory = memory;
    this.#limit = Math.min(limit, LIMIT);
    this.#end = memory.buffer.byteLength;
    // The first kilobyte stays unused, so that 0 means "null" to kernels.
    this.#free.push({ start: 1024, end: this.#end });
    this.#refresh();
  }

  /** Bytes allocated now. */
  get used(): number {
    return this.#used;
  }

  /** A block of `bytes`, aligned to 64; its contents are undefined. */
  alloc(bytes: number): Pointer {
    const size = Math.max(ALIGN, Math.ceil(bytes / ALIGN) * ALIGN);
    let at = this.#find(size);
    if (at < 0) {
      this.#grow(size);
      at = this.#find(size);
    }
    const block = this.#free[at];
    const pointer = block.start;
    block.start += size;
    if (block.start === block.end) this.#free.splice(at, 1);
    this.#sizes.set(pointer, size);
    this.#used += size;
    return pointer;
  }

  /** Returns a block; 0 is ignored. */
  free(pointer: Pointer): void {
    if (pointer === 0) return;
    const size = this.#sizes.get(pointer);
    if (size === undefined) throw new GyreError('backend', `arena: freeing ${pointer}, which is not allocated`);
    this.#sizes.delete(pointer);
    this.#used -= size;
    this.#release({ start: pointer, end: pointer + size });
  }

  /** Remembers the top of the scratch stack. */
  mark(): number {
    return this.#stack.length;
  }

  /** A block that lives until the enclosing {@link reset}. */
  scratch(bytes: number): Pointer {
    const pointer = this.alloc(bytes);
    this.#stack.push(pointer);
    return pointer;
  }

  /** Frees all scratch taken since `mark`. */
  reset(mark: number): void {
    while (this.#stack.length > mark) this.free(this.#stack.pop() as Pointer);
  }

  /** Runs `body` and frees the scratch it took, also when it throws. */
  scoped<T>(body: () => T): T {
    const mark = this.mark();
    try {
      return body();
    } finally {
      this.reset(mark);
    }
  }

  /** Copies values into a new scratch block. */
  pushF32(values: Float32Array): Pointer {
    const pointer = this.scratch(values.length * 4);
    this.f32.set(values, pointer >>> 2);
    return pointer;
  }

  /** Copies `length` values at `pointer` out. */
  readF32(pointer: Pointer, out: Float32Array): void {
    out.set(this.f32.subarray(pointer >>> 2, (pointer >>> 2) + out.length));
  }

  /** Where a kernel reads `values`. */
  input(values: Floats): Pointer {
    return values instanceof Float32Array ? this.pushF32(values) : values.pointer;
  }

  /** Where a kernel writes `values`; {@link finish} follows. */
  output(values: Floats): Pointer {
    return values instanceof Float32Array ? this.scratch(values.length * 4) : values.pointer;
  }

  /** Brings what a kernel wrote to `values`. */
  finish(pointer: Pointer, values: Floats): void {
    if (values instanceof Float32Array) this.readF32(pointer, values);
  }

  /** The floats themselves, until the arena grows. */
  view(values: Floats): Float32Array {
    if (values instanceof Float32Array) return values;
    return this.f32.subarray(values.pointer >>> 2, (values.pointer >>> 2) + values.length);
  }

  #find(size: number): number {
    // First fit: scratch blocks come and go in stack order, so the list stays short.
    return this.#free.findIndex((block) => block.end - block.start >= size);
  }

  #release(block: Block): void {
    const list = this.#free;
    let low = 0;
    let high = list.length;
    while (low < high) {
      const middle = (low + high) >>> 1;
      if (list[middle].start < block.start) low = middle + 1;
      else high = middle;
    }
    const before = list[low - 1];
    const after = list[low];
    const joinsBefore = before?.end === block.start;
    const joinsAfter = after?.start === block.end;
    if (joinsBefore && joinsAfter) {
      before.end = after.end;
      list.splice(low, 1);
    } else if (joinsBefore) before.end = block.end;
    else if (joinsAfter) after.start = block.start;
    else list.splice(low, 0, block);
  }

  #grow(size: number): void {
    const last = this.#free[this.#free.length - 1];
    const tail = last?.end === this.#end ? last.end - last.start : 0;
    const needed = this.#end + size - tail;
    const refuse = (cause?: unknown): never => {
      throw new GyreError(
        'out-of-memory',
        `the CPU kernels need ${mebibytes(needed)} MiB of WebAssembly memory, more than the ${mebibytes(this.#limit)} MiB they can address (${mebibytes(this.#used)} MiB in use)`,
        {
          remedy:
            'use a smaller model, a shorter context or fewer calibration tokens; or a backend without this limit (webgpu)',
          cause,
        },
      );
    };
    if (needed > this.#limit) refuse();
    // A quarter more than needed keeps the number of growths logarithmic.
    const wanted = Math.min(this.#limit, Math.max(needed, this.#end + Math.max(MIN_GROWTH, this.#end / 4)));
    try {
      this.memory.grow(Math.ceil((wanted - this.#end) / PAGE));
    } catch {
      try {
        this.memory.grow(Math.ceil((needed - this.#end) / PAGE));
      } catch (cause) {
        refuse(cause);
      }
    }
    const start = this.#end;
    this.#refresh();
    this.#end = this.memory.buffer.byteLength;
    this.#release({ start, end: this.#end });
  }

  #refresh(): void {
    const buffer = this.memory.buffer;
    this.f32 = new Float32Array(buffer);
    this.f64 = new Float64Array(buffer);
    this.u8 = new Uint8Array(buffer);
    this.u16 = new Uint16Array(buffer);
    this.u32 = new Uint32Array(buffer);
    this.i32 = new Int32Array(buffer);
  }
}

function mebibytes(bytes: number): number {
  return Math.ceil(bytes / 2 ** 20);
}
