// Lets waiting events in: kernels that finish at once never leave the microtask queue, where no signal, timer or click gets through.

/** Longest time events wait, ms. */
const INTERVAL_MS = 100;

/**
 * A function to await in long loops. It gives the event loop a turn when the last one is `interval` ms ago (default 100) and costs
 * nothing in between, so that Ctrl-C, abort signals and output are served.
 */
export function createBreath(interval = INTERVAL_MS): () => Promise<void> {
  let last = performance.now();
  return async () => {
    if (performance.now() - last < interval) return;
    await new Promise<void>((resolve) => setTimeout(resolve, 0));
    last = performance.now();
  };
}
