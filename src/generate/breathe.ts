// Lets waiting events in: kernels that finish at once never leave the microtask queue, where no signal, timer or click gets through.

/** Longest time events wait, ms. */
const INTERVAL_MS = 100;

/**
 * A function to await in long loops. It gives the event loop a turn when the last one is 100 ms ago and costs nothing
 * in between, so that Ctrl-C, abort signals and output are served.
 */
export function createBreath(): () => Promise<void> {
  let last = performance.now();
  return async () => {
    if (performance.now() - last < INTERVAL_MS) return;
    await new Promise<void>((resolve) => setTimeout(resolve, 0));
    last = performance.now();
  };
}
