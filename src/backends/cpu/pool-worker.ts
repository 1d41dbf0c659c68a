// The program of a kernel worker, as text: workers are started from a string so that the same package works from
// dist/, under tsx and vitest, and from a bundle, where no file of its own could be found.

/** Words of the control block (Int32Array indices); those written by different threads lie on cache lines of their own. */
export const CONTROL = {
  /** Number of the current job; workers wait for it to change. */
  sequence: 0,
  /** Pieces of the current job that are done. */
  done: 32,
  /**
   * The current job's number (modulo 2^20) · 2^TICKET_BITS + pieces not yet taken. Threads take pieces by decreasing it.
   * Whoever succeeds knows that the job is still this one, and that the rest of the block was read whole: it changes only
   * when all pieces are done.
   */
  ticket: 48,
  /** Workers asleep. */
  sleepers: 64,
  /** Set when a kernel trapped. */
  failed: 80,
  kernel: 96,
  units: 97,
  /** Threads that may take pieces; pieces of the job. */
  parts: 98,
  argumentCount: 99,
  scratch: 100,
  scratchBytes: 101,
  stop: 102,
  pieces: 104,
  /** How long workers spin for the next job before they sleep, microseconds. */
  spin: 103,
} as const;
/** Bits of a ticket that count pieces. */
export const TICKET_BITS = 11;
/** Offset of the arguments (f64) in the control block, and its size. */
export const ARGUMENTS_AT = 512;
export const CONTROL_BYTES = 1024;

/** What a worker is started with. */
export interface WorkerStart {
  readonly module: WebAssembly.Module;
  readonly memory: WebAssembly.Memory;
  readonly control: SharedArrayBuffer;
  /** 1 … threads − 1; the main thread is 0. */
  readonly index: number;
}

/** Running workers. */
export interface Workers {
  stop(): Promise<void>;
}

/**
 * Defines `serve(start)`: instantiates the kernels over the shared memory and takes pieces of each job. Spins for a
 * while between jobs (a wake-up from sleep costs more than most decode kernels), then sleeps.
 */
export const WORKER_SOURCE = `
function serve({ module, memory, control, index }, ready) {
  const exported = new WebAssembly.Instance(module, { env: { memory } }).exports;
  const kernels = WebAssembly.Module.exports(module).map((e) => exported[e.name]);
  const words = new Int32Array(control);
  const values = new Float64Array(control, ${ARGUMENTS_AT});
  let seen = 0;
  ready();
  for (;;) {
    let now = Atomics.load(words, ${CONTROL.sequence});
    if (now === seen) {
      const until = performance.now() + words[${CONTROL.spin}] / 1000;
      do {
        for (let i = 0; i < 100 && now === seen; i++) now = Atomics.load(words, ${CONTROL.sequence});
      } while (now === seen && performance.now() < until);
      if (now === seen) {
        Atomics.add(words, ${CONTROL.sleepers}, 1);
        Atomics.wait(words, ${CONTROL.sequence}, seen);
        Atomics.sub(words, ${CONTROL.sleepers}, 1);
        continue;
      }
    }
    seen = now;
    if (words[${CONTROL.stop}]) return;
    if (index >= words[${CONTROL.parts}]) continue;
    const kernel = kernels[words[${CONTROL.kernel}]];
    const units = words[${CONTROL.units}];
    const pieces = words[${CONTROL.pieces}];
    const scratch = (words[${CONTROL.scratch}] + index * words[${CONTROL.scratchBytes}]) | 0;
    const args = Array.from(values.subarray(0, words[${CONTROL.argumentCount}]));
    for (;;) {
      const ticket = Atomics.load(words, ${CONTROL.ticket});
      const left = ticket & ${(1 << TICKET_BITS) - 1};
      if (left === 0 || ticket >> ${TICKET_BITS} !== (seen << ${TICKET_BITS}) >> ${TICKET_BITS}) break;
      if (Atomics.compareExchange(words, ${CONTROL.ticket}, ticket, ticket - 1) !== ticket) continue;
      const piece = pieces - left;
      try {
        kernel(Math.floor((units * piece) / pieces), Math.floor((units * (piece + 1)) / pieces), scratch, ...args);
      } catch {
        Atomics.store(words, ${CONTROL.failed}, 1);
      }
      Atomics.add(words, ${CONTROL.done}, 1);
    }
  }
}
`;
