// The program of a kernel worker, as text: workers are started from a string so that the same package works from
// dist/, under tsx and vitest, and from a bundle, where no file of its own could be found.

/** Words of the control block (Int32Array indices); those written by different threads lie on cache lines of their own. */
export const CONTROL = {
  /** Number of the current job; workers wait for it to change. */
  sequence: 0,
  /** Workers done with the current job. */
  done: 32,
  /** Workers asleep. */
  sleepers: 64,
  /** Set when a kernel trapped. */
  failed: 80,
  kernel: 96,
  units: 97,
  parts: 98,
  argumentCount: 99,
  scratch: 100,
  scratchBytes: 101,
  stop: 102,
  /** How long workers spin for the next job before they sleep, microseconds. */
  spin: 103,
} as const;
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
 * Defines `serve(start)`: instantiates the kernels over the shared memory and runs its part of each job. Spins for a
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
    const parts = words[${CONTROL.parts}];
    if (index < parts) {
      const units = words[${CONTROL.units}];
      const begin = Math.floor((units * index) / parts);
      const end = Math.floor((units * (index + 1)) / parts);
      const scratch = (words[${CONTROL.scratch}] + index * words[${CONTROL.scratchBytes}]) | 0;
      const args = Array.from(values.subarray(0, words[${CONTROL.argumentCount}]));
      try {
        if (begin < end) kernels[words[${CONTROL.kernel}]](begin, end, scratch, ...args);
      } catch {
        Atomics.store(words, ${CONTROL.failed}, 1);
      }
    }
    Atomics.add(words, ${CONTROL.done}, 1);
  }
}
`;
